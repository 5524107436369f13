"""The config that a script's options override: of a config file, of a run, or of a detector from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from retina_jax.cli import option_value
from retina_jax.config import Config
from retina_jax.config_io import load_config, override
from retina_jax.runs.folder import read_run


def config_of(argv: Sequence[str], default: str) -> Config:
    """Returns the config for training: of the file in `--config`, else of the run in `--workdir`, else of `default`."""
    workdir = option_value(argv, "--workdir")
    if option_value(argv, "--config") is None and workdir and (Path(workdir) / "config.json").is_file():
        return read_run(Path(workdir)).config
    return load_config(option_value(argv, "--config") or default)


def settings_of(argv: Sequence[str]) -> Config:
    """Returns the config of a detector: of the file in `--weights`, else of the run in `--workdir`."""
    workdir, weights = option_value(argv, "--workdir"), option_value(argv, "--weights")
    if weights:
        from retina_jax.weights.importing import convert  # only a named file needs the readers

        return override(Config(), convert(weights).changes)
    return read_run(Path(workdir)).config if workdir else Config()
