"""The outputs equal torchvision's, computed live: pytest -m parity. Weights are drawn by `recipes`, saved by torch,
read without it."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recipes import photographs
from weight_files import flat

from retina_jax import cpu, load_detector
from retina_jax.config import Config
from retina_jax.config_io import override
from retina_jax.data.transforms import to_padded_pixels
from retina_jax.detector import Detector, ImageDetections, padded_batch
from retina_jax.model.resnet import ResNet
from retina_jax.ops.anchors import anchor_grid
from retina_jax.training.parallel import Driver
from retina_jax.training.state import state_from
from retina_jax.training.step import Inputs, train_step
from retina_jax.weights.converted import renamed
from retina_jax.weights.importing import convert_backbone, fill
from retina_jax.weights.named import NAMED
from retina_jax.weights.torchvision import RULES

# conftest loads them if parity tests are selected: torch must come before TensorFlow.
if "torchvision" not in sys.modules:
    pytest.skip("needs torchvision, and pytest -m parity", allow_module_level=True)
torch, torchvision = sys.modules["torch"], sys.modules["torchvision"]
detection = torchvision.models.detection
from torchvision.ops._utils import split_normalization_params  # noqa: E402
from torchvision_models import load_drawn, small_model  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

SIDES = {"min_size": 160, "max_size": 270}
SIZES = [(151, 202), (240, 171), (97, 190)]


def foreign(version: str, classes: int, seed: int) -> Any:
    """Returns torchvision's model with drawn weights."""
    build = {"v1": detection.retinanet_resnet50_fpn, "v2": detection.retinanet_resnet50_fpn_v2}[version]
    model = build(weights=None, weights_backbone=None, num_classes=classes, **SIDES)
    return load_drawn(model, seed, spread=0.15 if version == "v1" else 0.6)


def saved(model: Any, folder: Path) -> str:
    torch.save(model.state_dict(), folder / "weights.pth")
    return f"torchvision:{folder / 'weights.pth'}"


def tensors(images: list[np.ndarray]) -> list[Any]:
    return [torch.from_numpy(image).permute(2, 0, 1).float() / 255 for image in images]


