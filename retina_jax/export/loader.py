"""Loads a detector that scripts/export.py wrote. This file needs jax, numpy and flatbuffers, and Pillow for a detector whose
`data.resize` is pillow. You can copy it without the rest of the package.

    detector = load("detector.zip")
    for boxes_xyxy, scores, labels in detector.detect([image]):  # uint8 arrays [height, width, 3], RGB, of any sizes
        print(boxes_xyxy, scores, [detector.class_names[label] for label in labels])

The resize rule and the choice of the padded shape are here, in Python's exact arithmetic. Pixels, network, decoding and NMS
are programs of the file, which jax compiles for the device it runs on: two for each padded shape that occurs.
"""

from __future__ import annotations

import importlib.util
import io
import json
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from typing import Any, NamedTuple

import jax
import numpy as np

FORMAT = "retina_jax detector 1"
PILLOW_FORMAT = "retina_jax detector 2"  # without programs that resize: Pillow does it
STRETCH_FORMAT = "retina_jax detector 3"  # both sides become `short_side`, which older loaders cannot do
BFLOAT16_FORMAT = "retina_jax detector 4"  # with parameters in bfloat16, which older loaders refuse
FORMATS = FORMAT, PILLOW_FORMAT, STRETCH_FORMAT, BFLOAT16_FORMAT
RENEW_DAYS = 150  # jax reads the programs of a release for six months: the file is renewed a month before
MOST_TIMES = 100  # largest ratio of the unpacked contents to the file
LARGEST = 2**28  # pixels of a padded image
NUMBERS = [np.dtype(code) for code in "?bBhHiIqQefd"]  # types of parameters that jax takes
BROKEN = zipfile.BadZipFile, zlib.error, ArithmeticError, AttributeError, EOFError, LookupError, MemoryError
DAMAGE = (*BROKEN, RuntimeError, TypeError, ValueError)  # what a file that is not this project's raises when it is read
MISFIT = AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError  # what its programs raise
COMPILER = "INVALID_ARGUMENT", "UNIMPLEMENTED", "UNKNOWN"  # RuntimeErrors of a program, not of the device or its memory


def _is_side(value: Any) -> bool:
    return type(value) is int and 1 <= value <= LARGEST


def _is_shape(value: Any) -> bool:
    return type(value) is list and len(value) == 2 and all(map(_is_side, value)) and value[0] * value[1] <= LARGEST


FIELDS: dict[str, Callable[[Any], bool]] = {  # of about.json, with their checks; a missing field is None
    "class_names": lambda value: type(value) is list and all(type(name) is str for name in value),
    "category_ids": lambda value: type(value) is list and all(type(number) is int for number in value),
    "short_side": _is_side,
    "long_side": _is_side,
    "size_rounding": lambda value: value in ("nearest", "floor"),
    "canvases": lambda value: type(value) is list and len(value) > 0 and all(map(_is_shape, value)),
    "resize": lambda value: value is None or type(value) is str,
    "resize_rule": lambda value: value in (None, "fit", "stretch"),
    "bits": lambda value: value is None or (type(value) is int and 8 <= value <= 16),
}


class LoadError(ValueError):
    """Malformed file or image; the message is one line that names what to do."""


class Found(NamedTuple):
    """Detections in one image, highest score first."""

    boxes_xyxy: np.ndarray  # float32 [N, 4], pixels of the image
    scores: np.ndarray  # float32 [N]
    labels: np.ndarray  # int32 [N], indices into `class_names`


def _shown(value: object, most: int = 200) -> str:
    """Returns a text of the file or an error on one line, printable and short; of anything else the type."""
    text = str(value) if isinstance(value, (str, Exception)) else ""
    line = " ".join(text[:most].split()) or type(value).__name__
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)[:most]


