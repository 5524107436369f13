"""The command line that all scripts share: options read by tyro, one line for every error, JAX's compilation cache."""

import argparse
import ast
import contextlib
import ctypes
import dataclasses
import glob
import inspect
import io
import itertools
import re
import sys
import textwrap
import typing
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import jax
import tyro

from retina_jax import interrupts
from retina_jax.command import as_typed
from retina_jax.config import Config, ConfigError, Option
from retina_jax.config_io import flatten, unknown_name
from retina_jax.console import cache_folder, warn
from retina_jax.distributed import Hosts, end_at_once
from retina_jax.errors import Stopped, drop_unwritten, ending, one_line, reader_may_leave

T = TypeVar("T")
CACHE_WARNING = re.compile(r"Error (reading|writing) persistent compilation cache entry for '(.*?)': (.*)", re.DOTALL)
SEVERAL_BLOCKS = "Multiple temp buffer allocations found"  # XLA's reason not to serialise a program for CPUs


@contextlib.contextmanager
def one_line_errors(starting: bool = False) -> Iterator[None]:
    """Ends the script with one line and exit status 2 at an error that its user can fix; others keep their traceback. A
    signal raises Interrupted; with `starting` it ends the script as during the imports, until `Interruption` takes over. A
    log that cannot be written does not change the status."""
    try:
        with contextlib.nullcontext() if starting else interrupts.raised(), reader_may_leave():
            yield
    except BaseException as error:
        line, status = ending(error)
        if line is None:
            raise
        line, where = as_typed(line, bare=False), sys.stdout if isinstance(error, Stopped) else sys.stderr
        with contextlib.suppress(OSError):  # a log on a full disk
            print(f"\n{line}" if sys.stdout and sys.stdout.isatty() else line, file=where, flush=True)
        if isinstance(error, KeyboardInterrupt) or (isinstance(error, Stopped) and not error.step):
            # A thread may be in the middle of a save, whose libraries once hung in an orderly exit of the interpreter, or of
            # a compilation, in which one exit crashed.
            end_at_once(status)
        sys.exit(status)
    finally:
        drop_unwritten()


def set_up_jax() -> None:
    """Makes JAX keep compiled programs in ~/.cache/retina_jax (or JAX_COMPILATION_CACHE_DIR) for later runs, and shows its
    warnings of that in one line. A script calls it once."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

    warnings.showwarning = partial(_show_warning, warnings.showwarning)


def _show_warning(show: Callable[..., None], message: Warning | str, *where: Any) -> None:
    """Shows JAX's warnings of its compilation cache as one line, and removes damaged entries, which it would keep. A step in
    several blocks of memory (`Driver.step`) is left out of the cache without a warning."""
    if not (found := CACHE_WARNING.match(str(message))):
        return show(message, *where)
    access, program, cause = found.groups()
    if access == "writing":
        if SEVERAL_BLOCKS not in cause:
            warn(f"the compilation cache cannot keep {program} ({cause})")
        return
    entries = Path(jax.config.jax_compilation_cache_dir).glob(f"{glob.escape(program)}-*-cache")
    for entry in filter(_is_cut_off, entries):
        with contextlib.suppress(OSError):
            entry.unlink()
    warn(f"the compilation cache has no readable entry of {program}, which is compiled again ({cause})")


def _is_cut_off(entry: Path) -> bool:
    """Returns whether an entry of JAX's compilation cache ends early or is damaged otherwise. Where the package zstandard is
    installed, JAX compresses with it, and this is true of every entry."""
    try:
        zlib.decompress(entry.read_bytes())
    except zlib.error:
        return True
    except OSError:
        pass
    return False


def limit_heaps() -> None:
    """Makes glibc's threads share two heaps, which keep freed arrays for the next ones, and a step's temporaries for the
    next step. By default each thread has a heap, in which arrays leave holes: a small run grew by 8 MB per 1000 steps. If
    glibc returned the arrays to the system at once, each image would cost 3600 page faults: at 600/1000 11.8 ms of CPU
    time instead of 4.6."""
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-8, 2)  # M_ARENA_MAX
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: the largest that glibc takes, more than 16 images of 600x1000
        mallopt(-1, 2**28)  # M_TRIM_THRESHOLD


def option_value(argv: Sequence[str], option: str) -> str | None:
    """Returns the value of `option` before the command line is parsed, the last one; None if it is absent."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(option, nargs="?", dest="value")
    return parser.parse_known_args(argv)[0].value


