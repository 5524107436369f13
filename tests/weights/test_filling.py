"""Filling a network: every leaf is accounted for, and what does not fit is all named at once."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from retina_jax.config import ModelConfig
from retina_jax.errors import WeightsError
from retina_jax.model.initialisation import initialise
from retina_jax.model.retinanet import RetinaNet
from retina_jax.weights.converted import MOST_NAMES
from retina_jax.weights.importing import fill

CONFIG = ModelConfig(backbone="resnet18", base_width=4, fpn_channels=8, head_convs=1, head_channels=8)


@pytest.fixture(scope="module")
def template() -> dict:
    """A small network whose stem and C2 are frozen."""
    return initialise(RetinaNet(CONFIG, num_classes=3, anchors_per_cell=9), seed=0)


@pytest.fixture
def weights(template: dict) -> dict[str, np.ndarray]:
    """Other values for every leaf, of mixed precision."""
    generator = np.random.default_rng(1)
    leaves = [(path, leaf) for tree in template.values() for path, leaf in flatten_dict(tree, sep="/").items()]
    return {
        path: generator.standard_normal(leaf.shape).astype(np.float16 if i % 2 else np.float64)
        for i, (path, leaf) in enumerate(leaves)
    }


def test_every_leaf_takes_its_weight_in_either_collection(template: dict, weights: dict[str, np.ndarray]) -> None:
    filled, kept = fill(template, weights, source="file.pth")
    assert kept == [] and jax.tree.structure(filled) == jax.tree.structure(template)
    seen = set()
    for collection in ("params", "frozen"):
        leaves = flatten_dict(filled[collection], sep="/")
        assert leaves
        for path, leaf in leaves.items():
            assert leaf.dtype == np.float32 and np.array_equal(leaf, weights[path].astype(np.float32))
        seen |= leaves.keys()
    assert seen == weights.keys() and filled["stats"] == {}


def test_a_filled_network_does_not_share_memory_with_the_template(
    template: dict, weights: dict[str, np.ndarray]
) -> None:
    before = jax.tree.map(np.copy, template)
    fill(template, weights, source="file.pth")
    jax.tree.map(np.testing.assert_array_equal, template, before)


def test_all_that_does_not_fit_is_named_in_one_line(template: dict, weights: dict[str, np.ndarray]) -> None:
    del weights["fpn/output6/bias"], weights["backbone/stem/conv/kernel"]
    weights["fpn/output9/bias"] = np.zeros(8)
    weights["box_head/output/kernel"] = np.zeros((3, 3, 8, 4))
    weights["box_head/output/bias"] = np.zeros(36, np.int64)
    with pytest.raises(WeightsError) as caught:
        fill(template, weights, source="file.pth")
    message = str(caught.value)
    assert message.startswith(
        "file.pth: 2 missing: backbone/stem/conv/kernel, fpn/output6/bias; 1 surplus: fpn/output9/bias"
    )
    assert "box_head/output/bias is int64, expected float32" in message
    assert "box_head/output/kernel is (3, 3, 8, 4), expected (3, 3, 8, 36)" in message and "--allow-missing" in message


def test_many_missing_are_named_up_to_ten_and_counted(template: dict) -> None:
    with pytest.raises(WeightsError) as caught:
        fill(template, {}, source="file.pth")
    names = [path for tree in template.values() for path in flatten_dict(tree, sep="/")]
    message = str(caught.value)
    assert message.startswith(f"file.pth: {len(names)} missing: ") and f"and {len(names) - MOST_NAMES} more" in message
    assert sum(f" {path}" in message for path in names) == MOST_NAMES and "\n" not in message


def test_what_may_be_missing_keeps_its_start_and_is_listed(template: dict, weights: dict[str, np.ndarray]) -> None:
    gone = {path for path in weights if path.startswith("class_head/")} | {"backbone/c5/block2/conv2/kernel"}
    for path in gone:
        del weights[path]
    allowed = ["class_head", "backbone/c5/block2/"]
    filled, kept = fill(template, weights, source="file.pth", allow_missing=allowed)
    assert kept == sorted(gone)
    leaves, start = flatten_dict(filled["params"], sep="/"), flatten_dict(template["params"], sep="/")
    assert all(np.array_equal(leaves[path], start[path]) for path in gone)
    present = "backbone/c5/block2/conv1/kernel"  # allowed to be missing, but there
    assert np.array_equal(leaves[present], weights[present].astype(np.float32))


def test_an_allowed_part_is_complete_components_of_a_path(weights: dict[str, np.ndarray], template: dict) -> None:
    del weights["fpn/output6/bias"]
    with pytest.raises(
        WeightsError, match=r"missing: fpn/output6/bias; 1 allowed to be missing, but not part .*: fpn/out"
    ):
        fill(template, weights, source="file.pth", allow_missing=["fpn/out"])


def test_what_may_be_missing_is_still_checked_where_it_is_there(template: dict, weights: dict[str, np.ndarray]) -> None:
    weights["class_head/output/bias"] = np.zeros(91 * 9)
    with pytest.raises(WeightsError, match=r"class_head/output/bias is \(819,\), expected \(27,\)"):
        fill(template, weights, source="file.pth", allow_missing=["class_head"])
