"""mmdetection's RetinaNet R-50-FPN, schedule 1x (retinanet_r50_fpn_1x_coco).

    python scripts/train.py --config configs/mmdetection_r50_800.py --workdir runs/mmdetection_r50_800

Published: AP 36.5 on val2017 (pytorch style; R-101 38.5, X-101-64x4d 41.0), 12 epochs of 16 images on 8 GPUs, rate 0.01
dropped after 8 and 11 epochs. Source: open-mmlab/mmdetection, configs/retinanet/README.md and metafile.yml (commit
10e91fd), configs/_base_/models/retinanet_r50_fpn.py and schedules/schedule_1x.py.

mmdetection starts from torchvision's ResNet-50, freezes the stem and C2, and trains scale and bias of the other BatchNorms
with fixed statistics. R-101: --model.backbone resnet101; X-101-64x4d: --model.backbone resnext101_64x4d. Differences that
remain: mmdetection has no ReLU before P7, decays normalisation parameters, adds 1 to the normaliser of an image without
positive anchors, leaves out images with a side below 32 pixels, and pads a batch to its largest image.
"""

from retina_jax.config import Config, DataConfig, ModelConfig
from retina_jax.config_io import override

STEPS = 87_950
"""12 epochs of COCO's 117,266 images with objects, 16 in each step."""


def get_config() -> Config:
    """Returns the config with COCO, torchvision's ImageNet backbone and 12 epochs."""
    config = Config(
        data=DataConfig(
            train_annotations="data/coco/annotations/instances_train2017.json",
            train_images="data/coco/train2017",
            val_annotations="data/coco/annotations/instances_val2017.json",
            val_images="data/coco/val2017",
            short_side=800,
            long_side=1333,
        ),
        model=ModelConfig(
            num_classes=80,
            backbone_weights="imagenet",
            input_normalisation="imagenet",
            stride_position="3x3",
            norm="frozen_statistics",
        ),
    )
    changes = {
        "anchors.style": "detectron2",
        "matching.low_quality": "all",
        "loss.box": "l1",
        "loss.normaliser": "per_device",
        "optimizer.bias_learning_rate_factor": 1.0,
        "optimizer.decay_biases": True,
        "optimizer.warmup_factor": 0.001,
        "optimizer.boundary_epochs": (8.0, 11.0),
        "training.epochs": 12.0,
        "training.steps": STEPS,
    }
    return override(config, changes)
