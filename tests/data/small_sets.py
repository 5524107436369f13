"""Small datasets that the tests write themselves."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from retina_jax.data.datasets import read_coco
from retina_jax.data.source import Source


def encode(pixels: np.ndarray, kind: str = "JPEG", **options: Any) -> bytes:
    """Returns an image file with the pixels."""
    stream = io.BytesIO()
    quality = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    Image.fromarray(pixels).save(stream, kind, **quality, **options)
    return stream.getvalue()


def document() -> dict[str, Any]:
    """Returns a valid COCO file: images 1 and 2, and categories 3 (cat) and 7 (dog), listed in falling order of their
    ids."""
    return {
        "images": [
            {"id": 1, "file_name": "one.jpg", "width": 64, "height": 48},
            {"id": 2, "file_name": "two.jpg", "width": 40, "height": 60},
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 7, "bbox": [4, 5, 20, 10], "area": 200, "iscrowd": 0},
            {"id": 2, "image_id": 2, "category_id": 3, "bbox": [1.5, 2, 3, 4.25], "area": 12.75, "iscrowd": 0},
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    }


def write_coco(folder: Path, content: Any) -> tuple[Path, Path]:
    """Writes a COCO file (text as it is, anything else as JSON) and an empty folder of images."""
    path, images = folder / "annotations.json", folder / "images"
    images.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path, images


def rectangles(folder: Path, sizes_wh: list[tuple[int, int]], *, seed: int = 0, kind: str = "JPEG") -> Source:
    """Writes images of grey noise, each with one rectangle of pure red (label 0) or pure green (label 1), which is its
    box."""
    rng = np.random.default_rng(seed)
    images, annotations, encoded = [], [], {}
    for i, (width, height) in enumerate(sizes_wh):
        pixels = np.repeat(rng.integers(90, 160, (height, width, 1), np.uint8), 3, axis=2)
        w, h = int(rng.integers(width // 4, width // 2)), int(rng.integers(height // 4, height // 2))
        x, y, label = int(rng.integers(0, width - w)), int(rng.integers(0, height - h)), int(rng.integers(2))
        pixels[y : y + h, x : x + w] = np.eye(3, dtype=np.uint8)[label] * 255
        name = f"{i:03d}.{kind.lower()}"
        encoded[name] = encode(pixels, kind)
        images.append({"id": 10 + i, "file_name": name, "width": width, "height": height})
        annotations.append({"id": 1 + i, "image_id": 10 + i, "category_id": label + 1, "bbox": [x, y, w, h]})
    categories = [{"id": 1, "name": "red"}, {"id": 2, "name": "green"}]
    path, image_folder = write_coco(folder, {"images": images, "annotations": annotations, "categories": categories})
    for name, content in encoded.items():
        (image_folder / name).write_bytes(content)
    return read_coco(path, image_folder)


def named(folder: Path, file_name: str) -> Source:
    """The dataset of `document`, its first image called so."""
    content = document()
    content["images"][0]["file_name"] = file_name
    return read_coco(*write_coco(folder, content))
