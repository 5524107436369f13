"""Disks that fill up, refuse, or give back other bytes than they were given: named in one line, found by checksums."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

from retina_jax.errors import PlainError, reason

CHECKSUMS = "checksums.json"
CANNOT_TELL = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


class DiskError(PlainError, RuntimeError):
    """Something could not be written; the message is one line with the file or folder and the reason."""


def check_room(folder: Path, size: int) -> None:
    """Raise OSError where the disk, or a quota on it, has no room for `size` more bytes in `folder`."""
    place = folder / "room"
    with place.open("wb") as file:
        try:
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in CANNOT_TELL:
                raise
        finally:
            place.unlink()


def write_checksums(folder: Path) -> None:
    """Note the size and SHA-256 of every file in `folder`, in FOLDER/checksums.json, and have all of it put on the disk.

    The sums are of what was just written, which the system still holds in memory: what the disk made of it, `damage` finds
    when it is read again. Raises OSError where the disk could not take it.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): _size_and_sum(path) for path in files}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n")
    folders = sorted(path for path in folder.rglob("*") if path.is_dir())
    for path in [*files, folder / CHECKSUMS, *reversed(folders), folder]:
        put_on_disk(path)


def put_on_disk(path: Path) -> None:
    """Until the disk has what the file holds, or the names that the folder holds; nothing where it cannot be asked for."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_TELL:
            raise
    finally:
        os.close(descriptor)


def damage(folder: Path) -> str:
    """What is wrong with the files in `folder`, one of them named; "" where all are as they were written.

    Files that were added since do no harm. A folder without checksums.json cannot be told about and passes.
    """
    try:
        sums = json.loads((folder / CHECKSUMS).read_bytes())
        for name, expected in sums.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            found = _size_and_sum(folder / name)
            if found != expected:
                cut = found[0] < expected[0]
                return f"{name} holds {found[0]} of {expected[0]} bytes" if cut else f"{name} holds other bytes"
    except FileNotFoundError:
        return "" if folder.is_dir() else "it is gone"
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {reason(error)}"
    except (ValueError, TypeError, AttributeError, LookupError):  # of a list that is itself damaged
        return f"{CHECKSUMS} cannot be read"
    return ""


def _size_and_sum(path: Path) -> list[int | str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return [file.tell(), digest]
