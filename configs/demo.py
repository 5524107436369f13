"""The demo: trains a small RetinaNet on generated scenes and prints a COCO table, in minutes on two CPU cores.

    make demo

The scenes of 128 x 128 have six classes (a shape in a hue), clutter, look-alikes, occlusion, and objects of at least 8 px.
FPN, subnets shared by the levels, focal loss with its prior, matching and NMS are the paper's. Widths, anchors and
schedule are smaller. Not the paper's: GroupNorm, the normaliser `global`, and AdamW, since SGD needs more steps from
random weights.
"""

from retina_jax.config import (
    AnchorConfig,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ScenesConfig,
    TrainingConfig,
)


def get_config() -> Config:
    """Returns the config. docs/results/demo.md lists the settings that were tried."""
    return Config(
        data=DataConfig(
            source="scenes",
            scenes=ScenesConfig(train_images=6000),
            batch_size=16,
            short_side=128,
            long_side=128,
            images_without_boxes="keep",
        ),
        model=ModelConfig(
            backbone="resnet18",
            base_width=16,
            norm="group",
            frozen_stages=0,
            norm_groups=8,
            max_level=6,
            fpn_channels=32,
            head_convs=2,
            head_channels=32,
            head_std=0.03,
            input_normalisation="imagenet",
        ),
        anchors=AnchorConfig(size_factor=1.5),
        # Images without boxes are kept: divided by their own count, at least 1, each would outweigh one with many boxes.
        loss=LossConfig(normaliser="global"),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=0.002,
            weight_decay=0.05,
            clip_norm=3.0,
            bias_learning_rate_factor=1.0,
            warmup_steps=150,
            warmup_factor=0.1,
            boundaries=(1700, 2250),
        ),
        training=TrainingConfig(steps=2500, log_every=50, eval_every=0, checkpoint_every=500),
        devices=1,
    )
