"""The benchmark of the input pipeline: its variants read the same files into the same padded images, and all their work
is counted."""

import dataclasses
import json
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from benchmarks import input as ours
from benchmarks import photographs as plan
from benchmarks.peers import pil, tf_data
from benchmarks.photographs import Photograph, in_batches, photographs, rest
from benchmarks.work import BenchmarkError, Task
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from retina_jax.config import DataConfig
from retina_jax.data.datasets import read_coco
from retina_jax.data.pipeline import eval_batches
from retina_jax.data.transforms import assign_bucket, buckets, resized_size

TASK = Task("input", "100x160", 2, "", "", 0, 80, 7, 300, "", "", 0, "cpu", 1)
SIZES = [(64, 48), (40, 60), (90, 50), (80, 80), (64, 40)]


@pytest.fixture
def task(tmp_path: Path) -> Task:
    """Writes five JPEG files of smooth colours."""
    rng = np.random.default_rng(0)
    images = []
    for number, (width, height) in enumerate(SIZES):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(tmp_path / f"{number}.jpg", quality=90)
        images.append({"id": number, "file_name": f"{number}.jpg", "width": width, "height": height})
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    (tmp_path / "all.json").write_text(json.dumps(content))
    return dataclasses.replace(TASK, images=str(tmp_path), annotations=str(tmp_path / "all.json"))


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 900), st.integers(1, 1500))
def test_peers_use_the_sizes_and_padded_shapes_of_training(height: int, width: int, short: int, long: int) -> None:
    photograph = plan._photograph(Path("folder"), {"file_name": "a.jpg", "height": height, "width": width}, short, long)
    shapes = buckets(DataConfig(short_side=short, long_side=long), (short,))
    size = resized_size(height, width, short, long)
    assert photograph == ("folder/a.jpg", size, shapes[assign_bucket(size, shapes)])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(1, 5))
def test_batches_have_one_padded_shape_and_no_image_is_left(sides: list[int], batch: int) -> None:
    images = [Photograph(str(number), (1, 1), (side, side)) for number, side in enumerate(sides)]
    ordered = in_batches(images, batch)
    assert sorted(ordered) == sorted(images * batch)
    for start in range(0, len(ordered), batch):
        assert len({photograph.padded_hw for photograph in ordered[start : start + batch]}) == 1


def test_variants_give_the_same_images(task: Task) -> None:
    source = read_coco(task.annotations, task.images)
    data = DataConfig(short_side=100, long_side=160)
    made = {int(batch.indices[0]): batch for batch in eval_batches(source, data, batch_size=1)}
    never_flips = type("Heads", (random.Random,), {"random": lambda self: 1.0})()
    for number, photograph in enumerate(photographs(task)):
        batch = made[number]
        height, width = photograph.size_hw
        assert batch.image_sizes[0].tolist() == [height, width] and batch.images.shape[1:3] == photograph.padded_hw
        by_pil = pil.batch_of([photograph], never_flips)
        assert np.abs(by_pil.astype(int) - batch.images).max() <= 2
        by_tensorflow = tf_data.load(*map(tf.constant, photograph))[0].numpy()[:height, :width].astype(int)
        exact = batch.images[0, :height, :width]
        assert (
            min(np.abs(by_tensorflow - side).max() for side in (exact, exact[:, ::-1])) <= 8
        )  # TensorFlow uses a faster inverse DCT.


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("variant", [ours, tf_data, pil])
def test_a_repetition_reads_its_number_of_images(
    task: Task, batch: int, variant: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "IMAGES", 6)
    work = variant.make(dataclasses.replace(task, batch=batch))
    assert work.images == 6 and work.run() is None and work.run() is None


@pytest.mark.parametrize("variant", [tf_data, pil])
def test_peers_of_the_input_benchmark_refuse_other_benchmarks(task: Task, variant: object) -> None:
    with pytest.raises(BenchmarkError, match="has no benchmark nms"):
        variant.make(dataclasses.replace(task, name="nms"))


@pytest.mark.parametrize("variant", [ours, tf_data, pil])
@pytest.mark.parametrize("content", [None, "{", "[]", '{"images": [{"id": 1}]}', '{"images": []}'])
def test_the_error_for_unreadable_annotations_names_the_file(
    task: Task, variant: object, content: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BenchmarkError) as raised:
        variant.make(dataclasses.replace(task, annotations=str(path)))
    assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)


def test_the_error_for_a_missing_image_names_it(task: Task) -> None:
    absent = Path(task.images) / "2.jpg"
    absent.unlink()
    with pytest.raises(BenchmarkError) as raised:
        pil.make(task)
    assert str(raised.value) == f"{absent}: no such file"


def test_rest_waits_until_all_threads_are_idle() -> None:
    def work() -> None:
        until = time.thread_time() + 0.15
        while time.thread_time() < until:
            sum(range(1000))

    thread = threading.Thread(target=work)
    thread.start()
    rest()
    assert not thread.is_alive()
