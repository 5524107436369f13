"""Tables 1 and 3 in miniature: the paper's experiments, small enough to train in minutes on a CPU core.

    make mini

or, for one table, `python scripts/pretrain.py` once and

    python scripts/sweep.py --sweep configs/sweeps/table1b.py --base configs/mini.py --workdir runs/mini --jobs 2

The generated scenes of 128 x 128 have eight classes, objects of at least 12 px, and up to eight look-alikes per image. Of
3024 anchors about 14 are positive. The backbone is pretrained by classification (`scripts/pretrain.py`); its norms, stem
and C2 are frozen, as in Detectron. AdamW with clipping replaces SGD: its steps do not depend on the size of the loss, as
SGD's do (configs/mini_sgd.py), so losses are compared by their shape. docs/results/mini.md has the results.
"""

from retina_jax.config import (
    AnchorConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ScenesConfig,
    TrainingConfig,
)


def get_config() -> Config:
    """Returns the paper's defaults, except for sizes, data, backbone, optimizer, head_std, max_level and pixels."""
    return Config(
        data=DataConfig(
            source="scenes",
            scenes=ScenesConfig(classes=8, min_side=12.0, max_side=64.0, lookalikes=8),
            batch_size=8,
            short_side=128,
            long_side=128,
            images_without_boxes="keep",
            workers=2,
        ),
        model=ModelConfig(
            backbone="resnet18",
            base_width=16,
            backbone_weights="data/mini/resnet18.safetensors",
            max_level=5,
            fpn_channels=32,
            head_convs=2,
            head_channels=32,
            head_std=0.03,
            input_normalisation="imagenet",
        ),
        anchors=AnchorConfig(size_factor=2.0),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=0.002,
            weight_decay=0.05,
            clip_norm=3.0,
            bias_learning_rate_factor=1.0,
            warmup_steps=150,
            boundaries=(800, 1067),
        ),
        training=TrainingConfig(
            steps=1200, log_every=50, eval_every=0, checkpoint_every=400, tensorboard=False, pictures=4
        ),
        devices=1,
    )
