"""A control that is not in the paper: the weight of the box loss, 6 runs.

    python scripts/sweep.py --sweep configs/sweeps/balance.py --workdir DIR

The focal loss is several times smaller than cross entropy, so the box loss has a larger share in the gradient of the
backbone and the pyramid. This sweep trains both losses with the box loss times 0.2, 1 and 5.
"""

from typing import Any

from retina_jax.config import Config
from retina_jax.paper.settings import balanced_cross_entropy, focal

FACTORS = (0.2, 1.0, 5.0)


def get_sweep(base: Config) -> dict[str, dict[str, Any]]:
    """Returns one run per loss and weight; those with the base's weight are Table 1b's gamma 0 and gamma 2."""
    losses = {"cross_entropy": balanced_cross_entropy(0.75), "focal": focal(2.0, 0.25)}
    return {
        f"{name}_box_x{factor:g}": {**loss, "loss.box_weight": base.loss.box_weight * factor}
        for name, loss in losses.items()
        for factor in FACTORS
    }