def parse_command_line(arguments: type[T], defaults: T, argv: Sequence[str], description: str, listed: str = "") -> T:
    """Parses `argv` into the dataclass `arguments` with tyro; every failure is a ConfigError of one line.

    Booleans have two forms: `--data.no-flip` and `--data.flip False`. `--help` prints the script's own options and the basic
    fields of a config, `--help-all` all fields, of those whose dotted names match `listed`; both exit.
    """
    description = as_typed(description)
    if {"-h", "--help", "--help-all"} & set(argv):
        every = _for_help(defaults, True, listed)
        shown = every if "--help-all" in argv else _for_help(defaults, False, listed)
        if hidden := len(flatten(every)) - len(flatten(shown)):
            description += f"\n{hidden} more options are fields of the config: --help-all lists them too."
        tyro.cli(type(shown), default=shown, args=["--help"], description=description)
    known: dict[str, Any] = {}
    for name, value in vars(defaults).items():
        prefix = "" if isinstance(value, Config | Hosts) else f"{name}."  # the fields of both are options of their own
        known |= flatten(value, prefix) if dataclasses.is_dataclass(value) else {name: value}
    words = _booleans_as_flags(argv, known)
    for word in words:
        name = word.split("=")[0]
        if name.startswith("--") and _field_name(name) not in known:
            raise ConfigError(f"{one_line(name)}: {unknown_name(_field_name(name), known)}")
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(arguments, default=defaults, args=words, description=description)
    except SystemExit:
        # The first sentence in the box that tyro draws around an error.
        lines = [line.strip("│ ").strip() for line in printed.getvalue().splitlines() if line[:1] not in "╭╰"]
        sentence = itertools.takewhile(lambda line: set(line) != {"─"}, filter(None, lines))
        raise ConfigError(one_line(" ".join(sentence) or "invalid command line; --help lists the options")) from None


def _for_help(value: Any, all_fields: bool, listed: str, prefix: str = "") -> Any:
    """Returns a copy of a dataclass instance whose help has bounds and units; of configs, only the fields to be listed."""
    kind, made = type(value), []
    hints, docs = typing.get_type_hints(kind, include_extras=True), _docstrings(kind)
    for field in dataclasses.fields(value):
        part, hint, known = getattr(value, field.name), hints[field.name], field.metadata.get("option", Option())
        shown = known.basic or all_fields
        if dataclasses.is_dataclass(part):
            part = _for_help(part, all_fields, listed, "" if isinstance(part, Config) else f"{prefix}{field.name}.")
            if not dataclasses.fields(part):
                continue
            extras = typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()
            hint = Annotated[(type(part), *extras)] if extras else type(part)
        elif kind.__module__ == Config.__module__ and not (shown and re.match(listed, prefix + field.name)):
            continue
        valid = ", ".join(filter(None, (known.unit, known.bounds)))
        text = docs.get(field.name, "") + (f" ({valid})" if valid else "")
        if re.search("default: ", text, re.IGNORECASE):  # the text describes it; tyro would print another one
            hint = Annotated[hint, tyro.conf.arg(help_behavior_hint="")]
        made.append((field.name, hint, dataclasses.field(default=part, metadata={"help": text})))
    return dataclasses.make_dataclass(kind.__name__, made, frozen=True)()


def _docstrings(kind: type) -> dict[str, str]:
    """Returns the docstrings below the fields of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body
    return {
        field.target.id: " ".join(str(doc.value.value).split())
        for field, doc in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
    }


def _field_name(option: str) -> str:
    """Returns data.flip for --data.no-flip, data.batch_size for --data.batch-size."""
    name = option.removeprefix("--").replace("-", "_")
    group, dot, last = name.rpartition(".")
    return group + dot + last.removeprefix("no_")


def _booleans_as_flags(argv: Sequence[str], known: Mapping[str, Any]) -> list[str]:
    """Returns `argv` with --data.no-flip for `--data.flip False` and `--data.flip=False`."""
    words: list[str] = []
    for word in (part for w in argv for part in (w.split("=", 1) if w.startswith("--") else [w])):
        option = words[-1] if words else ""
        is_flag = option.startswith("--") and isinstance(known.get(_field_name(option)), bool)
        if is_flag and word.lower() in ("true", "false"):
            group, dot, last = option.removeprefix("--").rpartition(".")
            on = (word.lower() == "true") != last.startswith("no-")
            words[-1] = f"--{group}{dot}{'' if on else 'no-'}{last.removeprefix('no-')}"
        else:
            words.append(word)
    return words
