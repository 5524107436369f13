"""Your own data in COCO format: a JSON of boxes and a folder of images, for training and for validation.

    python scripts/train.py --config configs/own_data.py --workdir runs/mine \
        --data.train-annotations train.json --data.train-images images \
        --data.val-annotations val.json --data.val-images images

The classes are the categories of the JSON. It trains from random weights: ResNet-18 with GroupNorm and AdamW need
neither pretrained weights nor large batches. Copy and change this file, or override fields on the command line.
Consider these fields first:

- `data.short_side`, `data.long_side`: objects should be 16 px or more after the resize; smaller ones need a smaller
  `anchors.size_factor` (4 makes the smallest anchors 32 px, 2 makes them 16 px).
- `training.steps` with `optimizer.boundaries` at about 2/3 and 8/9 of them.
- `data.batch_size` with `optimizer.learning_rate`.
- On a CPU: `model.base_width` 16 to 32, `model.fpn_channels` and `model.head_channels` 64, `model.head_convs` 2.
"""

from retina_jax.config import Config, DataConfig, LossConfig, ModelConfig, OptimizerConfig, TrainingConfig


def get_config() -> Config:
    """Returns the config of a detector that learns from a few hundred images without pretrained weights."""
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
        # Images without boxes are kept. With per_image each would be divided by 1 and outweigh an image with many boxes.
        loss=LossConfig(normaliser="global"),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=0.001,
            weight_decay=0.05,
            clip_norm=3.0,
            bias_learning_rate_factor=1.0,
            warmup_steps=200,
            warmup_factor=0.1,
            boundaries=(4000, 5300),
        ),
        training=TrainingConfig(steps=6000, eval_every=1000, checkpoint_every=500),
    )
