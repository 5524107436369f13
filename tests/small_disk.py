"""A file system of a few megabytes, for tests of disks that fill up or turn read-only."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


class SmallDisk:
    """A file system of a few MB in a mount namespace of its own, seen from outside it under /proc."""

    def __init__(self, folder: Path, size: str) -> None:
        """`folder` is where it is mounted, for commands run `inside`. Raises OSError where nobody may mount."""
        self.mounted = folder
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
        self.holder = self._holder.pid
        user = ["-U", "--preserve-credentials"] if "-rm" in unshare else []
        self._inside = ["nsenter", "-t", str(self.holder), "-m", *user]
        self.folder = Path(f"/proc/{self.holder}/root{folder}")

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
        self._run("mount", "-o", f"remount,size={size}", self.mounted)

    def turn_read_only(self) -> None:
        """Also under a process that has a file open for writing there, as a disk with errors turns."""
        self._run("mount", "--bind", self.mounted, self.mounted)
        self._run("mount", "-o", "remount,bind,ro", self.mounted)

    def turn_writable(self) -> None:
        """Undo it."""
        self._run("umount", self.mounted)

    def _run(self, *command: object) -> None:
        subprocess.run([*self._inside, *map(str, command)], check=True)


def mounted(folder: Path) -> SmallDisk:
    """A disk of 6 MB; the test is skipped where there can be none."""
    if not shutil.which("unshare") or not shutil.which("nsenter"):
        pytest.skip("no unshare or no nsenter here")
    try:
        return SmallDisk(folder, "6m")
    except OSError as error:
        pytest.skip(str(error))
