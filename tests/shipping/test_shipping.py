"""An exported detector gives the detections of the original on every machine; a file that does not is deleted."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from small_sets import rectangles

from retina_jax.config import Config, ConfigError, DataConfig
from retina_jax.config_io import override
from retina_jax.cpu import convolution
from retina_jax.data.transforms import resized_size
from retina_jax.detector import Detector, padded_batch
from retina_jax.export import agreement
from retina_jax.export.agreement import ExportError, images_for
from retina_jax.export.card import facts
from retina_jax.export.programs import PLATFORMS, padded_shapes
from retina_jax.model.layers import convolve
from retina_jax.training.parallel import Driver

ROOT = Path(__file__).parents[2]


def imported(path: Path, name: str) -> ModuleType:
    """Imports a file as a module with this name, without the import hooks of packages."""
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


loader = imported(ROOT / "retina_jax" / "export" / "loader.py", "loader")
LoadError, load = loader.LoadError, loader.load
GROUP = override(
    Config(),
    {
        "data.short_side": 64, "data.long_side": 96, "model.backbone": "resnet18", "model.base_width": 4,
        "model.stage_blocks": (1, 1, 1, 1), "model.norm": "group", "model.norm_groups": 2, "model.frozen_stages": 0,
        "model.max_level": 5, "model.fpn_channels": 8, "model.head_channels": 8, "model.head_convs": 1,
        "model.num_classes": 2, "model.head_std": 0.2, "anchors.size_factor": 2.0, "detection.score_threshold": 0.001,
        "detection.max_detections": 20, "devices": 1,
    },
)  # fmt: skip
FROZEN = override(
    GROUP,
    {
        "model.norm": "frozen", "model.head_norm": "group", "model.input_normalisation": "imagenet",
        "data.resize": "antialias", "data.pixels": "float32", "data.box_ends": "inclusive", "data.buckets": 1,
        "data.size_rounding": "floor", "anchors.style": "torchvision", "detection.clip": "after_nms",
        "detection.threshold_coarsest": False,
    },
)  # fmt: skip
SIZES = [(48, 32), (32, 48), (150, 210), (40, 30), (64, 96), (10, 300), (1, 1)]
CONVOLUTIONS = {
    "winograd": ((32, 32, 32), (3, 3, 32, 40), 1),
    "columns": ((2, 3, 64), (3, 3, 64, 32), 2),
    "product": ((5, 4, 8), (1, 1, 8, 3), 2),
    "plain": ((9, 7, 3), (7, 7, 3, 4), 2),
}


def photographs() -> list[np.ndarray]:
    """Returns noise of several sizes in both orientations."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]


def detector_of(config: Config) -> Detector:
    driver = Driver(config, 2)
    return Detector(driver, driver.init_state().variables, ("cat", "dog"), (1, 17), step=3)


@pytest.fixture(scope="module")
def live() -> Detector:
    return detector_of(GROUP)


def export(live: Detector, *options: object) -> str:
    """Returns the output of scripts/export.py, in this process, for a run with the detector `live`."""
    script = imported(ROOT / "scripts" / "export.py", "export_script")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        patch.setattr(script, "settings_of", lambda argv, exclusive=False: live.config)
        patch.setattr(script, "load_detector", lambda source, **options: live)
        patch.setattr(sys, "argv", ["export.py", *map(str, options)])
        script.main()
    return output.getvalue()


