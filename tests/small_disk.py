"""A file system of a few megabytes, for tests of disks that fill up or turn read-only."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


class SmallDisk:
    """A file system of a few MB in its own mount namespace, visible from outside under /proc."""

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
        """Unmounts the disk and deletes its content."""
        self._holder.stdin.close()
        self._holder.stdout.close()
        self._holder.wait(10)

    def fill(self, left: int = 0) -> None:
        """Fills the disk up to this many free bytes."""
        stat = os.statvfs(self.folder)
        (self.folder / "ballast").write_bytes(bytes(stat.f_bavail * stat.f_frsize - left))

    def empty(self) -> None:
        """Deletes what `fill` wrote."""
        (self.folder / "ballast").unlink()

    def resize(self, size: str) -> None:
        """Enlarges the disk and keeps its content."""
        self._run("mount", "-o", f"remount,size={size}", self.mounted)

    def turn_read_only(self) -> None:
        """Makes the disk read-only, also for a process that has a file open for writing, as a disk with errors does."""
        self._run("mount", "--bind", self.mounted, self.mounted)
        self._run("mount", "-o", "remount,bind,ro", self.mounted)

    def turn_writable(self) -> None:
        """Makes the disk writable again."""
        self._run("umount", self.mounted)

    def _run(self, *command: object) -> None:
        subprocess.run([*self._inside, *map(str, command)], check=True)


def mounted(folder: Path) -> SmallDisk:
    """Returns a disk of 6 MB; skips the test if it cannot be mounted."""
    if not shutil.which("unshare") or not shutil.which("nsenter"):
        pytest.skip("no unshare or no nsenter here")
    try:
        return SmallDisk(folder, "6m")
    except OSError as error:
        pytest.skip(str(error))
