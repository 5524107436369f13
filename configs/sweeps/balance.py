"""A control that the paper leaves out: how much the box loss weighs beside the class loss, 6 runs.

    python scripts/sweep.py --sweep configs/sweeps/balance.py --workdir DIR

The focal loss is several times smaller than cross entropy, and so leaves the box loss a larger share of what the backbone
and the pyramid learn from. Here both losses are trained with the box loss as it is, a fifth of it, and five times as heavy.
"""

from typing import Any

from retina_jax.config import Config
from retina_jax.paper.settings import balanced_cross_entropy, focal

FACTORS = (0.2, 1.0, 5.0)


def get_sweep(base: Config) -> dict[str, dict[str, Any]]:
    """One run a loss and weight; Table 1b's gamma 0 and gamma 2 are those at the base's own."""
    losses = {"cross_entropy": balanced_cross_entropy(0.75), "focal": focal(2.0, 0.25)}
    return {
        f"{name}_box_x{factor:g}": {**loss, "loss.box_weight": base.loss.box_weight * factor}
        for name, loss in losses.items()
        for factor in FACTORS
    }
