"""Checkpoints: what is saved is restored to the last bit, on any number of devices, or not at all and with a
message."""

from __future__ import annotations

import asyncio
import gc
import random
import shutil
import socket
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retina_jax.config import Config, ConfigError
from retina_jax.config_io import override
from retina_jax.errors import Stopped
from retina_jax.runs.files import DiskError, damage
from retina_jax.runs.folder import best_step, saved_steps
from retina_jax.training import checkpoints as module
from retina_jax.training.checkpoints import Checkpoints
from retina_jax.training.parallel import Driver
from retina_jax.training.state import TrainState, parameters_sha256


def init_state(config: Config, devices: int, step: int = 0) -> TrainState:
    driver = Driver(override(config, {"devices": devices}), 3)
    state = driver.init_state()
    return driver.replicate(state.replace(step=np.asarray(step, np.int32), normaliser=np.asarray(step / 7, np.float32)))


def small(step: int, devices: int = 1) -> dict:
    """Returns a state of a few arrays that contain its step, on each of `devices`."""
    everywhere = NamedSharding(Mesh(np.array(jax.devices()[:devices]), ("data",)), PartitionSpec())
    values = {"weights": np.arange(3000.0, dtype=np.float32) * step, "step": np.asarray(step, np.int32)}
    return jax.device_put({**values, "minus": np.full((2, 3), -0.0, np.float32)}, everywhere)


