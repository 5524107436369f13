"""Figure 7: FL* over a grid of gamma and beta, 16 runs.

    python scripts/sweep.py --sweep configs/sweeps/fig7.py --workdir DIR

Paper: many settings of FL* exceed 33.5 AP (blue curves); it does not list them. This grid is this project's choice: gamma
(steepness) 1 to 4 by beta (shift) -1 to 2, including Table 3's two settings.
"""

from typing import Any

from retina_jax.config import Config
from retina_jax.paper.settings import focal_star

GAMMAS = (1.0, 2.0, 3.0, 4.0)
BETAS = (-1.0, 0.0, 1.0, 2.0)


def get_sweep(base: Config) -> dict[str, dict[str, Any]]:
    """Returns one run per setting."""
    return {f"gamma_{gamma}_beta_{beta}": focal_star(gamma, beta) for gamma in GAMMAS for beta in BETAS}
