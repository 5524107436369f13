"""README and docs: every command is valid for its script, all Python runs, every link and picture exists."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import processes
import pytest

from retina_jax import cli
from retina_jax.config import Config, ScenesConfig
from retina_jax.config_io import flatten, validate
from retina_jax.data.scenes import write_scenes
from retina_jax.distributed import Hosts
from retina_jax.errors import PlainError

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "scripts").rglob("*.md"))]
PYTHON = ".venv/bin/python"
CHECKED_ELSEWHERE = {
    ("README.md", "runs/mine/config.json"): "a listing of a run's folder, not a command",
    ("docs/export.md", "import json"): "programs for ONNX: tests/shipping/test_onnx.py runs them",
    ("docs/export.md", 'name: "detector"'): "a file of Triton: tests/shipping/test_onnx.py reads it",
    ("docs/export.md", "docker run"): "a command of Docker: tests/shipping/test_onnx.py reads it",
    ("docs/extending.md", "--- a/retina_jax/config.py"): "diffs: tests/test_extending.py applies them",
    ("docs/extending.md", '"""poly.py: is Poly-1'): "a sweep: tests/test_extending.py lists and trains it",
    ("docs/results/check_data.md", "train: 205 images"): "output of the command above",
    ("docs/results/check_data.md", "warning: classes"): "output of the command above",
}
"""(document, beginning of the block): why the block is not checked here. Every entry must be used."""
STAND_INS = {"CONFIG": "configs/paper_r50_600.py", "poly.py": "configs/sweeps/table1b.py"}
"""Files of the reader that are not in this checkout, and files that replace them."""


class Block(NamedTuple):
    """A fenced block of a document."""

    document: str
    language: str
    text: str

    @property
    def named(self) -> str:
        return f"{self.document}: {self.text.splitlines()[0][:60]}"

    def listed(self) -> tuple[str, str] | None:
        """Returns its entry of CHECKED_ELSEWHERE."""
        entries = (e for e in CHECKED_ELSEWHERE if e[0] == self.document and self.text.startswith(e[1]))
        return next(entries, None)


def blocks() -> Iterator[Block]:
    for path in DOCUMENTS:
        for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL):
            yield Block(str(path.relative_to(ROOT)), language, text)


BLOCKS = list(blocks())
OTHERS = [block for block in BLOCKS if block.listed() is None]


def commands(text: str) -> list[list[str]]:
    """Returns the words of every command; joins lines that end in a backslash and leaves out comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


class Parsed(Exception):
    """Raised when a script has read its command line, before it does anything."""


@cache
def script(path: Path) -> ModuleType:
    """Imports a script; its `main` raises `Parsed` once it has read its command line."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look up their module
    spec.loader.exec_module(module)

    def parse_only(*arguments: object, **options: object) -> None:
        made = cli.parse_command_line(*arguments, **options)
        if isinstance(settings := getattr(made, "settings", None), Config):
            validate(settings)
        raise Parsed

    module.parse_command_line = parse_only
    module.settings_of = lambda argv, exclusive=False: (
        Config()
    )  # instead of the config of a run, which does not exist here
    return module


def check(words: list[str]) -> None:
    """Raises AssertionError or PlainError if a command is invalid."""
    program, *arguments = words
    if program == "make":
        names = re.findall(r"^(\w+)\b(?=:| \?=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word.partition("=")[0] for word in arguments} <= {*names, "PYTHON"}, words
    elif program == "pip" or (program == PYTHON and arguments[:2] == ["-m", "pip"]):
        assert {"install", "wheel"} & set(arguments)
    elif program == ".venv/bin/pytest" or (program == PYTHON and arguments[:2] == ["-m", "pytest"]):
        check_pytest(arguments[2 * (program == PYTHON) :])
    elif program == PYTHON:
        check_script(arguments)
    elif program == "retina-jax":
        check_script([f"scripts/{arguments[0].replace('-', '_')}.py", *arguments[1:]])
    else:
        path = ROOT / program
        assert path.suffix == ".sh" and os.access(path, os.X_OK), f"{program}: no program of this checkout"


def check_script(arguments: list[str]) -> None:
    path = ROOT / arguments[0]
    assert path.is_file(), f"{path} is no file"
    if path.stem == "doctor":
        assert not arguments[1:], "doctor has no options"
        return
    given = []
    for word in arguments[1:]:  # expands patterns as a shell does
        matching = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(word)) if re.search(r"[?*]", word) else []
        given += matching or [STAND_INS.get(word, word)]
    argv, where = sys.argv, Path.cwd()
    sys.argv = [str(path), *given]
    os.chdir(ROOT)
    try:
        script(path).main()
    except Parsed:
        return
    finally:
        os.chdir(where)
        sys.argv = argv
    raise AssertionError(f"{path} does not read its command line by parse_command_line")


