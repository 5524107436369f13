"""Files of `torch.save`, in the zip format (since torch 1.6) and in the one before it, without torch.

Both hold a pickle in which each tensor is a view (offset, shape, strides in elements) of a storage, and the storages'
bytes apart: as members of the zip, or one after another behind the pickle.
"""

import io
import math
import reprlib
import struct
import zipfile
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Shaped

from retina_jax.errors import quoted
from retina_jax.weights.buffers import SIZES, are_sizes, decode
from retina_jax.weights.numpy_pickles import NUMPY
from retina_jax.weights.unpickling import Admitted, Global, StandIn, unpickle

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""The first pickle of a legacy file."""
LEGACY_PROTOCOL = 1001
"""The second one; torch has written no other since 2016."""
KINDS = {
    "Double": "f8",
    "Float": "f4",
    "Half": "f2",
    "BFloat16": "bf16",
    "Long": "i8",
    "Int": "i4",
    "Short": "i2",
    "Char": "i1",
    "Byte": "u1",
    "Bool": "b1",
}
STORAGES = {f"{module}.{name}Storage": kind for module in ("torch", "torch.cuda") for name, kind in KINDS.items()}
DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "double", "float", "half"),
    *("int64", "int32", "int16", "int8", "uint8", "bool", "long", "int", "short"),
)
ZIP_ERRORS = (
    # What zipfile raises on damaged archives.
    zipfile.BadZipFile,
    EOFError,
    IndexError,
    KeyError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
    struct.error,
)


class Storage(StandIn):
    """`count` numbers of one kind, read when first asked for."""

    def __init__(self, kind: str, count: int, order: Literal["<", ">"], read: Callable[[], bytes | memoryview]) -> None:
        self.kind, self.count, self.order, self.read = kind, count, order, read

    @cached_property
    def numbers(self) -> Shaped[np.ndarray, " N"]:
        """All of them, in a row."""
        buffer = self.read()
        if len(buffer) != self.count * SIZES[self.kind]:
            raise ValueError(
                f"has a storage of {len(buffer)} bytes, where {self.count} numbers of {self.kind} are meant"
            )
        return decode(buffer, self.kind, self.order)


class Tensor(StandIn):
    """In place of `torch.Tensor`: where its numbers are. Checked to lie inside its storage, each number once."""

    def __init__(self, storage: Any, offset: Any, shape: Any, strides: Any) -> None:
        if not isinstance(storage, Storage):
            raise TypeError("a tensor without a storage")
        if not are_sizes(shape) or not are_sizes(strides) or not are_sizes((offset,)) or len(shape) != len(strides):
            raise ValueError("has a tensor whose size, strides or offset are no sizes")
        size = math.prod(shape)
        last = offset + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))
        # More numbers than the storage has are the mark of a tensor that repeats some (stride 0). No weights do, and a few
        # bytes could ask for any amount of memory so.
        if size and (last >= storage.count or size > storage.count):
            raise ValueError(
                f"has a tensor of size {shape}, strides {strides} and offset {offset} in a storage of {storage.count}"
            )
        self.storage, self.offset, self.shape, self.strides = storage, offset, tuple(shape), tuple(strides)

    def array(self) -> Shaped[np.ndarray, "..."]:
        """The tensor as a view of its storage: two tensors that share one in the file share it here."""
        numbers = self.storage.numbers
        if 0 in self.shape:
            return np.empty(self.shape, numbers.dtype)
        size = numbers.itemsize
        # The stride of a side of one is never walked, and may be any number.
        strides = [stride * size if side > 1 else 0 for side, stride in zip(self.shape, self.strides, strict=True)]
        return np.ndarray(self.shape, numbers.dtype, numbers, self.offset * size, strides)


def rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    """In place of `torch._utils._rebuild_tensor` and `_rebuild_tensor_v2`; gradient and hooks are passed over."""
    return Tensor(storage, offset, shape, strides)


def rebuild_parameter(data: Any, *_: Any) -> Tensor:
    """In place of `torch._utils._rebuild_parameter` and `_rebuild_parameter_with_state`: the tensor itself."""
    if not isinstance(data, Tensor):
        raise TypeError("a parameter without a tensor")
    return data


def torch_size(sides: Any = ()) -> tuple[Any, ...]:
    """In place of `torch.Size`."""
    return tuple(sides)


def torch_device(*names: Any) -> tuple[Any, ...]:
    """In place of `torch.device`: its name and number."""
    return names


TORCH: Admitted = {
    **NUMPY,
    **dict.fromkeys(STORAGES),
    **dict.fromkeys(f"torch.{name}" for name in DTYPES),
    "torch._utils._rebuild_tensor": rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_parameter": rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": rebuild_parameter,
    "torch.Size": torch_size,
    "torch.device": torch_device,
}


class Storages:
    """The storages that a pickle mentions: persistent ids of ("storage", type, key, device, count[, view])."""

    def __init__(self, order: Literal["<", ">"], read: Callable[[str], bytes | memoryview]) -> None:
        self.order, self.read = order, read
        self.by_key: dict[str, Storage] = {}

    def __call__(self, identity: Any) -> Storage:
        """The storage of a persistent id; the same one each time its key occurs."""
        tag, kind, key, _, count, *view = identity
        if tag != "storage" or not isinstance(kind, Global) or kind.name not in STORAGES:
            raise ValueError("is no sound pickle: a persistent id that is no storage")
        if not isinstance(key, str) or not are_sizes((count,)):
            raise ValueError("is no sound pickle: a storage without a name or a size")
        if any(part is not None for part in view):
            raise ValueError(
                "has storages that are views of others, as torch wrote before 0.4: save it anew with torch"
            )
        made = Storage(STORAGES[kind.name], count, self.order, lambda: self.read(key))
        storage = self.by_key.setdefault(key, made)
        if (storage.kind, storage.count) != (made.kind, made.count):
            raise ValueError(f"describes storage {quoted(key)} in two ways")
        return storage


def is_zip(data: bytes) -> bool:
    """Whether the file starts as the zip format does."""
    return data[:4] == b"PK\x03\x04"


def is_legacy(data: bytes) -> bool:
    """Whether the file starts as the legacy format does: with LEGACY_MAGIC, pickled."""
    return LEGACY_MAGIC.to_bytes(10, "little") in data[:32]


def read_zip(data: bytes) -> Any:
    """The object of a file in the zip format, each tensor in it as a `Tensor`. Raises ValueError with the reason.

    A zip ends with its directory, so a file that was cut off is none; each member's checksum is verified.
    """
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        members = archive.infolist()
    except ZIP_ERRORS as error:
        raise ValueError(f"is a truncated or damaged zip archive: {error}") from error
    # torch compresses nothing. So all members together are no larger than the file.
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > len(data):
        raise ValueError("is a zip archive with compressed or overlapping members, which torch.save does not write")

    def read(name: str) -> bytes:
        try:
            return archive.read(name)
        except ZIP_ERRORS as error:
            raise ValueError(f"is a damaged zip archive: {quoted(name)}: {error}") from error

    pickles = [member.filename for member in members if member.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"is a zip archive with {len(pickles)} members data.pkl, where torch.save writes one")
    folder = pickles[0].removesuffix("data.pkl")
    big = f"{folder}byteorder" in archive.namelist() and read(f"{folder}byteorder").strip() == b"big"
    storages = Storages(">" if big else "<", lambda key: read(f"{folder}data/{key}"))
    return unpickle(io.BytesIO(read(pickles[0])), TORCH, storages)


def read_legacy(data: bytes) -> Any:
    """The object of a file in the legacy format, each tensor in it as a `Tensor`. Raises ValueError with the reason.

    Five pickles: LEGACY_MAGIC, LEGACY_PROTOCOL, the machine that wrote, the object, the storages' keys; then the storages
    in the order of the keys, each with its count in eight bytes before it, little-endian on every machine.
    """
    file = io.BytesIO(data)
    magic, protocol, _ = (unpickle(file, {}) for _ in range(3))
    if (magic, protocol) != (LEGACY_MAGIC, LEGACY_PROTOCOL):
        raise ValueError(f"is a torch file of protocol {reprlib.repr(protocol)}, where {LEGACY_PROTOCOL} is meant")
    records: dict[str, memoryview] = {}
    storages = Storages("<", lambda key: records[key])
    root = unpickle(file, TORCH, storages)
    keys = unpickle(file, {})
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or set(keys) != set(storages.by_key):
        raise ValueError("is damaged: the list of its storages is not the one that its tensors need")
    position = file.tell()
    for key in keys:
        storage = storages.by_key[key]
        start, end = position + 8, position + 8 + storage.count * SIZES[storage.kind]
        if end > len(data):
            raise ValueError(f"is truncated: storage {quoted(key)} ends at byte {end}, the file at {len(data)}")
        if int.from_bytes(data[position:start], "little") != storage.count:
            raise ValueError(
                f"is damaged: storage {quoted(key)} at byte {position} has not the size that its tensors need"
            )
        records[key] = memoryview(data)[start:end]
        position = end
    return root
