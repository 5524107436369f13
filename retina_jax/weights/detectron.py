"""Detectron's RetinaNets (R50, R101, X101-32x8d) and the ImageNet backbones it starts from, by their Caffe2 blob names.

Head channels stay in Detectron's order (for each octave, for the ratios 1, 2, .5), which `anchors.style` "detectron" has.
Its BatchNorms are folded into an affine already: two blobs a norm, no statistics.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from retina_jax.weights.converted import (
    Converted,
    Rule,
    architecture,
    class_count,
    contiguous_classes,
    detector_changes,
    is_detector,
    renamed,
    with_statistics,
)

NORM = {"s": "scale", "b": "bias"}
CONV = {"w": "kernel", "b": "bias"}
BRANCHES = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
NORMS = {"1": "shortcut_norm", "2a": "norm1", "2b": "norm2", "2c": "norm3"}
HEADS = {"cls": "class_head", "bbox": "box_head"}

PLACE = r"res(?P<stage>\d)_(?P<block>\d+)_branch(?P<branch>1|2a|2b|2c)"


def _block(place: re.Match[str]) -> str:
    return f"backbone/c{place['stage']}/block{int(place['block']) + 1}"


RULES: tuple[Rule, ...] = (
    (r"conv1_(?P<leaf>[wb])", lambda m: f"backbone/stem/conv/{CONV[m['leaf']]}"),
    (r"res_conv1_bn_(?P<leaf>[sb])", lambda m: f"backbone/stem/norm/{NORM[m['leaf']]}"),
    (rf"{PLACE}_(?P<leaf>[wb])", lambda m: f"{_block(m)}/{BRANCHES[m['branch']]}/{CONV[m['leaf']]}"),
    (rf"{PLACE}_bn_(?P<leaf>[sb])", lambda m: f"{_block(m)}/{NORMS[m['branch']]}/{NORM[m['leaf']]}"),
    # Named after the last block of the stage they start from; "lateral" is left out at the top.
    (r"fpn_inner_res(?P<n>\d)_\d+_sum(_lateral)?_(?P<leaf>[wb])", lambda m: f"fpn/lateral{m['n']}/{CONV[m['leaf']]}"),
    (r"fpn_res(?P<n>\d)_\d+_sum_(?P<leaf>[wb])", lambda m: f"fpn/output{m['n']}/{CONV[m['leaf']]}"),
    (r"fpn_(?P<n>\d)_(?P<leaf>[wb])", lambda m: f"fpn/output{m['n']}/{CONV[m['leaf']]}"),
    # The levels share the weights of the finest.
    (
        r"retnet_(?P<head>cls|bbox)_conv_n(?P<n>\d)_fpn3_(?P<leaf>[wb])",
        lambda m: f"{HEADS[m['head']]}/conv{int(m['n']) + 1}/{CONV[m['leaf']]}",
    ),
    (r"retnet_(?P<head>cls|bbox)_pred_fpn3_(?P<leaf>[wb])", lambda m: f"{HEADS[m['head']]}/output/{CONV[m['leaf']]}"),
    (r"(pred|fc1000|fc|last_out_L\d+)_[wb]|lr|__preserve__/.*|.*_momentum", None),
)


def convert_detectron(
    blobs: Mapping[str, np.ndarray],
    *,
    source: str = "Detectron weights",
    class_names: Sequence[str] = (),
) -> Converted:
    """The blobs of a RetinaNet of Detectron, or of an ImageNet backbone it starts from (MSRA R-50 and R-101, X-101-32x8d).

    The stride of a bottleneck sits in the 1x1 (MSRA), but in the 3x3 of a ResNeXt. A bias that a backbone convolution has
    beside its affine is folded into the affine's mean.

    Args:
      blobs: names to arrays.
      source: what errors call it.
      class_names: of each class; empty: COCO's where there are 80, else "class 1" and so on.
    """
    weights = without_biases(with_statistics(renamed(blobs, RULES, source)))
    changes = architecture(weights, source)
    stride = "3x3" if changes["model.backbone"].startswith("resnext") else "1x1"
    changes |= {"model.stride_position": stride, "model.input_normalisation": "detectron", "model.norm": "frozen"}
    if not is_detector(weights):
        return Converted(weights, changes, (), ())
    names, ids = contiguous_classes(class_count(weights, source), class_names, source)
    return Converted(weights, detector_changes("detectron", changes), names, ids)


def without_biases(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`weights` with each backbone convolution's bias b taken into the norm behind it: (x + b) - mean = x - (mean - b)."""
    made = dict(weights)
    for path in weights:
        if match := re.fullmatch(r"(backbone/.*/)(conv\d?|shortcut)/bias", path):
            norm = match[1] + {"shortcut": "shortcut_norm"}.get(match[2], match[2].replace("conv", "norm"))
            made[norm + "/mean"] = made[norm + "/mean"] - made.pop(path)
    return made
