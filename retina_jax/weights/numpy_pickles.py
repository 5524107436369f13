"""numpy arrays inside pickles: stand-ins for the few names that numpy's own pickles mention.

The pickles are those of detectron2 (Python 3) and of Detectron and MSRA (Caffe2's blobs, Python 2); numpy 1 and numpy 2
differ in the module's name alone.
"""

import io
import math
import reprlib
from typing import Any

import numpy as np
from jaxtyping import Shaped

from retina_jax.weights.buffers import KINDS, SIZES, are_sizes, decode
from retina_jax.weights.unpickling import Admitted, Global, StandIn, unpickle


class Dtype(StandIn):
    """In place of `numpy.dtype(kind)`: a kind of `buffers.SIZES` and a byte order."""

    def __init__(self, kind: Any, *_: Any) -> None:
        if not isinstance(kind, str) or kind not in KINDS:
            raise ValueError(f"has a numpy array of dtype {reprlib.repr(kind)}, where plain numbers are meant")
        self.kind: str = kind
        self.order = "<"

    def set_state(self, state: Any) -> None:
        """(version, byte order, ...); what follows is for records and strings."""
        if state[1] not in ("<", ">", "|"):
            raise ValueError(f"has a numpy dtype of byte order {reprlib.repr(state[1])}")
        self.order = ">" if state[1] == ">" else "<"


class NumpyArray(StandIn):
    """In place of `numpy.ndarray`: empty, until its state comes."""

    def __init__(self) -> None:
        self.values: np.ndarray | None = None

    def set_state(self, state: Any) -> None:
        """(version, shape, dtype, column-major, bytes), of which numpy before 1.0 had no version."""
        shape, dtype, column_major, buffer = state[-4:]
        self.fill(shape, dtype, buffer, "F" if column_major else "C")

    def fill(self, shape: Any, dtype: Any, buffer: Any, order: str) -> "NumpyArray":
        """Take the array's parts. ValueError where the bytes are not exactly those of the shape."""
        if not isinstance(dtype, Dtype):
            raise TypeError("a numpy array without a dtype")
        if isinstance(buffer, str):
            buffer = buffer.encode("latin1")  # Python 2's bytes
        if not isinstance(buffer, bytes | bytearray):
            raise TypeError("a numpy array that is not made of bytes")
        if not are_sizes(shape):
            raise TypeError("a numpy array whose shape is no tuple of sizes")
        if len(buffer) != math.prod(shape) * SIZES[dtype.kind]:
            raise ValueError(f"has a numpy array of shape {shape} and dtype {dtype.kind} in {len(buffer)} bytes")
        self.values = decode(bytes(buffer), dtype.kind, dtype.order).reshape(shape, order=order)
        return self

    def array(self) -> Shaped[np.ndarray, "..."]:
        """The array; ValueError where the pickle never gave its contents."""
        if self.values is None:
            raise ValueError("has a numpy array without contents")
        return self.values


def reconstruct(kind: Any, *_: Any) -> NumpyArray:
    """In place of `numpy.core.multiarray._reconstruct`, whose shape and dtype are void until the state comes."""
    if kind != Global("numpy.ndarray"):
        raise TypeError("an array that is no numpy.ndarray")
    return NumpyArray()


def scalar(dtype: Any, buffer: Any) -> NumpyArray:
    """In place of `numpy.core.multiarray.scalar`: an array without sides."""
    return NumpyArray().fill((), dtype, buffer, "C")


def from_buffer(buffer: Any, dtype: Any, shape: Any, order: Any) -> NumpyArray:
    """In place of `numpy.core.numeric._frombuffer`, numpy's way in pickle protocol 5."""
    return NumpyArray().fill(shape, dtype, buffer, "F" if order == "F" else "C")


NUMPY: Admitted = {"numpy.dtype": Dtype, "numpy.ndarray": None} | {
    f"numpy.{core}.{name}": function
    for core in ("core", "_core")
    for name, function in {
        "multiarray._reconstruct": reconstruct,
        "multiarray.scalar": scalar,
        "numeric._frombuffer": from_buffer,
    }.items()
}


def read_numpy_pickle(data: bytes) -> Any:
    """The object in a pickle of containers and numpy arrays, each of the latter as a `NumpyArray`. Raises ValueError."""
    return unpickle(io.BytesIO(data), NUMPY)
