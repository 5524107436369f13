"""Table 1 in miniature: the paper's recipe at a size that two CPU cores train in about a minute a run.

python scripts/pretrain.py
python scripts/sweep.py --sweep configs/sweeps/table1*.py configs/sweeps/table3.py --base configs/mini.py --workdir runs/mini
python scripts/report.py --workdir runs/mini
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
    """The paper's defaults but for size."""
    return Config(
        data=DataConfig(
            source="scenes",
            scenes=ScenesConfig(train_images=3000, val_images=400, classes=12, lookalikes=8),
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
        anchors=AnchorConfig(size_factor=1.5),
        optimizer=OptimizerConfig(learning_rate=0.02, warmup_steps=150, boundaries=(800, 1067)),
        training=TrainingConfig(
            steps=1200, log_every=50, eval_every=0, checkpoint_every=600, tensorboard=False, pictures=4
        ),
        devices=1,
    )
