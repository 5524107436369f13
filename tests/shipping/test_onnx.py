"""An ONNX model gives the detections of its detector: pixels, sizes, network and detection apart, then together."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from PIL import Image
from test_shipping import FROZEN, GROUP, ROOT, assert_same, detector_of, export, photographs

from retina_jax.config import Config, DataConfig, DetectionConfig
from retina_jax.config_io import override
from retina_jax.data.pipeline import LARGE
from retina_jax.data.transforms import resize, resize_large, resized_size
from retina_jax.detector import Detector, padded_batch
from retina_jax.export import agreement, onnx_file, onnx_pixels
from retina_jax.export.agreement import ExportError
from retina_jax.export.onnx_detection import detections
from retina_jax.export.onnx_network import Network
from retina_jax.export.onnx_nodes import Graph
from retina_jax.export.onnx_pixels import Prepared
from retina_jax.model.initialisation import initialise
from retina_jax.model.retinanet import RetinaNet
from retina_jax.ops.anchors import anchor_grid, anchors_per_cell, level_sizes
from retina_jax.ops.postprocess import detect

TYPES = {np.uint8: TensorProto.UINT8, np.int64: TensorProto.INT64, np.float32: TensorProto.FLOAT}


def session(graph: Graph, outputs: dict[str, str], **inputs: type) -> Callable[..., list[np.ndarray]]:
    """Returns a function that runs the graph in ONNX Runtime; `inputs` are the types of arrays of any shape."""
    infos = [helper.make_tensor_value_info(name, TYPES[kind], None) for name, kind in inputs.items()]
    given = {name: (value, helper.make_empty_tensor_value_info(name)) for name, value in outputs.items()}
    complete = graph.complete("test", infos, given)
    opset = [helper.make_opsetid("", onnx_file.OPSET)]
    model = helper.make_model(complete, opset_imports=opset, ir_version=onnx_file.IR_VERSION)
    return onnxruntime.InferenceSession(model.SerializeToString()).run


@pytest.mark.parametrize("pixels", ["uint8", "float32"])
@pytest.mark.parametrize("kind", ["bilinear", "antialias", "pillow"])
def test_pixels_are_those_of_evaluation(kind: str, pixels: str) -> None:
    """Resizes batches of two from any size to any size, and an image of more than 2 ** 22 pixels."""
    if (kind, pixels) == ("pillow", "float32"):
        pytest.skip("no such config")
    graph = Graph()
    found = onnx_pixels._resize(graph, "images", "size", "resized", DataConfig(resize=kind, pixels=pixels))
    run = session(graph, {"found": found}, images=np.uint8, size=np.int64, resized=np.int64)
    rng = np.random.default_rng(0)
    sizes = [(64, 96, 32, 48), (64, 96, 21, 32), (1, 96, 1, 32), (64, 3, 64, 96), (1, 1, 5, 7), (2001, 2997, 64, 96)]
    for h, w, *new in [*sizes, *rng.integers(1, 97, (30, 4)).tolist()]:
        if kind == "pillow":  # it takes y first in some tall images, and if the sides are not in proportion
            (h, w), short = sorted((h, w)), new[0]
            new = list(resized_size(h, w, short, 2 * short))
        images = rng.integers(0, 256, (1 if h > 100 else 2, h, w, 3), np.uint8)
        given = {"images": images, "size": np.array([h, w]), "resized": np.array(new)}
        (resized,) = run(None, given)
        for image, mine in zip(images, resized, strict=True):
            live = (resize_large if h * w > LARGE else resize)(image, tuple(new), kind, pixels)
            difference = np.abs(mine - np.asarray(live, np.float32))
            if (kind, pixels) == (
                "antialias",
                "uint8",
            ):  # halves after many roundings: a grey level in 1 of 1000 numbers
                assert difference.max() <= 1 and (difference > 0).sum() <= 1 + difference.size / 1000
            else:
                assert difference.max() <= (0 if pixels == "uint8" else 1e-4)


@pytest.mark.parametrize("rounding", ["nearest", "floor"])
@pytest.mark.parametrize("count", [0, 1, 2, 4, 6])
def test_sizes_and_padded_shapes_are_those_of_evaluation(rounding: str, count: int) -> None:
    data = DataConfig(short_side=801, long_side=1333, buckets=count, size_rounding=rounding, max_boxes=1)
    graph = Graph()
    size = onnx_pixels._resized_size(graph, "size", data)
    outputs = {"resized": size, "padded": onnx_pixels._padded_size(graph, size, data)}
    run = session(graph, outputs, size=np.int64)
    sides = np.random.default_rng(count).integers(1, 2000, (300, 2)).tolist()
    for h, w in [(163, 197), (1, 1), (1, 2000), (960, 963), *sides]:  # 163 * (801 / 163) is rounded down to 800
        resized, padded = run(None, {"size": np.array([h, w])})
        assert tuple(resized) == resized_size(h, w, 801, 1333, rounding)
        if (h + w) % 60 == 0:  # makes the padded image
            image = np.broadcast_to(np.zeros(3, np.uint8), (h, w, 3))
            assert tuple(padded) == padded_batch([image], data, 1).images.shape[1:3]


def test_stretched_images_are_those_of_evaluation() -> None:
    data = DataConfig(short_side=33, long_side=33, resize_rule="stretch", buckets=1)
    image, graph = np.random.default_rng(0).integers(0, 256, (20, 51, 3), np.uint8), Graph()
    prepared = onnx_pixels.prepare(graph, "images", data, "detectron")
    run = session(graph, {"pixels": prepared.images, "size": prepared.resized_hw}, images=np.uint8)
    pixels, size = run(None, {"images": image[None]})
    batch = padded_batch([image], data, 1)
    assert tuple(size) == tuple(batch.image_sizes[0]) == (33, 33)
    mean = np.array(onnx_pixels.STATISTICS["detectron"][1][::-1], np.float32)
    expected = np.asarray(batch.images[0, :33, :33], np.float32) - mean
    np.testing.assert_allclose(pixels[0, :, :33, :33].transpose(1, 2, 0), expected, rtol=0, atol=1e-4)


NETWORKS = {
    "resnet50": {
        "model.backbone": "resnet50", "model.norm": "frozen", "model.max_level": 7, "model.input_normalisation": "imagenet",
    },
    "resnext": {
        "model.backbone": "resnext101_32x8d", "model.norm": "batch", "model.p6_from": "p5", "model.frozen_stages": 2,
        "model.stride_position": "3x3", "model.max_level": 8, "model.base_width": 16, "model.head_norm": "group",
    },
    "resnet34": {
        "model.backbone": "resnet34", "model.stage_blocks": (1, 2, 1, 1), "model.min_level": 2, "model.head_norm": "batch",
        "model.norm": "frozen_statistics",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_those_of_the_network(name: str) -> None:
    """With statistics and parameters that all matter."""
    config = override(GROUP, NETWORKS[name]).model
    model = RetinaNet(config, 2, anchors_per_cell=3)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: (np.asarray(x) + rng.uniform(0.0, 0.2, x.shape)).astype(np.float32),
        jax.device_get(initialise(model, 0)),
    )
    images = rng.integers(0, 256, (2, 64, 32, 3), np.uint8)
    sizes = np.array([[64, 32]] * 2, np.int32)
    expected = jax.jit(lambda v, *inputs: model.apply(v, *inputs, method="levels"))(variables, images, sizes)

    graph, data = Graph(), DataConfig(short_side=32, long_side=64, buckets=0)
    prepared = onnx_pixels.prepare(graph, "images", data, config.input_normalisation)
    maps = Network(graph, variables, config).levels(
        prepared.images, onnx_pixels.STATISTICS[config.input_normalisation][0]
    )
    outputs = {f"{i}_{j}": value for i, level in enumerate(maps) for j, value in enumerate(level)}
    found = iter(session(graph, outputs, images=np.uint8)(None, {"images": images}))
    for level in expected:
        for live in level:
            live = np.asarray(live)
            mine = next(found).transpose(0, 2, 3, 1).reshape(live.shape)
            np.testing.assert_allclose(mine, live, rtol=0, atol=1e-5 * np.abs(live).max())


@pytest.mark.parametrize(
    ("clip", "style", "agnostic"),
    [("before_nms", "torchvision", False), ("after_nms", "detectron", False), ("before_nms", "detectron", True)],
)
def test_equal_scores_keep_the_order_of_the_detector(clip: str, style: str, agnostic: bool) -> None:
    """Logits take six values, so TopK, NMS and the final choice meet ties in every class and level, and at the
    threshold."""
    rule = DetectionConfig(
        clip=clip, top_k=50, max_detections=30, score_threshold=0.5, threshold_coarsest=clip == "before_nms",
        class_agnostic_nms=agnostic,
    )  # fmt: skip
    config = override(GROUP, {"anchors.style": style, "model.max_level": 6})
    config = Config(data=config.data, model=config.model, anchors=config.anchors, detection=rule)
    padded, resized, classes, images = (64, 96), (60, 91), 3, 2
    cells, rng = level_sizes(padded, config.model), np.random.default_rng(0)
    per_cell = anchors_per_cell(config.anchors)
    logits, deltas = (
        [values((images, *size, per_cell * n)).astype(np.float32) for size in cells]
        for n, values in (
            (classes, lambda shape: rng.integers(-3, 3, shape)),
            (4, lambda shape: rng.normal(0, 0.5, shape)),
        )
    )
    flat = ([x.reshape(images, -1, n) for x in maps] for maps, n in ((logits, classes), (deltas, 4)))
    anchors = anchor_grid(padded, config.anchors, config.model)
    expected = jax.jit(lambda *maps: detect(*maps, anchors, jnp.array([resized] * images), rule))(*flat)

    graph, names = Graph(), [(f"logits{i}", f"deltas{i}") for i in range(len(cells))]
    sizes = (graph.constant(size) for size in (resized, resized, padded))
    run = session(
        graph,
        detections(graph, names, Prepared("", *sizes), classes, config),
        **{name: np.float32 for pair in names for name in pair},
    )
    given = [x.transpose(0, 3, 1, 2) for pair in zip(logits, deltas, strict=True) for x in pair]
    boxes, scores, labels, counts = run(None, dict(zip((n for pair in names for n in pair), given, strict=True)))
    for i, count in enumerate(counts):
        live = np.asarray(expected.boxes_xyxy[i])
        solid = (live[:, 2:] > live[:, :2]).all(axis=1)  # as the detector: it drops boxes without area
        assert count == solid.sum() >= 15 and len(set(scores[i])) < 4
        assert labels[i, :count].tolist() == np.asarray(expected.labels[i])[solid].tolist()
        np.testing.assert_allclose(boxes[i, :count], live[solid], rtol=0, atol=1e-3)
        np.testing.assert_allclose(scores[i, :count], np.asarray(expected.scores[i])[solid], rtol=0, atol=1e-6)
        assert (labels[i, count:] == -1).all() and not boxes[i, count:].any() and not scores[i, count:].any()


@pytest.fixture(scope="module")
def live() -> Detector:
    return detector_of(GROUP)


@pytest.fixture(scope="module")
def file(live: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the model written by the script."""
    path = tmp_path_factory.mktemp("exported") / "detector.onnx"
    lines = export(live, "--workdir", "RUN", "--out", path, "--count", "2", "--licence", "MIT").splitlines()
    assert (
        lines[3].startswith("4 images, ") and "all found by both" in lines[3] and "ms of CPU time) exported" in lines[4]
    )
    assert list(path.parent.iterdir()) == [path]
    return path


