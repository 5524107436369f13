"""Your own data in COCO format: a JSON of boxes and a folder of images, for training and for validation.

    python scripts/train.py --config configs/own_data.py --workdir runs/mine \
        --data.train-annotations train.json --data.train-images images \
        --data.val-annotations val.json --data.val-images images

Trains from random initialisation on one machine: ResNet-18 with GroupNorm, so that no pretrained weights and no large
batches are needed. The classes are the categories of the JSON. Copy this file and change it, or override on the command
line. What to look at first: `data.short_side` (objects should be 16 px or more after the resize), `training.steps` and
the two `optimizer.boundaries` (at 2/3 and 8/9 of the steps), `data.batch_size` with `optimizer.learning_rate`.
"""

from retina_jax.config import (
    AnchorConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)


def get_config() -> Config:
    """A detector that learns from a few hundred images without pretrained weights."""
    return Config(
        data=DataConfig(batch_size=8, short_side=480, long_side=800, images_without_boxes="keep"),
        model=ModelConfig(
            backbone="resnet18",
            norm="group",
            frozen_stages=0,
            stride_position="3x3",
            fpn_channels=128,
            head_channels=128,
            input_normalisation="imagenet",
        ),
        anchors=AnchorConfig(),
        optimizer=OptimizerConfig(
            learning_rate=0.02, clip_norm=3.0, warmup_steps=200, warmup_factor=0.1, boundaries=(4000, 5300)
        ),
        training=TrainingConfig(steps=6000, eval_every=1000, checkpoint_every=500),
    )
