"""Errors that end a script with one line instead of a traceback, and how any error becomes one line."""

import contextlib
import errno
import os
import re
import select
import signal
import sys
from collections.abc import Iterator

from retina_jax.interrupts import Interrupted

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE)
"""Errors that libraries wrap in long messages of their own."""
LONGEST_LINE, LONGEST_REASON, LONGEST_NAME = 1000, 200, 120
"""Maximum number of characters of a message, of a reason in it, and of a name in it."""
STDOUT = 1  # the file descriptor of the standard output
TRY_AGAIN = 75  # exit status of a process that the same command would resume (EX_TEMPFAIL)
# The code RESOURCE_EXHAUSTED does not suffice: a message that is too long for the network has it too.
OUT_OF_MEMORY = re.compile(r"out.of.memory|failed to allocate|attempting to (allocate|reserve)", re.IGNORECASE)


class PlainError(Exception):
    """An error whose message, one line that names what is wrong and what would be right, replaces the traceback. Names of
    files in it are escaped."""

    def __str__(self) -> str:
        return printable(" ".join(super().__str__().splitlines()))


class WeightsError(PlainError, ValueError):
    """Weights that cannot be used; the message names the file, what is wrong and what would be right."""


class OutOfMemory(PlainError, RuntimeError):
    """A device has less memory than a program needs; the message has both sizes and what would help."""


class Stopped(Exception):
    """The run was stopped by the signal `number`, after `step`, which is saved; None: while starting."""

    def __init__(self, number: int, step: int | None) -> None:
        after = f"after step {step}, which is saved; the same command resumes from there" if step else "while starting"
        super().__init__(f"stopped by {signal.Signals(number).name} {after}")
        self.number, self.step = number, step


def ending(error: BaseException) -> tuple[str | None, int]:
    """Returns the last line and the exit status of a script that `error` ends; None for the line: show the traceback."""
    error = _signal_at_start(error) or error
    if isinstance(error, PlainError):
        return one_line(f"error: {error}"), 2
    if isinstance(error, Stopped):
        return str(error), 130 if error.number == signal.SIGINT else 0
    if isinstance(error, OSError) and error.filename is not None:
        return one_line(f"error: {error.filename}: {error.strerror}"), 2
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:  # such as the standard output's
        return f"error: {error.strerror}", 2
    if isinstance(error, KeyboardInterrupt):
        number = error.number if isinstance(error, Interrupted) else signal.SIGINT
        how = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
        return f"{how}; everything saved before is intact", 128 + number
    if isinstance(error, RuntimeError | AssertionError) and (line := out_of_memory(error) or no_device(error)):
        return one_line(f"error: {line}"), 2
    if isinstance(error, SystemExit):
        return None, error.code if isinstance(error.code, int) else int(error.code is not None)
    return None, 1


def _signal_at_start(error: BaseException | None) -> "Stopped | None":
    """Returns the signal that ended a start and that led to `error`: a handler may raise in the middle of a library's code,
    such as JAX's search for devices, which raises an error of its own."""
    while error is not None and not (isinstance(error, Stopped) and not error.step):
        error = error.__cause__ or error.__context__
    return error


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """Ends the process without a message, and with the status of SIGPIPE, if it writes what nobody reads any more, as after
    `| head`. At the end of the block, what cannot be written is dropped."""
    try:
        yield
    except BrokenPipeError:
        if not _unread():  # it is another pipe
            raise
        sys.exit(128 + signal.SIGPIPE)
    finally:
        drop_unwritten()


