"""Pretrain a small backbone on crops of generated shapes: the miniature's ImageNet (configs/mini.py).

    python scripts/pretrain.py --config configs/mini.py

The file goes where the config's `model.backbone_weights` points, in torchvision's naming, so that every run that names it
starts from it. Nothing is done where it is there already.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from miniature.crops import ACROSS, draw_crops
from miniature.pretraining import pretrain

from retina_jax.cli import one_line_errors, parse_command_line, set_up_jax
from retina_jax.config import Config, ConfigError
from retina_jax.config_io import validate
from retina_jax.runs.base_config import config_of
from retina_jax.weights.safetensors import write_safetensors
from retina_jax.weights.torchvision import backbone_state_dict

MINI = Path(__file__).parents[1] / "configs" / "mini.py"


@dataclass(frozen=True)
class Arguments:
    """Options of this script; all others are fields of the config, of which `model` and `seed` count."""

    settings: Annotated[Config, tyro.conf.arg(name="")]
    config: Path = MINI
    """Config file with the backbone and, in model.backbone_weights, the file to write."""
    crops: int = 27_000
    """Crops trained on."""
    steps: int = 4000
    """Training steps."""
    batch: int = 64
    """Crops a step."""


def main() -> None:
    """Draw the crops, train, say how well crops held out are told apart, write the file."""
    arguments = parse_command_line(Arguments, Arguments(config_of(sys.argv[1:], str(MINI))), sys.argv[1:], __doc__)
    set_up_jax()
    config = validate(arguments.settings)
    path = Path(config.model.backbone_weights)
    if path.suffix != ".safetensors":
        raise ConfigError(f"model.backbone_weights: {path}; give the .safetensors file to write")
    if config.model.backbone not in path.name:
        raise ConfigError(f"model.backbone_weights: {path} has not {config.model.backbone} in its name; name it so")
    for field, least in (("steps", 1), ("batch", 2), ("crops", arguments.batch)):
        if getattr(arguments, field) < least:
            raise ConfigError(f"--{field}: invalid value {getattr(arguments, field)}; must be at least {least}")
    if config.model.input_normalisation != "imagenet":
        raise ConfigError("model.input_normalisation: backbones in torchvision's naming need imagenet")
    if path.exists():
        print(f"{path} is there already")
        return
    whole = -(-arguments.crops // ACROSS**2) * ACROSS**2
    train, held_out = draw_crops(whole, config.seed), draw_crops(1800, config.seed, whole)
    weights, accuracies = pretrain(
        config.model, train, held_out, steps=arguments.steps, batch_size=arguments.batch, seed=config.seed, log=print
    )
    told = {name: f"{share:.3f}" for name, share in accuracies.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}")
    beside.write_bytes(write_safetensors(backbone_state_dict(weights), told))
    beside.replace(path)
    print(
        f"accuracy on {len(held_out.images)} crops held out: shape {told['shape']}, hue {told['hue']}; written to {path}"
    )


if __name__ == "__main__":
    with one_line_errors():
        main()
