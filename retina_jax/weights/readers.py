"""Reads a weight file into names and arrays, without torch and without running code from the file."""

import io
import re
import reprlib
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize

from retina_jax.errors import WeightsError, quoted
from retina_jax.weights.pickles import BFLOAT16, Array, Buffer, numbers_in, unpickle

WRAPPERS = ("model", "state_dict", "model_state_dict", "blobs")
"""Keys under which checkpoints keep the weights: detectron2 and torchvision, Lightning and timm, many, Detectron."""
DEEPEST = 3  # nested wrappers
LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles of torch's legacy format
PICKLE = re.compile(rb"\x80[\x02-\x05]|\(|c[\w.]+\n")
"""How a pickle starts: with its protocol, or in protocols 0 and 1 with a mark or a name."""
SAFETENSORS = {
    **{"F64": "f8", "F32": "f4", "F16": "f2", "BF16": BFLOAT16, "BOOL": "b1", "I64": "i8", "I32": "i4", "I16": "i2"},
    **{"I8": "i1", "U64": "u8", "U32": "u4", "U16": "u2", "U8": "u1"},
}
"""The dtypes of safetensors that are read."""
ZIP_ERRORS = (zipfile.BadZipFile, EOFError, LookupError, OSError, OverflowError, RuntimeError, ValueError, struct.error)


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a weight file by name, neither renamed nor transposed.

    Formats, recognised by content: safetensors; torch's zip and legacy formats (`.pth`, `.pt`); pickles of numpy arrays
    (`.pkl` of detectron2, and of Detectron and MSRA without their momentum), those of Python 2 included. A checkpoint is
    unwrapped: the first dict with arrays under one of WRAPPERS, up to DEEPEST deep, replaces it. Other objects are left out.

    The arrays are in native byte order, bf16 as float32. They may be read-only, strided, and share memory as in the file.

    Raises WeightsError, one line with the file's name, if the file cannot be read, is damaged, has none of the formats,
    refers to anything but tensors, numpy arrays and containers, or contains no arrays.
    """
    path = Path(path)
    try:
        return parse(path.read_bytes())
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise WeightsError(f"{path}: {' '.join(str(error).split())}") from error


def parse(data: bytes) -> dict[str, np.ndarray]:
    """Returns the arrays in a file's content, as `read_weights` does. Raises ValueError with the reason."""
    if not data:
        raise ValueError("the file is empty")
    if data[8:9] == b"{":  # by the standard, a header starts so
        weights = read_safetensors(data)
    elif data[:4] == b"PK\x03\x04":
        weights = arrays_of(read_zip(data))
    elif LEGACY_MAGIC.to_bytes(10, "little") in data[:32]:
        weights = arrays_of(read_legacy(data))
    elif PICKLE.match(data):
        blobs = arrays_of(unpickle(io.BytesIO(data))[0])
        weights = {name: blob for name, blob in blobs.items() if not name.endswith("_momentum")}
    else:
        supported = "safetensors, files of torch.save (.pth, .pt) and pickles of numpy arrays (.pkl)"
        raise ValueError(f"not a weight file: it starts with {data[:16]!r}; supported are {supported}")
    if not weights:
        raise ValueError("contains no arrays")
    return weights


def read_safetensors(data: bytes) -> dict[str, np.ndarray]:
    """Returns the tensors of a safetensors file by name."""
    try:
        tensors = deserialize(data)
    except SafetensorError as error:
        raise ValueError(f"truncated or damaged safetensors file: {error}") from error
    for name, tensor in tensors:
        if tensor["dtype"] not in SAFETENSORS:
            supported = ", ".join(SAFETENSORS)
            raise ValueError(f"tensor {quoted(name)} of dtype {tensor['dtype']}; supported are {supported}")
    return {name: numbers_in(t["data"], np.dtype(SAFETENSORS[t["dtype"]])).reshape(t["shape"]) for name, t in tensors}


def arrays_of(root: Any) -> dict[str, np.ndarray]:
    """Returns the arrays of an unpickled object by name, unwrapped."""
    if not isinstance(root, dict):
        raise ValueError(f"contains a {type(root).__name__}; expected a dict of arrays by name")
    weights = unwrap(root, DEEPEST)
    if not weights:
        keys = ", ".join(repr(key)[:40] for key in list(root)[:10]) or "none"
        raise ValueError(f"contains no arrays by name at its top or under {', '.join(WRAPPERS)}; its keys: {keys}")
    return {name: array.numbers for name, array in weights.items()}


def unwrap(root: dict[Any, Any], deepest: int) -> dict[str, Array]:
    """Returns the arrays of the first dict that has any: those under WRAPPERS before `root` itself."""
    for key in WRAPPERS:
        inner = root.get(key)
        if deepest and isinstance(inner, dict) and (found := unwrap(inner, deepest - 1)):
            return found
    return {name: value for name, value in root.items() if isinstance(name, str) and isinstance(value, Array)}


def read_zip(data: bytes) -> Any:
    """Returns the object in a file of torch's zip format, a pickle and one member per storage. Verifies checksums."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except ZIP_ERRORS as error:
        raise ValueError(f"truncated or damaged zip archive: {error}") from error
    members = archive.infolist()
    # torch compresses nothing, so all members together are no larger than the file.
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > len(data):
        raise ValueError("zip archive with compressed or overlapping members, which torch.save does not write")

    def read(name: str) -> bytes:
        try:
            return archive.read(name)
        except ZIP_ERRORS as error:
            raise ValueError(f"damaged zip archive: {quoted(name)}: {error}") from error

    pickles = [member.filename for member in members if member.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"zip archive with {len(pickles)} members data.pkl; torch.save writes one")
    folder = pickles[0].removesuffix("data.pkl")
    big_endian = f"{folder}byteorder" in archive.namelist() and read(f"{folder}byteorder").strip() == b"big"
    return unpickle(io.BytesIO(read(pickles[0])), lambda key: read(f"{folder}data/{key}"), big_endian)[0]


def read_legacy(data: bytes) -> Any:
    """Returns the object in a file of torch's legacy format (before torch 1.6). Five pickles: LEGACY_MAGIC,
    LEGACY_PROTOCOL, system, object, keys of storages. Then each storage after its 8-byte count."""
    file = io.BytesIO(data)
    magic, protocol, _ = (unpickle(file)[0] for _ in range(3))
    if (magic, protocol) != (LEGACY_MAGIC, LEGACY_PROTOCOL):
        raise ValueError(f"torch file of protocol {reprlib.repr(protocol)}; expected {LEGACY_PROTOCOL}")
    records: dict[str, Buffer] = {}
    root, storages = unpickle(file, records.__getitem__)
    keys = unpickle(file)[0]
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or set(keys) != set(storages):
        raise ValueError("damaged: the list of storages is inconsistent with the tensors")
    position = file.tell()
    for key in keys:
        storage = storages[key]
        start, end = position + 8, position + 8 + storage.count * storage.dtype.itemsize
        if end > len(data):
            raise ValueError(f"truncated: storage {quoted(key)} ends at byte {end}, the file at {len(data)}")
        if int.from_bytes(data[position:start], "little") != storage.count:
            raise ValueError(f"damaged: inconsistent size of storage {quoted(key)} at byte {position}")
        records[key] = memoryview(data)[start:end]
        position = end
    return root
