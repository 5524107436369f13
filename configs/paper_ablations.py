"""The base of the paper's tables: RetinaNet-50-600 from ImageNet weights.

    python scripts/sweep.py --sweep configs/sweeps/table1b.py --workdir runs/paper

This is `configs/paper_r50_600.py` with the backbone that every number of the paper starts from; it is downloaded once.
Sweeps over this config train as the paper did: 90k steps of 16 images each.
"""

from pathlib import Path

from retina_jax.config import Config
from retina_jax.config_io import load_config, override


def get_config() -> Config:
    """Returns the paper's config with its ImageNet weights."""
    return override(load_config(Path(__file__).with_name("paper_r50_600.py")), {"model.backbone_weights": "imagenet"})