def assert_same(one: dict, other: dict) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, other)
    assert np.signbit(np.asarray(one["minus"])).all() and np.signbit(np.asarray(other["minus"])).all()


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 0x10
    file.write_bytes(data)


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Writes a folder with steps 1, 2 and 3."""
    with Checkpoints(tmp_path / "checkpoints", keep=None) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, small(step))
    return tmp_path / "checkpoints"


def test_a_state_is_restored_to_the_last_bit_on_other_devices(tiny: Config, tmp_path: Path) -> None:
    saved = init_state(tiny, 8, step=5)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(5, saved)
    other = init_state(override(tiny, {"seed": 1}), 2)
    assert parameters_sha256(other.variables) != parameters_sha256(saved.variables)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        restored = checkpoints.restore(other)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(saved), jax.device_get(restored))
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(restored)} == {2}


def test_the_saved_state_is_that_of_the_call_even_if_the_step_reuses_its_memory(tmp_path: Path) -> None:
    state, taken = small(1), jax.jit(lambda s: jax.tree.map(jnp.ones_like, s), donate_argnums=0)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, state)
        taken(state)
        assert_same(checkpoints.restore(small(9)), small(1))


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        for step, ap in ((1, 0.1), (2, 0.5), (3, None), (4, 0.3), (5, None), (6, 0.2), (7, None)):
            checkpoints.save(step, small(step))
            checkpoints.score(step, ap)
        assert checkpoints.steps() == [2, 6, 7]
        assert best_step(checkpoints.folder) == 2
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.steps() == [2, 6, 7] and best_step(checkpoints.folder) == 2
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"2", "6", "7"}


def test_a_step_with_an_interrupted_evaluation_can_be_the_best_once_it_is_scored(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(1, small(1))
        checkpoints.score(1, 0.5)
        with pytest.raises(Stopped), checkpoints.save_on_error(2, small(2)):
            raise Stopped(15, 2)
    with Checkpoints(folder, keep=1) as checkpoints:
        assert checkpoints.steps() == [1, 2] and best_step(checkpoints.folder) == 1
        checkpoints.score(2, None)
        checkpoints.score(7, 0.9)
        assert checkpoints.steps() == [1, 2] and best_step(checkpoints.folder) == 1
        checkpoints.score(2, 0.8)
        assert checkpoints.steps() == [2] and best_step(checkpoints.folder) == 2
        for step, ap in ((3, 0.7), (4, 0.6)):
            checkpoints.save(step, small(step))
            checkpoints.score(step, ap)
        assert checkpoints.steps() == [2, 4] and best_step(checkpoints.folder) == 2
        assert damage(folder / "2") == ""
        assert_same(checkpoints.restore(small(9), 2), small(2))
    assert {path.name for path in folder.iterdir()} == {"2", "4"}


def test_a_score_waits_for_its_save_and_never_changes_an_existing_one(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, small(1))
        checkpoints.score(1, 0.5)
        checkpoints.save(2, small(2))
        checkpoints.score(2, 0.4)
        checkpoints.score(2, 0.9)
        assert best_step(checkpoints.folder) == 1 and damage(tmp_path / "checkpoints" / "2") == ""


def test_a_score_that_cannot_be_written_gives_one_warning(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (saved / "2" / "metrics").write_text("no folder")
    with Checkpoints(saved, keep=1) as checkpoints:
        checkpoints.score(2, 0.5)
        checkpoints.wait()
        output = capsys.readouterr().out
        assert (
            output.count("\n") == 1
            and output.startswith(f"warning: {saved}: ")
            and "step 2" in output
            and "File exists" in output
        )
    assert sorted(path.name for path in saved.iterdir()) == ["1", "2", "3"]


def test_arrays_are_copied_once_on_their_way_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, written = small(1), []
    monkeypatch.setattr(module, "save_arrays", lambda folder, arrays: (folder.mkdir(), written.append(arrays)))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for step, backend in enumerate(("cpu", "gpu")):
            monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
            checkpoints.save(step, state)
    device = np.asarray(state["weights"].addressable_data(0))
    assert [np.shares_memory(arrays["weights"], device) for arrays in written] == [False, True]


def test_saving_the_same_step_again_changes_nothing(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, small(3))
        checkpoints.save(3, small(9))
        assert int(checkpoints.restore(small(1))["step"]) == 3


def test_the_error_for_a_missing_step_lists_the_existing_ones(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        with pytest.raises(ConfigError, match=rf"{tmp_path}/checkpoints: no checkpoint"):
            checkpoints.restore(small(1))
        checkpoints.save(3, small(3))
        with pytest.raises(ConfigError, match=r"--step 4: .*saved steps: 3"):
            checkpoints.restore(small(1), 4)


def test_the_best_is_restored_by_name(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, small(1))
        with pytest.raises(ConfigError, match=r"--step best: .*saved steps: \[1\]"):
            checkpoints.restore(small(9), "best")
        for step, ap in ((2, 0.5), (3, 0.3), (4, None)):
            checkpoints.save(step, small(step))
            checkpoints.score(step, ap)
        assert_same(checkpoints.restore(small(9), "best"), small(2))
        assert_same(checkpoints.restore(small(9)), small(4))


def test_a_damaged_checkpoint_is_replaced_by_the_one_before(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(largest(saved / "3"), 700)
    with Checkpoints(saved, keep=2) as checkpoints:
        assert_same(checkpoints.restore(small(9)), small(2))
        output = capsys.readouterr().out
        assert output.count("\n") == 1 and f"warning: {saved / '3'}: is damaged (" in output
        assert "checkpoints/3: " in output and "step 2 " in output and "damaged-3" in output
        assert checkpoints.steps() == [1, 2] and (saved / "damaged-3").is_dir()
        checkpoints.save(3, small(3))  # saved again
        checkpoints.score(3, 0.5)
        assert checkpoints.steps() == [2, 3]
        assert_same(checkpoints.restore(small(9)), small(3))
    flip(largest(saved / "3"), 700)
    with Checkpoints(saved, keep=2) as checkpoints:
        assert_same(checkpoints.restore(small(9)), small(2))
        assert best_step(checkpoints.folder) is None


def test_a_reader_restores_the_one_before_and_does_not_move_the_damaged_one(saved: Path) -> None:
    flip(largest(saved / "3"), 700)
    (saved / "2" / "state" / "manifest.ocdbt").unlink()
    (saved / "saving").mkdir()
    before = sorted(saved.rglob("*"))
    with Checkpoints(saved, keep=None, read_only=True) as checkpoints:
        assert_same(checkpoints.restore(small(9)), small(1))
    assert sorted(saved.rglob("*")) == before


def test_if_all_are_damaged_one_line_reports_it_and_nothing_is_moved(saved: Path) -> None:
    for step in "123":
        (saved / step / "_CHECKPOINT_METADATA").write_text("")
    with (
        Checkpoints(saved) as checkpoints,
        pytest.raises(ConfigError, match=r"3: _CHECKPOINT_METADATA .*0 of \d+ bytes\); 2: .*; 1: ") as error,
    ):
        checkpoints.restore(small(9))
    assert "\n" not in str(error.value) and sorted(path.name for path in saved.iterdir()) == ["1", "2", "3"]


def test_a_requested_step_is_never_replaced_by_another(saved: Path) -> None:
    flip(largest(saved / "3"), 700)
    with Checkpoints(saved) as checkpoints:
        with pytest.raises(ConfigError, match=r"step 3 is damaged \(.* changed\); saved steps: \[1, 2, 3\]"):
            checkpoints.restore(small(9), 3)
        assert_same(checkpoints.restore(small(9), 1), small(1))


def test_an_intact_checkpoint_of_another_network_is_not_treated_as_damaged(saved: Path) -> None:
    shape, more = {"weights": jnp.zeros((7,))}, {"more": jnp.ones(1)}
    for other, output in ((shape, r"weights: .*\(3000,\) .*\(7,\)"), (more, r"more: missing in the checkpoint")):
        with (
            Checkpoints(saved) as checkpoints,
            pytest.raises(ConfigError, match=f"3: its checksums match, .*{output}"),
        ):
            checkpoints.restore({**small(9), **other})
    assert (saved / "3").is_dir()


@pytest.mark.parametrize("way", ["no list", "deep list", "another file"])
def test_a_checkpoint_without_a_checksum_for_each_file_is_damaged(saved: Path, way: str) -> None:
    newest = max(saved_steps(saved))
    if way == "no list":
        (saved / str(newest) / "checksums.json").unlink()
    elif way == "deep list":
        (saved / str(newest) / "checksums.json").write_text("[" * 200_000)
    else:
        (saved / str(newest) / "state" / "added").write_bytes(b"")
    with Checkpoints(saved, read_only=True) as checkpoints:
        with pytest.raises(ConfigError, match=f"step {newest} is damaged .*checksums.json"):
            checkpoints.restore(small(9), newest)
        assert int(checkpoints.restore(small(9))["step"]) < newest


def test_a_reader_restores_another_step_if_the_run_deletes_the_first(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    intact = module.damage

    def deleted_meanwhile(folder: Path) -> str:
        if folder.name != "4":
            shutil.copytree(saved / "3", saved / "4", dirs_exist_ok=True)
            for step in "123":
                shutil.rmtree(saved / step, ignore_errors=True)
        return intact(folder)

    monkeypatch.setattr(module, "damage", deleted_meanwhile)
    with Checkpoints(saved, keep=None, read_only=True) as checkpoints:
        assert int(checkpoints.restore(small(9))["step"]) == 3
    assert capsys.readouterr().out == ""


PRUNED = """
import shutil, sys, threading, time
from pathlib import Path
import jax, numpy as np
from retina_jax.training import checkpoints as module
folder, load = Path(sys.argv[1]), module.load_arrays
state = jax.device_put({f"a{k}": np.full((300, 300), k, np.float32) for k in range(40)})
with module.Checkpoints(folder, keep=None) as checkpoints:
    for step, ap in ((1, 0.1), (2, 0.3)):
        checkpoints.save(step, state)
        checkpoints.score(step, ap)