@pytest.fixture(scope="module")
def file(live: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the file written by the script, compared on two images of a folder, one of each orientation."""
    folder = tmp_path_factory.mktemp("images")
    for i, image in enumerate(photographs()[:2]):
        Image.fromarray(image).save(folder / f"{i}.png")
    path = tmp_path_factory.mktemp("exported") / "new" / "detector.zip"
    lines = export(live, "--workdir", "RUN", "--out", path, "--images", folder).splitlines()
    assert f"2 images of {folder}" in lines[0] and lines[1].endswith("...") and lines[2].endswith("...")
    assert re.match(r"2 images, [1-9][0-9] detections: all found by both", lines[3])
    assert re.fullmatch(
        r"median time per image: \S+ ms \(\S+ ms of CPU time\) original, \S+ ms \(.* exported .*", lines[4]
    )
    assert lines[5].startswith(f"{path}: 0.") and lines[5].endswith("MiB, step 3")
    assert list(path.parent.iterdir()) == [path]
    return path


@pytest.fixture(scope="module")
def exported(file: Path) -> loader.ExportedDetector:
    return load(str(file))


def assert_same(found: loader.Found, expected: object, atol: float = 1e-3) -> None:
    """Asserts equal boxes, scores and labels in the same order."""
    assert np.array_equal(found.labels, expected.labels) and len(found.labels) > 0
    np.testing.assert_allclose(found.boxes_xyxy, expected.boxes_xyxy, rtol=0, atol=atol)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=1e-6)


def test_detections_are_those_of_the_original(live: Detector, exported: loader.ExportedDetector) -> None:
    for image in photographs():
        (found,), (expected,) = exported.detect([image]), live.detect([image])
        assert_same(found, expected)
        assert tuple(exported.class_names[label] for label in found.labels) == expected.class_names
        assert (
            found.boxes_xyxy[:, [0, 2]].max() <= image.shape[1] and found.boxes_xyxy[:, [1, 3]].max() <= image.shape[0]
        )


@pytest.mark.slow
def test_the_other_conventions_are_exported_too(tmp_path: Path) -> None:
    """They are: frozen norm, antialiasing, float pixels, inclusive ends, one square padded shape, floor, clipping after
    NMS."""
    live = detector_of(FROZEN)
    agreement.export_detector(live, tmp_path / "detector.zip", "a test", photographs()[:1])
    exported = load(str(tmp_path / "detector.zip"))
    assert [tuple(canvas) for canvas in exported.about["canvases"]] == [(96, 96)]
    for image in photographs()[:3]:
        assert_same(exported.detect([image])[0], live.detect([image])[0])


def test_kernels_in_bfloat16_are_exported_as_they_are(tmp_path: Path) -> None:
    live, path = detector_of(override(GROUP, {"model.dtype": "bfloat16", "data.buckets": 1})), tmp_path / "detector.zip"
    agreement.export_detector(live, path, "a test", photographs()[:1])
    exported = load(str(path))
    assert exported.about["format"] == loader.BFLOAT16_FORMAT
    assert {x.dtype.name for x in exported._parameters if x.ndim == 4} == {"bfloat16"}
    (image, *_) = photographs()
    assert_same(exported.detect([image])[0], live.detect([image])[0])


def test_pillows_pixels_are_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `data.resize pillow` the network of the file gets exactly the pixels of evaluation, without a program that
    resizes; a missing package is named."""
    live = detector_of(override(GROUP, {"data.resize": "pillow", "data.buckets": 1}))
    path = tmp_path / "detector.zip"
    agreement.write_file(path, live, facts(live, "a test", ""))
    with zipfile.ZipFile(path) as archive:
        assert [name for name in archive.namelist() if "programs" in name] == ["programs/detect_96x96"]
    exported = load(str(path))
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in rng.integers(1, 200, (50, 2))]
    given: list[np.ndarray] = []

    def nothing_found(_: object, pixels: jax.Array, *sizes: np.ndarray) -> tuple[np.ndarray, ...]:
        given.append(np.asarray(pixels))
        return np.zeros((1, 1, 4)), np.zeros((1, 1)), np.full((1, 1), -1)

    monkeypatch.setattr(exported, "_program", lambda kind, shape: nothing_found)
    exported.detect(images)
    for pixels, image in zip(given, images, strict=True):
        np.testing.assert_array_equal(pixels, padded_batch([image], live.config.data, 1).images)
    for module, package in (("PIL", "pillow"), ("flatbuffers", "flatbuffers")):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, missing=module: None if name == missing else True)
        with pytest.raises(LoadError, match=f"pip install {package}"):
            load(str(path))


def test_a_batch_gives_the_detections_of_single_images(exported: loader.ExportedDetector) -> None:
    """Detections are in the order of the images, each with its own padded shape; the last batch is filled up."""
    images = photographs()
    alone = [exported.detect([image])[0] for image in images]
    for found, expected in zip(exported.detect(images), alone, strict=True):
        assert_same(found, expected)
    wide = [i for i, (h, w) in enumerate(SIZES) if h <= w]
    assert len(wide) == 5
    for i, found in zip(wide, exported.detect([images[i] for i in wide], batch_size=3), strict=True):
        assert_same(found, alone[i], atol=0.01)  # sums of another batch are added in another order
    assert exported.detect([], batch_size=3) == []


