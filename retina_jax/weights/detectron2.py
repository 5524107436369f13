"""detectron2's RetinaNets (R50, R101 and their kin) and its ImageNet backbones.

Head channels stay in detectron2's order (for each size, for each ratio), which `anchors.style` "detectron2" has.
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

NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
CONV = {"weight": "kernel", "bias": "bias"}

BODY = r"(?:backbone\.)?(?:bottom_up\.)?"
STATISTIC = r"(?P<leaf>weight|bias|running_mean|running_var)"
LEAF = r"(?P<leaf>weight|bias)"
PLACE = r"res(?P<stage>\d)\.(?P<block>\d+)\."
HEADS = {"cls": "class_head", "bbox": "box_head"}


def _block(place: re.Match[str]) -> str:
    return f"backbone/c{place['stage']}/block{int(place['block']) + 1}"


RULES: tuple[Rule, ...] = (
    (rf"{BODY}stem\.conv1\.weight", lambda m: "backbone/stem/conv/kernel"),
    (rf"{BODY}stem\.conv1\.norm\.{STATISTIC}", lambda m: f"backbone/stem/norm/{NORM[m['leaf']]}"),
    (rf"{BODY}{PLACE}conv(?P<n>\d)\.weight", lambda m: f"{_block(m)}/conv{m['n']}/kernel"),
    (rf"{BODY}{PLACE}conv(?P<n>\d)\.norm\.{STATISTIC}", lambda m: f"{_block(m)}/norm{m['n']}/{NORM[m['leaf']]}"),
    (rf"{BODY}{PLACE}shortcut\.weight", lambda m: f"{_block(m)}/shortcut/kernel"),
    (rf"{BODY}{PLACE}shortcut\.norm\.{STATISTIC}", lambda m: f"{_block(m)}/shortcut_norm/{NORM[m['leaf']]}"),
    (
        rf"backbone\.fpn_(?P<part>lateral|output)(?P<n>\d)\.{LEAF}",
        lambda m: f"fpn/{m['part']}{m['n']}/{CONV[m['leaf']]}",
    ),
    (rf"backbone\.top_block\.p(?P<n>\d)\.{LEAF}", lambda m: f"fpn/output{m['n']}/{CONV[m['leaf']]}"),
    # Convolutions and ReLUs count alike: 0, 2, 4, 6.
    (
        rf"head\.(?P<head>cls|bbox)_subnet\.(?P<n>\d+)\.{LEAF}",
        lambda m: f"{HEADS[m['head']]}/conv{int(m['n']) // 2 + 1}/{CONV[m['leaf']]}",
    ),
    (rf"head\.(?P<head>cls|bbox)_(score|pred)\.{LEAF}", lambda m: f"{HEADS[m['head']]}/output/{CONV[m['leaf']]}"),
    # Buffers that the config says as well, and the ImageNet classifier.
    (r"anchor_generator\..*|pixel_mean|pixel_std|.*num_batches_tracked|.*\b(linear|fc|fc1000)\.(weight|bias)", None),
)


def convert_detectron2(
    state_dict: Mapping[str, np.ndarray],
    *,
    source: str = "detectron2 weights",
    class_names: Sequence[str] = (),
) -> Converted:
    """A model of detectron2's RetinaNet configs, or a backbone in its naming.

    A FrozenBatchNorm without running statistics (as files turned from Caffe2 have it) is read as the plain affine.
    The stride of a bottleneck sits in the 1x1 (the MSRA weights), but in the 3x3 of a ResNeXt.

    Args:
      state_dict: names to arrays.
      source: what errors call it.
      class_names: of each class; empty: COCO's where there are 80, else "class 1" and so on.
    """
    weights = with_statistics(renamed(state_dict, RULES, source))
    changes = architecture(weights, source)
    stride = "3x3" if changes["model.backbone"].startswith("resnext") else "1x1"
    changes |= {"model.stride_position": stride, "model.input_normalisation": "detectron2", "model.norm": "frozen"}
    if not is_detector(weights):
        return Converted(weights, changes, (), ())
    names, ids = contiguous_classes(class_count(weights, source), class_names, source)
    return Converted(weights, detector_changes("detectron2", changes), names, ids)
