"""The networks of Detectron and detectron2, built from torchvision's parts, and detectron2's steps to detections:
pytest -m parity.

Neither library need be installed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from recipes import photographs

from retina_jax import load_detector
from retina_jax.detector import padded_batch
from retina_jax.ops.anchors import anchor_grid, level_counts

# conftest loads them if parity tests are selected: torch must come before TensorFlow.
if "torchvision" not in sys.modules:
    pytest.skip("needs torchvision, and pytest -m parity", allow_module_level=True)
torch, torchvision = sys.modules["torch"], sys.modules["torchvision"]
from torchvision.models.detection._utils import BoxCoder  # noqa: E402
from torchvision_models import small_model  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

MEANS = {"detectron": (102.9801, 115.9465, 122.7717), "detectron2": (103.53, 116.28, 123.675)}
IMAGE = photographs([(150, 211)], 3)[0]


def detectron2_name(name: str) -> str:
    """Converts torchvision's name of a tensor to detectron2's."""
    for pattern, to in (
        (r"backbone\.body\.conv1", "backbone.bottom_up.stem.conv1"),
        (r"backbone\.body\.bn1", "backbone.bottom_up.stem.conv1.norm"),
        (r"backbone\.body\.layer(\d)\.0\.conv(\d)", lambda m: f"backbone.bottom_up.res{int(m[1]) + 1}.0.conv{m[2]}"),
        (r"backbone\.body\.layer(\d)\.0\.bn(\d)", lambda m: f"backbone.bottom_up.res{int(m[1]) + 1}.0.conv{m[2]}.norm"),
        (r"backbone\.body\.layer(\d)\.0\.downsample\.0", lambda m: f"backbone.bottom_up.res{int(m[1]) + 1}.0.shortcut"),
        (
            r"backbone\.body\.layer(\d)\.0\.downsample\.1",
            lambda m: f"backbone.bottom_up.res{int(m[1]) + 1}.0.shortcut.norm",
        ),
        (r"backbone\.fpn\.inner_blocks\.(\d)\.0", lambda m: f"backbone.fpn_lateral{int(m[1]) + 3}"),
        (r"backbone\.fpn\.layer_blocks\.(\d)\.0", lambda m: f"backbone.fpn_output{int(m[1]) + 3}"),
        (r"backbone\.fpn\.extra_blocks\.", "backbone.top_block."),
        (r"head\.classification_head\.conv\.(\d)\.0", lambda m: f"head.cls_subnet.{2 * int(m[1])}"),
        (r"head\.regression_head\.conv\.(\d)\.0", lambda m: f"head.bbox_subnet.{2 * int(m[1])}"),
        (r"head\.classification_head\.cls_logits", "head.cls_score"),
        (r"head\.regression_head\.bbox_reg", "head.bbox_pred"),
    ):
        renamed, count = re.subn(f"^{pattern}", to, name)
        if count:
            return renamed
    raise AssertionError(name)


def detectron_blobs(state: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns a state dict in Detectron's format: each BatchNorm as its affine."""
    blobs: dict[str, np.ndarray] = {}
    for name, tensor in state.items():
        d2 = detectron2_name(name)
        if ".norm." in d2:
            if d2.endswith("norm.weight"):
                stem = name.removesuffix("weight")
                scale = tensor / torch.sqrt(state[stem + "running_var"] + 1e-5)
                shift = state[stem + "bias"] - state[stem + "running_mean"] * scale
                blob = backbone_blob(d2.removesuffix(".norm.weight"), norm=True)
                blobs |= {f"{blob}_s": scale.numpy(), f"{blob}_b": shift.numpy()}
            continue
        stem, leaf = d2.rsplit(".", 1)
        blobs[f"{blob_name(stem)}_{ {'weight': 'w', 'bias': 'b'}[leaf] }"] = tensor.numpy()
    return blobs


def backbone_blob(stem: str, norm: bool) -> str:
    if stem.endswith("stem.conv1"):
        return "res_conv1_bn" if norm else "conv1"
    stage, layer = re.fullmatch(r"backbone\.bottom_up\.res(\d)\.0\.(\w+)", stem).groups()
    branch = {"conv1": "2a", "conv2": "2b", "conv3": "2c", "shortcut": "1"}[layer]
    return f"res{stage}_0_branch{branch}" + ("_bn" if norm else "")


