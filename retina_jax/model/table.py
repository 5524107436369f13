"""What is trained and what is frozen, in numbers: layers frozen by surprise are a common cause of poor training."""

import math
from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict

ROOMS = {
    "backbone/stem": "stem",
    "backbone/c2": "C2",
    "backbone/c3": "C3",
    "backbone/c4": "C4",
    "backbone/c5": "C5",
    "fpn": "FPN",
    "class_head": "class head",
    "box_head": "box head",
}


def parameter_counts(variables: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(trained, frozen) numbers of each part of the network, in the order of the forward pass.

    Args:
      variables: the collections of the network; arrays or shapes will do.

    Returns:
      part -> (numbers in `params`, numbers in `frozen`). Means and variances of a frozen BatchNorm count as frozen; running
      statistics (`stats`) are no parameters and are not counted.
    """
    sizes = {
        collection: {path: math.prod(leaf.shape) for path, leaf in flatten_dict(variables[collection], sep="/").items()}
        for collection in ("params", "frozen")
        if collection in variables
    }

    def count(collection: str, prefix: str) -> int:
        return sum(size for path, size in sizes.get(collection, {}).items() if path.startswith(prefix + "/"))

    return {room: (count("params", prefix), count("frozen", prefix)) for prefix, room in ROOMS.items()}


def parameter_table(variables: Mapping[str, Any]) -> str:
    """`parameter_counts` as a table for people, with a last line for the whole network. No trailing newline."""
    counts = parameter_counts(variables)
    counts["total"] = tuple(sum(column) for column in zip(*counts.values(), strict=True))
    header = f"{'part':<12}{'trained':>14}{'frozen':>14}"
    rows = [f"{room:<12}{trained:>14,}{frozen:>14,}" for room, (trained, frozen) in counts.items()]
    return "\n".join([header, *rows])