def test_detections_are_those_of_the_detector(live: Detector, file: Path) -> None:
    """Of images of several sizes, alone, and in a batch of four of one size and another padded shape."""
    exported, images = onnx_file.OnnxDetector(str(file)), photographs()
    batch = [np.ascontiguousarray(images[2][:48, i : i + 32]) for i in range(4)]
    for image, found in zip([*images, *batch], exported.detect([*images, *batch]), strict=True):
        assert_same(found, live.detect([image])[0], atol=0.01)


def test_the_other_conventions_are_exported_too(tmp_path: Path) -> None:
    """They are those of FROZEN in test_shipping.py, in bfloat16, which is compared in float32."""
    live = detector_of(override(FROZEN, {"model.dtype": "bfloat16"}))
    text = agreement.export_detector(live, tmp_path / "detector.onnx", "a test", photographs()[:1], onnx=True)
    assert re.match("3 images, [1-9].*; 2 images were made from the first", text)


def test_an_image_without_detections_gives_empty_rows(live: Detector) -> None:
    none = dataclasses.replace(live.config.detection, score_threshold=0.99)
    driver = type(live.driver)(dataclasses.replace(live.config, detection=none), 2)
    model = onnx_file.model_of(dataclasses.replace(live, driver=driver), {}, "")
    run = onnxruntime.InferenceSession(model.SerializeToString()).run
    boxes, scores, classes, count = run(None, {"images": np.zeros((2, 40, 50, 3), np.uint8)})
    assert count.tolist() == [0, 0] and (classes == -1).all() and not boxes.any() and not scores.any()