def load_while_pruned(step, like, partial):
    def prune():
        time.sleep(delay)
        (folder / "2").rename(folder / "deleting-2")
        shutil.rmtree(folder / "deleting-2")
    if step.name == "2":
        threading.Thread(target=prune).start()
    return load(step, like, partial)

shutil.copytree(folder / "2", folder.with_name("2"))
module.load_arrays = load_while_pruned
for delay in np.linspace(0, float(sys.argv[2]), int(sys.argv[3])):
    shutil.copytree(folder.with_name("2"), folder / "2", dirs_exist_ok=True)
    with module.Checkpoints(folder, keep=None, read_only=True) as checkpoints:
        found = checkpoints.restore(state, "best")
    assert all(np.array_equal(found[name], state[name]) for name in state)
    while (folder / "2").exists() or (folder / "deleting-2").exists():
        time.sleep(0.01)
"""


@pytest.mark.parametrize("times", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_a_reader_of_the_best_step_survives_its_deletion_without_a_librarys_traceback(
    tmp_path: Path, times: int
) -> None:
    script = tmp_path / "pruned.py"
    script.write_text(PRUNED)
    done = processes.run(script, tmp_path / "checkpoints", 0.06, times)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_failed_tasks_of_an_application_are_still_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also after an error of orbax, whose own tasks are not."""

    async def fail() -> None:
        raise ValueError("of the application")

    async def start() -> None:
        asyncio.ensure_future(fail())  # noqa: RUF006  nobody waits for it
        await asyncio.sleep(0)

    state, wrong = module.load_arrays(tmp_path / "nowhere", {"x": jnp.zeros(2)}, partial=False)
    assert state is None and wrong
    asyncio.run(start())
    gc.collect()
    assert "of the application" in caplog.text


