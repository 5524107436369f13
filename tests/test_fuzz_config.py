"""Any config, as a dict, a file or a command line, is accepted with exactly the types of its fields, or refused in one
line."""

from __future__ import annotations

import copy
import json
import math
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fuzzing import assert_named, both_shares, run_cases
from hypothesis import strategies as st
from test_config_files import parse

from retina_jax.config import Config, ConfigError
from retina_jax.config_io import flatten, from_dict, load_config, override, to_dict, validate

SCALARS = [
    None, True, False, 0, 1, 2, -1, 3, 7, 32, 10**6, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 10**30, 10**400, 0.0,
    -0.0, 0.5, 1.0, 2.0, 1e-300, 1e308, math.nan, math.inf, -math.inf, "", "focal", "sgd", "resnet50", "paper", "jit", "2",
    "nan", "\0", "a\nb", "\ud800", "\u2028", "é", "x" * 5000, [], [1, 2], [0.5], [1.0, 2.0], [None], ["1"], [[1]], {},
    {"a": 1}, {"gamma": 1},
]  # fmt: skip
NESTED: Any = "deep"
for _ in range(5000):
    NESTED = [NESTED]
PYTHON = [
    (1, 2), (0.5,), {1, 2}, b"bytes", 1j, object(), np.float64(0.5), np.float32(0.5), np.int64(4), np.array([1.0, 2.0]),
    Config, Config(), len, NESTED, np.str_("focal"),
]  # fmt: skip
"""Values that a config file can give to a field, but JSON cannot."""
HOSTILE = st.sampled_from(SCALARS) | st.integers() | st.floats() | st.text(max_size=5)
DEFAULTS = flatten(Config())
NAMES = sorted(DEFAULTS)
TOKENS = [
    "(", ")", "[", "]", ",", "=", ":", "\n", "    ", "'", '"', "\\", "\0", "#", "1", "0", "-", ".", "e9", "_", "None",
    "True", "lambda", "return", "raise", "def", "class", "Config", "config", "replace", "import", "sys", "exit", "assert",
    "\t", "f'{", "é", "\u2028", "\ufeff", "(" * 300, "[" * 3000, "-" * 20_000, "1" * 5000,
]  # fmt: skip
FILE = '''"""A config."""

from dataclasses import replace

from retina_jax.config import Config, LossConfig


def get_config():
    loss = LossConfig(gamma=5.0, alpha=0.25)
    config = Config(loss=loss, seed=7)
    return replace(config, data=replace(config.data, batch_size=4, jitter_short_sides=(320, 400)))
'''


SAVED = to_dict(override(Config(), {"model.num_classes": 3, "data.jitter_short_sides": (400, 600)}))


def has_types(config: Any) -> bool:
    """Returns whether every value has exactly the type of its field."""
    hints = typing.get_type_hints(type(config))
    return all(is_of(getattr(config, field.name), hints[field.name]) for field in fields(config))


def is_of(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint):
        return type(value) is hint and has_types(value)
    if origin is typing.Literal:
        return any(value == a and type(value) is type(a) for a in arguments)
    if origin is tuple:
        return type(value) is tuple and all(is_of(v, arguments[0]) for v in value)
    if arguments:
        return any(is_of(value, a) for a in arguments)
    return type(value) is hint and (hint is not int or -(2**63) < value < 2**63)


def check_accepted(config: Config) -> str:
    """Checks its types and its round trip through JSON; returns what `validate` does with it."""
    assert type(config) is Config and has_types(config)
    assert repr(from_dict(json.loads(json.dumps(to_dict(config))))) == repr(config)  # repr, because NaN is not NaN.
    try:
        assert validate(config) == config
    except ConfigError as error:
        assert_named(error)
        return "well-typed, refused by its values"
    assert all(math.isfinite(v) for v in flatten(config).values() if isinstance(v, float))
    return "accepted"


@st.composite
def mangled(draw: st.DrawFn) -> Any:
    """Returns the saved form of a config with up to three changed entries."""
    saved = copy.deepcopy(SAVED)
    for _ in range(draw(st.integers(0, 3))):
        group, _, field = draw(st.sampled_from(NAMES)).rpartition(".")
        at = saved
        for part in group.split(".") if group else ():
            at = at[part] if isinstance(at, dict) and isinstance(at.get(part), dict) else saved
        change = draw(st.sampled_from(["replace"] * 6 + ["remove", "add", "group", "whole"]))
        alike = [value for value in SCALARS if type(value) is type(at.get(field))]
        value = copy.deepcopy(draw(st.sampled_from(alike) if alike and draw(st.booleans()) else HOSTILE))
        if change == "replace":
            at[field] = value
        elif change == "remove":
            at.pop(field, None)
        elif change == "add":
            key = draw(
                st.sampled_from(["gama", "", ".", "x\ny", "\ud800", "a" * 3000, 3, None, (1, 2)]) | st.text(max_size=4)
            )
            at[key] = value
        elif change == "group":
            saved[draw(st.sampled_from(["data", "model", "loss", "anchors"]))] = value
        elif draw(st.integers(0, 9)) == 0:
            return value
    return saved


