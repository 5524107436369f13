"""Every test runs strict: shapes and types are checked, no silent promotion, 8 CPU devices, warnings are errors.

Programs are compiled quickly, without the compiler's costly passes, unless a test uses `optimised` or slow tests are among
those selected. They are cached outside the checkout. Processes that tests start inherit both through the environment.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import mmap
import os
from collections.abc import Iterator
from functools import partial
from importlib.machinery import SourceFileLoader
from importlib.metadata import files
from pathlib import Path
from types import CodeType

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings
from jax._src import compiler
from jaxtyping import _import_hook, install_import_hook

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "retina_jax_tests"
QUICK = {
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": "1",
    "xla_cpu_prefer_vector_width": "128",
}
"""A tiny training step compiles in 1.4 s of processor time with these and without LLVM's passes, in 9.2 s as users' do."""
SHARES = 16
LONGEST = (
    "test_several_hosts", "test_parallel", "test_end_to_end", "test_kills", "test_compilation",
    "test_sweep_runs", "test_imported_runs", "test_documents", "test_averaging", "test_shipping", "test_torchvision",
)  # fmt: skip
"""Files, by the time that their tests take."""

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update(
    "jax_persistent_cache_min_compile_time_secs", float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"])
)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# On a loaded machine an example may take any time.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


if hasattr(_import_hook, "_JaxtypingLoader") and hasattr(_import_hook, "_optimized_cache_from_source"):  # private names

    class CheckedModule(_import_hook._JaxtypingLoader):
        """Looks for jaxtyping's own bytecode for the module alone, not for all that it imports: TensorFlow's, Flax' and
        others' bytecode would not be found, and 3400 files would be compiled in each process."""

        def get_code(self, fullname: str) -> CodeType | None:
            """Returns the code of the module with its checks."""
            marked = partial(_import_hook._optimized_cache_from_source, self._typechecker.get_hash())
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("importlib._bootstrap_external.cache_from_source", marked)
                return super().get_code(fullname)

        exec_module = SourceFileLoader.exec_module

    _import_hook._JaxtypingLoader = CheckedModule

if hasattr(_import_hook, "JaxtypingTransformer"):  # a private module

    class OutermostFunctions(_import_hook.JaxtypingTransformer):
        """Checks functions of modules and methods of classes. One inside another function would be decorated again at each
        call of that function, which takes a third of the time of tracing."""

        def generic_visit(self, node: ast.AST) -> None:
            """Visits the parts of a node other than a function."""
            if not isinstance(node, ast.FunctionDef):
                super().generic_visit(node)

    _import_hook.JaxtypingTransformer = OutermostFunctions

install_import_hook("retina_jax", "beartype.beartype").__enter__()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --share COMMIT."""
    parser.addoption("--plots", metavar="FOLDER", help="draw the threads and memory that tests/test_growth.py measures")
    parser.addoption("--share", metavar="COMMIT", help=f"run one of {SHARES} shares of the tests, chosen by the commit")


def pytest_configure(config: pytest.Config) -> None:
    """Imports torch before TensorFlow if parity tests are selected; the other order crashes."""
    chosen = config.option.markexpr
    if "parity" in chosen and "not parity" not in chosen:
        with contextlib.suppress(ImportError):
            import torch
            import torchvision  # noqa: F401

            torch.set_num_threads(2)
    if "not slow" in chosen:
        compile_quickly()


def compile_quickly() -> None:
    """Sets quick compilation for this process and all it starts, with the flags that this jaxlib has: an unknown one
    ends the process. A flag is a C string; the names of removed ones are still in a list (fusion emitters in 0.12)."""
    library = next(file.locate() for file in files("jaxlib") if file.name.startswith("libjax_common"))
    with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        known = [f"--{name}={value}" for name, value in QUICK.items() if content.find(b"\0%b\0" % name.encode()) >= 0]
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *known])
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.hookimpl(trylast=True)  # after -m has deselected
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the share of the commit: every test is in one share, and neighbours are in different ones. The slowest
    files come first, so that the workers end at the same time."""
    if commit := config.option.share:
        items.sort(key=lambda item: item.nodeid)
        items[:] = items[int(commit[:8], 16) % SHARES :: SHARES]
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    """Raises the thresholds of the garbage collector, which would take a fifth of the time of tracing."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


@pytest.fixture(scope="module", autouse=True)
def few_objects() -> None:
    """Excludes the objects of earlier tests from garbage collection: `CompiledStep` collects after each compilation, which
    takes 2 s of processor time late in a test run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def optimised() -> Iterator[None]:
    """Compiles programs with all of the compiler's passes, from this test to the end of the module."""
    options_of, flags = compiler.get_compile_options, os.environ.get("XLA_FLAGS", "")
    defaults = {"xla_cpu_use_fusion_emitters": True, "xla_cpu_prefer_vector_width": 256}
    changed = {name: value for name, value in defaults.items() if name in flags}

    def as_users(*args: object, env_options_overrides: dict | None = None, **kwargs: object) -> object:
        return options_of(*args, env_options_overrides={**changed, **(env_options_overrides or {})}, **kwargs)

    quickly = jax.config.read("jax_disable_most_optimizations")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", as_users)
        jax.config.update("jax_disable_most_optimizations", False)
        jax.clear_caches()  # a test before may have compiled the same function quickly
        yield
        jax.config.update("jax_disable_most_optimizations", quickly)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `small_runs.write_config` on one device, trained once for all workers. Copy it, do not change it.

    Its config is `learns.py` next to it.
    """
    import small_runs

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    run = folder / "trained"
    with FileLock(folder / "lock"):
        if not (run / "summary.json").exists():
            process = small_runs.start(small_runs.write_config(folder), run, devices=1)
            assert process.wait(600) == 0, run.with_suffix(".log").read_text()
    return run


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Returns the folder of real images that some checkouts have next to them; skips the test without it."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: this test needs the real images there")
    return SHARED
