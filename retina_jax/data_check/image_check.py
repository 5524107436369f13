"""Reads and decodes every image once, as training would, in several threads; finds duplicate images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
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

Digests = dict[str, str]  # file name to the SHA-256 of the file's bytes, for every file that could be read


def check_images(split: Split, decoding: Decoding, workers: int) -> tuple[list[Finding], Digests]:
    """Images that are missing, cannot be read, differ in size from their annotations, are incomplete or have one colour, in
    the order of the annotations. `workers`: number of threads; 0: one per core."""
    boxes = {row: record.boxes_xyxy for row, record in zip(split.record_images, split.records, strict=True)}

    def check(row: int) -> tuple[Finding | None, str | None]:
        _, file_name, width, height = split.images[row]
        try:
            encoded = read_image(Path(split.paths[row]), width, height)
        except (FileNotFoundError, NotADirectoryError):
            return Finding("missing", split.name, file_name, split.missing.get(row, "")), None
        except OSError as error:
            return Finding("unreadable", split.name, file_name, f"cannot be read: {reason(error)}"), None
        fault = fault_of(encoded, (width, height), decoding, boxes.get(row, NO_BOXES))
        digest = hashlib.sha256(encoded).hexdigest()
        return Finding(fault[0], split.name, file_name, fault[1]) if fault else None, digest

    found, digests = [], {}
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        checks = track(f"{split.name}: images", pool.map(check, range(len(split.images))), len(split.images))
        for (_, file_name, _, _), (finding, digest) in zip(split.images, checks, strict=True):
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
    """The kind of finding that an image file is, and the details; None if it has no fault. `expected_size` is the width and
    height in the annotations, `boxes_xyxy` are in the image's pixels. What `to_rgb` decodes is accepted, because training
    falls back to it."""
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


def duplicates(digests: dict[str, Digests], splits: Sequence[Split]) -> list[Finding]:
    """Images of a split with the bytes of an earlier one, or the same file; and images of val that are trained on too."""
    found: list[Finding] = []
    first: dict[str, dict[str, str]] = {split.name: {} for split in splits}
    for split in splits:
        for _, file_name, _, _ in split.images:
            if (digest := digests[split.name].get(file_name)) is None:
                continue
            if digest in first[split.name]:
                earlier = first[split.name][digest]
                found.append(Finding("same_image", split.name, file_name, f"as {earlier}"))
            else:
                first[split.name][digest] = file_name
    if len(splits) == 2:
        for name, digest in digests["val"].items():
            if digest in first["train"]:
                found.append(Finding("leakage", "val", name, f"the same bytes as {first['train'][digest]} in train"))
    return found
