"""RetinaNets of Detectron and detectron2, and the ImageNet backbones that they start from.

Head channels keep each system's order, which `anchors.style` reproduces: Detectron has the ratios 1, 2, 0.5 within each
octave, detectron2 the ratios within each size.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from retina_jax.data.classes import COCO_CATEGORIES
from retina_jax.errors import WeightsError
from retina_jax.presets import PRESETS
from retina_jax.weights import converted
from retina_jax.weights.converted import CONV, LEAF, NORM, STATISTIC, Converted, Rule

HEADS = {"cls": "class_head", "bbox": "box_head"}
BLOB = {"w": "kernel", "b": "bias"}
AFFINE = {"s": "scale", "b": "bias"}
BRANCHES = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
NORMS = {"1": "shortcut_norm", "2a": "norm1", "2b": "norm2", "2c": "norm3"}

HEAD, CAFFE2_LEAF = r"(?P<head>cls|bbox)", r"(?P<leaf>[wb])"
CAFFE2_BLOCK = r"res(?P<stage>\d)_(?P<block>\d\d?\d?)_branch(?P<branch>1|2a|2b|2c)"
BODY = r"(?:backbone\.)?(?:bottom_up\.)?"
BLOCK = rf"{BODY}res(?P<stage>\d)\.(?P<block>\d\d?\d?)\."


def _block(place: re.Match[str]) -> str:
    return f"backbone/c{place['stage']}/block{int(place['block']) + 1}"


def _head_conv(place: re.Match[str], step: int) -> str:
    """Returns the path of a convolution; its number, from 0, counts in steps of `step`."""
    return f"{HEADS[place['head']]}/conv{int(place['n']) // step + 1}"


DETECTRON: tuple[Rule, ...] = (
    (rf"conv1_{CAFFE2_LEAF}", lambda m: f"backbone/stem/conv/{BLOB[m['leaf']]}"),
    (r"res_conv1_bn_(?P<leaf>[sb])", lambda m: f"backbone/stem/norm/{AFFINE[m['leaf']]}"),
    (rf"{CAFFE2_BLOCK}_{CAFFE2_LEAF}", lambda m: f"{_block(m)}/{BRANCHES[m['branch']]}/{BLOB[m['leaf']]}"),
    (rf"{CAFFE2_BLOCK}_bn_(?P<leaf>[sb])", lambda m: f"{_block(m)}/{NORMS[m['branch']]}/{AFFINE[m['leaf']]}"),
    # Named after the last block of the stage; the top one lacks "lateral".
    (rf"fpn_inner_res(?P<n>\d)_\d+_sum(_lateral)?_{CAFFE2_LEAF}", lambda m: f"fpn/lateral{m['n']}/{BLOB[m['leaf']]}"),
    (rf"fpn_res(?P<n>\d)_\d+_sum_{CAFFE2_LEAF}", lambda m: f"fpn/output{m['n']}/{BLOB[m['leaf']]}"),
    (rf"fpn_(?P<n>\d)_{CAFFE2_LEAF}", lambda m: f"fpn/output{m['n']}/{BLOB[m['leaf']]}"),
    # All levels share the weights of the finest one.
    (rf"retnet_{HEAD}_conv_n(?P<n>\d)_fpn3_{CAFFE2_LEAF}", lambda m: f"{_head_conv(m, 1)}/{BLOB[m['leaf']]}"),
    (rf"retnet_{HEAD}_pred_fpn3_{CAFFE2_LEAF}", lambda m: f"{HEADS[m['head']]}/output/{BLOB[m['leaf']]}"),
    (r"(pred|fc1000|fc|last_out_L\d+)_[wb]|lr|__preserve__/.*|.*_momentum", None),
)
"""Detectron's Caffe2 blobs."""

