"""Every image read and decoded once, as training would, by several threads; and images that are there twice."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from retina_jax.console import track
from retina_jax.data.coco import read_image
from retina_jax.data.conventions import Decoding
from retina_jax.data.decoding import DECODING, open_image, read_header, to_rgb, upright
from retina_jax.data.image_faults import NO_BOXES, is_one_colour, missing_part
from retina_jax.data.source import BadImage
from retina_jax.data_check.findings import Finding
from retina_jax.data_check.split import Split
from retina_jax.errors import reason

Digests = dict[str, str]
"""File name to the SHA-256 of the file's bytes, of every file that could be read."""


def check_images(split: Split, decoding: Decoding, workers: int) -> tuple[list[Finding], Digests]:
    """Images that are missing, cannot be read, have another size than their annotations say, lack a part or have one colour,
    in the order of the file.

    `workers`: threads; 0: as many as there are cores.
    """

    def look(row: int) -> tuple[Finding | None, str | None]:
        _, file_name, width, height = split.images[row]
        try:
            encoded = read_image(Path(split.paths[row]), width, height)
        except (FileNotFoundError, NotADirectoryError):
            return Finding("missing", split.name, file_name, split.missing.get(row, "")), None
        except OSError as error:
            return Finding("unreadable", split.name, file_name, f"cannot be read: {reason(error)}"), None
        digest = hashlib.sha256(encoded).hexdigest()
        fault = fault_of(encoded, (width, height), decoding, split.boxes_of(row))
        return (Finding(fault[0], split.name, file_name, fault[1]) if fault else None), digest

    found, digests = [], {}
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        looks = track(f"{split.name}: images", pool.map(look, range(len(split.images))), len(split.images))
        for (_, file_name, _, _), (finding, digest) in zip(split.images, looks, strict=True):
            if finding is not None:
                found.append(finding)
            if digest is not None:
                digests[file_name] = digest
    return found, digests


def fault_of(
    encoded: bytes,
    expected_size: tuple[int, int],
    decoding: Decoding,
    boxes_xyxy: Float32[np.ndarray, "n 4"] = NO_BOXES,
) -> tuple[str, str] | None:
    """The kind of finding that an image file is, and what is wrong; None where nothing is.

    `expected_size` is the width and height that its annotations say, `boxes_xyxy` lie in its pixels. Training decodes plain
    JPEGs by TensorFlow and asks `to_rgb` where that fails, so what `to_rgb` takes is taken.
    """
    try:
        image = open_image(encoded)
    except BadImage as error:
        return "unreadable", str(error)
    try:
        upright(read_header(image), expected_size, decoding)
    except BadImage as error:
        return "wrong_size", str(error)
    try:
        with DECODING.share(expected_size[0] * expected_size[1]):
            pixels = to_rgb(encoded, decoding, expected_size=expected_size)
            if text := missing_part(encoded):
                return "incomplete", text
    except BadImage as error:
        return "unreadable", str(error)
    if is_one_colour(pixels, boxes_xyxy):
        return "one_colour", f"about {tuple(pixels[pixels.shape[0] // 2, pixels.shape[1] // 2].tolist())}"
    return None


def twice(split: Split, digests: Digests) -> list[Finding]:
    """Images of a split with the bytes, or the very file, of one before them."""
    first: dict[str, str] = {}
    found = []
    for _, file_name, _, _ in split.images:
        digest = digests.get(file_name)
        if digest in first:
            found.append(Finding("same_image", split.name, file_name, f"as {first[digest]}"))
        elif digest is not None:
            first[digest] = file_name
    return found


def leaks(train: Digests, val: Digests) -> list[Finding]:
    """Images of the evaluation that are also trained on."""
    trained = {digest: name for name, digest in reversed(train.items())}
    return [
        Finding("leakage", "val", name, f"the same bytes as {trained[digest]} in train")
        for name, digest in val.items()
        if digest in trained
    ]