def blob_name(stem: str) -> str:
    if "bottom_up" in stem:
        return backbone_blob(stem, norm=False)
    last = stem.rsplit(".", 1)[1]
    if last.startswith("fpn_lateral"):
        return f"fpn_inner_res{last[-1]}_0_sum" + ("" if last[-1] == "5" else "_lateral")
    if last.startswith("fpn_output"):
        return f"fpn_res{last[-1]}_0_sum"
    if "top_block" in stem:
        return f"fpn_{last[-1]}"
    head = "cls" if "cls" in stem else "bbox"
    return f"retnet_{head}_" + (f"conv_n{int(last) // 2}_fpn3" if last.isdigit() else "pred_fpn3")


@pytest.mark.parametrize("kind", ["detectron2", "detectron"])
def test_the_network_and_detectron2s_detections(kind: str, tmp_path: Path) -> None:
    model = small_model("msra", 6, 9)
    state = model.state_dict()
    blobs = detectron_blobs(state) if kind == "detectron" else {detectron2_name(n): t for n, t in state.items()}
    torch.save({"model": {name: torch.as_tensor(array) for name, array in blobs.items()}}, tmp_path / "w.pth")
    detector = load_detector(f"{kind}:{tmp_path / 'w.pth'}", short_side=160, long_side=270)
    config = detector.config

    batch = padded_batch([IMAGE], config.data, 1)
    apply = jax.jit(detector.driver.model.apply)
    logits, deltas = apply(detector.variables, batch.images, batch.image_sizes)
    height, width = batch.image_sizes[0].tolist()
    x = torch.zeros((1, 3, *batch.images.shape[1:3]))
    bgr = torch.from_numpy(np.asarray(batch.images[0, :height, :width, ::-1], np.float32).transpose(2, 0, 1).copy())
    x[0, :, :height, :width] = bgr - torch.tensor(MEANS[kind])[:, None, None]
    with torch.no_grad():
        outputs = model.head(list(model.backbone(x).values()))
    np.testing.assert_allclose(logits, outputs["cls_logits"].numpy(), atol=1e-4, rtol=0)
    np.testing.assert_allclose(deltas, outputs["bbox_regression"].numpy(), atol=1e-4, rtol=0)
    if kind == "detectron":
        return

    # detectron2: threshold and best 1000 per level, NMS of unclipped boxes, 100 kept, scaled, clipped, empty ones dropped.
    anchors = torch.from_numpy(anchor_grid(batch.images.shape[1:3], config.anchors, config.model).copy())
    boxes, scores, labels, start = [], [], [], 0
    for count in level_counts(batch.images.shape[1:3], config.anchors, config.model):
        of_level = torch.from_numpy(np.array(logits[0, start : start + count])).flatten().sigmoid()
        candidates = torch.nonzero(of_level > 0.05)[:, 0]
        best, place = of_level[candidates].sort(descending=True, stable=True)
        place, best = candidates[place[:1000]], best[:1000]
        at = start + place // 6
        boxes.append(
            BoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single(torch.from_numpy(np.array(deltas[0]))[at], anchors[at])
        )
        scores.append(best)
        labels.append(place % 6)
        start += count
    boxes, scores, labels = torch.cat(boxes), torch.cat(scores), torch.cat(labels)
    kept = torchvision.ops.boxes._batched_nms_vanilla(boxes, scores, labels, 0.5)[:100]
    boxes = boxes[kept] * torch.tensor([211 / width, 150 / height] * 2)
    boxes = torchvision.ops.clip_boxes_to_image(boxes, (150, 211))
    solid = ((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])).numpy()
    (found,) = detector.detect([IMAGE])
    assert len(found.labels) == solid.sum() > 20
    np.testing.assert_allclose(found.scores, scores[kept].numpy()[solid], atol=1e-5)
    same = (found.labels == labels[kept].numpy()[solid]) & (abs(found.boxes_xyxy - boxes.numpy()[solid]).max(1) < 0.01)
    assert same.mean() > 0.97  # neighbours with equal scores may be swapped
