"""The script's exit status, output, JSON and page, also with hostile names of classes and files."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import DESKTOP, PHONE, Browser
from planted import MISTAKES, Splits, clean
from small_sets import encode

from retina_jax.cli import one_line_errors

ROOT = Path(__file__).parents[2]
SIZE = ("--data.short-side", "96", "--data.long-side", "128", "--data.max-boxes", "4")
VOID = {"meta", "img", "br", "link", "input", "line", "rect"}
HOSTILE = "<script>alert('x')</script> & \"<img src=http://example.org/x.png>"


def run(monkeypatch: pytest.MonkeyPatch, pairs: dict[str, tuple[Path, Path]], out: Path, *options: str) -> int:
    """Returns the exit status of scripts/check_data.py."""
    spec = importlib.util.spec_from_file_location("check_data", ROOT / "scripts" / "check_data.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "check_data", script)  # tyro looks the arguments' annotations up there
    spec.loader.exec_module(script)
    words = ["--annotations", pairs["train"][0], "--images", pairs["train"][1], "--out", out, *SIZE, *options]
    if "val" in pairs:
        words += ["--val-annotations", pairs["val"][0], "--val-images", pairs["val"][1]]
    monkeypatch.setattr(sys, "argv", ["check_data.py", *map(str, words)])
    with pytest.raises(SystemExit) as end, one_line_errors():
        script.main()
    return end.value.code


class Page(HTMLParser):
    """References and texts of a page; asserts that its elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.references, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        names = ("src", "href", "srcset", "data", "action", "poster", "xlink:href", "background", "style")
        self.references += [value for name, value in attrs if name in names]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_clean_set_is_ready_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run(monkeypatch, clean().write(tmp_path), tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "\nReady to train\n" in out and str(tmp_path / "out" / "data_check.html") in out
    facts = json.loads((tmp_path / "out" / "data_check.json").read_text())
    assert facts["makes_sense"] and facts["findings"] == [] and facts["suggestion"] is None
    assert facts["coverage"]["all"]["by_iou_share"] == 1 and facts["splits"]["val"]["images"] == 3


@pytest.mark.parametrize(
    ("name", "status"), [("image_is_missing", 3), ("category_is_unknown", 3), ("box_has_no_width", 0)]
)
def test_errors_are_not_ready_to_train_and_warnings_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, name: str, status: int
) -> None:
    splits, (plant, expected) = clean(), MISTAKES[name]
    plant(splits)
    assert run(monkeypatch, splits.write(tmp_path), tmp_path / "out") == status
    ((kind, split, which),) = expected
    facts = json.loads((tmp_path / "out" / "data_check.json").read_text())
    ((found,),) = [group["found"] for group in facts["findings"] if group["kind"] == kind]
    assert (found["split"], found["name"]) == (split, which)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if which in line]
    assert line.startswith("error: " if status else "warning: ")
    page = (tmp_path / "out" / "data_check.html").read_text()
    assert which in " ".join(Page(page).texts)
    verdict = "Not ready to train: 1 error" if status else "Ready to train: 1 warning"
    assert page.index("<h1>") < page.index(verdict) < page.index('<div class="wall">') < page.index("<table")


def test_tiny_boxes_are_not_ready_until_the_suggestion_is_applied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("retina_jax.console.SECONDS_IN_LOG", 0.0)
    splits = clean()
    for document in splits.documents.values():
        for box in document["annotations"]:
            box["bbox"][2:] = [11, 13]
    pairs = splits.write(tmp_path)
    assert run(monkeypatch, pairs, tmp_path / "out") == 3
    lines = capsys.readouterr().out.splitlines()
    for task in ("train: images", "val: images", "anchors: images", "suggested anchors: images"):
        counted = [re.match(rf"{task} (\d+)/(\d+)", line) for line in lines if line.startswith(task)]
        assert [int(count[1]) for count in counted] == list(range(1, int(counted[0][2]) + 1)), task
    (line,) = [line for line in lines if line.startswith("suggestion: --")]
    claimed = json.loads((tmp_path / "out" / "data_check.json").read_text())["suggestion"]
    assert line.removeprefix("suggestion: ").startswith(claimed["options"])
    page = Page((tmp_path / "out" / "data_check.html").read_text())
    assert claimed["options"] in page.texts and page.tags.count("img") == 6 + 6
    assert run(monkeypatch, pairs, tmp_path / "again", *claimed["options"].split()) == 0
    facts = json.loads((tmp_path / "again" / "data_check.json").read_text())
    assert facts["coverage"] == claimed["coverage"] and facts["coverage"]["all"]["by_iou"] == 12


