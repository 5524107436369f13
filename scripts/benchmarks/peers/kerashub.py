"""KerasHub's RetinaNet on JAX with the paper's recipe: BatchNorm and the first stages frozen, P6 from C5, SGD."""

from __future__ import annotations

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import keras_hub
import numpy as np

from benchmarks.inputs import scene
from benchmarks.work import BenchmarkError, Task, Work

STACKS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
FROZEN = ("conv1", "stack0")


def make(task: Task) -> Work:
    """Returns the work of `task`."""
    makers = {"step": step, "forward": forward}
    if task.name not in makers or task.backbone not in STACKS:
        raise BenchmarkError(f"KerasHub has no benchmark {task.name} of {task.backbone}")
    keras.utils.set_random_seed(task.seed)
    keras.mixed_precision.set_dtype_policy("mixed_bfloat16" if task.dtype == "bfloat16" else "float32")
    made = scene(task.batch, task.padded_hw, task.boxes, task.classes, task.seed)
    images = (made.images / 255).astype(np.float32)
    work = makers[task.name](task, network(task), images, {"boxes": made.boxes_xyxy, "labels": made.labels})
    return work._replace(
        facts={"version": f"KerasHub {keras_hub.__version__}, Keras {keras.__version__}, jax {jax.__version__}"}
    )


def network(task: Task) -> keras_hub.models.RetinaNetObjectDetector:
    """Returns the model with random weights."""
    resnet = keras_hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[64, 128, 256, 512],
        stackwise_num_blocks=list(STACKS[task.backbone]),
        stackwise_num_strides=[1, 2, 2, 2],
        block_type="bottleneck_block",
        image_shape=(*task.padded_hw, 3),
    )
    for layer in resnet.layers:
        if isinstance(layer, keras.layers.BatchNormalization) or layer.name.startswith(FROZEN):
            layer.trainable = False
    backbone = keras_hub.models.RetinaNetBackbone(
        resnet, min_level=3, max_level=7, use_p5=False, image_shape=(*task.padded_hw, 3)
    )
    model = keras_hub.models.RetinaNetObjectDetector(backbone, num_classes=task.classes, bounding_box_format="xyxy")
    model.compile(optimizer=keras.optimizers.SGD(1e-8, momentum=0.9, weight_decay=1e-4))  # with its own losses
    return model


def step(task: Task, model: keras_hub.models.RetinaNetObjectDetector, images: np.ndarray, targets: dict) -> Work:
    """Prepares a training step of `fit`."""
    return Work(lambda: np.asarray(keras.Model.train_on_batch(model, images, targets)), task.batch)


def forward(task: Task, model: keras_hub.models.RetinaNetObjectDetector, images: np.ndarray, targets: dict) -> Work:
    """Prepares the forward pass, from pixels to logits and deltas, jitted."""
    program = jax.jit(lambda *weights_and_images: model.stateless_call(*weights_and_images)[0])
    weights = [v.value for v in model.trainable_variables], [v.value for v in model.non_trainable_variables]
    return Work(lambda: jax.block_until_ready(program(*weights, images)), task.batch)
