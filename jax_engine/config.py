"""EngineConfig: what the operator chooses. Limits: what follows from it and from the model.

Everything is frozen and derived once, at start; nothing is written later. Nothing here touches a device.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any

from jax_engine.errors import ConfigError
from jax_engine.model_config import ModelConfig

SCHEDULING_MODES = ("static", "sync", "async")
SCHEDULING_POLICIES = ("fcfs", "priority")
DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "dummy")


def _option(default: Any, help: str) -> Any:
    """A config field whose help text the command line shows."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The operator's choices. A value of None means: derived from model and device.

    Raises:
        ConfigError: a value is out of range.
    """

    model: str = _option(
        "smollm2-135m-instruct",
        "Known model name, folder (config.json + safetensors, or Orbax), .gguf file, named shape, or Hugging Face id.",
    )
    tokenizer: str | None = _option(None, "Folder or file of the tokenizer, when it is not with the model.")
    dtype: str = _option("auto", "Of weights, activations and KV: auto (float32 on CPU, else bfloat16), float32, ....")
    load_format: str = _option("auto", "auto: read the checkpoint. dummy: random weights for the model's config.")
    max_model_len: int | None = _option(
        None, "Most tokens of prompt and output together. Default: the model's, capped."
    )
    max_num_seqs: int | None = _option(None, "Most sequences in one step. Default: 32 on CPU, else 256.")
    max_num_batched_tokens: int | None = _option(None, "Token budget of one step. Default: 512 on CPU, else 8192.")
    page_size: int | None = _option(None, "Tokens in one KV page; a power of two. Default: 64 on a GPU, else 16.")
    num_pages: int | None = _option(None, "KV pages in the pool. Default: as many as fit into free memory.")
    gpu_memory_utilization: float = _option(0.9, "Share of the device's memory that weights, pool and steps may use.")
    scheduling: str = _option(
        "async", "static: whole batches. sync: join and leave every step. async: sync, run ahead."
    )
    policy: str = _option("fcfs", "Who is served first: fcfs, or priority (lower Request.priority first).")
    max_inflight_steps: int = _option(2, "Steps dispatched but not read back, in async scheduling.")
    max_queued_requests: int = _option(10_000, "Most unfinished requests of a server; one more is refused.")
    max_unread_outputs: int = _option(4096, "Outputs that a reader may leave unread before its request is aborted.")
    token_buckets: tuple[int, ...] | None = _option(None, "Compiled token counts of steps that hold prompt tokens.")
    decode_buckets: tuple[int, ...] | None = _option(
        None, "Compiled sequence counts of steps of one token per sequence. Empty: token_buckets serve these too."
    )
    seed: int = _option(0, "Of requests without a seed of their own, and of dummy weights.")
    step_log: str | None = _option(
        None, "File to write every decision of the scheduler and every step's times to. Holds prompts as token ids."
    )
    step_log_max_mib: int = _option(1024, "The step log ends before it grows beyond this many MiB.")
    compilation_cache_dir: str | None = _option(
        None, "Folder of compiled steps, kept between starts. Default: in the user's cache. Empty: none."
    )

    def __post_init__(self) -> None:
        self._check_choice("scheduling", SCHEDULING_MODES)
        self._check_choice("policy", SCHEDULING_POLICIES)
        self._check_choice("dtype", DTYPES)
        self._check_choice("load_format", LOAD_FORMATS)
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "num_pages",
            "max_inflight_steps",
            "max_queued_requests",
            "step_log_max_mib",
            "max_unread_outputs",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.page_size is not None and (self.page_size < 1 or self.page_size & (self.page_size - 1)):
            raise ConfigError(f"page_size must be a power of two, got {self.page_size}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}")
        for name in ("token_buckets", "decode_buckets"):
            value = getattr(self, name)
            if value is not None:
                value = tuple(int(size) for size in value)
                if any(size < 1 for size in value) or list(value) != sorted(set(value)):
                    raise ConfigError(f"{name} must be increasing positive sizes, got {value}")
                object.__setattr__(self, name, value)

    def _check_choice(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise ConfigError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")

    def non_defaults(self) -> dict[str, Any]:
        """The fields whose values differ from their defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The sizes the scheduler and the batches live in; all concrete."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int
    num_pages: int
    scheduling: str
    max_inflight_steps: int
    token_buckets: tuple[int, ...]
    decode_buckets: tuple[int, ...]

    @property
    def max_pages_per_seq(self) -> int:
        """Width of a page table row."""
        return math.ceil(self.max_model_len / self.page_size)


#: Longest context served by default; a longer one is asked for with max_model_len.
DEFAULT_MAX_MODEL_LEN = 8192


def resolve(config: EngineConfig, model: ModelConfig, *, platform: str, num_pages: int) -> Limits:
    """Fills in what the operator left open.

    Args:
        platform: `cpu`, `gpu` or `tpu`.
        num_pages: how many pages fit, where config.num_pages does not say.

    Raises:
        ConfigError: the choices contradict each other or the model.
    """
    on_cpu = platform == "cpu"
    if config.max_model_len is not None and config.max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len {config.max_model_len} is more than the model's {model.max_position_embeddings} positions"
        )
    max_num_seqs = config.max_num_seqs or (32 if on_cpu else 256)
    budget = config.max_num_batched_tokens or max(max_num_seqs, 512 if on_cpu else 8192)
    if config.max_num_batched_tokens is None and config.token_buckets:
        budget = config.token_buckets[-1]
    if budget < max_num_seqs:
        raise ConfigError(f"max_num_batched_tokens {budget} is less than max_num_seqs {max_num_seqs}")
    token_buckets = config.token_buckets or _doublings(min(64 if on_cpu else 128, budget), budget)
    if platform == "gpu" and not config.token_buckets:
        # A step of 256 decodes and a prompt of 100 tokens is common, and 512 tokens take a quarter more time than 384.
        between = (size + size // 2 for size in token_buckets)
        token_buckets = tuple(sorted({*token_buckets, *(size for size in between if size < budget)}))
    if token_buckets[-1] < budget:
        raise ConfigError(f"the largest of token_buckets {token_buckets} is below the token budget {budget}")
    decode_buckets = config.decode_buckets
    if decode_buckets is None:
        decode_buckets = _doublings(1, max_num_seqs)
    if decode_buckets and decode_buckets[-1] < max_num_seqs:
        raise ConfigError(f"the largest of decode_buckets {decode_buckets} is below max_num_seqs {max_num_seqs}")
    depth = config.max_inflight_steps if config.scheduling == "async" else 1
    return Limits(
        max_model_len=config.max_model_len or min(model.max_position_embeddings, DEFAULT_MAX_MODEL_LEN),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        page_size=config.page_size or (64 if platform == "gpu" else 16),
        num_pages=config.num_pages or num_pages,
        scheduling=config.scheduling,
        max_inflight_steps=depth,
        token_buckets=token_buckets,
        decode_buckets=decode_buckets,
    )


def _doublings(start: int, end: int) -> tuple[int, ...]:
    """start, 2 start, 4 start ... up to and with `end`."""
    sizes = []
    while start < end:
        sizes.append(start)
        start *= 2
    return (*sizes, end)
