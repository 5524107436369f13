"""Faster kernels for XLA's CPU backend, behind one switch (`--cpu-kernels`). A reader of the method does not need them.

The method is written for every device. A function that has a faster form on the CPU is decorated with `on_cpu(kernel)`.
With the switch on, a traced program holds both forms, and XLA is given one of them when the program is lowered for a
device. With the switch off, the program is the plain one. The results are equal up to rounding.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

kernels = jax.make_user_context(None)
"""The switch. `with kernels(False):` traces programs without CPU kernels, `kernels(True)` with them. None, the default:
with them if the default backend is the CPU. It is read when a program is traced, and is part of the key of JAX's caches."""


def enabled() -> bool:
    """Whether a program that is traced now gets CPU kernels."""
    return jax.default_backend() == "cpu" if kernels.value is None else kernels.value


def on_cpu(kernel: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a function: with the switch on, `kernel(function, *arguments)` is called in its place."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def chosen(*arguments: Any) -> Any:
            return kernel(function, *arguments) if enabled() else function(*arguments)

        return chosen

    return decorate
