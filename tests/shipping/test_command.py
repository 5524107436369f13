"""The command `retina-jax`, the files of the wheel, configs outside the checkout, extras, and the doctor."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import doctor
import jax
import pytest

from retina_jax import command, installation
from retina_jax.config import ConfigError
from retina_jax.config_io import load_config
from retina_jax.reports.run_page import _command
from retina_jax.sweeps.points import base_file, load_sweeps, open_sweep, read_manifest
from retina_jax.training import opening

ROOT = Path(__file__).parents[2]
SCRIPTS = {path.stem for path in (ROOT / "scripts").glob("*.py")}
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
START = "import sys; sys.argv[0] = 'retina-jax'; from retina_jax.command import main; sys.exit(main())"


def started(*arguments: str, code: str = START, **options: object) -> subprocess.CompletedProcess[str]:
    """Runs `retina-jax ARGUMENTS` in a process of its own."""
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, **options)


def test_help_lists_every_script_and_imports_no_library() -> None:
    loaded = START.replace("sys.exit(main())", "main(); print(sorted(name for name in sys.modules if '.' not in name))")
    done = started("--help", code=loaded)
    assert done.returncode == 0, done.stderr
    listed = re.findall(r"^  ([a-z-]+)  +(\w.{10,})$", done.stdout, re.MULTILINE)
    assert {name.replace("-", "_") for name, _ in listed} == SCRIPTS and {"train", "doctor"} <= SCRIPTS
    assert not any("python" in sentence or "scripts/" in sentence for _, sentence in listed)
    assert not {"jax", "numpy", "tyro", "packaging"} & set(re.findall(r"'(\w+)'", done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("words", [("--help",), ("--version",), ("train", "--help")])
def test_a_reader_that_leaves_ends_the_command_without_a_message(words: tuple[str, ...]) -> None:
    """As in `retina-jax --help | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as closed:
        command = [sys.executable, "-c", START, *words]
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize(
    ("word", "near"), [("trian", "train"), ("import_weight", "import-weights"), ("\x1b[31m", ""), ("--config", "")]
)
def test_an_unknown_command_is_one_line_with_the_nearest_one(
    word: str, near: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["retina-jax", word])
    assert command.main() == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and error[:-1].isprintable() and f"retina-jax {near}" in error


SCRIPT = '''"""Greets: python scripts/say_hello.py NAME. See say_hello.py and configs/say_hello.py."""
from __future__ import annotations
import sys
from dataclasses import dataclass
from typing import get_type_hints
from neighbour import GREETING
from retina_jax.command import as_typed

@dataclass
class Arguments:
    word: Words

Words = str
if __name__ == "__main__":
    print(get_type_hints(Arguments)["word"].__name__, GREETING, sys.argv, __file__)
    print(as_typed(__doc__))
    sys.exit(7)
'''


@pytest.mark.parametrize("word", ["say-hello", "say_hello"])
def test_a_script_runs_as_with_python_under_the_name_that_was_typed(tmp_path: Path, word: str) -> None:
    (tmp_path / "say_hello.py").write_text(SCRIPT)
    (tmp_path / "neighbour.py").write_text("GREETING = 'hello'")
    elsewhere = f"from pathlib import Path; from retina_jax import command; command.SCRIPTS = Path({str(tmp_path)!r}); "
    done = started(word, "you", code=elsewhere + START)
    assert done.returncode == 7, done.stderr
    expected = f"str hello {['retina-jax say-hello', 'you']} {tmp_path / 'say_hello.py'}"
    text = "Greets: retina-jax say-hello NAME. See retina-jax say-hello and configs/say_hello.py."
    assert done.stdout.splitlines() == [expected, text]


def test_the_page_of_a_run_shows_the_command_as_typed() -> None:
    assert _command({"command": ["retina-jax train", "--workdir", "a b"]}) == "retina-jax train --workdir 'a b'"
    assert _command({"command": ["scripts/train.py", "--seed", "1"]}) == "python scripts/train.py --seed 1"


def test_configs_and_sweeps_are_found_outside_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paper = load_config(ROOT / "configs" / "paper_ablations.py")
    sgd = load_config(ROOT / "configs" / "mini_sgd.py")
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/mini_sgd.py") == sgd  # which loads mini.py
    ((path, module),) = (modules := load_sweeps(["configs/sweeps/table1b.py"])).items()
    base = base_file(modules, Path("configs/paper_ablations.py"))
    assert len(open_sweep(tmp_path, path, module, base, paper, (0,), write=True)) == 7
    manifest = read_manifest(tmp_path / "sweeps" / "table1b.json")
    assert (manifest["file"], manifest["base"]) == ("configs/sweeps/table1b.py", "configs/paper_ablations.py")
    with pytest.raises(ConfigError, match=r"configs/demi\.py: no such file.*there are configs/demo\.py, "):
        load_config("configs/demi.py")


def test_a_config_of_this_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    own = (ROOT / "configs" / "demo.py").read_text().replace("steps=2500", "steps=2501")
    (tmp_path / "configs" / "demo.py").write_text(own)
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/demo.py").training.steps == 2501
    assert load_config("configs/mini.py").training.steps == 1200


def test_an_installed_package_reads_its_own_configs(tmp_path: Path) -> None:
    """The package laid out as in the wheel, in an empty folder."""
    package = tmp_path / "site" / "retina_jax"
    package.mkdir(parents=True)
    for file in [*(ROOT / "retina_jax").iterdir(), ROOT / "scripts", ROOT / "configs"]:
        (package / file.name).symlink_to(file)
    loading = "from retina_jax.config_io import load_config; print(load_config('configs/mini_sgd.py').optimizer.name)"
    done = started(code=loading, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(package.parent)})
    assert done.stdout == "sgd\n", done.stderr
    assert done.stderr.endswith(f"reading {package / 'configs' / 'mini_sgd.py'}\n") and done.stderr.count("\n") == 1


def test_the_commit_is_that_of_the_checkout_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository around an installed package is another one."""
    monkeypatch.setattr(opening, "HOME", opening.PACKAGE)
    assert opening.code_commit() is None


def test_what_an_extra_adds_follows_from_the_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = {
        "detector": ["always", 'engine[gpu]; extra == "fast"', 'engine; extra == "plain"', 'absent; extra == "other"'],
        "engine": ['driver>=2; extra == "gpu"', 'unrelated; extra == "docs"'],
    }
    for name, lines in needs.items():
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        listed = "".join(f"Requires-Dist: {line}\n" for line in lines)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{listed}")
    monkeypatch.syspath_prepend(tmp_path)
    assert installation.missing("detector[fast]") == ["driver>=2"]
    assert installation.missing("detector[plain]") == []
    assert installation.missing("detector[other]") == ["absent"]


def test_every_extra_that_a_message_names_exists() -> None:
    files = (file for room in ("retina_jax", "scripts", "docs") for file in (ROOT / room).rglob("*.[pm][yd]"))
    named = {extra for file in files for extra in re.findall(r"retina-jax\[(\w+)\]", file.read_text())}
    assert {"cuda", "tpu", "wandb"} <= named <= EXTRAS
    assert set(doctor.PURPOSES) == EXTRAS


def test_the_doctor_reports_and_names_what_is_in_the_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["doctor.py"])
    assert doctor.main() == 0
    page = capsys.readouterr().out
    assert page.splitlines()[-1] == "ready to train" and len(page.splitlines()) < 60
    for part in (sys.executable, "jaxlib ", "wandb", ".cache", " x cpu", str(ROOT)):
        assert part in page
    monkeypatch.setitem(sys.modules, "train", None)
    assert doctor.main() == 1
    assert re.match(r"not ready to train: \w+Error: .*train", capsys.readouterr().out.splitlines()[-1])


def test_the_doctor_names_missing_and_untested_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [("jax", "0.1", "<0.13,>=0.10"), ("tyro", None, ""), ("numpy", "2.4", "")]
    monkeypatch.setattr(installation, "required", lambda: found)
    first, *others = (line.replace("\xa0", " ") for line in doctor.packages())
    assert "jax 0.1" in first and "numpy 2.4" in first and "tyro" not in first
    assert others == ["warning: jax 0.1 is outside the tested range <0.13,>=0.10", "missing: tyro"]


def test_the_doctor_names_why_a_plugin_finds_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def devices(platform: str = "") -> list[SimpleNamespace]:
        if platform:
            raise RuntimeError(f"unknown backend {platform}\nmore")
        logging.getLogger("jax.plugins").error("plugin error", exc_info=ValueError("no libcupti"))
        return [SimpleNamespace(device_kind="v5e")] * 2

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setattr(doctor, "PLUGINS", {"cuda": "json", "tpu": "no_such_module"})
    assert list(doctor.devices()) == [
        "2 x v5e",
        "no cuda device, although json is installed: unknown backend cuda more",
        "warning of JAX: plugin error: no libcupti",
    ]


NEED_THE_CHECKOUT = {"scripts/benchmarks/coco_scale.py", "scripts/benchmarks/device_check.py"}


@pytest.mark.slow
def test_the_wheel_has_the_package_the_scripts_and_the_configs(tmp_path: Path) -> None:
    for name in ("retina_jax", "scripts", "configs"):
        shutil.copytree(ROOT / name, tmp_path / "tree" / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "tree")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, tmp_path / "tree"]
    done = subprocess.run(build, capture_output=True, text=True)
    if "No matching distribution found for hatchling" in done.stderr:
        pytest.skip("hatchling, which builds the wheel, cannot be downloaded")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    files = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        path if path.startswith("retina_jax") else f"retina_jax/{path}"
        for name, suffix in (("retina_jax", ""), ("scripts", ".py"), ("configs", ".py"))
        for file in (ROOT / name).rglob(f"*{suffix}")
        if file.is_file() and "__pycache__" not in file.parts
        and (path := str(file.relative_to(ROOT))) not in NEED_THE_CHECKOUT
    }  # fmt: skip
    assert {name for name in files if not name.startswith("retina_jax-")} == expected
    assert any(name.endswith("licenses/LICENSE") for name in files)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    arguments = ("sweep", "--sweep", "configs/sweeps/table1b.py", "--list")
    done = started(*arguments, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")})
    assert done.stdout.splitlines()[-1].startswith("7 distinct runs: 7 waiting"), done.stderr
