"""`data.resize pillow` gives the pixels of `PIL.Image.resize`, to the last bit, wherever images are resized."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image
from small_sets import encode, write_coco

from retina_jax.config import Config, ConfigError, DataConfig
from retina_jax.config_io import override, validate
from retina_jax.data import pipeline
from retina_jax.data.datasets import read_coco
from retina_jax.data.pipeline import Batches, eval_batches, train_batches
from retina_jax.data.source import Source
from retina_jax.data.transforms import resize, resize_large, resized_size
from retina_jax.detector import padded_batch

RNG = np.random.default_rng(0)
SIZES_WH = [(int(w), int(h)) for w, h in RNG.integers(1, 150, (50, 2))]
IMAGES = [RNG.integers(0, 256, (h, w, 3), np.uint8) for w, h in SIZES_WH]
DATA = DataConfig(resize="pillow", short_side=61, long_side=97, batch_size=5, max_boxes=2, workers=2)


def by_pillow(image: np.ndarray | Image.Image, size_hw: tuple[int, int]) -> np.ndarray:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    return np.asarray(image.resize(size_hw[::-1], Image.Resampling.BILINEAR))


def test_any_size_to_any_size() -> None:
    sizes = [(int(h), int(w)) for h, w in RNG.integers(1, 150, (50, 2))]
    assert {np.sign(new[0] - old.shape[0]) for old, new in zip(IMAGES, sizes, strict=True)} >= {-1, 1}, "up and down"
    for image, size in zip(IMAGES, sizes, strict=True):
        expected = by_pillow(image, size)
        assert np.array_equal(resize(image, size, "pillow").numpy(), expected)
        assert np.array_equal(resize_large(image, size, "pillow"), expected)


def test_predict_has_pillows_pixels() -> None:
    for image in IMAGES:
        batch = padded_batch([image], DATA, 1)
        height, width = resized_size(*image.shape[:2], DATA.short_side, DATA.long_side)
        assert np.array_equal(batch.images[0, :height, :width], by_pillow(image, (height, width)))
        assert not batch.images[0, height:].any() and not batch.images[0, :, width:].any()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Writes the images as JPEG and PNG files in turn, each with a box."""
    names = [f"{i}.{('jpeg', 'png')[i % 2]}" for i in range(len(IMAGES))]
    content = {
        "images": [
            {"id": i, "file_name": name, "width": w, "height": h}
            for i, (name, (w, h)) in enumerate(zip(names, SIZES_WH, strict=True))
        ],
        "annotations": [
            {"id": i + 1, "image_id": i, "category_id": 1, "bbox": [0, 0, w, h]} for i, (w, h) in enumerate(SIZES_WH)
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }
    path, folder = write_coco(tmp_path_factory.mktemp("images"), content)
    for i, (name, image) in enumerate(zip(names, IMAGES, strict=True)):
        (folder / name).write_bytes(encode(image, ("JPEG", "PNG")[i % 2]))
    return read_coco(path, folder)


def has_pillows_pixels(source: Source, batches: Batches, count: int) -> tuple[set[int], set[bool]]:
    """Asserts this of the next `count` batches; returns which images they contain, and whether images are mirrored."""
    seen, mirrored = set(), set()
    for batch in itertools.islice(batches, count):
        for row, index in enumerate(batch.indices.tolist()):
            height, width = map(int, batch.image_sizes[row])
            found = batch.images[row, :height, :width]
            with Image.open(source.where(index)) as file:
                expected = by_pillow(file.convert("RGB"), (height, width))
            plain = np.array_equal(found, expected)
            assert plain or np.array_equal(found, expected[:, ::-1])
            seen.add(index)
            mirrored.add(not plain)
    return seen, mirrored


@pytest.mark.parametrize("large", [2**22, 64])
def test_batches_have_pillows_pixels(source: Source, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks evaluation and training, also with images that count as large, which are decoded and resized elsewhere."""
    monkeypatch.setattr(pipeline, "LARGE", large)
    assert has_pillows_pixels(source, eval_batches(source, DATA, batch_size=5), 100) == (set(range(50)), {False})
    seen, mirrored = has_pillows_pixels(source, train_batches(source, DATA, seed=0), 12)
    assert len(seen) > 40 and mirrored == {False, True}


def test_pixels_that_are_not_uint8_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^data\.pixels: .*uint8 with data\.resize pillow$"):
        validate(override(Config(), {"data.resize": "pillow", "data.pixels": "float32"}))
