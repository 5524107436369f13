"""MLPerf training v5.1, object detection: RetinaNet with ResNeXt-50-32x4d on OpenImages, 800 x 800 pixels.

    python scripts/train.py --config configs/mlperf_resnext50_800.py --workdir runs/mlperf_resnext50_800

Published: the target is mAP 0.34 on the 24,781 validation images, evaluated after each epoch; all 20 reference runs with
256 images per step reach it after 4 epochs of the 1,170,301 training images of 264 classes. Adam, rate 1e-4 without drops
after a warm-up of one epoch from 1e-7, no weight decay. Source: mlcommons/training, single_stage_detector/README.md
(commit 0bc5696), and mlcommons/logging, mlperf_logging/rcp_checker/training_5.1.0/rcps_retinanet.json (commit 879802c).

The reference has torchvision's v1 network and loss with frozen BatchNorms, and stretches each image to a square. Its
scripts write the subset and its annotations in COCO's format to data/openimages: train/labels/openimages-mlperf.json and
train/data, and the same for validation. Training starts from torchvision's ImageNet weights, and ends after 8 epochs, as the
reference's scripts do (config_DGXA100_001x08x032.sh).
"""

from retina_jax.config import Config, DataConfig, ModelConfig
from retina_jax.config_io import override
from retina_jax.presets import PRESETS

EPOCH = 4572
"""Steps of 256 images: 1,170,301 / 256, rounded up."""


def get_config() -> Config:
    """Returns torchvision's v1 preset with MLPerf's data, backbone, optimizer and 8 epochs."""
    config = Config(
        data=DataConfig(
            train_annotations="data/openimages/train/labels/openimages-mlperf.json",
            train_images="data/openimages/train/data",
            val_annotations="data/openimages/validation/labels/openimages-mlperf.json",
            val_images="data/openimages/validation/data",
            batch_size=256,
        ),
        model=ModelConfig(backbone="resnext50_32x4d", num_classes=264, backbone_weights="imagenet"),
    )
    changes = PRESETS["torchvision_v1"] | {
        "data.long_side": 800,
        "data.buckets": 1,
        "data.resize_rule": "stretch",
        "data.max_boxes": "auto",
        "optimizer.name": "adamw",
        "optimizer.schedule": "constant",
        "optimizer.learning_rate": 1e-4,
        "optimizer.weight_decay": 0.0,
        "optimizer.warmup_steps": EPOCH,
        "optimizer.warmup_factor": 0.001,
        "training.steps": 8 * EPOCH,
        "training.eval_every": EPOCH,
    }
    return override(config, changes)
