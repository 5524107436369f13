"""The files of one checkpoint, by orbax: one host writes them, every host reads them, and neither waits for another."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import jax
import orbax.checkpoint as orbax
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from retina_jax.errors import reason

T = TypeVar("T")

# Of a save that fails orbax's threads log at length what is an exception as well, and asyncio every array after the first.
for _logger, _said in (("absl", "_SignalingThread"), ("asyncio", ".orbax-checkpoint-tmp")):
    logging.getLogger(_logger).addFilter(lambda record, said=_said: said not in record.getMessage())


def save_arrays(folder: Path, arrays: PyTree) -> None:
    """Write numpy arrays into `folder`, which is not there yet. Called by host 0 alone, from any thread.

    Not by orbax's `training.Checkpointer` or `ocp.save`: on several hosts the one asks JAX whether to stop, in the middle
    of the run's own asking (`interruption.py`), and the other compares folders with hosts that are elsewhere.

    Raises whatever the libraries make of a disk that fails, and nothing is being written any more then.
    """
    alone = orbax.options.MultiprocessingOptions(primary_host=0, active_processes={0})
    items = orbax.CompositeCheckpointHandler(composite_options=orbax.CompositeOptions(multiprocessing_options=alone))
    with _others_ended(), orbax.Checkpointer(items, multiprocessing_options=alone) as checkpointer:
        checkpointer.save(folder.resolve(), orbax.args.Composite(state=orbax.args.PyTreeSave(arrays)))


@contextlib.contextmanager
def _others_ended() -> Iterator[None]:
    """Orbax raises at the first array that cannot be written. The others would make their folders anew and, as nobody
    listens any more, leave a traceback each: they are given a second, in silence."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda told: None if str(told.exc_value) == "Event loop is closed" else hook(told)
    try:
        yield
    except Exception:
        time.sleep(1)
        raise
    finally:
        sys.unraisablehook = hook


def load_arrays(folder: Path, like: T) -> T:
    """What this host's devices hold of the arrays in `folder`, in the types and shardings of `like`.

    Raises ValueError, of one line, where they cannot be read or are others than those of `like`.
    """
    context = ocp.Context()
    context.multiprocessing.primary_host = jax.process_index()
    context.multiprocessing.active_processes = {jax.process_index()}
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like)
    try:
        with context:
            saved = ocp.metadata(folder.resolve(), checkpointable_name="state").metadata
            if not (other := _difference(saved, like)):
                return ocp.load(folder.resolve(), abstract, checkpointable_name="state")
    except Exception as error:  # whatever the libraries make of damaged files
        raise ValueError(reason(error)) from error
    raise ValueError(other)


def _difference(saved: PyTree, like: PyTree) -> str:
    """The first array that is not the same in both, by name and shape. Orbax finds it too, and leaves tasks unfinished."""
    shapes = [
        {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (saved, like))
    ]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        there, here = (shape.get(name, "missing") for shape in shapes)
        if there != here:
            return f"{name} is {there} there and {here} here"
    return ""
