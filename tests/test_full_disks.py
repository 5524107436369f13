"""Disks that fill up, turn read-only or give back other bytes under a real run: told in one line, and no step lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from small_runs import measured, metrics, start, stop_when, summary, wait_for_step, write_config

OPTIONS = ("--training.steps", 60, "--training.eval-every", 0, "--training.checkpoint-every", 10, "--training.pictures", 0)


class SmallDisk:
    """A file system of a few MB in a mount namespace of its own, seen from outside it under /proc."""

    def __init__(self, folder: Path, size: str) -> None:
        """`folder` is where it is mounted. Raises OSError where this machine lets nobody mount."""
        self._mounted = folder
        for unshare in (["unshare", "-rm"], ["unshare", "-m"]):
            mount = f"mount -t tmpfs -o size={size} tmpfs {folder} && echo mounted && exec cat"
            # It lasts as long as this process, which ends when its input does, with the tests at the latest.
            self._holder = subprocess.Popen(
                [*unshare, "sh", "-c", mount], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            if self._holder.stdout.readline():
                break
            self.close()
        else:
            raise OSError("unshare -rm, unshare -m: no mount namespace is to be had here")
        user = ["-U", "--preserve-credentials"] if "-rm" in unshare else []
        self._inside = ["nsenter", "-t", str(self._holder.pid), "-m", *user]
        self.folder = Path(f"/proc/{self._holder.pid}/root{folder}")

    def close(self) -> None:
        """Everything on it is gone."""
        self._holder.stdin.close()
        self._holder.stdout.close()
        self._holder.wait(10)

    def fill(self, left: int = 0) -> None:
        """Leave so many bytes."""
        stat = os.statvfs(self.folder)
        (self.folder / "ballast").write_bytes(bytes(stat.f_bavail * stat.f_frsize - left))

    def empty(self) -> None:
        """Take back what `fill` wrote."""
        (self.folder / "ballast").unlink()

    def resize(self, size: str) -> None:
        """Make it larger, with what is on it."""
        self._run("mount", "-o", f"remount,size={size}", self._mounted)

    def turn_read_only(self) -> None:
        """Also under a process that has a file open for writing there, as a disk with errors turns."""
        self._run("mount", "--bind", self._mounted, self._mounted)
        self._run("mount", "-o", "remount,bind,ro", self._mounted)

    def turn_writable(self) -> None:
        """Undo it."""
        self._run("umount", self._mounted)

    def _run(self, *command: object) -> None:
        subprocess.run([*self._inside, *map(str, command)], check=True)


@dataclass(frozen=True)
class Life:
    """One start of the run, to its end."""

    status: int
    lines: list[str]
    """What it said, without the lines of the steps."""
    newest: int
    """Newest checkpoint that it left."""

    def warned(self) -> list[str]:
        """Its warnings."""
        return [line for line in self.lines if line.startswith("warning: ")]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallDisk]:
    if not shutil.which("unshare") or not shutil.which("nsenter"):
        pytest.skip("no unshare or no nsenter here")
    try:
        small = SmallDisk(tmp_path_factory.mktemp("disk"), "6m")
    except OSError as error:
        pytest.skip(str(error))
    yield small
    small.close()


@pytest.fixture(scope="module")
def unbroken_and_lives(tmp_path_factory: pytest.TempPathFactory, disk: SmallDisk) -> tuple[Path, Path, dict[str, Life]]:
    """A run on a good disk; the same run on one that all of this happened to; what each of its starts came to."""
    folder = tmp_path_factory.mktemp("runs")
    config, unbroken, workdir = write_config(folder), folder / "unbroken", disk.folder / "run"
    beside = start(config, unbroken, *OPTIONS, devices=2)
    wait_for_step(unbroken, 1, beside)  # it writes the scenes for both
    lives: dict[str, Life] = {}

    def live(name: str, when: Callable[[], bool] | None = None, then: Callable[[], None] = disk.fill) -> None:
        log = folder / f"{name}.log"
        process = start(config, workdir, *OPTIONS, devices=2, log=log)
        if when is not None:
            stop_when(process, when)
            then()
            process.send_signal(signal.SIGCONT)
        status = process.wait(240)
        said = [line for line in log.read_text().splitlines() if not line.startswith("step ")]
        lives[name] = Life(status, said, max(saved(workdir)))

    live("full in a save", lambda: any(workdir.glob("checkpoints/saving/20")), lambda: disk.fill(150_000))
    disk.empty()
    live("full", lambda: 30 in saved(workdir) and newest(workdir) >= 32)
    disk.resize("10m")
    live("read-only", lambda: 40 in saved(workdir) and newest(workdir) >= 42, disk.turn_read_only)
    live("read-only from the start")
    disk.turn_writable()
    damaged = workdir / "checkpoints" / str(lives["read-only"].newest)
    flip(max(damaged.rglob("*"), key=lambda path: path.stat().st_size * path.is_file()))
    live("damaged")
    assert beside.wait(240) == 0, unbroken.with_suffix(".log").read_text()
    return unbroken, workdir, lives


def saved(workdir: Path) -> list[int]:
    """Steps of the whole checkpoints, oldest first."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*"))


def newest(workdir: Path) -> int:
    """Newest step in the metrics; 0 before the first."""
    lines = metrics(workdir)
    return lines[-1]["step"] if lines else 0


def flip(file: Path) -> None:
    """One bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def test_show(unbroken_and_lives):
    unbroken, workdir, lives = unbroken_and_lives
    for n, l in lives.items():
        print("=====", n, l.status, l.newest)
        print("\n".join(x[:250] for x in l.lines)[-1500:])
    assert measured(workdir) == measured(unbroken)
    assert summary(workdir)["parameters_sha256"] == summary(unbroken)["parameters_sha256"]
    print([str(p) for p in workdir.rglob("*") if len(p.relative_to(workdir).parts)<3])
