"""The images that a shipped detector is tried on."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from retina_jax.config import ConfigError, ScenesConfig
from retina_jax.data.conventions import Decoding
from retina_jax.data.decoding import MAX_PIXELS, image_of, largest_file, to_rgb
from retina_jax.data.image_files import image_files
from retina_jax.data.reading import read_file
from retina_jax.data.scenes import VAL, draw_scene
from retina_jax.data.source import BadImage, DataError
from retina_jax.data.sources import open_source
from retina_jax.data.survey import decoding_of_files
from retina_jax.detector import Detector
from retina_jax.errors import reason

Images = list[UInt8[np.ndarray, "_ _ 3"]]


def images_for(detector: Detector, files: Path | None, count: int) -> tuple[Images, str]:
    """The first `count` images of `files`, else of the validation data, else generated scenes; and what they are, in words.

    Raises ConfigError or BadImage where `files` are named and cannot be read. Validation images that are not there are no
    error: a detector from elsewhere has none, and a run may have moved to another machine. Broken ones are left out.
    """
    if files is not None:
        found = list(image_files([files], out=Path(os.devnull)))[:count]  # nothing is drawn
        decoding = decoding_of_files(found, detector.config.data)
        return [_read(file, decoding) for file in found], f"{len(found)} images of {files}"
    try:
        source = open_source(detector.config.data, "val")
    except (ConfigError, DataError, OSError) as error:
        return _scenes(detector, count), f"{count} generated scenes ({reason(error)})"
    images, why = [], ""
    broken = 0
    for index in range(min(count, len(source))):
        try:
            images.append(image_of(source, index))
        except (DataError, OSError) as error:
            broken, why = broken + 1, reason(error)
    left_out = f"{broken} that cannot be read left out, the last one: {why}" if broken else ""
    if not images:
        return _scenes(detector, count), f"{count} generated scenes (of {source.name}, {left_out or 'which has none'})"
    return images, f"the first {len(images)} images of {source.name}" + (f" ({left_out})" if left_out else "")


def _scenes(detector: Detector, count: int) -> Images:
    scenes = ScenesConfig(size=max(64, detector.config.data.short_side))
    return [draw_scene(scenes, VAL, i).image for i in range(count)]


def _read(file: Path, decoding: Decoding) -> UInt8[np.ndarray, "_ _ 3"]:
    try:
        return to_rgb(read_file(file, largest_file(MAX_PIXELS)), decoding)
    except OSError as error:
        raise BadImage(f"{file}: {reason(error)}") from None
    except BadImage as error:
        raise BadImage(f"{file}: {error}") from None
