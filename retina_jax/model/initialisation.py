"""Random start of a network (Section 4.1, Initialization).

Shapes come from `jax.eval_shape` and values from numpy: seconds less than a jitted threefry, and the same on every device
and JAX version.
"""

import math
import re
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from retina_jax.config import ConfigError, ModelConfig
from retina_jax.model.resnet import ARCHITECTURES
from retina_jax.model.retinanet import STATISTICS, RetinaNet

COLLECTIONS = ("params", "frozen", "stats")

Rule = Callable[[np.random.Generator, tuple[int, ...], ModelConfig], np.ndarray]


def zeros(_: np.random.Generator, shape: tuple[int, ...], config: ModelConfig) -> np.ndarray:
    """All 0."""
    return np.zeros(shape, np.float32)


def ones(_: np.random.Generator, shape: tuple[int, ...], config: ModelConfig) -> np.ndarray:
    """All 1."""
    return np.ones(shape, np.float32)


def prior(_: np.random.Generator, shape: tuple[int, ...], config: ModelConfig) -> np.ndarray:
    """-log((1 - pi) / pi): every anchor starts as foreground of each class with probability pi (Section 3.3)."""
    return np.full(shape, -math.log((1 - config.prior) / config.prior), np.float32)


def head_normal(generator: np.random.Generator, shape: tuple[int, ...], config: ModelConfig) -> np.ndarray:
    """N(0, head_std^2) (Section 4.1)."""
    return generator.standard_normal(shape, np.float32) * np.float32(config.head_std)


def xavier_uniform(generator: np.random.Generator, shape: tuple[int, ...], config: ModelConfig) -> np.ndarray:
    """Uniform within sqrt(3 / fan_in), variance 1 / fan_in: Caffe2's XavierFill, which Detectron's FPN starts from."""
    bound = np.float32(math.sqrt(3 / math.prod(shape[:-1])))
    return (2 * generator.random(shape, np.float32) - 1) * bound


def he_normal(generator: np.random.Generator, shape: tuple[int, ...], config: ModelConfig) -> np.ndarray:
    """N(0, 2 / fan_out) (He et al. 2015), where an output channel of a k x k kernel counts k^2."""
    fan_out = shape[0] * shape[1] * shape[3]
    return generator.standard_normal(shape, np.float32) * np.float32(math.sqrt(2 / fan_out))


def stem_variance(_: np.random.Generator, shape: tuple[int, ...], config: ModelConfig) -> np.ndarray:
    """Variance that a frozen norm of the stem takes for granted: that of `he_normal` on photographs, so that it gives 1."""
    if config.norm != "frozen":
        return np.ones(shape, np.float32)
    of_pixels = np.array(STATISTICS["imagenet"][2]) / np.array(STATISTICS[config.input_normalisation][2])
    return np.full(shape, 2 * np.square(of_pixels).sum() / config.base_width, np.float32)


def residual_scale(number: int) -> Rule:
    """Scale of the `number`th norm of a residual block: where it is the last and frozen, one over the root of how many
    blocks there are. A norm that is trained keeps the sum of the branches in bounds; a frozen one does not, and branches
    as large as what they are added to would double the variance with every block."""

    def rule(_: np.random.Generator, shape: tuple[int, ...], config: ModelConfig) -> np.ndarray:
        architecture = ARCHITECTURES[config.backbone]
        last = 3 if architecture.bottleneck else 2
        blocks = sum(config.stage_blocks or architecture.blocks)
        return np.full(shape, blocks**-0.5 if config.norm == "frozen" and number == last else 1.0, np.float32)

    return rule


RULES: tuple[tuple[str, Rule], ...] = (
    # The first pattern that is the whole path decides.
    (r"class_head/output/bias", prior),
    (r"(class|box)_head/.*/kernel", head_normal),
    (r"fpn/.*/kernel", xavier_uniform),
    (r"backbone/.*/kernel", he_normal),
    # The last norm of a residual block is trained from scale 1 as well, not from 0 as some trainings from scratch have it.
    (r"backbone/stem/norm/var", stem_variance),
    (r"backbone/c\d/block\d+/norm2/scale", residual_scale(2)),
    (r"backbone/c\d/block\d+/norm3/scale", residual_scale(3)),
    (r".*/(scale|var)", ones),
    (r".*/(bias|mean)", zeros),
)


def initialise(model: RetinaNet, seed: int) -> dict[str, Any]:
    """Random variables of a network, by RULES, as float32 numpy arrays.

    Each array is drawn from a generator of its own, seeded by (seed, its path): the values of one part do not depend on
    which other parts there are, nor on whether it is trained or frozen.

    A backbone of norm "frozen" is meant to receive imported weights. From this start its activations are of a sane size
    and it trains, but poorly: train from scratch with norm "group" or "batch" and frozen_stages 0.

    Args:
      model: the network.
      seed: >= 0.

    Returns:
      {"params": ..., "frozen": ..., "stats": ...}, each an empty dict where the network has none of the kind.

    Raises:
      ConfigError: `model.prior` is not inside (0, 1), where the class bias would be infinite.
    """
    if not 0 < model.config.prior < 1:
        raise ConfigError(f"model.prior is {model.config.prior}: give a probability above 0 and below 1 (paper: 0.01)")
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)  # no weight's shape depends on the canvas
    image_sizes = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images, image_sizes)
    flat = {collection: flatten_dict(shapes.get(collection, {}), sep="/") for collection in COLLECTIONS}
    return {
        collection: unflatten_dict(
            {path: draw(path, a.shape, model.config, seed) for path, a in leaves.items()}, sep="/"
        )
        for collection, leaves in flat.items()
    }


def draw(path: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> np.ndarray:
    """The random start of the weight at `path` ("class_head/output/bias", without its collection)."""
    rule = next(rule for pattern, rule in RULES if re.fullmatch(pattern, path))
    return rule(np.random.default_rng((seed, zlib.crc32(path.encode()))), shape, config)
