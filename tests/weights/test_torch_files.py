"""torch's files: storage, offset, size and strides define a tensor, which never extends beyond its storage."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weight_files import literal, pickled, tensor, torch_legacy, torch_zip

from retina_jax.errors import WeightsError
from retina_jax.weights.readers import parse, read_weights

SIX = np.arange(6, dtype=np.float32)


def count(number: int) -> bytes:
    return number.to_bytes(8, "little")


@settings(deadline=None, max_examples=200)
@given(
    offset=st.integers(0, 4),
    shape=st.lists(st.integers(0, 3), max_size=3),
    strides=st.lists(st.integers(0, 4), min_size=3, max_size=3),
)
def test_a_view_is_read_or_refused_according_to_its_indices(offset: int, shape: list[int], strides: list[int]) -> None:
    strides = strides[: len(shape)]
    data = torch_zip(
        pickled({"w": tensor(offset=offset, shape=tuple(shape), strides=tuple(strides))}), {"0": SIX.tobytes()}
    )
    where = offset + np.tensordot(np.indices(shape), strides, (0, 0)) if shape else np.array(offset)
    if where.size and (where.max() >= 6 or where.size > 6):
        with pytest.raises(ValueError, match="tensor of shape"):
            parse(data)
    else:
        (found,) = parse(data).values()
        assert found.shape == tuple(shape) and np.array_equal(found, SIX[where.astype(int)])


@pytest.mark.parametrize(
    "fields",
    [
        {"offset": -1},
        {"offset": 2**70},
        {"offset": 1.0},
        {"shape": (-2, -3)},
        {"shape": (2, True)},
        {"shape": (2, 3, 1)},
        {"shape": None},
        {"strides": (-3, 1)},
        {"strides": (3, "1")},
        {"shape": (10**6, 10**6), "strides": (0, 0)},
        {"shape": (1,) * 70, "strides": (1,) * 70},
        {"shape": (0, 2**62), "strides": (1, 1)},
        {"shape": (2**32, 2**32, 2**32), "strides": (0, 0, 0)},
        {"count": -6},
        {"count": 10**30},
        {"count": 6.0},
        {"count": 5},
        {"count": 7},
        {"key": 0},
        {"key": "1"},
        {"key": "../data.pkl"},
        {"kind": "ComplexFloatStorage"},
        {"kind": "DoubleStorage"},
        {"tail": literal(("view", 0, 6))},
    ],
)
def test_an_invalid_tensor_is_refused(tmp_path: Path, fields: dict[str, object]) -> None:
    path = tmp_path / "weights.pth"
    program = pickled({"w": tensor(**fields)})
    for data in (
        torch_zip(program, {"0": SIX.tobytes()}),
        torch_legacy(program, ["0"], count(6) + SIX.tobytes()),
    ):
        path.write_bytes(data)
        with pytest.raises(WeightsError, match=r"weights\.pth: ") as caught:
            read_weights(path)
        assert "\n" not in str(caught.value)


def test_the_stride_of_a_side_of_one_does_not_matter() -> None:
    program = pickled({"w": tensor(shape=(6, 1), strides=(1, 2**62))})
    assert np.array_equal(parse(torch_zip(program, {"0": SIX.tobytes()}))["w"], SIX[:, None])


def test_a_big_endian_file_reads_to_the_same_numbers() -> None:
    program = pickled({"w": tensor(), "b": tensor("BFloat16Storage", "1", 2, 0, (2,), (1,))})
    bf16 = np.array([0x3F80, 0xC049])
    for order, letter in ((b"little", "<"), (b"big", ">")):
        storages = {"0": SIX.astype(f"{letter}f4").tobytes(), "1": bf16.astype(f"{letter}u2").tobytes()}
        found = parse(torch_zip(program, storages, byteorder=order))
        assert np.array_equal(found["w"], SIX.reshape(2, 3)) and found["w"].dtype == np.float32
        assert np.array_equal(found["b"], np.array([1, -3.140625], np.float32)) and found["b"].dtype == np.float32


def test_only_the_storages_of_the_weights_are_read() -> None:
    optimizer = b"}" + literal("momentum") + tensor(key="not in the file") + b"s"
    program = pickled({"state_dict": b"}" + literal("w") + tensor() + b"s", "optimizer": optimizer})
    assert list(parse(torch_zip(program, {"0": SIX.tobytes()}))) == ["w"]


def test_a_storage_described_in_two_ways_is_refused() -> None:
    program = pickled({"a": tensor(), "b": tensor("IntStorage")})
    with pytest.raises(ValueError, match="inconsistent types or sizes of storage '0'"):
        parse(torch_zip(program, {"0": SIX.tobytes()}))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (torch_legacy(pickled({"w": tensor()}), [], b""), "the list of storages"),
        (torch_legacy(pickled({"w": tensor()}), ["0", "1"], b""), "the list of storages"),
        (torch_legacy(pickled({"w": tensor()}), [["0"]], b""), "the list of storages"),
        (torch_legacy(pickled({"w": tensor()}), ["0"], count(5) + SIX.tobytes()), "inconsistent size of storage '0'"),
        (torch_legacy(pickled({"w": tensor()}), ["0"], count(6) + SIX.tobytes()[:-1]), "truncated: storage '0'"),
        (torch_legacy(pickled({}), [], b"").replace(b"M\xe9\x03", b"M\xea\x03", 1), "protocol 1002"),
        (torch_zip(pickled({"w": tensor()}), {}), "'archive/data/0'"),
        (torch_zip(pickled({"w": tensor()}), {}, **{"inner/data.pkl": b""}), "2 members data.pkl"),
    ],
)
def test_inconsistent_files_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse(data)


def test_a_flipped_bit_in_a_zip_is_found_by_its_checksum() -> None:
    data = torch_zip(pickled({"w": tensor()}), {"0": SIX.tobytes()})
    start = data.index(SIX.tobytes())
    with pytest.raises(ValueError, match="Bad CRC-32"):
        parse(data[:start] + b"\x01" + data[start + 1 :])


def test_a_compressed_zip_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "bomb.npz", w=np.zeros(10**6))
    with pytest.raises(WeightsError, match=r"bomb\.npz: zip archive with compressed"):
        read_weights(tmp_path / "bomb.npz")


def test_a_pickled_module_is_refused_by_its_class() -> None:
    with pytest.raises(
        WeightsError, match=r"refers to 'torch\.nn\.modules\.container\.Sequential'.*save the state dict"
    ):
        read_weights(Path(__file__).parent / "golden" / "whole_module.pth")
