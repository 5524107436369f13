"""What travels: for each canvas a program that brings an image onto it, and one that finds the objects on a batch."""

from __future__ import annotations

import contextlib
import io
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Float32, Int, UInt8

from retina_jax import cpu
from retina_jax import detector as tta
from retina_jax.config import DataConfig
from retina_jax.data.transforms import buckets, exact_canvas
from retina_jax.detector import Detector
from retina_jax.errors import reason
from retina_jax.export.agreement import ExportError, check
from retina_jax.export.loader import FORMAT, PILLOW_FORMAT, load
from retina_jax.export.resizing import resize_to_canvas
from retina_jax.ops.anchors import anchor_grid, level_counts
from retina_jax.ops.postprocess import detect
from retina_jax.training.opening import code_commit, package_versions

PLATFORMS = ("cpu", "cuda", "tpu")
"""What every program is lowered for, whatever device is at hand."""


def canvases(data: DataConfig) -> tuple[tuple[int, int], ...]:
    """Every (height, width) that `detector.to_canvas` can choose for a single image, the order of `buckets` kept.

    With `data.buckets` 0 these are all that the resize rule leads to: 83 where the short side is 800 and the long one 1333.
    """
    if data.buckets:
        return buckets(data, (data.short_side,))
    short, long = min(data.short_side, data.long_side), data.long_side
    # Rounded down, a side that was to be `short` or `long` may come out one short of it: 163 * (801 / 163) < 801.
    lost = (0, 1) if data.size_rounding == "floor" else (0,)
    sizes = [(max(1, short - n), side) for n in lost for side in range(max(1, short - n), long + 1)]
    sizes += [(side, max(1, long - n)) for n in lost for side in range(1, short + 1)]
    exact = [exact_canvas(size, data) for height, width in sizes for size in ((height, width), (width, height))]
    return tuple(dict.fromkeys(exact))


def programs(detector: Detector) -> Iterator[tuple[str, bytes]]:
    """(name, serialised program) of every canvas, as retina_jax/export/loader.py calls them.

    prepare_HxW: image uint8 [h, w, 3], its size int32 [2] (what lies beyond is not looked at), its size after the resize
    int32 [2] -> canvas [H, W, 3]. The sides h and w are left open. With `data.resize` "pillow" there is none: the loader
    calls Pillow.
    detect_HxW: the parameters in the order of `jax.tree.leaves`, canvases [b, H, W, 3], sizes int32 [b, 2] after and before
    the resize -> boxes_xyxy float32 [b, D, 4] in pixels of the images, scores float32 [b, D], labels int32 [b, D], -1 where
    there is none. The batch b is left open.
    """
    h, w, b = export.symbolic_shape("h, w, b")
    pixels, size = detector.config.data.pixels, jax.ShapeDtypeStruct((2,), np.int32)
    sizes = jax.ShapeDtypeStruct((b, 2), np.int32)
    parameters = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(detector.variables)]
    for canvas in canvases(detector.config.data):
        batch = jax.ShapeDtypeStruct((b, *canvas, 3), pixels)
        prepare, find = _prepare(detector, canvas), _detect(detector, canvas)
        name = f"{canvas[0]}x{canvas[1]}"
        if detector.config.data.resize != "pillow":
            yield f"prepare_{name}", _exported(prepare, jax.ShapeDtypeStruct((h, w, 3), np.uint8), size, size)
        yield f"detect_{name}", _exported(find, parameters, batch, sizes, sizes)


def _exported(program: Any, *arguments: Any) -> bytes:
    return bytes(export.export(jax.jit(program), platforms=PLATFORMS)(*arguments).serialize())


def _prepare(detector: Detector, canvas: tuple[int, int]) -> Any:
    data = detector.config.data

    def prepare(
        image: UInt8[Array, "h w 3"], size_hw: Int[Array, " 2"], resized_hw: Int[Array, " 2"]
    ) -> UInt8[Array, "H W 3"] | Float32[Array, "H W 3"]:
        return resize_to_canvas(image, size_hw, resized_hw, canvas, data.resize, data.pixels)

    return prepare


