"""Pretrains a backbone by classifying crops of generated shapes, in place of the paper's ImageNet."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int, PyTree, UInt8

from miniature.crops import Crops
from retina_jax.config import ModelConfig
from retina_jax.config_io import override
from retina_jax.data.scenes import HUES, SHAPES
from retina_jax.model.initialisation import COLLECTIONS, draw_weight
from retina_jax.model.resnet import ResNet
from retina_jax.model.retinanet import normalise
from retina_jax.weights.converted import NORM

WEIGHT_DECAY = 0.05
PEAK_RATE = 3e-3


class Classifier(nn.Module):
    """The backbone, the mean over C5, and one linear layer each for shape and hue."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, images: UInt8[Array, "B H W 3"], train: bool = False
    ) -> tuple[Float[Array, "B shapes"], Float[Array, "B hues"]]:
        size = jnp.broadcast_to(jnp.array(images.shape[1:3], jnp.int32)[None], (images.shape[0], 2))
        x = normalise(images, size, self.config.input_normalisation)
        pooled = ResNet(self.config, name="backbone")(x, train)[-1].astype(jnp.float32).mean((1, 2))
        return nn.Dense(len(SHAPES), name="shape")(pooled), nn.Dense(len(HUES), name="hue")(pooled)


def pretrain(
    config: ModelConfig,
    train: Crops,
    held_out: Crops,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    log: Callable[[str], None],
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Trains by AdamW with a cosine schedule. Whatever `config` has, all stages are trained and all norms are BatchNorms.

    Returns:
      Path to array of the backbone's weights and BatchNorm statistics, and the accuracies on the held-out crops.
    """
    config = override(config, {"norm": "batch", "frozen_stages": 0})
    model = Classifier(config)
    shapes = jax.eval_shape(partial(model.init, train=True), jax.random.key(0), train.images[:1])
    variables = {
        kind: unflatten_dict({p: _start(p, a.shape, config, seed) for p, a in _flat(shapes[kind]).items()}, sep="/")
        for kind in ("params", "stats")
    }
    schedule = optax.warmup_cosine_decay_schedule(0.0, PEAK_RATE, steps // 10, steps)
    optimizer = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(
        variables: dict[str, PyTree],
        opt_state: Any,
        images: UInt8[Array, "B H W 3"],
        shape: Int[Array, " B"],
        hue: Int[Array, " B"],
    ) -> tuple[dict[str, PyTree], Any, Float[Array, ""]]:
        def loss(params: PyTree) -> tuple[Array, PyTree]:
            outputs, updated = model.apply({**variables, "params": params}, images, train=True, mutable=["stats"])
            errors = [
                optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
                for logits, labels in zip(outputs, (shape, hue), strict=True)
            ]
            return errors[0] + errors[1], updated["stats"]

        (value, stats), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes its int32 count with floats
            updates, opt_state = optimizer.update(gradients, opt_state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], updates), "stats": stats}, opt_state, value

    opt_state = optimizer.init(variables["params"])
    order, started = np.random.default_rng((seed, 1)), time.monotonic()
    rows = np.zeros(0, np.int64)
    for number in range(1, steps + 1):
        if len(rows) < batch_size:
            rows = order.permutation(len(train.images))
        chosen, rows = rows[:batch_size], rows[batch_size:]
        images = np.where(
            order.random((batch_size, 1, 1, 1)) < 0.5, train.images[chosen, :, ::-1], train.images[chosen]
        )
        variables, opt_state, value = step(variables, opt_state, images, train.shapes[chosen], train.hues[chosen])
        if number % max(steps // 10, 1) == 0:
            log(f"step {number}/{steps}  loss {float(value):.3f}  {time.monotonic() - started:.0f} s")
    weights = {path: np.asarray(a) for kind in COLLECTIONS for path, a in _flat(variables.get(kind, {})).items()}
    backbone = {path: array for path, array in weights.items() if path.startswith("backbone/")}
    return backbone, _accuracies(model, variables, held_out, batch_size)


def backbone_state_dict(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns a backbone's weights with torchvision's names, kernels OIHW: the inverse of `convert_torchvision`."""
    leaves = {ours: theirs for theirs, ours in NORM.items()} | {"kernel": "weight"}
    layers = (("shortcut_norm", "downsample.1"), ("shortcut", "downsample.0"), ("norm", "bn"), ("conv", "conv"))
    named = {}
    for path, array in weights.items():
        _, stage, *inner, layer, leaf = path.split("/")
        ours, theirs = next((ours, theirs) for ours, theirs in layers if layer.startswith(ours))
        place = f"layer{int(stage[1]) - 1}.{int(inner[0].removeprefix('block')) - 1}." if inner else ""
        number = layer.removeprefix(ours) or ("" if inner else "1")
        contiguous = np.ascontiguousarray(array.transpose(3, 2, 0, 1)) if array.ndim == 4 else array
        named[f"{place}{theirs}{number}.{leaves[leaf]}"] = contiguous
    return named


def _accuracies(model: Classifier, variables: dict[str, PyTree], crops: Crops, batch_size: int) -> dict[str, float]:
    """Returns the share of crops with the correct shape, and with the correct hue."""
    apply = jax.jit(model.apply)
    right = np.zeros(2)
    for first in range(0, len(crops.images), batch_size):
        part = slice(first, first + batch_size)
        outputs = apply(variables, crops.images[part])
        labels = (crops.shapes[part], crops.hues[part])
        right += [float((np.asarray(o).argmax(-1) == y).sum()) for o, y in zip(outputs, labels, strict=True)]
    return dict(zip(("shape", "hue"), (right / len(crops.images)).tolist(), strict=True))


def _start(path: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> np.ndarray:
    """Returns initial values: the detector's for the backbone, small random weights for the two linear layers."""
    if path.startswith("backbone/"):
        return draw_weight(path, shape, config, seed)
    generator = np.random.default_rng((seed, zlib.crc32(path.encode())))
    return np.float32(0.01) * generator.standard_normal(shape, np.float32) * (len(shape) > 1)


def _flat(tree: PyTree) -> dict[str, Any]:
    return flatten_dict(tree, sep="/")
