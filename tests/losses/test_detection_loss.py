"""The loss of an image equals that of float64 NumPy, and the four normalisers equal their definitions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from retina_jax.config import ConfigError, LossConfig, MatchingConfig
from retina_jax.losses.focal import classification_loss
from retina_jax.losses.mining import mine
from retina_jax.losses.total import EMA_START, ImageLosses, denominator, image_losses, image_weights
from retina_jax.ops.matching import BACKGROUND, IGNORED, match

SCOPES = ("global", "per_image", "per_device", "ema")
B, A, G, K = 3, 12, 4, 3


def small_case() -> dict[str, jax.Array]:
    """Returns three images with two boxes, one box and none. Anchors are slightly shifted boxes, so that all three
    labels occur."""
    rng = np.random.default_rng(7)
    corner = rng.uniform(0, 60, (A, 2))
    anchors = np.concatenate([corner, corner + rng.uniform(12, 30, (A, 2))], axis=1).astype(np.float32)
    boxes, labels = np.zeros((B, G, 4), np.float32), np.full((B, G), -1, np.int32)
    boxes[0, 0], labels[0, 0] = anchors[2] + [1, 0, 2, 1], 1
    boxes[0, 1], labels[0, 1] = anchors[5] + [-8, 0, 3, 0], 2
    boxes[1, 2], labels[1, 2] = anchors[9] + [0, 2, 1, -1], 0
    return {
        "logits": jnp.asarray(rng.normal(-1, 2, (B, A, K)), jnp.float32),
        "deltas": jnp.asarray(rng.normal(0, 0.5, (B, A, 4)), jnp.float32),
        "anchors": jnp.asarray(anchors),
        "boxes_xyxy": jnp.asarray(boxes),
        "labels": jnp.asarray(labels),
    }


def losses_of(logits: jax.Array, deltas: jax.Array, **others: object) -> ImageLosses:
    """Computes the losses of two levels, whose outputs follow each other in `logits` and `deltas`."""
    cut = logits.shape[1] // 3
    return image_losses(*([x[:, :cut], x[:, cut:]] for x in (logits, deltas)), **others)


@functools.cache
def compiled(box: str) -> jax.stages.Wrapped:
    return jax.jit(
        lambda case: losses_of(**case, matching=MatchingConfig(), loss=LossConfig(box=box)),
    )


@functools.cache
def compiled_gradient(box: str) -> jax.stages.Wrapped:
    """Returns gradients of the summed losses with respect to logits and deltas."""

    def total(outputs: tuple[jax.Array, jax.Array], case: dict[str, jax.Array]) -> jax.Array:
        sums = compiled(box)({**case, "logits": outputs[0], "deltas": outputs[1]})
        return sums.classification.sum() + sums.box.sum()

    return jax.jit(lambda case: jax.grad(total)((case["logits"], case["deltas"]), case))


def losses(case: dict[str, jax.Array], box: str = "smooth_l1") -> ImageLosses:
    return ImageLosses(*(np.asarray(sums) for sums in compiled(box)(case)))


@pytest.mark.parametrize("box", ["smooth_l1", "giou"])
def test_image_without_boxes_is_all_background_with_finite_gradients(box: str) -> None:
    case = small_case()
    case["labels"] = jnp.full((B, G), -1, jnp.int32)
    result = losses(case, box)
    np.testing.assert_array_equal(result.box, np.zeros(B))
    np.testing.assert_array_equal(result.positives, np.zeros(B))
    assert (result.classification > 0).all()
    to_logits, to_deltas = compiled_gradient(box)(case)
    assert (np.asarray(to_logits) > 0).all()  # the logit of every class of every anchor is lowered
    np.testing.assert_array_equal(to_deltas, np.zeros((B, A, 4)))


def test_the_loss_of_an_image_does_not_depend_on_the_other_images() -> None:
    case = small_case()
    together = losses(case)
    for i in range(B):
        # The others are overwritten with copies of the first image.
        others = jnp.array([i if j == i else 0 for j in range(B)])
        alone = losses({name: x if name == "anchors" else x[others] for name, x in case.items()})
        for all_images, changed in zip(together, alone, strict=True):
            assert all_images[i] == changed[i]


N = np.array([3.0, 0.0, 5.0, 1.0, 0.0, 0.0, 2.0, 9.0])  # positive anchors of 8 images
L = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])  # and their losses


def total_loss(scope: str, num_microbatches: int, ema: float = EMA_START) -> float:
    weights = image_weights(jnp.asarray(N, jnp.float32), scope, batch_size=8, num_microbatches=num_microbatches)
    by, _ = denominator(jnp.float32(N.sum()), scope, jnp.float32(ema), num_microbatches=num_microbatches)
    return float((weights * jnp.asarray(L, jnp.float32)).sum() / by)


def test_global_divides_by_all_positives() -> None:
    assert total_loss("global", num_microbatches=4) == pytest.approx(L.sum() / N.sum())


def test_per_image_is_the_mean_of_the_images_ratios() -> None:
    assert total_loss("per_image", num_microbatches=4) == pytest.approx(np.mean(L / np.maximum(N, 1)))


def test_per_device_is_the_mean_of_the_devices_ratios() -> None:
    ratios = L.reshape(4, 2).sum(axis=1) / np.maximum(N.reshape(4, 2).sum(axis=1), 1)
    assert total_loss("per_device", num_microbatches=4) == pytest.approx(np.mean(ratios))
    assert total_loss("per_device", num_microbatches=1) == pytest.approx(total_loss("global", num_microbatches=1))
    assert total_loss("per_device", num_microbatches=8) == pytest.approx(total_loss("per_image", num_microbatches=8))
    assert total_loss("per_device", num_microbatches=4) != pytest.approx(
        total_loss("global", num_microbatches=4), rel=0.01
    )


def test_ema_equals_the_values_computed_by_hand() -> None:
    ema = jnp.float32(EMA_START)
    trace = []
    for total in (40.0, 0.0, 2000.0):  # on 4 devices: 10, at least 1, 500 a device
        by, ema = denominator(jnp.float32(total), "ema", ema, num_microbatches=4)
        assert float(by) == pytest.approx(4 * float(ema))
        trace.append(float(ema))
    assert trace == pytest.approx([91.0, 82.0, 123.8], rel=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
def test_other_normalisers_do_not_change_the_ema_and_never_divide_by_zero(scope: str) -> None:
    by, ema = denominator(jnp.float32(0), scope, jnp.float32(7), num_microbatches=2)
    assert float(by) > 0
    assert float(ema) == (pytest.approx(6.4) if scope == "ema" else 7)
    weights = image_weights(jnp.zeros(4), scope, batch_size=4, num_microbatches=2)
    assert np.isfinite(weights).all()


@pytest.mark.parametrize("num_microbatches", [1, 2, 4, 8])
@pytest.mark.parametrize("scope", SCOPES)
def test_the_weights_of_a_micro_batch_are_its_share_of_all_weights(scope: str, num_microbatches: int) -> None:
    every = image_weights(jnp.asarray(N, jnp.float32), scope, batch_size=8, num_microbatches=num_microbatches)
    mine = [
        image_weights(jnp.asarray(part, jnp.float32), scope, batch_size=8, num_microbatches=num_microbatches)
        for part in N.reshape(num_microbatches, -1)
    ]
    np.testing.assert_array_equal(np.concatenate(mine), every)


@pytest.mark.parametrize("scope", SCOPES)
def test_dividing_after_the_gradient_equals_dividing_before_it(scope: str) -> None:
    case = small_case()

    def weighted(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        sums = compiled("smooth_l1")({**case, "logits": logits})
        weights = image_weights(sums.positives, scope, batch_size=B, num_microbatches=1)
        return (weights * (sums.classification + sums.box)).sum(), sums.positives.sum()

    def ratio(logits: jax.Array) -> jax.Array:
        value, positives = weighted(logits)
        return value / denominator(positives, scope, jnp.float32(EMA_START), num_microbatches=1)[0]

    @jax.jit
    def both(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        gradient, positives = jax.grad(weighted, has_aux=True)(logits)
        by, _ = denominator(positives, scope, jnp.float32(EMA_START), num_microbatches=1)
        return gradient / by, jax.grad(ratio)(logits)

    after, before = both(case["logits"])
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-9)


def test_uneven_micro_batches_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"data\.batch_size: 8 .* 3 micro-batches"):
        image_weights(jnp.zeros(8), "per_device", batch_size=8, num_microbatches=3)
    with pytest.raises(ConfigError, match=r"data\.batch_size: 8 .*\b3 .* 4 micro-batches"):
        image_weights(jnp.zeros(3), "global", batch_size=8, num_microbatches=4)


def test_the_sum_distinguishes_background_from_ignored() -> None:
    # One anchor, one box: IoU 0.45 is ignored under `none`, so only the box's absence makes it background.
    case = {
        "logits": jnp.full((2, 1, K), 2.0),
        "deltas": jnp.zeros((2, 1, 4)),
        "anchors": jnp.array([[0.0, 0, 4.5, 1]]),
        "boxes_xyxy": jnp.array([[[0.0, 0, 10, 1]]] * 2),
        "labels": jnp.array([[0], [BACKGROUND]], jnp.int32),
    }
    matching = MatchingConfig(low_quality="none")
    result = jax.jit(lambda case: losses_of(**case, matching=matching, loss=LossConfig()))(case)
    assert float(result.classification[0]) == 0
    assert float(result.classification[1]) > 1


def test_images_on_a_device_mesh_need_no_collective() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    case = small_case()
    anchors = case.pop("anchors")
    eight = {name: jnp.concatenate([x, x, x])[:8] for name, x in case.items()}

    def of_images(case: dict[str, jax.Array]) -> ImageLosses:
        return losses_of(**case, anchors=anchors, matching=MatchingConfig(), loss=LossConfig())

    program = jax.jit(of_images, in_shardings=NamedSharding(mesh, PartitionSpec("data"))).lower(eight).compile()
    for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert f"{collective}(" not in program.as_text()
    by_device = jax.jit(
        jax.shard_map(of_images, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))
    )
    on_one = losses(small_case())
    for sums in (program(jax.device_put(eight, program.input_shardings[0][0])), by_device(eight)):
        for got, expected in zip(sums, on_one, strict=True):
            np.testing.assert_allclose(got, np.tile(expected, 3)[:8], rtol=1e-6)


def mined_case() -> tuple[dict[str, jax.Array], LossConfig]:
    """Returns anchors of `small_case`, of which 4 (at most 1 positive) are mined per image, with effective
    suppression."""
    return small_case(), LossConfig(mining="ohem_1_3", mining_batch=4, mining_nms_iou=0.1)


def masks_of_mined(case: dict[str, jax.Array], config: LossConfig) -> np.ndarray:
    """Returns masks [B A] by calling `mine` on losses that are summed by hand."""

    def of_image(logits: jax.Array, boxes: jax.Array, labels: jax.Array) -> jax.Array:
        found = match(case["anchors"], boxes, labels, MatchingConfig()).labels
        of_anchors = classification_loss(config)(logits, found).sum(axis=-1)
        part = found != IGNORED
        return mine(of_anchors, found >= 0, part, case["anchors"], kind="ohem_1_3", batch=4, iou_threshold=0.1)

    return np.asarray(jax.jit(jax.vmap(of_image))(case["logits"], case["boxes_xyxy"], case["labels"]))


def test_mined_loss_and_gradient_are_those_of_the_mined_anchors() -> None:
    case, config = mined_case()
    mined = masks_of_mined(case, config)
    assert (mined.sum(axis=1) >= 2).all() and not mined.all(axis=1).any()
    sums = {}
    for mining in ("none", "ohem_1_3"):
        loss = dataclasses.replace(config, mining=mining)

        def total(logits: jax.Array, deltas: jax.Array, loss: LossConfig = loss) -> tuple[jax.Array, ImageLosses]:
            outputs = {**case, "logits": logits, "deltas": deltas}
            result = losses_of(**outputs, matching=MatchingConfig(), loss=loss)
            return (result.classification + result.box).sum(), result

        sums[mining] = jax.jit(jax.grad(total, (0, 1), has_aux=True))(case["logits"], case["deltas"])
    (to_logits, to_deltas), result = sums["ohem_1_3"]
    (all_to_logits, all_to_deltas), everything = sums["none"]
    np.testing.assert_array_equal(to_logits[~mined], np.zeros((int((~mined).sum()), K)))
    np.testing.assert_allclose(to_logits[mined], all_to_logits[mined], rtol=1e-6)
    assert np.asarray(to_logits)[mined].all()
    np.testing.assert_array_equal(to_deltas, all_to_deltas)
    # Mining changes neither the box loss nor what the sums are divided by.
    np.testing.assert_array_equal(result.box, everything.box)
    np.testing.assert_array_equal(result.positives, everything.positives)
    np.testing.assert_array_equal(result.averaged_over, result.positives)
    assert (result.classification < everything.classification).all()


def test_a_mined_loss_can_be_averaged_over_the_minibatch() -> None:
    case, config = mined_case()
    config = dataclasses.replace(config, mining_normaliser="minibatch")
    result = jax.jit(lambda case: losses_of(**case, matching=MatchingConfig(), loss=config))(case)
    np.testing.assert_array_equal(result.averaged_over, masks_of_mined(case, config).sum(axis=1))
    assert (result.averaged_over != result.positives).all()


@pytest.mark.parametrize("mining", ["ohem", "ohem_1_3"])
def test_a_nan_logit_makes_a_mined_loss_nan(mining: str) -> None:
    case, _ = mined_case()
    case["logits"] = case["logits"].at[2, 3, 0].set(jnp.nan)  # an image without boxes: all background
    config = LossConfig(mining=mining, mining_batch=4)
    result = jax.jit(lambda case: losses_of(**case, matching=MatchingConfig(), loss=config))(case)
    assert np.isnan(result.classification).tolist() == [False, False, True]


def test_without_mining_its_other_fields_do_not_change_the_program() -> None:
    case = small_case()

    def program(loss: LossConfig) -> str:
        return jax.jit(lambda case: losses_of(**case, matching=MatchingConfig(), loss=loss)).lower(case).as_text()

    plain = program(LossConfig())
    assert program(LossConfig(mining_batch=7, mining_nms_iou=0.9)) == plain
    assert program(LossConfig(mining="ohem")) != plain


@pytest.mark.usefixtures("optimised")  # numerics, as users' programs compute them, from here on
def test_image_losses_are_the_sums_of_the_definitions() -> None:
    case = small_case()
    result, seen = losses(case), set()
    find = jax.jit(jax.vmap(lambda boxes, labels: match(case["anchors"], boxes, labels, MatchingConfig())))
    all_labels, all_indices = (np.asarray(x) for x in find(case["boxes_xyxy"], case["labels"]))
    logits, deltas, anchors, boxes = (
        np.asarray(case[name], np.float64) for name in ("logits", "deltas", "anchors", "boxes_xyxy")
    )
    for i in range(B):
        classification = box = 0.0
        for a, label in enumerate(all_labels[i]):
            seen.add(min(label, 0))
            if label == IGNORED:
                continue
            for k in range(K):
                p = 1 / (1 + np.exp(-logits[i, a, k]))
                p_t, alpha_t = (p, 0.25) if label == k else (1 - p, 0.75)
                classification += -alpha_t * (1 - p_t) ** 2 * np.log(p_t)
            if label >= 0:
                anchor, target = anchors[a], boxes[i, all_indices[i, a]]
                side, target_side = anchor[2:] - anchor[:2], target[2:] - target[:2]
                shift = (target[2:] + target[:2] - anchor[2:] - anchor[:2]) / (2 * side)
                error = np.abs(deltas[i, a] - np.concatenate([shift, np.log(target_side / side)]))
                box += np.where(error < 0.11, error**2 / 0.22, error - 0.055).sum()
        assert float(result.classification[i]) == pytest.approx(classification, rel=1e-5)
        assert float(result.box[i]) == pytest.approx(box, rel=1e-5)
        assert float(result.positives[i]) == (all_labels[i] >= 0).sum()
    assert seen == {0, BACKGROUND, IGNORED}  # the case has all three


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("box", ["smooth_l1", "giou"])
def test_gradient_is_the_numerical_gradient(box: str) -> None:
    case, rng = small_case(), np.random.default_rng(3)
    logits, deltas = np.asarray(case["logits"]), np.asarray(case["deltas"])
    to_logits, to_deltas = (np.asarray(g) for g in compiled_gradient(box)(case))
    for _ in range(5):
        up, along = rng.normal(size=logits.shape), rng.normal(size=deltas.shape)
        ends = []
        for step in (2e-3, -2e-3):
            moved = {
                "logits": jnp.asarray(logits + step * up, jnp.float32),
                "deltas": jnp.asarray(deltas + step * along, jnp.float32),
            }
            sums = losses({**case, **moved}, box)
            ends.append(np.sum(sums.classification, dtype=np.float64) + np.sum(sums.box, dtype=np.float64))
        slope = (to_logits * up).sum() + (to_deltas * along).sum()
        assert (ends[0] - ends[1]) / 4e-3 == pytest.approx(slope, rel=1e-2, abs=1e-2)


@pytest.mark.usefixtures("optimised")
def test_bfloat16_outputs_are_summed_in_float32() -> None:
    case = small_case()
    case |= {"logits": case["logits"].astype(jnp.bfloat16), "deltas": case["deltas"].astype(jnp.bfloat16)}
    exact = losses({**case, "logits": case["logits"].astype(jnp.float32), "deltas": case["deltas"].astype(jnp.float32)})
    for got, expected in zip(losses(case), exact, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, expected)
