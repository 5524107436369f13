"""torchvision's RetinaNets on a ResNet of one block per stage: the same code in a quarter of the time. Needs torch."""

from functools import partial
from typing import Any

import torch
from recipes import drawn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.retinanet import RetinaNetHead, _default_anchorgen
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d


def small_model(version: str, classes: int, seed: int, **sides: int) -> Any:
    """Returns v1 (frozen BatchNorm, P6 from P5, L1) or v2 (trained BatchNorm, P6 from C5, GroupNorm in the heads,
    GIoU).

    "msra" is the network of Detectron and detectron2: v1 with P6 from C5 and the strides in the 1x1.
    """
    plain = version != "v2"
    body = ResNet(Bottleneck, [1, 1, 1, 1], norm_layer=FrozenBatchNorm2d if plain else torch.nn.BatchNorm2d)
    if version == "msra":
        for layer in (body.layer2, body.layer3, body.layer4):
            layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    extra = LastLevelP6P7(256 if version == "v1" else 2048, 256)
    backbone = _resnet_fpn_extractor(body, 3, returned_layers=[2, 3, 4], extra_blocks=extra)
    head = RetinaNetHead(256, 9, classes, norm_layer=None if plain else partial(torch.nn.GroupNorm, 32))
    if not plain:
        head.regression_head._loss_type = "giou"
    model = RetinaNet(backbone, classes, anchor_generator=_default_anchorgen(), head=head, **sides)
    # The input of "msra" is in grey levels, about sixty times as large.
    return load_drawn(model, seed, spread={"v1": 0.15, "v2": 0.6, "msra": 0.004}[version])


def load_drawn(model: Any, seed: int, spread: float) -> Any:
    """Loads drawn weights into `model` and sets it to evaluation mode."""
    state = drawn({name: tuple(t.shape) for name, t in model.state_dict().items()}, seed, spread)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    return model.eval()
