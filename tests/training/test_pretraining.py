"""Pretraining by classification: the backbone learns, its file has torchvision's names, and a detector starts from
it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from miniature.crops import Crops, draw_crops
from miniature.pretraining import backbone_state_dict, pretrain
from safetensors.numpy import save

from retina_jax.config import Config, ModelConfig
from retina_jax.config_io import override
from retina_jax.model.initialisation import initialise
from retina_jax.training.parallel import Driver
from retina_jax.weights.importing import with_backbone
from retina_jax.weights.readers import parse
from retina_jax.weights.torchvision import convert_torchvision

TINY = ModelConfig(
    backbone="resnet18", base_width=4, stage_blocks=(1, 1, 1, 1), fpn_channels=8, input_normalisation="imagenet"
)


@pytest.fixture(scope="module")
def learnt() -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Trains a tiny backbone to distinguish the hues of crops; returns it with its accuracies."""
    crops = draw_crops(90, seed=0)
    two = Crops(*(column[np.isin(crops.hues, crops.hues[:2])] for column in crops))
    return pretrain(TINY, two, two, steps=60, batch_size=8, seed=0, log=print)


def test_the_backbone_learns_its_classes(learnt: tuple[dict[str, np.ndarray], dict[str, float]]) -> None:
    assert learnt[1]["hue"] > 0.9


def test_a_detector_starts_from_the_file(
    tmp_path: Path, learnt: tuple[dict[str, np.ndarray], dict[str, float]]
) -> None:
    file = tmp_path / "backbone.safetensors"
    file.write_bytes(save(backbone_state_dict(learnt[0]), {"shape": "0.5"}))
    config = dataclasses.replace(Config(), model=override(TINY, {"backbone_weights": str(file)}))
    model = Driver(config, 3).model
    filled, report = with_backbone(initialise(model, 0), config.model)
    assert "missing" not in report
    np.testing.assert_array_equal(
        filled["params"]["backbone"]["c5"]["block1"]["conv2"]["kernel"], learnt[0]["backbone/c5/block1/conv2/kernel"]
    )
    np.testing.assert_array_equal(
        filled["frozen"]["backbone"]["stem"]["norm"]["var"], learnt[0]["backbone/stem/norm/var"]
    )
    assert (learnt[0]["backbone/stem/norm/var"] != 1).any()


def test_names_are_converted_to_torchvisions_and_back(learnt: tuple[dict[str, np.ndarray], dict[str, float]]) -> None:
    named = parse(save(backbone_state_dict(learnt[0])))
    assert {"conv1.weight", "bn1.running_var", "layer2.0.downsample.1.bias", "layer4.0.conv2.weight"} <= set(named)
    back = convert_torchvision(named).weights
    assert set(back) == set(learnt[0])
    for path, array in learnt[0].items():
        np.testing.assert_array_equal(back[path], array)


@pytest.mark.parity
def test_torchvision_accepts_the_names() -> None:
    torchvision = pytest.importorskip("torchvision")
    torch = pytest.importorskip("torch")
    config = override(Config(), {"model.backbone": "resnet50", "model.num_classes": 2})
    variables = initialise(Driver(config, 2).model, 0)
    weights = {
        f"backbone/{path}": leaf
        for kind in variables.values()
        for path, leaf in flatten_dict(kind.get("backbone", {}), sep="/").items()
    }
    state = {name: torch.from_numpy(np.array(a)) for name, a in backbone_state_dict(weights).items()}
    missing, unexpected = torchvision.models.resnet50().load_state_dict(state, strict=False)
    assert unexpected == [] and all(m.startswith("fc.") or m.endswith("num_batches_tracked") for m in missing)
