"""TensorFlow is there when it is used, sees no GPU, and costs nothing before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_scripts_answer_without_it() -> None:
    """What --help imports is what every mistake in the options waits for. One process for all: what one script imports, it
    would be blamed for by name."""
    code = """
import runpy, sys
scripts, sys.argv[1:] = sys.argv[1:], ["--help"]
for script in scripts:
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, (script, ended.code)
    assert not {"tensorflow", "torch"} & set(sys.modules), script
"""
    scripts = sorted((ROOT / "scripts").glob("*.py"))
    assert len(scripts) > 5
    run(code, *map(str, scripts))


def test_the_first_use_imports_it_and_hides_the_accelerators_once() -> None:
    code = """
import sys
from retina_jax.data.transforms import tf
from retina_jax.data import pipeline
assert pipeline.tf is tf and not hasattr(tf, "__wrapped__") and "tensorflow" not in sys.modules
import tensorflow
hidden = []
tensorflow.config.set_visible_devices = lambda *arguments: hidden.append(arguments)
seven = tf.constant(7)
assert tf.Tensor is tensorflow.Tensor and isinstance(seven, tf.Tensor)
try:
    tf.no_such_name
except AttributeError as error:
    print(hidden, error)
"""
    said = run(code)
    assert said.startswith("[([], 'GPU')] ") and "no_such_name" in said