DETECTRON2: tuple[Rule, ...] = (
    (rf"{BODY}stem\.conv1\.weight", lambda m: "backbone/stem/conv/kernel"),
    (rf"{BODY}stem\.conv1\.norm\.{STATISTIC}", lambda m: f"backbone/stem/norm/{NORM[m['leaf']]}"),
    (rf"{BLOCK}conv(?P<n>\d)\.weight", lambda m: f"{_block(m)}/conv{m['n']}/kernel"),
    (rf"{BLOCK}conv(?P<n>\d)\.norm\.{STATISTIC}", lambda m: f"{_block(m)}/norm{m['n']}/{NORM[m['leaf']]}"),
    (rf"{BLOCK}shortcut\.weight", lambda m: f"{_block(m)}/shortcut/kernel"),
    (rf"{BLOCK}shortcut\.norm\.{STATISTIC}", lambda m: f"{_block(m)}/shortcut_norm/{NORM[m['leaf']]}"),
    (
        rf"backbone\.fpn_(?P<layer>lateral|output)(?P<n>\d)\.{LEAF}",
        lambda m: f"fpn/{m['layer']}{m['n']}/{CONV[m['leaf']]}",
    ),
    (rf"backbone\.top_block\.p(?P<n>\d)\.{LEAF}", lambda m: f"fpn/output{m['n']}/{CONV[m['leaf']]}"),
    # ReLUs are numbered too: the convolutions are 0, 2, 4, 6.
    (rf"head\.{HEAD}_subnet\.(?P<n>\d\d?\d?)\.{LEAF}", lambda m: f"{_head_conv(m, 2)}/{CONV[m['leaf']]}"),
    (rf"head\.{HEAD}_(score|pred)\.{LEAF}", lambda m: f"{HEADS[m['head']]}/output/{CONV[m['leaf']]}"),
    # Buffers that repeat the config, and the ImageNet classifier.
    (r"anchor_generator\..*|pixel_mean|pixel_std|.*num_batches_tracked|.*\b(linear|fc|fc1000)\.(weight|bias)", None),
)
"""detectron2's state dicts."""


def convert_detectron(
    blobs: Mapping[str, np.ndarray], *, source: str = "Detectron weights", class_names: Sequence[str] = ()
) -> Converted:
    """Converts a RetinaNet of Detectron, or one of its ImageNet backbones (MSRA R-50 and R-101, X-101-32x8d).

    Detectron has folded its BatchNorms into affines. The bias of a backbone convolution is folded into the affine's mean.
    Errors call the weights `source`. `class_names`: one per class; empty: COCO's if there are 80 classes, else "class 1" ...
    """
    weights = converted.with_statistics(converted.renamed(blobs, DETECTRON, source))
    for path in list(weights):
        mean = re.sub(r"conv(\d?)/bias$", r"norm\1/mean", path).replace("shortcut/bias", "shortcut_norm/mean")
        if mean != path and mean in weights:
            weights[mean] = weights[mean] - weights.pop(path)  # (x + bias) - mean = x - (mean - bias)
    return _converted(weights, "detectron", source, class_names)


def convert_detectron2(
    state_dict: Mapping[str, np.ndarray], *, source: str = "detectron2 weights", class_names: Sequence[str] = ()
) -> Converted:
    """Converts a RetinaNet of detectron2, or a backbone with its names. Arguments as in `convert_detectron`. A
    FrozenBatchNorm without running statistics, as in files converted from Caffe2, is an affine."""
    weights = converted.with_statistics(converted.renamed(state_dict, DETECTRON2, source))
    return _converted(weights, "detectron2", source, class_names)


def _converted(weights: dict[str, np.ndarray], system: str, source: str, class_names: Sequence[str]) -> Converted:
    """Adds the config. The MSRA weights have the stride of a bottleneck in the 1x1, ResNeXts in the 3x3."""
    changes = converted.architecture(weights, source)
    stride = "3x3" if changes["model.backbone"].startswith("resnext") else "1x1"
    changes |= {"model.stride_position": stride, "model.input_normalisation": system, "model.norm": "frozen"}
    if not converted.is_detector(weights):
        return Converted(weights, changes, (), ())
    count = converted.class_count(weights, source)
    if class_names and len(class_names) != count:
        raise WeightsError(f"{source}: has {count} classes, but {len(class_names)} class names are given")
    categories = tuple((k, class_names[k - 1] if class_names else f"class {k}") for k in range(1, count + 1))
    if not class_names and count == len(COCO_CATEGORIES):
        categories = COCO_CATEGORIES
    ids, names = zip(*categories, strict=True)
    # Detection and evaluation need no scale jitter, which belongs to the training of the preset.
    return Converted(weights, {**PRESETS[system], "data.jitter_short_sides": (), **changes}, names, ids)
