"""Configs on their way in and out: files, dotted overrides, JSON, and what a resumed run may change."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import reprlib
import traceback
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from retina_jax.config import Config, ConfigError
from retina_jax.errors import one_line

T = TypeVar("T")
INVALID = object()
"""What `_typed` makes of a value that a field cannot have."""

# A run that is resumed may change these: none of them changes what a step computes.
FREE_TO_CHANGE = (
    "training.steps",
    "training.log_every",
    "training.eval_every",
    "training.eval_images",
    "training.eval_batch_size",
    "training.evaluator",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.pictures",
    "training.tensorboard",
    "training.wandb",
    "training.accumulate",
    "training.profile_steps",
    "training.skip_non_finite",
    "data.workers",
    # Where the training images lie, not which they are: `open_run` compares the data itself.
    "data.train_annotations",
    "data.train_images",
    "data.box_format",
    "data.crowds",
    "data.tfds_folder",
    "data.scenes.folder",
    "data.bad_images",
    "data.prefetch",
    "data.val_annotations",
    "data.val_images",
    "data.tfds_val_split",
    "detection.score_threshold",
    "detection.threshold_coarsest",
    "detection.top_k",
    "detection.nms_iou",
    "detection.clip",
    "detection.max_detections",
    "detection.parameters",
    "detection.tta_flip",
    "detection.tta_short_sides",
    "parallel",
    "devices",
    "cpu_kernels",
)


def load_config(path: str | Path) -> Config:
    """The `get_config()` of the Python file at `path`, its values of exactly their fields' types.

    Raises ConfigError, one line that names the file and the line or field, whatever the file is, does or returns.
    """
    path = Path(path)
    module = load_module(path, "--config", "get_config", "get_config() that returns a Config")
    with named_errors(path):
        config = module.get_config()
    if not isinstance(config, Config):
        raise ConfigError(f"{path}: get_config() returned a {type(config).__name__}, not a retina_jax.config.Config")
    return typed(config, str(path))


def load_module(path: Path, option: str, function: str, described: str) -> ModuleType:
    """The Python file at `path`, which has a function called `function`; ConfigError in one line where it is not one.

    Args:
      option: the command-line option that named the file.
      described: the function as the error describes it.
    """
    try:
        is_file = path.is_file()
        source = path.read_bytes() if is_file else b""
    except OSError as error:
        raise ConfigError(f"{option} {one_line(path)}: cannot be read: {error.strerror}") from None
    if not is_file:
        beside = sorted(str(p) for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        what = "is a folder" if path.is_dir() else "no such file"
        few = ", ".join(beside[:6]) + (", ..." if len(beside) > 6 else "")
        raise ConfigError(f"{option} {one_line(path)}: {what}" + (f"; there are {few}" if few else ""))
    module = ModuleType(f"{option.strip('-')}_{path.stem}")
    module.__file__ = str(path)
    with named_errors(path):
        # Not through importlib: its cache takes a file that was rewritten within a second, at equal length, for the old one.
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
    if not callable(getattr(module, function, None)):
        raise ConfigError(f"{path}: there is no function {described}")
    return module


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Whatever a person's own file raises, in one line with its place."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {one_line(error).removeprefix(f'{path}: ')}") from error
    except SyntaxError as error:
        raise ConfigError(f"{path}, line {error.lineno}: SyntaxError: {one_line(error.msg)}") from error
    except (Exception, SystemExit) as error:
        # The last line of the file itself: what it calls may fail somewhere in a library.
        own = [line for trace, line in traceback.walk_tb(error.__traceback__) if trace.f_code.co_filename == str(path)]
        where = f"{path}, line {own[-1]}" if own else str(path)
        raise ConfigError(f"{where}: {type(error).__name__}: {one_line(error)}") from error


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names to values: {"loss.gamma": 2.0, ...}, in the order of the fields."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = prefix + field.name
        values.update(flatten(value, name + ".") if dataclasses.is_dataclass(value) else {name: value})
    return values


def override(config: T, changes: Mapping[str, Any]) -> T:
    """`config` with dotted fields replaced: override(config, {"loss.gamma": 5.0}). Unknown names raise ConfigError."""
    known = flatten(config)
    for name, value in changes.items():
        if name not in known:
            raise ConfigError(f"{name}: {unknown_name(name, known)}")
        config = _replaced(config, name.split("."), value)
    return config


def _replaced(config: Any, path: Sequence[str], value: Any) -> Any:
    if len(path) > 1:
        value = _replaced(getattr(config, path[0]), path[1:], value)
    return dataclasses.replace(config, **{path[0]: value})


def unknown_name(name: str, known: Mapping[str, Any]) -> str:
    """What to say of a field that does not exist: the nearest ones, else the whole group."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.75)
    if near:
        return f"no such field; did you mean {' or '.join(near)}?"
    group = name.rpartition(".")[0] + "."
    siblings = [k for k in known if k.startswith(group)] if group != "." else []
    groups = sorted({k.split(".")[0] for k in known})
    return f"no such field; there are {', '.join(siblings or groups)}"


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dicts of JSON's own types."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: Any, where: str = "config") -> Config:
    """The Config that `to_dict` gave, its values of exactly their fields' types.

    A whole number serves for a float and a list for a tuple, nothing else for anything else; integers lie within
    -2^63 and 2^63. Unknown fields and wrong types raise ConfigError, one line that names `where` and the field.
    """
    return _build(Config, _with_old_meanings(values), where, "")


