"""Table 1a: alpha of the balanced cross entropy, 7 runs.

    python scripts/sweep.py --sweep configs/sweeps/table1a.py --workdir DIR

Paper (minival): 0.0, 10.8, 30.2, 31.1, 30.8, 28.7 and 25.1 AP, in the order of the points. alpha 0.75 is Table 1b's gamma 0.
"""

from typing import Any

from retina_jax.config import Config
from retina_jax.paper.settings import balanced_cross_entropy

ALPHAS = ("0.10", "0.25", "0.50", "0.75", "0.90", "0.99", "0.999")


def get_sweep(base: Config) -> dict[str, dict[str, Any]]:
    """Returns one run per alpha."""
    return {f"alpha_{alpha}": balanced_cross_entropy(float(alpha)) for alpha in ALPHAS}
