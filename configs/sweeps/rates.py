"""A control that is not in the paper: cross entropy and focal loss at several learning rates, 10 runs.

    python scripts/sweep.py --sweep configs/sweeps/rates.py --workdir DIR

The gradients of the two losses differ in size, so one learning rate may favour one of them. A fair comparison uses the
best rate of each. The rates are 0.25 to 4 times the base's.
"""

from typing import Any

from retina_jax.config import Config
from retina_jax.paper.settings import balanced_cross_entropy, focal

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


def get_sweep(base: Config) -> dict[str, dict[str, Any]]:
    """Returns one run per loss and rate; those with the base's rate are Table 1b's gamma 0 and gamma 2."""
    losses = {"cross_entropy": balanced_cross_entropy(0.75), "focal": focal(2.0, 0.25)}
    return {
        f"{name}_rate_x{factor:g}": {**loss, "optimizer.learning_rate": base.optimizer.learning_rate * factor}
        for name, loss in losses.items()
        for factor in FACTORS
    }
