"""Writes a detector as an ONNX model, from uint8 images to boxes, and runs such a file with ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from jaxtyping import UInt8
from onnx import TensorProto, helper

from retina_jax.config_io import override
from retina_jax.detector import Detector
from retina_jax.export.loader import Found
from retina_jax.export.onnx_detection import detections
from retina_jax.export.onnx_network import Network
from retina_jax.export.onnx_nodes import Graph
from retina_jax.export.onnx_pixels import prepare
from retina_jax.model.retinanet import STATISTICS
from retina_jax.training.parallel import Driver

OPSET = 17
"""Every operator is in ONNX Runtime, OpenVINO and TensorRT. IR_VERSION is that of the release of ONNX with this opset."""
IR_VERSION = 8
MOST_AT_ONCE = 4  # images of one size that the comparison detects in at once


def model_of(detector: Detector, about: dict[str, Any], card: str) -> onnx.ModelProto:
    """Returns the model; its metadata is `about` with every value as JSON, its description `card`."""
    config, graph = detector.config, Graph()
    classes, kind = len(detector.class_names), config.model.input_normalisation
    prepared = prepare(graph, "images", config.data, kind)
    network = Network(graph, detector.variables, config.model)
    maps = network.levels(prepared.images, STATISTICS[kind][0])
    found = detections(graph, maps, prepared, classes, config)
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", "height", "width", 3])
    most = config.detection.max_detections
    outputs = {
        "boxes": (TensorProto.FLOAT, ["batch", most, 4]),
        "scores": (TensorProto.FLOAT, ["batch", most]),
        "classes": (TensorProto.INT32, ["batch", most]),
        "count": (TensorProto.INT32, ["batch"]),
    }
    infos = {name: (found[name], helper.make_tensor_value_info(name, *kind)) for name, kind in outputs.items()}
    opset = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(
        graph.complete("detector", [images], infos),
        opset_imports=opset,
        ir_version=IR_VERSION,
        producer_name="retina_jax",
    )
    model.doc_string = card
    helper.set_model_props(model, {key: json.dumps(value) for key, value in about.items()})
    return model


def write_model(path: Path, detector: Detector, about: dict[str, Any], card: str) -> None:
    """Writes the model if onnx.checker accepts it, types and shapes included."""
    model = model_of(detector, about, card)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())


def in_float32(detector: Detector) -> Detector:
    """Returns the detector with convolutions in float32, as the model computes them."""
    if detector.config.model.dtype == "float32":
        return detector
    driver = Driver(override(detector.config, {"model.dtype": "float32"}), len(detector.class_names))
    return replace(detector, driver=driver)


class OnnxDetector:
    """A file of `write_model` in ONNX Runtime, on the CPU."""

    def __init__(self, path: str) -> None:
        self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def detect(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> list[Found]:
        """Returns the detections of images of any sizes; neighbours of one size are detected in together."""
        found: list[Found] = []
        while len(found) < len(images):
            rest = images[len(found) : len(found) + MOST_AT_ONCE]
            same = next((i for i, image in enumerate(rest) if image.shape != rest[0].shape), len(rest))
            results = self._session.run(["boxes", "scores", "classes", "count"], {"images": np.stack(rest[:same])})
            found += [Found(*(array[:count] for array in arrays)) for *arrays, count in zip(*results, strict=True)]
        return found
