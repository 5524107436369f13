"""Disks that fill up, become read-only or return other bytes: detected, reported in one line, and survived."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import jax
import numpy as np
import processes
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_disk import mounted

from retina_jax.config import Config
from retina_jax.config_io import override
from retina_jax.errors import reason
from retina_jax.runs.files import CHECKSUMS, DiskError, all_or_none, damage, write_checksums
from retina_jax.runs.folder import Run
from retina_jax.training.checkpoints import Checkpoints
from retina_jax.training.metrics import Metrics


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a checkpoint as it is written; tests must not change it permanently."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    state = jax.device_put({"weights": np.arange(5000, dtype=np.float32), "step": np.asarray(3, np.int32)})
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, state)
    return folder / "3"


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_detected(checkpoint: Path) -> None:
    assert damage(checkpoint) == "" and len(files_of(checkpoint)) > 7
    for file in files_of(checkpoint):
        intact = file.read_bytes()
        for offset in {0, len(intact) // 3, len(intact) // 2, len(intact) - 1}:
            for bit in (0x01, 0x20, 0x80):
                flipped = bytearray(intact)
                flipped[offset] ^= bit
                file.write_bytes(flipped)
                # White space in the list of checksums may change without effect.
                assert damage(checkpoint) or (file.name == CHECKSUMS and json.loads(flipped) == json.loads(intact))
        file.write_bytes(intact)
    assert damage(checkpoint) == ""


def test_a_truncated_missing_or_unreadable_file_is_named(checkpoint: Path) -> None:
    for file in files_of(checkpoint):
        intact, name = file.read_bytes(), file.relative_to(checkpoint).as_posix()
        for part in (b"", intact[:-1]):
            file.write_bytes(part)
            expected = f"{name} is truncated ({len(part)} of {len(intact)} bytes)"
            if file.name == CHECKSUMS:
                expected = "" if part and part.endswith(b"}") else "checksums.json cannot be read"
            assert damage(checkpoint) == expected
        file.unlink()
        assert damage(checkpoint) == f"{name} is missing"
        file.mkdir()
        assert damage(checkpoint)
        file.rmdir()
        file.write_bytes(intact)
    assert damage(checkpoint) == "" and damage(checkpoint / "nowhere") == "the folder was deleted"


def test_files_added_later_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    write_checksums(tmp_path)
    (tmp_path / ".nfs0001").write_text("left by a file system")
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "metrics").write_text('{"AP": 0.5}')
    assert damage(tmp_path) == ""


def test_files_are_synced_before_their_folder_and_all_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, folder = [], tmp_path / "checkpoints"
    monkeypatch.setattr(os, "fsync", lambda descriptor: put.append(Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, {"weights": jax.device_put(np.ones(3, np.float32))})
    own = [path for path in put if path.is_relative_to(folder)]
    scratch = folder / "saving" / "3"
    names = [path.relative_to(scratch) for path in own[:-1]]
    assert own[-1] == folder and names[-1] == Path()
    assert set(names) == {path.relative_to(folder / "3") for path in [folder / "3", *(folder / "3").rglob("*")]}
    assert all(names.index(name) < names.index(name.parent) for name in names[:-1])


def test_a_disk_without_sync_is_accepted_and_a_failing_sync_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(number: int) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "a").write_text("1")
    for number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        monkeypatch.setattr(os, "fsync", lambda _, number=number: fail(number))
        write_checksums(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda _: fail(errno.EIO))
    failed = pytest.raises(DiskError, match=r"step 3 .*Input/output error")
    with failed, Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, {"weights": jax.device_put(np.ones(3, np.float32))})
    assert list((tmp_path / "checkpoints").iterdir()) == [] and "Input/output error" in capsys.readouterr().out


def test_the_reason_is_one_short_line_for_long_errors_too() -> None:
    assert reason(OSError(28, "No space left on device", "file")) == "No space left on device"
    buried = ValueError(
        "RESOURCE_EXHAUSTED: Error writing x:\n" + "y" * 900 + ": No space left on device [OS error 28]"
    )
    assert reason(buried) == "No space left on device"
    assert reason(ValueError("one\ntwo")) == "one" and reason(KeyError()) == "KeyError"
    assert len(reason(ValueError("x" * 999))) == 200


QUIET = override(Config(), {"training.tensorboard": False})


def run_in(folder: Path) -> Run:
    return Run(folder, QUIET, ("cat",), (1,))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.integers(1, 20), max_size=12).map(sorted),
    cut=st.integers(0, 400),
    rubbish=st.binary(max_size=30).filter(lambda b: b"\n" not in b),
    where=st.integers(0, 12),
    resumed=st.integers(0, 20),
)
def test_a_resumed_run_keeps_every_complete_line_up_to_its_step(
    tmp_path: Path, steps: list[int], cut: int, rubbish: bytes, where: int, resumed: int
) -> None:
    lines = [json.dumps({"step": s, "event": "train", "loss": 0.5}).encode() for s in steps]
    lines.insert(where, b"\xff\xfe\x00{" + rubbish)
    text = b"".join(line + b"\n" for line in lines)
    text = text[: max(len(text) - cut, 0)]
    (tmp_path / "metrics.jsonl").write_bytes(text)
    with Metrics(run_in(tmp_path), resumed) as metrics:
        metrics.write(resumed + 1, {"event": "train", "loss": 1.0})
    intact = [line for line in text.split(b"\n") if line.startswith(b'{"step"') and line.endswith(b"}")]
    kept = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_bytes().splitlines()]
    assert kept == [s for s in (json.loads(line)["step"] for line in intact) if s <= resumed] + [resumed + 1]


def test_metrics_know_which_evaluations_they_contain(tmp_path: Path) -> None:
    with Metrics(run_in(tmp_path), 0) as metrics:
        for step in (2, 4):
            metrics.write(step, {"event": "train", "loss": 1.0})
            metrics.write(step, {"event": "evaluation", "AP": 0.5})
    with Metrics(run_in(tmp_path), 3) as metrics:
        assert metrics._evaluated == {2: 0.5}


def test_the_error_for_metrics_that_cannot_be_written_names_the_file(tmp_path: Path) -> None:
    with Metrics(run_in(tmp_path), 0) as metrics:
        (tmp_path / "metrics.jsonl").mkdir()
        with pytest.raises(DiskError, match=r"metrics\.jsonl: .*Is a directory"):
            metrics.write(1, {"event": "train", "loss": 1.0})


# This script runs in a separate mount namespace, with a file system of a few MB on argv[1].
START = """
import contextlib, io, json, os, subprocess, sys, warnings
from pathlib import Path
warnings.simplefilter("error")
import jax, numpy as np
from retina_jax.config import Config
from retina_jax.config_io import override
from retina_jax.training import checkpoints as module
from retina_jax.training.checkpoints import Checkpoints
from retina_jax.runs.files import DiskError
from retina_jax.training.metrics import Metrics
from retina_jax.runs.folder import Run
disk = Path(sys.argv[1])
folder = disk / "checkpoints"
noise = np.random.default_rng(0).normal(size=(8, 64, 1024)).astype(np.float32)

