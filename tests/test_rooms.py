"""The structure of the package: rooms import only from rooms below them, without circles, and no two files have one
name. The private names of other packages are listed."""

import ast
import pkgutil
import re
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = (
    ("interrupts", "errors", "installation", "command", "__main__"),
    ("console", "config", "config_io", "presets", "cli", "distributed", "watch"),
    ("cpu",),
    ("ops",),
    ("model",),
    ("losses",),
    ("data",),
    ("weights",),
    ("runs",),
    ("training",),
    ("detector", "evaluation", "evaluate"),
    ("sweeps",),
    ("paper", "export", "data_check", "conversion", "accelerators"),
    ("reports",),
)
"""From the lowest room to the highest. A module may import from its own row and from the rows above it in this list."""
FLOOR = {room: floor for floor, row in enumerate(ROOMS) for room in row}


def package() -> dict[str, set[str]]:
    """Returns every module of the package with the modules of the package that it imports, at its top or in a
    function."""
    files = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in ROOT.glob("retina_jax/**/*.py")}
    modules = {name: file for name, file in files.items() if not name.endswith("__init__")}
    imports: dict[str, set[str]] = {}
    for name, file in modules.items():
        found = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("retina_jax"):
                found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        imports[name] = found & modules.keys() - {name}
    return imports


def test_no_module_imports_from_a_higher_room() -> None:
    upwards = [
        f"{name} imports {imported}"
        for name, imports in package().items()
        for imported in imports
        if FLOOR[imported.split(".")[1]] > FLOOR[name.split(".")[1]]
    ]
    assert upwards == []


def test_imports_have_no_circle() -> None:
    TopologicalSorter(package()).prepare()  # raises CycleError, which names the circle


def test_no_two_files_have_one_name() -> None:
    names = Counter(name.rpartition(".")[2] for name in package())
    assert [name for name, count in names.items() if count > 1] == []


def test_commands_import_no_weight_reader_before_weights_are_named() -> None:
    script = ast.parse((ROOT / "scripts" / "train.py").read_text())
    reached, todo = set(), [n.module for n in ast.walk(script) if isinstance(n, ast.ImportFrom) and n.module]
    imports = package_at_the_top()
    while todo:
        module = todo.pop()
        if module in imports and module not in reached:
            reached.add(module)
            todo += imports[module]
    assert not [module for module in reached if module.startswith("retina_jax.weights")]


def package_at_the_top() -> dict[str, list[str]]:
    """Returns the same as `package`, without the imports inside functions."""
    found = {}
    for file in ROOT.glob("retina_jax/**/*.py"):
        nodes = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ImportFrom) and node.module]
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        found[name] = [node.module for node in nodes] + [f"{n.module}.{a.name}" for n in nodes for a in n.names]
    return found


PRIVATE = {
    "jax._src.distributed.global_state.process_id": "distributed.is_primary and share: the number of this host",
    "jax._src.distributed.global_state.num_processes": "distributed.is_multihost: without initialising the devices",
    "jax._src.distributed.global_state.client": "watch.Watch: names a late host through JAX's coordinator",
    "jax._src.clusters.ClusterEnv.auto_detect_unset_distributed_params": "--distributed: host 0 checks its port before",
    "jax._src.compiler.get_compile_options": "the fixture `optimised`: XLA's fusion emitters in one module",
    "jaxtyping._import_hook._JaxtypingLoader": "only the time that each process of the tests takes to import",
    "jaxtyping._import_hook._optimized_cache_from_source": "the same",
    "jaxtyping._import_hook.JaxtypingTransformer": "only the time of tracing: inner functions would be checked too",
}
"""Names without a public equivalent, and what breaks if one disappears."""


def test_private_names_of_jax_and_jaxtyping_exist_and_are_listed() -> None:
    for name in PRIVATE:
        pkgutil.resolve_name(name)  # AttributeError or ImportError names it
    files = (file for room in ("retina_jax", "scripts", "tests") for file in ROOT.glob(f"{room}/**/*.py"))
    code = "\n".join(file.read_text() for file in files if file != Path(__file__))
    used = {name.replace(" import ", ".") for name in re.findall(r"jax\._src[\w.]*(?: import \w+)?", code)}
    assert used and {name for name in used if not any(known.startswith(name) for known in PRIVATE)} == set()