def _unpacked(content: bytes, most: int) -> Iterator[tuple[str, bytes]]:
    """Yields the name and the bytes of each file in an archive; ValueError if they have more than `most` bytes together."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > most:
            raise ValueError(f"its contents have more than {MOST_TIMES} times its size")
        for entry in entries:
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError("its compression is not deflate")
            with archive.open(entry) as file:
                # read() without a size inflates an entry of any size. It asks for one byte more, since zipfile would not
                # check the CRC of an empty entry otherwise.
                yield entry.filename, file.read(entry.file_size + 1)


def _parameter(content: bytes) -> np.ndarray:
    array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    if array.dtype == np.dtype("V2"):  # bfloat16 in a file of numpy's
        return array.view(jax.numpy.bfloat16)
    if array.dtype not in NUMBERS:
        raise ValueError("its parameters are not numbers")
    return array


def load(path: str) -> ExportedDetector:
    """Returns the detector in the file; LoadError if it is damaged or a package is missing, OSError if it is unreadable."""
    with open(path, "rb") as opened:
        content = opened.read()
    most = MOST_TIMES * len(content)  # bytes, of both archives together
    try:
        files = dict(_unpacked(content, most))
        most -= sum(map(len, files.values()))
        about, stored = json.loads(files.pop("about.json")), files.pop("parameters.npz")
        version = about["format"]
        if version not in FORMATS:
            this, known = _shown(version, 40), f"{FORMAT} to {FORMATS[-1][-1]}"
            raise LoadError(f"{path}: has format {this}, but this loader reads {known}; use the loader of its release")
        wrong = [name for name, fits in FIELDS.items() if not fits(about.get(name))]
        parameters = [_parameter(array) for _, array in _unpacked(stored, most)]
    except LoadError:
        raise
    except DAMAGE as error:
        raise LoadError(
            f"{path}: not a file of scripts/export.py, or damaged ({_shown(error)}); export it again"
        ) from None
    if wrong:
        raise LoadError(f"{path}: about.json: missing or invalid {', '.join(wrong)}; export it again")
    needed = {"flatbuffers": "flatbuffers"} | ({"PIL": "pillow"} if about.get("resize") == "pillow" else {})
    for module, package in needed.items():
        if importlib.util.find_spec(module) is None:
            raise LoadError(f"{path}: needs the package {package}, which is not installed; pip install {package}")
    if line := _expiring(about):
        warnings.warn(f"{path}: {line}", stacklevel=2)
    return ExportedDetector(about, parameters, files, path)


def _expiring(about: dict[str, Any]) -> str:
    """Returns one line for a file older than RENEW_DAYS, else "". Files of the first releases have no date."""
    try:
        if (date.today() - date.fromisoformat(about["exported"])).days <= RENEW_DAYS:
            return ""
        made = f"exported on {about['exported']} with jax {_shown(about['versions']['jax'], 40)}"
    except (KeyError, TypeError, ValueError):
        return ""
    renew = _shown(about.get("renew", "scripts/export.py"), 400)
    return f"{made}; a jax released six months after that one may not read it; renew it with {renew}"


class ExportedDetector:
    """Network with its weights on the default device; `about` holds the settings in the file."""

    def __init__(
        self, about: dict[str, Any], parameters: Sequence[np.ndarray], programs: dict[str, bytes], path: str
    ) -> None:
        self.about = about
        self._path = path
        self.class_names: list[str] = about["class_names"]
        self.category_ids: list[int] = about["category_ids"]
        self._parameters = jax.device_put(list(parameters))
        self._programs = programs
        self._compiled: dict[str, Any] = {}

    def detect(self, images: Sequence[np.ndarray], batch_size: int = 1) -> list[Found]:
        """Returns the detections of uint8 images [h, w, 3] (RGB) of any sizes, in pixels of each image. A detector that was
        trained on 16-bit images also takes uint16 images with its training range (2^`about["bits"]` - 1 is white).

        Images with the same padded shape go through the network `batch_size` at a time; each batch size is compiled once.
        Every image has the padded shape that it has alone, so its detections do not depend on the others.
        """
        if getattr(images, "ndim", 4) in (2, 3):
            raise LoadError("images: give a list of images, not one array")
        bits, images = self.about.get("bits"), list(images)
        for number, image in enumerate(images):
            if bits is not None and getattr(image, "dtype", None) == np.uint16:
                images[number] = image = np.minimum(image >> (bits - 8), 255).astype(np.uint8)
            kind, shape = getattr(image, "dtype", type(image).__name__), getattr(image, "shape", ())
            if kind != np.uint8 or len(shape) != 3 or shape[2] != 3 or min(shape) == 0:
                raise LoadError(f"image {number}: {kind} of shape {tuple(shape)}; give uint8 arrays [h, w, 3]")
        if not isinstance(batch_size, (int, np.integer)) or batch_size is True or not 1 <= batch_size < 2**31:
            raise LoadError(f"batch_size: {_shown(repr(batch_size), 40)}; give an integer, 1 or more")
        sizes = [self.resized_size(*image.shape[:2]) for image in images]
        by_shape: dict[tuple[int, int], list[int]] = {}
        for number, size in enumerate(sizes):
            by_shape.setdefault(self.padded_shape(size), []).append(number)
        found: dict[int, Found] = {}
        for shape, numbers in by_shape.items():
            for start in range(0, len(numbers), batch_size):
                group = numbers[start : start + batch_size]
                rows = [*group, *group[-1:] * (batch_size - len(group))]  # copies of the last image fill the batch
                detections = self._batch(shape, [images[i] for i in rows], [sizes[i] for i in rows])
                found.update(zip(group, detections, strict=False))
        return [found[number] for number in range(len(images))]

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """Returns the (height, width) that an image is resized to."""
        if self.about.get("resize_rule") == "stretch":
            return self.about["short_side"], self.about["short_side"]
        scale = min(self.about["short_side"] / min(height, width), self.about["long_side"] / max(height, width))
        half = 0.5 if self.about["size_rounding"] == "nearest" else 0.0
        return max(1, int(height * scale + half)), max(1, int(width * scale + half))

    def padded_shape(self, size: tuple[int, int]) -> tuple[int, int]:
        """Returns the smallest padded shape (height, width) for an image of this size after the resize."""
        fitting = [(h, w) for h, w in self.about["canvases"] if size[0] <= h and size[1] <= w]
        if not fitting:
            raise self._misfit(f"no padded shape for a resized image of {size[0]}x{size[1]}")
        return min(fitting, key=lambda shape: shape[0] * shape[1])

    def _misfit(self, why: object) -> LoadError:
        return LoadError(f"{self._path}: its contents do not fit together ({_shown(why)}); export it again")

    def _batch(self, shape: tuple[int, int], images: list[np.ndarray], sizes: list[tuple[int, int]]) -> list[Found]:
        original, resized = (np.array(s, np.int32) for s in ([image.shape[:2] for image in images], sizes))
        detect, prepare = self._program("detect", shape), None
        if self.about.get("resize") == "pillow":
            pixels: list[Any] = [_by_pillow(image, size, shape) for image, size in zip(images, sizes, strict=True)]
        else:
            prepare, pixels = self._program("prepare", shape), list(map(_stored, images))
        try:  # the programs; what reads the images raises its own errors above
            if prepare is not None:
                pixels = [prepare(*one) for one in zip(pixels, original, resized, strict=True)]
            found = boxes, scores, labels = detect(self._parameters, jax.numpy.stack(pixels), resized, original)
            fit = len(labels) == len(images) and scores.shape == labels.shape and boxes.shape == (*labels.shape, 4)
            if not fit or labels.ndim != 2 or boxes.dtype.kind + scores.dtype.kind + labels.dtype.kind != "ffi":
                raise TypeError("other results than boxes, scores and labels")
            found = jax.device_get(found)
        except MISFIT as error:
            of_device = isinstance(error, RuntimeError) and not str(error).startswith(COMPILER)
            if of_device or "exported for platforms" in str(error):
                raise
            raise self._misfit(error) from error
        if found[2].max(initial=-1) >= min(len(self.class_names), len(self.category_ids)):
            raise self._misfit("a label without a class")
        real = (found[2] >= 0) & (found[0][..., 2:] > found[0][..., :2]).all(axis=-1)  # padding, boxes without area
        return [Found(*(array[i][kept] for array in found)) for i, kept in enumerate(real)]

    def _program(self, kind: str, shape: tuple[int, int]) -> Any:
        name = f"programs/{kind}_{shape[0]}x{shape[1]}"
        if name not in self._compiled:
            try:
                exported = jax.export.deserialize(bytearray(self._programs[name]))
            except Exception as error:  # flatbuffers raises nearly anything for a malformed program
                why = f"cannot be read ({type(error).__name__}); copy or export the file again"
                raise LoadError(f"{self._path}: {name}: {why}") from None
            self._compiled[name] = jax.jit(exported.call)
        return self._compiled[name]


def _stored(image: np.ndarray) -> np.ndarray:
    """Pads the image at the right and below to one of eight sizes per octave, so that one program serves many sizes."""
    steps = [1 << max(4, side.bit_length() - 4) for side in image.shape[:2]]
    below, right = (-side % step for side, step in zip(image.shape[:2], steps, strict=True))
    return np.pad(image, ((0, below), (0, right), (0, 0)))


def _by_pillow(image: np.ndarray, size: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """Resizes the image to `size` and pads it with zeros at the right and below."""
    from PIL import Image

    height, width = size
    pixels = np.zeros((*shape, 3), np.uint8)
    pixels[:height, :width] = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    return pixels
