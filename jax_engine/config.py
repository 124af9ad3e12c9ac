"""EngineConfig: what the operator chooses. Limits: what follows from it and from the model.

Everything is frozen and derived once, at start; nothing is written later. Nothing here touches a device.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import msgspec

from jax_engine.errors import ConfigError
from jax_engine.model_config import ModelConfig
from jax_engine.page_groups import PageGroups

SCHEDULING_MODES = ("static", "sync", "async")
SCHEDULING_POLICIES = ("fcfs", "priority", "fair", "slo")
PREEMPTION_MODES = ("auto", "recompute", "swap")
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("auto", "int8", "fp8")
KV_CACHE_DTYPES = ("auto", "fp8", "int8")
LOAD_FORMATS = ("auto", "dummy")
GENERATION_CONFIGS = ("auto", "engine")


def _option(default: Any, help: str) -> Any:
    """A config field whose help text the command line shows."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The operator's choices. A value of None means: derived from model and device.

    Raises:
        ConfigError: a value has the wrong type or is out of range.
    """

    model: str = _option(
        "smollm2-135m-instruct",
        "Known model name, folder (config.json + safetensors, or Orbax), .gguf file, named shape, or Hugging Face id.",
    )
    tokenizer: str | None = _option(None, "Folder or file of the tokenizer, when it is not with the model.")
    dtype: str = _option(
        "auto", "Of weights, activations and KV: auto (float32 on CPU, else bfloat16), float32, bfloat16, float16."
    )
    quantization: str = _option(
        "auto", "Weights in 8 bits, scaled by output: int8 or fp8. auto: as the checkpoint has them."
    )
    kv_cache_dtype: str = _option("auto", "Of keys and values: auto: as dtype. fp8, int8: twice the pages.")
    load_format: str = _option("auto", "auto: read the checkpoint. dummy: random weights for the model's config.")
    generation_config: str = _option(
        "auto", "Sampling of requests that do not say: auto: as the model's generation_config. engine: unchanged."
    )
    tensor_parallel_size: int = _option(1, "Devices that hold the model between them.")
    data_parallel_size: int = _option(1, "Replicas of the model, each on as many devices, behind one queue.")
    enable_expert_parallel: bool = _option(
        False, "Keep each expert of a mixture whole on one of these devices, rather than a part of it on each."
    )
    num_processes: int = _option(1, "Processes, each with devices of its own, that hold the model between them.")
    process_id: int = _option(0, "This process's number among them; 0 serves, the others follow it.")
    coordinator_address: str | None = _option(None, "host:port of process 0, where they meet; uses the next port too.")
    max_model_len: int | None = _option(
        None, "Most tokens of prompt and output together. Default: the model's, capped."
    )
    max_num_seqs: int | None = _option(None, "Most sequences in one step. Default: 32 on CPU, else 256.")
    max_num_batched_tokens: int | None = _option(None, "Token budget of one step. Default: 512 on CPU, else 8192.")
    page_size: int | None = _option(None, "Tokens in one KV page; a power of two. Default: 16 on a CPU, else 64.")
    num_pages: int | None = _option(
        None, "KV pages of each replica. Default: as many as fit into free memory; on a CPU 1 to 4 GiB of them."
    )
    gpu_memory_utilization: float = _option(0.9, "Share of the device's memory that weights, pool and steps may use.")
    scheduling: str = _option(
        "async", "static: whole batches. sync: join and leave every step. async: sync, run ahead."
    )
    policy: str = _option(
        "fcfs", "Who is served first: fcfs, priority (lower first, with ageing), fair (among users), slo (least slack)."
    )
    priority_ageing_s: float = _option(30.0, "policy=priority: seconds of waiting that are worth one level.")
    user_weights: tuple[str, ...] = _option((), "policy=fair: shares of users as name=weight; others have 1.")
    slo_classes: tuple[str, ...] = _option(
        ("default:1000:100",), "policy=slo: name:ttft_ms:itl_ms of each class; the first serves requests without one."
    )
    max_inflight_steps: int = _option(2, "Steps dispatched but not read back, in async scheduling.")
    max_queued_requests: int = _option(10_000, "Most requests of a server that wait for a slot; one more is refused.")
    max_unread_outputs: int = _option(4096, "Outputs that a reader may leave unread before its request is aborted.")
    max_queued_tokens: int | None = _option(None, "Most prompt tokens of requests that wait; more are refused.")
    queue_timeout_s: float | None = _option(None, "Requests of a server that wait longer for a slot are refused.")
    max_decode_gap_ms: float | None = _option(
        None, "Longest time between two tokens of a stream while prompts are prefilled. Default: no bound."
    )
    max_concurrent_prefills: int | None = _option(None, "Most sequences whose prompts are in work. Default: no bound.")
    prefill_token_budget: int | None = _option(None, "Most prompt tokens of one step. Default: the token budget.")
    fill_buckets: bool = _option(True, "Cut a prompt where it fills a compiled size, rather than pad the next.")
    enable_prefix_caching: bool = _option(True, "Use the KV of equal beginnings again.")
    swap_space_gib: float = _option(0.0, "Host memory for the KV of preempted sequences; 0: compute it again.")
    preemption_mode: str = _option("auto", "auto: whichever way back is cheaper. recompute or swap: always that one.")
    swap_gib_per_s: float | None = _option(None, "Speed of copies to host memory. Default: measured at start.")
    prefill_tokens_per_s: float | None = _option(None, "Prompt tokens computed in a second. Default: measured.")
    deterministic: bool = _option(
        False, "One compiled size for all steps: a request's output never depends on what else runs."
    )
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
        None, "Folder of lowered and compiled steps, kept between starts. Default: in the user's cache. Empty: none."
    )

    def __post_init__(self) -> None:
        self._check_types()
        self._check_choice("scheduling", SCHEDULING_MODES)
        self._check_choice("policy", SCHEDULING_POLICIES)
        self._check_choice("preemption_mode", PREEMPTION_MODES)
        self._check_choice("dtype", DTYPES)
        self._check_choice("quantization", QUANTIZATIONS)
        self._check_choice("kv_cache_dtype", KV_CACHE_DTYPES)
        self._check_choice("load_format", LOAD_FORMATS)
        self._check_choice("generation_config", GENERATION_CONFIGS)
        for name in (
            "tensor_parallel_size",
            "data_parallel_size",
            "num_processes",
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "num_pages",
            "max_inflight_steps",
            "max_queued_requests",
            "step_log_max_mib",
            "max_unread_outputs",
            "max_queued_tokens",
            "max_concurrent_prefills",
            "prefill_token_budget",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        self._check_scheduling()
        if self.page_size is not None and (self.page_size < 1 or self.page_size & (self.page_size - 1)):
            raise ConfigError(f"page_size must be a power of two, got {self.page_size}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}")
        self._check_group()
        for name in ("token_buckets", "decode_buckets"):
            value = getattr(self, name)
            if value is not None and (any(size < 1 for size in value) or list(value) != sorted(set(value))):
                raise ConfigError(f"{name} must be increasing positive sizes, got {value}")

    def _check_types(self) -> None:
        """Takes lists for tuples, and paths for texts."""
        for option in fields(self):
            value = getattr(self, option.name)
            try:
                value = msgspec.convert(os.fspath(value) if isinstance(value, os.PathLike) else value, option.type)
            except msgspec.ValidationError:
                kind = option.type.__name__ if isinstance(option.type, type) else option.type
                raise ConfigError(f"{option.name} must be of type {kind}, got {value!r}") from None
            object.__setattr__(self, option.name, value)

    def _check_scheduling(self) -> None:
        for name in (
            "priority_ageing_s",
            "queue_timeout_s",
            "max_decode_gap_ms",
            "swap_gib_per_s",
            "prefill_tokens_per_s",
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} must be above 0, got {value}")
        if not 0 <= self.swap_space_gib < math.inf:
            raise ConfigError(f"swap_space_gib must be at least 0, got {self.swap_space_gib}")
        if self.preemption_mode == "swap" and not self.swap_space_gib:
            raise ConfigError("preemption_mode swap needs swap_space_gib above 0")
        if self.deterministic and (self.decode_buckets or len(self.token_buckets or (0,)) > 1):
            raise ConfigError("deterministic has one bucket: give no decode_buckets and at most one of token_buckets")
        _slo_classes(self.slo_classes)
        _user_weights(self.user_weights)

    def _check_group(self) -> None:
        if not 0 <= self.process_id < self.num_processes:
            raise ConfigError(f"process_id must be in [0, num_processes = {self.num_processes}), got {self.process_id}")
        host, _, port = (self.coordinator_address or "").rpartition(":")
        if self.num_processes > 1 and not (host and port.isdecimal() and 0 < int(port) < 65535):
            raise ConfigError(
                f"num_processes {self.num_processes} needs coordinator_address=host:port of process 0; "
                f"got {self.coordinator_address!r}"
            )
        if self.num_processes > 1 and self.data_parallel_size > 1:
            raise ConfigError(
                f"data_parallel_size {self.data_parallel_size} is for one process, which has all replicas; "
                f"num_processes is {self.num_processes}: start a group for each replica, with a proxy before them"
            )

    def _check_choice(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise ConfigError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")

    def non_defaults(self) -> dict[str, Any]:
        """The fields whose values differ from their defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The sizes the scheduler and the batches live in, and the constants it decides by; all concrete.

    Attributes:
        num_swap_pages: pages that the host's swap space holds. swap_page_seconds: time to copy one page, one way.
        token_seconds: time to compute one prompt token.
        page_groups: which layers share a page.
        user_weights: user -> share under the fair policy. slo_classes: name -> (ttft, itl), in seconds.
    """

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int
    num_pages: int
    scheduling: str
    max_inflight_steps: int
    token_buckets: tuple[int, ...]
    decode_buckets: tuple[int, ...]
    enable_prefix_caching: bool = True
    fill_buckets: bool = True
    max_decode_gap_s: float | None = None
    max_concurrent_prefills: int | None = None
    prefill_token_budget: int | None = None
    preemption_mode: str = "auto"
    num_swap_pages: int = 0
    swap_page_seconds: float = 0.0
    token_seconds: float = 0.0
    priority_ageing_s: float = 30.0
    user_weights: Mapping[str, float] = field(default_factory=dict)
    slo_classes: Mapping[str, tuple[float, float]] = field(default_factory=lambda: {"default": (1.0, 0.1)})
    page_groups: PageGroups = field(default_factory=PageGroups)

    @property
    def one_way(self) -> bool:
        """Without decode buckets every step has one shape, and every token is computed in one way: single ones as
        longer rows are, so that a token's bits do not depend on how its sequence was cut into steps."""
        return not self.decode_buckets

    @property
    def max_pages_per_seq(self) -> int:
        """Width of a page table row, of each group of layers."""
        return math.ceil(self.max_model_len / self.page_size)

    @property
    def full_pages(self) -> int:
        """Most pages that a sequence of max_model_len tokens has at once, in all groups."""
        return self.page_groups.most_pages(self.max_model_len, self.page_size, self.max_num_batched_tokens)

    def tokens_in(self, num_pages: int) -> int:
        """Tokens of as many sequences of max_model_len as so many pages hold."""
        return num_pages * self.max_pages_per_seq * self.page_size // self.full_pages

    def most_tokens(self, num_pages: int) -> int:
        """Tokens of the longest sequence that so many pages hold, alone."""
        return self.page_groups.most_tokens(num_pages, self.page_size, self.max_num_batched_tokens)


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
    usual_budget = (64 if on_cpu else 1024) if config.deterministic else (512 if on_cpu else 8192)
    budget = config.max_num_batched_tokens or max(max_num_seqs, usual_budget)
    if config.max_num_batched_tokens is None and config.token_buckets:
        budget = config.token_buckets[-1]
    if budget < max_num_seqs:
        raise ConfigError(f"max_num_batched_tokens {budget} is less than max_num_seqs {max_num_seqs}")
    token_buckets = config.token_buckets or _token_buckets(config, budget, platform)
    if token_buckets[-1] < budget:
        raise ConfigError(f"the largest of token_buckets {token_buckets} is below the token budget {budget}")
    decode_buckets = config.decode_buckets
    if decode_buckets is None:
        decode_buckets = () if config.deterministic else _decode_buckets(max_num_seqs, platform)
    if decode_buckets and decode_buckets[-1] < max_num_seqs:
        raise ConfigError(f"the largest of decode_buckets {decode_buckets} is below max_num_seqs {max_num_seqs}")
    depth = config.max_inflight_steps if config.scheduling == "async" else 1
    max_model_len = config.max_model_len or min(model.max_position_embeddings, DEFAULT_MAX_MODEL_LEN)
    page_size = config.page_size or (16 if on_cpu else 64)
    return Limits(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        page_size=page_size,
        num_pages=config.num_pages or num_pages,
        scheduling=config.scheduling,
        max_inflight_steps=depth,
        token_buckets=token_buckets,
        decode_buckets=decode_buckets,
        page_groups=model.served(max_model_len).page_groups,
        **_scheduling_limits(config) | _without_state_in_pages(config, model),
    )


