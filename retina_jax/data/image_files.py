"""The image files that a person names, alone or by folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from retina_jax.config import ConfigError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")


def image_files(paths: Sequence[Path], out: Path) -> dict[Path, str]:
    """Each image file with the name of the picture to be drawn of it in `out`; names that would meet get a number.

    Folders are searched through, but not `out`. Raises ConfigError where a path is absent, a folder has no image, no path
    is given, or a picture would be written over one of the files.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            inside = [p for p in inside if path.resolve() == out.resolve() or out.resolve() not in p.resolve().parents]
            if not inside:
                raise ConfigError(f"{path}: no image in this folder ({', '.join(SUFFIXES)})")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise ConfigError(f"{path}: no such file or folder")
    if not files:
        raise ConfigError("no image: name image files or folders of them")
    named: dict[str, Path] = {}
    for file in dict.fromkeys(files):
        name, number = f"{file.stem}.png", 1
        while name in named:
            number += 1
            name = f"{file.stem}_{number}.png"
        named[name] = file
    originals = {file.resolve() for file in files}
    for name in named:
        if (out / name).resolve() in originals:
            raise ConfigError(f"--out {out}: {name} there would be written over; take another folder")
    return {file: name for name, file in named.items()}
