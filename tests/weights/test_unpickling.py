"""Pickles are data: nothing in them is executed or looked up, and their size bounds time and memory."""

import io
import os
import pickle
import subprocess
import time
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weight_files import literal, pickled, tensor, torch_legacy, torch_zip

from retina_jax.errors import WeightsError
from retina_jax.weights.pickles import FUNCTIONS, unpickle
from retina_jax.weights.readers import parse, read_weights


class Calls:
    """An object that pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def attacks(marker: Path) -> dict[str, tuple[bytes, str]]:
    """Returns pickles that create the file `marker` if `pickle.loads` reads them, and the name that the refusal must
    contain."""
    shell, code = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    objects = np.empty(1, object)
    objects[0] = Calls(os.system, shell)
    run = literal(shell)
    return {
        "protocol 0": (b"cos\nsystem\n(S'" + shell.encode() + b"'\ntR.", "'os.system'"),
        "protocol 2": (b"\x80\x02cos\nsystem\n(" + run + b"tR.", "'os.system'"),
        "protocol 4": (pickle.dumps({"w": Calls(os.system, shell)}, 4), f"'{os.name}.system'"),
        "dotted": (b"\x80\x04\x8c\x02os\x8c\x0epath.os.system\x93(" + run + b"tR.", "'os.path.os.system'"),
        "INST": (b"(S'" + shell.encode() + b"'\nios\nsystem\n.", "'os.system'"),
        "OBJ": (b"(csubprocess\nPopen\n" + literal(shell.split()) + b"o.", "'subprocess.Popen'"),
        "NEWOBJ": (b"\x80\x02csubprocess\nPopen\n(" + literal(shell.split()) + b"tR.", "'subprocess.Popen'"),
        "eval": (pickle.dumps({"w": Calls(eval, code)}, 4), "'builtins.eval'"),
        "eval of Python 2": (b"\x80\x02c__builtin__\neval\n(" + literal(code) + b"tR.", "'__builtin__.eval'"),
        "in a list in a dict": (pickle.dumps({"model": [{"w": [Calls(exec, code)]}]}, 2), "'__builtin__.exec'"),
        "partial": (pickle.dumps(Calls(partial(eval, code)), 2), "'functools.partial'"),
        "behind what is admitted": (
            b"\x80\x02ccollections\nOrderedDict\n)R}" + literal("__class__") + b"cos\nsystem\n(" + run + b"tRsb.",
            "'os.system'",
        ),
        "numpy's runner": (
            b"\x80\x02cnumpy.testing._private.utils\nrunstring\n(" + literal(code) + b"}tR.",
            "'numpy.testing._private.utils.runstring'",
        ),
        "objects in a numpy array": (pickle.dumps({"w": objects}, 2), "dtype 'O8'"),
    }


ATTACKS = tuple(attacks(Path("marker")))


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_by_name_and_does_not_run(tmp_path: Path, name: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "weights.pkl"
    program, refused = attacks(marker)[name]
    body = program[2:-1] if program.startswith(b"\x80") else program[:-1]
    inside = b"\x80\x04}" + literal("w") + body + b"s."
    for data in (program, torch_zip(inside, {}), torch_legacy(inside, [], b"")):
        path.write_bytes(data)
        with pytest.raises(WeightsError) as caught:
            read_weights(path)
        assert str(caught.value).startswith(f"{path}: ") and refused in str(caught.value)
    time.sleep(0.05)
    assert not marker.exists()


@pytest.mark.parametrize("name", ATTACKS)
def test_the_attack_would_have_run(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    program, _ = attacks(marker)[name]
    try:
        made = pickle.loads(program)
    except TypeError:
        made = None  # "behind what is admitted" runs, but its result is not a class
    if isinstance(made, subprocess.Popen):
        made.wait()
    assert marker.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02}(" + literal("w") + b"ccollections\nOrderedDict\n" + b"u)R.",  # calls a dict
        b"\x80\x02ctorch\nfloat32\n)R.",  # a name, but not a function
        b"\x80\x02ccollections\nOrderedDict\n}R.",  # arguments that are not a tuple
        b"\x80\x02ccollections\nOrderedDict\n)\x81.",  # NEWOBJ
        b"\x80\x02\x82\x01.",  # EXT1: the registry of extensions is not used
        b"\x80\x05\x97.",  # NEXT_BUFFER: there are none
        b"\x80\x02" + literal("id") + b"Q.",  # a persistent id outside a torch file
        b"\x80\x02c_codecs\nencode\n(" + literal("x") + literal("idna") + b"tR.",
        b"\x80\x02cbuiltins\nbytes\n(" + literal(10**12) + b"tR.",  # bytes(10**12) is a terabyte
        b"\x80\x02]" + literal({"append": 1}) + b"b.",  # a state for a list
        b"\x80\x02ctorch\nSize\n" + literal((None, {"__class__": 1})) + b"b.",  # attributes of a function
        b"\x80\x02" + literal(1) + literal(2) + b"a.",  # appends to a number
        b"\x80\x02]" + literal("k") + literal("v") + b"s.",  # sets an item of a list
        b"\x80\x02h\x05.",
        b"\x80\x020.",
        b"\x80\x02.",
        b"\x80\x02NN.",
        b"\x80\x02t.",
        b"\x80\x02K\x01\x87.",
    ],
)
def test_instructions_that_weights_do_not_need_are_refused(tmp_path: Path, program: bytes) -> None:
    path = tmp_path / "weights"
    path.write_bytes(program)
    with pytest.raises(WeightsError, match="weights: "):
        read_weights(path)
    with pytest.raises(ValueError):
        unpickle(io.BytesIO(program))


def doubled(times: int) -> bytes:
    """Returns instructions that push a tuple of 2^times leaves, by pairing each with itself."""
    return b")" + b"q\x01h\x01\x86" * times


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02}r\xff\xff\xff\x7f.",  # pickle.loads reserves 64 GB for this memo index
        b"\x80\x02}" + doubled(64) + b"K\x01s.",  # as a dict's key: its hash never ends
        b"\x80\x02cnumpy\ndtype\n(" + doubled(64) + b"tR.",  # in an error message
        b"\x80\x02c_codecs\nencode\n(" + literal("x") + doubled(64) + b"tR.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(" + doubled(64) + b"tR.",
        b"\x80\x02}" + literal("w") + doubled(64) + b"s.",
        pickled({"w": tensor()})[:-1] + b"0" + doubled(64) + b".",
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x0f.",  # text of 2^60 characters
        b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.",  # a bytearray of 2^40
        b"\x80\x02" + b"(" * 5_000 + b"t" * 5_000 + b".",  # tuples 5000 deep
        b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.",  # as a dict's key: its hash overflows the C stack
        b"\x80\x02}(" + literal("a") + b"N)" + b"\x85" * 200_000 + b"Nu.",
        b"\x80\x02()" + b"\x85" * 200_000 + b"Nd.",
        b"\x80\x02}q\x00" + literal("model") + b"h\x00s.",  # a dict that contains itself
    ],
)
def test_a_small_file_takes_little_time_and_memory(tmp_path: Path, program: bytes) -> None:
    path = tmp_path / "weights"
    path.write_bytes(program)
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(WeightsError):
        read_weights(path)
    seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 20 and peak < 2**27


DTYPE = b"cnumpy\ndtype\n" + literal("b1") + b"\x85R"
MEMOISED = {
    "a list of pairs": literal([(f"n{k}", None) for k in range(300)]),
    "sizes": literal([1] * 64),
    "a tuple": literal((1,) * 1_000),
    "a dict": literal({f"{k:02}": k for k in range(100)}),
    "a text": literal("x" * 16_000),
    "a text of large characters": literal("\u4e00" * 16_000),
    "bytes": b"\x8e" + (16_000).to_bytes(8, "little") + bytes(16_000),
}
"""Instructions that push an object, for the memo."""
ARGUMENTS = {
    "_codecs.encode": b"h\x09" + literal("latin1") + b"\x86",
    "numpy.core.multiarray.scalar": DTYPE + literal("x") + b"\x86",
    "numpy.core.numeric._frombuffer": b"(h\x09" + DTYPE + b"M\x80\x3e\x85" + literal("C") + b"t",
    "torch._utils._rebuild_tensor": tensor()[len(b"ctorch._utils\n_rebuild_tensor_v2\n") : -len(b"\x89NtR")] + b"t",
}
"""Arguments that the function accepts, where those are not one object of the memo (9)."""


def repeated(call: bytes, times: int, head: bytes) -> bytes:
    """Returns {"w": [...]} of the result of `call`, `times` times, after instructions that only fill the memo."""
    return b"\x80\x02}" + literal("w") + b"](" + head + call * times + b"es."


def read_bounded(content: bytes) -> str:
    """Reads a weight file, asserts that this takes at most 60 times its size, and returns why it is refused."""
    why = ""
    tracemalloc.start()
    start = time.process_time()
    try:
        parse(content)
    except ValueError as error:
        why = str(error)
    seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 10 and peak < 60 * len(content) + 2**18, (seconds, peak / len(content))
    return why


@pytest.mark.parametrize("name", {function: name for name, function in FUNCTIONS.items() if function}.values())
def test_the_results_of_calls_with_memoised_objects_are_bounded_by_the_size_of_the_file(name: str) -> None:
    module, _, function = name.rpartition(".")
    head = f"c{module}\n{function}\n".encode() + b"q\x08"
    own = ARGUMENTS.get(name.replace("._core", ".core").removesuffix("_v2"))
    for called, pushed in MEMOISED.items():
        for arguments in filter(None, (own, b"h\x09\x85", b"(" + b"h\x09" * 100 + b"t", b")")):
            memo = head + pushed + b"q\x09" + arguments + b"q\x0a"
            program = repeated(b"h\x08h\x0aR", 500, memo)
            assert read_bounded(torch_zip(program, {"0": bytes(24)})), called


def test_the_smallest_tensors_that_torch_writes_fit_into_the_budget() -> None:
    """Those of an optimizer's steps, whose names and types are in the memo: 63 bytes each."""
    head = b"ctorch._utils\n_rebuild_tensor_v2\nq\x01" + literal("storage") + b"q\x02ctorch\nFloatStorage\nq\x03"
    head += literal("cpu") + b"q\x04ccollections\nOrderedDict\nq\x05"
    tensors = b""
    for k in range(3_000):
        put = [b"r" + (6 + 5 * k + n).to_bytes(4, "little") for n in range(5)]
        storage = b"(h\x02h\x03" + literal(str(k))[:-2] + put[0] + b"h\x04K\x01t" + put[1] + b"Q"
        tensors += b"h\x01(" + storage + b"K\x00))\x89h\x05)R" + put[2] + b"t" + put[3] + b"R" + put[4]
    program = b"\x80\x02}" + literal("step") + b"](" + head + tensors + b"es" + literal("w") + tensor(key="w") + b"s."
    assert list(parse(torch_zip(program, {"w": bytes(24)}))) == ["w"]