def test_a_failed_save_is_reported_once_and_the_next_one_is_tried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, small(1))
        checkpoints.wait()
        folder.rename(tmp_path / "elsewhere")
        folder.write_text("no folder any more")
        checkpoints.save(2, small(2))
        with pytest.raises(DiskError, match=r"checkpoints: step 2 could not be saved: Not a directory"):
            checkpoints.wait()
        output = capsys.readouterr().out
        assert output.count("\n") == 1 and output.startswith("warning: ")
        folder.unlink()
        checkpoints.save(3, small(3))
        checkpoints.wait()  # the last one is intact: no error, and none at the end
    assert [path.name for path in folder.iterdir()] == ["3"]


@pytest.mark.parametrize("ending", [None, Stopped(15, 1)])
def test_a_failed_last_save_is_an_error_at_the_end_and_when_stopped(tmp_path: Path, ending: Exception | None) -> None:
    (tmp_path / "checkpoints").write_text("")
    with (
        pytest.raises(DiskError, match="step 1 could not be saved"),
        Checkpoints(tmp_path / "checkpoints") as checkpoints,
    ):
        checkpoints.save(1, small(1))
        if ending is not None:
            raise ending


def test_a_failed_save_does_not_hide_an_earlier_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").write_text("")
    with (
        pytest.raises(ZeroDivisionError),
        Checkpoints(tmp_path / "checkpoints") as checkpoints,
        checkpoints.save_on_error(1, small(1)),
    ):
        raise ZeroDivisionError
    assert "warning: " in capsys.readouterr().out

    def full() -> None:
        raise DiskError("metrics.jsonl: No space left on device")

    gone = small(2)
    gone["weights"].delete()
    for first, state in ((full, small(1)), (lambda: None, gone)):
        for raised, expected in ((ZeroDivisionError(), ZeroDivisionError), (Stopped(15, 1), DiskError)):
            with (
                pytest.raises(expected),
                Checkpoints(tmp_path / "other") as checkpoints,
                checkpoints.save_on_error(1, state, first=first),
            ):
                raise raised
            assert capsys.readouterr().out.count("step 1 could not be saved") == 1
    assert not (tmp_path / "other").exists()


def test_a_second_ctrl_c_saves_nothing_and_waits_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called, disk, save = [], threading.Event(), module.save_arrays
    monkeypatch.setattr(module, "save_arrays", lambda *arguments: disk.wait(10) and save(*arguments))
    folder = tmp_path / "checkpoints"
    with pytest.raises(KeyboardInterrupt), Checkpoints(folder) as checkpoints:
        checkpoints.save(1, small(1))
        with checkpoints.save_on_error(2, small(2), first=lambda: called.append("flush")):
            raise KeyboardInterrupt
    assert called == [] and saved_steps(checkpoints.folder) == []  # the signal came while the disk was busy
    disk.set()
    assert checkpoints.steps() == [1]