def drop_unwritten() -> None:
    """Drops what the standard output and error still hold if it cannot be written, as on a full disk or without a terminal.
    The interpreter would try again at its exit, and end with status 120."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _unread() -> bool:
    """Returns whether the standard output is a pipe or a socket that nobody reads any more."""
    if sys.stdout is None:  # it is closed
        return False
    poll = select.poll()
    poll.register(STDOUT, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def out_of_memory(error: BaseException, program: str = "a program", needed: object = None) -> str | None:
    """Returns one line about an error of JAX that means a device's memory is full; None for another error."""
    import jax  # costs 0.5 s, and such an error comes from it

    if not isinstance(error, jax.errors.JaxRuntimeError) or not OUT_OF_MEMORY.search(str(error)):
        return None
    limit = device_memory()
    detail = re.sub(r"^.*?RESOURCE_EXHAUSTED: ", "", str(error).strip().splitlines()[0])
    detail = re.sub(r"\b([0-9]{7,}) bytes", lambda match: size(int(match[1])), detail).rstrip(".: ")
    has = f"; a device has {size(limit)}" if limit else ""
    training = "data.batch_size, or keep it with training.accumulate, model.remat True, model.dtype bfloat16"
    inference = "--short-side (evaluate.py: --data.short-side or --training.eval-batch-size)"
    helps = f"use a smaller {training if program.startswith('the step') else inference}"
    if jax.default_backend() == "gpu":
        helps += ", or, if nothing else runs on this GPU, XLA_PYTHON_CLIENT_MEM_FRACTION=0.92"
    return f"out of memory: {program} needs {needed or 'more than there is'}{has} ({detail}); {helps}"


def no_device(error: BaseException, advice: str = "JAX_PLATFORMS=cpu runs on the CPU") -> str | None:
    """Returns one line, which ends with `advice`, if `error` is JAX's that there is no device, else None. Such an error's
    text is about a backend, or empty."""
    if str(error) and "backend" not in str(error):
        return None
    import jax

    try:
        jax.devices()
    except Exception as failure:
        chosen = f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}: " if os.environ.get("JAX_PLATFORMS") else ""
        return f"{chosen}JAX finds no such device here ({why_no_device(failure)}); {advice}"
    return None


def why_no_device(error: BaseException) -> str:
    """Returns the reason of an error of JAX's search for devices, which has no text if there is no plugin to ask."""
    return reason(error) if str(error) else "its plugin is not installed: retina-jax[cuda] or retina-jax[tpu]"


def device_memory() -> int | None:
    """Returns the bytes that JAX may use of the smallest local device; None if devices do not report it (CPU)."""
    import jax

    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return min((s["bytes_limit"] for s in stats if "bytes_limit" in s), default=None)


def size(number: int) -> str:
    """Returns a number of bytes in words: "4.4 GiB"."""
    unit, name = (2**30, "GiB") if number >= 2**30 else (2**20, "MiB")
    return f"{number / unit:.1f} {name}"


def reason(error: BaseException) -> str:
    """Returns what an error says, on one line: the operating system's name of a disk's error, or its own first line."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    for name in map(os.strerror, DISK_ERRORS):
        if name in text:
            return name
    return text.splitlines()[0][:LONGEST_REASON]


def one_line(message: object) -> str:
    """Returns a message on one line of at most LONGEST_LINE printable characters; a longer one loses its middle."""
    try:
        return bounded(" ".join(filter(None, map(str.strip, str(message).splitlines()))))
    except Exception:
        return "an error that cannot be shown"


def bounded(line: str) -> str:
    """Returns a line of at most LONGEST_LINE printable characters; a longer one loses its middle."""
    # Both ends are enough: escaping a name of 10 MB would take seconds.
    text = printable(line[:LONGEST_LINE] + line[max(len(line) - LONGEST_LINE, LONGEST_LINE) :])
    if len(text) <= LONGEST_LINE:
        return text
    end = LONGEST_LINE * 3 // 10
    return f"{text[: LONGEST_LINE - end - 5]} ... {text[-end:]}"


def printable(text: str) -> str:
    """Returns the text with control characters, which a terminal would obey, as escapes."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shortened(name: object) -> str:
    """Returns a name from a file as messages show it: printable, a long one without its middle."""
    text = str(name)
    if len(text) > LONGEST_NAME:
        half = LONGEST_NAME // 2 - 2
        text = f"{text[:half]}...{text[-half:]}"
    return printable(text)


def quoted(name: object) -> str:
    """Returns `shortened` in quotes."""
    return f"'{shortened(name)}'"
