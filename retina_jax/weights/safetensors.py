"""The safetensors format: eight bytes of header length, a JSON header, then the tensors' bytes, little-endian."""

import json
import math
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from retina_jax.errors import quoted, shortened
from retina_jax.weights.buffers import SIZES, are_sizes, decode

KINDS = {
    "BOOL": "b1",
    "U8": "u1",
    "I8": "i1",
    "U16": "u2",
    "I16": "i2",
    "F16": "f2",
    "BF16": "bf16",
    "U32": "u4",
    "I32": "i4",
    "F32": "f4",
    "U64": "u8",
    "I64": "i8",
    "F64": "f8",
}


def is_safetensors(data: bytes) -> bool:
    """Whether the file starts as one: the first byte of the header, the ninth of the file, is a brace by the standard."""
    return data[8:9] == b"{"


def read_safetensors(data: bytes) -> dict[str, np.ndarray]:
    """Names to arrays, in the order of the header; read-only views of `data` where no conversion is needed.

    Raises ValueError with the reason. By the standard the tensors cover the bytes after the header exactly: a gap, an
    overlap and a byte too many or too few are all errors, which is also what tells a file that was cut off.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    if start > len(data):
        raise ValueError(f"is truncated or damaged: its header ends at byte {start}, the file at {len(data)}")
    header = parse_header(data[8:start])
    buffer = memoryview(data)[start:]
    arrays, spans = {}, []
    for name, entry in header.items():
        if name != "__metadata__":
            kind, shape, begin, end = parse_entry(name, entry)
            if not 0 <= begin <= end <= len(buffer):
                raise ValueError(
                    f"is truncated or damaged: tensor {quoted(name)} is at bytes {begin} to {end} of {len(buffer)}"
                )
            if end - begin != math.prod(shape) * SIZES[kind]:
                shaped = f"shape {shape} and dtype {shortened(entry['dtype'])}"
                raise ValueError(f"has tensor {quoted(name)} of {shaped} in {end - begin} bytes")
            arrays[name] = decode(buffer[begin:end], kind).reshape(shape)
            spans.append((begin, end, name))
    reached = 0
    for begin, end, name in [*sorted(spans), (len(buffer), len(buffer), "the end")]:
        if begin != reached:
            raise ValueError(
                f"is damaged: {quoted(name)} starts at byte {begin}, what comes before it ends at {reached}"
            )
        reached = end
    return arrays


def parse_header(text: bytes) -> dict[str, Any]:
    """The JSON header; ValueError where it is no object, or names a tensor twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    try:
        header = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"has a damaged header: {error}") from error
    if not isinstance(header, dict):
        raise ValueError("has a header that is no JSON object")
    return header


def parse_entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Kind, shape, first byte and end of a tensor, checked in type alone."""

    def naturals(key: str) -> list[int]:
        numbers = entry.get(key)
        if not are_sizes(numbers):
            raise ValueError(
                f"has tensor {quoted(name)} with {key} {reprlib.repr(numbers)}, where numbers >= 0 are meant"
            )
        return numbers

    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        raise ValueError(f"has a header entry {quoted(name)} that describes no tensor")
    if entry["dtype"] not in KINDS:
        raise ValueError(
            f"has tensor {quoted(name)} of dtype {shortened(entry['dtype'])}, which is none of {', '.join(KINDS)}"
        )
    offsets = naturals("data_offsets")
    if len(offsets) != 2:
        raise ValueError(f"has tensor {quoted(name)} with {len(offsets)} data_offsets, where two are meant")
    return KINDS[entry["dtype"]], tuple(naturals("shape")), *offsets


def write_safetensors(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
    """A file's content from float32 arrays by name, such as `read_safetensors` and the safetensors package read."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    blocks, end = [], 0
    for name, array in arrays.items():
        if array.dtype != np.float32:
            raise ValueError(f"{name}: only float32 is written, not {array.dtype}")
        blocks.append(np.ascontiguousarray(array).astype("<f4").tobytes())
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [end, end + len(blocks[-1])]}
        end += len(blocks[-1])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the standard's readers want the tensors aligned
    return len(text).to_bytes(8, "little") + text + b"".join(blocks)
