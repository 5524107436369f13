"""Table 1b: gamma of the focal loss, each with the alpha that the paper found best for it, 7 runs.

    python scripts/sweep.py --sweep configs/sweeps/table1b.py --workdir DIR

Paper (minival): 31.1, 31.4, 31.9, 32.9, 33.7, 34.0 and 32.2 AP, in the order of the points. gamma 2 is the default
RetinaNet-50-600, which is also a row of Tables 1c, 1e and 3.
"""

from typing import Any

from retina_jax.config import Config
from retina_jax.paper.settings import focal

ALPHA_OF_GAMMA = {0.0: 0.75, 0.1: 0.75, 0.2: 0.75, 0.5: 0.50, 1.0: 0.25, 2.0: 0.25, 5.0: 0.25}


def get_sweep(base: Config) -> dict[str, dict[str, Any]]:
    """Returns one run per gamma."""
    return {f"gamma_{gamma}": focal(gamma, alpha) for gamma, alpha in ALPHA_OF_GAMMA.items()}