def test_the_file_describes_its_contents(exported: loader.ExportedDetector, file: Path) -> None:
    about = exported.about
    assert (exported.class_names, exported.category_ids) == (["cat", "dog"], [1, 17])
    assert about["step"] == 3 and about["source"] == "RUN" and about["versions"]["jax"] == jax.__version__
    with zipfile.ZipFile(file) as inside:
        shown = inside.read("model_card.md").decode()
        for value in ("cat, dog", "not stated", "not measured", about["parameters_sha256"], about["renew_before"]):
            assert value in shown
        for name in (n for n in inside.namelist() if n.startswith("programs/")):
            assert jax.export.deserialize(bytearray(inside.read(name))).platforms == PLATFORMS


def test_a_file_names_the_command_that_renews_it_before_jax_may_refuse_it(file: Path, tmp_path: Path) -> None:
    """A warning of one line, from 151 days on. Files of the first releases, without a date, load without one."""
    with zipfile.ZipFile(file) as inside:
        about = json.loads(inside.read("about.json"))
    assert date.today() - date.fromisoformat(about["exported"]) <= timedelta(days=1)
    assert about["renew"].startswith("scripts/export.py --workdir RUN --out ") and about["renew"].endswith(" --step 3")

    def aged(days: int) -> str:
        old = {**about, "exported": (date.today() - timedelta(days=days)).isoformat()}
        return str(repacked(file, tmp_path / f"{days}.zip", about=json.dumps(old).encode()))

    assert load(aged(150)).about["versions"] == about["versions"]  # warnings are errors in tests
    with pytest.warns(UserWarning, match=rf"exported on \S+ with jax {re.escape(jax.__version__)}; .*") as caught:
        load(aged(160))
    (line,) = [str(warning.message) for warning in caught]
    assert line.endswith(f"renew it with {about['renew']}") and "\n" not in line
    first = {name: value for name, value in about.items() if name not in ("exported", "renew")}
    assert load(str(repacked(file, tmp_path / "first.zip", about=json.dumps(first).encode()))).about == first


ELSEWHERE = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

THERE = {"jax", "jaxlib", "numpy", "ml_dtypes", "opt_einsum", "scipy", "flatbuffers", "loader", *sys.stdlib_module_names}

class Only:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in THERE or name.startswith("_sysconfigdata"):
            return PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Only()]
sys.path.insert(0, ".")
from loader import load
import numpy as np

detector = load("detector.zip")
with np.load("images.npz") as images:
    found = detector.detect([images[name] for name in images.files])
np.savez("found.npz", **{f"{i}_{name}": value for i, f in enumerate(found) for name, value in f._asdict().items()})
for absent in ("flax", "tensorflow", "retina_jax"):
    assert absent not in sys.modules
"""


def test_jax_numpy_and_flatbuffers_are_enough(live: Detector, file: Path, tmp_path: Path) -> None:
    """Copied next to the file, the loader runs in a process that can import only these and what jax depends on."""
    images = photographs()[:2]
    shutil.copy(loader.__file__, tmp_path / "loader.py")
    shutil.copy(file, tmp_path)
    np.savez(tmp_path / "images.npz", *images)
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    command = [sys.executable, "-I", "-c", ELSEWHERE]
    ended = subprocess.run(command, cwd=tmp_path, env={**os.environ, **cache}, stderr=subprocess.PIPE, timeout=300)
    assert ended.returncode == 0, ended.stderr.decode()
    found = np.load(tmp_path / "found.npz")
    for i, expected in enumerate(live.detect(images)):
        assert_same(loader.Found(*(found[f"{i}_{name}"] for name in loader.Found._fields)), expected)


@pytest.mark.parametrize("form", CONVOLUTIONS)
def test_every_form_of_a_convolution_is_exported(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exported for all platforms with a symbolic batch, it gives the same result on this platform."""
    monkeypatch.setattr(convolution, "FEW_PRODUCTS", 0)
    shape, kernel_shape, stride = CONVOLUTIONS[form]
    (b,) = jax.export.symbolic_shape("b")
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=kernel_shape).astype(np.float32)
    call = jax.jit(lambda x, kernel: convolve(x, kernel, stride))
    program = jax.export.export(call, platforms=PLATFORMS)(jax.ShapeDtypeStruct((b, *shape), np.float32), kernel)
    text = program.mlir_module()
    forms = tuple(
        re.search(rf"stablehlo\.({op})\b", text) is not None for op in ("dot_general", "convolution|dynamic_conv")
    )
    assert forms == {"plain": (False, True)}.get(form, (True, True))
    x = rng.normal(size=(3, *shape)).astype(np.float32)
    found = jax.export.deserialize(program.serialize()).call(x, kernel)
    np.testing.assert_allclose(found, call(x, kernel), rtol=1e-5, atol=1e-4)


