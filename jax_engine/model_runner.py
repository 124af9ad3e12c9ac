"""ModelRunner: the device side of the engine. Loads weights, makes the cache, compiles every bucket, runs steps.

The engine calls `dispatch`, which returns at once, and later `StepHandle.result`, which waits. This file and
checkpoints/loader.py are the only ones that put data on a device; `StepHandle.result` is the only place that reads it.
"""

import dataclasses
import functools
import logging
import os
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.monitoring
import numpy as np

from checkpoints.formats import Checkpoint
from checkpoints.known_models import default_cache_dir
from checkpoints.loader import dummy, load
from jax_engine.batch import Batch, BatchLayout, StepResult, no_adjustments
from jax_engine.buckets import Bucket, buckets
from jax_engine.compilation import Program, build, step_bytes
from jax_engine.config import EngineConfig, Limits, resolve
from jax_engine.constraints import Constraints, unconstrained
from jax_engine.costs import measure
from jax_engine.errors import ConfigError
from jax_engine.features import SAMPLING, Feature
from jax_engine.free_places import leave_free
from jax_engine.group import least
from jax_engine.kept_programs import KeptPrograms
from jax_engine.kv_cache import empty_cache
from jax_engine.kv_scales import find_scales
from jax_engine.models import read_config
from jax_engine.page_store import PageStore
from jax_engine.peer_memory import open_peer_memory
from jax_engine.program import PROMPT_BLOCK, ModelProgram, Part, chosen_quantization, largest_parts, nested
from jax_engine.sampler import NUM_TOP_LOGPROBS
from jax_engine.schedule import Copies
from jax_engine.sharding import choose_devices
from jax_engine.step import StepOutput
from jax_engine.xla_flags import set_xla_flags

_log = logging.getLogger(__name__)

#: KV pools on a CPU share its memory with everything else that runs there, and take all of theirs at start.
_MAX_CPU_POOL_BYTES = 4 << 30
#: Below this a smaller pool saves too little to make a sequence wait for it.
_MIN_CPU_POOL_BYTES = 1 << 30


class StepHandle:
    """A dispatched step. Its result is on its way to the host from the moment it exists.

    Attributes:
        output: of the model, until the step is sampled; then None.
    """

    def __init__(self, output: StepOutput, features: Feature):
        self.output: StepOutput | None = output
        self.features = features
        self._prompt: _PromptScores | None = None
        self._hidden = None
        if Feature.HIDDEN in features:
            self._hidden = output.last_hidden
            _copy_to_host(self._hidden)

    def set_prompt(self, scores: "_PromptScores") -> None:
        """Takes in the log-probabilities of prompt tokens."""
        self._prompt = scores
        _copy_to_host(scores.blocks)

    def set_sampled(self, tokens: jax.Array, logprobs: tuple[jax.Array, ...] | None) -> None:
        """Takes in what was sampled, once; what it was sampled from is given back."""
        self.output = None
        self._tokens = tokens
        self._logprobs = logprobs if Feature.LOGPROBS in self.features else None
        _copy_to_host((self._tokens, self._logprobs))

    def is_ready(self) -> bool:
        """Whether the device has finished what was dispatched of the step; does not wait."""
        last = self._tokens if self.output is None else self.output.logits
        return last.is_ready()  # pyright: ignore[reportAttributeAccessIssue]

    def result(self) -> StepResult:
        """Waits for the step and returns its result."""
        tokens, logprobs, hidden = jax.device_get((self._tokens, self._logprobs, self._hidden))
        prompt = None
        if self._prompt is not None:
            prompt = self._prompt.spread(jax.device_get(self._prompt.blocks))
        return StepResult(tokens.tolist(), logprobs, prompt, None if hidden is None else hidden.astype(np.float32))


class _PromptScores(NamedTuple):
    """Log-probabilities of some of a step's tokens.

    Attributes:
        size: tokens of the step. at: which of them are scored. blocks: what step.score gave for PROMPT_BLOCK of these
            at a time; the last is padded.
    """

    size: int
    at: np.ndarray
    blocks: list[tuple]

    def spread(self, blocks: list[tuple]) -> tuple[np.ndarray, ...]:
        """The values of all blocks, on the host, in the order of the step's tokens; 0 where none was asked for."""
        logprob, top = np.zeros(self.size, np.float32), (self.size, NUM_TOP_LOGPROBS)
        spread = logprob, np.zeros(self.size, np.int32), np.zeros(top, np.int32), np.zeros(top, np.float32)
        for number, block in enumerate(blocks):
            at = self.at[number * PROMPT_BLOCK :][:PROMPT_BLOCK]
            for target, values in zip(spread, block, strict=True):
                target[at] = values[: at.size]
        return spread


