"""RetinaNet and the focal loss (Lin et al., 2017) in JAX and Flax: `from retina_jax import load_detector`."""

import os
from typing import Any

__all__ = ["load_detector"]

# TensorFlow only reads images here: its start-up messages are hidden.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


def __getattr__(name: str) -> Any:
    if name == "load_detector":  # imported on demand: it brings JAX and Flax along, which takes a second
        from retina_jax.detector import load_detector

        return load_detector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
