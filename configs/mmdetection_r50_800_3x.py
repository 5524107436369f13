"""mmdetection's RetinaNet R-50-FPN, multi-scale, schedule 3x (retinanet_r50_fpn_ms-640-800-3x_coco).

    python scripts/train.py --config configs/mmdetection_r50_800_3x.py --workdir runs/mmdetection_r50_800_3x

Published: AP 39.5 on val2017 (R-101 41, X-101-64x4d 41.6), 36 epochs of 16 images, short sides from 640 to 800, rate 0.01
dropped after 27 and 33 epochs. Source: open-mmlab/mmdetection, configs/retinanet/README.md (commit 10e91fd),
configs/common/ms_3x_coco.py: 12 epochs of a dataset that is repeated three times, milestones 9 and 11. The rest is
configs/mmdetection_r50_800.py.
"""

from pathlib import Path

from retina_jax.config import Config
from retina_jax.config_io import load_config, override


def get_config() -> Config:
    """Returns the 1x config with multi-scale training and the schedule 3x."""
    changes = {
        "data.jitter_short_sides": tuple(range(640, 801)),
        "optimizer.boundary_epochs": (27.0, 33.0),
        "training.epochs": 36.0,
        "training.steps": 263_849,
    }
    return override(load_config(Path(__file__).with_name("mmdetection_r50_800.py")), changes)
