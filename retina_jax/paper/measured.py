"""Measurements on your own runs for Figures 2, 4 and 7."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, PyTree, UInt8

from retina_jax.config import ConfigError
from retina_jax.config_io import override
from retina_jax.console import hardware, log
from retina_jax.data.datasets import open_source
from retina_jax.data.decoding import image_of
from retina_jax.data.pipeline import Batch, eval_batches
from retina_jax.data.source import Source
from retina_jax.detector import Detector, load_detector, padded_batch
from retina_jax.ops.anchors import anchor_grid
from retina_jax.ops.matching import BACKGROUND, match
from retina_jax.paper import results
from retina_jax.paper.comparison import departures
from retina_jax.paper.results import PointResult, SweepResult
from retina_jax.paper.settings import EFFECTIVE_AP
from retina_jax.runs.files import write_json
from retina_jax.runs.folder import read_run, saved_steps
from retina_jax.training.step import Inputs

TIMED_IMAGES = 5  # number of evaluation images over which the median latency is taken
NEGATIVES, POSITIVES = 10_000_000, 100_000  # windows that the paper samples for Figure 4


class Timed(NamedTuple):
    """Run of Table 1e in Figure 2."""

    depth: str  # 50 or 101, which choose colour and marker, or another name from your own sweep
    network: str  # name in the legend; a miniature's "50" is not a ResNet-50
    scale: str  # short side, pixels
    milliseconds: float
    ap: float  # percent


class StarRun(NamedTuple):
    """Run of FL* in Figure 7."""

    gamma: float
    beta: float
    ap: float | None  # percent; None: a seed diverged


def star_runs(sweeps: Sequence[SweepResult]) -> tuple[list[StarRun], int]:
    """Returns the finished (mean AP of seeds) and diverged settings of fig7, and how many others there are."""
    sweep, runs = _sweep(sweeps, "fig7"), []
    for points in map(sweep.seeds, sweep.names):
        scores, diverged = _aps(points), results.divergence(points)
        if scores or diverged:
            loss = next(p.result.config.loss for p in points if p.result.config)
            runs.append(StarRun(loss.gamma, loss.star_beta, None if diverged else statistics.fmean(scores)))
    if not any(run.ap is not None for run in runs):
        raise ConfigError("--workdir: every setting of its sweep fig7 is unfinished or has a diverged seed")
    return runs, len(sweep.names) - len(runs)


def _aps(points: Sequence[PointResult]) -> list[float]:
    return [p.result.scores["AP"] for p in points if "AP" in p.result.scores]


def effective_ap(sweeps: Sequence[SweepResult]) -> float:
    """Returns the AP in percent above which a setting of FL* counts as effective: the paper's 33.5 (0.5 below its focal
    loss) for runs of its config; else 0.5 below the focal loss of table3 or table1b, or below the best setting."""
    sweep = _sweep(sweeps, "fig7")
    if not departures(sweep):
        return EFFECTIVE_AP
    for name, point in (("table3", "focal"), ("table1b", "gamma_2.0")):
        if scores := _aps([p for s in sweeps if s.name == name for p in s.seeds(point)]):
            return statistics.fmean(scores) - 0.5
    return max(run.ap for run in star_runs(sweeps)[0] if run.ap is not None) - 0.5


def _sweep(sweeps: Sequence[SweepResult], name: str) -> SweepResult:
    named = {sweep.name: sweep for sweep in sweeps}
    if name not in named:
        raise ConfigError(f"--workdir: no sweep {name} there; run scripts/sweep.py --sweep configs/sweeps/{name}.py")
    return named[name]


def speeds(sweeps: Sequence[SweepResult]) -> tuple[list[Timed], str, str]:
    """Returns (points, hardware, split) of table1e's finished runs, averaged over seeds; measures missing latencies."""
    sweep, found = _sweep(sweeps, "table1e"), []
    for name in sweep.names:
        if done := [p for p in sweep.seeds(name) if "AP" in p.result.scores]:
            config, ap = done[0].result.config, statistics.fmean(_aps(done))
            depth = name.split("_")[1] if name.startswith("depth_") else name
            times = statistics.fmean(run_latency(p.result.folder) for p in done)
            found.append(Timed(depth, config.model.backbone, str(config.data.short_side), times, ap))
    if not found:
        raise ConfigError("--workdir: no run of its sweep table1e is finished; run scripts/sweep.py first")
    return found, hardware(), results.splits_of(sweep)


def run_latency(folder: Path) -> float:
    """Returns the milliseconds per image of a run's newest checkpoint on this hardware; kept in RUN/latency.json."""
    here = {"hardware": hardware(), "step": max(saved_steps(folder / "checkpoints"), default=None)}
    kept = results.read_latency(folder)
    if kept and kept.items() >= here.items():
        return float(kept["milliseconds"])
    log(f"measuring the latency of {folder} ...")
    # One device, however many the run was trained on: they cannot share an image.
    detector = load_detector(folder, config=override(read_run(folder).config, {"devices": 1}), step="newest")
    source = open_source(detector.config.data, "val")
    images = [image_of(source, index) for index in range(min(TIMED_IMAGES, len(source)))]
    measured = round(latency(detector, images), 3)
    write_json(folder / "latency.json", {"milliseconds": measured, **here, "images": len(images)})
    return measured


