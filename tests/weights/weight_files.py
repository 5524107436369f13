"""Weight files written by hand, so that the tests can write any content without torch."""

import io
import json
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

MAGIC = 0x1950A86A20F9469CFC6C


def literal(value: Any) -> bytes:
    """Returns pickle instructions that push a plain value."""
    return pickle.dumps(value, 2)[2:-1]


def tensor(
    kind: str = "FloatStorage",
    key: Any = "0",
    count: Any = 6,
    offset: Any = 0,
    shape: Any = (2, 3),
    strides: Any = (3, 1),
    tail: bytes = b"N",
) -> bytes:
    """Returns pickle instructions that push a tensor as torch writes it; the defaults are the 2 x 3 floats of storage
    "0"."""
    storage = b"(" + literal("storage") + b"ctorch\n" + kind.encode() + b"\n"
    storage += literal(key) + literal("cpu") + literal(count) + tail + b"tQ"
    view = b"".join(map(literal, (offset, shape, strides)))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + view + b"\x89NtR"


def pickled(items: Mapping[str, bytes]) -> bytes:
    """Returns a pickle of a dict, from the instructions of its values."""
    return b"\x80\x02}" + b"".join(literal(name) + value + b"s" for name, value in items.items()) + b"."


def torch_zip(program: bytes, storages: Mapping[str, bytes], **more: bytes) -> bytes:
    """Returns a file in torch's zip format."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for name, content in [*more.items(), *((f"data/{key}", storage) for key, storage in storages.items())]:
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


def torch_legacy(program: bytes, keys: list[Any], storages: bytes) -> bytes:
    """Returns a file in torch's legacy format."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = b"".join(pickle.dumps(part, 2) for part in (MAGIC, 1001, system))
    return head + program + pickle.dumps(keys, 2) + storages


def safetensors(entries: Mapping[str, tuple[str, np.ndarray]], **header: Any) -> bytes:
    """Returns a safetensors file of (dtype, array) by name; `header` overrides entries of the JSON."""
    described, buffer = {}, b""
    for name, (dtype, array) in entries.items():
        content = array.tobytes()
        offsets = [len(buffer), len(buffer) + len(content)]
        described[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
        buffer += content
    text = json.dumps(described | header).encode()
    return len(text).to_bytes(8, "little") + text + buffer


def python2_pickle(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Returns what Python 2 writes for {"blobs": arrays, "cfg": ...}: its strings are bytes (U, T), and numpy's module
    is the old one."""

    def text(content: bytes) -> bytes:
        return b"T" + len(content).to_bytes(4, "little") + content

    def array(values: np.ndarray) -> bytes:
        empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + literal((0,)) + text(b"b") + b"tR"
        dtype = b"cnumpy\ndtype\n(" + text(values.dtype.str[1:].encode()) + b"K\x00K\x01tR"
        dtype += b"(K\x03" + text(values.dtype.str[:1].encode()) + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        state = b"(K\x01" + literal(values.shape) + dtype + b"\x89" + text(values.tobytes()) + b"tb"
        return empty + state

    blobs = b"}" + b"".join(text(name.encode()) + array(values) + b"s" for name, values in arrays.items())
    return b"\x80\x02}" + text(b"blobs") + blobs + b"s" + text(b"cfg") + text("Größe: 1\n".encode()) + b"s."


def flat(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the arrays of variables by path without the collection ("backbone/stem/conv/kernel")."""
    trees = [flatten_dict(tree, sep="/") for tree in variables.values()]
    return {path: np.asarray(leaf) for tree in trees for path, leaf in tree.items()}
