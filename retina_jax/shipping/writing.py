"""A detector into one file: its programs, its parameters and what must be known of it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import UInt8

from retina_jax import tta
from retina_jax.detector import Detector
from retina_jax.errors import reason
from retina_jax.shipping.check import ExportError, check
from retina_jax.shipping.loader import FORMAT, PILLOW_FORMAT, load
from retina_jax.shipping.programs import PLATFORMS, canvases, programs
from retina_jax.training.opening import code_commit, package_versions


def ship(detector: Detector, path: Path, source: str, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> str:
    """Write the file, load it, and keep it where it answers about `images` as `detector` does; what `check` tells.

    Raises ExportError where it does not, or cannot be written: then what stood at `path` before still does. So does a
    detector with test-time augmentation, of which a file has none.
    """
    if tta.versions(detector.config) > 1:
        raise ExportError(
            "detection.tta_flip, detection.tta_short_sides: test-time augmentation is not shipped; "
            "add --detection.no-tta-flip --detection.tta-short-sides"
        )
    with kept_if_no_error(path) as beside:
        write_file(beside, detector, source)
        return check(detector, load(str(beside)), images)


def write_file(path: Path, detector: Detector, source: str) -> None:
    """Write `detector`, which came from `source`, as loader.py reads it. Raises ExportError where it cannot be written."""
    data = detector.config.data
    about = {
        "format": PILLOW_FORMAT if data.resize == "pillow" else FORMAT,
        "source": source,
        "step": detector.step,
        "class_names": list(detector.shown_names),
        "category_ids": list(detector.category_ids),
        "short_side": data.short_side,
        "long_side": data.long_side,
        "size_rounding": data.size_rounding,
        "resize": data.resize,
        "pixels": data.pixels,
        "bits": None if data.bits == "auto" else data.bits,
        "canvases": canvases(data),
        "max_detections": detector.config.detection.max_detections,
        "score_threshold": detector.config.detection.score_threshold,
        "platforms": PLATFORMS,
        "commit": code_commit(),
        "versions": package_versions(),
    }
    arrays = io.BytesIO()
    # Numbered, so that their order is that of the programs' first argument.
    np.savez(arrays, **{f"{i:04d}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(detector.variables))})
    try:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("about.json", json.dumps(about, indent=1))
            file.writestr("parameters.npz", arrays.getbuffer(), zipfile.ZIP_STORED)
            for name, program in programs(detector):
                file.writestr(f"programs/{name}", program)
    except OSError as error:
        raise ExportError(f"--out {path}: cannot be written: {reason(error)}") from None


@contextlib.contextmanager
def kept_if_no_error(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place when the block ends, and is gone where that is by an error."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        beside.replace(path)
    except OSError as error:
        raise ExportError(f"--out {path}: cannot be written: {reason(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
