"""TensorFlow is imported at first use, does not see the GPU, and costs nothing before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_help_of_the_scripts_does_not_import_it() -> None:
    """Every use of a script waits for what --help imports. One process runs all scripts."""
    code = """
import pathlib, runpy, sys
sys.path.insert(0, "scripts")
for script in sorted(pathlib.Path("scripts").glob("*.py")):
    sys.argv = [str(script), "--help"]
    try:
        runpy.run_path(str(script), run_name="__main__")
        print("no help", script)
    except SystemExit as ended:
        assert not ended.code, (script, ended.code)
    imported = {"tensorflow", "torch"} & set(sys.modules)
    assert not imported, (script, imported)
print("done")
"""
    output = run(code)
    assert output.splitlines()[-1] == "done" and "no help" not in output


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
    output = run(code)
    assert output.startswith("[([], 'GPU')] ") and "no_such_name" in output
