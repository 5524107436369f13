"""Accelerators that programs can be compiled for without having one: their public figures, and topologies of their devices.

XLA's compilers for TPUs and NVIDIA GPUs come as wheels (libtpu, the CUDA plugin) and need no device.
"""

import importlib.util
import os
import re
from dataclasses import dataclass
from typing import Any

from jax.experimental import topologies

from retina_jax.config import ConfigError

EXTRAS = {"tpu": ("libtpu", "tpu"), "gpu": ("jax_cuda13_plugin", "cuda")}
"""By platform: the module of its compiler, and the extra of this package that installs it."""


@dataclass(frozen=True)
class Target:
    """A kind of accelerator, with figures of one device."""

    platform: str  # tpu or gpu
    kind: str  # v5e, h100
    source: str  # of the figures
    peak_flops: float  # bfloat16 operations per second of the matrix units, without sparsity
    memory: int  # bytes
    bandwidth: float  # bytes per second between the memory and the cores
    clock: float = 0.0  # Hz of the cycles that the TPU compiler estimates (peak over operations per cycle); 0 for GPUs
    cores: int = 0  # multiprocessors of a GPU
    capability: tuple[int, int] = (0, 0)  # CUDA compute capability
    shared_memory: int = 0  # bytes that a block of threads may use (opt-in)
    l2_cache: int = 0  # bytes

    @property
    def usable(self) -> int:
        """Bytes for programs. JAX reserves three quarters of a GPU, unless XLA_PYTHON_CLIENT_MEM_FRACTION is set."""
        return self.memory * 3 // 4 if self.platform == "gpu" else self.memory


GIB = 2**30
CLOUD, NVIDIA = "https://docs.cloud.google.com/tpu/docs/", "https://www.nvidia.com/en-us/data-center/"
TARGETS = {
    (target.platform, target.kind): target
    for target in (
        Target("tpu", "v4", CLOUD + "v4", 275e12, 32 * GIB, 1228e9, clock=1.05e9),
        Target("tpu", "v5e", CLOUD + "v5e", 197e12, 16 * GIB, 819e9, clock=1.5e9),
        Target("tpu", "v5p", CLOUD + "v5p", 459e12, 95 * GIB, 2765e9, clock=1.75e9),
        Target("tpu", "v6e", CLOUD + "v6e", 918e12, 32 * GIB, 1638e9, clock=1.75e9),
        Target("gpu", "a100", NVIDIA + "a100", 312e12, 80 * GIB, 2.039e12, 0.0, 108, (8, 0), 166912, 40 * 2**20),
        Target("gpu", "h100", NVIDIA + "h100", 989e12, 80 * GIB, 3.35e12, 0.0, 132, (9, 0), 232448, 50 * 2**20),
        Target("gpu", "h200", NVIDIA + "h200", 989e12, 141 * 10**9, 4.8e12, 0.0, 132, (9, 0), 232448, 50 * 2**20),
    )
}
TPU_TOPOLOGIES = {
    "v5e": {1: "2x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    "v6e": {1: "2x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    "v4": {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"},
    "v5p": {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"},
}
"""Chips of a slice and its shape, as they are rented. One chip is a part of the smallest slice with several."""


def parse_target(text: str) -> tuple[Target, int]:
    """Returns the target and the number of devices of tpu:v5e-8 or gpu:h100-8. Raises ConfigError for others."""
    match = re.fullmatch(r"(\w+):(\w+)-(\d+)", text)
    target = TARGETS.get(match.groups()[:2]) if match else None
    if match is None or target is None:
        known = ", ".join(f"{platform}:{kind}-N" for platform, kind in TARGETS)
        raise ConfigError(f"--target {text}: unknown; must be one of {known}, where N is the number of devices")
    number = int(match[3])
    sizes = TPU_TOPOLOGIES.get(target.kind, ())
    if number < 1 or (sizes and number not in sizes):
        raise ConfigError(f"--target {text}: invalid number of devices; must be one of {', '.join(map(str, sizes))}")
    return target, number


def topology_devices(target: Target, number: int) -> list[Any]:
    """Returns descriptions of `number` devices, which a mesh takes in place of real ones. Raises ConfigError if the compiler
    of the platform is not installed."""
    module, extra = EXTRAS[target.platform]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"--target {target.platform}: needs its compiler; pip install 'retina-jax[{extra}]'")
    if target.platform == "tpu":
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # the metadata server of a TPU VM, which this machine lacks
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")  # any; without one libtpu prints a warning
        shape = TPU_TOPOLOGIES[target.kind][number]
        found = topologies.get_topology_desc(topology_name=f"{target.kind}:{shape}", platform="tpu")
    else:
        found = topologies.get_topology_desc(
            f"1x1x{number}", "cuda", target_config=_gpu_config(target), topology=f"1x1x{number}"
        )
    return list(found.devices)[:number]


def _gpu_config(target: Target) -> str:
    """Returns XLA's GpuTargetConfigProto of a GPU as text."""
    major, minor = target.capability
    return f"""
        gpu_device_info {{
            threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
            shared_memory_per_core: {target.shared_memory + 1024} threads_per_core_limit: 2048
            core_count: {target.cores} fpus_per_core: {128 if major >= 9 else 64}
            block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
            memory_bandwidth: {target.bandwidth:.0f} l2_cache_size: {target.l2_cache} clock_rate_ghz: 1.98
            device_memory_size: {target.memory} shared_memory_per_block_optin: {target.shared_memory}
            cuda_compute_capability {{ major: {major} minor: {minor} }}
            registers_per_core_limit: 65536 registers_per_block_limit: 65536
        }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }} runtime_version {{ major: 13 }}
        device_description_str: "{target.kind}"
    """
