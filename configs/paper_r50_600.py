"""RetinaNet-50-600, the paper's default (Tables 1a to 1c, 3).

    python scripts/train.py --config configs/paper_r50_600.py --workdir runs/r50_600 \
        --model.backbone-weights imagenet

Paper: AP 34.0, AP50 52.5, AP75 36.5 on minival, 90k steps of 16 images on 8 GPUs. COCO 2017 is expected under data/coco
(annotations/, train2017/, val2017/); train2017 is the paper's trainval35k, val2017 its minival. Without
--model.backbone-weights the backbone is random, and frozen where Detectron freezes it. This is enough to try the code, but
AP stays low.
"""

from retina_jax.config import Config, DataConfig, ModelConfig


def get_config() -> Config:
    """Returns the paper's config. All defaults of `Config` are the paper's, so only COCO's files and classes are set
    here."""
    return Config(
        data=DataConfig(
            train_annotations="data/coco/annotations/instances_train2017.json",
            train_images="data/coco/train2017",
            val_annotations="data/coco/annotations/instances_val2017.json",
            val_images="data/coco/val2017",
        ),
        model=ModelConfig(num_classes=80),
    )
