"""Maps of several levels side by side in one, so that they share the convolutions of a subnet on a CPU.

With a map per level, each convolution reads its kernel and writes its gradient once per level, and is compiled for each
level. Coarse levels have few places, so for them this takes longer than the arithmetic. Here the first map is on the left.
The others are below each other on its right, with zeros between all of them. If each map has half the sides of the one
before, about 7 of 8 places belong to a map. docs/results/performance.md has the measurements.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from retina_jax.cpu import platform

Maps = Sequence[Float[Array, "_ _ _ _"]]


def groups(levels: Maps, shared: bool) -> list[Maps]:
    """Divides the levels, finest first, into those that are side by side.

    With `shared` and CPU kernels these are all but the finest. Otherwise each level is alone, and so it is in exported
    programs, which other devices run too.
    """
    if shared and platform() == "cpu":
        return [maps for maps in (levels[:1], levels[1:]) if maps]
    return [[level] for level in levels]


def places(maps: Maps) -> list[tuple[slice, slice]]:
    """Returns rows and columns of each map in the joined one, at least one row or column apart."""
    (height, width), *others = (x.shape[1:3] for x in maps)
    found, top = [(slice(0, height), slice(0, width))], 0
    for height, columns in others:
        found.append((slice(top, top + height), slice(width + 1, width + 1 + columns)))
        top += height + 1
    return found


def joined(maps: Maps) -> Float[Array, "B H W C"]:
    """Returns the smallest map that holds all maps, with zeros elsewhere."""
    if len(maps) == 1:
        return maps[0]
    found = places(maps)
    height, width = (max(side.stop for side in sides) for sides in zip(*found, strict=True))
    around = [((0, 0), (y.start, height - y.stop), (x.start, width - x.stop), (0, 0)) for y, x in found]
    return sum(jnp.pad(x, padding) for x, padding in zip(maps, around, strict=True))


def parted(x: Float[Array, "B H W D"], maps: Maps) -> list[Float[Array, "B _ _ D"]]:
    """Returns what is at the place of each map."""
    return [x] if len(maps) == 1 else [x[:, rows, columns] for rows, columns in places(maps)]


def cleared(x: Float[Array, "B H W C"], maps: Maps) -> Float[Array, "B H W C"]:
    """Returns `x` with zeros wherever there is no map. A single map may be cut into patches, which are more images."""
    if len(maps) == 1:
        return x
    inside = np.zeros((1, *x.shape[1:3], 1), bool)
    for rows, columns in places(maps):
        inside[:, rows, columns] = True
    return jnp.where(inside, x, 0)