def forward(detector: Detector, images: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    batch = padded_batch(images, detector.config.data, len(images))
    apply = jax.jit(lambda variables, *inputs: detector.driver.model.apply(variables, *inputs))
    logits, deltas = apply(detector.variables, batch.images, batch.image_sizes)
    return np.asarray(logits), np.asarray(deltas), batch.images.shape[1:3]


def assert_same_detections(ours: list[ImageDetections], theirs: list[dict[str, Any]]) -> None:
    """Asserts that detections match one to one: the same label, the score within 1e-5, the box within 0.01 pixels. Both
    lists are sorted by score, so the order is the same too, except for neighbours whose scores differ by less than
    that."""
    for mine, other in zip(ours, theirs, strict=True):
        solid = (other["boxes"][:, 2:] > other["boxes"][:, :2]).all(dim=1)  # torchvision keeps boxes without area
        boxes, scores, labels = (other[key][solid].numpy() for key in ("boxes", "scores", "labels"))
        assert len(mine.labels) == len(labels)
        assert (np.diff(mine.scores) <= 0).all()
        free = np.ones(len(labels), bool)
        for box, score, label in zip(mine.boxes_xyxy, mine.scores, mine.labels, strict=True):
            same = free & (labels == label) & (abs(scores - score) <= 1e-5) & (abs(boxes - box).max(1) <= 0.01)
            assert same.any(), f"label {label}, score {score}, box {box} has no counterpart"
            free[np.flatnonzero(same)[0]] = False


@pytest.mark.parametrize(
    ("version", "classes", "seed"),
    [("v1", 7, 0), ("v1", 80, 1), ("v1", 91, 2), ("v2", 7, 3), ("v2", 80, 4), ("v2", 91, 5)],
)
def test_a_batch_of_unequal_images_gives_torchvisions_outputs_anchors_and_detections(
    version: str, classes: int, seed: int, tmp_path: Path
) -> None:
    model, images = foreign(version, classes, seed), photographs(SIZES, seed)
    seen: dict[str, Any] = {}
    model.head.register_forward_hook(lambda _, __, out: seen.update(out))
    model.anchor_generator.register_forward_hook(lambda _, __, out: seen.update(anchors=out))
    with torch.no_grad():
        alone = model(tensors(images[:1]))
        theirs = model(tensors(images))

    detector = load_detector(saved(model, tmp_path), short_side=160, long_side=270)
    assert len(detector.class_names) == classes
    logits, deltas, padded_hw = forward(detector, images)
    np.testing.assert_allclose(logits, seen["cls_logits"].numpy(), atol=1e-4, rtol=0)
    np.testing.assert_allclose(deltas, seen["bbox_regression"].numpy(), atol=1e-4, rtol=0)
    np.testing.assert_array_equal(
        anchor_grid(padded_hw, detector.config.anchors, detector.config.model), seen["anchors"][0].numpy()
    )
    assert all(len(image["labels"]) > 20 for image in theirs)
    assert_same_detections(detector.detect(images, batch_size=len(images)), theirs)
    assert_same_detections(detector.detect(images[:1]), alone)


def test_the_published_v1_weights_add_no_epsilon_to_a_variance(tmp_path: Path) -> None:
    """torchvision sets eps 0 only for these weights; here the difference is folded into the scales."""
    model, images = small_model("v1", 7, 6, **SIDES), photographs(SIZES[:1], 6)
    for module in model.modules():
        if isinstance(module, torchvision.ops.misc.FrozenBatchNorm2d):
            module.running_var *= 1e-3  # the epsilon matters
            module.weight *= 0.03
            module.eps = 0.0
    with torch.no_grad():
        theirs = model(tensors(images))
    source = saved(model, tmp_path)
    exact = load_detector(source, short_side=160, long_side=270, batchnorm_eps=0.0)
    assert_same_detections(exact.detect(images), theirs)
    (off,) = load_detector(source, short_side=160, long_side=270).detect(images)
    assert not np.allclose(off.scores[:10], theirs[0]["scores"][:10], atol=1e-3)


@pytest.mark.parametrize(("version", "rate"), [("v1", 1e-5), ("v2", 1e-3)])
def test_loss_gradients_and_five_steps_of_sgd_are_torchvisions(version: str, rate: float, tmp_path: Path) -> None:
    """With some seeds an activation is so near 0 that rounding, which differs between processors, decides ReLU's gradient.
    All seeds must agree roughly, and one of four to these tolerances."""
    found = []
    for seed in range(7, 11):
        found.append(differences_of_five_steps(version, rate, seed, tmp_path))
        values = np.array([value for value, _ in found[-1]])
        if (values <= (1e-4, 1e-3, 5e-3)).all():
            return
        assert (values <= (1e-2, 0.1, 0.1)).all(), found
    raise AssertionError(f"losses, gradients and updates of four seeds differ by {found}")


def differences_of_five_steps(version: str, rate: float, seed: int, folder: Path) -> list[tuple[float, str]]:
    """Returns the largest relative differences to torchvision, with their places: of five steps' losses, the first
    gradients, and the updates of the parameters. The first losses must agree: no gradient is in them."""
    model, images = small_model(version, 5, seed, **SIDES), photographs(SIZES, seed)
    boxes = [
        np.array([[10, 20, 80, 90], [100, 30, 190, 140], [40, 60, 70, 75]], np.float32),
        np.array([[20, 20, 150, 200]], np.float32),
        np.zeros((0, 4), np.float32),  # an image without objects
    ]
    labels = [np.array([1, 4, 2]), np.array([0]), np.zeros(0, int)]

    detector = load_detector(saved(model, folder), short_side=160, long_side=270)
    changes = {
        "data.batch_size": 3,
        "data.max_boxes": 4,
        "optimizer.name": "sgd",
        "optimizer.learning_rate": rate,
        "optimizer.weight_decay": 1e-3,
        "optimizer.decay_biases": True,
        "optimizer.warmup_steps": 0,
    }
    driver = Driver(override(detector.config, changes), 5)
    batch = padded_batch(images, driver.config.data, 3)
    for row, (of_image, classes) in enumerate(zip(boxes, labels, strict=True)):
        batch.boxes_xyxy[row, : len(classes)] = to_padded_pixels(of_image, batch.scales[row], "half_open")
        batch.labels[row, : len(classes)] = classes
    inputs = Inputs(batch.images, batch.image_sizes, batch.boxes_xyxy, batch.labels, batch.valid)
    recorder = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda gradients, _, __=None: (gradients, gradients)
    )
    optimizer = optax.chain(recorder, driver.optimizer)
    step = partial(train_step, model=driver.model, config=driver.config, schedule=driver.schedule, num_devices=1)
    step = jax.jit(partial(step, optimizer=optimizer))
    state = state_from(jax.device_get(detector.variables), optimizer)

    # Frozen layers of torchvision still normalise by their batch; here they do not.
    model.train()
    model.backbone.body.bn1.eval()
    model.backbone.body.layer1.eval()
    # As in torchvision's recipes, normalisation parameters do not decay.
    of_norms, others = (
        [parameter for parameter in group if parameter.requires_grad] for group in split_normalization_params(model)
    )
    groups = [{"params": of_norms, "weight_decay": 0.0}, {"params": others}]
    sgd = torch.optim.SGD([group for group in groups if group["params"]], lr=rate, momentum=0.9, weight_decay=1e-3)
    targets = [
        {"boxes": torch.from_numpy(b), "labels": torch.from_numpy(c)} for b, c in zip(boxes, labels, strict=True)
    ]
    start = {path: array.copy() for path, array in flat({"params": state.params}).items()}
    of_losses = []
    for number in range(5):
        with cpu.kernels("cpu"):  # as the driver traces it
            state, metrics = step(state, inputs)
        losses = model(tensors(images), [dict(target) for target in targets])
        for name, of_torch in (("classification_loss", "classification"), ("box_loss", "bbox_regression")):
            loss = losses[of_torch].item()
            of_losses.append(abs(float(metrics[name]) - loss) / loss)
        np.testing.assert_array_less(of_losses[:2], 1e-4)
        sgd.zero_grad()
        sum(losses.values()).backward()
        if number == 0:
            gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.requires_grad}
            of_gradients = largest(flat({"params": state.opt_state[0]}), renamed(gradients, RULES, "gradients"))
        sgd.step()
    ends = {name: p.detach().numpy() for name, p in model.named_parameters() if p.requires_grad}
    theirs = {path: array - start[path] for path, array in renamed(ends, RULES, "parameters").items()}
    ours = {path: array - start[path] for path, array in flat({"params": state.params}).items()}
    return [(float(np.max(of_losses)), "losses"), of_gradients, largest(ours, theirs)]