def test_an_array_of_many_names_is_read_once() -> None:
    numbers = b"cnumpy.core.numeric\n_frombuffer\n(" + MEMOISED["a text"] + DTYPE + b"M\x80\x3e\x85" + literal("C")
    program = b"\x80\x02}(" + literal("w") + numbers + b"tRq\x09"
    program += b"".join(literal(f"w{k}") + b"h\x09" for k in range(1_000)) + b"u."
    assert read_bounded(program) == "" and len(parse(program)) == 1_001


SWOLLEN = {
    "a list of the same list": repeated(
        b"ccollections\nOrderedDict\n](" + b"h\x09" * 2_000 + b"e\x85R", 1, literal(["a", 1] * 1_000) + b"q\x09"
    ),
    "states of the same bytes": repeated(
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\ntRh\x08b",
        2_000,
        b"(K\x01M\x80\x3e\x85" + DTYPE + b"\x89" + literal("x" * 16_000) + b"tq\x08",
    ),
    "names from the memo": repeated(b"h\x08h\x09\x93", 5_000, literal("torch") + b"q\x08" + literal("Size") + b"q\x09"),
    "empty dicts": repeated(b"}", 100_000, b""),
    "entries of the memo": b"\x80\x04]" + b"\x94" * 100_000 + b".",
    "keys that are hashed anew": repeated(b"}h\x09K\x01s", 2_000, literal(1 << 8_000_000) + b"q\x09"),
    "keys of one hash": b"\x80\x02}(" + b"".join(literal(k * (2**61 - 1)) + b"N" for k in range(1, 50_000)) + b"u.",
    "places of one hash": b"\x80\x02N" + b"".join(b"p%d\n" % (k * (2**61 - 1)) for k in range(1, 50_000)) + b".",
}
"""Pickles whose objects take far more memory or time than their instructions."""


