"""Pretrains the backbone of the miniature, configs/mini.py, on crops of generated shapes.

The crops replace the images of ImageNet.

    python scripts/pretrain.py --config configs/mini.py

The file is written to the config's `model.backbone_weights`, with torchvision's names. An existing file is kept.
"""

from __future__ import annotations

import retina_jax.interrupts  # noqa: F401  handles signals during the imports below

# isort: split

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from miniature.crops import ACROSS, draw_crops
from miniature.pretraining import backbone_state_dict, pretrain
from safetensors.numpy import save

from retina_jax.cli import one_line_errors, parse_command_line, set_up_jax
from retina_jax.config import Config, ConfigError
from retina_jax.config_io import validate
from retina_jax.runs.folder import config_of

MINI = Path(__file__).parents[1] / "configs" / "mini.py"


@dataclass(frozen=True)
class Arguments:
    """Options of this script; all others are config fields, of which `model` and `seed` are used."""

    settings: Annotated[Config, tyro.conf.arg(name="")]
    config: Path = MINI
    """Config file with the backbone and, as model.backbone_weights, the file to write."""
    crops: int = 27_000
    """Number of crops to train on."""
    steps: int = 4000
    """Training steps."""
    batch: int = 64
    """Crops per step."""


def main() -> None:
    """Draws the crops, trains, writes the file and prints the accuracy on held-out crops."""
    defaults = Arguments(config_of(sys.argv[1:], str(MINI)))
    arguments = parse_command_line(Arguments, defaults, sys.argv[1:], __doc__, listed=r"model\.|seed$")
    set_up_jax()
    config = validate(arguments.settings)
    path = Path(config.model.backbone_weights)
    if path.suffix != ".safetensors":
        raise ConfigError(f"model.backbone_weights: {path}; give the .safetensors file to write")
    if config.model.backbone not in path.name:
        raise ConfigError(f"model.backbone_weights: the file name {path.name} must contain {config.model.backbone}")
    for field, least in (("steps", 1), ("batch", 2), ("crops", arguments.batch)):
        if getattr(arguments, field) < least:
            raise ConfigError(f"--{field}: invalid value {getattr(arguments, field)}; must be at least {least}")
    if config.model.input_normalisation != "imagenet":
        raise ConfigError("model.input_normalisation: must be imagenet for a backbone with torchvision's names")
    if path.exists():
        print(f"keeping {path}; delete it to pretrain again")
        return
    count = -(-arguments.crops // ACROSS**2) * ACROSS**2
    train, held_out = draw_crops(count, config.seed), draw_crops(1800, config.seed, count)
    weights, accuracies = pretrain(
        config.model, train, held_out, steps=arguments.steps, batch_size=arguments.batch, seed=config.seed, log=print
    )
    shares = {name: f"{share:.3f}" for name, share in accuracies.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(save(backbone_state_dict(weights), shares))
    temporary.replace(path)
    print(
        f"accuracy on {len(held_out.images)} held-out crops: shape {shares['shape']}, hue {shares['hue']}; wrote {path}"
    )


if __name__ == "__main__":
    with one_line_errors():
        main()
