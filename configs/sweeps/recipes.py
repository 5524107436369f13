"""A control that is not in the paper: what augmentation, a cosine schedule and early stopping change, 6 runs.

    python scripts/sweep.py --sweep configs/sweeps/recipes.py --base configs/own_data.py --workdir DIR

with the options of your data. `scale_crop`, `colour` and `cosine` change one thing of the base, `all` changes the three.
`patience` trains twice as long and may end early. Each point is evaluated after every sixth of the base's steps; with
`training.epochs`, the number of steps is not known here, and the base decides when to evaluate.
"""

from typing import Any

from retina_jax.config import Config
from retina_jax.paper.settings import longer


def get_sweep(base: Config) -> dict[str, dict[str, Any]]:
    """Returns the base and the five recipes."""
    scale = {"data.scale_jitter": (0.8, 1.2), "data.jitter_short_sides": ()}
    colour = {"data.colour_jitter": 0.2}
    cosine = {"optimizer.schedule": "cosine"}
    every_sixth = {"training.eval_every": max(base.training.steps // 6, 1)}
    points: dict[str, dict[str, Any]] = {
        "baseline": {},
        "scale_crop": scale,
        "colour": colour,
        "cosine": cosine,
        "patience": {**longer(base, 2), "training.patience": 3},
        "all": {**scale, **colour, **cosine},
    }
    return {name: {**({} if base.training.epochs else every_sixth), **point} for name, point in points.items()}
