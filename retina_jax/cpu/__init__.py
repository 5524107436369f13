"""Faster kernels for XLA's CPU backend, behind one switch (`--cpu-kernels`). A reader of the method does not need them.

The method is written for every device. A function that has a faster form on the CPU is decorated with `on_cpu(kernel)`.
`Driver` traces programs with one of the forms. Exported programs hold both, as do others that are traced on a CPU, and XLA
takes one when they are lowered for a device. With the switch off, the program is the plain one. The results are equal up
to rounding.

Here is the classification loss in tiles: XLA makes several loops of the loss and its gradient on the CPU. Over all logits
each would read and write main memory; a tile fits into the second-level cache. The gradient overwrites the logits tile by
tile, so a training step needs no second array of their size.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int

TILE = 2**15  # logits per tile: 128 KiB in float32

Numbers, Labels = Float[Array, "*N K"], Int[Array, "*N"]
T = TypeVar("T")
ValueAndGradient = Callable[[Numbers, Labels], tuple[Float32[Array, "*N K"], Numbers]]

kernels = jax.make_user_context(None)
"""The switch. `with kernels("cpu"):` traces programs with CPU kernels, "tpu" with the forms for TPUs (`model.layers`,
`model.patches`, `losses.regression`), "gpu" with those for GPUs (`ops.matching`, `ops.postprocess`, `training.step`,
`model.fpn`, `model.resnet`), and "" with none of them.
"exported": with CPU kernels for CPUs and plain forms for others. None, the default: "exported" if the default backend is the
CPU, else the forms of that backend. It is read when a program is traced, and is part of the key of JAX's caches."""


def platform() -> str:
    """Returns the platform whose forms a program gets that is traced now."""
    if kernels.value is not None:
        return kernels.value
    return "exported" if jax.default_backend() == "cpu" else jax.default_backend()


def enabled() -> bool:
    """Returns whether a program that is traced now gets CPU kernels."""
    return platform() in ("cpu", "exported")


def by_platform(kernel: Callable[..., T], plain: Callable[..., T], *arguments: Any) -> T:
    """Calls the form for the platform of the traced program. "exported" programs hold both, and XLA takes one of them."""
    if platform() == "exported":
        return lax.platform_dependent(*arguments, cpu=kernel, default=plain)
    return (kernel if platform() == "cpu" else plain)(*arguments)


def after(x: Float[Array, "*S"], other: Float[Array, "a b c d"]) -> Float[Array, "*S"]:
    """Returns `x`, which XLA computes after `other`, of four axes. (It removes barriers too early for that.) Without this,
    what depends on parameters and feature maps alone is computed in the forward pass, and kept until the backward pass."""
    # Adds 0. XLA cannot leave that out: where its first number is NaN, another number is added, too small to matter.
    return x + jnp.where(jnp.isnan(other[0, 0, 0, 0]), 1e-30, 0.0).astype(x.dtype)


@jax.custom_vjp
def stored(x: Float[Array, "a b c d"]) -> Float[Array, "a b c d"]:
    """Returns `x`, and makes XLA on the CPU store it. Otherwise XLA fuses sums and maxima with each operation that reads
    them, and computes them again there: in a residual network all those since the first block of the stage. If the first
    number of `x` is NaN, zeros become 1e-30."""
    return by_platform(_stored, lambda x: x, x)


def _stored(x: Array) -> Array:
    if 0 in x.shape:
        return x
    # XLA does not fuse across a loop. This one has no iterations, or one if the first number is NaN.
    first = jnp.isnan(x[0, 0, 0, 0]), x
    return lax.while_loop(lambda state: state[0], lambda state: (~state[0], state[1] + 1e-30), first)[1]


stored.defvjp(lambda x: (stored(x), None), lambda _, dy: (dy,))


def on_cpu(kernel: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a function: with the switch on, `kernel(function, *arguments)` is called in its place."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def chosen(*arguments: Any) -> Any:
            return kernel(function, *arguments) if enabled() else function(*arguments)

        return chosen

    return decorate


def tiled_sums_and_gradient(
    plain: Callable[..., Any], loss: ValueAndGradient, logits: Float[Array, "B A K"], labels: Int[Array, "B A"]
) -> tuple[Float32[Array, " B"], Float[Array, "B A K"]]:
    """Computes `plain(loss, logits, labels)`, in tiles on the CPU."""
    tiled, by_xla = functools.partial(in_tiles, loss), functools.partial(plain, loss)
    return by_platform(tiled, by_xla, logits, labels)


def in_tiles(
    loss: ValueAndGradient, logits: Float[Array, "B A K"], labels: Int[Array, "B A"]
) -> tuple[Float32[Array, " B"], Float[Array, "B A K"]]:
    """Returns (loss summed over the anchors and classes of each image, gradient by the logits)."""
    images, anchors, classes = logits.shape
    rows = max(1, TILE // max(1, classes))
    full_tiles, rest = divmod(anchors, rows)

    def add_tile(image: Int[Array, ""], start: int | Int[Array, ""], rows: int, done: tuple[Array, Array]) -> tuple:
        sums, logits = done
        tile = lax.dynamic_slice(logits, (image, start, 0), (1, rows, classes))
        values, gradient = loss(tile, lax.dynamic_slice(labels, (image, start), (1, rows)))
        return sums.at[image].add(values.sum()), lax.dynamic_update_slice(logits, gradient, (image, start, 0))

    def add_image(image: Int[Array, ""], done: tuple[Array, Array]) -> tuple[Array, Array]:
        if rest:  # before the loop: after it XLA would copy the result of the loop
            done = add_tile(image, full_tiles * rows, rest, done)
        if not full_tiles:
            return done
        return lax.fori_loop(0, full_tiles, lambda tile, done: add_tile(image, tile * rows, rows, done), done)

    # zeros_like instead of zeros: inside a shard_map the sums must vary over the devices as the logits do.
    return lax.fori_loop(0, images, add_image, (jnp.zeros_like(logits, jnp.float32, shape=images), logits))
