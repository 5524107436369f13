"""detectron2's RetinaNet R50-FPN, schedule 3x: three times as long as configs/detectron2_r50_800.py.

    python scripts/train.py --config configs/detectron2_r50_800_3x.py --workdir runs/detectron2_r50_800_3x

Published: AP 38.7 on val2017, 270k steps of 16 images, rate 0.01 dropped after 210k and 250k (R101 40.4:
--model.backbone resnet101). Source: detectron2's MODEL_ZOO.md, models 190397829 (R50) and 190397697 (R101). To score the
published weights without training: `evaluate.py --weights detectron2:retinanet_R_50_FPN_3x`.
"""

from pathlib import Path

from retina_jax.config import Config
from retina_jax.config_io import load_config, override


def get_config() -> Config:
    """Returns the 1x config with the schedule 3x."""
    changes = {"training.steps": 270_000, "optimizer.boundaries": (210_000, 250_000)}
    return override(load_config(Path(__file__).with_name("detectron2_r50_800.py")), changes)
