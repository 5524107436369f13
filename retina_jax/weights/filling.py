"""Converted weights into the variables of a network, every one accounted for."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from retina_jax.errors import WeightsError, shortened

NAMED = 10
"""Most names that an error gives of each kind; the rest are counted."""


def fill(
    template: Mapping[str, Any],
    weights: Mapping[str, np.ndarray],
    *,
    source: str,
    allow_missing: Sequence[str] = (),
) -> tuple[dict[str, Any], list[str]]:
    """The variables of a network with every leaf from `weights`, and the paths of those that kept the template's value.

    Args:
      template: {"params": ..., "frozen": ..., "stats": ...}, as from `initialisation.initialise`.
      weights: path without its collection ("backbone/stem/conv/kernel") to array, kernels HWIO; floats of any precision,
        which take the template's.
      source: where the weights come from, for the error.
      allow_missing: parts of the tree that may keep the template's value: a path or whole leading components of it, so
        "backbone/c4/block1" does not stand for block10. What `weights` has of them is taken all the same, and checked.

    Returns:
      Variables of the template's structure and dtypes, numpy arrays where they came from `weights`; and the paths of the
      leaves that were missing and allowed to be, sorted.

    Raises:
      WeightsError: leaves missing, weights that are no leaf, shapes or kinds of number that differ, or an allowed part that
        no leaf is in. One line that names all of them, up to ten of each.
    """
    flat = {collection: flatten_dict(tree, sep="/") for collection, tree in template.items()}
    leaves = {path: leaf for tree in flat.values() for path, leaf in tree.items()}
    absent = sorted(leaves.keys() - weights.keys())
    kept = [path for path in absent if any(is_within(path, part) for part in allow_missing)]
    differing = []
    for path in sorted(leaves.keys() & weights.keys()):
        leaf, weight = leaves[path], weights[path]
        if weight.shape != leaf.shape:
            differing.append(f"{path} is {shown(weight.shape)}, meant {shown(leaf.shape)}")
        elif not np.issubdtype(weight.dtype, np.floating):
            differing.append(f"{path} is {weight.dtype}, meant {leaf.dtype}")
    problems = {
        "missing": sorted(set(absent) - set(kept)),
        "surplus": sorted(weights.keys() - leaves.keys()),
        "of another shape or dtype": differing,
        "allowed to be missing, but no part of the network": [
            part for part in allow_missing if not any(is_within(path, part) for path in leaves)
        ],
    }
    if any(problems.values()):
        hint = " (--allow-missing PREFIX does without)" if problems["missing"] else ""
        found = "; ".join(report(kind, names) for kind, names in problems.items() if names)
        raise WeightsError(f"{source}: {found}{hint}")
    filled = {
        collection: unflatten_dict(
            {
                path: np.ascontiguousarray(weights[path], leaf.dtype) if path in weights else leaf
                for path, leaf in tree.items()
            },
            sep="/",
        )
        for collection, tree in flat.items()
    }
    return filled, kept


def is_within(path: str, part: str) -> bool:
    """Whether `part` is the path or leading components of it; a trailing slash makes no difference."""
    return f"{path}/".startswith(f"{part.rstrip('/')}/")


def shown(shape: Iterable[int]) -> str:
    """A shape as 3x3x64x64; () as scalar."""
    return "x".join(str(side) for side in shape) or "scalar"


def report(kind: str, names: Sequence[str]) -> str:
    """ "2 missing: a, b", with at most NAMED names."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)} {kind}: {', '.join(map(shortened, names[:NAMED]))}{more}"
