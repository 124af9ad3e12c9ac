"""ModelRunner: the device side of the engine. Loads weights, makes the cache, compiles every bucket, runs steps.

The engine calls `dispatch`, which returns at once, and later `StepHandle.result`, which waits. This file and
checkpoints/loader.py are the only ones that put data on a device; `StepHandle.result` is the only place that reads it.
"""

import dataclasses
import functools
import logging
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np

from checkpoints.formats import Checkpoint
from checkpoints.known_models import default_cache_dir
from checkpoints.loader import dummy, load
from jax_engine.batch import Batch, BatchLayout, StepResult, no_adjustments
from jax_engine.buckets import Bucket, buckets
from jax_engine.compilation import Program, build
from jax_engine.config import EngineConfig, Limits, resolve
from jax_engine.constraints import Constraints, unconstrained
from jax_engine.costs import measure
from jax_engine.errors import ConfigError
from jax_engine.features import Feature
from jax_engine.group import least
from jax_engine.kv_cache import KVCache
from jax_engine.models import read_config
from jax_engine.page_store import PageStore
from jax_engine.program import ModelProgram, chosen_quantization, nested
from jax_engine.sampler import SamplerOutput
from jax_engine.schedule import Copies
from jax_engine.sharding import choose_devices
from jax_engine.step import StepOutput
from jax_engine.xla_flags import set_xla_flags

_log = logging.getLogger(__name__)

_Compiled = tuple[BatchLayout, jax.stages.Compiled]

#: KV pools on a CPU share its memory with everything else that runs there.
_MAX_CPU_POOL_BYTES = 4 << 30


class StepHandle:
    """A dispatched step. Its result is on its way to the host from the moment it exists.

    Attributes:
        logits: of a deferred step that has not been sampled yet, else None.
    """

    def __init__(self, output: StepOutput, features: Feature):
        self._features = features
        self._prompt = None
        if Feature.PROMPT_LOGPROBS in features:
            self._prompt = output.prompt_logprobs
            _copy_to_host(self._prompt)
        self._hidden = None
        if Feature.HIDDEN in features:
            self._hidden = output.hidden
            _copy_to_host(self._hidden)
        self.logits: Any = output.logits
        if Feature.DEFERRED not in features:
            self.set_sampled(output.sampled)

    def set_sampled(self, sampled: SamplerOutput) -> None:
        """Takes in what was sampled, once; the logits are given back."""
        self.logits = None
        self._tokens = sampled.tokens
        self._logprobs = tuple(sampled[1:]) if Feature.LOGPROBS in self._features else None
        _copy_to_host((self._tokens, self._logprobs))

    def is_ready(self) -> bool:
        """Whether the device has finished what was dispatched of the step; does not wait."""
        last = self._tokens if self.logits is None else self.logits
        return last.is_ready()  # pyright: ignore[reportAttributeAccessIssue]

    def result(self) -> StepResult:
        """Waits for the step and returns its result."""
        tokens, logprobs, prompt, hidden = jax.device_get((self._tokens, self._logprobs, self._prompt, self._hidden))
        return StepResult(tokens.tolist(), logprobs, prompt, hidden)