def largest(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> tuple[float, str]:
    """Returns the largest quotient, over all arrays, of the norms of the difference and of the array, with its path; NaN if
    one is NaN."""
    assert ours.keys() == theirs.keys()
    paths = list(theirs)
    quotients = [np.linalg.norm(ours[path] - theirs[path]) / np.linalg.norm(theirs[path]) for path in paths]
    place = int(np.argmax(quotients))
    return float(quotients[place]), paths[place]


def test_published_files_are_those_of_torchvision() -> None:
    urls = {
        weights.url
        for name in torchvision.models.list_models()
        for weights in torchvision.models.get_model_weights(name)
    }
    ours = {named.url for (kind, _), named in NAMED.items() if kind == "torchvision"}
    assert len(ours) == 9 and ours <= urls


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "resnext101_32x8d"]
)
def test_imagenet_backbones_give_torchvisions_maps(name: str) -> None:
    model = getattr(torchvision.models, name)(weights=None)
    load_drawn(model, 8, spread=1.0)
    state = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    converted = convert_backbone(state, source=name)
    config = override(Config(), {**converted.changes, "model.frozen_stages": 5, "model.min_level": 2})
    assert config.model.backbone == name
    variables, missing = fill(
        {
            "frozen": {
                "backbone": jax.eval_shape(ResNet(config.model).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))[
                    "frozen"
                ]
            }
        },
        converted.weights,
        source=name,
    )
    assert not missing
    x = np.random.default_rng(0).standard_normal((1, 75, 66, 3)).astype(np.float32)
    ours = jax.jit(ResNet(config.model).apply)({"frozen": variables["frozen"]["backbone"]}, x)
    with torch.no_grad():
        y = model.maxpool(model.relu(model.bn1(model.conv1(torch.from_numpy(x.transpose(0, 3, 1, 2))))))
        for stage, mine in zip((model.layer1, model.layer2, model.layer3, model.layer4), ours, strict=True):
            y = stage(y)
            np.testing.assert_allclose(mine, y.numpy().transpose(0, 2, 3, 1), atol=1e-4 * float(y.abs().max()))