sides = st.integers(1, 400)


@settings(deadline=None, max_examples=100)
@example(163, 197, 801, 1333, 0, True)  # 163 * (801 / 163) is rounded down to 800
@example(343, 6, 33, 385, 0, True)
@given(sides, sides, st.integers(1, 300), st.integers(1, 400), st.sampled_from([0, 1, 2, 4, 6]), st.booleans())
def test_sizes_and_padded_shapes_are_those_of_evaluation(
    h: int, w: int, short: int, long: int, count: int, down: bool
) -> None:
    check_sizes(h, w, count, short_side=short, long_side=long, size_rounding="floor" if down else "nearest")


@pytest.mark.parametrize("count", [0, 1, 4])
def test_stretched_sizes_and_padded_shapes_are_those_of_evaluation(count: int) -> None:
    for h, w in ((7, 300), (120, 90), (64, 64)):
        check_sizes(h, w, count, short_side=100, long_side=100, resize_rule="stretch")
    assert (
        agreement._format_of(Config(data=DataConfig(resize_rule="stretch", resize="pillow"))) == loader.STRETCH_FORMAT
    )


def check_sizes(h: int, w: int, count: int, **rule: int | str) -> None:
    data = DataConfig(buckets=count, max_boxes=1, **rule)
    about = {"class_names": [], "category_ids": [], "size_rounding": "nearest", **rule, "canvases": padded_shapes(data)}
    exported = loader.ExportedDetector(about, [], {}, "detector.zip")
    size = exported.resized_size(h, w)
    assert size == resized_size(h, w, data.short_side, data.long_side, data.size_rounding, data.resize_rule)
    image = np.broadcast_to(np.zeros(3, np.uint8), (h, w, 3))
    assert exported.padded_shape(size) == padded_batch([image], data, 1).images.shape[1:3]


def tampered(path: Path, into: Path) -> None:
    """Returns the file with another bias of the classes, on which all scores depend."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(into, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "parameters.npz":
                arrays = dict(np.load(io.BytesIO(content)))
                changed = next(key for key, array in arrays.items() if np.allclose(array, -np.log(99)))
                arrays[changed] = arrays[changed] + np.float32(0.5)
                buffer = io.BytesIO()
                np.savez(buffer, **arrays)
                content = buffer.getvalue()
            new.writestr(name, content)


def test_a_file_with_other_detections_is_not_kept(
    live: Detector, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older file of this name is kept."""
    monkeypatch.setattr(agreement, "write_file", lambda path, *_: tampered(file, path))
    out = tmp_path / "detector.zip"
    out.write_bytes(b"older")
    with pytest.raises(ExportError, match=r"is not kept: 2 images, [0-9]+ detections"):
        agreement.export_detector(live, out, "a test", photographs()[:1])
    assert out.read_bytes() == b"older" and list(tmp_path.iterdir()) == [out]


