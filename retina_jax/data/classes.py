"""Classes of runs and data sets: which are the same, which are left out, and how they are shown.

A class of a data set is a category id; its name is a label, which several categories may share. Label k of a data set is
its k-th class in the order of the file, so that training does not depend on the ids: the same list under other ids gives
the same parameters, bit for bit. COCO's files list their categories by ascending id, which was the order of earlier
versions; a run keeps the order that it was started with (`Source.arranged`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Literal, Protocol, TypeVar, runtime_checkable

from retina_jax.config import ConfigError

Category = tuple[int, str]
"""Id and name."""
SHOWN = 5
"""Classes that a message names."""


@runtime_checkable
class HasClasses(Protocol):
    """A data set."""

    @property
    def categories(self) -> list[Category]:
        """Its classes, by label."""
        ...

    @property
    def annotated(self) -> frozenset[int]:
        """Ids of the categories that an annotation has, crowds included."""
        ...

    @property
    def left_out(self) -> dict[Category, str]:
        """Categories that are no classes, each with the reason, as from `placeholders`."""
        ...


Opened = TypeVar("Opened", bound=HasClasses)


def match(classes: Sequence[Category], categories: Sequence[Category]) -> list[int | None]:
    """For each of `classes`, the index of the same one in `categories`; None: there is none, or it is ambiguous.

    Two are the same if their name occurs once on each side, whatever their ids, or if both id and name agree.
    """
    here, there = (Counter(name for _, name in side) for side in (classes, categories))
    by_pair = {category: i for i, category in enumerate(categories)}
    by_name = {name: i for i, (_, name) in enumerate(categories) if here[name] == there[name] == 1}
    return [by_name.get(name, by_pair.get((category_id, name))) for category_id, name in classes]


def category_ids(classes: Sequence[Category], data: HasClasses, where: str) -> list[int | None]:
    """The category id in `data` of each of a detector's `classes`; None: the data lacks it.

    Raises ConfigError, which begins with `where`, if the data has boxes of a category that is none of `classes`, or that
    several of them could be.
    """
    categories = data.categories
    found = match(classes, categories)
    unknown = [c for i, c in enumerate(categories) if c[0] in data.annotated and i not in found]
    if unknown:
        names = {name for _, name in classes}
        ambiguous = [category for category in unknown if category[1] in names]
        shown = ", ".join(f"{name} ({category_id})" for category_id, name in (ambiguous or unknown)[:SHOWN])
        if ambiguous:
            repeated = {name for _, name in ambiguous}
            own = ", ".join(f"{name} ({category_id})" for category_id, name in classes if name in repeated)
            raise ConfigError(
                f"{where}: boxes of {shown} cannot be assigned to a class: the name occurs more than once, and the id is "
                f"not that of the detector's {own}; use its ids, or give each category a name of its own"
            )
        raise ConfigError(
            f"{where}: has boxes of categories that the detector lacks: {shown}; its classes are {listed(classes)}; "
            "remove these boxes, or list these categories in the training data too"
        )
    return [None if i is None else categories[i][0] for i in found]


def differ(classes: Sequence[Category], categories: Sequence[Category], where: str) -> ConfigError:
    """The error of a run of `classes` that cannot be resumed on data of `categories`."""
    return ConfigError(
        f"{where}: its run has {len(classes)} classes ({listed(classes)}), the data has {len(categories)} "
        f"({listed(categories)}); take the same data or another --workdir"
    )


def unique_names(categories: Sequence[Category]) -> tuple[str, ...]:
    """The names as they are shown: those that repeat carry their id, "wheel (1)" and "wheel (2)"."""
    shown = [name for _, name in categories]
    while len(counts := Counter(shown)) < len(shown):  # "wheel (1)" may itself be the name of another category
        pairs = zip(categories, shown, strict=True)
        shown = [f"{name} ({category_id})" if counts[name] > 1 else name for (category_id, _), name in pairs]
    return tuple(shown)


def listed(categories: Sequence[Category]) -> str:
    """The first SHOWN of them, as they are shown."""
    return ", ".join(unique_names(categories)[:SHOWN]) + (", ..." if len(categories) > SHOWN else "")


def placeholders(
    categories: Sequence[Category],
    supercategories: Sequence[str | None],
    annotated: Collection[int],
    known: Sequence[Category] = (),
    empty_parents: Literal["drop", "keep"] = "drop",
) -> dict[Category, str]:
    """The categories that are no classes, each with the reason. None of them has an annotation.

    An empty parent category is the supercategory of another category; or it is Roboflow's, which has id 0 and, alone of
    all, the supercategory "none": exports of Roboflow list the project or group so, then its classes. It is a class if it
    is one of `known`; where classes are known, `empty_parents` changes nothing. A category with the name of an annotated
    one is left out too, unless it is one of `known` that share the name: nothing but the name could be learnt of it. Every
    other category without annotations is a class, because another split may have boxes of it.
    """
    parents = Counter(supercategories)
    names = {name for category_id, name in categories if category_id in annotated}
    kept, known_names = set(match(known, categories)), Counter(name for _, name in known)
    found = {}
    for i, (category, above) in enumerate(zip(categories, supercategories, strict=True)):
        category_id, name = category
        named_by_others = parents[name] - (above == name) > 0
        of_roboflow = category_id == 0 and above == "none" and parents["none"] == 1 and len(categories) > 1
        if category_id in annotated:
            continue
        if named_by_others or of_roboflow:
            if i not in kept and (empty_parents == "drop" or known):
                option = "" if known else "; --data.empty-parents keep makes it a class"
                found[category] = f"an empty parent category{option}"
        elif name in names and not (i in kept and known_names[name] > 1):
            found[category] = "without boxes, and a class has the same name"
    return found if len(found) < len(categories) else {}


def open_both(
    train: Callable[[Sequence[Category]], Opened],
    val: Callable[[Sequence[Category]], Opened],
    known: Sequence[Category] = (),
) -> tuple[Opened, Opened]:
    """The training and the evaluation data with one decision on which categories are classes.

    `train` and `val` open them with the classes that they must keep. A category that training alone would leave out is a
    class if evaluation has boxes of it, unless `known`, the classes of a run to be resumed, settle it.
    """
    first = train(known)
    second = val(first.categories)
    every = [*first.categories, *first.left_out]
    with_boxes = {i for i, (category_id, _) in enumerate(second.categories) if category_id in second.annotated}
    wanted = [c for c, i in zip(every, match(every, second.categories), strict=True) if i in with_boxes]
    missing = [category for category in wanted if category in first.left_out]
    return (train([*first.categories, *missing]), second) if missing and not known else (first, second)


# COCO's 80 classes and the category ids they have in its JSON files (1 to 90 with gaps; Lin et al., 2014).

COCO_CATEGORIES: tuple[tuple[int, str], ...] = (
    (1, "person"),
    (2, "bicycle"),
    (3, "car"),
    (4, "motorcycle"),
    (5, "airplane"),
    (6, "bus"),
    (7, "train"),
    (8, "truck"),
    (9, "boat"),
    (10, "traffic light"),
    (11, "fire hydrant"),
    (13, "stop sign"),
    (14, "parking meter"),
    (15, "bench"),
    (16, "bird"),
    (17, "cat"),
    (18, "dog"),
    (19, "horse"),
    (20, "sheep"),
    (21, "cow"),
    (22, "elephant"),
    (23, "bear"),
    (24, "zebra"),
    (25, "giraffe"),
    (27, "backpack"),
    (28, "umbrella"),
    (31, "handbag"),
    (32, "tie"),
    (33, "suitcase"),
    (34, "frisbee"),
    (35, "skis"),
    (36, "snowboard"),
    (37, "sports ball"),
    (38, "kite"),
    (39, "baseball bat"),
    (40, "baseball glove"),
    (41, "skateboard"),
    (42, "surfboard"),
    (43, "tennis racket"),
    (44, "bottle"),
    (46, "wine glass"),
    (47, "cup"),
    (48, "fork"),
    (49, "knife"),
    (50, "spoon"),
    (51, "bowl"),
    (52, "banana"),
    (53, "apple"),
    (54, "sandwich"),
    (55, "orange"),
    (56, "broccoli"),
    (57, "carrot"),
    (58, "hot dog"),
    (59, "pizza"),
    (60, "donut"),
    (61, "cake"),
    (62, "chair"),
    (63, "couch"),
    (64, "potted plant"),
    (65, "bed"),
    (67, "dining table"),
    (70, "toilet"),
    (72, "tv"),
    (73, "laptop"),
    (74, "mouse"),
    (75, "remote"),
    (76, "keyboard"),
    (77, "cell phone"),
    (78, "microwave"),
    (79, "oven"),
    (80, "toaster"),
    (81, "sink"),
    (82, "refrigerator"),
    (84, "book"),
    (85, "clock"),
    (86, "vase"),
    (87, "scissors"),
    (88, "teddy bear"),
    (89, "hair drier"),
    (90, "toothbrush"),
)