def state(step):
    return jax.device_put({**{f"a{k}": noise[k] + step for k in range(8)}, "step": np.asarray(step, np.int32)})

def fill(left):
    stat = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(stat.f_bavail * stat.f_frsize - left))

def remount(how):
    subprocess.run(["mount", "-o", f"remount,{how}", disk], check=True)

def fails(checkpoints, step, why):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        checkpoints.save(step, state(step))
        try:
            checkpoints.wait()
        except DiskError as error:
            assert f"step {step} could not be saved: {why}; the newest intact checkpoint is step" in str(error), error
        else:
            raise SystemExit(f"step {step} was saved")
    assert output.getvalue().count("\\n") == 1 and why in output.getvalue(), output.getvalue()

def intact(step):
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert int(checkpoints.restore(state(0))["step"]) == step == checkpoints.steps()[-1]
"""
FULL = """
with Checkpoints(folder, keep=1) as checkpoints:
    checkpoints.save(1, state(1))
    checkpoints.wait()
    fill(700_000)
    fails(checkpoints, 2, "No space left on device")
    intact(1)
    assert [path.name for path in folder.iterdir()] == ["1"]
    (disk / "ballast").unlink()
    checkpoints.save(3, state(3))
    checkpoints.wait()
    intact(3)
    save = module.save_arrays  # this time the room goes while it is written

    def filled_meanwhile(*arguments):
        fill(700_000)
        save(*arguments)

    module.save_arrays = filled_meanwhile
    fails(checkpoints, 4, "No space left on device")
    module.save_arrays = save
    intact(3)
    assert [path.name for path in folder.iterdir() if path.name.isdecimal()] == ["3"]
    (disk / "ballast").unlink()
    checkpoints.save(5, state(5))