def same_values(read: Any, given: Any) -> bool:
    """Returns whether every given value is in the config: a list as a tuple, an integer as the float it equals."""
    if is_dataclass(read):
        return all(same_values(getattr(read, name), value) for name, value in given.items())
    if isinstance(read, tuple):
        return len(read) == len(given) and all(map(same_values, read, given))
    return bool(read == (float(given) if isinstance(read, float) else given)) or (read != read and given != given)


@both_shares
def test_any_dict_is_accepted_completely_or_refused_by_name(share: int) -> None:
    def case(values: Any) -> str:
        try:
            config = from_dict(values, "run.json")
        except ConfigError as error:
            assert_named(error, "run.json: ")
            return "refused"
        assert same_values(config, values)
        return check_accepted(config)

    ended = run_cases("configs as dicts", share, mangled(), case)
    assert min(ended["refused"], ended["accepted"]) > ended.total() / 20


@st.composite
def sources(draw: st.DrawFn) -> bytes:
    """Draws config files: intact, with inserted tokens, with lost or changed bytes, or with any value in a field."""
    how = draw(st.sampled_from(["value", "tokens", "bytes"]))
    encoded = FILE.encode()
    if how == "tokens":
        for _ in range(draw(st.integers(0, 3))):
            at = draw(st.integers(0, len(encoded)))
            encoded = encoded[:at] + draw(st.sampled_from(TOKENS)).encode() + encoded[at:]
    elif how == "bytes":
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.integers(0, len(encoded) - 1))
            lost = draw(st.integers(0, 3))
            encoded = encoded[:at] + bytes(draw(st.lists(st.integers(0, 255), max_size=2))) + encoded[at + lost :]
    else:
        name = draw(st.sampled_from([*NAMES, "data", "model", "loss", "data.scenes"]))
        kind = draw(st.sampled_from(["SCALARS", "PYTHON"]))
        index = draw(st.integers(0, len(globals()[kind]) - 1))
        *groups, field = name.split(".")
        # Bypasses __init__, whose types the tests check but a script does not.
        lines = (
            "from retina_jax.config import Config",
            "from test_fuzz_config import PYTHON, SCALARS",
            "def get_config():",
            "    config = Config()",
            f"    object.__setattr__({'.'.join(['config', *groups])}, {field!r}, {kind}[{index}])",
            "    return config",
        )
        encoded = "\n".join(lines).encode()
    return encoded


@both_shares
def test_any_file_is_accepted_or_refused_by_name(tmp_path: Path, share: int) -> None:
    path = tmp_path / "config.py"

    def case(encoded: bytes) -> str:
        path.write_bytes(encoded)
        try:
            config = load_config(path)
        except ConfigError as error:
            assert_named(error, str(path))
            return "refused"
        return check_accepted(config)

    ended = run_cases("config files", share, sources(), case)
    assert min(ended["refused"], ended["accepted"]) > ended.total() / 20


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """Draws options with values of every kind, every second one valid for its option, in every spelling, some
    misspelt."""
    words = []
    for _ in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from(NAMES))
        value = draw(HOSTILE) if draw(st.booleans()) else DEFAULTS[name]
        texts = [str(v) for v in value] if isinstance(value, list | tuple) else [text_of(value)]
        change = draw(st.sampled_from(["none"] * 6 + ["upper", "cut", "no-", "junk"]))
        if change == "upper":
            name = name.upper()
        elif change == "cut":
            name = name[: draw(st.integers(0, len(name)))]
        elif change == "no-":
            name = f"{name.rpartition('.')[0]}.no-{name.rpartition('.')[2]}"
        elif change == "junk":
            name = draw(
                st.sampled_from(["", "-", ".", "a\nb", "\u2028", "\udcff", "x" * 3000, "tyro-print-completion", "="])
            )
        option = "--" + (name.replace("_", "-") if draw(st.booleans()) else name)
        if draw(st.booleans()):
            words += [option, *texts]
        else:
            words += [f"{option}={texts[0] if texts else ''}", *texts[1:]]
    return words


def text_of(value: Any) -> str:
    try:
        return str(value)
    except ValueError:  # More digits than Python prints.
        return "9" * 5000


@both_shares
def test_any_command_line_is_accepted_or_refused_by_name(share: int) -> None:
    def case(words: list[str]) -> str:
        try:
            # `validate`, which every script calls next, knows that integers end; the command line does not.
            config = validate(parse(*words))
        except ConfigError as error:
            assert_named(error)
            return "refused"
        return check_accepted(config)

    ended = run_cases("command lines", share, command_lines(), case)
    assert min(ended["refused"], ended["accepted"]) > ended.total() / 40
