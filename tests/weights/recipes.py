"""Weights drawn from a fixed formula of (name, shape, seed), with the statistics of trained ones, so that no file is
stored.

Norms have means, variances and gains that matter; the last norm of a block is small, so that activations do not grow
with depth; the class logits spread widely enough for detections to have an order.
"""

import math
import re
import zlib
from collections.abc import Mapping

import numpy as np

Shapes = Mapping[str, tuple[int, ...]]


def drawn(shapes: Shapes, seed: int, spread: float) -> dict[str, np.ndarray]:
    """Returns arrays for a state dict of another library; `spread` is that of the class logits, and a tenth of it that
    of the deltas."""
    return {name: draw(name, tuple(shape), seed, spread) for name, shape in shapes.items()}


def draw(name: str, shape: tuple[int, ...], seed: int, spread: float) -> np.ndarray:
    """Returns the array called `name`."""
    generator = np.random.default_rng((seed, zlib.crc32(name.encode())))
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if len(shape) == 1:
        return of_vector(name, shape, generator)
    fan_in = math.prod(shape[1:])
    gain = 1.0 if re.search("fpn|extra|top_block", name) else 2.0
    std = math.sqrt(gain / fan_in)
    if re.search("cls_(logits|score|pred)", name):
        std *= spread
    elif re.search("bbox_(reg|pred)", name):
        std *= 0.1 * spread
    return (generator.standard_normal(shape) * std).astype(np.float32)


def of_vector(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Returns a bias, or one of the four vectors of a norm."""
    unit = generator.random(shape)
    centred = generator.standard_normal(shape)
    if name.endswith("running_var"):
        made = 0.5 + unit
    elif name.endswith("running_mean"):
        made = 0.2 * centred
    elif name.endswith(("weight", "_bn_s")):
        last = re.search(r"(bn3|conv3\.norm|layer\d\.\d+\.bn2|branch2c_bn)", name)
        made = (0.5 + unit) * (0.2 if last else 1.0)
    elif re.search("cls_(logits|score|pred)", name):
        made = -3.0 + 0.3 * centred
    else:
        made = 0.1 * centred
    return made.astype(np.float32)


def photographs(sizes_hw: list[tuple[int, int]], seed: int) -> list[np.ndarray]:
    """Returns smooth random uint8 images [h w 3]."""
    made = []
    for number, (height, width) in enumerate(sizes_hw):
        generator = np.random.default_rng((seed, number))
        coarse = generator.random((height // 9 + 2, width // 9 + 2, 3))
        fine = np.kron(coarse, np.ones((9, 9, 1)))[:height, :width]
        noisy = 255 * fine + 20 * generator.standard_normal((height, width, 3))
        made.append(noisy.clip(0, 255).astype(np.uint8))
    return made


def torchvision_shapes(classes: int, *, width: int = 8, channels: int = 16, detector: bool = True) -> Shapes:
    """Returns names and shapes of torchvision's RetinaNet on a ResNet with one basic block per stage, `width` channels
    wide."""
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, features: int) -> None:
        shapes.update({f"{name}.{leaf}": (features,) for leaf in ("weight", "bias", "running_mean", "running_var")})

    def conv(name: str, out: int, inputs: int, side: int, bias: bool = False) -> None:
        shapes[f"{name}.weight"] = (out, inputs, side, side)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    body = "backbone.body." if detector else ""
    conv(f"{body}conv1", width, 3, 7)
    norm(f"{body}bn1", width)
    before = width
    for stage in range(1, 5):
        out, block = width * 2 ** (stage - 1), f"{body}layer{stage}.0"
        for number, inputs in enumerate((before, out), start=1):
            conv(f"{block}.conv{number}", out, inputs, 3)
            norm(f"{block}.bn{number}", out)
        if stage > 1:
            conv(f"{block}.downsample.0", out, before, 1)
            norm(f"{block}.downsample.1", out)
        before = out
    if not detector:
        return shapes
    for number in range(3):
        conv(f"backbone.fpn.inner_blocks.{number}.0", channels, width * 2 ** (number + 1), 1, bias=True)
        conv(f"backbone.fpn.layer_blocks.{number}.0", channels, channels, 3, bias=True)
    conv("backbone.fpn.extra_blocks.p6", channels, channels, 3, bias=True)
    conv("backbone.fpn.extra_blocks.p7", channels, channels, 3, bias=True)
    for head, last, outputs in (("classification", "cls_logits", classes), ("regression", "bbox_reg", 4)):
        for number in range(4):
            conv(f"head.{head}_head.conv.{number}.0", channels, channels, 3, bias=True)
        conv(f"head.{head}_head.{last}", 9 * outputs, channels, 3, bias=True)
    return shapes
