"""The programs of an exported detector: for each padded shape one that resizes an image, and one that detects in a batch.

The resize is that of evaluation (`data.transforms.resize`, TensorFlow's) on the device: the same float32 operations in the
same order. Sizes are values and not shapes, so one program serves every image that fits its storage. On the CPU all uint8
pixels are equal (tested). XLA fuses a product with a sum, and two divisions, which rounds once where TensorFlow rounds
twice: `rounded` separates them. docs/export.md compares with jax.image.scale_and_translate, whose pixels differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jax.tree_util import PyTreeDef
from jaxtyping import Array, Float, Float32, Int, PyTree, UInt8

from retina_jax import cpu
from retina_jax.config import DataConfig
from retina_jax.data.pipeline import LARGE
from retina_jax.data.transforms import buckets, exact_padded_shape
from retina_jax.detector import Detector
from retina_jax.ops.anchors import anchor_grid
from retina_jax.ops.boxes import rounded
from retina_jax.ops.postprocess import detect

PLATFORMS = ("cpu", "cuda", "tpu")  # every program is lowered for all of them, on any device


def padded_shapes(data: DataConfig) -> tuple[tuple[int, int], ...]:
    """Returns every (height, width) that `detector.padded_batch` can choose for one image, in the order of `buckets`."""
    if data.buckets:
        return buckets(data, (data.short_side,))
    if data.resize_rule == "stretch":
        return (exact_padded_shape((data.short_side, data.short_side), data),)
    short, long = min(data.short_side, data.long_side), data.long_side
    # Rounded down, a side can be one less than `short` or `long`: 163 * (801 / 163) < 801.
    lost = (0, 1) if data.size_rounding == "floor" else (0,)
    sizes = [(max(1, short - n), side) for n in lost for side in range(max(1, short - n), long + 1)]
    sizes += [(side, max(1, long - n)) for n in lost for side in range(1, short + 1)]
    exact = [exact_padded_shape(size, data) for height, width in sizes for size in ((height, width), (width, height))]
    return tuple(dict.fromkeys(exact))


def programs(detector: Detector, weights: PyTree) -> Iterator[tuple[str, bytes]]:
    """Yields (name, serialised program) for every padded shape. docs/export.md lists their arguments and results. `weights`
    are the detector's, prepared.

    The sides of the image in prepare_HxW and the batch of detect_HxW are symbolic. With `data.resize` "pillow" there is no
    prepare_HxW: the loader calls Pillow.
    """
    h, w, b = export.symbolic_shape("h, w, b")
    data, size = detector.config.data, jax.ShapeDtypeStruct((2,), np.int32)
    sizes = jax.ShapeDtypeStruct((b, 2), np.int32)
    parameters = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(weights)]

    def exported(program: Any, *arguments: Any) -> bytes:
        return bytes(export.export(jax.jit(program), platforms=PLATFORMS)(*arguments).serialize())

    for shape in padded_shapes(data):
        name = f"{shape[0]}x{shape[1]}"
        if data.resize != "pillow":
            prepare = partial(resize_and_pad, shape=shape, kind=data.resize, pixels=data.pixels)
            yield f"prepare_{name}", exported(prepare, jax.ShapeDtypeStruct((h, w, 3), np.uint8), size, size)
        batch = jax.ShapeDtypeStruct((b, *shape, 3), data.pixels)
        yield (
            f"detect_{name}",
            exported(_detect(detector, jax.tree.structure(weights), shape), parameters, batch, sizes, sizes),
        )


def _detect(detector: Detector, structure: PyTreeDef, shape: tuple[int, int]) -> Any:
    """Returns the function from parameters, padded images and their sizes to detections."""
    config, model = detector.config, detector.driver.model
    anchors = anchor_grid(shape, config.anchors, config.model)

    def detect_batch(
        parameters: list[Array],
        images: UInt8[Array, "b H W 3"] | Float32[Array, "b H W 3"],
        resized_hw: Int[Array, "b 2"],
        size_hw: Int[Array, "b 2"],
    ) -> tuple[Float32[Array, "b D 4"], Float32[Array, "b D"], Int[Array, "b D"]]:
        forms = "exported" if config.cpu_kernels else ""  # whatever the backend here
        with cpu.kernels(forms):
            variables = jax.tree.unflatten(structure, parameters)
            levels = model.apply(variables, images, resized_hw, train=False, method="levels")
            logits, deltas = zip(*levels, strict=True)
            found = detect(
                logits, deltas, anchors, resized_hw, config.detection, anchors_per_cell=model.anchors_per_cell
            )
        # To pixels of the original images, as in evaluation, and clipped to them.
        before, after = (jnp.tile(size[:, ::-1], 2)[:, None].astype(jnp.float32) for size in (size_hw, resized_hw))
        scale, boxes_xyxy = after / before, found.boxes_xyxy
        if config.data.box_ends == "inclusive":
            boxes_xyxy = boxes_xyxy - (1 - scale) * np.array([[[0, 0, 1, 1]]], np.float32)
        boxes_xyxy = jnp.clip(boxes_xyxy / scale, 0.0, before)
        return jnp.where(found.labels[..., None] >= 0, boxes_xyxy, 0.0), found.scores, found.labels

    return detect_batch


def resize_and_pad(
    image: UInt8[Array, "h w 3"],
    size_hw: Int[Array, " 2"],
    resized_hw: Int[Array, " 2"],
    shape: tuple[int, int],
    kind: Literal["bilinear", "antialias"],
    pixels: Literal["uint8", "float32"],
) -> UInt8[Array, "H W 3"] | Float32[Array, "H W 3"]:
    """Resizes the upper left `size_hw` of `image` to `resized_hw` (at least 1, at most `shape`) and pads it with zeros."""
    # `resize` adds the half that makes truncation round before the weights, `resize_large` after them.
    rounds = pixels == "uint8"
    small = size_hw[0] * size_hw[1] <= LARGE
    before = jnp.where(small, 0.5, 0.0).astype(jnp.float32) if rounds else jnp.float32(0)
    axes = [(shape[i], size_hw[i], resized_hw[i]) for i in (0, 1)]

    def read(y: Int[Array, " n"]) -> Float32[Array, "n w 3"]:
        return image[y].astype(jnp.float32) + before

    if kind == "antialias":
        reduced = (size_hw > resized_hw).any()
        resized = lax.cond(reduced, lambda: _antialias(read, *axes), lambda: _bilinear(read, *axes))
    else:
        resized = _bilinear(read, *axes)
    if rounds:
        resized = (resized + (0.5 - before)).astype(jnp.uint8)
    rows, columns = (jnp.arange(side) < size for side, size in zip(shape, resized_hw, strict=True))
    return jnp.where((rows[:, None] & columns[None, :])[:, :, None], resized, 0)


Axis = tuple[int, Int[Array, ""], Int[Array, ""]]  # padded side, side of the image, side of the resized image
Rows = Callable[[Int[Array, " n"]], Float32[Array, "n m 3"]]


def _bilinear(read: Rows, vertical: Axis, horizontal: Axis) -> Float32[Array, "H W 3"]:
    """Resizes like TensorFlow's ResizeBilinear with half-pixel centres: along x, then along y."""
    (y0, y1, down), (x0, x1, right) = (_neighbours(*axis) for axis in (vertical, horizontal))

    def between(a: Float[Array, "*N"], b: Float[Array, "*N"], share: Float[Array, "_ _ 1"]) -> Float[Array, "*N"]:
        return a + rounded((b - a) * share)

    above, below = (between(rows[:, x0], rows[:, x1], right[None, :, None]) for rows in (read(y0), read(y1)))
    return between(above, below, down[:, None, None])


