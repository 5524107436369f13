"""A control that the paper leaves out: cross entropy and focal loss each over learning rates, 10 runs.

    python scripts/sweep.py --sweep configs/sweeps/rates.py --workdir DIR

The two losses have gradients of different sizes, so that one rate need not be as good for both: a fair comparison takes each
at its own best. The rates are a quarter to four times the base's.
"""

from typing import Any

from retina_jax.config import Config
from retina_jax.paper.settings import balanced_cross_entropy, focal

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


def get_sweep(base: Config) -> dict[str, dict[str, Any]]:
    """One run a loss and rate; Table 1b's gamma 0 and gamma 2 are those at the base's own."""
    losses = {"cross_entropy": balanced_cross_entropy(0.75), "focal": focal(2.0, 0.25)}
    return {
        f"{name}_rate_x{factor:g}": {**loss, "optimizer.learning_rate": base.optimizer.learning_rate * factor}
        for name, loss in losses.items()
        for factor in FACTORS
    }
