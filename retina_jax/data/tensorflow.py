"""TensorFlow, imported when it is first used: that takes seconds, which a command that reads no image need not wait for."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorflow as tf
else:

    class _TensorFlow(ModuleType):
        def __getattr__(self, name: str) -> Any:
            import tensorflow

            # It reads images and nothing else: the accelerators are JAX's.
            tensorflow.config.set_visible_devices([], "GPU")
            found = getattr(tensorflow, name)
            setattr(self, name, found)
            return found

    tf = _TensorFlow("tf")