@pytest.mark.parametrize("name", SWOLLEN)
def test_the_result_of_a_pickle_is_bounded_by_its_size(name: str) -> None:
    assert read_bounded(SWOLLEN[name])


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(-(2**60), 2**60), inner, max_size=4)
        | st.dictionaries(st.text(), inner, max_size=4).map(OrderedDict)
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=150)
@given(value=plain, protocol=st.integers(2, 5))
def test_plain_values_equal_those_of_pickle(value: object, protocol: int) -> None:
    program = pickle.dumps(value, protocol)
    assert unpickle(io.BytesIO(program))[0] == pickle.loads(program)


def test_values_that_occur_twice_are_one_object_and_cycles_close() -> None:
    shared: list[Any] = [1]
    value = {"a": shared, "b": shared, "self": []}
    value["self"].append(value)
    for protocol in (2, 4):
        found, _ = unpickle(io.BytesIO(pickle.dumps(value, protocol)))
        assert found["a"] is found["b"] and found["self"][0] is found


def test_reading_stops_after_the_pickle() -> None:
    file = io.BytesIO(pickle.dumps([1], 2) + pickle.dumps("next", 4) + b"rest")
    assert unpickle(file) == ([1], {}) and unpickle(file) == ("next", {}) and file.read() == b"rest"


def test_the_names_of_a_pickle_are_never_looked_up() -> None:
    for name in FUNCTIONS:
        module, _, attribute = name.rpartition(".")
        made, _ = unpickle(io.BytesIO(b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b"."))
        assert type(made).__module__ == "retina_jax.weights.pickles" and not isinstance(made, type)


def test_an_ordered_dict_of_python_2_is_read_as_its_pairs() -> None:
    program = (
        b"\x80\x02ccollections\nOrderedDict\n" + literal([["a", 1], ["b", 2]]) + b"\x85R" + literal({"x": 1}) + b"b."
    )
    assert unpickle(io.BytesIO(program))[0] == {"a": 1, "b": 2}
