"""Random initialisation of a network (Section 4.1, Initialization).

Values come from numpy: this is seconds faster than jitted threefry, and the same on every device and JAX version.
"""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from retina_jax.config import ModelConfig
from retina_jax.model.resnet import ARCHITECTURES
from retina_jax.model.retinanet import STATISTICS, RetinaNet

COLLECTIONS = ("params", "frozen", "stats")


def initialise(model: RetinaNet, seed: int) -> dict[str, Any]:
    """Draws the variables of a network, float32 numpy arrays: {"params": ..., "frozen": ..., "stats": ...}, each a dict.

    Each array has a generator of its own, seeded by (seed, its path): its values do not depend on the other parts of the
    network, nor on whether it is trained or frozen. seed is >= 0.

    A backbone of norm "frozen" is expected to receive imported weights. With random weights its activations keep a normal
    scale and it trains, but poorly: to train from scratch use norm "group" or "batch" and frozen_stages 0.
    """
    variables = {}
    for collection, shapes in variable_shapes(model).items():
        leaves = flatten_dict(shapes, sep="/")
        drawn = {path: draw_weight(path, leaf.shape, model.config, seed) for path, leaf in leaves.items()}
        variables[collection] = unflatten_dict(drawn, sep="/")
    return variables


def variable_shapes(model: RetinaNet) -> dict[str, Any]:
    """Returns the shapes and dtypes of `initialise`, without its memory."""
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)  # the shapes of weights do not depend on the image size
    image_sizes = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images, image_sizes)
    return {collection: shapes.get(collection, {}) for collection in COLLECTIONS}


def draw_weight(path: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> np.ndarray:
    """Draws the weight at `path` (for example "class_head/output/bias", without its collection)."""
    generator = np.random.default_rng((seed, zlib.crc32(path.encode())))
    part, leaf = path.split("/")[0], path.split("/")[-1]
    if leaf == "kernel":
        return _kernel(part, shape, config, generator)
    value = 1.0 if leaf in ("scale", "var") else 0.0
    fixed_statistics = config.norm in ("frozen", "frozen_statistics")
    last_norm = "norm3" if ARCHITECTURES[config.backbone].bottleneck else "norm2"  # of a block, before the addition
    if path == "class_head/output/bias":
        # At every anchor each class starts with the probability pi = config.prior (Section 3.3).
        value = -math.log((1 - config.prior) / config.prior)
    elif fixed_statistics and path == "backbone/stem/norm/var":
        # The variance of the stem's output on photographs, so that the frozen norm returns variance 1.
        of_pixels = np.array(STATISTICS["imagenet"][2]) / np.array(STATISTICS[config.input_normalisation][2])
        value = 2 * np.square(of_pixels).sum() / config.base_width
    elif fixed_statistics and path.startswith("backbone/c") and path.endswith(f"{last_norm}/scale"):
        # A frozen norm does not bound the sum: branches as large as what they are added to would double the variance.
        value = sum(config.stage_blocks or ARCHITECTURES[config.backbone].blocks) ** -0.5
    return np.full(shape, value, np.float32)


def _kernel(part: str, shape: tuple[int, ...], config: ModelConfig, generator: np.random.Generator) -> np.ndarray:
    """Draws a kernel [k, k, inputs, outputs] of the class_head, box_head, fpn or backbone."""
    if part in ("class_head", "box_head"):  # N(0, head_std^2) (Section 4.1)
        return generator.standard_normal(shape, np.float32) * np.float32(config.head_std)
    if part == "fpn":  # uniform with variance 1 / fan_in: Caffe2's XavierFill, as in Detectron
        return (2 * generator.random(shape, np.float32) - 1) * np.float32(math.sqrt(3 / math.prod(shape[:-1])))
    fan_out = shape[0] * shape[1] * shape[3]  # N(0, 2 / fan_out) (He et al. 2015)
    return generator.standard_normal(shape, np.float32) * np.float32(math.sqrt(2 / fan_out))
