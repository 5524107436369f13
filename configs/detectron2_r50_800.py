r"""detectron2's RetinaNet R50-FPN, schedule 1x.

    python scripts/train.py --config configs/detectron2_r50_800.py --workdir runs/detectron2_r50_800

Published: AP 37.4 on val2017 (3x: 38.7; R101 3x: 40.4), 90k steps of 16 images, short sides from 640 to 800, 0.205 s
per step on 8 V100. To score the published weights without training:

    python scripts/evaluate.py --weights detectron2:retinanet_R_50_FPN_1x --workdir runs/detectron2_r50_theirs \
        --data.val-annotations data/coco/annotations/instances_val2017.json --data.val-images data/coco/val2017

3x: --training.steps 270000 --optimizer.boundaries 210000 250000. The remaining differences from detectron2 are listed
in docs/conventions.md.
"""

from retina_jax.config import Config, DataConfig, ModelConfig
from retina_jax.config_io import override
from retina_jax.presets import PRESETS


def get_config() -> Config:
    """Returns the preset with COCO and the MSRA backbone; the schedule is the default, the paper's."""
    config = Config(
        data=DataConfig(
            train_annotations="data/coco/annotations/instances_train2017.json",
            train_images="data/coco/train2017",
            val_annotations="data/coco/annotations/instances_val2017.json",
            val_images="data/coco/val2017",
        ),
        model=ModelConfig(num_classes=80, backbone_weights="imagenet"),
    )
    return override(config, PRESETS["detectron2"])