class ModelRunner:
    """A model on its device, with its cache and its compiled steps.

    Args:
        replica: which of config.data_parallel_size; each has devices of its own.

    Raises:
        ConfigError: the model or the configuration cannot be run.
        CheckpointError: the weights are incomplete or damaged.
    """

    def __init__(self, config: EngineConfig, checkpoint: Checkpoint, replica: int = 0):
        self._lower = Program.lower
        cache_dir = config.compilation_cache_dir
        if cache_dir != "":
            folder = default_cache_dir() / "compiled" if cache_dir is None else Path(cache_dir).expanduser()
            _use_compilation_cache(folder)
            self._lower = KeptPrograms(folder / "lowered").lower
        set_xla_flags()
        self.model_config = read_config(checkpoint.config)
        devices = choose_devices(jax.devices(), config.tensor_parallel_size, config.data_parallel_size)[replica]
        self.platform = devices[0].platform
        self.device_kind = devices[0].device_kind
        # A configuration that cannot work is told before weights are read.
        limits = resolve(config, self.model_config, platform=self.platform, num_pages=config.num_pages or 1)
        self.model_config = self.model_config.served(limits.max_model_len)
        self._quantization = chosen_quantization(config.quantization, checkpoint)
        self._program = ModelProgram(
            self.model_config,
            config.dtype,
            devices,
            by_expert=config.enable_expert_parallel,
            kv_cache_dtype=config.kv_cache_dtype,
            quantization=self._quantization,
        )
        self.dtype = self._program.dtype
        self._replicated = self._program.replicated
        wanted = self._program.wanted
        arrays = (
            dummy(wanted, config.seed)
            if config.load_format == "dummy"
            else load(self._program.renamed(checkpoint), wanted, ignore=self._program.ignored_tensors)
        )
        self._peer_memory = open_peer_memory(self._program.mesh)
        self.weight_bytes = sum(array.nbytes for array in jax.tree.leaves(arrays))
        self.weights = nested(arrays)
        num_pages = config.num_pages or self._num_pages_that_fit(config, devices)
        self.limits = resolve(config, self.model_config, platform=self.platform, num_pages=num_pages)
        self._check_pool()
        self._cache = empty_cache(self._program.cache_shapes(self.limits), self._peer_memory)
        if self._cache.kv_scales is not None:
            self._cache = dataclasses.replace(self._cache, kv_scales=self._find_kv_scales(config))
        self._no_adjustments = {
            size: self._put(no_adjustments(size)) for size in {bucket.num_seqs for bucket in buckets(self.limits)}
        }
        self._no_constraints = {
            size: self._put(unconstrained(size, self.model_config.vocab_size)) for size in self._no_adjustments
        }
        self._programs = self._compile()
        if self.platform == "gpu":
            self._between_places = leave_free(self._put)
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
        """Enqueues a step and returns at once. A structured one is left to `sample`, which must come next."""
        output: StepOutput
        self._cache, output = self._programs[Part("model", batch.bucket)](
            self.weights, self._cache, self._put(batch.packed)
        )
        handle = StepHandle(output, Feature(int(batch.packed[-1])))  # the last of BatchLayout's parts
        if batch.prompt_targets is not None:
            handle.set_prompt(self._score(output, batch.prompt_targets))
        if not batch.structured:
            self._sample(handle, batch)
        return handle

    def sample(self, handle: StepHandle, batch: Batch, mask: np.ndarray) -> None:
        """Enqueues the sampling of a structured step, the last one dispatched, and returns at once.

        Args:
            mask: [B, ceil(V / 32)] int32, the bits of the tokens that each row's grammar allows; see
                grammar.GrammarStates.end_masks.
        """
        bans, allowed = batch.constraints or (None, None)
        constraints = Constraints(bans, mask if allowed is None else mask & allowed)
        self._sample(handle, batch._replace(constraints=constraints))

    def _sample(self, handle: StepHandle, batch: Batch) -> None:
        """Enqueues the sampling of the last step dispatched."""
        output, cache = handle.output, self._cache
        assert output is not None, "a step is sampled once"
        bucket = Bucket(0, batch.bucket.num_seqs, False)
        if not handle.features & SAMPLING:
            choose = self._programs[Part("likeliest", bucket)]
            last_tokens, tokens = choose(cache.last_tokens, output.rows, output.logits)
            logprobs = None
        else:
            choose = self._programs[Part("sample", bucket)]
            changes = (self._adjustments(batch), self._constraints(batch))
            last_tokens, sampled = choose(cache.last_tokens, output.rows, output.logits, cache.token_ids, *changes)
            tokens, logprobs = sampled.tokens, tuple(sampled[1:])
        self._cache = dataclasses.replace(cache, last_tokens=last_tokens)
        handle.set_sampled(tokens, logprobs)

    def _score(self, output: StepOutput, targets: np.ndarray) -> _PromptScores:
        """Enqueues the log-probabilities of a step's prompt targets."""
        at = np.flatnonzero(targets >= 0).astype(np.int32)
        blocks = []
        for start in range(0, at.size, PROMPT_BLOCK):
            rows = np.zeros((2, PROMPT_BLOCK), np.int32)
            own = at[start : start + PROMPT_BLOCK]
            rows[:, : own.size] = own, targets[own]
            here, following = self._put(tuple(rows))
            pick = self._programs[Part("pick", Bucket(targets.size, 0, False))]
            score = self._programs[Part("score", Bucket(PROMPT_BLOCK, 0, False))]
            # In a bucket for decode only each token is its row's last.
            hidden = output.last_hidden if output.hidden is None else output.hidden
            blocks.append(score(self.weights, pick(hidden, here), following))
        return _PromptScores(targets.size, at, blocks)

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
        """Runs every program once without rows. The first launch of a CUDA graph builds it, which takes as long as a
        dozen steps; no request should wait for that."""
        for bucket in buckets(self.limits):
            layout = BatchLayout.of(bucket, self.limits)
            for features in (Feature.NONE, Feature.RANDOM | Feature.PROMPT_LOGPROBS):
                packed = np.zeros(layout.size, np.int32)
                parts = layout.unpack(packed)
                parts["slots"][:] = self.limits.max_num_seqs
                parts["scalars"][1] = features
                targets = np.full(bucket.num_tokens, -1, np.int32)
                targets[:1] = 0
                self.dispatch(Batch(bucket, packed, None, targets if features else None)).result()

    def _put(self, arrays):
        if self._replicated.is_fully_addressable:
            return jax.device_put(arrays, self._replicated)
        # Like device_put, but without asking the other processes of the group whether they have the same.
        place = functools.partial(jax.make_array_from_callback, sharding=self._replicated)
        return jax.tree.map(lambda array: place(array.shape, data_callback=lambda index: array[index]), arrays)

    def _find_kv_scales(self, config: EngineConfig) -> Any:
        program = ModelProgram(
            self.model_config,
            config.dtype,
            list(self._program.mesh.devices.flat),
            by_expert=config.enable_expert_parallel,
            quantization=self._quantization,
        )
        empty = functools.partial(empty_cache, peer_memory=self._peer_memory)
        return find_scales(program, self._program.kv_dtype, self.limits, self.weights, self._put, empty)

    def _num_pages_that_fit(self, config: EngineConfig, devices: list[Any]) -> int:
        """As many pages as free memory holds, but no more than sequences could ever use; on a CPU, are likely to."""
        limits = resolve(config, self.model_config, platform=self.platform, num_pages=1)
        useful = limits.max_num_seqs * limits.full_pages
        size = self._program.page_bytes(limits.page_size)
        if self.platform == "cpu":
            pools = len(devices) * config.data_parallel_size
            free = _cpu_pool_bytes() // pools
            # Few sequences are as long as they may be: with 32 of 8,192 tokens this is room for 1,365 of each.
            enough = max(useful // 6, limits.full_pages, _MIN_CPU_POOL_BYTES // pools // size)
            useful = min(useful, enough)
        else:
            own = [device for device in devices if device.process_index == jax.process_index()]
            free = min(_free_bytes(device, config.gpu_memory_utilization) for device in own)
            free -= self._activation_bytes(limits)
        free -= self._program.slot_bytes(limits)
        if free < size:
            raise ConfigError(
                f"no memory is left for the KV pool: a page takes {size} bytes, {free} are free; "
                "raise gpu_memory_utilization, or lower max_num_batched_tokens or max_num_seqs"
            )
        return least(min(useful, free // size))

    def _activation_bytes(self, limits: Limits) -> int:
        """Memory of the largest step beside its arguments, as the compiler reports it for a pool of one sequence."""
        small = dataclasses.replace(limits, num_pages=limits.full_pages)
        parts = largest_parts(limits)
        built = build({part: self._program.part(part, small) for part in parts}, "program", self._lower)
        return step_bytes(*(built[part] for part in parts))

    def _check_pool(self) -> None:
        limits = self.limits
        if limits.num_pages < limits.full_pages:
            raise ConfigError(
                f"the pool's {limits.num_pages} pages of {limits.page_size} tokens do not hold one sequence of "
                f"max_model_len {limits.max_model_len}, which takes {limits.full_pages}; lower max_model_len or give "
                "the pool more memory"
            )

    def _compile(self) -> dict[Part, jax.stages.Compiled]:
        """Every program that a step may need."""
        started = time.monotonic()
        programs = build(self._program.parts(self.limits), "program", self._lower)
        _log.info("compiled %d programs in %.1f s", len(programs), time.monotonic() - started)
        return programs


def _copy_to_host(arrays: Any) -> None:
    for array in jax.tree.leaves(arrays):
        array.copy_to_host_async()


def _cpu_pool_bytes() -> int:
    """A power of two: with pools of every size that free memory ever has, no start would find the programs that an
    earlier one has left in the cache."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    share = min(available // 4, _MAX_CPU_POOL_BYTES)
    return 1 << (share.bit_length() - 1)


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
    # Kept programs are read by the version that wrote them: no kernel has to be in an older form for another's sake.
    jax.config.update("jax_export_ignore_forward_compatibility", True)
    if folder.is_dir() and not os.access(folder, os.W_OK):  # jax would say so of every program
        _log.warning("%s cannot be written: programs that are not kept there are compiled at every start", folder)
        warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry")
