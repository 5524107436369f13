"""Images whose paths were written on another machine are found, and no other file is mistaken for them."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import pytest

from retina_jax.config import ConfigError
from retina_jax.data.coco_entries import leads_outside
from retina_jax.data.image_paths import PLAIN, Places, _relative, find_images, image_files


def tree(root: Path, *files: str) -> Path:
    """Writes a folder of empty files."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def found(folder: Path, places: Places) -> list[str | None]:
    """Returns the path of each name's file relative to the folder; None if it is missing."""
    return [None if i in places.missing else os.path.relpath(p, folder) for i, p in enumerate(places.paths)]


CASES = {
    "as named": (["1.png", "a/2.png"], ["1.png", "a/2.png"], ["1.png", "a/2.png"], 0),
    "a backslash between folders": (["a/1.png"], ["a\\1.png"], ["a/1.png"], 1),
    "a backslash that is part of the name": (["a\\1.png", "a/1.png"], ["a\\1.png"], ["a\\1.png"], 0),
    "a folder too many": (["1.png", "2.png"], ["images\\1.png", "images/2.png"], ["1.png", "2.png"], 2),
    "a folder too few": (["d/1.png", "d/2.png"], ["1.png", "2.png"], ["d/1.png", "d/2.png"], 2),
    "spread over folders": (["a/1.png", "b/2.png"], ["1.png", "2.png"], ["a/1.png", "b/2.png"], 2),
    "another root": (["b/1.png"], ["/home/me/a/b/1.png"], ["b/1.png"], 1),
    "its root is the folder": (["a/1.png"], ["/a/1.png"], ["a/1.png"], 1),
    "a drive": (["1.png"], ["C:\\data\\1.png"], ["1.png"], 1),
    "climbing out": (["up/1.png"], ["..\\..\\media\\up\\1.png"], ["up/1.png"], 1),
    "two of a name in different folders": (["a/x/1.png", "b/x/1.png"], ["c/a/x/1.png"], ["a/x/1.png"], 1),
    "two of a name": (["a/1.png", "b/1.png"], ["1.png"], [None], 0),
    "two names for a file": (["1.png"], ["a/1.png", "b/1.png"], [None, None], 0),
    "one of many is missing": (["1.png", "thumbs/2.png"], ["1.png", "2.png"], ["1.png", None], 0),
    "its folder is there": (["train/2.png", "val/1.png"], ["train/1.png"], [None], 0),
    "a prefix of Label Studio": (["1.png"], ["a1b2c3d4-1.png"], [None], 0),
    "a colon in a name": (["a:b.png", "1:2.png"], ["a:b.png", "1:2.png"], ["a:b.png", "1:2.png"], 0),
    "another case of its folder": (["A/1.png"], ["a/1.png"], ["A/1.png"], 1),
    "no file": ([], ["1.png", "..", "/", "\\", "C:", "a/.."], [None] * 6, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_is_found_if_only_one_matches(tmp_path: Path, case: str) -> None:
    files, names, expected, moved = CASES[case]
    folder = tree(tmp_path / "images", *files)
    folder.mkdir(exist_ok=True)
    places = find_images(folder, names)
    assert found(folder, places) == expected and len(places.moved) == moved


def test_a_folder_one_level_too_deep_is_recognised(tmp_path: Path) -> None:
    folder = tree(tmp_path, "1.png", "other/2.png", "deep/x.txt") / "deep"
    assert found(folder, find_images(folder, ["1.png", "other/2.png"])) == ["../1.png", "../other/2.png"]


def test_names_never_lead_out_of_the_folder(tmp_path: Path) -> None:
    """Neither the name itself nor the folder above leads out."""
    tree(tmp_path, "secret.png", "images/1.png", "images/deep/2.png")
    folder = tmp_path / "images"
    for name in (str(tmp_path / "secret.png"), "../secret.png", "deep/../../secret.png", "\\secret.png"):
        assert found(folder, find_images(folder, [name])) == [None]


def test_a_correct_path_is_used_unchanged(tmp_path: Path) -> None:
    folder = tree(tmp_path / "images", "1.png", "a/2.png")
    (tmp_path / "link").symlink_to(folder)
    names = [str(folder / "1.png"), "../images/a/2.png"]
    for root in (folder, tmp_path / "link"):
        assert found(root, find_images(root, names)) == ["1.png", "a/2.png"] and not find_images(root, names).moved


def test_repeated_base_names_take_linear_time(tmp_path: Path) -> None:
    """Going through all files of a base name for each image would take minutes."""
    files = [f"{i}/image.png" for i in range(1500)]
    folder = tree(tmp_path / "images", *files)
    start = time.process_time()
    assert found(folder, find_images(folder, [f"data/{file}" for file in files])) == files
    assert time.process_time() - start < 4


def test_the_error_names_where_missing_files_were_expected(tmp_path: Path) -> None:
    tree(tmp_path, "images/a/1.png", "images/b/1.png", "images/2.png", "others/3.png", "images/Five.JPG")
    folder = tmp_path / "images"
    names = ["1.png", "0123abcd-2.png", "c/3.png", "4.png", "five.jpeg"]
    places = find_images(folder, names).missing
    assert "a/1.png" in places[0] and "b/1.png" in places[0]
    assert str(folder / "2.png") in places[1] and "0123abcd-" in places[1]
    assert str(tmp_path / "others/3.png") in places[2] and places[3] == ""
    assert str(folder / "Five.JPG") in places[4]


def test_files_in_the_folder_of_a_missing_one_are_named_first(tmp_path: Path) -> None:
    """Before files of its name in other folders, below the image folder and next to it."""
    tree(tmp_path, "images/1.JPG", "others/1.jpg", "images/a/2.png", "images/b/2.jpeg", "images/b/3.jpg")
    folder = tmp_path / "images"
    first, second, third = find_images(folder, ["1.jpg", "b/2.png", "b/4.jpg"]).missing.values()
    assert 0 <= first.index(str(folder / "1.JPG")) < first.index(str(tmp_path / "others/1.jpg"))
    assert 0 <= second.index(str(folder / "b/2.jpeg")) < second.index(str(folder / "a/2.png")) and third == ""


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    tree(tmp_path, "store/1.png", "images/x.txt")
    (tmp_path / "images/linked").symlink_to(tmp_path / "store")
    (tmp_path / "store/loop").symlink_to(tmp_path / "images")
    assert found(tmp_path / "images", find_images(tmp_path / "images", ["1.png"])) == ["linked/1.png"]


def test_plain_names_need_no_change_and_stay_inside() -> None:
    """Complete datasets of such names are not looked at more closely."""
    parts = ["a", "1.png", "a:b", ".", "..", "", "a\\b", "C:", ".a", "a."]
    names = ["/".join(name) for n in (1, 2, 3) for name in itertools.product(parts, repeat=n)]
    plain = [name for name in names if PLAIN.fullmatch(name)]
    assert len(plain) == 3 + 3**2 + 3**3
    assert all(_relative(name) == name and not leads_outside(name) for name in plain)


def test_hidden_files_and_those_of_macos_are_named_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tree(
        tmp_path / ".of a user" / "photos", "a.png", "._a.png", ".thumbs/b.png", "__MACOSX/c.png", ".DS_Store"
    )
    assert image_files([photos], tmp_path / "out") == {photos / "a.png": "a.png"}
    assert "hidden files): 3: " in capsys.readouterr().out
    tree(photos / ".out", "1.png")
    image_files([photos], photos / ".out")
    assert "hidden files): 3: " in capsys.readouterr().out  # none of the earlier results
    assert image_files([photos / ".thumbs"], tmp_path / "out") == {photos / ".thumbs/b.png": "b.png"}
    assert image_files([photos / "._a.png"], tmp_path / "out") == {photos / "._a.png": "._a.png"}


def test_links_pipes_and_folders_are_named_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tree(tmp_path / "photos", "a.png", "folder.png/b.txt")
    os.mkfifo(photos / "pipe.jpg")
    (photos / "gone.png").symlink_to("nowhere.png")
    (photos / "linked").symlink_to(tree(tmp_path / "others", "c.png"))
    (photos / "link.png").symlink_to(tmp_path / "others" / "c.png")
    assert image_files([photos], tmp_path / "out") == {photos / "a.png": "a.png", photos / "link.png": "link.png"}
    line = capsys.readouterr().out
    assert (
        line.startswith(f"warning: {photos}: skipped (links, pipes, folders, hidden files): 4: ")
        and line.count("\n") == 1
    )
    assert f"{photos / 'folder.png'}, {photos / 'gone.png'}, {photos / 'linked'}, ..." in line
    for name, why in (
        ("pipe.jpg", "is a pipe, socket or device; give image files or folders"),
        ("gone.png", "is a link to a file that does not exist (nowhere.png)"),
        ("absent.png", "no such file or folder"),
    ):
        with pytest.raises(ConfigError) as error:
            image_files([photos / "a.png", photos / name], tmp_path / "out")
        assert str(error.value) == f"{photos / name}: {why}"
