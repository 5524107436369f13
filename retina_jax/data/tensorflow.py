"""TensorFlow, imported when it is first used: that takes seconds, which a command that reads no image need not wait for."""

from __future__ import annotations

import functools
import gc
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorflow as tf
else:

    class _TensorFlow(ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(_tensorflow(), name)

    tf = _TensorFlow("tf")


@functools.cache
def _tensorflow() -> ModuleType:
    import tensorflow

    # It reads images and nothing else: the accelerators are JAX's.
    tensorflow.config.set_visible_devices([], "GPU")
    # Its 400,000 objects stay; looking through them for garbage, at exit above all, takes a second.
    gc.freeze()
    return tensorflow
