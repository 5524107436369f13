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
from collections.abc import Sequence
from datetime import date
from typing import Any, NamedTuple

import jax
import numpy as np

FORMAT = "retina_jax detector 1"
PILLOW_FORMAT = "retina_jax detector 2"  # without programs that resize: Pillow does it
STRETCH_FORMAT = "retina_jax detector 3"  # both sides become `short_side`, which older loaders cannot do
RENEW_DAYS = 150  # jax reads the programs of a release for six months: the file is renewed a month before
MOST_TIMES = 100  # largest ratio of the unpacked contents to the file
SETTINGS = {"class_names", "category_ids", "short_side", "long_side", "size_rounding", "canvases"}  # in about.json
BROKEN = zipfile.BadZipFile, zlib.error, ArithmeticError, AttributeError, EOFError, LookupError, MemoryError
DAMAGE = (*BROKEN, RuntimeError, TypeError, ValueError)  # what a file that is not this project's raises when it is read


class LoadError(ValueError):
    """Malformed file or image; the message is one line that names what to do."""


class Found(NamedTuple):
    """Detections in one image, highest score first."""

    boxes_xyxy: np.ndarray  # float32 [N, 4], pixels of the image
    scores: np.ndarray  # float32 [N]
    labels: np.ndarray  # int32 [N], indices into `class_names`


def _bounded(archive: zipfile.ZipFile, size: int) -> zipfile.ZipFile:
    """Returns an archive of `size` bytes; ValueError if it is made to fill the memory."""
    if sum(entry.file_size for entry in archive.infolist()) > MOST_TIMES * size:
        raise ValueError(f"its contents have more than {MOST_TIMES} times its size")
    return archive


def load(path: str) -> ExportedDetector:
    """Returns the detector in the file; LoadError if it is damaged or a package is missing, OSError if it is unreadable."""
    with open(path, "rb") as opened:
        content = opened.read()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            files = {name: file.read(name) for name in _bounded(file, len(content)).namelist()}
        about, stored = json.loads(files.pop("about.json")), files.pop("parameters.npz")
        version, missing = about["format"], ", ".join(sorted(SETTINGS - about.keys()))
        _bounded(zipfile.ZipFile(io.BytesIO(stored)), len(stored))
        with np.load(io.BytesIO(stored), allow_pickle=False) as arrays:
            parameters = [arrays[name] for name in arrays.files]
    except DAMAGE as error:
        found = str(error).partition("\n")[0][:200] or type(error).__name__
        raise LoadError(f"{path}: not a file of scripts/export.py, or damaged ({found}); export it again") from None
    if version not in (FORMAT, PILLOW_FORMAT, STRETCH_FORMAT):
        raise LoadError(
            f"{path}: has format {str(version)[:40]}, but this loader reads {FORMAT}; use the loader of its release"
        )
    if missing:
        raise LoadError(f"{path}: about.json lacks {missing}; export it again")
    needed = {"flatbuffers": "flatbuffers"} | ({"PIL": "pillow"} if about.get("resize") == "pillow" else {})
    for module, package in needed.items():
        if importlib.util.find_spec(module) is None:
            raise LoadError(f"{path}: needs the package {package}, which is not installed; pip install {package}")
    if line := _expiring(about):
        warnings.warn(f"{path}: {line}", stacklevel=2)
    return ExportedDetector(about, parameters, files)


def _expiring(about: dict[str, Any]) -> str:
    """Returns one line for a file older than RENEW_DAYS, else "". Files of the first releases have no date."""
    try:
        if (date.today() - date.fromisoformat(about["exported"])).days <= RENEW_DAYS:
            return ""
        made = f"exported on {about['exported']} with jax {about['versions']['jax']}"
    except (KeyError, TypeError, ValueError):
        return ""
    renew = about.get("renew", "scripts/export.py")
    line = f"{made}; a jax released six months after that one may not read it; renew it with {renew}"
    return " ".join(line.split())[:500]


class ExportedDetector:
    """Network with its weights on the default device; `about` holds the settings in the file."""

    def __init__(self, about: dict[str, Any], parameters: Sequence[np.ndarray], programs: dict[str, bytes]) -> None:
        self.about = about
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
        bits, images = self.about.get("bits"), list(images)
        for number, image in enumerate(images):
            if bits is not None and getattr(image, "dtype", None) == np.uint16:
                images[number] = image = np.minimum(image >> (bits - 8), 255).astype(np.uint8)
            kind, shape = getattr(image, "dtype", type(image).__name__), getattr(image, "shape", ())
            if kind != np.uint8 or len(shape) != 3 or shape[2] != 3 or min(shape) == 0:
                raise LoadError(f"image {number}: {kind} of shape {tuple(shape)}; give uint8 arrays [h, w, 3]")
        if batch_size < 1:
            raise LoadError(f"batch_size: {batch_size}; give 1 or more")
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
        return min(fitting, key=lambda shape: shape[0] * shape[1])

    def _batch(self, shape: tuple[int, int], images: list[np.ndarray], sizes: list[tuple[int, int]]) -> list[Found]:
        original, resized = (np.array(s, np.int32) for s in ([image.shape[:2] for image in images], sizes))
        if self.about.get("resize") == "pillow":
            pixels = [_by_pillow(image, size, shape) for image, size in zip(images, sizes, strict=True)]
        else:
            prepare = self._program("prepare", shape)
            pixels = [prepare(_stored(image), *both) for image, *both in zip(images, original, resized, strict=True)]
        detect = self._program("detect", shape)
        found = jax.device_get(detect(self._parameters, jax.numpy.stack(pixels), resized, original))
        real = (found[2] >= 0) & (found[0][..., 2:] > found[0][..., :2]).all(axis=-1)  # padding, boxes without area
        return [Found(*(array[i][kept] for array in found)) for i, kept in enumerate(real)]

    def _program(self, kind: str, shape: tuple[int, int]) -> Any:
        name = f"programs/{kind}_{shape[0]}x{shape[1]}"
        if name not in self._compiled:
            try:
                exported = jax.export.deserialize(bytearray(self._programs[name]))
            except Exception as error:  # flatbuffers raises nearly anything for a malformed program
                raise LoadError(
                    f"{name}: cannot be read ({type(error).__name__}); copy or export the file again"
                ) from None
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
