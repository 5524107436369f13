r"""Detectron's RetinaNet R-50-FPN, schedule 1x: the paper's code at 800 pixels.

    python scripts/train.py --config configs/detectron_r50_800.py --workdir runs/detectron_r50_800

Published: AP 35.7 on minival (R-101 37.7, X-101-32x8d 39.5), 90k steps of 16 images, 0.483 s per step on 8 P100. To
score the published weights without training:

    python scripts/evaluate.py --weights detectron:retinanet_R-50-FPN_1x --workdir runs/detectron_r50_theirs \
        --data.val-annotations data/coco/annotations/instances_val2017.json --data.val-images data/coco/val2017

R-101: --model.backbone resnet101; X-101: --model.backbone resnext101_32x8d --model.stride-position 3x3. The remaining
differences from Detectron are listed in docs/conventions.md.
"""

from retina_jax.config import Config, DataConfig, ModelConfig
from retina_jax.config_io import override
from retina_jax.presets import PRESETS


def get_config() -> Config:
    """Returns the preset with COCO and the MSRA backbone; schedule and optimizer are the defaults, which are Detectron's."""
    config = Config(
        data=DataConfig(
            train_annotations="data/coco/annotations/instances_train2017.json",
            train_images="data/coco/train2017",
            val_annotations="data/coco/annotations/instances_val2017.json",
            val_images="data/coco/val2017",
        ),
        model=ModelConfig(num_classes=80, backbone_weights="imagenet"),
    )
    return override(config, PRESETS["detectron"])
