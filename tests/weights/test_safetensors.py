"""safetensors: the tensors cover the file exactly, and the header means what it says."""

import json

import numpy as np
import pytest
from weight_files import safetensors

from retina_jax.weights.readers import parse

FLOATS = {"a": ("F32", np.ones(3, np.float32)), "b": ("F32", np.zeros((2, 2), np.float32))}


def with_header(text: bytes, buffer: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + buffer


def entry(dtype: object = "F32", shape: object = (3,), offsets: object = (0, 12)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_what_is_written_is_read_and_the_metadata_is_no_tensor() -> None:
    found = parse(safetensors(FLOATS, __metadata__={"format": "pt"}))
    assert list(found) == ["a", "b"] and all(np.array_equal(found[name], FLOATS[name][1]) for name in FLOATS)


def test_tensors_may_lie_in_another_order_than_the_header_names_them() -> None:
    found = parse(safetensors(FLOATS, a=entry(offsets=(16, 28)), b=entry(shape=(2, 2), offsets=(0, 16))))
    assert found["b"][0, 0] == 1 and found["a"][2] == 0


def test_empty_tensors_take_no_room() -> None:
    found = parse(safetensors({"none": ("F32", np.zeros((0, 4), np.float32)), **FLOATS}))
    assert found["none"].shape == (0, 4)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (safetensors(FLOATS, a=entry(offsets=(0, 8))), r"tensor 'a' of shape \(3,\) and dtype F32 in 8 bytes"),
        (safetensors(FLOATS, a=entry(offsets=(4, 16))), "'a' starts at byte 4, what comes before it ends at 0"),
        (safetensors(FLOATS, b=entry(shape=(2, 2), offsets=(8, 24))), "'b' starts at byte 8, what comes .* at 12"),
        (safetensors(FLOATS, b=entry(shape=(2, 2), offsets=(16, 32))), "bytes 16 to 32 of 28"),
        (safetensors(FLOATS, a=entry(offsets=(12, 0))), "bytes 12 to 0"),
        (safetensors(FLOATS, a=entry(offsets=(-12, 0))), r"data_offsets \[-12, 0\], where"),
        (safetensors(FLOATS, a=entry(offsets=(0,))), "1 data_offsets, where two"),
        (safetensors(FLOATS, a=entry(offsets=None)), "data_offsets None"),
        (safetensors(FLOATS, a=entry(shape=(True, 3))), r"shape \[True, 3\]"),
        (safetensors(FLOATS, a=entry(shape=(1.5, 2))), "shape"),
        (safetensors(FLOATS, a=entry(shape=(2**62, 2**62))), "in 12 bytes"),
        (safetensors(FLOATS, a=entry(dtype="F8_E4M3")), "dtype F8_E4M3, which is none of BOOL, U8"),
        (safetensors(FLOATS, a=entry(dtype=3)), "'a' that describes no tensor"),
        (safetensors(FLOATS, a=[1]), "'a' that describes no tensor"),
        (safetensors(FLOATS) + b"\0", "'the end' starts at byte 29, what comes before it ends at 28"),
        (with_header(b"{]"), "has a damaged header"),
        (with_header(b'{"\xff":1}'), "has a damaged header"),
        (with_header(b'{"a":' * 50_000), "has a damaged header"),
        (with_header(b'{"a":1,"a":2}'), "a name occurs twice"),
        ((2**63).to_bytes(8, "little") + b"{}", "its header ends at byte"),
        (with_header(json.dumps({"e": entry(shape=(0, 2**62), offsets=(0, 0))}).encode()), "."),
    ],
)
def test_a_damaged_file_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse(data)
