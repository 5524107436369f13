"""The programs of training and inference, compiled for TPUs and GPUs: they fit, exchange gradients once, and do not become
more expensive than recorded in ratchets.json. RETINA_JAX_RECORD=1 writes what is measured there."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import pytest

from retina_jax.accelerators.lowering import What
from retina_jax.accelerators.needs import Needs, needs
from retina_jax.accelerators.targets import EXTRAS, parse_target, topology_devices
from retina_jax.config_io import load_config, override

pytestmark = pytest.mark.accelerators
ROOT = Path(__file__).parents[2]
RECORDED = Path(__file__).with_name("ratchets.json")
TOLERANCE = 1.05  # compilers of other versions differ by a few percent


@pytest.fixture(autouse=True)
def no_compilation_cache() -> Iterator[None]:
    """JAX writes programs for described devices to its cache, but cannot read them without the devices."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", before)


@dataclass(frozen=True)
class Case:
    """A program of a config at its largest landscape shape, in bfloat16."""

    what: What = "step"
    backbone: str = "resnet50"
    config: str = "paper_r50_600.py"
    padded_hw: tuple[int, int] = (800, 1344)
    batch_size: int = 0  # of all devices; 0: 2 images per device


CASES = {
    "r50-600": Case(padded_hw=(640, 1024)),
    "r50-600-detect": Case("detect", padded_hw=(640, 1024)),
    "r101-800": Case(backbone="resnet101"),
    "x101-800": Case(backbone="resnext101_32x8d"),
    "strong-r50-800": Case(config="strong_r50_800.py"),
    "r50-600-batch-16": Case(padded_hw=(640, 1024), batch_size=16),
    "r50-600-detect-batch-16": Case("detect", padded_hw=(640, 1024), batch_size=16),
}
TARGETS = ("tpu:v5e-1", "tpu:v5e-8", "tpu:v6e-1", "tpu:v6e-8", "gpu:h100-1", "gpu:h100-8")
OF_BATCH_16 = ("tpu:v5e-4", "tpu:v6e-4", "gpu:h100-1")  # the programs of docs/results/accelerators.md


def compiled(name: str, target_name: str) -> Needs:
    """Compiles a program; skips if the compiler is not installed."""
    target, number = parse_target(target_name)
    if importlib.util.find_spec(EXTRAS[target.platform][0]) is None:
        pytest.skip(f"{EXTRAS[target.platform][0]} is not installed")
    case = CASES[name]
    changes = {
        "model.backbone": case.backbone,
        "model.dtype": "bfloat16",
        "data.batch_size": case.batch_size or 2 * number,
    }
    config = override(load_config(ROOT / "configs" / case.config), changes)
    return needs(config, 80, target, topology_devices(target, number), case.what, case.padded_hw)[0]


def programs() -> Iterator[Any]:
    """Each case with its targets. Programs for GPUs compile within a minute, so they are in CI's share of slow tests too."""
    for name, case in CASES.items():
        for target in OF_BATCH_16 if case.batch_size else TARGETS:
            marks = [pytest.mark.slow] if target.startswith("gpu") else []
            yield pytest.param(name, target, marks=marks, id=f"{name}-{target}")


@pytest.mark.parametrize(("name", "target"), list(programs()))
def test_a_program_fits_and_costs_no_more_than_recorded(name: str, target: str) -> None:
    found = compiled(name, target)
    assert found.fits and found.host_transfers == 0
    exchanges = CASES[name].what == "step" and not target.endswith("-1")
    assert set(found.collectives) == ({"all-reduce f32"} if exchanges else set())
    costs = {
        "temporaries": found.memory.temporaries,
        "cycles": found.cycles,
        "bytes": sum(size for _, size in found.kernels.values()),
    }
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    if os.environ.get("RETINA_JAX_RECORD"):
        recorded.setdefault(name, {})[target] = costs
        RECORDED.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    if target not in recorded.get(name, {}):
        pytest.skip(f"it fits, but no costs are recorded for {target}")
    for kind, cost in costs.items():
        assert cost <= TOLERANCE * recorded[name][target][kind], kind
