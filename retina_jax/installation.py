"""What is installed: the folders of scripts and configs, the required packages, and what an extra would add."""

import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).parent
HOME = PACKAGE if (PACKAGE / "scripts").is_dir() else PACKAGE.parent
"""Folder of scripts/ and configs/: the checkout, or the package itself, where a wheel has them."""
SCRIPTS = HOME / "scripts"
NAME = "retina-jax"


def config_path(path: Path, option: str) -> Path:
    """Returns `path`; if it is configs/... and does not exist in this folder, the file of that name in HOME."""
    shipped = HOME / path
    if path.parts[:1] != ("configs",) or path.exists() or not shipped.is_file():
        return path
    print(f"{option} {path}: not in this folder; reading {shipped}", file=sys.stderr)
    return shipped


def version_of(package: str) -> str | None:
    """Returns the version of an installed package, else None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def required() -> Iterator[tuple[str, str | None, str]]:
    """Yields the name of each package that training needs, its version (None: not installed) and, if it is outside the
    tested range, that range. Raises PackageNotFoundError if this project itself is not installed."""
    from packaging.requirements import Requirement  # costs 30 ms

    for needed in map(Requirement, metadata.requires(NAME) or ()):
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            version = version_of(needed.name)
            fits = version is None or needed.specifier.contains(version, prereleases=True)
            yield needed.name, version, "" if fits else str(needed.specifier)


def extras() -> list[str]:
    """Returns the names of this project's extras."""
    return metadata.metadata(NAME).get_all("Provides-Extra") or []


def missing(package: str) -> list[str]:
    """Returns what installing a package with extras, such as retina-jax[onnx], would add, as far as the metadata of the
    installed packages says."""
    from packaging.requirements import Requirement

    wanted, added = Requirement(package), []
    if version_of(wanted.name) is None:
        return [package.partition(";")[0].strip()]
    for needed in map(Requirement, metadata.requires(wanted.name) or ()):
        of_extra = needed.marker is not None and not needed.marker.evaluate({"extra": ""})
        if of_extra and any(needed.marker.evaluate({"extra": extra}) for extra in wanted.extras):
            added += missing(str(needed))
    return added