def latency(detector: Detector, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], *, repeats: int = 10) -> float:
    """Returns milliseconds per image at batch 1, as in Figure 2: the median over `repeats` runs of each image in its padded
    shape, after one that compiles and one that warms up. The detector must be on one device.

    Network, decoding and NMS are timed. NMS takes longer with more detections, so give images of the detector's data.
    """
    times = []
    for image in images:
        inputs = detector.driver.shard_batch(Inputs.of(padded_batch([image], detector.config.data, 1)))
        for turn in range(2 + repeats):
            started = time.perf_counter()
            jax.block_until_ready(detector.driver.detect(detector.prepared, inputs))
            if turn >= 2:
                times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def finished_run(folder: Path) -> str:
    """Returns the run's folder, step and AP, for the title of Figure 4; ConfigError if it is not finished."""
    split, result = results.split_of(read_run(folder).config), results.read_result(folder)
    if result.status != "finished":
        raise ConfigError(f"--workdir {folder}: its run is {result}; give a finished run")
    ap = f"AP {result.scores['AP']:.1f} on {split}" if "AP" in result.scores else str(result)
    step = max(saved_steps(folder / "checkpoints"), default=None)
    return f"{folder.resolve().parent.name}/{folder.resolve().name}, step {step}, {ap}"


class Sample:
    """Uniform sample without replacement of a stream: the values with the `size` smallest of their random keys."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size = size
        self._random = np.random.default_rng(seed)
        self._values, self._keys = np.zeros(0, np.float32), np.zeros(0)

    def add(self, values: Float32[np.ndarray, " N"]) -> None:
        """Adds `values` to the stream."""
        self._values = np.concatenate([self._values, values])
        self._keys = np.concatenate([self._keys, self._random.random(len(values))])
        if len(self._values) > 2 * self.size:
            self.values()

    def values(self) -> Float32[np.ndarray, " n"]:
        """Returns the sample, min(size, seen) values in no particular order."""
        if len(self._values) > self.size:
            kept = np.argpartition(self._keys, self.size)[: self.size]
            self._values, self._keys = self._values[kept], self._keys[kept]
        return self._values


def val_windows(
    folder: Path, images: int, positives: int, negatives: int, seed: int
) -> dict[str, Float32[np.ndarray, " N"]]:
    """Returns x_t of the windows of `images` random evaluation images (0: all) of a run, by kind: positives, negatives.

    A window (Section 5.1; Figure 4) is an anchor, matched as in training; ignored anchors are not sampled. Samples are x_t
    (equation 6), since p_t rounds to 1 in float32 for easy negatives.
    """
    run = read_run(folder)
    source = open_source(run.config.data, "val", run.categories).arranged(run.categories, f"--workdir {folder}")
    source = random_images(source, images or len(source), seed)
    batch_size = min(run.config.training.eval_batch_size or run.config.data.batch_size, 8)
    batches = eval_batches(source, run.config.data, batch_size=batch_size)
    log(f"applying the network to {len(source):,} images of {source.name} ...")
    detector = load_detector(folder, step="newest")
    samples = sample_windows(detector, batches, positives=positives, negatives=negatives, seed=seed)
    kinds = {kind: sample.values() for kind, sample in zip(("positives", "negatives"), samples, strict=True)}
    if empty := [kind for kind, x_t in kinds.items() if not len(x_t)]:
        raise ConfigError(f"--workdir {folder}: its evaluation images have no {empty[0]} among their anchors")
    return kinds


def random_images(source: Source, count: int, seed: int) -> Source:
    """Returns `count` different images of `source` (all, if it has no more), chosen uniformly from `seed`."""
    chosen = np.random.default_rng(seed).permutation(len(source))[:count].tolist()
    records, read, where = [source.records[index] for index in chosen], source.read, source.where
    return replace(source, records=records, read=lambda i: read(chosen[i]), where=lambda i: where(chosen[i]))


def sample_windows(
    detector: Detector,
    batches: Iterable[Batch],
    *,
    positives: int = POSITIVES,
    negatives: int = NEGATIVES,
    seed: int = 0,
) -> tuple[Sample, Sample]:
    """Returns (positives, negatives): uniform samples of x_t over the windows of all valid images."""
    driver = detector.driver

    @jax.jit
    def of_batch(variables: dict[str, PyTree], inputs: Inputs) -> tuple[Array, Array, Array]:
        logits, _ = driver.model.apply(variables, inputs.images, inputs.image_sizes, train=False)
        anchors = jnp.asarray(anchor_grid(inputs.images.shape[1:3], driver.config.anchors, driver.config.model))
        assigned = jax.vmap(lambda boxes, labels: match(anchors, boxes, labels, driver.config.matching).labels)
        labels = assigned(inputs.boxes_xyxy, inputs.labels)
        return window_x_t(logits.astype(jnp.float32), labels, inputs.valid)

    of_positives, of_negatives = Sample(positives, seed), Sample(negatives, seed + 1)
    for batch in batches:
        inputs = jax.tree.map(jnp.asarray, Inputs.of(batch))
        x_t, positive, negative = jax.device_get(of_batch(detector.prepared, inputs))
        of_positives.add(x_t[positive])
        of_negatives.add(x_t[negative])
    return of_positives, of_negatives


def window_x_t(
    logits: Float32[Array, "B A K"], labels: Int[Array, "B A"], valid: Bool[Array, " B"]
) -> tuple[Float32[Array, "B A"], Bool[Array, "B A"], Bool[Array, "B A"]]:
    """Returns x_t of every anchor, and masks of valid positives and negatives. A positive gives the logit of its class, a
    negative that of its most likely class: with all K logits the curves of Figure 4 would be steep for every gamma."""
    own = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    positive, negative = (labels >= 0) & valid[:, None], (labels == BACKGROUND) & valid[:, None]
    return jnp.where(labels >= 0, own, -logits.max(axis=-1)), positive, negative