def test_the_file_describes_its_contents(file: Path) -> None:
    """In its metadata, with the checksum of its parameters, and in the model card."""
    model = onnx.load(str(file))
    about = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert about["class_names"] == ["cat", "dog"] and about["score_threshold"] == GROUP.detection.score_threshold
    assert about["versions"]["jax"] == jax.__version__ and len(about["parameters_sha256"]) == 64
    assert about["licence"] == "MIT" and "| licence | MIT |" in model.doc_string
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)] and model.ir_version == 8
    assert "backbone/c2/block1/conv1/kernel" in {array.name for array in model.graph.initializer}


def test_a_file_with_other_detections_is_not_kept(
    live: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older file of this name is kept. The scores differ by more than 1e-5, the boxes do not."""
    plain = Network.levels

    def changed(network: Network, *arguments: object) -> list:
        network.weights["class_head/output/bias"] = network.weights["class_head/output/bias"] + np.float32(1e-2)
        return plain(network, *arguments)

    monkeypatch.setattr(Network, "levels", changed)
    out = tmp_path / "detector.onnx"
    out.write_bytes(b"older")
    with pytest.raises(ExportError, match=r"is not kept: 3 images, [0-9]+ detections") as caught:
        agreement.export_detector(live, out, "a test", photographs()[:1], onnx=True)
    assert "\n" not in str(caught.value) and out.read_bytes() == b"older" and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named(
    live: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "retina_jax.export.onnx_file")
    monkeypatch.delattr("retina_jax.export.onnx_file")
    with pytest.raises(ExportError, match=rf"^--format onnx: .* {package}; pip install 'retina-jax\[onnx\]'$"):
        agreement.export_detector(live, tmp_path / "detector.onnx", "a test", photographs()[:1], onnx=True)
    assert not list(tmp_path.iterdir())


BLOCKS = re.findall(r"^```\w+\n(.*?)^```$", (ROOT / "docs" / "export.md").read_text(), re.MULTILINE | re.DOTALL)
LOCAL, CLIENT = (block for block in BLOCKS if block.startswith("import json"))
(TRITON,) = (block for block in BLOCKS if block.startswith("name:"))
(DOCKER,) = (block for block in BLOCKS if block.startswith("docker"))
ONLY = """
import sys
sys.modules.update(dict.fromkeys(["jax", "jaxlib", "flax", "tensorflow", "onnx", "retina_jax"]))
"""
"""Makes every import of these packages an error."""


def printed(code: str, folder: Path) -> list[list[str]]:
    """Returns the words of each line that a program of the guide prints, in a process of its own."""
    command = [sys.executable, "-I", "-c", ONLY + code]
    ended = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    return [line.split() for line in ended.stdout.splitlines()]


def assert_printed(lines: list[list[str]], live: Detector, image: np.ndarray, names: list[str]) -> None:
    (expected,) = live.detect([image])
    assert [line[0] for line in lines] == [names[label] for label in expected.labels] and lines
    numbers = np.array([line[1:] for line in lines], np.float64)
    np.testing.assert_allclose(numbers[:, 0], expected.scores, rtol=0, atol=1e-5)
    np.testing.assert_allclose(numbers[:, 1:], expected.boxes_xyxy, rtol=0, atol=0.01)


def test_the_program_of_the_guide_gives_the_boxes_of_the_detector(live: Detector, file: Path, tmp_path: Path) -> None:
    """With onnxruntime, numpy and Pillow alone."""
    image = photographs()[2]
    Image.fromarray(image).save(tmp_path / "image.jpg", format="PNG")  # no JPEG, so that the pixels stay
    (tmp_path / "detector.onnx").symlink_to(file)
    assert_printed(printed(LOCAL, tmp_path), live, image, ["cat", "dog"])


KINDS = {"UINT8": np.uint8, "FP32": np.float32, "INT32": np.int32}
"""Types of the Open Inference Protocol, for numpy."""


def test_the_client_of_the_guide_sends_and_reads_the_format_of_the_protocol(
    live: Detector, file: Path, tmp_path: Path
) -> None:
    """The server of this test does what the protocol states: JSON with names, types, shapes and flat data."""
    run, image = onnxruntime.InferenceSession(str(file)), photographs()[1]
    Image.fromarray(image).save(tmp_path / "image.jpg", format="PNG")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v2/models/detector/infer"
            (given,) = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["inputs"]
            assert set(given) == {"name", "datatype", "shape", "data"}
            array = np.array(given["data"], KINDS[given["datatype"]]).reshape(given["shape"])
            arrays = zip(run.get_outputs(), run.run(None, {given["name"]: array}), strict=True)
            kinds = {np.dtype(kind): name for name, kind in KINDS.items()}
            answer = {
                "model_name": "detector",
                "outputs": [
                    {"name": o.name, "datatype": kinds[a.dtype], "shape": a.shape, "data": a.ravel().tolist()}
                    for o, a in arrays
                ],
            }
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *arguments: object) -> None:
            """Prints nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        lines = printed(CLIENT.replace("localhost:8000", f"127.0.0.1:{server.server_port}"), tmp_path)
        server.shutdown()
    assert_printed(lines, live, image, ["0", "1"])


def test_the_configuration_of_the_server_fits_the_model() -> None:
    """Names, types and shapes without the batch, at the default number of detections."""
    config = override(GROUP, {"detection.max_detections": Config().detection.max_detections})
    model = onnx_file.model_of(detector_of(config), {}, "")
    run = onnxruntime.InferenceSession(model.SerializeToString())
    kinds = {"tensor(uint8)": "UINT8", "tensor(float)": "FP32", "tensor(int32)": "INT32"}
    shapes = {}
    for value in [*run.get_inputs(), *run.get_outputs()]:
        sides = [side if isinstance(side, int) else -1 for side in value.shape[1:]]
        shapes[value.name] = (kinds[value.type], sides or [1])  # Triton needs a dimension, which `reshape` removes
    entry = r'name: "(\w+)" data_type: TYPE_(\w+) dims: \[ ([-\d, ]+) \]( reshape { shape: \[ \] })?'
    found = re.findall(entry, TRITON)
    assert {name: (kind, [int(side) for side in dims.split(",")]) for name, kind, dims, _ in found} == shapes
    assert [name for name, *_, reshape in found if reshape] == ["count"]
    assert TRITON.startswith('name: "detector"\nbackend: "onnxruntime"\n') and "/models/detector/infer" in CLIENT
    assert "--model-repository=/models" in DOCKER and ":/models" in DOCKER and "-p 8000:8000" in DOCKER
