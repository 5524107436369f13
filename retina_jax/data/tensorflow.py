"""TensorFlow, imported when it is first used: that takes seconds, which a command that reads no image need not wait for."""

from __future__ import annotations

import atexit
import functools
import gc
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorflow as tf
else:

    class _TensorFlow(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):  # a debugger's question, or inspect's
                raise AttributeError(name)
            return getattr(load(), name)

    tf = _TensorFlow("tf")


@functools.cache
def load() -> ModuleType:
    """Import it now, where the wait would else fall into something timed."""
    import tensorflow

    # It reads images and nothing else: the accelerators are JAX's.
    tensorflow.config.set_visible_devices([], "GPU")
    # At exit Python would look through its 400,000 objects for garbage: a second.
    atexit.register(gc.freeze)
    return tensorflow
