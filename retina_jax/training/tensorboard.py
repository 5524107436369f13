"""TensorBoard's files of a run: the numbers of every line of metrics, and the pictures of every evaluation."""

from __future__ import annotations

import contextlib
import io
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from retina_jax.console import warn
from retina_jax.errors import reason


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
