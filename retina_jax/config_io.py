"""Reads, checks, changes and writes configs: Python files, dotted overrides, JSON; and what a resumed run may change."""

import contextlib
import dataclasses
import difflib
import functools
import json
import math
import operator
import re
import reprlib
import traceback
import typing
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

from retina_jax.config import Config, ConfigError, Option
from retina_jax.errors import one_line, shortened
from retina_jax.installation import HOME, config_path

T = TypeVar("T")
INVALID = object()  # result of `_typed` for a value of the wrong type
VALID = {int: "an integer below 2^63", float: "a number", bool: "true or false", str: "a string", type(None): "null"}
VALID |= {tuple[int, ...]: "a list of integers", tuple[float, ...]: "a list of numbers"}
VALID |= {tuple[float, float]: "two numbers", Literal["auto"]: "auto"}
COMPARISONS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}


def load_config(path: str | Path) -> Config:
    """Returns the `get_config()` of the Python file at `path`, with values of exactly their fields' types. Raises
    ConfigError with one line that names the file and the line or field, whatever the file does or returns. configs/...
    is one of the package's files if this folder has none of that name."""
    path = config_path(Path(path), "--config")
    module = load_module(path, "--config", "get_config", "get_config() that returns a Config")
    with named_errors(path):
        config = module.get_config()
    if not isinstance(config, Config):
        right = "it must return a retina_jax.config.Config"
        raise ConfigError(f"{path}: get_config() returned a {type(config).__name__}; {right}")
    return typed(config, str(path))


def load_module(path: Path, option: str, function: str, described: str) -> ModuleType:
    """Runs the Python file at `path` and returns it as a module; ConfigError if that fails or it lacks `function`. `option`
    is the command-line option that named the file, and `described` the function as the error describes it."""
    try:
        source = path.read_bytes()
    except OSError as error:
        folder = path.parent if path.parent.is_dir() else HOME / path.parent
        others = [file.name for file in sorted(folder.glob("*.py"))]
        others = difflib.get_close_matches(path.name, others, n=2) or others  # the nearest, or all
        more = f" and {len(others) - 6} more" if len(others) > 6 else ""
        there = f"; there are {', '.join(str(path.with_name(name)) for name in others[:6])}{more}" if others else ""
        raise ConfigError(f"{option} {one_line(path)}: {str(error.strerror).lower()}{there}") from None
    module = ModuleType(f"{option.strip('-')}_{path.stem}")
    module.__file__ = str(path)
    with named_errors(path):
        # Not with importlib: its cache cannot see that a file was rewritten within a second at equal length.
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
    if not callable(getattr(module, function, None)):
        raise ConfigError(f"{path}: there is no function {described}")
    return module


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turns any error that a user's own file raises into a ConfigError with the file and line."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {one_line(error).removeprefix(f'{path}: ')}") from error
    except SyntaxError as error:
        raise ConfigError(f"{path}, line {error.lineno}: SyntaxError: {one_line(error.msg)}") from error
    except (Exception, SystemExit) as error:
        # The last line in the file itself: what it calls may fail in a library.
        own = [line for trace, line in traceback.walk_tb(error.__traceback__) if trace.f_code.co_filename == str(path)]
        where = f"{path}, line {own[-1]}" if own else str(path)
        raise ConfigError(f"{where}: {type(error).__name__}: {one_line(error)}") from error


@functools.cache
def options(kind: type, resume: bool = False) -> Mapping[str, Option]:
    """Returns the Option of every field of `kind` and its groups, by dotted name. `resume`: a resumed run may change all."""
    found: dict[str, Option] = {}
    for item in dataclasses.fields(kind):
        known = item.metadata.get("option", Option())
        known = dataclasses.replace(known, resume=resume or known.resume or known.outcome is False)
        if dataclasses.is_dataclass(group := item.default_factory):
            found |= {f"{item.name}.{name}": option for name, option in options(group, known.resume).items()}
        else:
            found[item.name] = known
    return found


def validate(config: Config) -> Config:
    """Returns `config` with values of exactly their fields' types; ConfigError for the first invalid value."""
    config = typed(config, "config")
    values, known = flatten(config), options(Config)
    for name, value in values.items():
        limits = re.findall(r"([<>]=?) (\S+?)(?:,|$)", known[name].bounds)
        for number in value if isinstance(value, tuple) else (value,):
            finite = not isinstance(number, float) or math.isfinite(number)
            free = number is None or isinstance(number, str)
            within = free or all(COMPARISONS[sign](number, float(limit)) for sign, limit in limits)
            if not (finite and within):
                right = f"{known[name].bounds} {known[name].unit}".rstrip() if finite else "finite"
                raise ConfigError(f"{name}: invalid value {value}; must be {right}")
    for name, right in conflicts(config):
        raise ConfigError(f"{name}: invalid value {values[name]}; must be {right}")
    parse_window(config.training.profile_steps)
    return config