intact(5)
assert [path.name for path in folder.iterdir()] == ["5"]
"""
READ_ONLY = """
with Checkpoints(folder) as checkpoints:
    checkpoints.save(1, state(1))
    checkpoints.wait()
    remount("ro")
    fails(checkpoints, 2, "Read-only file system")
    intact(1)
    remount("rw")
    checkpoints.save(3, state(3))
    checkpoints.wait()
    assert sorted(path.name for path in folder.iterdir()) == ["1", "3"]
"""
METRICS = """
run = Run(disk, override(Config(), {"training.tensorboard": True}), ("cat",), (1,))
output = io.StringIO()
with Metrics(run, 0) as metrics:
    metrics.write(1, {"event": "train", "loss": 1.0, "note": "x" * 5000})
    fill(0)
    before = (disk / "metrics.jsonl").read_bytes()
    for _ in range(3):
        try:
            metrics.write(2, {"event": "train", "loss": 2.0, "note": "x" * 5000})
        except DiskError as error:
            assert str(error).startswith(f"{disk / 'metrics.jsonl'}: ") and "No space left on device" in str(error)
        else:
            raise SystemExit("written to a full disk")
        assert (disk / "metrics.jsonl").read_bytes() == before
    with contextlib.redirect_stdout(output):  # its last block has room for short lines, TensorBoard's file has not
        for step in range(2, 300):
            metrics._views[0].add(step, {"loss": 2.0})
    assert output.getvalue().count("warning: ") == 1 and "tensorboard: cannot be written" in output.getvalue()
with Metrics(run, 1) as metrics:  # nothing to fix: a full disk does not stop a resumed run from looking
    (disk / "ballast").unlink()
    metrics.write(2, {"event": "train", "loss": 2.0})
assert [json.loads(line)["step"] for line in (disk / "metrics.jsonl").read_text().splitlines()] == [1, 2]
"""


@pytest.mark.parametrize("script", [FULL, READ_ONLY, METRICS], ids=["full", "read_only", "metrics"])
def test_a_run_survives_its_disk(tmp_path: Path, script: str) -> None:
    folder, file = tmp_path / "disk", tmp_path / "script.py"
    folder.mkdir()
    file.write_text(START + script)
    disk = mounted(folder)
    try:
        done = processes.run(file, folder, namespaces_of=disk.holder)
    finally:
        disk.close()
    assert done.returncode == 0 and done.stderr == "", done.stderr[-3000:] + done.stdout


@pytest.mark.parametrize("raised", [DiskError, ValueError, KeyboardInterrupt])
def test_files_are_replaced_together_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: type[BaseException]
) -> None:
    (tmp_path / "a.png").write_text("earlier")
    (tmp_path / ".writing").mkdir()
    (tmp_path / ".writing" / "x.png").write_text("left by a killed process")
    with pytest.raises(raised) as error, all_or_none(tmp_path) as write:
        write("a.png", b"new")
        write("b.png", b"new")
        if raised is not DiskError:
            raise raised
        monkeypatch.setattr(Path, "write_bytes", no_space)
        write("c.json", b"new")
    if raised is DiskError:
        assert str(error.value) == f"{tmp_path / 'c.json'}: cannot be written: No space left on device"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.png": "earlier"}


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_second_process_that_writes_to_a_folder_is_refused(tmp_path: Path) -> None:
    with all_or_none(tmp_path / "out") as write:
        write("a.png", b"first")
        with pytest.raises(DiskError, match="another process writes to it"), all_or_none(tmp_path / "out"):
            pass
        write("b.png", b"first")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.png", "b.png"}


def test_files_written_together_replace_earlier_ones_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("earlier")
    with all_or_none(tmp_path) as write:
        write("a.png", b"new")
        write("b.png", b"new")
        assert (tmp_path / "a.png").read_text() == "earlier" and not (tmp_path / "b.png").exists()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.png": "new", "b.png": "new"}
