"""A control that is not in the paper: cross entropy and focal loss trained four times as long, 2 runs.

    python scripts/sweep.py --sweep configs/sweeps/long.py --workdir DIR

Shows whether a difference between the losses remains when neither improves any more.
"""

from typing import Any

from retina_jax.config import Config
from retina_jax.paper.settings import balanced_cross_entropy, focal, longer


def get_sweep(base: Config) -> dict[str, dict[str, Any]]:
    """Returns Table 1b's gamma 0 and gamma 2 with the longer schedule, evaluated ten times. With `training.epochs`, the
    number of steps is not known here, and the base decides when to evaluate."""
    four = longer(base, 4)
    if not base.training.epochs:
        four["training.eval_every"] = max(round(base.training.steps * 4 / 10), 1)
    return {"cross_entropy": {**balanced_cross_entropy(0.75), **four}, "focal": {**focal(2.0, 0.25), **four}}
