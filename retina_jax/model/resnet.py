"""ResNet and ResNeXt (He et al. 2016, Xie et al. 2017): pixels to the maps C2 to C5.

To add a backbone of this kind, add a line to ARCHITECTURES and its name to `ModelConfig.backbone` (docs/extending.md).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Float

from retina_jax.config import ModelConfig
from retina_jax.cpu import platform
from retina_jax.model.layers import Conv, Norm, largest_divisor, max_pool, relu, stored_relu
from retina_jax.model.patches import cut, join, patches_of


class Architecture(NamedTuple):
    """The settings in which the backbones differ."""

    blocks: tuple[int, int, int, int]  # blocks of C2, C3, C4, C5
    bottleneck: bool  # 1x1, 3x3, 1x1 convolutions, the last with four times the channels; otherwise 3x3, 3x3
    groups: int = 1  # groups of the bottleneck's 3x3 convolution
    inner: int = 1
    """Channels of the bottleneck's 3x3 convolution divided by the stage's width: 32 groups of 8 are 4 times 64."""


ARCHITECTURES = {
    "resnet18": Architecture((2, 2, 2, 2), bottleneck=False),
    "resnet34": Architecture((3, 4, 6, 3), bottleneck=False),
    "resnet50": Architecture((3, 4, 6, 3), bottleneck=True),
    "resnet101": Architecture((3, 4, 23, 3), bottleneck=True),
    "resnext50_32x4d": Architecture((3, 4, 6, 3), bottleneck=True, groups=32, inner=2),
    "resnext101_32x4d": Architecture((3, 4, 23, 3), bottleneck=True, groups=32, inner=2),
    "resnext101_32x8d": Architecture((3, 4, 23, 3), bottleneck=True, groups=32, inner=4),
    "resnext101_64x4d": Architecture((3, 4, 23, 3), bottleneck=True, groups=64, inner=4),
}


class Layer(NamedTuple):
    """One convolution of a block."""

    features: int
    kernel_size: int
    stride: int = 1
    groups: int = 1


def block_layers(config: ModelConfig, width: int, stride: int, early: int = 1) -> tuple[Layer, ...]:
    """Returns the convolutions of a block in a stage of `width`.

    `config.stride_position` places a bottleneck's stride in the 1x1 (the paper's MSRA weights) or the 3x3 (torchvision;
    Detectron for ResNeXt). A basic block's stride is in its first 3x3. `early` is a stride that a bottleneck takes over from
    the next stage (`strides_early`), in its 3x3. The number of groups is lowered to a divisor if a small base_width leaves
    fewer channels.
    """
    architecture = ARCHITECTURES[config.backbone]
    if not architecture.bottleneck:
        return Layer(width, 3, stride), Layer(width, 3)
    first, second = (stride, 1) if config.stride_position == "1x1" else (1, stride)
    inner = width * architecture.inner
    groups = largest_divisor(inner, architecture.groups)
    return Layer(inner, 1, first), Layer(inner, 3, second * early, groups), Layer(4 * width, 1)


def strides_early(config: ModelConfig, number: int) -> bool:
    """Returns whether C`number` is computed at every second row and column only.

    With `stride_position` "1x1" the next stage reads no others, because both of its first convolutions are 1x1 of stride 2.
    The pyramid reads only maps from C`min_level`. Norms with statistics of the map need it complete.
    """
    strided = ARCHITECTURES[config.backbone].bottleneck and config.stride_position == "1x1"
    frozen = number <= config.frozen_stages
    fixed = config.norm in ("frozen", "frozen_statistics") or (config.norm == "batch" and frozen)
    return strided and fixed and number < config.min_level


class Block(nn.Module):
    """Residual block: ReLU(shortcut + convolutions), with a norm after each convolution and a ReLU between two.

    The shortcut is the identity, or a strided 1x1 convolution with a norm if the channels change (option B of He et al.).
    """

    layers: tuple[Layer, ...]
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w D"]:
        y, last = x, self.layers[-1]
        for i, layer in enumerate(self.layers[:-1], start=1):
            y = relu(self.norm(name=f"norm{i}")(y, train, self.conv(*layer, name=f"conv{i}")))
        norm, conv = self.norm(name=f"norm{len(self.layers)}"), self.conv(*last, name=f"conv{len(self.layers)}")
        stride = int(np.prod([layer.stride for layer in self.layers]))
        if x.shape[-1] == last.features:
            return stored_relu(x[:, ::stride, ::stride] + norm(y, train, conv))
        of_shortcut, shortcut = self.norm(name="shortcut_norm"), self.conv(last.features, 1, stride, name="shortcut")
        if platform() == "gpu" and last.kernel_size == 1 and norm.folds(train):  # a map less to write and to read
            return relu(norm(y, train, conv, added=of_shortcut(x, train, shortcut, fold=True)))
        y = norm(y, train, conv)
        return stored_relu(of_shortcut(x, train, shortcut) + y)


class Stem(nn.Module):
    """7x7 convolution of stride 2, norm, ReLU, then 3x3 max-pooling of stride 2: a quarter of the sides, rounded up."""

    features: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Float[Array, "B H W 3"], train: bool) -> Float[Array, "B h w C"]:
        x = relu(self.norm(name="norm")(x, train, self.conv(self.features, 7, 2, name="conv")))
        return max_pool(x)


class Stage(nn.Module):
    """The blocks of one of C2 to C5. The first has the stride, the last has `early`, the stride taken over from the next
    stage. The input is of pyramid level `level`."""

    config: ModelConfig
    level: int
    blocks: int
    width: int
    stride: int
    early: int
    remat: bool
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w D"]:
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block  # argument 2 is `train`
        patches = patches_of(x, self.level, self.stride * self.early)
        conv, norm = partial(self.conv, patches=patches), partial(self.norm, patches=patches)
        x = cut(x, patches)
        for i in range(self.blocks):
            stride, early = self.stride if i == 0 else 1, self.early if i == self.blocks - 1 else 1
            layers = block_layers(self.config, self.width, stride, early)
            x = block(layers, conv, norm, name=f"block{i + 1}")(x, train)
        return join(x, patches)


class ResNet(nn.Module):
    """Backbone: normalised images to C2 to C5, whose sides are those of the image over 4, 8, 16, 32, rounded up. Only those
    from `config.min_level` are returned.

    The parts are numbered 1 (stem) and 2 to 5 (C2 to C5). The first `config.frozen_stages` of them are not trained: their
    weights are in `frozen`. No backward pass reaches them, so they are not rematerialised.
    """

    config: ModelConfig
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W 3"], train: bool = False) -> tuple[Float[Array, "B _ _ _"], ...]:
        config = self.config
        blocks = config.stage_blocks or ARCHITECTURES[config.backbone].blocks
        dtype = np.dtype(config.dtype)

        def parts(number: int) -> dict[str, Callable[..., nn.Module]]:
            frozen = number <= config.frozen_stages
            norm = partial(Norm, config.norm, config.norm_groups, frozen, self.axis_name, dtype)
            return {"conv": partial(Conv, frozen=frozen, dtype=dtype), "norm": norm}

        x = Stem(config.base_width, **parts(1), name="stem")(x, train)
        maps, level = [], 2
        for i, number in enumerate(range(2, 6)):
            stride, early = 2 ** (number - level), 2 if strides_early(config, number) else 1
            remat = config.remat and number > config.frozen_stages
            of_stage = (level, blocks[i], config.base_width * 2**i, stride, early, remat)
            x = Stage(config, *of_stage, **parts(number), name=f"c{number}")(x, train)
            maps.append(x)
            level = number + (early == 2)
        return tuple(maps[config.min_level - 2 :])
