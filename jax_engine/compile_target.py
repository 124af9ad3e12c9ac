"""Compiling a model's steps for a device that is not here, and what the compiler says of their memory.

`jax-engine compile` and the tests of the TPU path call this. The compilers are the real ones, libtpu's and XLA's for
CUDA; they know a chip's limits and refuse what does not fit. Nothing is run, no weights are read, no device is touched.
"""

import dataclasses
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from jax_engine.batch import Bucket, buckets
from jax_engine.config import EngineConfig, Limits, resolve
from jax_engine.errors import ConfigError
from jax_engine.model_config import ModelConfig
from jax_engine.program import ModelProgram

#: Names of one chip, which need to be told that it is alone on its host.
ONE_CHIP = ("v5e:1x1", "v6e:1x1", "v5p:1x1x1", "tpu7x:1x1x1")
#: Names of several that are known to work; others of the same form may.
SEVERAL_CHIPS = ("v5e:2x2", "v5e:2x4", "v6e:2x2", "v6e:2x4", "v5p:2x2x1", "tpu7x:2x2x1")

_GIB = 1 << 30


class DoesNotFit(ConfigError):
    """The compiler refuses a step; the message is its reason."""


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


@dataclass(frozen=True)
class StepReport:
    """What the compiler said of one bucket's step. Bytes are of one device.

    Attributes:
        lower_seconds, compile_seconds: of making it.
        argument_bytes: weights, cache and batch. alias_bytes: what of these is updated in place.
        temp_bytes: memory that the step needs beside its arguments. code_bytes: of the program.
        vmem_bytes: what the hungriest kernel is given of VMEM; 0 on a GPU.
        collectives: how many operations between devices, by name.
    """

    bucket: Bucket
    lower_seconds: float
    compile_seconds: float
    argument_bytes: int
    alias_bytes: int
    temp_bytes: int
    code_bytes: int
    vmem_bytes: int
    collectives: dict[str, int]


@dataclass(frozen=True)
class Fit:
    """What a model takes of a target before any bucket is compiled for good. Bytes are of one device.

    Attributes:
        limits: of the engine that would run there. page_bytes: of one page over all layers.
        pool_bytes: of the pool that limits.num_pages makes. useful_pages: more than these no batch could ever use.
        largest_pages: the largest pool that fits beside weights and temporaries.
    """

    limits: Limits
    weight_bytes: int
    temp_bytes: int
    page_bytes: int
    useful_pages: int
    largest_pages: int

    @property
    def pool_bytes(self) -> int:
        """Bytes of the pool of `limits`."""
        return self.limits.num_pages * self.page_bytes


def open_target(name: str) -> Target:
    """Finds the devices that a name stands for, as `v6e:1x1`.

    Raises:
        ConfigError: there is no such name, or the compiler for it is not installed.
    """
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if name in ONE_CHIP else {}
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **bounds).devices
    except Exception as error:  # jax raises various kinds
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"target {name!r} cannot be compiled for: {reason}. Known: {', '.join((*ONE_CHIP, *SEVERAL_CHIPS))}. "
            "They need libtpu: pip install 'jax-engine[tpu]'"
        ) from None
    return Target(name, list(devices), _hbm_bytes(devices[0]))


def _hbm_bytes(device: Any) -> int:
    """What the compiler lets a program use of a device's memory. Only its refusal says so."""
    mesh = jax.sharding.Mesh([device], ("one",))
    too_much = jax.ShapeDtypeStruct((1 << 44,), jnp.int8, sharding=NamedSharding(mesh, PartitionSpec()))
    try:
        jax.jit(lambda x: x + jnp.int8(1)).lower(too_much).compile()
    except jax.errors.JaxRuntimeError as error:
        if found := re.search(r"exceeds available HBM \(([\d.]+)G\)", str(error)):
            return int(float(found[1]) * _GIB)
        raise
    raise ConfigError(f"the compiler states no memory limit for {device.device_kind}")


