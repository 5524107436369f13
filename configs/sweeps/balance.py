"""A control that the paper leaves out: how much the box loss weighs beside the class loss, 4 runs.

    python scripts/sweep.py --sweep configs/sweeps/balance.py --workdir DIR

The focal loss is several times smaller than cross entropy, and so leaves the box loss a larger share of what the backbone
and the pyramid learn from. Here cross entropy is given that share (the box loss five times as heavy), and the focal loss is
denied it (a fifth).
"""

from typing import Any

from retina_jax.config import Config
from retina_jax.paper.settings import balanced_cross_entropy, focal


def get_sweep(base: Config) -> dict[str, dict[str, Any]]:
    """Table 1b's gamma 0 and gamma 2, each as it is and with the other's balance."""
    losses = {"cross_entropy": (balanced_cross_entropy(0.75), 5.0), "focal": (focal(2.0, 0.25), 0.2)}
    return {
        f"{name}_box_x{factor:g}": {**loss, "loss.box_weight": base.loss.box_weight * factor}
        for name, (loss, other) in losses.items()
        for factor in (1.0, other)
    }
