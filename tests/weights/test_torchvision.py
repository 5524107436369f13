"""torchvision's detectors and backbones without torch: compared with golden outputs, and by name."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from recipes import drawn, photographs
from weight_files import safetensors

from retina_jax import load_detector
from retina_jax.config import Config, ModelConfig
from retina_jax.config_io import override
from retina_jax.detector import padded_batch
from retina_jax.errors import WeightsError
from retina_jax.model.resnet import ARCHITECTURES, ResNet, block_layers
from retina_jax.ops.anchors import anchor_grid
from retina_jax.presets import PRESETS
from retina_jax.weights.converted import architecture, with_epsilon
from retina_jax.weights.torchvision import classes, convert_torchvision

GOLDEN = Path(__file__).parent / "golden"
SIZES, SEED, EVERY = [(61, 83), (90, 47)], 11, 7  # as in make_torchvision_golden.py


def golden(version: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns torchvision's outputs, and the state dict that produced them."""
    with np.load(GOLDEN / f"torchvision_{version}.npz") as file:
        stored = dict(file)
    shapes = {name: tuple(shape) for name, shape in json.loads(str(stored.pop("shapes"))).items()}
    return stored, drawn(shapes, SEED, spread=0.15 if version == "v1" else 0.6)


def write(path: Path, state: dict[str, np.ndarray]) -> None:
    kinds = {"f": "F32", "i": "I64"}
    path.write_bytes(safetensors({name: (kinds[array.dtype.kind], array) for name, array in state.items()}))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_raw_images_give_torchvisions_logits_anchors_and_detections(version: str, tmp_path: Path) -> None:
    stored, state = golden(version)
    write(tmp_path / "weights", state)
    detector = load_detector(f"torchvision:{tmp_path / 'weights'}", short_side=64, long_side=110)
    images = photographs(SIZES, SEED)

    batch = padded_batch(images, detector.config.data, 2)
    assert batch.images.dtype == np.float32
    logits, deltas = jax.jit(detector.driver.model.apply)(detector.variables, batch.images, batch.image_sizes)
    np.testing.assert_allclose(logits[:, ::EVERY], stored["logits"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(deltas[:, ::EVERY], stored["deltas"], atol=1e-4, rtol=0)
    grid = anchor_grid(batch.images.shape[1:3], detector.config.anchors, detector.config.model)
    np.testing.assert_array_equal(grid[::EVERY], stored["anchors"])

    for number, found in enumerate(detector.detect(images, batch_size=2)):
        boxes = stored[f"boxes{number}"]
        solid = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)  # torchvision returns boxes outside the image, without area
        boxes, scores, labels = boxes[solid], *(stored[f"{key}{number}"][solid] for key in ("scores", "labels"))
        assert len(found.scores) == len(scores) > 200
        np.testing.assert_allclose(found.scores, scores, atol=1e-5, rtol=0)
        # Neighbours with equal scores may be swapped.
        same = (found.labels == labels) & (abs(found.boxes_xyxy - boxes).max(1) <= 0.01)
        assert same.mean() > 0.97
        assert found.class_names == tuple(f"class {label}" for label in found.labels)


def test_state_dicts_from_before_torchvision_0_13_are_read() -> None:
    _, state = golden("v1")
    new = convert_torchvision(state)
    old_names = {}
    for name, array in state.items():
        parts = name.replace("_blocks.0.0.", "_blocks.0.").replace("_blocks.1.0.", "_blocks.1.")
        parts = parts.replace("_blocks.2.0.", "_blocks.2.").split(".")
        if parts[0] == "head" and parts[2] == "conv":
            parts[3:5] = [str(2 * int(parts[3]))]
        old_names[".".join(parts)] = array
    assert old_names.keys() != state.keys()
    old = convert_torchvision(old_names)
    assert old.weights.keys() == new.weights.keys()
    assert all(np.array_equal(old.weights[path], new.weights[path]) for path in new.weights)


def test_the_config_comes_with_the_weights() -> None:
    for version, p6_from, norm, loss in (("v1", "p5", "none", "l1"), ("v2", "c5", "group", "giou")):
        config = override(Config(), convert_torchvision(golden(version)[1]).changes)
        assert config.model.stage_blocks == (1, 1, 1, 1) and config.model.backbone == "resnet50"
        assert (config.model.p6_from, config.model.head_norm, config.loss.box) == (p6_from, norm, loss)
        assert (config.anchors.style, config.detection.max_detections) == ("torchvision", 300)
        assert (config.data.size_rounding, config.data.pixels, config.data.buckets) == ("floor", "float32", 0)
        assert config.model.num_classes is None and config.data.jitter_short_sides == ()
        unchanged = {
            k: v for k, v in PRESETS[f"torchvision_{version}"].items() if not k.startswith(("model.", "data.jitter"))
        }
        assert config == override(config, unchanged)


def test_another_epsilon_is_folded_into_the_scale_exactly() -> None:
    rng = np.random.default_rng(0)
    var = np.array([1.0, 1e-3, 1e-5, 1e-9, 4e-12], np.float32)
    weights = {"n/scale": rng.standard_normal(5).astype(np.float32), "n/var": var}
    for eps in (0.0, 1e-3):
        made = with_epsilon(weights, eps)
        expected = weights["n/scale"] / np.sqrt(var.astype(np.float64) + eps)
        np.testing.assert_allclose(made["n/scale"] / np.sqrt(var.astype(np.float64) + 1e-5), expected, rtol=1e-6)
    assert with_epsilon(weights, 1e-5)["n/scale"] is weights["n/scale"]
    with pytest.raises(WeightsError, match=r"n/var: a variance of 0"):
        with_epsilon({"n/scale": var, "n/var": 0 * var}, 0.0)


def test_all_91_columns_stay_and_are_named_by_their_category_id() -> None:
    names, ids = classes(91, (), "x")
    assert ids == tuple(range(91)) and len(set(names)) == 91
    assert (names[0], names[1], names[12], names[13], names[90]) == (
        "__background__", "person", "N/A 12", "stop sign", "toothbrush",
    )  # fmt: skip
    assert classes(3, ("cat", "dog"), "x")[0] == ("__background__", "cat", "dog")
    assert classes(2, ("cat", "dog"), "x") == (("cat", "dog"), (0, 1))
    with pytest.raises(WeightsError, match=r"x: 5 class outputs, but 2 class names; give 5 or 4"):
        classes(5, ("cat", "dog"), "x")


def test_a_renamed_a_missing_and_a_duplicate_tensor_are_named(tmp_path: Path) -> None:
    _, state = golden("v1")
    renamed_one = {("head.typo" if name == "backbone.body.conv1.weight" else name): a for name, a in state.items()}
    with pytest.raises(WeightsError, match=r"^w: 1 of unknown name: head\.typo$"):
        convert_torchvision(renamed_one, source="w")
    doubled = {**state, "conv1.weight": state["backbone.body.conv1.weight"]}
    with pytest.raises(WeightsError, match=r"1 duplicate: conv1\.weight"):
        convert_torchvision(doubled, source="w")
    path = tmp_path / "weights"
    write(path, {n: a for n, a in state.items() if n != "backbone.body.layer3.0.bn2.running_mean"})
    with pytest.raises(WeightsError, match=r"1 missing: backbone/c4/block1/norm2/mean"):
        load_detector(f"torchvision:{path}")
    with pytest.raises(WeightsError, match=r"has no stem convolution"):
        convert_torchvision({"fc.weight": np.zeros((2, 2), np.float32)})


@pytest.mark.parametrize(("backbone", "width"), [*((name, 64) for name in ARCHITECTURES), ("resnext50_32x4d", 16)])
def test_a_backbone_is_recognised_by_the_shapes_of_its_kernels(backbone: str, width: int) -> None:
    model = ModelConfig(backbone=backbone, base_width=width)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    leaves = flatten_dict(jax.eval_shape(ResNet(model).init, jax.random.key(0), images)["frozen"], sep="/")
    weights = {f"backbone/{path}": np.broadcast_to(np.float32(0), leaf.shape) for path, leaf in leaves.items()}
    found = override(Config(), architecture(weights, "file")).model
    layers = [block_layers(config, width, 2) for config in (model, found)]
    assert found.backbone == backbone and layers[0] == layers[1] and found.base_width == width
    assert ARCHITECTURES[found.backbone].blocks == ARCHITECTURES[backbone].blocks and found.stage_blocks == ()
    weights["backbone/c2/block1/conv2/kernel"] = np.zeros((3, 3, 5, 5 * width), np.float32)
    with pytest.raises(
        WeightsError, match=rf"file: 3x3 convolutions of {5 * width} channels in groups of 5 .*resnet50"
    ):
        architecture(weights, "file")
