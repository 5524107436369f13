"""The command `retina-jax NAME ...`: the same as `python scripts/NAME.py ...` for every script there is.

It imports neither JAX nor any other library before it starts the script.
"""

import ast
import difflib
import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from retina_jax.errors import one_line, reader_may_leave
from retina_jax.installation import NAME, SCRIPTS, version_of


def main() -> int:
    """Runs the script that the first argument names, in this process; or prints help or the version."""
    commands = {file.stem.replace("_", "-"): file for file in sorted(SCRIPTS.glob("*.py"))}
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    name = word.replace("_", "-")
    if name in commands:
        run(commands[name], f"{NAME} {name}")
    elif word in ("", "-h", "--help"):
        with reader_may_leave():
            print(overview(commands), flush=True)
    elif word == "--version":
        with reader_may_leave():
            print(f"retina_jax {version_of(NAME)}", flush=True)
    else:
        near = difflib.get_close_matches(name, commands, n=1, cutoff=0)
        print(one_line(f"error: {NAME} {word}: no such command; did you mean {NAME} {near[0]}?"), file=sys.stderr)
        return 2
    return 0


def run(file: Path, program: str) -> None:
    """Runs a script as `python FILE` does, but as `program` in its help and in config.json."""
    spec = importlib.util.spec_from_file_location("__main__", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["__main__"] = module
    sys.argv = [program, *sys.argv[2:]]
    sys.path.insert(0, str(file.parent))
    spec.loader.exec_module(module)


def overview(commands: Mapping[str, Path]) -> str:
    """Returns the help: each command with the first sentence of its script."""
    width = max(map(len, commands))
    lines = [f"  {name:{width}}  {first_sentence(file)}" for name, file in commands.items()]
    return "\n".join(
        [
            f"usage: {NAME} COMMAND ...",
            "",
            "RetinaNet and the focal loss in JAX. Each command has --help.",
            "",
            *lines,
            "",
            f"{NAME} --version prints the version.",
        ]
    )


def as_typed(text: str, bare: bool = True) -> str:
    """Returns the text with `retina-jax NAME` for `python scripts/NAME.py` and, if `bare`, NAME.py, if that is what the user
    typed. An error may name a user's own file train.py."""
    if not sys.argv[0].startswith(f"{NAME} "):
        return text
    scripts = "|".join(file.stem for file in SCRIPTS.glob("*.py"))
    called = rf"(?<![\w/])(?:python )?(?:scripts/){'?' if bare else ''}({scripts})\.py"
    return re.sub(called, lambda script: f"{NAME} {script[1].replace('_', '-')}", text)


def first_sentence(file: Path) -> str:
    """Returns the first line of a script's docstring without the command in it."""
    line = (ast.get_docstring(ast.parse(file.read_bytes())) or "").partition("\n")[0]
    return re.split(r":? *(?:python )?scripts/", line)[0].rstrip(".")
