"""What every script shares: the command line read by tyro, one line for every error, JAX set up quietly."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import tyro

from retina_jax.config import Config, ConfigError
from retina_jax.config_io import flatten, load_config, override, unknown_name
from retina_jax.distributed import Hosts, end_at_once
from retina_jax.errors import Stopped, ending, one_line

T = TypeVar("T")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Errors that a person can mend end the script with one line and exit status 2; others keep their traceback."""
    try:
        yield
    except BaseException as error:
        line, status = ending(error)
        if line is None:
            raise
        where = sys.stdout if isinstance(error, Stopped) else sys.stderr
        with contextlib.suppress(OSError):  # a log on a disk that is full
            print(f"\n{line}" if sys.stdout.isatty() else line, file=where, flush=True)
        if isinstance(error, KeyboardInterrupt):
            # A thread may be in the middle of a save. In an orderly exit its libraries meet an interpreter that is half
            # gone; once that hung for good.
            end_at_once(status)
        sys.exit(status)


def set_up_jax() -> None:
    """Compiled programs are kept in ~/.cache/retina_jax (or JAX_COMPILATION_CACHE_DIR) and reused by later runs."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "retina_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def option_value(argv: Sequence[str], option: str) -> str | None:
    """What `option` is given as, before the command line is parsed as a whole; None where it is absent."""
    value = None  # the last one counts, as it does for tyro
    for place, word in enumerate(argv):
        if word == option:
            value = argv[place + 1] if place + 1 < len(argv) else None
        if word.startswith(option + "="):
            value = word.partition("=")[2]
    return value


def config_of(argv: Sequence[str], default: str) -> Config:
    """The Config that the overrides are laid over: of the file that `--config` names, else of the run in `--workdir`."""
    from retina_jax.runs.folder import read_run

    workdir = option_value(argv, "--workdir")
    if option_value(argv, "--config") is None and workdir and (Path(workdir) / "config.json").is_file():
        return read_run(Path(workdir)).config
    return load_config(option_value(argv, "--config") or default)


def settings_of(argv: Sequence[str]) -> Config:
    """The detector's own Config, which the overrides are laid over: that of `--weights` or of the run in `--workdir`."""
    from retina_jax.runs.folder import read_run
    from retina_jax.weights.importing import convert

    workdir, weights = option_value(argv, "--workdir"), option_value(argv, "--weights")
    if weights:
        return override(Config(), convert(weights).changes)
    return read_run(Path(workdir)).config if workdir else Config()


def parse_command_line(arguments: type[T], defaults: T, argv: Sequence[str], description: str) -> T:
    """`argv` parsed into the dataclass `arguments` by tyro, every failure as a one-line ConfigError.

    Booleans are taken both ways: `--data.no-flip` and `--data.flip False`. `--help` prints every field and exits.
    """
    known = dict(_options(defaults))
    words = _booleans_as_flags(argv, known)
    for word in words:
        name = word.split("=")[0]
        if name.startswith("--") and name != "--help" and _field_name(name) not in known:
            raise ConfigError(f"{one_line(name)}: {unknown_name(_field_name(name), known)}")
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(arguments, default=defaults, args=words, description=description)
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise ConfigError(one_line(_first_message(printed.getvalue()))) from None


def _options(defaults: Any) -> Iterator[tuple[str, Any]]:
    """The options tyro makes of the arguments: a Config and Hosts among them stand without a prefix, groups with theirs."""
    for field in dataclasses.fields(defaults):
        value = getattr(defaults, field.name)
        if isinstance(value, Config | Hosts):
            yield from flatten(value).items()
        elif dataclasses.is_dataclass(value):
            yield from flatten(value, f"{field.name}.").items()
        else:
            yield field.name, value


def _field_name(option: str) -> str:
    """--data.no-flip -> data.flip, --data.batch-size -> data.batch_size."""
    name = option.removeprefix("--").replace("-", "_")
    group, dot, last = name.rpartition(".")
    return group + dot + last.removeprefix("no_")


def _booleans_as_flags(argv: Sequence[str], known: Mapping[str, Any]) -> list[str]:
    """`--data.flip False` and `--data.flip=False` -> `--data.no-flip`; all else unchanged."""
    words: list[str] = []
    for word in (part for w in argv for part in (w.split("=", 1) if w.startswith("--") else [w])):
        before = words[-1] if words else ""
        if (
            word.lower() in ("true", "false")
            and before.startswith("--")
            and known.get(_field_name(before)) in (True, False)
        ):
            group, dot, last = before.removeprefix("--").rpartition(".")
            on = (word.lower() == "true") != last.startswith("no-")
            words[-1] = f"--{group}{dot}{'' if on else 'no-'}{last.removeprefix('no-')}"
        else:
            words.append(word)
    return words


def _first_message(box: str) -> str:
    """The sentence inside the box that tyro draws around an error, on one line."""
    lines = [line.strip("│ ").strip() for line in box.splitlines()]
    sentence: list[str] = []
    for line in lines:
        if line.startswith(("╭", "╰")) or not line:
            continue
        if set(line) == {"─"}:
            break
        sentence.append(line)
    return " ".join(sentence) or "the command line cannot be read; --help lists the options"
