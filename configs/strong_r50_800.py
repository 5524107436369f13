r"""The strongest recipe for a ResNet-50 here: torchvision v2's training with this project's conventions, and EMA.

    python scripts/train.py --config configs/strong_r50_800.py --workdir runs/strong_r50_800

Expected, not measured: AP about 41.5 on val2017, what torchvision publishes for `retinanet_resnet50_fpn_v2` (26 epochs
of 16 images on 8 GPUs). It differs from that recipe, `configs/torchvision_v2_r50_800.py`, where this project's defaults
do: the paper's anchors instead of torchvision's rounded ones, six padded shapes, sides of images rounded to nearest,
pixels rounded to uint8, and 100 instead of 300 detections. EMA of the parameters is added; it may gain nothing after
both drops of the learning rate (docs/results/ema_tta.md).

Expected cost: 4146 PFLOP, 3.8 times the paper's ResNet-50-600; 11 hours on 8 V100 at the 0.205 s per step that
detectron2 publishes for the same images without trained norms.

It uses AdamW with decay 0.05 on kernels and convolution biases; GIoU; GroupNorm in the subnets; BatchNorm over the
batch of all devices in the stages that train (C3 to C5); P6 from C5; short sides from 480 to 800.
`--model.dtype bfloat16` reduces its cost, `--model.remat` its memory.

Test-time augmentation (mirrored, three sizes) takes at least six times as long:

    python scripts/evaluate.py --workdir runs/strong_r50_800 --step best --detection.tta-flip \
        --detection.tta-short-sides 640 960
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

EPOCH = 7329
"""Steps of 16 images: 117266 images with objects."""


def get_config() -> Config:
    """Returns the config with COCO, torchvision's ImageNet backbone and 26 epochs."""
    return Config(
        data=DataConfig(
            train_annotations="data/coco/annotations/instances_train2017.json",
            train_images="data/coco/train2017",
            val_annotations="data/coco/annotations/instances_val2017.json",
            val_images="data/coco/val2017",
            short_side=800,
            long_side=1333,
            jitter_short_sides=(480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800),
        ),
        model=ModelConfig(
            num_classes=80,
            backbone_weights="imagenet",
            input_normalisation="imagenet",
            stride_position="3x3",
            norm="batch",
            head_norm="group",
            p6_from="c5",
        ),
        matching=MatchingConfig(low_quality="all"),
        loss=LossConfig(box="giou"),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=1e-4,
            weight_decay=0.05,
            bias_learning_rate_factor=1.0,
            decay_biases=True,
            warmup_steps=1000,
            warmup_factor=0.001,
            boundaries=(16 * EPOCH, 22 * EPOCH),
            ema_decay=0.9998,
        ),
        training=TrainingConfig(steps=26 * EPOCH),
    )
