"""A device that takes no time but says how long it would have taken, and the loop that serves requests on it.

The real engine, scheduler and batch builder run on it in virtual time, so that scheduling decisions can be compared on
hours of traffic in seconds, on any machine. Its step times are those of an 8-billion-parameter model of the Llama shape
in bfloat16 on one H100: 16 GB of weights at 3 TB/s, 16 GFLOP a token at 700 TFLOP/s, 128 KiB of KV a token at 2.7 TB/s,
and at 25 GB/s to host memory.
"""

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from jax_engine.batch import Batch, BatchLayout, StepResult
from jax_engine.config import EngineConfig, Limits, resolve
from jax_engine.engine import Engine
from jax_engine.model_config import ModelConfig
from jax_engine.request import RequestOutput
from jax_engine.sampling_params import RequestOutputKind, SamplingParams
from jax_engine.schedule import Schedule

VOCAB = 50_000
WEIGHTS_S = 16e9 / 3e12
TOKEN_S = 16e9 / 700e12
PAIR_S = 128 * 1024 / 2.7e12
PAGE_COPY_S = 16 * 128 * 1024 / 25e9
HOST_S = 0.3e-3
#: Relative spread of step times, log-normal.
JITTER = 0.03

MODEL = ModelConfig(
    architecture="none",
    vocab_size=VOCAB,
    hidden_size=1,
    intermediate_size=1,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=1,
    max_position_embeddings=2**20,
)


@dataclass
class Arrival:
    """A request of a trace. `prompt` may be made at the last moment, from what came before."""

    time: float
    prompt: Sequence[int] | Callable[[], Sequence[int]]
    num_output: int
    user: str | None = None
    slo_class: str | None = None
    done: Callable[[RequestOutput, float], None] | None = None


@dataclass
class Served:
    """What became of an arrival; times in seconds."""

    arrival: Arrival
    num_prompt: int
    num_cached: int = 0
    token_times: list[float] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        return self.token_times[0] - self.arrival.time

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.token_times, self.token_times[1:], strict=False)]


class _Handle:
    def __init__(self, device: "VirtualDevice", ends_at: float, num_seqs: int):
        self._device, self._ends_at, self._num_seqs = device, ends_at, num_seqs

    def is_ready(self) -> bool:
        return self._device.now >= self._ends_at

    def result(self) -> StepResult:
        self._device.now = max(self._device.now, self._ends_at)
        return StepResult([1] * self._num_seqs)


class VirtualDevice:
    """The engine's runner, and its clock."""

    def __init__(self, limits: Limits, seed: int = 0):
        self.limits = limits
        self.now = 0.0
        self.busy_until = 0.0
        self._chance = random.Random(seed)

    def dispatch(self, batch: Batch) -> _Handle:
        parts = BatchLayout(batch.bucket, self.limits.max_pages_per_seq).unpack(batch.packed)
        counts = parts["query_starts"][1:] - parts["query_starts"][:-1]
        keys = int((parts["starts"] + counts)[counts > 0].sum())
        # KV is read once for a row of queries that are computed together.
        seconds = max(WEIGHTS_S, batch.bucket.num_tokens * TOKEN_S) + keys * PAIR_S
        self.now += HOST_S
        self.busy_until = max(self.now, self.busy_until) + seconds * self._chance.lognormvariate(0, JITTER)
        return _Handle(self, self.busy_until, batch.bucket.num_seqs)

    def copy_pages(self, schedule: Schedule) -> None:
        pages = sum(len(copy.pages) for copy in (*schedule.swapped_out, *schedule.swapped_in))
        self.busy_until = max(self.now, self.busy_until) + pages * PAGE_COPY_S


def serve(arrivals: Sequence[Arrival], **options) -> tuple[list[Served], Engine]:
    """Serves a trace; `options` are EngineConfig's. Returns what became of it, and the engine with its counters."""
    config = EngineConfig(**({"max_model_len": 16384, "num_pages": 24_000} | options))
    limits = resolve(config, MODEL, platform="gpu", num_pages=1)
    if config.swap_space_gib:
        limits = replace(
            limits,
            num_swap_pages=int(config.swap_space_gib * 2**30 / (limits.page_size * 128 * 1024)),
            swap_page_seconds=PAGE_COPY_S,
            token_seconds=TOKEN_S,
        )
    device = VirtualDevice(limits)
    engine = Engine(device, None, vocab_size=VOCAB, eos_token_ids=(), config=config, clock=lambda: device.now)
    line = [(arrival.time, index, arrival) for index, arrival in enumerate(arrivals)]
    heapq.heapify(line)
    served: dict[str, Served] = {}
    while line or engine.has_work:
        if not engine.has_work:
            device.now = max(device.now, line[0][0])
        while line and line[0][0] <= device.now:
            _, index, arrival = heapq.heappop(line)
            prompt = arrival.prompt() if callable(arrival.prompt) else arrival.prompt
            params = SamplingParams(
                temperature=0.0, max_tokens=arrival.num_output, ignore_eos=True, output_kind=RequestOutputKind.DELTA
            )
            request = engine.make_request(str(index), prompt, params, user=arrival.user, slo_class=arrival.slo_class)
            engine.submit(request)
            served[str(index)] = Served(arrival, len(prompt))
        for output in engine.step():
            entry = served[output.request_id]
            entry.token_times += [device.now] * len(output.outputs[0].token_ids)
            entry.num_cached = output.num_cached_tokens
            if output.finished and entry.arrival.done is not None:
                entry.arrival.done(output, device.now)
    return list(served.values()), engine
