"""From a configuration to a running engine: checkpoint, weights, compiled steps, tokenizer, and what is said of it."""

import gc
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from checkpoints.formats import Checkpoint, open_checkpoint
from checkpoints.tokenizer_files import TokenizerFiles
from jax_engine import sampling_defaults
from jax_engine.config import EngineConfig
from jax_engine.engine import Engine
from jax_engine.errors import ConfigError
from jax_engine.group import Follower, LeadingRunner, join
from jax_engine.model_runner import ModelRunner, count_compilations
from jax_engine.models.shapes import NAMED_SHAPES
from jax_engine.request_queue import RequestQueue
from jax_engine.step_log import Header, StepLog
from jax_engine.tokenizer import Tokenizer, load_tokenizer

_log = logging.getLogger(__name__)


def start_engines(config: EngineConfig, tokenizer: Tokenizer | None = None) -> list[Engine]:
    """Builds an engine for each replica; blocks until every step is compiled.

    In a process that follows another, blocks until that one ends, and then ends this one too.

    Args:
        tokenizer: in place of the checkpoint's own.

    Raises:
        SystemExit: in a process that follows, at the end.
        ConfigError: the configuration or the model cannot be run.
        CheckpointError: there is no such model, or it is incomplete or damaged.
    """
    started = time.monotonic()
    group = join(config) if config.num_processes > 1 else None
    checkpoint = open_model(config)
    first = ModelRunner(config, checkpoint)
    if isinstance(group, Follower):
        _log.info("process %d follows", config.process_id)
        group.run(first)
        raise SystemExit(0)
    _describe(config, first)
    runners = [first, *_other_runners(config, checkpoint, first.limits.num_pages)]
    tokenizer, queue = tokenizer or load_tokenizer(checkpoint), RequestQueue(config)
    defaults = sampling_defaults.read(checkpoint.generation_config) if config.generation_config == "auto" else None
    engines = [
        Engine(
            runner if group is None else LeadingRunner(runner, group),
            tokenizer,
            vocab_size=runner.model_config.vocab_size,
            eos_token_ids=checkpoint.eos_token_ids or (tokenizer.eos_token_ids if tokenizer else ()),
            config=config,
            step_log=_step_log(config, runner, number),
            sampling_defaults=defaults,
            queue=queue,
        )
        for number, runner in enumerate(runners)
    ]
    count_compilations(engines[0].metrics.add_compilation)
    # What has been made by now lives as long as the process; without this, each full collection walks all of it.
    gc.collect()
    gc.freeze()
    _log.info("engine ready in %.1f s", time.monotonic() - started)
    return engines


def _other_runners(config: EngineConfig, checkpoint: Checkpoint, num_pages: int) -> list[ModelRunner]:
    """The replicas after the first, all at the same time.

    Of as many pages, so that their steps are those that the first has left in the cache of compiled ones.
    """
    others = range(1, config.data_parallel_size)
    if not others:
        return []
    alike = replace(config, num_pages=num_pages)
    with ThreadPoolExecutor(len(others)) as threads:
        return list(threads.map(lambda number: ModelRunner(alike, checkpoint, number), others))


def _step_log(config: EngineConfig, runner: ModelRunner, number: int) -> StepLog:
    path = config.step_log
    if path is not None and config.data_parallel_size > 1:  # a file for each replica
        path = str(Path(path).with_suffix(f".{number}{Path(path).suffix}"))
    return StepLog(header=log_header(config, runner), path=path, max_bytes=config.step_log_max_mib << 20)


def _describe(config: EngineConfig, runner: ModelRunner) -> None:
    limits = runner.limits
    tokens = limits.tokens_in(limits.num_pages)
    _log.info(
        "%d replica(s) of %s on %s (%s), %s, weights %.2f GiB",
        config.data_parallel_size,
        config.model,
        runner.device_kind,
        runner.platform,
        runner.dtype.name,
        runner.weight_bytes / 2**30,
    )
    _log.info(
        "KV pool of each: %d pages of %d tokens = %d tokens, %.1f sequences of the full %d",
        limits.num_pages,
        limits.page_size,
        tokens,
        tokens / limits.max_model_len,
        limits.max_model_len,
    )


def log_header(config: EngineConfig, runner: ModelRunner) -> Header:
    """What a step log says first about an engine."""
    return Header(
        version=version("jax-engine"),
        platform=runner.platform,
        device=runner.device_kind,
        vocab_size=runner.model_config.vocab_size,
        max_position_embeddings=runner.model_config.max_position_embeddings,
        started=time.time(),
        config=config,
        limits=runner.limits,
    )


def open_model(config: EngineConfig) -> Checkpoint:
    """The checkpoint that `config.model` names, or a named shape without weights.

    Raises:
        ConfigError, CheckpointError: there is none.
    """
    if config.model not in NAMED_SHAPES:
        return open_checkpoint(config.model, tokenizer=config.tokenizer, weights=config.load_format != "dummy")
    if config.load_format != "dummy":
        raise ConfigError(f"{config.model} is a shape without weights; run it with load_format=dummy")
    shape = NAMED_SHAPES[config.model]
    path = Path(config.model)
    return Checkpoint(path, "safetensors", shape, {}, {}, TokenizerFiles(path, None, {}))
