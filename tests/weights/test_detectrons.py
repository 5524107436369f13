"""Detectron's and detectron2's weights, by the names in their files, and their anchors to the last bit."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from retina_jax.config import AnchorConfig, Config, ConfigError, MatchingConfig, ModelConfig
from retina_jax.config_io import override
from retina_jax.data.classes import COCO_CATEGORIES
from retina_jax.errors import WeightsError
from retina_jax.model.initialisation import initialise
from retina_jax.model.layers import Norm
from retina_jax.model.retinanet import RetinaNet
from retina_jax.ops.anchors import anchor_grid
from retina_jax.ops.matching import BACKGROUND, IGNORED, match
from retina_jax.weights.converted import Converted
from retina_jax.weights.detectron import convert_detectron, convert_detectron2
from retina_jax.weights.importing import with_backbone

BLOCKS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3), "resnext101_32x8d": (3, 4, 23, 3)}


def convolutions(backbone: str, classes: int) -> dict[str, tuple[int, int, int]]:
    """Returns (out, in, side) of every convolution of a RetinaNet, under a neutral name."""
    made = {"stem": (64, 3, 7)}
    before = 64
    for stage, count in enumerate(BLOCKS[backbone], start=2):
        out = 64 * 2**stage
        inner = out // 4 * (4 if backbone.startswith("resnext") else 1)
        groups = 32 if backbone.startswith("resnext") else 1
        for block in range(count):
            made[f"{stage}.{block}.1"] = (inner, before, 1)
            made[f"{stage}.{block}.2"] = (inner, inner // groups, 3)
            made[f"{stage}.{block}.3"] = (out, inner, 1)
            if block == 0:
                made[f"{stage}.{block}.shortcut"] = (out, before, 1)
            before = out
    for level in (3, 4, 5):
        made[f"lateral{level}"], made[f"output{level}"] = (256, 64 * 2**level, 1), (256, 256, 3)
    made["output6"], made["output7"] = (256, 2048, 3), (256, 256, 3)
    for head, outputs in (("cls", classes), ("bbox", 4)):
        made |= {f"{head}.{n}": (256, 256, 3) for n in range(4)} | {f"{head}.last": (9 * outputs, 256, 3)}
    return made


def detectron_blobs(backbone: str, classes: int = 80, *, heads: bool = True) -> dict[str, np.ndarray]:
    """Returns blobs as Detectron saves them; each tensor has its own value."""
    last = {stage: count - 1 for stage, count in enumerate(BLOCKS[backbone], start=2)}
    branch = {"1": "branch2a", "2": "branch2b", "3": "branch2c", "shortcut": "branch1"}
    blobs: dict[str, np.ndarray] = {}
    for number, (name, (out, inputs, side)) in enumerate(convolutions(backbone, classes).items()):
        kernel = np.full((out, inputs, side, side), number, np.float32)
        vector = np.full(out, 0.5 + number, np.float32)
        parts = name.split(".")
        if name == "stem":
            blobs |= {"conv1_w": kernel, "res_conv1_bn_s": vector, "res_conv1_bn_b": -vector}
        elif parts[0].isdigit():
            stem = f"res{parts[0]}_{parts[1]}_{branch[parts[2]]}"
            blobs |= {f"{stem}_w": kernel, f"{stem}_bn_s": vector, f"{stem}_bn_b": -vector}
        elif heads:
            if name.startswith("lateral"):
                stage = int(name[-1])
                stem = f"fpn_inner_res{stage}_{last[stage]}_sum" + ("" if stage == 5 else "_lateral")
            elif name.startswith("output"):
                stem = f"fpn_{name[-1]}" if name[-1] in "67" else f"fpn_res{name[-1]}_{last[int(name[-1])]}_sum"
            else:
                stem = f"retnet_{parts[0]}_" + ("pred_fpn3" if parts[1] == "last" else f"conv_n{parts[1]}_fpn3")
            blobs |= {f"{stem}_w": kernel, f"{stem}_b": vector}
    return blobs


def detectron2_state(backbone: str, classes: int = 80) -> dict[str, np.ndarray]:
    """Returns a state dict as detectron2 saves it."""
    state: dict[str, np.ndarray] = {"pixel_mean": np.zeros((3, 1, 1), np.float32)}
    for level in range(5):
        state[f"anchor_generator.cell_anchors.{level}"] = np.zeros((9, 4), np.float32)
    for number, (name, (out, inputs, side)) in enumerate(convolutions(backbone, classes).items()):
        kernel = np.full((out, inputs, side, side), number, np.float32)
        vector = np.full(out, 0.5 + number, np.float32)
        parts = name.split(".")
        if name == "stem" or parts[0].isdigit():
            layer = "shortcut" if parts[-1] == "shortcut" else f"conv{parts[-1]}"
            stem = "stem.conv1" if name == "stem" else f"res{parts[0]}.{parts[1]}.{layer}"
            norm = {"weight": vector, "bias": -vector, "running_mean": 0.1 * vector, "running_var": vector}
            state[f"backbone.bottom_up.{stem}.weight"] = kernel
            state |= {f"backbone.bottom_up.{stem}.norm.{leaf}": array for leaf, array in norm.items()}
            continue
        if name.startswith(("lateral", "output")):
            stem = f"backbone.top_block.p{name[-1]}" if name[-1] in "67" else f"backbone.fpn_{name}"
        elif parts[1] == "last":
            stem = "head.cls_score" if parts[0] == "cls" else "head.bbox_pred"
        else:
            stem = f"head.{parts[0]}_subnet.{2 * int(parts[1])}"
        state |= {f"{stem}.weight": kernel, f"{stem}.bias": vector}
    return state


def shapes_of(converted: Converted) -> dict[str, tuple[int, ...]]:
    """Returns the shapes that the network of the converted config requires."""
    config = override(Config(), converted.changes)
    model = RetinaNet(config.model, len(converted.class_names), 9)
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3), jnp.uint8), jnp.full((1, 2), 64, jnp.int32)
    )
    return {path: leaf.shape for tree in shapes.values() for path, leaf in flatten_dict(tree, sep="/").items()}


@pytest.mark.parametrize("backbone", ["resnet50", "resnet101", "resnext101_32x8d"])
def test_detectrons_blobs_fill_the_network(backbone: str) -> None:
    converted = convert_detectron(detectron_blobs(backbone) | {"lr": np.ones(1), "pred_w": np.ones((2, 2))})
    config = override(Config(), converted.changes)
    assert (config.model.backbone, config.model.stage_blocks, config.model.p6_from) == (backbone, (), "c5")
    assert config.model.stride_position == ("3x3" if backbone.startswith("resnext") else "1x1")
    assert (config.anchors.style, config.data.pad_multiple, config.data.box_ends) == ("detectron", 128, "inclusive")
    assert {path: array.shape for path, array in converted.weights.items()} == shapes_of(converted)
    assert converted.class_names == tuple(name for _, name in COCO_CATEGORIES)


@pytest.mark.parametrize("backbone", ["resnet50", "resnet101"])
def test_detectron2s_state_dict_fills_the_network(backbone: str) -> None:
    converted = convert_detectron2(detectron2_state(backbone))
    config = override(Config(), converted.changes)
    assert (config.model.backbone, config.model.stride_position, config.model.p6_from) == (backbone, "1x1", "c5")
    assert (config.anchors.style, config.data.resize, config.detection.clip) == ("detectron2", "pillow", "after_nms")
    assert {path: array.shape for path, array in converted.weights.items()} == shapes_of(converted)
    assert converted.category_ids[11:13] == (13, 14)


def test_both_formats_convert_a_tensor_to_the_same_parameter() -> None:
    """Both formats have values drawn from the same numbering of the convolutions."""
    one = convert_detectron(detectron_blobs("resnet50", 7)).weights
    two = convert_detectron2(detectron2_state("resnet50", 7)).weights
    assert one.keys() == two.keys()
    for path in one:
        if not path.endswith(("/mean", "/var")):
            np.testing.assert_array_equal(one[path], two[path], err_msg=path)
    order = [
        "backbone/stem/conv",
        "backbone/c2/block1/conv1",
        "backbone/c2/block1/shortcut",
        "fpn/lateral3",
        "fpn/output7",
    ]
    order += ["class_head/conv1", "class_head/conv4", "class_head/output", "box_head/conv1", "box_head/output"]
    values = [float(one[f"{path}/kernel"].flat[0]) for path in order]
    assert values == sorted(values) and len(set(values)) == len(values)


def test_a_folded_norm_becomes_its_affine_and_a_preceding_bias_is_kept() -> None:
    blobs = detectron_blobs("resnet50", heads=False)
    rng = np.random.default_rng(0)
    scale, shift, bias = rng.standard_normal((3, 64)).astype(np.float32)
    blobs |= {"res_conv1_bn_s": scale, "res_conv1_bn_b": shift, "conv1_b": bias}
    weights = convert_detectron(blobs).weights
    leaves = {leaf: weights[f"backbone/stem/norm/{leaf}"] for leaf in ("scale", "bias", "mean", "var")}
    x = rng.standard_normal((1, 2, 2, 64)).astype(np.float32)
    made = Norm("frozen").apply({"frozen": leaves}, jnp.asarray(x))
    np.testing.assert_allclose(
        made, scale[None, None, None] * (x + bias[None, None, None]) + shift[None, None, None], rtol=1e-5, atol=1e-6
    )
    assert "backbone/stem/conv/bias" not in weights


def test_a_backbone_file_has_no_classes() -> None:
    converted = convert_detectron(detectron_blobs("resnet101", heads=False) | {"fc1000_b": np.ones(3)})
    assert converted.class_names == () and converted.changes["model.backbone"] == "resnet101"
    assert all(path.startswith("backbone/") for path in converted.weights)


def test_the_msra_backbones_accept_the_pixels_of_both_detectrons_and_their_stride(tmp_path: Path) -> None:
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps({"blobs": detectron_blobs("resnet50", heads=False)}, 2))
    for change in ({"input_normalisation": "imagenet"}, {"stride_position": "3x3"}, {"norm": "group"}):
        model, field = ModelConfig(backbone_weights=str(path), **change), next(iter(change))
        with pytest.raises(
            ConfigError, match=rf"^model\.{field}: {change[field]}, but the weights in .*R-50\.pkl need "
        ):
            with_backbone({}, model)
    model = ModelConfig(backbone_weights=str(path), input_normalisation="detectron2")
    made, line = with_backbone(initialise(RetinaNet(model, 2, 9), 0), model)
    assert line == f"backbone: 265 arrays from {path}"
    assert made["frozen"]["backbone"]["c2"]["block1"]["conv1"]["kernel"].flat[0] == 1


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"^w: 1 of unknown name: kps_score_w$"):
        convert_detectron(detectron_blobs("resnet50") | {"kps_score_w": np.ones(3)}, source="w")
    with pytest.raises(WeightsError, match=r"^w: has 80 classes, but 1 class names are given$"):
        convert_detectron2(detectron2_state("resnet50"), source="w", class_names=["cat"])
    blobs = detectron_blobs("resnet50")
    blobs["retnet_bbox_pred_fpn3_b"] = np.ones(24, np.float32)
    with pytest.raises(WeightsError, match=r"^w: its box head has 24 outputs per cell; expected 36$"):
        convert_detectron(blobs, source="w")


def padded(size_hw: tuple[int, int], multiple: int) -> tuple[int, int]:
    return tuple(math.ceil(side / multiple) * multiple for side in size_hw)


@pytest.mark.parametrize("size", [(600, 1000), (800, 1333), (427, 640)])
def test_anchors_equal_detectron2s_to_the_last_bit(size: tuple[int, int]) -> None:
    """Its default generator has offset 0, sizes x, x 2^(1/3), x 2^(2/3) of x = 32 to 512, ratios 0.5, 1, 2, and sums in
    float32."""
    padded_hw = padded(size, 32)
    grids = []
    for level in range(3, 8):
        stride, cell = 2**level, []
        for octave in (1, 2 ** (1.0 / 3), 2 ** (2.0 / 3)):
            for ratio in (0.5, 1.0, 2.0):
                width = math.sqrt((4 * stride * octave) ** 2.0 / ratio)
                height = ratio * width
                cell.append([-width / 2.0, -height / 2.0, width / 2.0, height / 2.0])
        rows, columns = (-(-side // stride) for side in padded_hw)
        x, y = np.meshgrid(np.arange(columns, dtype=np.float32) * stride, np.arange(rows, dtype=np.float32) * stride)
        shifts = np.stack([x.ravel(), y.ravel(), x.ravel(), y.ravel()], axis=1)
        grids.append((shifts[:, None] + np.array(cell).astype(np.float32)[None]).reshape(-1, 4))
    ours = anchor_grid(padded_hw, AnchorConfig(style="detectron2"), ModelConfig())
    np.testing.assert_array_equal(ours, np.concatenate(grids))


def test_anchors_equal_the_example_of_detectron2() -> None:
    config = AnchorConfig(style="detectron2", size_factor=8.0, scales=(1.0, 2.0), ratios=(0.25, 1.0, 4.0))
    # Its test has sizes 32 and 64 at stride 4 on a feature map of 1 x 2; P2 is the level of that stride.
    grid = anchor_grid((4, 8), config, ModelConfig(min_level=2, max_level=5))[:12]
    expected = [
        [-32, -8, 32, 8], [-16, -16, 16, 16], [-8, -32, 8, 32], [-64, -16, 64, 16], [-32, -32, 32, 32], [-16, -64, 16, 64],
        [-28, -8, 36, 8], [-12, -16, 20, 16], [-4, -32, 12, 32], [-60, -16, 68, 16], [-28, -32, 36, 32], [-12, -64, 20, 64],
    ]  # fmt: skip
    np.testing.assert_array_equal(grid, np.array(expected, np.float32))


@pytest.mark.parametrize("size", [(600, 1000), (800, 1333), (427, 640)])
def test_anchors_equal_detectrons_to_the_last_bit(size: tuple[int, int]) -> None:
    """Its boxes have inclusive ends, computed in float64 around the window (0, 0, stride - 1, stride - 1)."""
    padded_hw = padded(size, 128)
    grids = []
    for level in range(3, 8):
        stride, cell = 2.0**level, []
        for octave in range(3):
            for ratio in (1.0, 2.0, 0.5):
                width = np.round(np.sqrt(stride * stride / ratio))
                height = np.round(width * ratio)
                factor = (stride * 2 ** (octave / 3.0) * 4) / stride
                centre, width, height = 0.5 * (stride - 1), width * factor, height * factor
                low = [centre - 0.5 * (width - 1), centre - 0.5 * (height - 1)]
                cell.append([*low, centre + 0.5 * (width - 1), centre + 0.5 * (height - 1)])
        rows, columns = (int(side // stride) for side in padded_hw)
        x, y = np.meshgrid(np.arange(columns) * stride, np.arange(rows) * stride)
        shifts = np.stack([x.ravel(), y.ravel(), x.ravel(), y.ravel()], axis=1)
        grids.append((shifts[:, None] + np.array(cell)[None]).reshape(-1, 4))
    inclusive = np.concatenate(grids)
    ours = anchor_grid(padded_hw, AnchorConfig(style="detectron"), ModelConfig())
    # Ends are half-open here: an inclusive end + 1.
    np.testing.assert_array_equal(ours, (inclusive + np.array([[0, 0, 1, 1]])).astype(np.float32))


def test_matching_equals_the_example_of_detectron2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its test gives the IoU of three boxes with four anchors, thresholds 0.3 and 0.7, and every box keeps its best
    anchor."""
    quality = jnp.array([[0.15, 0.45, 0.2, 0.6], [0.3, 0.65, 0.05, 0.1], [0.05, 0.4, 0.25, 0.4]])
    # The first coordinate of a box is the number of its row.
    rows = jnp.pad(quality[:, None], ((0, 0), (0, 7), (0, 124)))  # as `match` arranges the anchors
    monkeypatch.setattr("retina_jax.ops.matching.iou", lambda _, box: rows[box[0].astype(int)])
    boxes = jnp.zeros((3, 4)).at[:, 0].set(jnp.arange(3.0))
    config = MatchingConfig(positive_iou=0.7, negative_iou=0.3, low_quality="all")
    matches = match(jnp.zeros((4, 4)), boxes, jnp.array([10, 11, 12], jnp.int32), config)
    assert matches.labels.tolist() == [IGNORED, 11, BACKGROUND, 10]
    assert matches.box_index.tolist() == [1, 1, 2, 0]
