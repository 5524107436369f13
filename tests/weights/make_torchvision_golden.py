"""Writes golden/torchvision_v1.npz and _v2.npz: .venv/bin/python tests/weights/make_torchvision_golden.py

They contain torchvision's outputs on a few small images, with weights that `recipes` draws again in the test from names
and shapes.
"""

import json
from pathlib import Path

import numpy as np
import torch
from recipes import photographs
from torchvision_models import small_model

HERE = Path(__file__).parent / "golden"
SIZES = [(61, 83), (90, 47)]
SIDES = {"min_size": 64, "max_size": 110}
CLASSES, SEED, EVERY = 5, 11, 7

for version in ("v1", "v2"):
    model = small_model(version, CLASSES, SEED, **SIDES)
    images = photographs(SIZES, SEED)
    seen: dict = {}
    model.head.register_forward_hook(lambda _, __, out, seen=seen: seen.update(out))
    model.anchor_generator.register_forward_hook(lambda _, __, out, seen=seen: seen.update(anchors=out))
    with torch.no_grad():
        found = model([torch.from_numpy(image).permute(2, 0, 1).float() / 255 for image in images])
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    np.savez_compressed(
        HERE / f"torchvision_{version}.npz",
        shapes=json.dumps(shapes),
        logits=seen["cls_logits"].numpy()[:, ::EVERY],
        deltas=seen["bbox_regression"].numpy()[:, ::EVERY],
        anchors=seen["anchors"][0].numpy()[::EVERY],
        **{f"{key}{n}": image[key].numpy() for n, image in enumerate(found) for key in ("boxes", "scores", "labels")},
    )
    size = (HERE / f"torchvision_{version}.npz").stat().st_size
    print(version, [len(image["labels"]) for image in found], size, "bytes")