def check_pytest(arguments: list[str]) -> None:
    marks = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    words = iter(arguments)
    files, wanted = [], []
    for word in words:
        if word == "-m":
            mark = next(words)
            assert any(line.startswith(f"{mark}:") for line in marks), mark
        elif word == "-k":
            wanted.append(next(words))
        elif word != "-s":
            files.append(ROOT / word)
    for name in wanted:
        assert any(name in file.read_text() for file in files), f"no test {name}"
    assert all(file.is_file() for file in files), files


def test_every_block_listed_as_checked_elsewhere_exists_and_is_no_command() -> None:
    assert {block.listed() for block in BLOCKS} - {None} == set(CHECKED_ELSEWHERE)
    for block in BLOCKS:
        if block.listed() is not None and not block.language:
            with pytest.raises((AssertionError, PlainError)):
                check(commands(block.text)[0])


@pytest.mark.parametrize("block", [b for b in OTHERS if not b.language], ids=lambda block: block.named)
def test_commands_are_valid(block: Block) -> None:
    for words in commands(block.text):
        check(words)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_the_text_are_valid(path: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`(retina-jax [a-z][^`]*)`", prose):
        check(shlex.split(span))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("make everything", "everything"),
        (".venv/bin/python scripts/trian.py --workdir runs/a", "trian.py is no file"),
        ("retina-jax trian --workdir runs/a", "trian.py is no file"),
        (".venv/bin/python scripts/train.py --workdir runs/a --loss.gama 2", "loss.gama: no such field"),
        (".venv/bin/python scripts/train.py --workdir runs/a --loss.gamma two", "two"),
        (".venv/bin/python scripts/train.py --workdir runs/a --loss.gamma -2", "loss.gamma"),
        (".venv/bin/python scripts/train.py --workdir runs/a --config configs/paper.py", "no such file"),
        (".venv/bin/python scripts/predict.py --workdir runs/a PHOTOS", "out"),
        (".venv/bin/python scripts/sweep.py --sweep configs/sweeps/table1z.py --list", "no such file"),
        (".venv/bin/pytest -m slower", "slower"),
        ("tests/slurm/run.sh", "no program"),
    ],
)
def test_invalid_commands_are_detected(line: str, complaint: str) -> None:
    with pytest.raises((AssertionError, PlainError), match=re.escape(complaint)):
        check(commands(line)[0])


def known_options() -> set[str]:
    """Returns the options of all scripts, as fields."""
    names = set(flatten(Config())) | set(flatten(Hosts())) | {"help"}
    for path in (ROOT / "scripts").glob("*.py"):
        if path.stem != "doctor":  # it has no options
            names |= set(script(path).Arguments.__dataclass_fields__)
    return names


OF_OTHERS = {
    "help_all", "nodes", "ntasks_per_node", "signal", "zone", "worker", "command", "gpus", "onnx", "saveEngine",
    "minShapes", "optShapes", "maxShapes",
    "open_images",
}  # fmt: skip
"""Options of every script, of sbatch, gcloud, docker and trtexec, and of scripts/benchmarks/coco_scale.py."""


def named_in_text(path: Path) -> set[str]:
    """Returns the options that a document names outside its blocks, as fields."""
    prose = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`]+)`", prose)
    named = {name for span in spans for name in re.findall(r"(?<![\w-])--([a-z][\w.-]*)", span)}
    return {cli._field_name(f"--{name}") for name in named}


def test_every_listed_option_of_another_program_is_used() -> None:
    assert set().union(*map(named_in_text, DOCUMENTS)) - known_options() == OF_OTHERS


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_options_named_in_the_text_exist(path: Path) -> None:
    assert named_in_text(path) <= known_options() | OF_OTHERS


def anchors(path: Path) -> set[str]:
    """Returns the names that GitHub gives to a document's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_pictures_exist(path: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"https?:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{path.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{path.name}: {link}"


def test_every_language_of_a_block_is_checked() -> None:
    assert {block.language for block in OTHERS} <= {"", "python"}


GUIDE = (ROOT / "docs" / "own_data.md").read_text()
SMALL = {
    "train.py": """
        --data.short-side 64 --data.long-side 64 --data.batch-size 2 --model.base-width 8 --model.stage-blocks 1 1 1 1
        --model.min-level 4 --model.max-level 5 --model.norm frozen --anchors.size-factor 2
        --model.fpn-channels 16 --model.head-channels 16 --model.head-convs 1 --training.steps 2 --optimizer.boundaries 1
        --training.pictures 1 --training.no-tensorboard --model.prior 0.3
    """,
    "evaluate.py": "--detection.tta-short-sides 96",
    "check_data.py": "--data.short-side 64 --data.long-side 64",
    "export.py": "--count 2",
}
ASSUMED = """
from pathlib import Path
import numpy as np
from loader import load
from PIL import Image
names = sorted(Path("PHOTOS").iterdir())
image = np.asarray(Image.open(names[0]))
"""
"""Names that the Python blocks of the documents assume."""
RUN = """
import importlib.util, json, sys
from pathlib import Path

scripts, commands, codes = Path(sys.argv[1]), *map(json.loads, sys.argv[3:])
sys.path[:0] = sys.argv[1:3]
for name, words in commands:
    spec = importlib.util.spec_from_file_location(f"script_{name[:-3]}", scripts / name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    sys.argv = [name, *words]
    try:
        module.main()
    except SystemExit as end:
        assert not end.code, (name, end.code)
Path("bccd.zip").symlink_to("detector.zip")  # of docs/results/export.md
for name, code in codes.items():
    print("running", name, flush=True)
    exec(compile(code, name, "exec"), {})
"""
PYTHON_BLOCKS = [block for block in OTHERS if block.language == "python"]


def write_own_data(folder: Path) -> None:
    """Writes the data that docs/own_data.md starts with: one JSON per split, and the images of both in one folder."""
    scenes = write_scenes(
        ScenesConfig(folder=str(folder / "scenes"), train_images=6, val_images=3, size=64, min_side=24.0, max_side=40.0)
    )
    shutil.copytree(scenes / "train", folder / "images")
    shutil.copy(scenes / "train.json", folder / "train.json")
    ground_truth = json.loads((scenes / "val.json").read_text())
    for entry in ground_truth["images"]:
        own = f"val_{entry['file_name']}"
        shutil.copy(scenes / "val" / entry["file_name"], folder / "images" / own)
        entry["file_name"] = own
    (folder / "val.json").write_text(json.dumps(ground_truth))
    (folder / "PHOTOS").symlink_to(scenes / "val")
    (folder / "configs").symlink_to(ROOT / "configs")


def test_the_commands_of_the_guide_and_all_python_blocks_run(tmp_path: Path) -> None:
    write_own_data(tmp_path)
    given = []
    for block in BLOCKS:
        if block.document == "docs/own_data.md" and not block.language:
            for program, path, *words in commands(block.text):
                assert program == PYTHON
                name = Path(path).name
                given.append((name, [*words, *shlex.split(SMALL.get(name, ""))]))
    codes = {block.named: ASSUMED + block.text for block in PYTHON_BLOCKS}
    (tmp_path / "run.py").write_text(RUN)
    arguments = (ROOT / "scripts", ROOT / "retina_jax" / "export", json.dumps(given), json.dumps(codes))
    done = processes.run(tmp_path / "run.py", *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert re.findall(r"^running (.*)$", done.stdout, re.MULTILINE) == list(codes) and len(codes) >= 4
    written = set(re.findall(r"`((?:runs|checks|found)/[\w./]+)`", GUIDE))
    assert len(written) >= 3
    for name in written | {"detector.zip"}:
        assert (tmp_path / name).exists(), name
