"""What inference computes from the weights alone, once for many images: kernels in the precision of the convolutions,
multiplied by the gains of their norms, and what is added to the outputs."""

import jax.numpy as jnp
from jaxtyping import PyTree

from retina_jax import cpu
from retina_jax.model.retinanet import RetinaNet


def prepare(model: RetinaNet, variables: dict[str, PyTree]) -> dict[str, PyTree]:
    """Returns all variables that inference needs, {"prepared": ...}, the same for all platforms. `model.apply` takes them in
    place of `variables`, without `train`. Call this in a `jit`, which leaves out the network's outputs."""
    images, image_sizes = jnp.zeros((1, 64, 64, 3), jnp.uint8), jnp.full((1, 2), 64)  # no weight depends on them
    with cpu.kernels(""):  # the forms that are traced fastest
        _, found = model.apply(variables, images, image_sizes, mutable=["prepared"], method="levels")
    return dict(found)
