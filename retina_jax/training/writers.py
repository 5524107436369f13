"""TensorBoard's files of a run: the numbers of every line of metrics, and the pictures of every evaluation."""

from __future__ import annotations

import contextlib
import io
import json
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from retina_jax.config import ConfigError
from retina_jax.config_io import to_dict
from retina_jax.console import warn
from retina_jax.errors import one_line, reason
from retina_jax.runs.folder import Run, note_fact


class Board:
    """TensorBoard's view of the metrics. It is written in the open, not by a thread that a full disk would silence and
    leave the run waiting for; where it cannot be written, it ends with a warning and the run goes on."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # imports torch where it is installed: seconds
        from tensorboardX.record_writer import RecordWriter

        self._folder = folder
        self._writer: RecordWriter | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = RecordWriter(str(folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"))
        except OSError as error:
            self._give_up(error)
        # What an earlier start wrote of the steps from here on is to be forgotten.
        forget = Event(step=start_step + 1, session_log=SessionLog(status=SessionLog.START))
        self._write([Event(file_version="brain.Event:2"), forget])

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """The numbers among `values`, under the name of their event."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        group = values.get("event", "train")
        scalars = [scalar(f"{group}/{name}", value) for name, value in values.items() if isinstance(value, float)]
        self._write([Event(step=step, summary=summary) for summary in scalars])

    def add_pictures(self, step: int, pictures: Mapping[str, Path]) -> None:
        """Image files by name, as predictions/NAME, their bytes as they are; one that cannot be read is warned of."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        for name, path in pictures.items():
            try:
                encoded = path.read_bytes()
                with Image.open(io.BytesIO(encoded)) as image:
                    width, height = image.size
            except OSError as error:
                warn(f"{path}: cannot be read ({reason(error)}), and is not in TensorBoard")
                continue
            picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded)
            value = Summary.Value(tag=f"predictions/{name}", image=picture)
            self._write([Event(step=step, summary=Summary(value=[value]))])

    def close(self) -> None:
        """Nothing is written any more."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):  # it was flushed after every line, or was warned of
                writer.close()

    def _write(self, events: list[Any]) -> None:
        if self._writer is None:
            return
        try:
            for event in events:
                event.wall_time = time.time()
                self._writer.write(event.SerializeToString())
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        warn(f"{self._folder}: cannot be written ({reason(error)}), and is left; metrics.jsonl holds all of it")
        self.close()


# Weights & Biases, where a project is named (`training.wandb`) and the package is there: `pip install wandb`.
#
# Nothing of it is imported otherwise. Its own switches hold: WANDB_MODE=offline writes RUN/wandb alone, to be sent later by
# `wandb sync`; WANDB_ENTITY, WANDB_API_KEY and others are wandb's.

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