class ModelRunner:
    """A model on its device, with its cache and its compiled steps.

    Raises:
        ConfigError: the model or the configuration cannot be run.
        CheckpointError: the weights are incomplete or damaged.
    """

    def __init__(self, config: EngineConfig, checkpoint: Checkpoint):
        cache_dir = config.compilation_cache_dir
        if cache_dir != "":
            _use_compilation_cache(
                default_cache_dir() / "compiled" if cache_dir is None else Path(cache_dir).expanduser()
            )
        set_xla_flags()
        self.model_config = read_config(checkpoint.config)
        devices = choose_devices(jax.devices(), config.tensor_parallel_size)
        self.platform = devices[0].platform
        self.device_kind = devices[0].device_kind
        # A configuration that cannot work is told before weights are read.
        limits = resolve(config, self.model_config, platform=self.platform, num_pages=config.num_pages or 1)
        self.model_config = self.model_config.served(limits.max_model_len, limits.ring_pages > 0)
        self._program = ModelProgram(
            self.model_config,
            config.dtype,
            devices,
            by_expert=config.enable_expert_parallel,
            kv_cache_dtype=config.kv_cache_dtype,
            quantization=chosen_quantization(config.quantization, checkpoint),
        )
        self.dtype = self._program.dtype
        self._replicated = self._program.replicated
        wanted = self._program.wanted
        arrays = (
            dummy(wanted, config.seed)
            if config.load_format == "dummy"
            else load(self._program.renamed(checkpoint), wanted, ignore=self._program.ignored_tensors)
        )
        self.weight_bytes = sum(array.nbytes for array in jax.tree.leaves(arrays))
        self.weights = nested(arrays)
        num_pages = config.num_pages or self._num_pages_that_fit(config, devices)
        self.limits = resolve(config, self.model_config, platform=self.platform, num_pages=num_pages)
        self._check_pool()
        self._cache = self._empty_cache()
        self._no_adjustments = {
            size: self._put(no_adjustments(size)) for size in {bucket.num_seqs for bucket in buckets(self.limits)}
        }
        self._no_targets = {
            size: self._put(np.full(size, -1, np.int32))
            for size in {bucket.num_tokens for bucket in buckets(self.limits)}
        }
        self._no_constraints = {
            size: self._put(unconstrained(size, self.model_config.vocab_size)) for size in self._no_adjustments
        }
        self._steps, self._samplers = self._compile()
        self._page_store: PageStore | None = None
        if config.swap_space_gib:
            self._page_store = PageStore(self._program.cache_shapes(self.limits), num_pages, self._put)
        if self.platform != "cpu":
            self.warm_up()
        if self._page_store is not None or config.policy == "slo":
            own = len(self._program.mesh.local_devices)  # each keeps its part of a page in this host's memory
            page_bytes = self._program.page_bytes(self.limits.page_size) * own
            self.limits = measure(config, self.limits, page_bytes, self.dispatch, self.copy_pages)

    def dispatch(self, batch: Batch) -> StepHandle:
        """Enqueues a step and returns at once."""
        layout, compiled = self._steps[batch.bucket]
        targets = batch.prompt_targets
        # A deferred step does not look at what its sampling is given later.
        self._cache, output = compiled(
            self.weights,
            self._cache,
            self._put(batch.packed),
            self._adjustments(batch._replace(adjustments=None) if batch.deferred else batch),
            self._no_targets[batch.bucket.num_tokens] if targets is None else self._put(targets),
            self._constraints(batch._replace(constraints=None) if batch.deferred else batch),
        )
        _, features = layout.unpack(batch.packed)["scalars"]
        return StepHandle(output, Feature(int(features)))

    def sample(self, handle: StepHandle, batch: Batch, mask: np.ndarray) -> None:
        """Enqueues the sampling of a deferred step, the last one dispatched, and returns at once.

        Args:
            mask: [B, ceil(V / 32)] of the rows' grammars; see grammar.GrammarStates.masks.
        """
        layout, compiled = self._samplers[batch.bucket.num_seqs]
        packed = batch.packed[batch.bucket.num_tokens :].copy()
        layout.unpack(packed)["scalars"][1] ^= Feature.DEFERRED
        layout.unpack(packed)["scalars"][1] |= Feature.MASK
        bans, allowed = batch.constraints or (None, None)
        constraints = Constraints(bans, mask if allowed is None else mask & allowed)
        last_tokens, sampled = compiled(
            self._cache.token_ids,
            self._cache.last_tokens,
            self._put(packed),
            handle.logits,
            self._adjustments(batch),
            self._constraints(batch._replace(constraints=constraints)),
        )
        self._cache = dataclasses.replace(self._cache, last_tokens=last_tokens)
        handle.set_sampled(sampled)

    def _adjustments(self, batch: Batch):
        given = batch.adjustments
        return self._no_adjustments[batch.bucket.num_seqs] if given is None else self._put(given)

    def _constraints(self, batch: Batch) -> Constraints:
        nothing = self._no_constraints[batch.bucket.num_seqs]
        given = batch.constraints or Constraints(None, None)
        return Constraints(*(n if g is None else self._put(g) for n, g in zip(nothing, given, strict=True)))

    def copy_pages(self, copies: Copies) -> None:
        """Enqueues a schedule's copies between device and host memory, and returns at once."""
        assert self._page_store is not None, "pages can be swapped only where there is swap space"
        self._cache = self._page_store.copy(self._cache, copies)

    def warm_up(self) -> None:
        """Runs every step once without rows. The first launch of a CUDA graph builds it, which takes as long as a dozen
        steps; no request should wait for that."""
        for bucket, (layout, _) in self._steps.items():
            packed = np.zeros(layout.size, np.int32)
            layout.unpack(packed)["slots"][:] = self.limits.max_num_seqs
            self.dispatch(Batch(bucket, packed, None, None)).result()

    def _put(self, arrays):
        if self._replicated.is_fully_addressable:
            return jax.device_put(arrays, self._replicated)
        # Like device_put, but without asking the other processes of the group whether they have the same.
        place = functools.partial(jax.make_array_from_callback, sharding=self._replicated)
        return jax.tree.map(lambda array: place(array.shape, data_callback=lambda index: array[index]), arrays)

    def _empty_cache(self) -> KVCache:
        shapes = self._program.cache_shapes(self.limits)
        make = functools.partial(jax.tree.map, lambda shape: jnp.zeros(shape.shape, shape.dtype))
        return jax.jit(lambda: make(shapes), out_shardings=jax.tree.map(lambda shape: shape.sharding, shapes))()

    def _num_pages_that_fit(self, config: EngineConfig, devices: list[Any]) -> int:
        """As many pages as free memory holds, but no more than the sequences could ever use."""
        limits = resolve(config, self.model_config, platform=self.platform, num_pages=1)
        useful = limits.max_num_seqs * limits.max_pages_per_seq
        if self.platform == "cpu":
            available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            free = min(available // 4, _MAX_CPU_POOL_BYTES) // len(devices)
        else:
            own = [device for device in devices if device.process_index == jax.process_index()]
            free = min(_free_bytes(device, config.gpu_memory_utilization) for device in own)
            free -= self._activation_bytes(limits)
        free -= self._program.slot_bytes(limits)
        size = self._program.page_bytes(limits.page_size)
        if free < size:
            raise ConfigError(
                f"no memory is left for the KV pool: a page takes {size} bytes, {free} are free; "
                "raise gpu_memory_utilization, or lower max_num_batched_tokens or max_num_seqs"
            )
        return least(min(useful, free // size))

    def _activation_bytes(self, limits: Limits) -> int:
        """Temporary memory of the largest step, as the compiler reports it for a pool of one sequence."""
        small = dataclasses.replace(limits, num_pages=limits.max_pages_per_seq)
        bucket = max(buckets(limits), key=lambda bucket: bucket.num_tokens)
        analysis = self._build({bucket: self._program.step(bucket, small)}, "bucket")[bucket][1].memory_analysis()
        assert analysis is not None, "the compiler reports no memory use"
        return analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes

    def _check_pool(self) -> None:
        limits = self.limits
        if limits.num_pages * limits.page_size < limits.max_model_len:
            raise ConfigError(
                f"the pool's {limits.num_pages} pages of {limits.page_size} tokens do not hold one sequence of "
                f"max_model_len {limits.max_model_len}; lower max_model_len or give the pool more memory"
            )

    def _compile(self) -> tuple[dict[Bucket, _Compiled], dict[int, _Compiled]]:
        """The step of each bucket; the sampling of deferred steps for each number of sequences."""
        started = time.monotonic()
        steps = self._build({b: self._program.step(b, self.limits) for b in buckets(self.limits)}, "bucket")
        # The logits are taken as a step leaves them on the device.
        logits = {bucket.num_seqs: step.output_shardings[1].logits for bucket, (_, step) in steps.items()}
        samplers = {size: self._program.sampler(size, self.limits, sharding) for size, sharding in logits.items()}
        built = self._build(samplers, "sampler")
        _log.info("compiled %d buckets in %.1f s", len(steps), time.monotonic() - started)
        return steps, built

    def _build[Key](self, programs: dict[Key, tuple[BatchLayout, Program]], unit: str) -> dict[Key, _Compiled]:
        built = build({key: program for key, (_, program) in programs.items()}, self.platform, unit)
        return {key: (layout, built[key]) for key, (layout, _) in programs.items()}


def _copy_to_host(arrays: Any) -> None:
    for array in jax.tree.leaves(arrays):
        array.copy_to_host_async()


def _free_bytes(device: Any, utilization: float) -> int:
    stats = device.memory_stats() or {}
    return int(stats.get("bytes_limit", 0) * utilization) - stats.get("bytes_in_use", 0)


def count_compilations(callback) -> None:
    """Calls `callback` for every program that XLA compiles in this process from now on."""

    def on_event(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            callback()

    jax.monitoring.register_event_duration_secs_listener(on_event)


def _use_compilation_cache(folder: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
