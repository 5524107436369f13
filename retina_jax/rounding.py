"""Float operations that round alike in every program.

A compiler may contract a product and the sum that takes it into one fused multiply-add, which rounds once instead of
twice, or rewrite a quotient of quotients. Whether it does depends on what else is in the program, so the last bit does too:
alone, `match` then gave other labels than inside the loss program.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def rounded(numbers: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """`numbers`, rounded to their dtype before anything else is computed from them. Infinity becomes the largest number.

    A bound that no finite number exceeds separates the two operations: a compiler cannot prove that it does nothing,
    because a product can overflow. XLA removes `lax.reduce_precision` to the same precision (tried on the CPU).
    """
    return jnp.minimum(numbers, jnp.finfo(numbers.dtype).max)
