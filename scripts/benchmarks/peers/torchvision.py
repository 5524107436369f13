"""torchvision's RetinaNet with the paper's recipe: frozen BatchNorm, stem and C2 frozen, P6 from C5, plain heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torchvision
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.ops import FrozenBatchNorm2d, batched_nms, box_iou, sigmoid_focal_loss
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from benchmarks.inputs import boxes_in, candidates, class_outputs, scene
from benchmarks.work import BenchmarkError, Task, Work

SCORES_ABOVE, LOGIT_STD = 1000, 1.5


def make(task: Task, prepare: Callable[[RetinaNet], RetinaNet] = lambda model: model) -> Work:
    """The work of `task`; `prepare` changes the network."""
    of_network = {"step": step, "forward": forward, "detect": detect}
    others = {"loss": loss, "match": match_anchors, "nms": nms}
    if task.name not in of_network | others:
        raise BenchmarkError(f"torchvision has no benchmark {task.name}")
    if task.device == "cpu":
        torch.set_num_threads(task.cores or torch.get_num_threads())
    torch.manual_seed(task.seed)
    if task.name in of_network:
        work = of_network[task.name](task, prepare(network(task)))
    else:
        work = others[task.name](task)
    return work._replace(
        facts={"version": f"torchvision {torchvision.__version__}, torch {torch.__version__}"} | work.facts
    )


def network(task: Task) -> RetinaNet:
    """Returns the model with random weights."""
    resnet = getattr(torchvision.models, task.backbone)(weights=None, norm_layer=FrozenBatchNorm2d)
    above = LastLevelP6P7(resnet.fc.in_features, 256)
    for name, weight in resnet.named_buffers():
        if name.endswith("bn3.weight"):
            weight.fill_(0.2)  # random residual blocks would add up to infinity
    backbone = _resnet_fpn_extractor(resnet, 3, returned_layers=[2, 3, 4], extra_blocks=above)
    model = RetinaNet(
        backbone, task.classes, min_size=min(task.padded_hw), max_size=max(task.padded_hw), detections_per_img=100
    )
    return _placed(task, model).to(memory_format=torch.channels_last)  # about 5 % faster, also on CPUs


def batch(task: Task) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Returns images and targets in torchvision's format."""
    made = scene(task.batch, task.padded_hw, task.boxes, task.classes, task.seed)
    images = [_placed(task, torch.from_numpy(image).permute(2, 0, 1).float() / 255) for image in made.images]
    targets = [
        {"boxes": _placed(task, torch.from_numpy(boxes)), "labels": _placed(task, torch.from_numpy(labels).long())}
        for boxes, labels in zip(made.boxes_xyxy, made.labels, strict=True)
    ]
    return images, targets


def step(task: Task, model: RetinaNet) -> Work:
    """Prepares a training step with SGD."""
    model.train()
    images, targets = batch(task)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 1e-8, 0.9, weight_decay=1e-4)

    def run() -> None:
        with _precision(task):
            loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        _wait(task)

    return Work(run, task.batch)


def forward(task: Task, model: RetinaNet) -> Work:
    """Prepares the forward pass, from normalised pixels to logits and deltas."""
    model.eval()
    images, _ = batch(task)

    def run() -> None:
        with torch.inference_mode(), _precision(task):
            prepared, _ = model.transform(images)
            model.head(list(model.backbone(prepared.tensors).values()))
        _wait(task)

    return Work(run, task.batch)


def detect(task: Task, model: RetinaNet) -> Work:
    """Prepares detection, from pixels to boxes, with as many scores above the threshold as this project's variant."""
    model.eval()
    images, _ = batch(task)
    with torch.inference_mode():
        prepared, _ = model.transform(images)
        logits = model.head(list(model.backbone(prepared.tensors).values()))["cls_logits"]
        output, threshold = model.head.classification_head.cls_logits, model.score_thresh
        logits = (logits.float() - output.bias.mean()).flatten().sort().values
        scale = LOGIT_STD / logits.std()
        output.weight *= scale
        output.bias.fill_(float(np.log(threshold / (1 - threshold))) - scale * logits[-SCORES_ABOVE * task.batch])

    def run() -> None:
        with torch.inference_mode(), _precision(task):
            model(images)
        _wait(task)

    return Work(run, task.batch)


def loss(task: Task) -> Work:
    """Prepares the focal loss of precomputed one-hot targets."""
    logits, labels = class_outputs(task.rows, task.classes, task.seed)
    taking_part = labels != -2
    inputs = _placed(task, torch.from_numpy(logits[taking_part]).to(getattr(torch, task.dtype))).requires_grad_()
    targets = np.zeros((int(taking_part.sum()), task.classes), np.float32)
    rows, classes = np.nonzero(labels[taking_part] >= 0)[0], labels[labels >= 0]
    targets[rows, classes] = 1
    targets = _placed(task, torch.from_numpy(targets).to(inputs.dtype))

    def run() -> None:
        inputs.grad = None
        sigmoid_focal_loss(inputs, targets, reduction="sum").backward()
        _wait(task)

    return Work(run)


def match_anchors(task: Task) -> Work:
    """Prepares the matching of anchors with boxes."""
    from torchvision.models.detection._utils import Matcher

    rng = np.random.default_rng(task.seed)
    anchors = _placed(task, torch.from_numpy(boxes_in(rng, (task.rows,), (800, 1333))))
    boxes = _placed(task, torch.from_numpy(boxes_in(rng, (task.boxes,), (800, 1333))))
    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)

    def run() -> None:
        matcher(box_iou(boxes, anchors))
        _wait(task)

    return Work(run)


def nms(task: Task) -> Work:
    """Prepares class-wise NMS, limited to `kept` boxes."""
    made = candidates(task.rows, task.classes, task.seed)
    boxes, scores, labels = (_placed(task, torch.from_numpy(part)) for part in made)

    def run() -> torch.Tensor:
        kept = batched_nms(boxes, scores, labels, 0.5)[: task.kept]
        _wait(task)
        return kept

    return Work(run, facts={"kept": len(run())})


def _placed(task: Task, what: Any) -> Any:
    return what.to("cuda") if task.device == "gpu" else what


def _wait(task: Task) -> None:
    if task.device == "gpu":
        torch.cuda.synchronize()


def _precision(task: Task) -> Any:
    kind = "cuda" if task.device == "gpu" else "cpu"
    return torch.autocast(kind, torch.bfloat16, enabled=task.dtype == "bfloat16")
