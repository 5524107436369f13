"""The last line of a script is one readable line, whatever characters names contain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from retina_jax.cli import one_line_errors
from retina_jax.console import warn
from retina_jax.errors import LONGEST_LINE, PlainError, one_line
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
    for line in "".join(capsys.readouterr()).splitlines():
        assert line.isprintable() and len(line) <= LONGEST_LINE


@pytest.mark.parametrize("kind", ["torchvision", "detectron2", "detectron"])
def test_names_of_weights_are_shortened_and_escaped(tmp_path: Path, kind: str) -> None:
    names = [f"{i}{RED * 20_000}" for i in range(3)]
    path = tmp_path / "weights.safetensors"
    path.write_bytes(save({name: np.zeros(1, np.float32) for name in names}))
    with pytest.raises(PlainError) as raised:
        convert(f"{kind}:{path}")
    line = str(raised.value)
    assert line.isprintable() and len(line) <= LONGEST_LINE and all(f"{i}\\x1b[31mred" in line for i in range(3))
