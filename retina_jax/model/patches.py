"""Maps cut into patches, so that few images per chip fill a TPU.

A convolution on a TPU takes 8 maps of the batch at once. With fewer, its matrix units wait, or XLA cuts each map into strips
and copies them before and after every convolution. Here a map is cut once for all convolutions of a stage or a subnet, and
each 3x3 convolution fetches only the edges of the neighbouring patches. The patches of a map follow each other in the batch,
row by row. docs/results/accelerators.md has the cycles that this saves.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float

from retina_jax.cpu import platform

MAPS = 8  # maps that a TPU convolves at once
LEAST = 4  # rows and columns of the smallest patch


class Patches(NamedTuple):
    """Into how many patches a map is cut along each axis."""

    rows: int
    columns: int


UNCUT = Patches(1, 1)


def patches_of(x: Float[Array, "B H W C"], level: int, stride: int = 1) -> Patches:
    """Returns how to cut `x`, a map of pyramid level `level`, for convolutions of which one has `stride`: on TPUs into
    enough patches for a batch of MAPS, if the sides can be divided by so many powers of two; elsewhere, and for a symbolic
    batch, not at all.

    Rows are cut first, because they are joined more cheaply, unless columns can be cut more often at level 5: levels that
    are cut alike need no copies between them. This rule expects the levels 2 to 5 of images whose sides are multiples of 32.
    """
    if platform() != "tpu" or is_symbolic_dim(x.shape[0]):
        return UNCUT
    batch, height, width = x.shape[:3]
    wanted = MAPS / batch
    at_level_5 = [_parts(side * 2**level // 32, 1, wanted) for side in (height, width)]
    if at_level_5[0] >= at_level_5[1]:
        rows = _parts(height, stride, wanted)
        return Patches(rows, _parts(width, stride, wanted / rows))
    columns = _parts(width, stride, wanted)
    return Patches(_parts(height, stride, wanted / columns), columns)


def _parts(side: int, stride: int, wanted: float) -> int:
    parts = 1
    while parts < wanted and side % (2 * parts * stride) == 0 and side >= 2 * parts * stride * LEAST:
        parts *= 2
    return parts


def cut(x: Float[Array, "B H W C"], patches: Patches) -> Float[Array, "N h w C"]:
    """Cuts each map of `x` into patches: N = B * rows * columns."""
    if patches == UNCUT:
        return x
    batch, height, width, channels = x.shape
    h, w = height // patches.rows, width // patches.columns
    x = x.reshape(batch, patches.rows, h, patches.columns, w, channels)
    return x.swapaxes(2, 3).reshape(-1, h, w, channels)


def join(x: Float[Array, "N h w C"], patches: Patches) -> Float[Array, "B H W C"]:
    """Undoes `cut`."""
    if patches == UNCUT:
        return x
    h, w, channels = x.shape[1:]
    x = x.reshape(-1, *patches, h, w, channels).swapaxes(2, 3)
    return x.reshape(-1, patches.rows * h, patches.columns * w, channels)


def with_edges(x: Float[Array, "N h w C"], patches: Patches, size: int) -> Float[Array, "N _ _ C"]:
    """Adds the `size` nearest rows and columns of the neighbouring patches to each patch, and zeros at the edges of the map.
    An axis that is not cut stays as it is."""
    for axis, (parts, distance) in enumerate(((patches.rows, patches.columns), (patches.columns, 1)), start=1):
        if parts > 1:
            place = (np.arange(len(x)) // distance % parts)[:, None, None, None]
            first = lax.slice_in_dim(x, 0, size, axis=axis)
            last = lax.slice_in_dim(x, x.shape[axis] - size, None, axis=axis)
            before = jnp.where(place > 0, jnp.roll(last, distance, axis=0), 0)
            after = jnp.where(place < parts - 1, jnp.roll(first, -distance, axis=0), 0)
            x = jnp.concatenate([before, x, after], axis)
    return x
