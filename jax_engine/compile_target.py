"""Compiling a model's steps for a device that is not here, and what the compiler says of their memory.

`jax-engine compile` and the tests of the TPU path call this; targets.py names the devices. The compilers are the real
ones, libtpu's and XLA's for CUDA: they know a chip's limits and refuse what does not fit. Nothing is run, no weights
are read, no device is touched.
"""

import dataclasses
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax

from checkpoints.quantized_weight import shapes
from jax_engine.buckets import Bucket, buckets
from jax_engine.config import EngineConfig, Limits, resolve
from jax_engine.errors import ConfigError
from jax_engine.model_config import ModelConfig
from jax_engine.program import ModelProgram
from jax_engine.targets import Target

_GIB = 1 << 30


class DoesNotFit(ConfigError):
    """The compiler refuses a step; the message is its reason."""


@dataclass(frozen=True)
class StepReport:
    """What the compiler said of one bucket's step. Bytes are of one device.

    Attributes:
        bucket: of no tokens for the program that samples the rows of a deferred step.
        lower_seconds, compile_seconds: of making it.
        argument_bytes: weights, cache and batch. alias_bytes: what of these is updated in place.
        temp_bytes: memory that the step needs beside its arguments. output_bytes: of results that are new arrays.
        code_bytes: of the program.
        vmem_bytes: what the hungriest kernel is given of VMEM; 0 on a GPU.
        collectives: how many operations between devices, by name.
    """

    bucket: Bucket
    lower_seconds: float
    compile_seconds: float
    argument_bytes: int
    alias_bytes: int
    temp_bytes: int
    output_bytes: int
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


def fit(config: EngineConfig, model: ModelConfig, target: Target) -> tuple[ModelProgram, Fit]:
    """How large a pool fits, as ModelRunner would find it on the device itself.

    Raises:
        DoesNotFit: no sequence of the longest length does, or not the weights.
        ConfigError: the configuration cannot be run.
    """
    limits = resolve(config, model, platform=target.devices[0].platform, num_pages=config.num_pages or 1)
    served = model.served(limits.max_model_len, limits.ring_pages > 0)
    program = ModelProgram(
        served,
        config.dtype,
        target.devices,
        by_expert=config.enable_expert_parallel,
        kv_cache_dtype=config.kv_cache_dtype,
        quantization=None if config.quantization == "auto" else config.quantization,
    )
    arrays = (array for want in program.wanted.values() for array in jax.tree.leaves(shapes(want)))
    weights = sum(map(_bytes_per_device, arrays))
    page, slots = program.page_bytes(limits.page_size), program.slot_bytes(limits)
    usable = int(target.hbm_bytes * config.gpu_memory_utilization)
    useful = limits.max_num_seqs * limits.max_pages_per_seq
    found = Fit(limits, weights, 0, page, useful, 0)
    _check_room(target, config, found, usable - weights - slots)  # before minutes of compiling
    small = dataclasses.replace(limits, num_pages=limits.max_pages_per_seq)
    largest = max(buckets(limits), key=lambda bucket: bucket.num_tokens)
    step = compile_step(program, largest, small)
    temp = step.temp_bytes + step.output_bytes
    free = usable - weights - slots - temp
    found = dataclasses.replace(found, temp_bytes=temp, largest_pages=max(free, 0) // page)
    _check_room(target, config, found, free)
    num_pages = config.num_pages or min(useful, found.largest_pages)
    return program, dataclasses.replace(found, limits=dataclasses.replace(limits, num_pages=num_pages))


def _check_room(target: Target, config: EngineConfig, found: Fit, free: int) -> None:
    """Refuses what leaves no room for one sequence of the longest length."""
    limits = found.limits
    pages = max(free, 0) // found.page_bytes
    if pages >= limits.max_pages_per_seq:
        return
    temporaries = f" and temporaries {found.temp_bytes / _GIB:.2f}" if found.temp_bytes else ""
    raise DoesNotFit(
        f"{target.name} has {target.hbm_bytes / _GIB:.2f} GiB on each device, of which "
        f"{config.gpu_memory_utilization:.0%} may be used (gpu_memory_utilization); weights take "
        f"{found.weight_bytes / _GIB:.2f} GiB{temporaries}. That leaves {pages} pages of the "
        f"{limits.max_pages_per_seq} that one sequence of max_model_len {limits.max_model_len} needs. Take more or "
        "larger devices, smaller weights, a smaller max_model_len or max_num_batched_tokens"
    )


def _bytes_per_device(array: jax.ShapeDtypeStruct) -> int:
    assert array.sharding is not None
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


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
    return _compile(bucket, lowered, time.perf_counter() - started, program.compiler_options(bucket))


def compile_buckets(program: ModelProgram, limits: Limits) -> Iterator[StepReport]:
    """Compiles every bucket of the limits, then the sampling of deferred steps for every number of rows.

    Raises:
        DoesNotFit: the compiler refuses one.
    """
    logits = {}
    for bucket in buckets(limits):
        found, compiled = report(program, bucket, limits)
        logits[bucket.num_seqs] = compiled.output_shardings[1].logits
        yield found
    for num_seqs, sharding in logits.items():
        started = time.perf_counter()
        lowered = program.sampler(num_seqs, limits, sharding)[1].lower()
        seconds = time.perf_counter() - started
        yield _compile(Bucket(0, num_seqs, False), lowered, seconds, program.compiler_options())[0]


def _compile(
    bucket: Bucket, lowered: jax.stages.Lowered, lower_seconds: float, options: dict[str, Any] | None
) -> tuple[StepReport, jax.stages.Compiled]:
    started = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        raise DoesNotFit(f"{described(bucket)}: the compiler refuses it: {error}") from None
    compile_seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    assert memory is not None, "the compiler reports no memory use"
    text = compiled.as_text() or ""
    found = StepReport(
        bucket=bucket,
        lower_seconds=lower_seconds,
        compile_seconds=compile_seconds,
        argument_bytes=memory.argument_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        vmem_bytes=_vmem_bytes(text),
        collectives=_collectives(text),
    )
    return found, compiled


def described(bucket: Bucket) -> str:
    """What a bucket is, in a few words."""
    if bucket.num_tokens == 0:
        return f"sampling {bucket.num_seqs}"
    return f"{bucket.num_tokens} {'decode' if bucket.decode_only else 'mixed'}"


_COLLECTIVE = re.compile(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def _collectives(text: str) -> dict[str, int]:
    names = _COLLECTIVE.findall(text)
    return {name: names.count(name) for name in sorted(set(names))}


def _vmem_bytes(text: str) -> int:
    """What the hungriest kernel is given of VMEM (memory space 1), from the compiled program's own notes."""
    kernels = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    sizes = re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', "\n".join(kernels))
    return max(map(int, sizes), default=0)
