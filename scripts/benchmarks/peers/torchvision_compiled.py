"""torchvision's RetinaNet with backbone and heads compiled by torch.compile. The resize, the matching and NMS are not: what
they do depends on values."""

from __future__ import annotations

from torchvision.models.detection.retinanet import RetinaNet

from benchmarks.peers import torchvision
from benchmarks.work import Task, Work


def make(task: Task) -> Work:
    """The work of `task`."""
    return torchvision.make(task, compiled)


def compiled(model: RetinaNet) -> RetinaNet:
    """Compiles the parts of `model` when they are first called."""
    model.backbone.compile()
    model.head.compile()
    return model
