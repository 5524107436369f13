"""torchvision's RetinaNets (v1 and v2), and its ImageNet ResNets, whose names timm shares.

Head channels keep torchvision's order (the sizes within each ratio), which `anchors.style` "torchvision" reproduces. The
class head keeps all its columns, and a label is a column, as in torchvision. The COCO weights have 91, one per category id
from 0: the background, which no box has, and ten ids that COCO does not use.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from retina_jax.data.classes import COCO_CATEGORIES
from retina_jax.errors import WeightsError
from retina_jax.presets import PRESETS
from retina_jax.weights import converted
from retina_jax.weights.converted import CONV, LEAF, NORM, STATISTIC, Converted, Rule

BACKGROUND = "__background__"
COCO_OUTPUTS = 91

BODY = r"(?:backbone\.body\.)?"
FPN = r"backbone\.fpn\."
HEAD = r"head\.(?P<head>classification|regression)_head\."
PLACE = r"layer(?P<stage>\d)\.(?P<block>\d\d?\d?)\."
HEADS = {"classification": "class_head", "regression": "box_head"}


def _block(place: re.Match[str]) -> str:
    return f"backbone/c{int(place['stage']) + 1}/block{int(place['block']) + 1}"


RULES: tuple[Rule, ...] = (
    (rf"{BODY}conv1\.weight", lambda m: "backbone/stem/conv/kernel"),
    (rf"{BODY}bn1\.{STATISTIC}", lambda m: f"backbone/stem/norm/{NORM[m['leaf']]}"),
    (rf"{BODY}{PLACE}conv(?P<n>\d)\.weight", lambda m: f"{_block(m)}/conv{m['n']}/kernel"),
    (rf"{BODY}{PLACE}bn(?P<n>\d)\.{STATISTIC}", lambda m: f"{_block(m)}/norm{m['n']}/{NORM[m['leaf']]}"),
    (rf"{BODY}{PLACE}downsample\.0\.weight", lambda m: f"{_block(m)}/shortcut/kernel"),
    (rf"{BODY}{PLACE}downsample\.1\.{STATISTIC}", lambda m: f"{_block(m)}/shortcut_norm/{NORM[m['leaf']]}"),
    # The pyramid starts at layer2, which is C3. Before torchvision 0.13 there was no ".0".
    (rf"{FPN}inner_blocks\.(?P<n>\d)(\.0)?\.{LEAF}", lambda m: f"fpn/lateral{int(m['n']) + 3}/{CONV[m['leaf']]}"),
    (rf"{FPN}layer_blocks\.(?P<n>\d)(\.0)?\.{LEAF}", lambda m: f"fpn/output{int(m['n']) + 3}/{CONV[m['leaf']]}"),
    (rf"{FPN}extra_blocks\.p(?P<n>\d)\.{LEAF}", lambda m: f"fpn/output{m['n']}/{CONV[m['leaf']]}"),
    (rf"{HEAD}conv\.(?P<n>\d)\.0\.{LEAF}", lambda m: f"{HEADS[m['head']]}/conv{int(m['n']) + 1}/{CONV[m['leaf']]}"),
    (rf"{HEAD}conv\.(?P<n>\d)\.1\.{LEAF}", lambda m: f"{HEADS[m['head']]}/norm{int(m['n']) + 1}/{NORM[m['leaf']]}"),
    # Before 0.13 ReLUs were numbered too: the convolutions are 0, 2, 4, 6.
    (rf"{HEAD}conv\.(?P<n>\d)\.{LEAF}", lambda m: f"{HEADS[m['head']]}/conv{int(m['n']) // 2 + 1}/{CONV[m['leaf']]}"),
    (rf"{HEAD}(cls_logits|bbox_reg)\.{LEAF}", lambda m: f"{HEADS[m['head']]}/output/{CONV[m['leaf']]}"),
    (r".*num_batches_tracked|fc\.(weight|bias)", None),
)


def convert_torchvision(
    state_dict: Mapping[str, np.ndarray],
    *,
    source: str = "torchvision weights",
    eps: float = 1e-5,
    class_names: Sequence[str] = (),
) -> Converted:
    """Converts `retinanet_resnet50_fpn`, its v2, or an ImageNet ResNet or ResNeXt with torchvision's names.

    Errors call the weights `source`. `eps`: epsilon of their BatchNorms, 1e-5, but 0 for the COCO weights of v1.
    `class_names`: one per column, or all but the first, the background; empty: COCO's for 91 columns, else "class 0" ...
    """
    weights = converted.with_epsilon(converted.renamed(state_dict, RULES, source), eps)
    changes = converted.architecture(weights, source)
    if not converted.is_detector(weights):
        kind = {"model.stride_position": "3x3", "model.input_normalisation": "imagenet", "model.norm": "frozen"}
        return Converted(weights, changes | kind, (), ())
    preset = "torchvision_v2" if changes["model.head_norm"] == "group" else "torchvision_v1"
    names, ids = classes(converted.class_count(weights, source), class_names, source)
    return Converted(weights, {**PRESETS[preset], "data.jitter_short_sides": (), **changes}, names, ids)


def classes(count: int, given: Sequence[str], source: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Returns the name and category id of each of `count` columns."""
    if given:
        names = tuple(given) if len(given) == count else (BACKGROUND, *given)
        if len(names) != count:
            needed = f"give {count} or {count - 1}"
            raise WeightsError(f"{source}: {count} class outputs, but {len(given)} class names; {needed}")
    elif count == COCO_OUTPUTS:
        coco = dict(COCO_CATEGORIES)
        names = (BACKGROUND, *(coco.get(number, f"N/A {number}") for number in range(1, count)))
    else:
        names = tuple(f"class {k}" for k in range(count))
    return names, tuple(range(count))
