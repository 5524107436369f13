"""Every format reads to the arrays that were written; every damaged file ends in one line that names it."""

import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weight_files import literal, pickled, python2_pickle, safetensors, tensor, torch_legacy, torch_zip

from retina_jax.errors import WeightsError
from retina_jax.weights.readers import read_weights

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINTS = ("zip", "legacy", "checkpoint", "checkpoint_legacy")
ARRAYS = {
    "conv1_w": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2) / 7,
    "res_conv1_bn_s": np.array([-1.5, 0.0, 255.0], np.float32),
    "ids": np.array([1, -2, 3], np.int64),
}


def equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    """Returns whether names, order, dtypes, shapes and values are the same."""
    return list(found) == list(expected) and all(
        found[name].dtype == expected[name].dtype and np.array_equal(found[name], expected[name]) for name in expected
    )


def refusal(path: Path) -> str:
    """Returns the error of reading the file; asserts that it is one line that names the file."""
    with pytest.raises(WeightsError) as caught:
        read_weights(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 600 + len(str(path))
    return message


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    """Writes bytes into a file whose name gives no information."""

    def to_file(data: bytes) -> Path:
        path = tmp_path / "weights"
        path.write_bytes(data)
        return path

    return to_file


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_torch_files_read_as_torch_reads_them(name: str) -> None:
    with np.load(GOLDEN / "expected.npz") as file:
        expected = dict(file)
    found = read_weights(GOLDEN / f"{name}.pth")
    assert equal(found, expected)
    assert all(array.dtype.isnative and array.flags.aligned for array in found.values())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_tensors_that_share_a_storage_share_memory(name: str) -> None:
    found = read_weights(GOLDEN / f"{name}.pth")
    parts = [found[f"shared.{part}"] for part in ("rows", "transposed", "every_second")]
    assert all(np.shares_memory(part, found["shared.whole"]) for part in parts)
    assert not np.shares_memory(found["half"], found["shared.whole"])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_detectron2_pickles_read_in_every_protocol(write: Callable[[bytes], Path], protocol: int) -> None:
    arrays = ARRAYS | {
        "column.major": np.asfortranarray(ARRAYS["conv1_w"]),
        "big.endian": ARRAYS["ids"].astype(">i8"),
        "bool": np.array([True, False]),
        "scalar": np.float32(2.5),
        "empty": np.zeros((0, 3), np.float16),
    }
    file = {"model": arrays, "__author__": "Detectron2 Model Zoo", "matching_heuristics": True}
    found = read_weights(write(pickle.dumps(file, protocol)))
    assert equal(found, arrays | {"big.endian": ARRAYS["ids"], "scalar": np.array(2.5, np.float32)})


@pytest.mark.parametrize("wrap", [lambda blobs: {"blobs": blobs, "cfg": "MODEL: {}"}, OrderedDict])
def test_caffe2_blobs_read_without_their_momentum(write: Callable[[bytes], Path], wrap: Callable) -> None:
    blobs = ARRAYS | {"conv1_w_momentum": ARRAYS["conv1_w"]}
    assert equal(read_weights(write(pickle.dumps(wrap(blobs), 2))), ARRAYS)


def test_pickles_of_python_2_read(write: Callable[[bytes], Path]) -> None:
    program = python2_pickle(ARRAYS)
    reference = pickle.loads(program, encoding="latin1")
    assert reference["cfg"] == "Größe: 1\n".encode().decode("latin1")
    assert equal(read_weights(write(program)), ARRAYS)


def test_safetensors_reads_every_dtype(write: Callable[[bytes], Path]) -> None:
    values = np.array([[0, 1, 2], [3, 100, 127]])
    kinds = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1"}
    kinds |= {"U64": "u8", "U32": "u4", "U16": "u2", "U8": "u1", "BOOL": "?"}
    arrays = {dtype: values.astype(kind) for dtype, kind in kinds.items()}
    stored = {name: (name, array) for name, array in arrays.items()}
    bf16 = np.array([1.0, -3.140625, np.inf, 1e-40], np.float32).view(np.uint32) >> 16
    stored["BF16"] = ("BF16", bf16.astype(np.uint16))
    found = read_weights(write(safetensors(stored, __metadata__={"format": "pt"})))
    expected = arrays | {"BF16": (bf16 << 16).view(np.float32)}
    assert equal({name: found[name] for name in expected}, expected)
    assert all(array.flags.aligned for array in found.values())


def test_a_real_safetensors_file_reads(shared_data: Path) -> None:
    found = read_weights(shared_data / "weights" / "resnet18_imagenet_partial.safetensors")
    assert found["conv1.weight"].shape == (64, 3, 7, 7) and found["conv1.weight"].dtype == np.float32
    assert found["layer4.0.downsample.0.weight"].shape == (512, 256, 1, 1)
    present = {name for name in found if name.startswith("layer4") and "conv" in name}
    assert not present  # the missing parts are 3 x 3 convolutions
    assert found["layer3.1.conv2.weight"].shape == (256, 256, 3, 3)
    assert 0.01 < found["conv1.weight"].std() < 1 and all(np.isfinite(array).all() for array in found.values())


FILES = {
    **{name: (GOLDEN / f"{name}.pth").read_bytes() for name in CHECKPOINTS},
    "safetensors": safetensors({name: ("F32", ARRAYS[name]) for name in ("conv1_w", "res_conv1_bn_s")}),
    "detectron2": pickle.dumps({"model": ARRAYS, "__author__": "x"}, 4),
    "python2": python2_pickle(ARRAYS),
    "handmade_zip": torch_zip(pickled({"w": tensor()}), {"0": bytes(24)}),
    "handmade_legacy": torch_legacy(pickled({"w": tensor()}), ["0"], b"\6" + bytes(31)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_truncated_anywhere_is_refused(write: Callable[[bytes], Path], name: str) -> None:
    data = FILES[name]
    assert read_weights(write(data))
    for length in {len(data) * i // 50 for i in range(50)} | set(range(16)) | {len(data) - 1}:
        message = refusal(write(data[:length]))
        assert length or "empty" in message


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the one file that the fuzz tests write to."""
    return tmp_path_factory.mktemp("fuzz") / "weights"


def check_reads_or_refuses(path: Path, data: bytes) -> None:
    """Asserts that a damaged file is refused, or reads to arrays that can be copied."""
    path.write_bytes(data)
    try:
        with warnings.catch_warnings(action="error"):
            found = read_weights(path)
    except WeightsError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        return
    assert found and sum(array.copy().nbytes for array in found.values()) <= 10 * len(data)


@pytest.mark.parametrize("name", FILES)
@settings(deadline=None, max_examples=60, derandomize=True)
@given(drawn=st.data())
def test_flipped_bytes_are_refused_or_harmless(fuzzed: Path, name: str, drawn: st.DataObject) -> None:
    data = bytearray(FILES[name])
    for _ in range(drawn.draw(st.integers(1, 4))):
        data[drawn.draw(st.integers(0, len(data) - 1))] = drawn.draw(st.integers(0, 255))
    check_reads_or_refuses(fuzzed, bytes(data))


@settings(deadline=None, max_examples=150, derandomize=True)
@given(drawn=st.data())
def test_flipped_bytes_with_a_valid_checksum_are_refused_or_harmless(fuzzed: Path, drawn: st.DataObject) -> None:
    program = bytearray(pickled({"a": tensor(), "b": tensor("LongStorage", "1", 2, 0, (), ())}))
    for _ in range(drawn.draw(st.integers(1, 3))):
        program[drawn.draw(st.integers(0, len(program) - 1))] = drawn.draw(st.integers(0, 255))
    check_reads_or_refuses(fuzzed, torch_zip(bytes(program), {"0": bytes(24), "1": bytes(16)}))


def test_a_backslash_in_a_name_gives_no_warning(fuzzed: Path) -> None:
    check_reads_or_refuses(fuzzed, b"\x80\x02cnumpy\\u\nndarray\n.")


@settings(deadline=None, max_examples=100, derandomize=True)
@given(data=st.binary(max_size=200), start=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"(dp0\n"]))
def test_noise_is_refused_or_harmless(fuzzed: Path, data: bytes, start: bytes) -> None:
    check_reads_or_refuses(fuzzed, start + data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<!DOCTYPE html><html>404</html>", "not a weight file: it starts with b'<!DOCTYPE html><'"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a weight file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "not a weight file"),
        (pickle.dumps([1, 2]), "contains a list; expected a dict"),
        (pickle.dumps({}), "contains no arrays by name"),
        (pickle.dumps({"epoch": 3, "model": {"lr": 0.1}}), "its keys: 'epoch', 'model'"),
        (pickle.dumps({"w_momentum": np.zeros(2)}), "contains no arrays"),
        (safetensors({}), "contains no arrays"),
    ],
)
def test_a_file_without_weights_is_refused_with_the_reason(
    write: Callable[[bytes], Path], data: bytes, reason: str
) -> None:
    assert reason in refusal(write(data))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "cannot be read: No such file or directory" in refusal(tmp_path / "resnet50.pth")
    assert "cannot be read: Is a directory" in refusal(tmp_path)


def test_a_wrapper_without_arrays_is_skipped(write: Callable[[bytes], Path]) -> None:
    found = read_weights(write(pickle.dumps({"model": {"name": "resnet"}, "state_dict": ARRAYS})))
    assert equal(found, ARRAYS)
    cyclic = b"\x80\x02}q\x00" + literal("model") + b"h\x00s."  # d = {}; d["model"] = d
    assert "contains no arrays" in refusal(write(cyclic))
