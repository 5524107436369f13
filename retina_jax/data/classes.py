"""Classes of runs and datasets: which of them are the same, which are left out, and how they are shown. Label k is the k-th
class in the order of the file, or of the run that is resumed. Several classes may share a name."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Literal, Protocol, TypeVar, runtime_checkable

from retina_jax.config import ConfigError
from retina_jax.errors import quoted, shortened

Category = tuple[int, str]  # id and name
SHOWN = 5  # classes that a message names


@runtime_checkable
class HasClasses(Protocol):
    """A dataset, or a split of one in a data check."""

    categories: list[Category]  # its classes, by label
    annotated: frozenset[int]  # ids of the categories with an annotation, crowds included
    left_out: dict[Category, str]  # categories that are not classes, each with the reason (`excluded_categories`)


Opened = TypeVar("Opened", bound=HasClasses)
Opener = Callable[[Sequence[Category]], Opened]


def class_indices(classes: Sequence[Category], categories: Sequence[Category]) -> list[int | None]:
    """Returns, for each of `classes`, the index of the same one in `categories`; None: missing or ambiguous. Two are
    the same if their name occurs once on each side, whatever their ids, or if both id and name agree."""
    here, there = (Counter(name for _, name in side) for side in (classes, categories))
    by_pair = {category: i for i, category in enumerate(categories)}
    by_name = {name: i for i, (_, name) in enumerate(categories) if here[name] == there[name] == 1}
    return [by_name.get(name, by_pair.get((category_id, name))) for category_id, name in classes]


def category_ids(classes: Sequence[Category], data: HasClasses, where: str) -> list[int | None]:
    """Returns the category id in `data` of each of a detector's `classes`; None if the data lacks it. Raises
    ConfigError, which begins with `where`, if the data has boxes of a category that is none or several of `classes`."""
    categories = data.categories
    found = class_indices(classes, categories)
    unknown = [c for i, c in enumerate(categories) if c[0] in data.annotated and i not in found]
    if ambiguous := [category for category in unknown if category[1] in {name for _, name in classes}]:
        own = [category for category in classes if category[1] in {name for _, name in ambiguous}]
        raise ConfigError(
            f"{where}: boxes of {_with_ids(ambiguous)} cannot be assigned to a class: the name occurs more than once, and "
            f"the id is not that of the detector's {_with_ids(own)}; use the detector's ids, or give each category a "
            "unique name"
        )
    if unknown:
        own = {folded(name): quoted(name) for _, name in classes}
        near = [(quoted(name), own[folded(name)]) for _, name in unknown[:SHOWN] if folded(name) in own]
        renamed = (f"{name} differs from {one} only in case or spaces: rename it; " for name, one in near)
        raise ConfigError(
            f"{where}: has boxes of categories that the detector lacks: {_with_ids(unknown)}; its classes are "
            f"{listed(classes)}; {''.join(renamed)}remove these boxes, or list these categories in the training data too"
        )
    return [None if i is None else categories[i][0] for i in found]


def folded(name: str) -> str:
    """Returns a name without its case and without spaces around it or repeated ones."""
    return " ".join(name.casefold().split())


def similar_names(names: Iterable[str]) -> list[str]:
    """Returns the groups of names that differ only in case or spaces, each as "'Star' and 'star'"."""
    groups = defaultdict(list)
    for name in dict.fromkeys(names):
        groups[folded(name)].append(quoted(name))
    return [" and ".join(group) for group in groups.values() if len(group) > 1]


def _with_ids(categories: Sequence[Category]) -> str:
    return ", ".join(f"{shortened(name)} ({category_id})" for category_id, name in categories[:SHOWN])


def classes_error(classes: Sequence[Category], categories: Sequence[Category], where: str) -> ConfigError:
    """Returns the error of a run of `classes` that cannot be resumed on data of `categories`."""
    sides = f"{len(classes)} classes ({listed(classes)}), the data has {len(categories)} ({listed(categories)})"
    other = "to train it on other classes, make a new run from it with import-weights --weights RUN --workdir NEW"
    return ConfigError(f"{where}: its run has {sides}; use the same data or another --workdir; {other}")


def unique_names(categories: Sequence[Category]) -> tuple[str, ...]:
    """Returns names for people: those that repeat have their id, "wheel (1)" and "wheel (2)"."""
    shown = [name for _, name in categories]
    while len(counts := Counter(shown)) < len(shown):  # "wheel (1)" may itself be the name of another category
        pairs = zip(categories, shown, strict=True)
        shown = [f"{name} ({category_id})" if counts[name] > 1 else name for (category_id, _), name in pairs]
    return tuple(shown)


def listed(categories: Sequence[Category]) -> str:
    """Returns the `unique_names` of the first SHOWN."""
    return ", ".join(map(shortened, unique_names(categories)[:SHOWN])) + (", ..." if len(categories) > SHOWN else "")


def excluded_categories(
    categories: Sequence[Category],
    supercategories: Sequence[str | None],
    annotated: Collection[int],
    known: Sequence[Category] = (),
    empty_parents: Literal["drop", "keep"] = "drop",
) -> dict[Category, str]:
    """Returns the categories without annotations that are not classes, each with the reason:

    - empty parents: the supercategory of another category, or Roboflow's entry of the project, with id 0 and alone with
      the supercategory "none". They are classes if `known`, the classes of a run or of the other split, contains them,
      or without `known` if `empty_parents` is keep.
    - categories with the name of an annotated one, unless several of `known` share the name.
    """
    parents = Counter(supercategories)
    names = {name for category_id, name in categories if category_id in annotated}
    kept, known_names = set(class_indices(known, categories)), Counter(name for _, name in known)
    found = {}
    for i, (category, above) in enumerate(zip(categories, supercategories, strict=True)):
        category_id, name = category
        if category_id in annotated:
            continue
        of_roboflow = category_id == 0 and above == "none" and parents["none"] == 1 and len(categories) > 1
        if parents[name] - (above == name) > 0 or of_roboflow:
            if i not in kept and (empty_parents == "drop" or known):
                option = "" if known else "; --data.empty-parents keep makes it a class"
                found[category] = f"an empty parent category{option}"
        elif name in names and not (i in kept and known_names[name] > 1):
            found[category] = "without boxes, and a class has the same name"
    return found if len(found) < len(categories) else {}


def open_both(train: Opener, val: Opener, known: Sequence[Category] = ()) -> tuple[Opened, Opened]:
    """Opens the training and the evaluation data, each by a function of the classes that it must keep. Without `known`,
    the classes of a resumed run, a category that training would leave out is a class if evaluation has boxes of it."""
    first = train(known)
    second = val(first.categories)
    every = [*first.categories, *first.left_out]
    with_boxes = {i for i, (category_id, _) in enumerate(second.categories) if category_id in second.annotated}
    wanted = [c for c, i in zip(every, class_indices(every, second.categories), strict=True) if i in with_boxes]
    missing = [category for category in wanted if category in first.left_out]
    return (train([*first.categories, *missing]), second) if missing and not known else (first, second)


# COCO's 80 classes; their ids in its JSON files are 1 to 90 with gaps (Lin et al., 2014).
_COCO_NAMES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag,
tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard,
tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote,
keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush
"""
_COCO_GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
_COCO_IDS = [category_id for category_id in range(1, 91) if category_id not in _COCO_GAPS]
COCO_CATEGORIES: tuple[Category, ...] = tuple(zip(_COCO_IDS, map(str.strip, _COCO_NAMES.split(",")), strict=True))