def fit(config: EngineConfig, model: ModelConfig, target: Target) -> tuple[ModelProgram, Fit]:
    """How large a pool fits, as ModelRunner would find it on the device itself.

    Raises:
        DoesNotFit: not even one page does, or not the weights.
        ConfigError: the configuration cannot be run.
    """
    limits = resolve(config, model, platform=target.devices[0].platform, num_pages=config.num_pages or 1)
    served = model.served(limits.max_model_len, limits.ring_pages > 0)
    program = ModelProgram(served, config.dtype, target.devices)
    small = dataclasses.replace(limits, num_pages=limits.max_pages_per_seq)
    largest = max(buckets(limits), key=lambda bucket: bucket.num_tokens)
    temp = compile_step(program, largest, small).temp_bytes
    weights = sum(_bytes_per_device(want) for want in program.wanted.values())
    page = program.page_bytes(limits.page_size)
    other = weights + temp + program.slot_bytes(limits)
    pages = int(target.hbm_bytes * config.gpu_memory_utilization - other) // page
    useful = limits.max_num_seqs * limits.max_pages_per_seq
    found = Fit(limits, weights, temp, page, useful, max(pages, 0))
    if pages < limits.max_pages_per_seq:
        raise DoesNotFit(
            f"{target.name} has {target.hbm_bytes / _GIB:.2f} GiB, of which {config.gpu_memory_utilization:.0%} may be "
            f"used; weights take {weights / _GIB:.2f} GiB and temporaries {temp / _GIB:.2f}, which leaves "
            f"{max(pages, 0)} pages of the {limits.max_pages_per_seq} that one sequence of max_model_len "
            f"{limits.max_model_len} needs"
        )
    num_pages = config.num_pages or min(useful, pages)
    return program, dataclasses.replace(found, limits=dataclasses.replace(limits, num_pages=num_pages))


def _bytes_per_device(want: Any) -> int:
    return math.prod(want.sharding.shard_shape(want.shape)) * jnp.dtype(want.dtype).itemsize


def compile_step(program: ModelProgram, bucket: Bucket, limits: Limits) -> StepReport:
    """Compiles one bucket and reports.

    Raises:
        DoesNotFit: the compiler refuses it.
    """
    return report(program, bucket, limits)[0]


def report(program: ModelProgram, bucket: Bucket, limits: Limits) -> tuple[StepReport, jax.stages.Compiled]:
    """The same, with the compiled step."""
    started = time.perf_counter()
    _, lowered = program.lower(bucket, limits)
    lower_seconds = time.perf_counter() - started
    started = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise DoesNotFit(f"{_described(bucket)}: {error}") from None
    compile_seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    assert memory is not None, "the compiler reports no memory use"
    text = compiled.as_text() or ""
    return (
        StepReport(
            bucket=bucket,
            lower_seconds=lower_seconds,
            compile_seconds=compile_seconds,
            argument_bytes=memory.argument_size_in_bytes,
            alias_bytes=memory.alias_size_in_bytes,
            temp_bytes=memory.temp_size_in_bytes,
            code_bytes=memory.generated_code_size_in_bytes,
            vmem_bytes=_vmem_bytes(text),
            collectives=_collectives(text),
        ),
        compiled,
    )


def compile_buckets(program: ModelProgram, limits: Limits) -> Iterator[StepReport]:
    """Compiles every bucket of the limits, one after the other: the compiler uses all cores itself.

    Raises:
        DoesNotFit: the compiler refuses one.
    """
    for bucket in buckets(limits):
        yield compile_step(program, bucket, limits)


def _described(bucket: Bucket) -> str:
    kind = "decode rows" if bucket.decode_only else f"tokens of {bucket.num_seqs} rows"
    return f"the step of {bucket.num_tokens} {kind} cannot be compiled"


_COLLECTIVE = re.compile(r"= \S+ (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def _collectives(text: str) -> dict[str, int]:
    names = _COLLECTIVE.findall(text)
    return {name: names.count(name) for name in sorted(set(names))}


def _vmem_bytes(text: str) -> int:
    """What the hungriest kernel is given of VMEM (memory space 1), from the compiled program's own notes."""
    kernels = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    sizes = re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', "\n".join(kernels))
    return max(map(int, sizes), default=0)
