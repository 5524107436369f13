"""safetensors: the tensors cover the file exactly, and the header is interpreted correctly."""

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
    assert sorted(found) == ["a", "b"] and all(np.array_equal(found[name], FLOATS[name][1]) for name in FLOATS)


def test_tensors_may_be_in_another_order_than_in_the_header() -> None:
    found = parse(safetensors(FLOATS, a=entry(offsets=(16, 28)), b=entry(shape=(2, 2), offsets=(0, 16))))
    assert found["b"][0, 0] == 1 and found["a"][2] == 0


def test_empty_tensors_take_no_bytes() -> None:
    found = parse(safetensors({"none": ("F32", np.zeros((0, 4), np.float32)), **FLOATS}))
    assert found["none"].shape == (0, 4)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (safetensors(FLOATS, a=entry(offsets=(0, 8))), "invalid shape, data type, or offset"),
        (safetensors(FLOATS, a=entry(offsets=(4, 16))), "offset for tensor `a`"),
        (safetensors(FLOATS, b=entry(shape=(2, 2), offsets=(8, 24))), "offset for tensor `b`"),
        (safetensors(FLOATS, b=entry(shape=(2, 2), offsets=(16, 32))), "offset for tensor `b`"),
        (safetensors(FLOATS, a=entry(offsets=(12, 0))), "offset for tensor `a`"),
        (safetensors(FLOATS, a=entry(offsets=(-12, 0))), "header"),
        (safetensors(FLOATS, a=entry(offsets=(0,))), "header"),
        (safetensors(FLOATS, a=entry(offsets=None)), "header"),
        (safetensors(FLOATS, a=entry(shape=(True, 3))), "header"),
        (safetensors(FLOATS, a=entry(shape=(1.5, 2))), "header"),
        (safetensors(FLOATS, a=entry(shape=(2**62, 2**62))), "overflow"),
        (safetensors(FLOATS | {"c": ("F8_E4M3", np.ones(4, np.uint8))}), "tensor 'c' of dtype F8_E4M3.*BF16"),
        (safetensors(FLOATS, a=entry(dtype=3)), "header"),
        (safetensors(FLOATS, a=[1]), "header"),
        (safetensors(FLOATS) + b"\0", "not fully covered"),
        (with_header(b"{]"), "header"),
        (with_header(b'{"\xff":1}'), "header"),
        (with_header(b'{"a":' * 50_000), "header"),
        (with_header(b'{"a":1,"a":2}'), "header"),
        ((2**63).to_bytes(8, "little") + b"{}", "header"),
        (with_header(json.dumps({"e": entry(shape=(0, 2**62), offsets=(0, 0))}).encode()), "."),
    ],
)
def test_a_damaged_file_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse(data)
