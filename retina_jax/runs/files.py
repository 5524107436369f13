"""Files of a run: atomic writes, a lock, and checksums that find what a faulty disk has changed."""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import msgspec

from retina_jax import distributed
from retina_jax.config import ConfigError
from retina_jax.data.reading import without_links
from retina_jax.errors import PlainError, reason

CHECKSUMS = "checksums.json"
DAMAGED = (OSError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)
"""Errors of the use of a JSON file that is missing, or not what was written."""
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


class DiskError(PlainError, RuntimeError):
    """A file or folder could not be written; the message is one line with its path and the reason."""


@contextlib.contextmanager
def exclusive_lock(path: Path, timeout: float = -1.0) -> Iterator[bool]:
    """Yields whether this process got the lock on `path` within `timeout` seconds (-1: waits without limit), and holds it.
    The kernel's lock (flock) ends with the process, however that ends. ConfigError if `path` cannot be locked."""
    lock = filelock.FileLock(path, timeout=timeout, poll_interval=0.02, fallback_to_soft=False)
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock)
        except filelock.Timeout:
            pass
        except (OSError, NotImplementedError) as error:
            raise ConfigError(f"{path}: cannot be locked: {reason(error)}; use a folder on another disk") from None
        yield lock.is_locked


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file atomically, by renaming a temporary one; only on host 0. Raises DiskError if it cannot be written."""
    if not distributed.is_primary():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb", opener=without_links) as file:
            file.write(data)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise DiskError(f"{path}: cannot be written: {reason(error)}") from error


def write_json(path: Path, value: Any, compact: bool = False) -> None:
    """Writes `value` as JSON, as `write_bytes` does. Raises ValueError for NaN and infinity, which JSON does not have.
    `compact` is 25 times as fast, for finite numbers alone."""
    write_bytes(path, msgspec.json.encode(value) + b"\n" if compact else encoded_json(value))


def encoded_json(value: Any) -> bytes:
    """Returns the content of a JSON file. Raises ValueError for NaN and infinity, which JSON does not have."""
    return json.dumps(value, indent=1, allow_nan=False).encode() + b"\n"


@contextlib.contextmanager
def all_or_none(folder: Path) -> Iterator[Callable[[str, bytes], None]]:
    """Yields a function that writes a file of `folder`, given name and content. The files are in a hidden folder until the
    end of the block, and are then renamed. After an error in the block none of them appears, and earlier files are as
    before. Raises DiskError if one cannot be written, or if another process writes to `folder`."""
    with hidden_folder(folder / ".writing", folder) as hidden:
        names = list[str]()

        def write(name: str, content: bytes) -> None:
            with _disk_error(folder / name):
                (hidden / name).write_bytes(content)
            names.append(name)

        yield write
        for name in names:
            with _disk_error(folder / name):
                (hidden / name).replace(folder / name)


@contextlib.contextmanager
def hidden_folder(hidden: Path, target: Path) -> Iterator[Path]:
    """Yields the new folder `hidden`, in which a file or folder `target` is written; it is removed at the end of the block.
    What a killed process left in it is removed first. Raises DiskError, which names `target`, if it cannot be made, or if
    another process uses it."""
    lock = hidden.with_name(f"{hidden.name}.lock")
    with _disk_error(target):
        hidden.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(lock, timeout=0.0) as locked:
        if not locked:
            raise DiskError(f"{target}: another process writes to it; wait for it, or use another --out")
        try:
            with _disk_error(target):
                shutil.rmtree(hidden, ignore_errors=True)
                hidden.mkdir()
            yield hidden
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
            with contextlib.suppress(OSError):
                lock.unlink()


@contextlib.contextmanager
def _disk_error(path: Path) -> Iterator[None]:
    """Raises DiskError, which names `path`, for an OSError of the block."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"{path}: cannot be written: {reason(error)}") from error


def finite_json(text: str | bytes) -> Any:
    """Returns the value of a JSON text; ValueError for NaN and infinity, which JSON does not have, else as json.loads."""

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"{number[:20]} is not a finite number")
        return value

    return json.loads(text, parse_float=finite, parse_constant=finite)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; ConfigError if it cannot be read or holds anything else."""
    try:
        value = finite_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {reason(error)}") from None
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, a number of too many digits
        raise ConfigError(f"{path}: is not valid JSON: {reason(error)}; restore or delete it") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold an object, not a {type(value).__name__}; restore or delete it")
    return value


def write_checksums(folder: Path) -> None:
    """Writes size and SHA-256 of every file in `folder` to FOLDER/checksums.json, and syncs all to the disk; or OSError.
    The sums are of what the system holds in memory; `damage` compares them with what the disk returns later."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): _size_and_sum(path) for path in files}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n")
    for path in [*sorted(folder.rglob("*"), reverse=True), folder]:  # the contents of a folder before the folder
        sync(path)


def sync(path: Path) -> None:
    """Waits until the disk holds the file's contents, or the folder's entries, if the file system supports that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def damage(folder: Path) -> str:
    """Returns what is wrong with the files in `folder`, naming one of them; "" if all are as they were written. A file
    without a checksum is wrong too, except hidden ones and those in metrics/, where a score is written later."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_bytes())
        there = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
        names = {path.as_posix() for path in there if path.parts[0] != "metrics" and path.name[0] != "."}
        if unlisted := sorted(names - {CHECKSUMS} - sums.keys()):
            return f"{CHECKSUMS} does not list {unlisted[0]}"
        for name, expected in sums.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            found = _size_and_sum(folder / name)
            if found[0] < expected[0]:
                return f"{name} is truncated ({found[0]} of {expected[0]} bytes)"
            if found != expected:
                return f"{name}: its content has changed"
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing" if folder.is_dir() else "the folder was deleted"
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {reason(error)}"
    except DAMAGED:  # the list itself
        return f"{CHECKSUMS} cannot be read"
    return ""


def _size_and_sum(path: Path) -> list[int | str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return [file.tell(), digest]