@pytest.mark.parametrize("while_waiting", [False, True])
def test_a_save_interrupted_by_a_second_ctrl_c_is_not_reported_as_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], while_waiting: bool
) -> None:
    """The interpreter ends while the writer runs, and its threads can do no more."""
    disk = threading.Event()

    def refused(*_: object) -> None:
        disk.wait(10)
        raise RuntimeError("cannot schedule new futures after shutdown")

    monkeypatch.setattr(module, "save_arrays", refused)
    with pytest.raises(KeyboardInterrupt), Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, small(1))
        if while_waiting:

            def interrupted(**_: bool) -> None:
                raise KeyboardInterrupt

            monkeypatch.setattr(checkpoints._writer, "shutdown", interrupted)
        else:
            raise KeyboardInterrupt
    disk.set()
    assert checkpoints.steps() == []
    assert capsys.readouterr() == ("", "")


def test_unfinished_files_of_a_killed_save_are_not_a_checkpoint_and_are_deleted(saved: Path) -> None:
    for name in ("saving/4", "deleting-1", "5.orbax-checkpoint-tmp-17"):
        (saved / name).mkdir(parents=True)
        (saved / name / "half").write_text("a file")
    checkpoints = Checkpoints(saved)
    assert checkpoints.steps() == [1, 2, 3] and (saved / "saving").is_dir()  # not locked yet: another run may be saving
    with checkpoints:
        assert sorted(path.name for path in saved.iterdir()) == ["1", "2", "3"]


KILLED = """
import os, random, signal, sys, time, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import jax, numpy as np
from retina_jax.training.checkpoints import Checkpoints
folder, kills = Path(sys.argv[1]), int(sys.argv[2])
dice = random.Random(int(sys.argv[3]))

def state(step):
    return jax.device_put({"weights": np.arange(20000, dtype=np.float32) * step, "step": np.asarray(step, np.int32)})

def child(pipe):
    with Checkpoints(folder, keep=2) as checkpoints:
        newest = (checkpoints.steps() or [0])[-1]
        if newest:
            found = checkpoints.restore(state(0))
            if int(found["step"]) != newest or not np.array_equal(found["weights"], state(newest)["weights"]):
                os._exit(3)
            if any(folder.glob("damaged-*")):
                os._exit(4)
        for step in range(newest + 1, newest + 10000):
            checkpoints.save(step, state(step))
            checkpoints.score(step, dice.random())
            os.write(pipe, b"x")

for kill in range(kills):  # JAX is not started here, so that a fork is sound and cheap
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(writer)
    os.close(writer)
    os.read(reader, 1)
    time.sleep(dice.uniform(0, 0.4))
    os.kill(pid, signal.SIGKILL)
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status):
        sys.exit(f"kill {kill}: the restarted process ended with {os.WEXITSTATUS(status)}")
"""


