"""Writes metrics and pictures to TensorBoard and to Weights & Biases; metrics.jsonl has all numbers as well."""

import contextlib
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from retina_jax.config import ConfigError
from retina_jax.config_io import to_dict
from retina_jax.console import warn
from retina_jax.errors import one_line, reason
from retina_jax.runs.files import read_json
from retina_jax.runs.folder import Run, record_fact

FACT = "wandb_id"  # name in config.json's facts of the id by which a resumed run continues the same curves


class Board:
    """The event file of TensorBoard. If it cannot be written, it ends with a warning and the run continues.

    Not by tensorboardX's SummaryWriter: its thread ends at the first write error, and once its queue is full, the run would
    wait for ever (tried with tensorboardX 2.6.5).
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        from tensorboardX import summary  # imports torch if it is installed, which takes seconds
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        self._folder, self._event, self._summary = folder, Event, summary
        self._writer: RecordWriter | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = RecordWriter(str(folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"))
        except OSError as error:
            self._give_up(error)
        self._write(0, file_version="brain.Event:2")
        # TensorBoard drops what an earlier start wrote for later steps.
        self._write(start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the floats among `values` as EVENT/NAME."""
        for name, value in values.items():
            if isinstance(value, float):
                self._write(step, summary=self._summary.scalar(f"{values.get('event', 'train')}/{name}", value))

    def add_pictures(self, step: int, pictures: Mapping[str, Path]) -> None:
        """Writes image files by name, as predictions/NAME; warns of one that cannot be read."""
        for name, path in pictures.items():
            try:
                pixels = np.asarray(Image.open(path).convert("RGB"))
            except OSError as error:
                warn(f"{path}: cannot be read ({reason(error)}), and is not in TensorBoard")
            else:
                self._write(step, summary=self._summary.image(f"predictions/{name}", pixels, dataformats="HWC"))

    def close(self, failed: bool = False) -> None:
        """Closes the file; later calls write nothing."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):  # every event was flushed, or there was a warning
                writer.close()

    def _write(self, step: int, **content: Any) -> None:
        if self._writer is None:
            return
        try:
            self._writer.write(self._event(step=step, wall_time=time.time(), **content).SerializeToString())
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        warn(f"{self._folder}: cannot be written ({reason(error)}); the rest is only in metrics.jsonl")
        self.close()


class WeightsAndBiases:
    """The run's curves and pictures in the project `training.wandb`. After an error it ends with a warning.

    wandb's own settings hold: WANDB_MODE=offline writes RUN/wandb, to be sent later by `wandb sync`.
    """

    def __init__(self, run: Run) -> None:
        """Raises ConfigError if the package is missing or does not start."""
        project = run.config.training.wandb
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                f"training.wandb: {project}: pip install 'retina-jax[wandb]', or leave the field empty"
            ) from None
        identity = read_json(run.folder / "config.json").get("facts", {}).get(FACT)
        if identity is None:
            record_fact(run, FACT, identity := secrets.token_hex(8))
        self._wandb = wandb
        try:
            settings = wandb.Settings(console="off", silent=True)
            shown = {"name": run.folder.resolve().name, "dir": str(run.folder), "config": to_dict(run.config)}
            self._run: Any = wandb.init(project=project, id=identity, resume="allow", settings=settings, **shown)
        except (wandb.Error, OSError) as error:
            how = "use `wandb login`, WANDB_MODE=offline, or leave the field empty"
            raise ConfigError(f"training.wandb: {project}: wandb does not start: {one_line(error)}; {how}") from error

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Sends the numbers among `values` as EVENT/NAME. wandb ignores steps that it has from before a resume."""
        group = values.get("event", "train")
        numbers = {f"{group}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
        self._try(lambda run: run.log(numbers, step=step))

    def add_pictures(self, step: int, pictures: Mapping[str, Path]) -> None:
        """Sends image files by name, as `predictions`."""

        def send(run: Any) -> None:
            images = [self._wandb.Image(str(path), caption=name) for name, path in pictures.items()]
            run.log({"predictions": images}, step=step)

        if pictures:
            self._try(send)

    def close(self, failed: bool = False) -> None:
        """Waits until everything is sent; `failed` marks the run as failed."""
        self._try(lambda run: run.finish(exit_code=int(failed)))
        self._run = None

    def _try(self, action: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except (self._wandb.Error, OSError) as error:
            warn(f"training.wandb: {one_line(error)}; the rest is only in metrics.jsonl")
            self._run = None
