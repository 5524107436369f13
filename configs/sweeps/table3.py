"""Table 3: FL*, another form of the focal loss, 4 runs.

    python scripts/sweep.py --sweep configs/sweeps/table3.py --workdir DIR

Paper (minival): 31.1, 34.0, 33.8 and 33.9 AP, in the order of the points. Cross entropy is Table 1a's alpha 0.75, the focal
loss is the default. FL* has alpha 0.25 ("in all experiments", Appendix A).
"""

from typing import Any

from retina_jax.config import Config
from retina_jax.paper.settings import balanced_cross_entropy, focal, focal_star


def get_sweep(base: Config) -> dict[str, dict[str, Any]]:
    """Returns one run per loss."""
    return {
        "cross_entropy": balanced_cross_entropy(0.75),
        "focal": focal(2.0, 0.25),
        "focal_star_2.0_1.0": focal_star(2.0, 1.0),
        "focal_star_4.0_0.0": focal_star(4.0, 0.0),
    }
