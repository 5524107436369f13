"""Opens a detector that scripts/export.py wrote. This file needs jax and numpy alone, and Pillow for a detector whose
`data.resize` is pillow: copy it where it is wanted.

    from loader import load

    detector = load("detector.zip")
    for boxes_xyxy, scores, labels in detector.detect([image]):  # uint8 arrays [height, width, 3], RGB, of any sizes
        print(boxes_xyxy, scores, [detector.class_names[label] for label in labels])

The resize rule and the choice of the canvas are here, in Python's exact arithmetic; pixels, network, decoding and NMS are
programs of the file, which jax compiles for the device at hand: two for each canvas that is met.
"""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import types
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

FORMAT = "retina_jax detector 1"
PILLOW_FORMAT = "retina_jax detector 2"
"""Without programs that resize: Pillow does it."""


class LoadError(ValueError):
    """A file that is no detector, or an image that is none; one line that says what would be right."""


class Found(NamedTuple):
    """What was found in one image, best first."""

    boxes_xyxy: np.ndarray
    """float32 [N, 4], pixels of the image."""
    scores: np.ndarray
    """float32 [N]."""
    labels: np.ndarray
    """int32 [N], indices into `class_names`."""


def load(path: str) -> Detector:
    """The detector in the file; LoadError where it holds none or is damaged, OSError where it cannot be read."""
    try:
        with zipfile.ZipFile(path) as file:
            files = {name: file.read(name) for name in file.namelist()}
        about = json.loads(files.pop("about.json"))
        version = about["format"]
        with np.load(io.BytesIO(files.pop("parameters.npz")), allow_pickle=False) as arrays:
            parameters = [arrays[name] for name in arrays.files]
    except (zipfile.BadZipFile, zlib.error, EOFError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise LoadError(f"{path}: is no whole file of scripts/export.py ({error}); copy or export it anew") from None
    if version not in (FORMAT, PILLOW_FORMAT):
        raise LoadError(f"{path}: is {version}, where this loader reads {FORMAT}; take the loader of its release")
    if version == PILLOW_FORMAT and importlib.util.find_spec("PIL") is None:
        raise LoadError(f"{path}: its images are resized by Pillow, which is not installed; pip install pillow")
    return Detector(about, parameters, files)


class Detector:
    """A network with its weights on the default device; `about` is what the file says of it."""

    def __init__(self, about: dict[str, Any], parameters: Sequence[np.ndarray], programs: dict[str, bytes]) -> None:
        self.about = about
        self.class_names: list[str] = about["class_names"]
        self.category_ids: list[int] = about["category_ids"]
        self._parameters = jax.device_put(list(parameters))
        self._programs = programs
        self._compiled: dict[str, Any] = {}

    def detect(self, images: Sequence[np.ndarray], batch_size: int = 1) -> list[Found]:
        """Detections of uint8 images [h, w, 3] (RGB) of any sizes, each in its own pixels.

        A detector that was trained on 16-bit images takes uint16 ones too, in the range that it was trained with
        (`about["bits"]`: 2^bits - 1 is white).

        Images with the same canvas go through the network `batch_size` at a time, and each batch size is compiled once.
        Every image has the canvas that it would have alone, so its detections do not depend on the others.
        """
        images = [self._eight_bits(image) for image in images]
        for number, image in enumerate(images):
            kind, shape = getattr(image, "dtype", type(image).__name__), getattr(image, "shape", ())
            if kind != np.uint8 or len(shape) != 3 or shape[2] != 3 or min(shape) == 0:
                raise LoadError(f"image {number}: {kind} of shape {tuple(shape)}; give uint8 arrays [h, w, 3]")
        if batch_size < 1:
            raise LoadError(f"batch_size: {batch_size}; give 1 or more")
        sizes = [self.resized_size(*image.shape[:2]) for image in images]
        on_canvas: dict[tuple[int, int], list[int]] = {}
        for number, size in enumerate(sizes):
            on_canvas.setdefault(self.canvas(size), []).append(number)
        found: dict[int, Found] = {}
        for canvas, numbers in on_canvas.items():
            for start in range(0, len(numbers), batch_size):
                group = numbers[start : start + batch_size]
                rows = [*group, *group[-1:] * (batch_size - len(group))]  # the last one fills what is left
                answers = self._batch(canvas, [images[i] for i in rows], [sizes[i] for i in rows])
                found.update(zip(group, answers, strict=False))
        return [found[number] for number in range(len(images))]

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that an image is resized to."""
        scale = min(self.about["short_side"] / min(height, width), self.about["long_side"] / max(height, width))
        half = 0.5 if self.about["size_rounding"] == "nearest" else 0.0
        return max(1, int(height * scale + half)), max(1, int(width * scale + half))

    def canvas(self, size: tuple[int, int]) -> tuple[int, int]:
        """The smallest canvas that holds an image of this size."""
        fitting = [(h, w) for h, w in self.about["canvases"] if size[0] <= h and size[1] <= w]
        return min(fitting, key=lambda canvas: canvas[0] * canvas[1])

    def _eight_bits(self, image: np.ndarray) -> np.ndarray:
        bits = self.about.get("bits")
        if bits is None or getattr(image, "dtype", None) != np.uint16:
            return image
        return np.minimum(image >> (bits - 8), 255).astype(np.uint8)

    def _batch(
        self, canvas: tuple[int, int], images: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]
    ) -> list[Found]:
        original, resized = (np.array(s, np.int32) for s in ([image.shape[:2] for image in images], sizes))
        find = self._program("detect", canvas)
        if self.about["format"] == PILLOW_FORMAT:
            pixels = [_by_pillow(image, size, canvas) for image, size in zip(images, sizes, strict=True)]
        else:
            prepare = self._program("prepare", canvas)
            pixels = [prepare(_stored(image), *both) for image, *both in zip(images, original, resized, strict=True)]
        boxes_xyxy, scores, labels = jax.device_get(find(self._parameters, jax.numpy.stack(pixels), resized, original))
        real = labels >= 0
        return [Found(boxes_xyxy[i][kept], scores[i][kept], labels[i][kept]) for i, kept in enumerate(real)]

    def _program(self, kind: str, canvas: tuple[int, int]) -> Any:
        name = f"programs/{kind}_{canvas[0]}x{canvas[1]}"
        if name not in self._compiled:
            self._compiled[name] = jax.jit(_deserialize(self._programs[name]).call)
        return self._compiled[name]


def _stored(image: np.ndarray) -> np.ndarray:
    """The image in the upper left of an array whose sides are one of eight an octave: a program serves many sizes."""
    steps = [1 << max(4, side.bit_length() - 4) for side in image.shape[:2]]
    below, right = (-side % step for side, step in zip(image.shape[:2], steps, strict=True))
    return np.pad(image, ((0, below), (0, right), (0, 0)))


def _by_pillow(image: np.ndarray, size: tuple[int, int], canvas: tuple[int, int]) -> np.ndarray:
    """The image, resized to `size`, in the upper left of a padded image of zeros."""
    from PIL import Image

    height, width = size
    pixels = np.zeros((*canvas, 3), np.uint8)
    pixels[:height, :width] = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    return pixels


def _deserialize(program: bytes) -> jax.export.Exported:
    """`jax.export.deserialize`. It wants the package flatbuffers, which jax does not bring along: where that is missing, the
    little of it that reading takes stands in."""
    try:
        import flatbuffers  # noqa: F401
    except ImportError:
        stand_in = types.ModuleType("flatbuffers")
        vars(stand_in).update(FLATBUFFERS)
        names = ("flatbuffers", "flatbuffers.compat")
        sys.modules.update(dict.fromkeys(names, stand_in))
        try:
            return jax.export.deserialize(bytearray(program))
        finally:
            for name in names:
                del sys.modules[name]
    return jax.export.deserialize(bytearray(program))


def _number(kind: np.dtype, buffer: bytearray, offset: int) -> Any:
    return np.frombuffer(buffer, kind, 1, offset)[0].item()


class _Table:
    """A table of a FlatBuffer (https://flatbuffers.dev/internals), under the names that jax's generated code calls."""

    def __init__(self, buffer: bytearray, position: int) -> None:
        self.Bytes, self.Pos = buffer, position

    def Get(self, kind: np.dtype, offset: int) -> Any:
        return _number(kind, self.Bytes, offset)

    def Offset(self, field: int) -> int:
        """Where a field lies in the table, 0 for nowhere. The table begins with the way back to the list of these."""
        fields = self.Pos - self.Get(INT32, self.Pos)
        return self.Get(UINT16, fields + field) if field < self.Get(UINT16, fields) else 0

    def Indirect(self, offset: int) -> int:
        return offset + self.Get(UINT32, offset)

    def Vector(self, offset: int) -> int:
        return self.Indirect(self.Pos + offset) + 4

    def VectorLen(self, offset: int) -> int:
        return self.Get(UINT32, self.Vector(offset) - 4)

    def GetVectorAsNumpy(self, kind: np.dtype, offset: int) -> np.ndarray:
        return np.frombuffer(self.Bytes, kind, self.VectorLen(offset), self.Vector(offset))

    def String(self, offset: int) -> bytes:
        start = self.Indirect(offset)
        return bytes(self.Bytes[start + 4 : start + 4 + self.Get(UINT32, start)])


INT32, UINT16, UINT32 = (np.dtype(kind) for kind in ("<i4", "<u2", "<u4"))
FLATBUFFERS = {
    "import_numpy": lambda: np,
    "encode": types.SimpleNamespace(Get=_number),
    "packer": types.SimpleNamespace(uoffset=UINT32),
    "table": types.SimpleNamespace(Table=_Table),
    "number_types": types.SimpleNamespace(
        UOffsetTFlags=types.SimpleNamespace(py_type=int),
        BoolFlags=np.dtype(bool),
        **{f"Int{n}Flags": np.dtype(f"<i{n // 8}") for n in (8, 16, 32, 64)},
        **{f"Uint{n}Flags": np.dtype(f"<u{n // 8}") for n in (8, 16, 32, 64)},
    ),
}
