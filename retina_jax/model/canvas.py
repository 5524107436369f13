"""Several maps on one canvas, so that small maps share the convolutions of a subnet on a CPU.

Each convolution reads its kernel, and writes the gradient, once per pyramid level, and is compiled for each level. Coarse
levels have few places, so for them this takes longer than the arithmetic. Here they are side by side with zeros between
them: the first on the left, the others below each other on its right. Levels halve in size, so little space is left over.
docs/results/performance.md has the measurements.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from retina_jax.cpu import platform

Maps = Sequence[Float[Array, "B _ _ _"]]


def groups(levels: Maps, shared: bool) -> list[Maps]:
    """Returns the maps of each canvas, finest first: in a `Driver`'s programs with CPU kernels all but the finest level if
    `shared`, else each level alone. Exported programs keep levels alone, because other devices run them too."""
    if shared and platform() == "cpu":
        return [maps for maps in (levels[:1], levels[1:]) if maps]
    return [[level] for level in levels]


def places(maps: Maps) -> list[tuple[slice, slice]]:
    """Returns rows and columns of each map on the canvas, at least one row or column apart."""
    (height, width), *others = (x.shape[1:3] for x in maps)
    found, top = [(slice(0, height), slice(0, width))], 0
    for height, columns in others:
        found.append((slice(top, top + height), slice(width + 1, width + 1 + columns)))
        top += height + 1
    return found


def painted(maps: Maps) -> Float[Array, "B H W C"]:
    """Returns the smallest canvas of all maps, with zeros elsewhere."""
    if len(maps) == 1:
        return maps[0]
    found = places(maps)
    height, width = (max(side.stop for side in sides) for sides in zip(*found, strict=True))
    around = [((0, 0), (y.start, height - y.stop), (x.start, width - x.stop), (0, 0)) for y, x in found]
    return sum(jnp.pad(x, padding) for x, padding in zip(maps, around, strict=True))


def parted(canvas: Float[Array, "B H W D"], maps: Maps) -> list[Float[Array, "B _ _ D"]]:
    """Returns what is on the canvas at the place of each map."""
    return [canvas] if len(maps) == 1 else [canvas[:, rows, columns] for rows, columns in places(maps)]


def cleared(canvas: Float[Array, "B H W C"], maps: Maps) -> Float[Array, "B H W C"]:
    """Returns the canvas with zeros wherever there is no map."""
    if len(maps) == 1:
        return canvas
    inside = np.zeros((1, *canvas.shape[1:3], 1), bool)
    for rows, columns in places(maps):
        inside[:, rows, columns] = True
    return jnp.where(inside, canvas, 0)
