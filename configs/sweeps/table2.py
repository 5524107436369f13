"""Table 2: the paper's best models, 2 runs.

    python scripts/sweep.py --sweep configs/sweeps/table2.py --workdir DIR

Paper (test-dev): ResNet-101 39.1 AP, ResNeXt-101-32x8d 40.8 AP: 800 pixels, scale jitter, 1.5 times the schedule. The paper
does not state the range of its jitter; this is detectron2's: short sides from 640 to 800 by 32.
"""

from typing import Any

from retina_jax.config import Config
from retina_jax.paper.settings import at_scale, deeper, jitter, longer, resnext


def get_sweep(base: Config) -> dict[str, dict[str, Any]]:
    """Returns one run per backbone."""
    recipe = {**at_scale(base, 800), **jitter(base), **longer(base, 1.5)}
    return {"resnet101": {**deeper(base), **recipe}, "resnext101": {**resnext(base), **recipe}}