def _decode_buckets(max_num_seqs: int, platform: str) -> tuple[int, ...]:
    """The sizes compiled for steps of one token per sequence, where the operator names none."""
    if platform != "cpu" or max_num_seqs == 1:
        return _doublings(1, max_num_seqs)
    # There a product with 2 or 4 rows takes what one with 8 takes, and each size takes seconds to compile.
    return (1, *_doublings(min(8, max_num_seqs), max_num_seqs))


def _token_buckets(config: EngineConfig, budget: int, platform: str) -> tuple[int, ...]:
    """The sizes compiled for steps with prompt tokens, where the operator names none."""
    if config.deterministic:
        return (budget,)
    if platform == "cpu":
        # Each size takes seconds to compile there, and a prompt of 100 tokens is as quick in two steps of 64.
        return tuple(sorted({min(size, budget) for size in (64, 256, budget)} | set(_doublings(512, budget)[:-1])))
    sizes = _doublings(min(128, budget), budget)
    if platform != "gpu":
        return sizes
    # A step of 256 decodes and a prompt of 100 tokens is common, and 512 tokens take a quarter more time than 384.
    between = (size + size // 2 for size in sizes)
    return tuple(sorted({*sizes, *(size for size in between if size < budget)}))


def _scheduling_limits(config: EngineConfig) -> dict[str, Any]:
    """The fields of Limits that follow from the configuration alone."""
    return {
        "enable_prefix_caching": config.enable_prefix_caching,
        "fill_buckets": config.fill_buckets,
        "max_decode_gap_s": config.max_decode_gap_ms and config.max_decode_gap_ms / 1e3,
        "max_concurrent_prefills": config.max_concurrent_prefills,
        "prefill_token_budget": config.prefill_token_budget,
        "preemption_mode": config.preemption_mode,
        "token_seconds": 1 / config.prefill_tokens_per_s if config.prefill_tokens_per_s else 0.0,
        "priority_ageing_s": config.priority_ageing_s,
        "user_weights": _user_weights(config.user_weights),
        "slo_classes": _slo_classes(config.slo_classes),
    }


def _without_state_in_pages(config: EngineConfig, model: ModelConfig) -> dict[str, Any]:
    """What a model forbids whose pages are not all that it knows of a sequence."""
    if not model.num_recurrent_layers:
        return {}
    if config.swap_space_gib:
        raise ConfigError(
            "swap_space_gib must be 0: layers of the model keep what they need by slot, not in pages to be swapped"
        )
    return {"enable_prefix_caching": False}


def _slo_classes(texts: tuple[str, ...]) -> dict[str, tuple[float, float]]:
    """`name:ttft_ms:itl_ms` -> {name: (ttft, itl)} in seconds."""
    classes = {}
    for text in texts:
        name, *numbers = text.split(":")
        try:
            ttft, itl = (float(number) / 1e3 for number in numbers)
        except ValueError:
            ttft = itl = 0.0
        if not name or name in classes or not (0 < ttft < math.inf and 0 < itl < math.inf):
            raise ConfigError(f"slo_classes: each must be name:ttft_ms:itl_ms, names once, times above 0; got {text!r}")
        classes[name] = (ttft, itl)
    if not classes:
        raise ConfigError("slo_classes must name at least one class")
    return classes


def _user_weights(texts: tuple[str, ...]) -> dict[str, float]:
    """`name=weight` -> {name: weight}."""
    weights: dict[str, float] = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not name or name in weights or not 0 < weight < math.inf:
            raise ConfigError(f"user_weights: each must be name=weight, names once, weights above 0; got {text!r}")
        weights[name] = weight
    return weights


def _doublings(start: int, end: int) -> tuple[int, ...]:
    """start, 2 start, 4 start ... up to and with `end`."""
    sizes = []
    while start < end:
        sizes.append(start)
        start *= 2
    return (*sizes, end)
