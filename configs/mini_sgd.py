"""The miniature of configs/mini.py with the paper's SGD, without clipping.

    python scripts/sweep.py --sweep configs/sweeps/table1a.py configs/sweeps/section5_1.py \
        --base configs/mini_sgd.py --workdir runs/mini_sgd

From random subnets SGD needs more steps than AdamW. Its steps are proportional to the loss, so it shows the effect of the
prior and of a small alpha.
"""

from pathlib import Path

from retina_jax.config import Config
from retina_jax.config_io import load_config, override


def get_config() -> Config:
    """Returns mini.py's network and data with the optimizer of Section 4.1, at a learning rate found by trial."""
    return override(
        load_config(Path(__file__).with_name("mini.py")),
        {
            "optimizer.name": "sgd",
            "optimizer.learning_rate": 0.02,
            "optimizer.weight_decay": 1e-4,
            "optimizer.bias_learning_rate_factor": 2.0,
            "optimizer.clip_norm": 0.0,
        },
    )