@pytest.mark.parametrize("kills", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_after_a_kill_inside_a_save_the_newest_step_is_intact(tmp_path: Path, kills: int) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    done = processes.run(script, tmp_path / "checkpoints", kills, random.randrange(10**6))
    assert done.returncode == 0, done.stdout + done.stderr
    like = jax.device_put({"weights": np.zeros(20000, np.float32), "step": np.asarray(0, np.int32)})
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        newest = checkpoints.steps()[-1]
        found = checkpoints.restore(like)
        checkpoints.save(newest + 1, like)  # the next save deletes what a kill has left
        assert checkpoints.steps()[-2:] == [newest, newest + 1] and len(checkpoints.steps()) <= 3
    assert int(found["step"]) == newest > 0
    np.testing.assert_array_equal(found["weights"], np.arange(20000, dtype=np.float32) * newest)


ONE_OF_TWO = """
import sys
from pathlib import Path
import jax, numpy as np
port, me, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, me)
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from retina_jax import distributed
from retina_jax.config import ConfigError
from retina_jax.training.checkpoints import Checkpoints
from retina_jax.runs.files import DiskError
everywhere = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec())
assert everywhere.mesh.size == 4 and distributed.is_multihost()

def state(step):
    values = {"weights": np.arange(3000.0, dtype=np.float32) * step, "step": np.asarray(step, np.int32)}
    values["minus"] = np.full((2, 3), -0.0, np.float32)
    return {k: jax.make_array_from_callback(v.shape, everywhere, lambda i, v=v: v[i]) for k, v in values.items()}

def number(state):
    value = int(state["step"].addressable_data(1))
    assert np.array_equal(state["weights"].addressable_data(1), np.arange(3000.0, dtype=np.float32) * value)
    assert state["weights"].sharding == everywhere and np.signbit(state["minus"].addressable_data(0)).all()
    return value

with Checkpoints(folder / "one", read_only=True) as checkpoints:
    assert number(checkpoints.restore(state(0))) == 5  # saved by one process on 8 devices
with Checkpoints(folder / "two") as checkpoints:
    for step in (1, 2, 3):
        checkpoints.save(step, state(step))
    assert checkpoints.steps() == [2, 3]
    if me == 0:
        file = next(file for file in (folder / "two" / "3" / "state").rglob("*") if file.is_file())
        file.write_bytes(file.read_bytes()[:-1])
    distributed.exchange("the damage is done")
    assert number(checkpoints.restore(state(0))) == 2 and checkpoints.steps() == [2]
    if me == 0:
        checkpoints.save(7, state(7))  # one host alone, as where an error struck it: nobody is waited for
    assert checkpoints.steps() == [2, 7]
outcome = "no error"
try:
    with Checkpoints(folder / "file" if me == 0 else folder / "never seen") as checkpoints:
        checkpoints.save(1, state(1))
except DiskError as error:
    outcome = str(error)
assert "step 1 could not be saved: Not a directory" in outcome, outcome
try:
    Checkpoints(folder / ("two" if me == 0 else "not shared")).restore(state(0))
    raise SystemExit("restored from a folder that one host cannot see")
except ConfigError as error:
    assert "7: its checksums match" in str(error) or me == 1, error
jax.distributed.shutdown()
"""


def test_two_processes_restore_what_one_saved_and_one_restores_what_two_saved(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "one") as checkpoints:
        checkpoints.save(5, small(5, devices=8))
    (tmp_path / "file").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    script, logs = tmp_path / "one_of_two.py", [tmp_path / "0.log", tmp_path / "1.log"]
    script.write_text(ONE_OF_TWO)
    with logs[0].open("w") as first, logs[1].open("w") as second:
        both = [
            processes.start(script, port, me, tmp_path, stdout=log, devices=2) for me, log in enumerate((first, second))
        ]
    try:
        statuses = [process.wait(240) for process in both]
    finally:
        for process in both:
            process.kill()
    output = [log.read_text() for log in logs]
    assert statuses == [0, 0], "\n".join(output)
    assert output[0].count("warning: ") == 2 and "warning: " not in output[1]
    for devices in (1, 8):
        with Checkpoints(tmp_path / "two", read_only=True) as checkpoints:
            restored = checkpoints.restore(small(9, devices))
        assert_same(restored, small(7))
        assert len(restored["weights"].sharding.device_set) == devices


def test_the_checksum_depends_on_every_bit_and_name() -> None:
    one = {"params": {"a": np.zeros((2, 3), np.float32), "b": np.ones(3, np.float32)}, "frozen": {}, "stats": {}}
    same = {"stats": {}, "frozen": {}, "params": {"b": np.ones(3, np.float32), "a": np.zeros((2, 3), np.float32)}}
    assert parameters_sha256(one) == parameters_sha256(same)
    flipped = np.ones(3, np.float32)
    flipped[2] = np.nextafter(np.float32(1), np.float32(2))
    for other in (
        {**one, "params": {**one["params"], "b": flipped}},
        {**one, "params": {"a": np.zeros((3, 2), np.float32), "b": one["params"]["b"]}},
        {**one, "params": {"a": one["params"]["a"], "c": one["params"]["b"]}},
        {**one, "frozen": {"c": one["params"]["b"]}},
    ):
        assert parameters_sha256(other) != parameters_sha256(one)
