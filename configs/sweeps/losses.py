"""A control that is not in the paper: cross entropy and focal loss at four rates and two weights of the box loss, 16 runs.

    python scripts/sweep.py --sweep configs/sweeps/losses.py --base configs/own_data.py --workdir DIR

with the options of your data. The best rate and the best weight of the box loss may differ between the losses. The rates
are a third to nine times the base's. Choose by the scores of the validation images, and repeat the chosen points with
`--only NAMES --seeds 0 1 2`.
"""

from typing import Any

from retina_jax.config import Config
from retina_jax.paper.settings import balanced_cross_entropy, focal

RATES = (1 / 3, 1.0, 3.0, 9.0)
BOX_WEIGHTS = (1.0, 5.0)


def get_sweep(base: Config) -> dict[str, dict[str, Any]]:
    """Returns one run per loss, factor of the base's rate and factor of the base's box weight."""
    losses = {"cross_entropy": balanced_cross_entropy(0.75), "focal": focal(2.0, 0.25)}
    return {
        f"{name}_rate_x{rate:.2g}_box_x{weight:g}": {
            **loss,
            "optimizer.learning_rate": base.optimizer.learning_rate * rate,
            "loss.box_weight": base.loss.box_weight * weight,
        }
        for name, loss in losses.items()
        for rate in RATES
        for weight in BOX_WEIGHTS
    }
