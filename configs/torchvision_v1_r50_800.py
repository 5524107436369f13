r"""torchvision's `retinanet_resnet50_fpn` (its COCO weights, v1), trained by its recipe.

    python scripts/train.py --config configs/torchvision_v1_r50_800.py --workdir runs/torchvision_v1

Published: AP 36.4 on val2017, 26 epochs of 16 images, rate 0.01 dropped after 16 and 22 epochs (8 GPUs). To score the
published weights without training:

    python scripts/evaluate.py --weights torchvision:retinanet_resnet50_fpn_coco --workdir runs/torchvision_v1_theirs \
        --data.val-annotations data/coco/annotations/instances_val2017.json --data.val-images data/coco/val2017

An epoch is 7329 steps: 117266 images with objects. torchvision pads a batch to its largest image, here training has four
padded shapes. The other differences are listed in docs/conventions.md.
"""

from retina_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
from retina_jax.config_io import override
from retina_jax.presets import PRESETS

EPOCH = 7329


def get_config() -> Config:
    """Returns the preset with COCO, torchvision's ImageNet backbone and 26 epochs."""
    config = Config(
        data=DataConfig(
            train_annotations="data/coco/annotations/instances_train2017.json",
            train_images="data/coco/train2017",
            val_annotations="data/coco/annotations/instances_val2017.json",
            val_images="data/coco/val2017",
        ),
        model=ModelConfig(num_classes=80, backbone_weights="imagenet"),
        optimizer=OptimizerConfig(boundaries=(16 * EPOCH, 22 * EPOCH)),
        training=TrainingConfig(steps=26 * EPOCH),
    )
    return override(config, PRESETS["torchvision_v1"])
