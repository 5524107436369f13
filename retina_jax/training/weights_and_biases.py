"""Weights & Biases, where a project is named (`training.wandb`) and the package is there: `pip install wandb`.

Nothing of it is imported otherwise. Its own switches hold: WANDB_MODE=offline writes RUN/wandb alone, to be sent later by
`wandb sync`; WANDB_ENTITY, WANDB_API_KEY and others are wandb's.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from retina_jax.config import ConfigError
from retina_jax.config_files import to_dict
from retina_jax.console import warn
from retina_jax.errors import one_line
from retina_jax.training.run import Run, note_fact

FACT = "wandb_id"
"""Where config.json keeps the id, by which a resumed run goes on in the same curves."""


class WeightsAndBiases:
    """A run's curves and pictures there. What fails while the run is under way is warned of once, and the run goes on."""

    def __init__(self, run: Run) -> None:
        """Raises ConfigError, one line, where the package is missing or refuses to begin."""
        self._wandb = _package()
        facts = json.loads((run.folder / "config.json").read_text()).get("facts", {})
        if FACT not in facts:
            facts = {FACT: secrets.token_hex(8)}
            note_fact(run, FACT, facts[FACT])
        try:
            self._run: Any = self._wandb.init(
                project=run.config.training.wandb,
                id=facts[FACT],
                name=run.folder.resolve().name,
                dir=str(run.folder),
                resume="allow",
                config=to_dict(run.config),
                settings=self._wandb.Settings(console="off", silent=True),
            )
        except (self._wandb.Error, OSError) as error:
            raise ConfigError(
                f"training.wandb: wandb cannot begin: {one_line(error)}; `wandb login`, WANDB_MODE=offline, or leave the "
                "field empty"
            ) from error

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """The numbers among `values`, under the name of their event. Steps that it has already, of before a resume, are
        passed over there: they are the same."""
        group = values.get("event", "train")
        self._log(step, lambda: {f"{group}/{name}": v for name, v in values.items() if isinstance(v, int | float)})

    def add_pictures(self, step: int, pictures: Mapping[str, Path]) -> None:
        """Image files by name, as `predictions`."""
        if pictures and self._run is not None:
            make = self._wandb.Image
            self._log(step, lambda: {"predictions": [make(str(path), caption=n) for n, path in pictures.items()]})

    def close(self, failed: bool = False) -> None:
        """Waits until all of it is sent; `failed` marks the run so."""
        run, self._run = self._run, None
        if run is not None:
            self._try(lambda: run.finish(exit_code=int(failed)))

    def _log(self, step: int, values: Callable[[], dict[str, Any]]) -> None:
        run = self._run
        if run is not None:
            self._try(lambda: run.log(values(), step=step))

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (self._wandb.Error, OSError) as error:
            warn(f"training.wandb: {one_line(error)}; it is left, metrics.jsonl holds all of it")
            self._run = None


def _package() -> ModuleType:
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            "training.wandb: the package is missing; pip install wandb, or leave the field empty"
        ) from None
    return wandb
