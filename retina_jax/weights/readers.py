"""A weight file to names and arrays, by what is in it and not by what it is called. No torch, and no code from the file."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from retina_jax.errors import WeightsError
from retina_jax.weights.numpy_pickles import NumpyArray, read_numpy_pickle
from retina_jax.weights.safetensors import is_safetensors, read_safetensors
from retina_jax.weights.torch_files import Tensor, is_legacy, is_zip, read_legacy, read_zip

WRAPPERS = ("model", "state_dict", "model_state_dict", "blobs")
"""Keys under which checkpoints keep the weights: detectron2 and torchvision, Lightning and timm, many, Detectron."""
DEEPEST = 3
"""Most wrappers that lie in one another."""
PICKLE = re.compile(rb"\x80[\x02-\x05]|\(|c[\w.]+\n")
"""How a pickle starts: with its protocol, or in protocols 0 and 1 with a mark or a name."""


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Names to arrays of a weight file, as the file has them; nothing is renamed, transposed or executed.

    Formats: safetensors; torch's zip and legacy formats (`.pth`, `.pt`); pickles of numpy arrays (`.pkl` of detectron2, of
    Detectron and of MSRA, Python 2's included). The content alone decides between them.

    A checkpoint that keeps the weights beside other things is unwrapped: the first dict with arrays in it under "model",
    "state_dict", "model_state_dict" or "blobs", in this order and up to three deep, takes the object's place. Of the
    result, what is no array (an epoch, a config) is left out; so are, from a pickle of numpy arrays, Caffe2's momentum
    blobs (names that end in "_momentum").

    The arrays are in this machine's byte order. bf16 becomes float32, other dtypes stay. They may be read-only, strided and
    share memory, as the tensors in the file do.

    Raises:
      WeightsError: the file cannot be read, is truncated or damaged, is in none of the formats, mentions anything but
        tensors, numpy arrays and containers, or holds no array by name. One line, with the file's name.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return parse(data)
    except ValueError as error:
        raise WeightsError(f"{path}: {' '.join(str(error).split())}") from error


def parse(data: bytes) -> dict[str, np.ndarray]:
    """`read_weights` of a file's content; ValueError with the reason."""
    if not data:
        raise ValueError("is empty")
    if is_safetensors(data):
        weights = read_safetensors(data)
    elif is_zip(data):
        weights = state_dict(read_zip(data))
    elif is_legacy(data):
        weights = state_dict(read_legacy(data))
    elif PICKLE.match(data):
        blobs = state_dict(read_numpy_pickle(data))
        weights = {name: blob for name, blob in blobs.items() if not name.endswith("_momentum")}
    else:
        raise ValueError(
            f"is no weight file: it starts with {data[:16]!r}; give safetensors, a file of torch.save (.pth, .pt) "
            "or a pickle of numpy arrays (.pkl)"
        )
    if not weights:
        raise ValueError("holds no arrays")
    return weights


def state_dict(root: Any) -> dict[str, np.ndarray]:
    """The arrays of an unpickled object, by name; see `read_weights` for what is unwrapped and what is left out."""
    if not isinstance(root, dict):
        raise ValueError(f"holds a {type(root).__name__}, where a dict of arrays by name is meant")
    weights = unwrap(root, DEEPEST)
    if not weights:
        keys = ", ".join(repr(key)[:40] for key in list(root)[:10])
        raise ValueError(
            f"holds no arrays by name at its top or under {', '.join(WRAPPERS)}; its keys: {keys or 'none'}"
        )
    return {name: stand_in.array() for name, stand_in in weights.items()}


def unwrap(root: dict[Any, Any], deepest: int) -> dict[str, Tensor | NumpyArray]:
    """The arrays of the first dict that has any: those under WRAPPERS before `root` itself."""
    for key in WRAPPERS:
        inner = root.get(key)
        if deepest and isinstance(inner, dict) and (found := unwrap(inner, deepest - 1)):
            return found
    return {
        name: value for name, value in root.items() if isinstance(name, str) and isinstance(value, Tensor | NumpyArray)
    }
