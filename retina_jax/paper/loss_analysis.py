"""The package's own classification losses as curves over x_t = y x (equation 6), without alpha.

A single class and target 1 make the logit x_t itself, and alpha = 1 its weight, so what is drawn is what is trained with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Float64, Int, PyTree

from retina_jax.data.pipeline import Batch
from retina_jax.detector import Detector
from retina_jax.losses.focal import ClassificationLoss, cross_entropy, focal, focal_star
from retina_jax.ops.anchors import anchor_grid
from retina_jax.ops.matching import BACKGROUND, match
from retina_jax.training.step import Inputs


def ce() -> ClassificationLoss:
    """Equation 1."""
    return cross_entropy


def fl(gamma: float) -> ClassificationLoss:
    """Equation 4."""
    return partial(focal, alpha=1.0, gamma=gamma)


def fl_star(gamma: float, beta: float) -> ClassificationLoss:
    """Equation 8."""
    return partial(focal_star, alpha=1.0, gamma=gamma, beta=beta)


SELECTED = {
    "CE": ce(),
    "FL γ = 2": fl(2.0),
    "FL* γ = 2, β = 1": fl_star(2.0, 1.0),
    "FL* γ = 4, β = 0": fl_star(4.0, 0.0),
}
"""The losses of Figures 5 and 6, which are those of Table 3."""


def loss_values(loss: ClassificationLoss, x_t: Float[np.ndarray, " N"]) -> Float32[np.ndarray, " N"]:
    """Loss at each x_t, the logit on the side of the truth: x_t > 0 is classified right."""
    return np.asarray(_of_logits(loss, jnp.asarray(x_t, jnp.float32)))


def loss_slopes(loss: ClassificationLoss, x_t: Float[np.ndarray, " N"]) -> Float32[np.ndarray, " N"]:
    """Derivative of the loss by x_t at each x_t: equations 9 to 11 for y = 1."""
    return np.asarray(jax.grad(lambda x: _of_logits(loss, x).sum())(jnp.asarray(x_t, jnp.float32)))


def x_of_p(p_t: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """The x_t whose sigmoid is p_t, for 0 < p_t < 1."""
    return np.log(p_t) - np.log1p(-p_t)


def _of_logits(loss: ClassificationLoss, x_t: Float32[Array, " N"]) -> Float32[Array, " N"]:
    return loss(x_t[:, None], jnp.zeros(x_t.shape, jnp.int32))[:, 0]


# Where the loss of a trained detector lies (Section 5.1, Analysis of the Focal Loss; Figure 4).
#
# "We apply this model to a large number of random images and sample the predicted probability for ~10^7 negative windows and
# ~10^5 positive windows. Next, separately for positives and negatives, we compute FL for these samples, and normalize the
# loss such that it sums to one. Given the normalized loss, we can sort the loss from lowest to highest and plot its
# cumulative distribution function."
#
# A window is an anchor, matched as in training; ignored ones are no samples. One window gives one probability, as the paper
# counts: of a positive that of its own class; of a negative that of its likeliest class, the one by which it would be
# detected. With all K probabilities of a negative the sample would mostly be of classes that no one would mistake it for, and
# steep whatever gamma is.
#
# Samples are kept as x_t, the logit on the side of the truth (equation 6): p_t itself rounds to 1 in float32 where negatives
# are easy.

GAMMAS = (0.0, 0.5, 1.0, 2.0)
"""The curves of Figure 4."""
NEGATIVES, POSITIVES = 10_000_000, 100_000
"""Windows that the paper samples."""


@dataclass
class Sample:
    """A uniform sample without replacement, of at most `size` values of a stream of any length.

    Each value draws a random key and the `size` smallest keys stay: every subset of that size is equally likely.
    """

    size: int
    seed: int = 0
    seen: int = 0
    """Values met so far."""

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)
        self._values, self._keys = np.zeros(0, np.float32), np.zeros(0)

    def add(self, values: Float32[np.ndarray, " N"]) -> None:
        """Let `values` take part."""
        self.seen += len(values)
        self._values = np.concatenate([self._values, values])
        self._keys = np.concatenate([self._keys, self._random.random(len(values))])
        if len(self._values) > 2 * self.size:
            self._cut()

    def values(self) -> Float32[np.ndarray, " n"]:
        """The sample, min(size, seen) values, in no order."""
        if len(self._values) > self.size:
            self._cut()
        return self._values

    def _cut(self) -> None:
        kept = np.argpartition(self._keys, self.size)[: self.size]
        self._values, self._keys = self._values[kept], self._keys[kept]


def sample_windows(
    detector: Detector,
    batches: Iterable[Batch],
    *,
    positives: int = POSITIVES,
    negatives: int = NEGATIVES,
    seed: int = 0,
) -> tuple[Sample, Sample]:
    """(positives, negatives): x_t of windows of all valid images, sampled uniformly."""
    driver = detector.driver

    @jax.jit
    def of_batch(variables: dict[str, PyTree], inputs: Inputs) -> tuple[Array, Array, Array]:
        logits, _ = driver.model.apply(variables, inputs.images, inputs.image_sizes, train=False)
        anchors = jnp.asarray(anchor_grid(inputs.images.shape[1:3], driver.config.anchors, driver.config.model))
        labels = jax.vmap(lambda boxes, labels: match(anchors, boxes, labels, driver.config.matching).labels)(
            inputs.boxes_xyxy, inputs.labels
        )
        return window_x_t(logits.astype(jnp.float32), labels, inputs.valid)

    kept, left = Sample(positives, seed), Sample(negatives, seed + 1)
    for batch in batches:
        inputs = Inputs(batch.images, batch.image_sizes, batch.boxes_xyxy, batch.labels, batch.valid)
        x_t, positive, negative = jax.device_get(of_batch(detector.variables, jax.tree.map(jnp.asarray, inputs)))
        kept.add(x_t[positive])
        left.add(x_t[negative])
    return kept, left


def window_x_t(
    logits: Float32[Array, "B A K"], labels: Int[Array, "B A"], valid: Bool[Array, " B"]
) -> tuple[Float32[Array, "B A"], Bool[Array, "B A"], Bool[Array, "B A"]]:
    """x_t of every anchor, which anchors are positive, which are negative; none of an image that is not valid is either.

    labels [B A] as `match` gives them: of a positive anchor x_t is the logit of its class, of another minus the largest.
    """
    own = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    positive, negative = (labels >= 0) & valid[:, None], (labels == BACKGROUND) & valid[:, None]
    return jnp.where(labels >= 0, own, -logits.max(axis=-1)), positive, negative


def cumulative_loss(x_t: Float32[np.ndarray, " N"], gamma: float) -> Float64[np.ndarray, " N"]:
    """Share of the focal loss that the n + 1 samples of lowest loss carry, for n = 0 to N - 1; the last is exactly 1.

    Alpha is one factor of all samples of a kind and drops out.

    Raises:
      ValueError: there is no sample, or all of them have a loss of 0.
    """
    losses = np.sort(loss_values(fl(gamma), x_t)).astype(np.float64)
    if losses.sum() == 0:
        raise ValueError(f"{len(x_t)} samples have no loss at gamma {gamma}: there is nothing to share out")
    sums = np.cumsum(losses)
    return sums / sums[-1]


def share_of_hardest(cumulative: Float64[np.ndarray, " N"], fraction: float) -> float:
    """Share of the loss that the hardest `fraction` of the samples carry, 0 to 1; linear between samples."""
    samples = np.arange(len(cumulative) + 1) / len(cumulative)
    return float(1.0 - np.interp(1.0 - fraction, samples, np.concatenate([[0.0], cumulative])))


def shares_table(
    samples: Mapping[str, Float32[np.ndarray, " N"]], fractions: tuple[float, ...] = (0.01, 0.05, 0.2)
) -> str:
    """The share of the loss that the hardest fractions of each kind of sample (x_t) carry, a line a gamma."""
    lines = ["share of the loss carried by the hardest"]
    for kind, x_t in samples.items():
        lines.append(f"  of {len(x_t):,} {kind}" + "".join(f"{f:>8.0%}" for f in fractions))
        for gamma in GAMMAS:
            cumulative = cumulative_loss(x_t, gamma)
            label = f"gamma {gamma:g}"
            width = len(f"  of {len(x_t):,} {kind}")
            lines.append(f"{label:>{width}}" + "".join(f"{share_of_hardest(cumulative, f):>8.1%}" for f in fractions))
    return "\n".join(lines)
