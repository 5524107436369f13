"""TensorFlow Model Garden's RetinaNet R50-FPN at 640 pixels (retinanet_resnetfpn_coco).

    python scripts/train.py --config configs/tf_model_garden_r50_640.py --workdir runs/tf_model_garden_r50_640

Published: AP 36.8 on val2017 after 72 epochs (34.3 after 12), 256 images per step, rate 0.32 dropped after 57 and 67
epochs, scale jitter 0.8 to 1.2, square images of 640 pixels, focal loss with gamma 1.5. Source: tensorflow/models,
official/vision/MODEL_GARDEN.md (commit 17d0a07) and official/vision/configs/retinanet.py (commit 001ec92).

It trains all stages, with BatchNorm in the heads for each pyramid level, from torchvision's ImageNet weights here. Its box
loss is 50 times a Huber loss of delta 0.1, averaged over the four numbers, which is 1.25 times the smooth L1 of beta 0.1.
Differences that remain: it has BatchNorms in the pyramid too, statistics of each device alone, running means of momentum
0.99 and epsilon 0.001, adds 1 to the number of positive anchors, and keeps 5000 candidates of all levels before NMS.
"""

from retina_jax.config import (
    Config,
    DataConfig,
    LossConfig,
    MatchingConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)

EPOCH = 462
"""Steps of 256 images: 118,287 // 256."""


def get_config() -> Config:
    """Returns the config with COCO and 72 epochs."""
    return Config(
        data=DataConfig(
            train_annotations="data/coco/annotations/instances_train2017.json",
            train_images="data/coco/train2017",
            val_annotations="data/coco/annotations/instances_val2017.json",
            val_images="data/coco/val2017",
            batch_size=256,
            short_side=640,
            long_side=640,
            scale_jitter=(0.8, 1.2),
            buckets=1,
            images_without_boxes="keep",
        ),
        model=ModelConfig(
            num_classes=80,
            backbone_weights="imagenet",
            input_normalisation="imagenet",
            stride_position="3x3",
            norm="batch",
            frozen_stages=0,
            head_norm="batch",
            p6_from="p5",
            dtype="bfloat16",
        ),
        matching=MatchingConfig(negative_iou=0.5, low_quality="all"),
        loss=LossConfig(gamma=1.5, beta=0.1, box_weight=1.25, normaliser="per_device"),
        optimizer=OptimizerConfig(
            learning_rate=0.32,
            bias_learning_rate_factor=1.0,
            warmup_steps=500,
            warmup_factor=0.0067 / 0.32,
            boundaries=(57 * EPOCH, 67 * EPOCH),
        ),
        training=TrainingConfig(steps=72 * EPOCH, eval_every=EPOCH),
    )
