"""`data.preprocessing.resize` on the device: the same float32 operations in the same order, so that pixels come out equal.

That one is TensorFlow's and does not travel with a program. Here sizes are values, not shapes: one program serves every
image that fits its storage. On the CPU all pixels are equal (tested); where a device rounds otherwise, a pixel can be one
grey level off.

XLA fuses a product and a sum where it can, and two divisions, which rounds once where TensorFlow rounds twice: `rounded`
separates them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int, UInt8

from retina_jax.data.pipeline import LARGE
from retina_jax.ops.boxes import rounded


def resize_to_canvas(
    image: UInt8[Array, "h w 3"],
    size_hw: Int[Array, " 2"],
    resized_hw: Int[Array, " 2"],
    canvas: tuple[int, int],
    kind: Literal["bilinear", "antialias"],
    pixels: Literal["uint8", "float32"],
) -> UInt8[Array, "H W 3"] | Float32[Array, "H W 3"]:
    """The image in the upper left `size_hw` of `image`, resized to `resized_hw`, in the upper left of a canvas of zeros.

    `kind` and `pixels` are as in DataConfig. What `image` holds beyond `size_hw` never matters. Sizes must be at least 1,
    and `resized_hw` at most `canvas`, which nothing here can check.
    """
    # As `resize` adds the half that makes truncation round before the weights, and `resize_large` after them.
    rounds = pixels == "uint8"
    small = size_hw[0] * size_hw[1] <= LARGE
    before = jnp.where(small, 0.5, 0.0).astype(jnp.float32) if rounds else jnp.float32(0)
    if kind == "antialias":
        resized = lax.cond(
            (size_hw > resized_hw).any(),
            lambda: _antialias(image, before, size_hw, resized_hw, canvas),
            lambda: _bilinear(image, before, size_hw, resized_hw, canvas),
        )
    else:
        resized = _bilinear(image, before, size_hw, resized_hw, canvas)
    if rounds:
        resized = (resized + (0.5 - before)).astype(jnp.uint8)
    rows, columns = (jnp.arange(side) < size for side, size in zip(canvas, resized_hw, strict=True))
    return jnp.where((rows[:, None] & columns[None, :])[:, :, None], resized, 0)


def _bilinear(
    image: UInt8[Array, "h w 3"],
    before: Float[Array, ""],
    size_hw: Int[Array, " 2"],
    resized_hw: Int[Array, " 2"],
    canvas: tuple[int, int],
) -> Float32[Array, "H W 3"]:
    """TensorFlow's ResizeBilinear with half-pixel centres: along x, then along y."""
    (y0, y1, down), (x0, x1, right) = (_neighbours(canvas[i], size_hw[i], resized_hw[i]) for i in (0, 1))

    def along_x(y: Int[Array, " H"]) -> Float32[Array, "H W 3"]:
        rows = image[y]
        left, right_one = (rows[:, x].astype(jnp.float32) + before for x in (x0, x1))
        return _between(left, right_one, right[None, :, None])

    return _between(along_x(y0), along_x(y1), down[:, None, None])


def _neighbours(
    count: int, size: Int[Array, ""], resized: Int[Array, ""]
) -> tuple[Int[Array, " n"], Int[Array, " n"], Float[Array, " n"]]:
    """For each of `count` new pixels the two old ones around its centre, and how far it lies from the first."""
    scale = size.astype(jnp.float32) / resized.astype(jnp.float32)
    place = rounded((jnp.arange(count, dtype=jnp.float32) + 0.5) * scale) - 0.5
    low = jnp.floor(place)
    first, second = (jnp.clip(p.astype(jnp.int32), 0, size - 1) for p in (low, jnp.ceil(place)))
    return first, second, place - low


def _between(a: Float[Array, "H W 3"], b: Float[Array, "H W 3"], share: Float[Array, "_ _ 1"]) -> Float[Array, "H W 3"]:
    return a + rounded((b - a) * share)


def _antialias(
    image: UInt8[Array, "h w 3"],
    before: Float[Array, ""],
    size_hw: Int[Array, " 2"],
    resized_hw: Int[Array, " 2"],
    canvas: tuple[int, int],
) -> Float32[Array, "H W 3"]:
    """TensorFlow's ScaleAndTranslate with the triangle kernel: along y, then along x."""
    down, right = (_spans(canvas[i], size_hw[i], resized_hw[i]) for i in (0, 1))
    rows = _weighted_sum(down, lambda y: image[y].astype(jnp.float32) + before, size_hw[0])
    columns = _weighted_sum(right, lambda x: rows[:, x].swapaxes(0, 1), size_hw[1])
    return columns.swapaxes(0, 1)


class _Spans(NamedTuple):
    """The old pixels that each of n new ones is a weighted sum of."""

    first: Int[Array, " n"]
    last: Int[Array, " n"]
    centre: Float[Array, " n"]
    reach: Float[Array, ""]
    """Half the width of the triangle, in old pixels: 1 where the image is enlarged."""


def _spans(count: int, size: Int[Array, ""], resized: Int[Array, ""]) -> _Spans:
    old = 1 / rounded(resized.astype(jnp.float32) / size.astype(jnp.float32))
    reach = jnp.maximum(old, 1.0)
    centre = rounded((jnp.arange(count, dtype=jnp.float32) + 0.5) * old)
    ends = jnp.ceil(centre - reach - 0.5), jnp.floor(centre + reach - 0.5)
    return _Spans(*(jnp.clip(end.astype(jnp.int32), 0, size - 1) for end in ends), centre, reach)


def _weighted_sum(
    spans: _Spans, read: Callable[[Int[Array, " n"]], Float32[Array, "n m 3"]], size: Int[Array, ""]
) -> Float32[Array, "n m 3"]:
    """For each span the sum of what `read` gives of its pixels, by weights that add up to 1, in the order of the pixels."""
    most = (spans.last - spans.first).max() + 1

    def weight(k: Int[Array, ""]) -> Float[Array, " n"]:
        from_centre = (spans.first + k).astype(jnp.float32) + 0.5 - spans.centre
        inside = spans.first + k <= spans.last
        return jnp.where(inside, 1 - jnp.minimum(jnp.abs(from_centre * (1 / spans.reach)), 1.0), 0.0)

    def add(k: Int[Array, ""], total: Float32[Array, "n m 3"]) -> Float32[Array, "n m 3"]:
        pixels = read(jnp.minimum(spans.first + k, size - 1))
        return total + rounded((weight(k) * share)[:, None, None] * pixels)

    zeros = jnp.zeros_like(spans.centre)
    share = 1 / lax.fori_loop(0, most, lambda k, total: total + weight(k), zeros)
    nothing = jnp.zeros_like(jax.eval_shape(read, spans.first))
    return lax.fori_loop(0, most, add, nothing)