def _with_old_meanings(values: Any) -> Any:
    """`values` in today's names: ohem_1_3 was the strict form before `loss.mining_normaliser` existed."""
    loss = values.get("loss") if isinstance(values, Mapping) else None
    if not isinstance(loss, Mapping) or loss.get("mining") != "ohem_1_3" or "mining_normaliser" in loss:
        return values
    return {**values, "loss": {**loss, "mining": "ohem_1_3_strict"}}


def _build(kind: type, values: Any, where: str, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{where}: {prefix.rstrip('.') or 'the config'} must be an object, not {reprlib.repr(values)}"
        )
    hints = typing.get_type_hints(kind)
    unknown = sorted(str(name) for name in values if name not in hints)
    if unknown:
        raise ConfigError(f"{where}: {prefix}{one_line(unknown[0])}: {unknown_name(unknown[0], hints)}")
    made = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            made[name] = _build(hint, value, where, f"{prefix}{name}.")
            continue
        made[name] = _typed(value, hint)
        if made[name] is INVALID:
            raise ConfigError(f"{where}: {prefix}{name}: {reprlib.repr(value)} is not {_describe(hint)}")
    return kind(**made)


def _typed(value: Any, hint: Any) -> Any:
    """`value` as exactly the type of `hint`, or INVALID."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return next((a for a in arguments if type(a) is type(value) and a == value), INVALID)
    if origin is tuple:
        parts = [_typed(v, arguments[0]) for v in value] if isinstance(value, (list, tuple)) else [INVALID]
        return INVALID if any(part is INVALID for part in parts) else tuple(parts)
    if arguments:  # int | None
        return next((made for a in arguments if (made := _typed(value, a)) is not INVALID), INVALID)
    if hint in (int, float) and isinstance(value, (int, hint)) and not isinstance(value, bool):
        # Of integers none that would later be too long for an array; of NumPy's floats the plain ones.
        return INVALID if isinstance(value, int) and abs(value) >= 2**63 else hint(value)
    return value if type(value) is hint else INVALID


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if hint is int:
        return "int below 2^63"
    return getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint)


def meaning_changes(old: Config, new: Config) -> list[str]:
    """One "field: old -> new" for each difference that would change what a resumed run computes."""
    before, after = flatten(old), flatten(new)
    # BatchNorm takes its statistics of each part of a batch.
    free = set(FREE_TO_CHANGE) - ({"training.accumulate"} if new.model.norm == "batch" else set())
    return [f"{k}: {before[k]} -> {after[k]}" for k in before if before[k] != after[k] and k not in free]


def with_classes(config: Config, classes: int) -> Config:
    """`config` with the data's number of classes; ConfigError if it sets another one."""
    if config.model.num_classes not in (None, classes):
        raise ConfigError(f"model.num_classes: {config.model.num_classes}, but the data has {classes} classes")
    return override(config, {"model.num_classes": classes})


def typed(config: Config, where: str) -> Config:
    """`config` from Python code, which does not check its fields' types itself, as `from_dict` would make it."""

    def fields(value: Any) -> Any:
        if not dataclasses.is_dataclass(value) or isinstance(value, type):
            return value
        return {field.name: fields(getattr(value, field.name)) for field in dataclasses.fields(value)}

    return _build(Config, fields(config), where, "")