def _detect(detector: Detector, canvas: tuple[int, int]) -> Any:
    config, model = detector.config, detector.driver.model
    structure = jax.tree.structure(detector.variables)
    anchors = anchor_grid(canvas, config.anchors, config.model)
    counts = level_counts(canvas, config.anchors, config.model)

    def find(
        parameters: list[Array],
        images: UInt8[Array, "b H W 3"] | Float32[Array, "b H W 3"],
        resized_hw: Int[Array, "b 2"],
        size_hw: Int[Array, "b 2"],
    ) -> tuple[Float32[Array, "b D 4"], Float32[Array, "b D"], Int[Array, "b D"]]:
        with cpu.kernels(config.cpu_kernels):  # whatever the backend here: the program also runs on the CPU
            logits, deltas = model.apply(jax.tree.unflatten(structure, parameters), images, resized_hw, train=False)
        found = detect(logits, deltas, jnp.asarray(anchors), counts, resized_hw, config.detection)
        boxes_xyxy = _to_original_pixels(found.boxes_xyxy, resized_hw, size_hw, config.data)
        return jnp.where(found.labels[..., None] >= 0, boxes_xyxy, 0.0), found.scores, found.labels

    return find


def _to_original_pixels(
    boxes_xyxy: Float32[Array, "b D 4"], resized_hw: Int[Array, "b 2"], size_hw: Int[Array, "b 2"], data: DataConfig
) -> Float32[Array, "b D 4"]:
    """As `preprocessing.to_original_pixels`, cut to the images."""
    before, after = (jnp.tile(size[:, ::-1], 2)[:, None].astype(jnp.float32) for size in (size_hw, resized_hw))
    scale = after / before
    if data.box_ends == "inclusive":
        boxes_xyxy = boxes_xyxy - (1 - scale) * np.array([[[0, 0, 1, 1]]], np.float32)
    return jnp.clip(boxes_xyxy / scale, 0.0, before)


# A detector into one file: its programs, its parameters and what must be known of it.


def ship(detector: Detector, path: Path, source: str, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> str:
    """Write the file, load it, and keep it where it answers about `images` as `detector` does; what `check` tells.

    Raises ExportError where it does not, or cannot be written: then what stood at `path` before still does. So does a
    detector with test-time augmentation, of which a file has none.
    """
    if tta.versions(detector.config) > 1:
        raise ExportError(
            "detection.tta_flip, detection.tta_short_sides: test-time augmentation is not shipped; "
            "add --detection.no-tta-flip --detection.tta-short-sides"
        )
    with kept_if_no_error(path) as beside:
        write_file(beside, detector, source)
        return check(detector, load(str(beside)), images)


def write_file(path: Path, detector: Detector, source: str) -> None:
    """Write `detector`, which came from `source`, as loader.py reads it. Raises ExportError where it cannot be written."""
    data = detector.config.data
    about = {
        "format": PILLOW_FORMAT if data.resize == "pillow" else FORMAT,
        "source": source,
        "step": detector.step,
        "class_names": list(detector.shown_names),
        "category_ids": list(detector.category_ids),
        "short_side": data.short_side,
        "long_side": data.long_side,
        "size_rounding": data.size_rounding,
        "resize": data.resize,
        "pixels": data.pixels,
        "bits": None if data.bits == "auto" else data.bits,
        "canvases": canvases(data),
        "max_detections": detector.config.detection.max_detections,
        "score_threshold": detector.config.detection.score_threshold,
        "platforms": PLATFORMS,
        "commit": code_commit(),
        "versions": package_versions(),
    }
    arrays = io.BytesIO()
    # Numbered, so that their order is that of the programs' first argument.
    np.savez(arrays, **{f"{i:04d}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(detector.variables))})
    try:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("about.json", json.dumps(about, indent=1))
            file.writestr("parameters.npz", arrays.getbuffer(), zipfile.ZIP_STORED)
            for name, program in programs(detector):
                file.writestr(f"programs/{name}", program)
    except OSError as error:
        raise ExportError(f"--out {path}: cannot be written: {reason(error)}") from None


@contextlib.contextmanager
def kept_if_no_error(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place when the block ends, and is gone where that is by an error."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        beside.replace(path)
    except OSError as error:
        raise ExportError(f"--out {path}: cannot be written: {reason(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
