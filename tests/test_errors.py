"""The last line of a script is one readable line, whatever characters names contain."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import processes
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save
from small_sets import document, write_coco

from retina_jax.cli import one_line_errors
from retina_jax.config import Config, ConfigError, DataConfig
from retina_jax.config_io import from_dict
from retina_jax.console import log, warn
from retina_jax.data.datasets import open_sources
from retina_jax.data.pipeline import train_batches
from retina_jax.errors import LONGEST_LINE, PlainError, one_line, why_no_device
from retina_jax.evaluation.coco_scores import SUMMARY, Scores, coco_table
from retina_jax.evaluation.drawing import draw
from retina_jax.weights.importing import convert

RED = "\x1b[31mred\x1b[0m\n"


@given(st.text(max_size=50) | st.text().map(lambda text: text * 300))
def test_any_text_becomes_one_readable_line(text: str) -> None:
    line = one_line(text)
    assert line.isprintable() and len(line) <= LONGEST_LINE
    if text.isprintable() and text == " ".join(text.split()) and len(text) <= LONGEST_LINE:
        assert line == text


def test_a_long_line_keeps_the_location_of_the_error_and_the_advice() -> None:
    line = one_line(f"weights.pth: has {RED * 10_000}; save the state dict alone")
    assert line.startswith("weights.pth: has \\x1b[31mred") and line.endswith("; save the state dict alone")


def test_errors_and_warnings_cannot_colour_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (PlainError(f"{RED * 1000}: wrong"), FileNotFoundError(2, "no such file", RED * 1000)):
        with pytest.raises(SystemExit), one_line_errors():
            raise error
    warn(RED * 1000)
    log(f"{RED * 1000}\n  indented as before")
    for line in "".join(capsys.readouterr()).splitlines():
        assert line.isprintable() and len(line) <= LONGEST_LINE


@pytest.mark.parametrize(
    ("statement", "status", "error"),
    [("log('a line')", 0, ""), ("print('a result', flush=True)", 2, "error: No space left on device\n")],
)
def test_a_log_that_cannot_be_written_changes_no_status(
    tmp_path: Path, statement: str, status: int, error: str
) -> None:
    """But a result does."""
    script, printed = tmp_path / "script.py", tmp_path / "error.txt"
    imports = "from retina_jax.cli import one_line_errors; from retina_jax.console import log"
    script.write_text(f"{imports}\nwith one_line_errors():\n    {statement}\n")
    with open("/dev/full", "wb") as full, printed.open("wb") as stderr:
        assert processes.start(script, stdout=full, stderr=stderr).wait(60) == status
    assert printed.read_text() == error


def test_log_lines_keep_their_form(capsys: pytest.CaptureFixture[str]) -> None:
    table = "part      trained\n  stem   1,000\n\nγ × 3"
    log(table)
    assert capsys.readouterr().out == f"{table}\n"


LONG = RED * 1_000_000  # 12 MB


@pytest.mark.timeout(120)
@pytest.mark.parametrize("place", ["a class", "an unused class", "a missing file", "a class of evaluation", "a file"])
def test_names_in_annotations_are_shortened_and_escaped(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, place: str
) -> None:
    exif = Image.Exif()
    exif[0x112] = 6  # so that a line about orientations names a file
    content, other = document(), document()
    names = {"a missing file": LONG, "a file": f"{RED}.jpg"}
    for shown in (content, other):
        shown["categories"][1]["name"] = LONG if place == "a class" else "cat"
        shown["categories"].append({"id": 77, "name": LONG if place == "an unused class" else "dog"})
    content["images"][0]["file_name"] = name = names.get(place, "one.jpg")
    other["categories"][0]["name"] = LONG if place == "a class of evaluation" else "dog"
    paths = {}
    for split, value in (("train", content), ("val", other)):
        (tmp_path / split).mkdir()
        annotations, images = write_coco(tmp_path / split, value)
        paths |= {f"{split}_annotations": str(annotations), f"{split}_images": str(images)}
        for file, size in (("one.jpg", (64, 48)), (name[:50], (64, 48)), ("two.jpg", (40, 60))):
            Image.new("RGB", size, "red").save(images / file, "JPEG", exif=exif)
    with contextlib.suppress(SystemExit), one_line_errors():
        source, *_ = open_sources(Config(data=DataConfig(source="coco", **paths)))
        batches = train_batches(source, DataConfig(batch_size=2, short_side=64, long_side=64, workers=1), seed=0)
        next(batches)
    lines = "".join([*capfd.readouterr(), caplog.text]).splitlines()
    assert lines and all(line.isprintable() and len(line) <= LONGEST_LINE + 100 for line in lines)


def test_the_table_of_scores_and_keys_of_configs_are_shortened(capsys: pytest.CaptureFixture[str]) -> None:
    table = coco_table(Scores(dict.fromkeys(SUMMARY, 0.5), {LONG: 0.5, "plain": None}))
    assert len(table) < 5_000 and all(line.isprintable() for line in table.splitlines())
    with pytest.raises(ConfigError) as raised:
        from_dict({LONG: 1})
    assert len(str(raised.value)) < LONGEST_LINE and str(raised.value).isprintable()
    drawn = draw(
        np.zeros((40, 40, 3), np.uint8), np.array([[2, 2, 20, 20]], np.float32), np.array([0]), class_names=[LONG]
    )
    assert drawn.any()


@pytest.mark.parametrize("kind", ["torchvision", "detectron2", "detectron"])
def test_names_of_weights_are_shortened_and_escaped(tmp_path: Path, kind: str) -> None:
    names = [f"{i}{RED * 20_000}" for i in range(3)]
    path = tmp_path / "weights.safetensors"
    path.write_bytes(save({name: np.zeros(1, np.float32) for name in names}))
    with pytest.raises(PlainError) as raised:
        convert(f"{kind}:{path}")
    line = str(raised.value)
    assert line.isprintable() and len(line) <= LONGEST_LINE and all(f"{i}\\x1b[31mred" in line for i in range(3))


def test_a_platform_without_a_plugin_is_explained() -> None:
    """JAX raises an AssertionError without a text."""
    assert why_no_device(AssertionError()) == "its plugin is not installed: retina-jax[cuda] or retina-jax[tpu]"
    assert why_no_device(RuntimeError("no driver\nhere")) == "no driver"


def test_plain_errors_are_one_printable_line() -> None:
    assert str(PlainError("a\x1b[31m\nb: is broken")) == "a\\x1b[31m b: is broken"
