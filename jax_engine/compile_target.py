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

import jax

from checkpoints.quantized_weight import shapes
from jax_engine.buckets import Bucket
from jax_engine.compilation import memory, step_bytes
from jax_engine.config import EngineConfig, Limits, resolve
from jax_engine.errors import ConfigError
from jax_engine.model_config import ModelConfig
from jax_engine.program import ModelProgram, Part, largest_parts
from jax_engine.targets import Target

_GIB = 1 << 30


class DoesNotFit(ConfigError):
    """The compiler refuses a step; the message is its reason."""


@dataclass(frozen=True)
class StepReport:
    """What the compiler said of one program. Bytes are of one device.

    Attributes:
        kind, bucket: see program.Part.
        lower_seconds, compile_seconds: of making it.
        argument_bytes: weights, cache and batch. alias_bytes: what of these is updated in place.
        temp_bytes: memory that the step needs beside its arguments. output_bytes: of results that are new arrays.
        code_bytes: of the program.
        vmem_bytes: what the hungriest kernel takes of VMEM; 0 on a GPU.
        collectives: how many operations between devices, by name.
    """

    kind: str
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
        limits: of the engine that would run there. page_bytes: of one page.
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
    served = model.served(limits.max_model_len)
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
    useful = limits.max_num_seqs * limits.full_pages
    found = Fit(limits, weights, 0, page, useful, 0)
    _check_room(target, config, found, usable - weights - slots)  # before minutes of compiling
    small = dataclasses.replace(limits, num_pages=limits.full_pages)
    temp = step_bytes(*(report(program, part, small)[1] for part in largest_parts(limits)))
    free = usable - weights - slots - temp
    found = dataclasses.replace(found, temp_bytes=temp, largest_pages=max(free, 0) // page)
    _check_room(target, config, found, free)
    num_pages = config.num_pages or min(useful, found.largest_pages)
    return program, dataclasses.replace(found, limits=dataclasses.replace(limits, num_pages=num_pages))


def _check_room(target: Target, config: EngineConfig, found: Fit, free: int) -> None:
    """Refuses what leaves no room for one sequence of the longest length."""
    limits = found.limits
    pages = max(free, 0) // found.page_bytes
    if pages >= limits.full_pages:
        return
    temporaries = f" and temporaries {found.temp_bytes / _GIB:.2f}" if found.temp_bytes else ""
    raise DoesNotFit(
        f"{target.name} has {target.hbm_bytes / _GIB:.2f} GiB on each device, of which "
        f"{config.gpu_memory_utilization:.0%} may be used (gpu_memory_utilization); weights take "
        f"{found.weight_bytes / _GIB:.2f} GiB{temporaries}. That leaves {pages} pages of the "
        f"{limits.full_pages} that one sequence of max_model_len {limits.max_model_len} needs. Take more or "
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
    return report(program, Part("model", bucket), limits)[0]


def compile_parts(program: ModelProgram, limits: Limits) -> Iterator[StepReport]:
    """Compiles every program of steps within the limits.

    Raises:
        DoesNotFit: the compiler refuses one.
    """
    for part in program.parts(limits):
        yield report(program, part, limits)[0]


def report(program: ModelProgram, part: Part, limits: Limits) -> tuple[StepReport, jax.stages.Compiled]:
    """Compiles one program and reports.

    Raises:
        DoesNotFit: the compiler refuses it.
    """
    source = program.part(part, limits)
    started = time.perf_counter()
    lowered = source.lower()
    lower_seconds = time.perf_counter() - started
    started = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=source.options)
    except jax.errors.JaxRuntimeError as error:
        raise DoesNotFit(f"{described(*part)}: the compiler refuses it: {error}") from None
    compile_seconds = time.perf_counter() - started
    text = compiled.as_text() or ""
    used = memory(compiled)
    found = StepReport(
        kind=part.kind,
        bucket=part.bucket,
        lower_seconds=lower_seconds,
        compile_seconds=compile_seconds,
        argument_bytes=used.arguments,
        alias_bytes=used.aliased,
        temp_bytes=used.temporaries,
        output_bytes=used.outputs,
        code_bytes=used.code,
        vmem_bytes=_vmem_bytes(text),
        collectives=_collectives(text),
    )
    return found, compiled


def described(kind: str, bucket: Bucket) -> str:
    """What a part is, in two words."""
    if kind != "model":
        return f"{kind} {bucket.num_tokens or bucket.num_seqs}"
    return f"{bucket.num_tokens} {'decode' if bucket.decode_only else 'mixed'}"


_COLLECTIVE = re.compile(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
#: Calls of the kernels of pallas_kernels.all_reduce, which are no collectives as far as XLA knows.
_ALL_REDUCE_KERNEL = re.compile(r' custom-call\(.*op_name="[^"]*/all_reduce(?:_add_norm)?/')


def _collectives(text: str) -> dict[str, int]:
    names = _COLLECTIVE.findall(text) + ["all-reduce"] * len(_ALL_REDUCE_KERNEL.findall(text))
    return {name: names.count(name) for name in sorted(set(names))}


#: Where the part of VMEM (memory space 1) begins that a kernel may take, and where ends what is taken of all of VMEM.
_VMEM_BEGINS = re.compile(r'"scoped_memory_configs":\[\{"memory_space":"1","offset":"(\d+)"')
_VMEM_ENDS = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"')


def _vmem_bytes(text: str) -> int:
    """What the hungriest kernel takes of VMEM, from the compiled program's own notes.

    XLA keeps the part before the kernel's own for results and for weights that it fetches ahead. How large it makes
    that says nothing of what fits.
    """
    kernels = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    begins, ends = (
        [int(number) for line in kernels for number in pattern.findall(line)] for pattern in (_VMEM_BEGINS, _VMEM_ENDS)
    )
    return max((end - begin for begin, end in zip(begins, ends, strict=True)), default=0)
