"""--split: the content of an image decides its side, equal files stay together, and shared images are reported."""

from __future__ import annotations

import json
import random
import shlex
from pathlib import Path

import pytest
from PIL import Image
from test_conventions_of_formats import text
from test_formats import convert, rows

from retina_jax.config import ConfigError
from retina_jax.config_io import load_config, override
from retina_jax.conversion.annotated import Annotated, Picture
from retina_jax.conversion.locating import leakage, split_by_content
from retina_jax.data.datasets import open_source

ROOT = Path(__file__).parents[2]


def pictures(folder: Path, number: int, order: int = 0) -> list[Picture]:
    """Returns pictures of files with the contents 0, 1, ...; only their bytes matter."""
    found = [
        Picture((f"{order}-{n}.png",), [], path=text(folder / f"{order}-{n}.png", f"image {n}")) for n in range(number)
    ]
    random.Random(order).shuffle(found)
    return found


def sides(found: list[Picture]) -> dict[str, str]:
    return {picture.path.read_text(): picture.split for picture in found if picture.path}


def test_the_side_depends_on_the_content_alone(tmp_path: Path) -> None:
    first, renamed, more = pictures(tmp_path, 300), pictures(tmp_path, 300, order=1), pictures(tmp_path, 400, order=2)
    for found in (first, renamed, more):
        split_by_content(found, 0.8)
    assert sides(first) == sides(renamed) and sides(first).items() <= sides(more).items()
    assert list(sides(first).values()).count("train") == 249  # of a SHA-256: the same on every machine
    smaller = pictures(tmp_path, 300, order=3)
    split_by_content(smaller, 0.5)
    train = {content for content, side in sides(smaller).items() if side == "train"}
    assert train <= {content for content, side in sides(first).items() if side == "train"}


def test_equal_files_are_on_one_side_and_an_empty_side_is_refused_with_a_share_that_works(tmp_path: Path) -> None:
    found = [Picture((f"{n}.png",), [], path=text(tmp_path / f"{n}.png", f"image {n % 3}")) for n in range(30)]
    for share in (1e-9, 1 - 1e-9):
        with pytest.raises(ConfigError, match="would be empty; use ") as caught:
            split_by_content(found, share)
        split_by_content(found, float(str(caught.value).split("use ")[1].split()[0]))
        assert {picture.split for picture in found} == {"train", "val"} and len(set(sides(found).items())) == 3
    assert leakage(Annotated(found, [])) == {}
    found[0].split = {"train": "val", "val": "train"}[found[0].split]
    ((_, names),) = leakage(Annotated(found, [])).items()
    assert names == ["0.png"] or len(names) == 9


def test_the_printed_command_trains_on_the_converted_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my photos"
    for n in range(12):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), n).save(folder / "images" / f"{n}.bmp")  # the same bytes with every version of PIL
        text(folder / "labels" / f"{n}.txt", "0 0.5 0.5 0.5 0.5\n" * (n % 3))
    text(folder / "data.yaml", "train: images\nnames: [a b]\n")
    convert(monkeypatch, "--annotations", folder, "--split", 0.6, "--out", tmp_path / "out")
    printed = capsys.readouterr().out.replace("\\\n", "").splitlines()
    words = shlex.split(printed[-1])
    assert words[1:5] == ["scripts/train.py", "--config", "configs/own_data.py", "--workdir"]
    values = {option[2:].replace("-", "_"): word for option, word in zip(words[6::2], words[7::2], strict=True)}
    config = override(load_config(ROOT / words[3]), values)
    opened = {split: open_source(config.data, split) for split in ("train", "val")}
    assert sum(map(len, opened.values())) == 12 and not any(source.missing for source in opened.values())
    assert any(line.startswith(f"train: {len(opened['train'])} images") for line in printed)
    found = [row for name in opened for row in rows(json.loads((tmp_path / "out" / f"{name}.json").read_text()))]
    assert sorted(row[0] for row in found if row[1]) == sorted(f"{n}.bmp" for n in range(12) for _ in range(n % 3))