def test_tiles_are_left_to_the_caller(
    live: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def stop(path: Path, detector: Detector, *_: str) -> None:
        raise OSError(f"data.tile {detector.config.data.tile}")

    monkeypatch.setattr(agreement, "write_file", stop)
    driver = dataclasses.replace(live.driver, config=override(live.config, {"data.tile": 64}))
    tiled = dataclasses.replace(live, driver=driver)
    with pytest.raises(ExportError, match=r"data\.tile 0"):
        agreement.export_detector(tiled, tmp_path / "detector.zip", "a test", photographs()[:1])
    assert "data.tile 64 is not part of the file" in capsys.readouterr().out


def test_every_padded_shape_is_compared(file: Path) -> None:
    """If no image has a certain padded shape, one is made."""
    exported = agreement.load(str(file))
    sizes = {(48, 32): [(64, 96)], (32, 48): [(96, 64)]}
    for size, others in sizes.items():
        image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
        (made,) = agreement.for_other_shapes(exported, [image])
        assert [exported.padded_shape(exported.resized_size(*made.shape[:2]))] == others
        assert np.array_equal(made[: size[0], : size[1]], image[: made.shape[0], : made.shape[1]])
    assert agreement.for_other_shapes(exported, [made, image]) == []


def test_a_comparison_without_detections_is_an_error(
    live: Detector, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without detections nothing is compared."""
    monkeypatch.setattr(agreement, "compare", lambda *_: agreement.Comparison(1, 0, 0, 0.0, 0.0))
    with pytest.raises(ExportError, match=r"2 images.*--images"):
        agreement.check(
            live, agreement.load(str(file)).detect, photographs()[:1], photographs()[1:2], agreement.PROGRAMS
        )


def test_a_path_that_cannot_be_written_is_named(live: Detector, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match=r"--out .*detector\.zip: "):
        agreement.export_detector(live, tmp_path / "file" / "detector.zip", "a test", [])


def test_the_loader_refuses_other_arrays(exported: loader.ExportedDetector) -> None:
    good = photographs()[0]
    for bad in (
        good.astype(np.float32),
        good[..., 0],
        good[None],
        good[:0],
        np.zeros((4, 4, 4), np.uint8),
        [[1, 2]],
        None,
    ):
        with pytest.raises(LoadError, match=r"^image 1: "):
            exported.detect([good, bad])
    for batch_size in (0, "2", 1.5, 10**30):
        with pytest.raises(LoadError, match=rf"^batch_size: {batch_size!r}"):
            exported.detect([good], batch_size=batch_size)
    with pytest.raises(LoadError, match=r"^images: give a list"):
        exported.detect(good)


def test_sixteen_bits_are_converted_with_the_range_of_training(
    exported: loader.ExportedDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = photographs()[0]
    with pytest.raises(LoadError, match="uint16"):
        exported.detect([image.astype(np.uint16)])
    monkeypatch.setitem(exported.about, "bits", 12)
    assert_same(exported.detect([image.astype(np.uint16) << 4])[0], exported.detect([image])[0], atol=0)


def repacked(file: Path, path: Path, **files: bytes | None) -> Path:
    """Returns the file with some of its parts replaced or left out, by the names `about` and `parameters`."""
    names = {"about.json": "about", "parameters.npz": "parameters"}
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = files.get(names.get(name, ""), old.read(name))
            if content is not None:
                new.writestr(name, content)
    return path


def claiming(count: int) -> bytes:
    """Returns an archive with one array whose header claims this many numbers; it holds four."""
    array, buffer = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "<f4", "fortran_order": False, "shape": (count,)})
    array.write(bytes(16))
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("arr_0.npy", array.getvalue())
    return buffer.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        lambda file, path: path.write_bytes(b""),
        lambda file, path: path.write_bytes(b"no archive at all"),
        lambda file, path: path.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
        lambda file, path: path.write_bytes(file.read_bytes()[:-1]),
        lambda file, path: path.write_bytes(file.read_bytes().replace(b"NUMPY", b"NUMPI")),
        lambda file, path: repacked(file, path, about=None),
        lambda file, path: repacked(file, path, about=b"{"),
        lambda file, path: repacked(file, path, about=b"[]"),
        lambda file, path: repacked(file, path, parameters=None),
        lambda file, path: repacked(file, path, parameters=b"no arrays"),
        lambda file, path: repacked(file, path, parameters=npz(np.array([{"any": "object"}]))),
        lambda file, path: repacked(file, path, about=json.dumps({"format": "retina_jax detector 3"}).encode()),
        lambda file, path: repacked(file, path, about=json.dumps({"format": loader.FORMAT}).encode()),
        lambda file, path: repacked(file, path, about=b"[" * 200_000),
        lambda file, path: repacked(file, path, about=json.dumps({"exported": "2026-02-30"}).encode()),
        lambda file, path: repacked(file, path, parameters=claiming(10**15)),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_in_one_line(
    file: Path, tmp_path: Path, damage: Callable[[Path, Path], object]
) -> None:
    path = tmp_path / "damaged.zip"
    damage(file, path)
    with pytest.raises(LoadError) as caught:
        load(str(path))
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def npz(*arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, *arrays)
    return buffer.getvalue()


def with_about(file: Path, path: Path, **changed: object) -> str:
    """Returns the path of the file without programs and with other fields in about.json; `None` is written as null."""
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(path, "w") as new:
        new.writestr("about.json", json.dumps({**json.loads(old.read("about.json")), **changed}))
        new.writestr("parameters.npz", npz(np.zeros(3, np.float32)))
    return str(path)


ANY = (
    -1,
    0,
    2**28 + 1,
    1e300,
    float("nan"),
    float("inf"),
    True,
    {},
    {"a": 1},
    [[]],
    [None],
    [1.0],
    [[1, 2, 3]],
    [[1, 2]] * 2,
)
WRONG: dict[str, tuple[object, ...]] = {
    "class_names": (*ANY, None, "abc", 3, [1], ["a", None]),
    "category_ids": (*ANY, None, "abc", 3, ["a"], [True]),
    "short_side": (*ANY, None, "a", 1.5, []),
    "long_side": (*ANY, None, "a", 1.5, []),
    "size_rounding": (*ANY, None, "up", ["floor"]),
    "canvases": (*ANY[:-1], None, "abc", 3, [], [3], ["ab"], [[64, 0]], [[64, 96.0]], [[2**14, 2**14 + 1]], [[10**6] * 2]),
    "resize": (*ANY, 3, ["pillow"]),
    "resize_rule": (*ANY, "other", ["fit"]),
    "bits": (*ANY, "x", 7, 17, 8.0, [8]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_field_of_another_type_or_out_of_bounds_is_refused(file: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "detector.zip"
    for value in WRONG[name]:
        with pytest.raises(LoadError) as caught:
            load(with_about(file, path, **{name: value}))
        assert str(caught.value) == f"{path}: about.json: missing or invalid {name}; export it again", value


def test_fields_that_older_files_lack_are_optional(file: Path, tmp_path: Path) -> None:
    changed = {"bits": None, "resize": None, "resize_rule": None, "canvases": [[2**14, 2**14]], "class_names": []}
    assert load(with_about(file, tmp_path / "detector.zip", **changed)).class_names == []


@pytest.mark.parametrize(
    "array",
    [
        np.array(["a"]), np.array([b"a"]), np.array(["2020-01-01"], "datetime64[D]"), np.zeros(3, "timedelta64[s]"),
        np.zeros(3, "V3"), np.zeros(3, [("a", np.float32)]), np.zeros(3, complex),
        np.zeros(3, ">f4"),
    ],
    ids=lambda array: str(array.dtype),
)  # fmt: skip
def test_parameters_that_are_not_numbers_are_refused(file: Path, tmp_path: Path, array: np.ndarray) -> None:
    path = repacked(file, tmp_path / "detector.zip", parameters=npz(np.zeros(3, np.float32), array))
    with pytest.raises(LoadError, match="parameters are not numbers"):
        load(str(path))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda d: d._programs.update(dict.fromkeys(d._programs, d._programs["programs/detect_96x64"])), "structure"),
        (lambda d: d._programs.update(dict.fromkeys(d._programs, d._programs["programs/prepare_96x64"])), "structure"),
        (lambda d: d._programs.update({"programs/prepare_96x64": d._programs["programs/prepare_64x96"]}), "Shape"),
        (lambda d: d._programs.pop("programs/detect_96x64"), "cannot be read"),
        (lambda d: d._parameters.pop(), "structure"),
        (lambda d: d._parameters.__setitem__(0, np.zeros(1, np.int8)), "mismatch"),
        (lambda d: d.about.update(canvases=[[64, 64]]), "no padded shape"),
        (lambda d: d.about.update(canvases=[[128, 128]]), "cannot be read"),
        (lambda d: d.about.update(short_side=300, long_side=300), "no padded shape"),
        (lambda d: d.about.update(resize_rule="stretch", short_side=97), "no padded shape"),
        (lambda d: d.about.update(resize="pillow", canvases=[[96, 96]]), "cannot be read"),
    ],
)  # fmt: skip
def test_contents_that_do_not_fit_together_are_refused_in_one_line(
    file: Path, damage: Callable[[loader.ExportedDetector], object], why: str
) -> None:
    detector = load(str(file))
    damage(detector)
    with pytest.raises(LoadError, match=why) as caught:
        detector.detect([np.zeros((48, 32, 3), np.uint8)])
    assert str(caught.value).startswith(f"{file}: ") and str(caught.value).isprintable()


BOXES, SCORES, LABELS = np.ones((1, 2, 4), np.float32), np.ones((1, 2), np.float32), np.ones((1, 2), np.int32)
RESULTS = {
    "two": (BOXES, SCORES),
    "one array": np.ones((3, 1, 2), np.float32),
    "names": {"boxes": BOXES, "scores": SCORES, "labels": LABELS},
    "other order": (SCORES, BOXES, LABELS),
    "scores as labels": (BOXES, SCORES, SCORES),
    "integer boxes": (BOXES.astype(np.int32), SCORES, LABELS),
    "another batch": (np.ones((2, 2, 4), np.float32), np.ones((2, 2), np.float32), np.ones((2, 2), np.int32)),
    "no detections axis": (np.ones((1, 4), np.float32), np.ones(1, np.float32), np.ones(1, np.int32)),
    "a label without a class": (BOXES, SCORES, 2 * LABELS),
}


@pytest.mark.parametrize("results", RESULTS.values(), ids=list(RESULTS))
def test_other_results_of_a_program_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch, results: object) -> None:
    detector = load(str(file))
    monkeypatch.setattr(detector, "_program", lambda kind, shape: lambda *_: results if kind == "detect" else BOXES)
    with pytest.raises(LoadError, match="do not fit together") as caught:
        detector.detect([np.zeros((48, 32, 3), np.uint8)])
    assert str(caught.value).startswith(f"{file}: ") and str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (MemoryError(), MemoryError),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), jax.errors.JaxRuntimeError),
        (jax.errors.JaxRuntimeError("INTERNAL: the device is lost"), jax.errors.JaxRuntimeError),
        (RecursionError("maximum recursion depth exceeded"), RecursionError),
        (FloatingPointError("jax_debug_nans"), FloatingPointError),
        (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: Failed to deserialize StableHLO\n\x1b[31m"), LoadError),
    ],
    ids=lambda value: str(value)[:20],
)
def test_errors_of_the_device_and_of_the_caller_stay_what_they_are(
    file: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, expected: type[Exception]
) -> None:
    def fails(*_: object) -> None:
        raise raised

    detector, image = load(str(file)), np.zeros((48, 32, 3), np.uint8)
    with pytest.raises(jax.errors.TracerArrayConversionError):
        jax.eval_shape(lambda traced: detector.detect([traced]), image)
    monkeypatch.setattr(detector, "_program", lambda *_: fails)
    with pytest.raises(expected) as caught:
        detector.detect([image])
    assert caught.type is expected and (expected is not LoadError or str(caught.value).isprintable())


def test_unpacked_parameters_are_bounded_by_the_size_of_the_file(file: Path, tmp_path: Path) -> None:
    """Each of the two archives unpacks to less than 100 times its own size, but both to more than that of the file."""
    inner, path = io.BytesIO(), tmp_path / "detector.zip"
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.npy", array_of(5 * 10**6))
        archive.writestr("1.npy", array_of(10**5), zipfile.ZIP_STORED)
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        new.writestr("about.json", old.read("about.json"))
        new.writestr("parameters.npz", inner.getvalue())
        new.writestr("programs/any", np.random.default_rng(0).bytes(20_000))
    stored = len(inner.getvalue())
    assert 100 * stored > 5 * 10**6 + 10**5 > 100 * path.stat().st_size > stored + 30_000
    with pytest.raises(LoadError, match="100 times"):
        load(str(path))


def array_of(count: int) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(count, np.uint8))
    return buffer.getvalue()


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("part", ["about.json", "parameters.npz", "0.npy"])
def test_a_false_size_does_not_unpack_more(file: Path, tmp_path: Path, part: str, compression: int) -> None:
    """The stated size of one entry is 100 bytes; zipfile reads that many, but may inflate all of it."""
    path, false, inner = tmp_path / "detector.zip", array_of(2 * 10**6), io.BytesIO()

    def write(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
        archive.writestr(name, false if name == part else content, compression if name == part else None)
        if name == part:
            archive.filelist[-1].file_size = 100

    with zipfile.ZipFile(inner, "w") as archive:
        write(archive, "0.npy", array_of(3))
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(path, "w") as new:
        write(new, "about.json", old.read("about.json"))
        write(new, "parameters.npz", inner.getvalue())
    tracemalloc.start()
    try:
        with pytest.raises(LoadError):
            load(str(path))
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def test_texts_of_a_file_are_escaped_and_shortened(file: Path, tmp_path: Path) -> None:
    path, hostile = tmp_path / "detector.zip", "\x1b[31mX\nY\u202e\ud800" + "z" * 10**5
    for value in (hostile, 3, [hostile], None):
        with pytest.raises(LoadError, match="has format") as caught:
            load(with_about(file, path, format=value))
        assert str(caught.value).isprintable() and len(str(caught.value)) < len(str(path)) + 150
    changed = {"exported": "2020-01-01", "renew": hostile, "versions": {"jax": hostile}}
    with pytest.warns(UserWarning, match="exported on 2020-01-01") as warned:
        load(with_about(file, path, **changed))
    line = str(warned[0].message)
    assert line.isprintable() and "renew it with \\x1b[31mX Y" in line and len(line) < len(str(path)) + 600


@pytest.mark.parametrize("program", [b"", b"no program", bytes(1000)])
def test_a_damaged_program_is_refused_in_one_line(file: Path, program: bytes) -> None:
    detector = load(str(file))
    detector._programs = dict.fromkeys(detector._programs, program)
    with pytest.raises(LoadError, match=r"programs/\w+: cannot be read") as caught:
        detector.detect(photographs()[:1])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ((), "--workdir: "),
        (("--workdir", "RUN", "--weights", "torchvision:FILE"), "--workdir: .* and not both"),
        (("--workdir", "RUN", "--format", "savedmodel"), r"--format savedmodel: .*docs/export\.md"),
        (("--workdir", "RUN", "--format", "other"), "other"),
        (
            ("--workdir", "RUN", "--out", "detector.onn"),
            r"--out detector\.onn: must end in \.zip \(StableHLO\) or \.onnx",
        ),
        (("--workdir", "RUN", "--count", "0"), "--count: invalid value 0"),
        (("--workdir", "RUN", "--images", "/no/folder"), "/no/folder: no such file"),
    ],
)
def test_the_script_refuses_in_one_line(
    live: Detector, tmp_path: Path, options: tuple[str, ...], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        export(live, "--out", tmp_path / "detector.zip", *options)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_augmentation_is_not_exported(live: Detector, tmp_path: Path) -> None:
    """A file without it would give other detections; the message names the options."""
    augmented = dataclasses.replace(live, driver=Driver(override(GROUP, {"detection.tta_flip": True}), 2))
    with pytest.raises(ExportError, match=r"--detection\.no-tta-flip"):
        agreement.export_detector(augmented, tmp_path / "detector.zip", "a test", photographs()[:1])
    assert not list(tmp_path.iterdir())


def test_without_validation_images_scenes_are_generated(live: Detector) -> None:
    images, what = images_for(live, None, 3)
    assert [image.shape for image in images] == [(64, 64, 3)] * 3 and what.startswith(
        "3 generated scenes (data.val_ann"
    )


def test_damaged_validation_images_are_left_out_and_reported(live: Detector, tmp_path: Path) -> None:
    source = rectangles(tmp_path, [(40, 30), (30, 40), (20, 20)])
    fields = {"data.source": "coco", "data.val_annotations": source.name, "data.val_images": str(tmp_path / "images")}
    there = dataclasses.replace(live, driver=Driver(override(live.config, fields), 2))
    (tmp_path / "images" / "001.jpeg").write_bytes(b"no image")
    images, what = images_for(there, None, 3)
    assert [image.shape for image in images] == [(30, 40, 3), (20, 20, 3)]
    assert what.startswith(f"the first 2 images of {source.name} (1 unreadable ones left out, the last one: ")
    for name in ("000.jpeg", "002.jpeg"):
        (tmp_path / "images" / name).unlink()
    images, what = images_for(there, None, 2)
    assert len(images) == 2 and what.startswith(f"2 generated scenes ({source.name}: 2 unreadable ones")