def parse_window(text: str) -> tuple[int, int] | None:
    """Returns the first and last step of `training.profile_steps`, FIRST:LAST; None if empty. Or raises ConfigError."""
    if not text:
        return None
    match = re.fullmatch(r"([0-9]{1,18}):([0-9]{1,18})", text)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        right = "FIRST:LAST, with 1 <= FIRST <= LAST, such as 10:15"
        raise ConfigError(f"training.profile_steps: invalid value {text!r}; must be {right}")
    return first, last


def conflicts(config: Config) -> Iterator[tuple[str, str]]:
    """Yields the name of each field that contradicts another one, and what its value must be."""
    data, scenes, anchors, loss = config.data, config.data.scenes, config.anchors, config.loss
    for name, sides in (("short_side", (data.short_side,)), ("jitter_short_sides", data.jitter_short_sides)):
        if max(sides, default=0) > data.long_side:
            yield f"data.{name}", f"at most data.long_side ({data.long_side})"
    if data.resize_rule == "stretch" and data.long_side != data.short_side:
        yield "data.long_side", f"data.short_side ({data.short_side}) with data.resize_rule stretch"
    if data.scale_jitter and data.scale_jitter[0] > data.scale_jitter[1]:
        yield "data.scale_jitter", "the smaller factor, then the larger one"
    if data.scale_jitter and data.jitter_short_sides:
        yield "data.jitter_short_sides", "empty with data.scale_jitter, which draws the size too"
    if 0 < data.tile < 32:
        yield "data.tile", "0, or at least 32 px"
    if data.pad_multiple % 32:
        yield "data.pad_multiple", "a multiple of 32"
    if data.resize == "pillow" and data.pixels != "uint8":
        yield "data.pixels", "uint8 with data.resize pillow"
    most = 0.75 * scenes.size
    if scenes.min_side > scenes.max_side:
        yield "data.scenes.min_side", f"at most data.scenes.max_side ({scenes.max_side})"
    if scenes.max_side > most:
        yield "data.scenes.max_side", f"at most 0.75 data.scenes.size ({most})"
    if len(config.model.stage_blocks) not in (0, 4):
        yield "model.stage_blocks", "four numbers, or none"
    for name, values in (("scales", anchors.scales), ("ratios", anchors.ratios)):
        if not values:
            yield f"anchors.{name}", "at least one number"
    if (negative := config.matching.negative_iou) > config.matching.positive_iou:
        yield "matching.positive_iou", f"at least matching.negative_iou ({negative})"
    if loss.gamma == 0 and loss.kind == "focal_star":
        yield "loss.gamma", "above 0 with loss.kind focal_star"
    if loss.mining_batch < 4 and loss.mining.startswith("ohem_1_3"):
        yield "loss.mining_batch", "at least 4 with loss.mining ohem_1_3"
    if loss.mining != "none" and loss.mining_normaliser != "assigned" and loss.normaliser in ("global", "ema"):
        yield "loss.mining_normaliser", f"assigned: loss.normaliser {loss.normaliser} divides both losses by one number"
    for name in ("boundaries", "boundary_epochs"):
        if list(boundaries := getattr(config.optimizer, name)) != sorted(set(boundaries)):
            yield f"optimizer.{name}", "in increasing order"
    if config.training.patience and config.training.eval_every < 1:
        yield "training.patience", "0 unless training.eval_every is above 0, or it has no evaluations to count"


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Returns dotted names and values: {"loss.gamma": 2.0, ...}, in the order of the fields."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = prefix + field.name
        values.update(flatten(value, name + ".") if dataclasses.is_dataclass(value) else {name: value})
    return values


def override(config: T, changes: Mapping[str, Any]) -> T:
    """Returns `config` with other values: override(config, {"loss.gamma": 5.0}). ConfigError for an unknown name; `validate`
    checks the values, as all scripts do."""

    def replaced(group: Any, name: str, value: Any) -> Any:
        first, dot, rest = name.partition(".")
        return dataclasses.replace(group, **{first: replaced(getattr(group, first), rest, value) if dot else value})

    known = flatten(config)
    for name, value in changes.items():
        if name not in known:
            raise ConfigError(f"{name}: {unknown_name(shortened(name), known)}")
        config = replaced(config, name, value)
    return config


def unknown_name(name: str, known: Mapping[str, Any]) -> str:
    """Returns the end of an error about a field that does not exist: the most similar names, or those of its group."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.75)
    if near:
        return f"no such field; did you mean {' or '.join(near)}?"
    group = name.rpartition(".")[0] + "."
    siblings = [k for k in known if k.startswith(group)] if group != "." else []
    return f"no such field; there are {', '.join(siblings or sorted({k.split('.')[0] for k in known}))}"


def to_dict(config: Any) -> dict[str, Any]:
    """Returns nested dicts of JSON's own types."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: Any, where: str = "config") -> Config:
    """Returns the Config that `to_dict` was called with, with values of exactly their fields' types.

    An integer is valid for a float and a list for a tuple; nothing else is converted. Unknown fields, wrong types and
    integers of 2^63 and more raise ConfigError with one line that names `where` and the field.
    """
    loss = values.get("loss") if isinstance(values, Mapping) else None
    # Before loss.mining_normaliser existed, ohem_1_3 was the strict form.
    if isinstance(loss, Mapping) and loss.get("mining") == "ohem_1_3" and "mining_normaliser" not in loss:
        values = {**values, "loss": {**loss, "mining": "ohem_1_3_strict"}}
    return _build(Config, values, where, "")


