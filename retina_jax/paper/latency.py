"""How long the detection program takes, as Figure 2 has it: one image at a time, from pixels on the device to boxes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import UInt8

from retina_jax.detector import Detector, to_canvas
from retina_jax.training.step import Inputs


def latency(detector: Detector, images: Sequence[UInt8[np.ndarray, "_ _ 3"]] = (), *, repeats: int = 10) -> float:
    """Milliseconds an image at batch 1: the median over `repeats` runs of each image, each on the canvas that evaluation
    gives it, after one run that compiles and one that warms up.

    Network, decoding and NMS are timed, until the device has finished; reading, resizing and the transfer are not. The
    time of NMS grows with what is found (to at most `detection.max_detections`), so give images of the detector's own
    kind; without any it is a 640 x 480 image of noise.

    Raises:
      ValueError: the detector stands on several devices, which cannot share one image.
    """
    if detector.driver.shards != 1:
        raise ValueError(f"the detector stands on {detector.driver.shards} devices; latency is measured on one")
    if not images:
        images = [np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)]
    times = []
    for image in images:
        batch = to_canvas([image], detector.config.data, 1)
        inputs = detector.driver.place(
            Inputs(batch.images, batch.image_sizes, batch.boxes_xyxy, batch.labels, batch.valid)
        )
        for turn in range(2 + repeats):
            started = time.perf_counter()
            jax.block_until_ready(detector.driver.detect(detector.variables, inputs))
            if turn >= 2:
                times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)
