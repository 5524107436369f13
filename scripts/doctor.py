"""Reports whether training can run here: python scripts/doctor.py

Prints versions, devices, caches, and what each extra would add. Exit status: 0, ready to train; 1, not ready: the last line
has the reason.
"""

from __future__ import annotations

import retina_jax.interrupts  # noqa: F401  handles signals during the imports below

# isort: split

import argparse
import importlib
import logging
import platform
import sys
import textwrap
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError

from retina_jax import installation
from retina_jax.command import as_typed
from retina_jax.console import cache_folder, processor
from retina_jax.errors import ending, one_line, reader_may_leave, size, why_no_device

PURPOSES = {
    "cuda": "NVIDIA GPUs, and compile-for --target gpu:...",
    "tpu": "TPUs, and compile-for --target tpu:...",
    "onnx": "export --format onnx",
    "convert": "convert-data",
    "wandb": "training.wandb",
}
"""What each extra is for."""
PLUGINS = {"cuda": "jax_cuda13_plugin", "tpu": "libtpu"}
"""JAX's platforms, and the modules that they need."""
PAGE = {
    "width": 120,
    "initial_indent": "  ",
    "subsequent_indent": "    ",
    "break_long_words": False,
    "break_on_hyphens": False,
}


def main() -> int:
    """Prints the page; returns the exit status."""
    argparse.ArgumentParser(description=as_typed(__doc__)).parse_args()
    where = "checkout" if installation.HOME != installation.PACKAGE else "installed package"
    print(f"retina_jax {installation.version_of(installation.NAME)}, {where} {installation.HOME}")
    print(f"python {platform.python_version()}, {sys.executable}\n{platform.platform()}; {processor()}")
    for title, lines in (("packages", packages()), ("extras", extras()), ("caches", caches()), ("devices", devices())):
        print(f"\n{title}")
        for line in lines:
            print(textwrap.fill(line, **PAGE).replace("\xa0", " "), flush=True)
    problem = obstacle()
    print(f"\nnot ready to train: {problem}" if problem else "\nready to train")
    return int(problem is not None)


def packages() -> Iterator[str]:
    """Yields the versions of the required packages, and a line for each that is missing or was not tested."""
    try:
        found = list(installation.required())
    except PackageNotFoundError:
        yield f"{installation.NAME} is not installed, so its requirements are unknown: pip install -e ."
        return
    found = sorted([*found, ("jaxlib", installation.version_of("jaxlib"), "")])
    yield ", ".join(f"{name}\xa0{version}" for name, version, _ in found if version)  # not split between lines
    for name, version, tested in found:
        if version is None:
            yield f"missing: {name}"
        elif tested:
            yield f"warning: {name} {version} is outside the tested range {tested}"


def extras() -> Iterator[str]:
    """Yields one line per extra: what it is for, and how to install what is missing."""
    try:
        names = installation.extras()
    except PackageNotFoundError:
        return
    for name in names:
        absent = installation.missing(f"{installation.NAME}[{name}]")
        state = f'pip install "{installation.NAME}[{name}]" adds {", ".join(absent)}' if absent else "installed"
        yield f"{name:8} {PURPOSES.get(name, '')}: {state}"


def caches() -> Iterator[str]:
    """Yields the folders of caches with their sizes."""
    folder = cache_folder()
    yield f"{folder}: downloaded weights, compiled programs, sizes of images; you may delete it"
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        yield f"{path.name:12} {size(sum(file.stat().st_size for file in files))} in {len(files)} files"


def devices() -> Iterator[str]:
    """Yields the devices that JAX finds, its warnings, and why it finds none of a platform whose plugin is installed."""
    warnings: list[logging.LogRecord] = []
    logger, handler = logging.getLogger("jax"), logging.Handler(logging.WARNING)
    handler.emit = warnings.append
    logger.addHandler(handler)
    found = []
    try:
        import jax

        found = jax.devices()
    except Exception as error:  # whatever a broken installation raises
        yield one_line(f"none: {why_no_device(error)}")
    finally:
        logger.removeHandler(handler)
    for kind in dict.fromkeys(device.device_kind for device in found):
        yield f"{sum(device.device_kind == kind for device in found)} x {kind}"
    for name, module in PLUGINS.items() if found else ():
        if importlib.util.find_spec(module) is None:
            continue
        try:
            jax.devices(name)
        except RuntimeError as error:
            yield one_line(f"no {name} device, although {module} is installed: {error}")
    for record in warnings:
        cause = f": {record.exc_info[1]}" if record.exc_info else ""
        yield one_line(f"warning of JAX: {record.getMessage()}{cause}")


def obstacle() -> str | None:
    """Returns why training cannot run here, on one line; None if it can: its imports work and the device computes."""
    try:
        import jax

        importlib.import_module("train")
        jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))
    except Exception as error:  # whatever a broken installation raises
        return (ending(error)[0] or one_line(f"{type(error).__name__}: {error}")).removeprefix("error: ")
    return None


if __name__ == "__main__":
    with reader_may_leave():
        status = main()
    sys.exit(status)
