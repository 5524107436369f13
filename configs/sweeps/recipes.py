"""A control that is not in the paper: what augmentation, a cosine schedule and early stopping change, 6 runs.

    python scripts/sweep.py --sweep configs/sweeps/recipes.py --base configs/own_data.py --workdir DIR --data...

Each point changes one thing of the base, `all` changes the three that need no more steps. `patience` trains twice as long
and ends early; it evaluates twelve times on the way, and so does the base, whose curve then shows where it could have ended.
"""

from typing import Any

from retina_jax.config import Config
from retina_jax.paper.settings import longer


def get_sweep(base: Config) -> dict[str, dict[str, Any]]:
    """Returns the base and the five recipes."""
    scale = {"data.scale_jitter": (0.8, 1.2)}
    colour = {"data.colour_jitter": 0.2}
    cosine = {"optimizer.schedule": "cosine"}
    evaluations = {"training.eval_every": max(base.training.steps // 6, 1)}
    points: dict[str, dict[str, Any]] = {
        "baseline": {},
        "scale_crop": scale,
        "colour": colour,
        "cosine": cosine,
        "patience": {**longer(base, 2), "training.patience": 3},
        "all": {**scale, **colour, **cosine},
    }
    return {name: {**evaluations, **point} for name, point in points.items()}
