"""Weight files that are damaged, or that would run code in other readers."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attacks import attack, both_shares, damaged
from weight_files import literal, pickled, python2_pickle, safetensors, tensor, torch_legacy, torch_zip

from retina_jax.weights.readers import read_weights

ARRAYS = {f"layer{k}.weight": np.random.default_rng(k).normal(size=(4, 5)).astype(np.float32) for k in range(8)}
STORAGES = {str(k): array.tobytes() for k, array in enumerate(ARRAYS.values())}
TENSORS = pickled({name: tensor(key=str(k), count=20, shape=(4, 5), strides=(5, 1)) for k, name in enumerate(ARRAYS)})
COUNTED = b"".join((20).to_bytes(8, "little") + storage for storage in STORAGES.values())
FORMATS = {
    ".pth (zip)": torch_zip(TENSORS, STORAGES),
    ".pth (legacy)": torch_legacy(TENSORS, list(STORAGES), COUNTED),
    ".pkl": pickle.dumps(ARRAYS, 4),
    ".pkl of Python 2": python2_pickle(ARRAYS),
    ".safetensors": safetensors({name: ("F32", array) for name, array in ARRAYS.items()}),
}


@both_shares
@pytest.mark.parametrize("kind", FORMATS)
def test_attacked_weights_are_read_or_refused_in_one_line(tmp_path: Path, kind: str, share: float) -> None:
    path = tmp_path / "w"

    def case(rng: random.Random) -> str:
        path.write_bytes(damaged(FORMATS[kind], rng))
        found = read_weights(path)
        same = found.keys() == ARRAYS.keys() and all(np.array_equal(found[name], ARRAYS[name]) for name in ARRAYS)
        assert same or kind != ".pth (zip)", "the format has checksums"
        return "read as written" if same else "read, as the format has no checksums"

    path.write_bytes(FORMATS[kind])
    assert all(np.array_equal(array, ARRAYS[name]) for name, array in read_weights(path).items())
    assert attack(f"weights, {kind}, damaged", int(2000 * share), case)["refused in one line"] > 0


class Call:
    """An object that pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@both_shares
def test_attacked_weights_run_no_code(tmp_path: Path, share: float) -> None:
    path, marker = tmp_path / "w", tmp_path / "marker"
    code, shell = f"open({str(marker)!r}, 'w').close()", f"touch {marker}"
    calls = [Call(os.system, shell), Call(eval, code), Call(exec, code), Call(subprocess.Popen, ["touch", str(marker)])]
    calls += [Call(getattr(os, "popen"), shell), Call(shutil.rmtree, str(tmp_path / "victim"))]  # noqa: B009

    def case(rng: random.Random) -> str:
        value: Any = rng.choice(calls)
        for _ in range(rng.randrange(4)):
            value = rng.choice(([value], (1, value), {"state_dict": value}, {"x": [value]}, Call(dict, [("y", value)])))
        program = pickle.dumps({**ARRAYS, "w": value}, rng.randint(0, 5))
        if rng.random() < 0.3:  # as the first, hidden item of a file that has everything else
            call = b"cos\nsystem\n" + literal(shell) + b"\x85R"
            program = b"\x80\x02}" + literal("a") + call + b"s" + TENSORS[3:]
        content = rng.choice((program, torch_zip(program, STORAGES), torch_legacy(program, list(STORAGES), COUNTED)))
        path.write_bytes(content if rng.random() < 0.7 else damaged(content, rng))
        (tmp_path / "victim").mkdir(exist_ok=True)
        try:
            read_weights(path)
        finally:
            assert not marker.exists() and (tmp_path / "victim").is_dir(), "code was run"
        return "read without the call"

    ended = attack("weights with code", int(2000 * share), case)
    assert ended["refused in one line"] > 0.9 * ended.total()
