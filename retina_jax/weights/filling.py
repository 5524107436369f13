"""Puts converted weights into the variables of a network and reports everything that does not fit."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from retina_jax.errors import WeightsError, shortened

MOST_NAMES = 10
"""Largest number of names per kind in an error; the others are counted."""


def fill(
    template: Mapping[str, Any], weights: Mapping[str, np.ndarray], *, source: str, allow_missing: Sequence[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Replaces every leaf of a network's variables by its weight.

    Args:
      template: {"params": ..., "frozen": ..., "stats": ...}, as from `initialisation.initialise`.
      weights: path without its collection ("backbone/stem/conv/kernel") to array of floats, kernels HWIO.
      source: what errors call the weights.
      allow_missing: parts that may keep the template's value: paths or their first complete components ("backbone/c4").

    Returns:
      Variables of the template's structure and dtypes, and the sorted paths of the leaves that kept the template's value.

    Raises:
      WeightsError: missing leaves, weights without a leaf, different shapes, weights that are not floats, or an allowed
        part without a leaf. One line that names up to ten of each.
    """
    flat = {collection: flatten_dict(tree, sep="/") for collection, tree in template.items()}
    leaves = {path: leaf for tree in flat.values() for path, leaf in tree.items()}
    absent = sorted(leaves.keys() - weights.keys())
    kept = [path for path in absent if any(is_within(path, part) for part in allow_missing)]
    differing = []
    for path in sorted(leaves.keys() & weights.keys()):
        leaf, weight = leaves[path], weights[path]
        if weight.shape != leaf.shape:
            differing.append(f"{path} is {weight.shape}, expected {leaf.shape}")
        elif not np.issubdtype(weight.dtype, np.floating):
            differing.append(f"{path} is {weight.dtype}, expected {leaf.dtype}")
    without_leaf = [part for part in allow_missing if not any(is_within(path, part) for path in leaves)]
    problems = {
        "missing": sorted(set(absent) - set(kept)),
        "surplus": sorted(weights.keys() - leaves.keys()),
        "of another shape or dtype": differing,
        "allowed to be missing, but not part of the network": without_leaf,
    }
    if any(problems.values()):
        hint = " (--allow-missing PREFIX keeps random values)" if problems["missing"] else ""
        raise WeightsError(f"{source}: {'; '.join(report(k, n) for k, n in problems.items() if n)}{hint}")

    def filled(path: str, leaf: Any) -> Any:
        return np.ascontiguousarray(weights[path], leaf.dtype) if path in weights else leaf

    return {
        collection: unflatten_dict({path: filled(path, leaf) for path, leaf in tree.items()}, sep="/")
        for collection, tree in flat.items()
    }, kept


def is_within(path: str, part: str) -> bool:
    """Whether `part` is the path or its first components; a trailing slash makes no difference."""
    return f"{path}/".startswith(f"{part.rstrip('/')}/")


def report(kind: str, names: Sequence[str]) -> str:
    """ "2 missing: a, b", with at most MOST_NAMES names."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"{len(names)} {kind}: {', '.join(map(shortened, names[:MOST_NAMES]))}{more}"