def _neighbours(
    count: int, size: Int[Array, ""], resized: Int[Array, ""]
) -> tuple[Int[Array, " n"], Int[Array, " n"], Float[Array, " n"]]:
    """Returns, for each of `count` new pixels, the two old pixels around its centre and its distance from the first."""
    scale = size.astype(jnp.float32) / resized.astype(jnp.float32)
    place = rounded((jnp.arange(count, dtype=jnp.float32) + 0.5) * scale) - 0.5
    low = jnp.floor(place)
    first, second = (jnp.clip(p.astype(jnp.int32), 0, size - 1) for p in (low, jnp.ceil(place)))
    return first, second, place - low


def _antialias(read: Rows, vertical: Axis, horizontal: Axis) -> Float32[Array, "H W 3"]:
    """Resizes like TensorFlow's ScaleAndTranslate with the triangle kernel: along y, then along x."""
    rows = _weighted_sum(read, *vertical)
    return _weighted_sum(lambda x: rows[:, x].swapaxes(0, 1), *horizontal).swapaxes(0, 1)


def _weighted_sum(read: Rows, count: int, size: Int[Array, ""], resized: Int[Array, ""]) -> Float32[Array, "n m 3"]:
    """Returns, for each of `count` new pixels, the weighted sum of its old pixels in order; the weights sum to 1."""
    old = 1 / rounded(resized.astype(jnp.float32) / size.astype(jnp.float32))
    reach = jnp.maximum(old, 1.0)  # half the width of the triangle, in old pixels: 1 if the image is enlarged
    centre = rounded((jnp.arange(count, dtype=jnp.float32) + 0.5) * old)
    ends = jnp.ceil(centre - reach - 0.5), jnp.floor(centre + reach - 0.5)
    first, last = (jnp.clip(end.astype(jnp.int32), 0, size - 1) for end in ends)
    most = (last - first).max() + 1

    def weight(k: Int[Array, ""]) -> Float[Array, " n"]:
        from_centre = (first + k).astype(jnp.float32) + 0.5 - centre
        return jnp.where(first + k <= last, 1 - jnp.minimum(jnp.abs(from_centre * (1 / reach)), 1.0), 0.0)

    def add(k: Int[Array, ""], total: Float32[Array, "n m 3"]) -> Float32[Array, "n m 3"]:
        return total + rounded((weight(k) * share)[:, None, None] * read(jnp.minimum(first + k, size - 1)))

    share = 1 / lax.fori_loop(0, most, lambda k, total: total + weight(k), jnp.zeros_like(centre))
    return lax.fori_loop(0, most, add, jnp.zeros_like(jax.eval_shape(read, first)))
