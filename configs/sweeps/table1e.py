"""Table 1e: depth and image scale, accuracy against speed (Figure 2), 10 runs.

    python scripts/sweep.py --sweep configs/sweeps/table1e.py --workdir DIR

Paper (test-dev): ResNet-50 30.5, 32.5, 34.3, 35.1, 35.7; ResNet-101 31.9, 34.4, 36.0, 37.1, 37.8 AP; 64 to 198 ms per image
on an M40. The longer side is at most 5/3 of the shorter (Detectron: 1000 with 600, 1333 with 800). Scales are relative to
the base, whose short side corresponds to 600.
"""

from typing import Any

from retina_jax.config import Config
from retina_jax.paper.settings import at_scale, deeper, focal

SCALES = (400, 500, 600, 700, 800)


def get_sweep(base: Config) -> dict[str, dict[str, Any]]:
    """Returns one run per depth and scale; depth 50 is the base's backbone."""
    depths = {50: {}, 101: deeper(base)}
    return {
        f"depth_{depth}_scale_{scale}": {**changes, **at_scale(base, scale), **focal(2.0, 0.25)}
        for depth, changes in depths.items()
        for scale in SCALES
    }
