"""What ends a script while it starts: signals, a missing device, a missing home, a run that has saved nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import processes
import pytest

from retina_jax import console, distributed, interrupts
from retina_jax.config import Config, DataConfig
from retina_jax.distributed import Interruption
from retina_jax.errors import Stopped, ending
from retina_jax.installation import HOME
from retina_jax.runs.folder import started_run
from retina_jax.training.opening import open_run

IMPORTING = """
import os, signal
signal.signal(signal.{name}, signal.SIG_DFL)  # it is ignored where the tests run in the background
{first}
os.kill(os.getpid(), signal.{name})
"""
OF_A_SCRIPT, OF_THE_COMMAND = "from retina_jax import interrupts; interrupts.catch()", "import retina_jax.__main__"


@pytest.mark.parametrize("first", [OF_A_SCRIPT, OF_THE_COMMAND])
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 0), ("SIGHUP", 0)])
def test_a_signal_during_imports_ends_in_one_line(name: str, status: int, first: str) -> None:
    command = [sys.executable, "-c", IMPORTING.format(name=name, first=first)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status
    assert done.stderr.count("\n") == 1 and name in done.stderr


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 0)])
def test_a_signal_while_the_config_is_read_ends_in_one_line(tmp_path: Path, name: str, status: int) -> None:
    config = tmp_path / "config.py"
    config.write_text(f"import os, signal\ndef get_config():\n    os.kill(os.getpid(), signal.{name})\n")
    first = f"import signal; signal.signal(signal.{name}, signal.default_int_handler)"
    program = f"{first}; import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [
        sys.executable,
        "-c",
        program,
        HOME / "scripts/train.py",
        "--workdir",
        tmp_path / "run",
        "--config",
        config,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status
    assert (done.stdout + done.stderr).count("\n") == 1 and f"stopped by {name} while starting" in done.stderr


@pytest.mark.parametrize(("hosts", "after"), [(1, signal.SIG_DFL), (2, interrupts.end_at_start)])
def test_after_a_run_signals_are_pythons_again(monkeypatch: pytest.MonkeyPatch, hosts: int, after: object) -> None:
    """But on several hosts SIGTERM is JAX's, which set its handler without Python."""
    monkeypatch.setattr(distributed, "is_multihost", lambda: hosts > 1)
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, interrupts.end_at_start)
    try:
        with Interruption():
            pass
        assert signal.getsignal(signal.SIGTERM) == after
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_in_the_middle_of_a_library_ends_the_start_in_its_line() -> None:
    """JAX turns what its backends raise into an error of its own."""

    def library(stopped: Stopped) -> None:
        try:
            raise stopped
        except BaseException as error:
            raise RuntimeError("Unable to initialize backend") from error

    for step, expected in ((None, ("stopped by SIGTERM while starting", 0)), (7, (None, 1))):
        with pytest.raises(RuntimeError) as caught:
            library(Stopped(signal.SIGTERM, step))
        assert ending(caught.value) == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_a_start_at_once_and_a_run_at_a_check(number: int) -> None:
    before = signal.signal(number, signal.SIG_DFL)
    with Interruption() as interruption:
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), number)
        assert "saved" not in ending(stopped.value)[0]
    with Interruption() as interruption:
        interruption.defer()
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped, match=f"{signal.Signals(number).name} after step 7"):
            interruption.check(7)
    assert signal.signal(number, before) == signal.SIG_DFL


COMPILING = """
import ctypes, os, signal, threading
from retina_jax.cli import one_line_errors
from retina_jax.distributed import Interruption
signal.signal(signal.{name}, signal.SIG_DFL)  # it is ignored where the tests run in the background
with one_line_errors(), Interruption():
    print("compiling", flush=True)
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.{name})).start()
    for _ in range(2):  # the second lock waits for ever, and no signal interrupts it
        library.pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 0)])
def test_a_signal_during_a_long_call_of_a_compiler_ends_the_start(name: str, status: int) -> None:
    command = [sys.executable, "-c", COMPILING.format(name=name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == status and done.stderr == ""
    assert done.stdout.startswith("compiling\n") and done.stdout.count("\n") == 2 and name in done.stdout


COMMAND = """
import gc, os, signal, sys, time
from pathlib import Path
from retina_jax.cli import one_line_errors
from retina_jax.runs.files import all_or_none
number, before, dropped = getattr(signal, sys.argv[2]), getattr(signal, sys.argv[3]), sys.argv[4] == "dropped"
signal.signal(number, before)
with one_line_errors(), all_or_none(Path(sys.argv[1])) as write:
    write("a.png", b"new")
    if dropped:
        gc.callbacks.append(lambda phase, _: phase == "start" and os.kill(os.getpid(), number))
        gc.collect()
        gc.callbacks.clear()
        time.sleep(20)
    os.kill(os.getpid(), number)
"""


@pytest.mark.parametrize(
    ("name", "before", "where", "status", "line"),
    [
        ("SIGINT", "default_int_handler", "", 130, "interrupted"),
        ("SIGTERM", "SIG_DFL", "", 143, "stopped by SIGTERM"),
        ("SIGHUP", "SIG_DFL", "", 129, "stopped by SIGHUP"),
        ("SIGTERM", "SIG_DFL", "dropped", 143, "stopped by SIGTERM"),
        ("SIGHUP", "SIG_IGN", "", 0, ""),
    ],
)
def test_a_signal_ends_a_command_in_one_line_and_leaves_no_file(
    tmp_path: Path, name: str, before: str, where: str, status: int, line: str
) -> None:
    """Also if Python drops the exception, as in callbacks of the garbage collector. `nohup` ignores SIGHUP."""
    script, out = tmp_path / "command.py", tmp_path / "out"
    script.write_text(COMMAND)
    done = processes.run(script, out, name, before, where, timeout=60)
    assert done.returncode == status and done.stderr == (f"{line}; everything saved before is intact\n" if line else "")
    assert [path.name for path in out.iterdir()] == ([] if line else ["a.png"])


def test_a_run_that_saved_no_step_leaves_its_folder_free(tmp_path: Path) -> None:
    first = Config(data=DataConfig(batch_size=4))
    open_run(tmp_path, first, ["a"], [1])
    other = replace(first, seed=5)
    open_run(tmp_path, other, ["b", "c"], [3, 4])
    assert started_run(tmp_path) is None
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    assert started_run(tmp_path).config == other


def test_a_missing_platform_is_one_line() -> None:
    program = (
        "import jax; from retina_jax.cli import one_line_errors\n"
        "with one_line_errors():\n    jax.config.update('jax_platforms', 'cuda'); jax.jit(lambda x: x + 1)(1.0)"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cuda"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    if done.returncode == 0:
        pytest.skip("there is a GPU here")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "JAX_PLATFORMS=cuda" in done.stderr


def test_a_user_without_a_home_has_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert console.cache_folder().is_absolute()
