"""Raw bytes to numbers, for every format alike."""

from typing import Any, Literal

import numpy as np
from jaxtyping import Shaped

KINDS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
SIZES = {"bf16": 2} | {kind: np.dtype(kind).itemsize for kind in KINDS}
"""Kinds of numbers that a weight file may hold, in numpy's letters, and the bytes of one. numpy has no bf16."""


def are_sizes(numbers: Any) -> bool:
    """Whether this is a list or tuple of integers in [0, 2^63), and no more of them than an array has dimensions (64).

    Everything that a file says of shapes, strides and offsets passes here first: what a hostile file makes of them is then
    small enough to multiply and to print.
    """
    return (
        isinstance(numbers, list | tuple)
        and len(numbers) <= 64
        and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
    )


def decode(buffer: bytes | memoryview, kind: str, order: Literal["<", ">"] = "<") -> Shaped[np.ndarray, " N"]:
    """The N numbers in `buffer`, aligned, in this machine's byte order; bf16 as float32, which holds each of them exactly.

    Reads without a copy, and gives a read-only array, where the buffer already is what is wanted. Of b1, every byte but 0
    is True. Raises ValueError where the buffer is no whole number of `kind`s, or for a kind that is not in SIZES.
    """
    if kind not in SIZES:
        raise ValueError(f"holds numbers of kind {kind!r}, which is none of {', '.join(SIZES)}")
    if kind == "b1":
        return np.frombuffer(buffer, np.uint8) != 0
    raw = np.frombuffer(buffer, np.dtype("u2" if kind == "bf16" else kind).newbyteorder(order))
    if kind == "bf16":
        return (raw.astype(np.uint32) << 16).view(np.float32)  # bf16 is the upper half of a float32
    native = raw.astype(raw.dtype.newbyteorder("="), copy=False)
    return native if native.flags.aligned else native.copy()