def typed(config: Config, where: str) -> Config:
    """Returns a config made by Python code, which does not check types, as `from_dict` would make it."""

    def nested(value: Any) -> Any:
        if not dataclasses.is_dataclass(value) or isinstance(value, type):
            return value
        return {field.name: nested(getattr(value, field.name)) for field in dataclasses.fields(value)}

    return _build(Config, nested(config), where, "")


def _build(kind: type, values: Any, where: str, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        group = prefix.rstrip(".") or "the config"
        raise ConfigError(f"{where}: {group} must be an object, not {reprlib.repr(values)}")
    hints = typing.get_type_hints(kind)
    made = {}
    for name, value in values.items():
        if name not in hints:
            raise ConfigError(f"{where}: {prefix}{shortened(name)}: {unknown_name(shortened(name), hints)}")
        if dataclasses.is_dataclass(hints[name]):
            made[name] = _build(hints[name], value, where, f"{prefix}{name}.")
            continue
        made[name] = _typed(value, hint := hints[name])
        if made[name] is INVALID:
            right = VALID.get(hint) or " or ".join(VALID.get(kind, str(kind)) for kind in typing.get_args(hint))
            raise ConfigError(f"{where}: {prefix}{name}: invalid value {reprlib.repr(value)}; must be {right}")
    return kind(**made)


def _typed(value: Any, hint: Any) -> Any:
    """Returns `value` as exactly the type `hint`, or INVALID."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return next((a for a in arguments if type(a) is type(value) and a == value), INVALID)
    if origin is tuple:
        parts = [_typed(v, arguments[0]) for v in value] if isinstance(value, (list, tuple)) else [INVALID]
        wrong = arguments[-1] is not ... and len(parts) != len(arguments)
        return INVALID if wrong or any(part is INVALID for part in parts) else tuple(parts)
    if arguments:  # int | None
        return next((made for a in arguments if (made := _typed(value, a)) is not INVALID), INVALID)
    if hint in (int, float) and isinstance(value, (int, hint)) and not isinstance(value, bool):
        # Larger integers would not fit into an array; NumPy's floats become Python's.
        return INVALID if isinstance(value, int) and abs(value) >= 2**63 else hint(value)
    return value if type(value) is hint else INVALID


def training_changes(old: Config, new: Config) -> list[str]:
    """Returns "field: old -> new" for each difference that changes what a training step computes."""
    before, after, known = flatten(old), flatten(new), options(Config)
    unread = "data.scenes." if "scenes" not in (old.data.source, new.data.source) else "-"
    changed = [k for k in before if before[k] != after[k] and not k.startswith(unread)]
    # The BatchNorm statistics are those of a micro-batch; the rate of a cosine is a function of the last step.
    fixed = {"training.accumulate"} if "batch" in (new.model.norm, new.model.head_norm) else set()
    fixed |= {"training.steps"} if new.optimizer.schedule == "cosine" else set()
    return [f"{k}: {before[k]} -> {after[k]}" for k in changed if k in fixed or not known[k].resume]


def with_classes(config: Config, classes: int) -> Config:
    """Returns `config` with the number of classes in the data; ConfigError if it has another one."""
    if (own := config.model.num_classes) not in (None, classes):
        how = f"leave it out, or use {classes}"
        raise ConfigError(f"model.num_classes: {own}, but the data has {classes} classes; {how}")
    return override(config, {"model.num_classes": classes})


def with_epochs(config: Config, images: int) -> Config:
    """Returns `config` with the steps of `training.epochs` and `optimizer.boundary_epochs`, if given, for this number of
    training images. Step ceil(epochs * images / data.batch_size) is the first after which so many epochs are complete.
    Raises ConfigError for boundaries at one step."""

    def steps(epochs: float) -> int:
        return math.ceil(Fraction(str(epochs)) * images / config.data.batch_size)  # in floats 0.7 * 10 exceeds 7

    changes: dict[str, Any] = {}
    if config.training.epochs:
        changes["training.steps"] = steps(config.training.epochs)
    if config.optimizer.boundary_epochs:
        boundaries = changes["optimizer.boundaries"] = tuple(map(steps, config.optimizer.boundary_epochs))
        if len(set(boundaries)) < len(boundaries):
            given = f"optimizer.boundary_epochs: invalid value {config.optimizer.boundary_epochs}"
            raise ConfigError(f"{given}; two of them end at one step, of {boundaries}, with {images} training images")
    return validate(override(config, changes))
