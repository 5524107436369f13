"""Every test runs strict: shapes and types checked by machine, no silent promotion, 8 CPU devices, warnings are errors."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".cache" / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

install_import_hook("retina_jax", "beartype.beartype").__enter__()

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    """Parity tests need torch, which crashes where TensorFlow was loaded before it."""
    chosen = config.option.markexpr
    if "parity" in chosen and "not parity" not in chosen:
        with contextlib.suppress(ImportError):
            import torch
            import torchvision  # noqa: F401

            torch.set_num_threads(2)


@pytest.fixture
def quick_compilation() -> Iterator[None]:
    """A test's programs are compiled for speed of compiling, where that is most of its time: LLVM's passes are left out,
    XLA's own (fusion, partitioning, copies) are as ever."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real images that stands beside some checkouts; the test is skipped where it does not."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: this test needs the real images there")
    return SHARED
