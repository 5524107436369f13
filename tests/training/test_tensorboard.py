"""TensorBoard's files, read back by TensorFlow's own protos: the numbers, and the pictures of an evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tensorflow.core.util import event_pb2

from retina_jax.config import Config
from retina_jax.runs.folder import Run
from retina_jax.training.metrics import Metrics
from retina_jax.training.opening import open_run


def events(folder: Path) -> list:
    """Returns every event of the files in `folder`."""
    files = sorted(str(path) for path in folder.glob("events*"))
    return [event_pb2.Event.FromString(record.numpy()) for record in tf.data.TFRecordDataset(files)]


def draw(run: Run, step: int, name: str, colour: int) -> np.ndarray:
    """Writes a picture of 30 x 20 as an evaluation does; returns its pixels."""
    pixels = np.full((20, 30, 3), colour, np.uint8)
    Image.fromarray(pixels).save(run.path("pictures", step, f"{name}.png"))
    return pixels


def test_numbers_and_the_pictures_of_the_step_are_in_the_files(tmp_path: Path) -> None:
    run = open_run(tmp_path, Config(), ("cat",), (1,))
    drawn = {f"predictions/{i}": draw(run, 20, f"_{i}", 10 * i) for i in (3, 7)}
    draw(run, 20, "", 1)  # the sheet of all pictures
    draw(run, 20, "_0badcafe_3", 2)  # of another setting
    draw(run, 10, "_3", 3)  # of another step
    with Metrics(run, 0) as metrics:
        metrics.write(20, {"event": "train", "loss": 0.5})
        metrics.evaluated(20, {"AP": 0.25, "APs": None})
    found = events(tmp_path / "tensorboard")
    values = [(event.step, value) for event in found for value in event.summary.value]
    numbers = {value.tag: value.simple_value for _, value in values if value.HasField("simple_value")}
    assert numbers == {"train/loss": 0.5, "evaluation/AP": 0.25}
    images = {value.tag: value.image for _, value in values if value.HasField("image")}
    assert images.keys() == drawn.keys() and {s for s, _ in values} == {20}
    assert {(image.width, image.height) for image in images.values()} == {(30, 20)}
    for tag, image in images.items():
        np.testing.assert_array_equal(tf.io.decode_png(image.encoded_image_string).numpy(), drawn[tag])
    assert [event.session_log.status for event in found if event.HasField("session_log")] == [1], "START: a resumed run"


def test_a_picture_that_cannot_be_read_gives_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = open_run(tmp_path, Config(), ("cat",), (1,))
    draw(run, 20, "_3", 1)
    run.path("pictures", 20, "_5.png").write_bytes(b"no picture")
    with Metrics(run, 0) as metrics:
        metrics.evaluated(20, {"AP": 0.25})
    assert "step_00000020_5.png: cannot be read (cannot identify image file" in capsys.readouterr().out
    tags = [value.tag for event in events(tmp_path / "tensorboard") for value in event.summary.value]
    assert tags == ["evaluation/AP", "predictions/3"]
