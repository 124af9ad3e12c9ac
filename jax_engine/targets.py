"""Targets: devices that are not here, by name, as compile_target.py compiles for them.

TPU names are libtpu's own, `v6e:2x2`; `h100` and `h100:4` stand for so many H100 SXM of one host. The compilers are the
extras `tpu` and `gpu`. Nothing here is run and no device is touched.
"""

import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_engine.errors import ConfigError
from jax_engine.xla_flags import MEMORY_FRACTION

#: Names of one chip, which need to be told that it is alone on its host.
ONE_CHIP = ("v5e:1x1", "v6e:1x1", "v5p:1x1x1", "tpu7x:1x1x1")
#: Names of several that are known to work; others of the same form may.
SEVERAL_CHIPS = ("v5e:2x2", "v5e:2x4", "v6e:2x2", "v6e:2x4", "v5p:2x2x1", "tpu7x:2x2x1")
GPUS = ("h100", "h100:2", "h100:4", "h100:8")

_GIB = 1 << 30

#: XLA's GpuTargetConfig of an H100 SXM, by NVIDIA's data sheet and CUDA's device limits for compute capability 9.0.
#: Without the driver's version XLA leaves library calls out of CUDA graphs; without links between GPUs it leaves sums
#: over them to NCCL.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84929347584
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  driver_version: "12.9.0"
  device_interconnect_info { active_links: 18 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 28 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclass(frozen=True)
class Target:
    """Devices on paper.

    Attributes:
        name: as the user gave it. devices: those that hold the model between them, as jax describes them.
        hbm_bytes: what programs may use of one device's memory.
    """

    name: str
    devices: list[Any]
    hbm_bytes: int


def open_target(name: str) -> Target:
    """Finds the devices that a name stands for, as `v6e:1x1`.

    Raises:
        ConfigError: there is no such name, or the compiler for it is not installed.
    """
    kind, _, count = name.partition(":")
    if kind == "h100":
        devices = _open(name, "gpu", platform="cuda", target_config=_H100, topology=f"1x1x{count or 1}")
        [memory] = re.findall(r"device_memory_size: (\d+)", _H100)
        return Target(name, devices, int(int(memory) * float(MEMORY_FRACTION)))
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if name in ONE_CHIP else {}
    devices = _open(name, "tpu", platform="tpu", topology_name=name, **bounds)
    return Target(name, devices, _hbm_bytes(devices[0]))


def _open(name: str, extra: str, **description: Any) -> list[Any]:
    try:
        return list(topologies.get_topology_desc(**description).devices)
    except Exception as error:  # jax raises various kinds
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"target {name!r} cannot be compiled for: {reason}. "
            f"Known: {', '.join((*ONE_CHIP, *SEVERAL_CHIPS, *GPUS))}. "
            f"Its compiler is in the extra `{extra}`: pip install '.[{extra}]'"
        ) from None


def _hbm_bytes(device: Any) -> int:
    """What the TPU compiler lets a program use of a device's memory. Only its refusal says so."""
    mesh = Mesh([device], ("one",))
    too_much = jax.ShapeDtypeStruct((1 << 44,), jnp.int8, sharding=NamedSharding(mesh, PartitionSpec()))
    try:
        jax.jit(lambda x: x + jnp.int8(1)).lower(too_much).compile()
    except jax.errors.JaxRuntimeError as error:
        if found := re.search(r"exceeds available HBM \(([\d.]+)G\)", str(error)):
            return int(float(found[1]) * _GIB)
        raise
    raise ConfigError(f"the compiler states no memory limit for {device.device_kind}")