def test_no_suggestion_is_searched_for_if_none_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = clean()
    for document in splits.documents.values():
        for box in document["annotations"]:
            box["bbox"][2:] = [11, 13]
    monkeypatch.setattr("retina_jax.data_check.check.suggest", lambda *arguments: pytest.fail("searched"))
    assert run(monkeypatch, splits.write(tmp_path), tmp_path / "out", "--no-suggestion") == 3
    facts = json.loads((tmp_path / "out" / "data_check.json").read_text())
    assert facts["suggestion"] is None and facts["coverage"]["all"]["by_iou_share"] < 1
    assert "--no-suggestion" in (tmp_path / "out" / "data_check.html").read_text()


def test_the_page_requests_nothing_and_escapes_every_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = hostile()
    assert run(monkeypatch, splits.write(tmp_path), tmp_path / "out") == 3
    text = (tmp_path / "out" / "data_check.html").read_text()
    page = Page(text)
    assert page.tags.count("img") > 0 and not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(
        page.tags
    )
    assert all(reference.startswith(("#", "data:image/jpeg;base64,", "--columns:")) for reference in page.references)
    outside = re.findall(r"https?://[^\s\"'<]*", re.sub(r"&lt;.*?&gt;", "", text))
    assert set(outside) <= {"http://www.w3.org/2000/svg"}  # a name, which is not fetched
    assert "url(" not in text and "@import" not in text
    with Browser() as browser:
        for size, scheme in ((DESKTOP, "dark"), (PHONE, "light")):
            browser.open(tmp_path / "out" / "data_check.html", size, scheme)
            assert browser.overflow() <= 0 and browser.cut() == [] and browser.faint() == {}
            assert len(browser.all(".wall img")) == 6 and len(browser.all(".verdict li a")) >= 2
        assert browser.complaints() == [] and len(set(browser.requests())) == 1
    assert HOSTILE in page.texts and f"{HOSTILE.replace('/', '-')}.jpg" in page.texts


def hostile() -> Splits:
    """Returns the clean dataset with this name for a class and for a missing image, and boxes to draw."""
    splits = clean()
    for document in splits.documents.values():
        document["categories"][0]["name"] = HOSTILE
    name = f"{HOSTILE.replace('/', '-')}.jpg"
    splits.add_image(40, name, encode(np.zeros((96, 128, 3), np.uint8)))
    del splits.files["train"][name]
    for box in splits.documents["train"]["annotations"]:
        box["bbox"][2:] = [10, 10]
    return splits


def test_data_that_cannot_be_checked_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pairs = clean().write(tmp_path)
    absent = {"train": (tmp_path / "absent.json", pairs["train"][1])}
    assert run(monkeypatch, absent, tmp_path / "out") == 2
    assert run(monkeypatch, {"train": (pairs["train"][0], tmp_path / "nowhere")}, tmp_path / "out") == 2
    assert run(monkeypatch, {"train": pairs["train"]}, tmp_path / "out", "--val-images", str(tmp_path)) == 2
    (tmp_path / "file").write_text("")
    assert run(monkeypatch, {"train": pairs["train"]}, tmp_path / "file") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 4 and all(line.startswith("error: ") for line in lines)
    for line, name in zip(lines, ("absent.json", "no such folder", "--val-images", "File exists"), strict=True):
        assert name in line
