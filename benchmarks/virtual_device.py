"""Requests served in virtual time, on a device whose steps take what those of an 8-billion-parameter model would.

The real engine and scheduler run in the simulator of jax_engine/planning, so that scheduling decisions can be compared
on hours of traffic in seconds, on any machine. The step times are computed, not measured: the Llama shape in bfloat16
on one H100, with 16 GB of weights at 3 TB/s, 16 GFLOP a token and 0.5 MFLOP a pair of query and key at 700 TFLOP/s,
128 KiB of KV a token at 2.7 TB/s, and 25 GB/s to host memory.
"""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jax_engine.buckets import Bucket, buckets
from jax_engine.config import EngineConfig, Limits, resolve
from jax_engine.engine import Engine
from jax_engine.model_config import ModelConfig
from jax_engine.planning.cost_model import BucketCost, CostModel, HostCost, Stalls
from jax_engine.planning.simulator import VirtualBatch, VirtualBuilder, VirtualClock, VirtualDevice
from jax_engine.request import RequestOutput
from jax_engine.sampling_params import RequestOutputKind, SamplingParams
from jax_engine.step_log import Header

VOCAB = 50_000
WEIGHTS_S = 16e9 / 3e12
TOKEN_S = 16e9 / 700e12
PAIR_S = 4 * 4096 * 32 / 700e12
KV_S = 128 * 1024 / 2.7e12
PAGE_COPY_S = 16 * 128 * 1024 / 25e9
HOST_S = 0.3e-3
#: Relative spread of step times, log-normal.
JITTER = 0.03
MODEL = ModelConfig.placeholder(VOCAB, 2**20)


@dataclass
class Arrival:
    """A request of a trace."""

    time: float
    prompt: Sequence[int]
    num_output: int
    user: str | None = None
    slo_class: str | None = None


@dataclass
class Served:
    """What became of an arrival; times in seconds."""

    arrival: Arrival
    num_cached: int = 0
    token_times: list[float] = field(default_factory=list)

    @property
    def num_prompt(self) -> int:
        return len(self.arrival.prompt)

    @property
    def ttft(self) -> float:
        return self.token_times[0] - self.arrival.time

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.token_times, self.token_times[1:], strict=False)]


class _Device(VirtualDevice):
    """With step times that scatter, the same for the same run."""

    def __init__(self, limits: Limits, cost: CostModel, clock: VirtualClock):
        super().__init__(limits, cost, clock)
        self._chance = random.Random(0)

    def seconds(self, batch: VirtualBatch) -> float:
        return super().seconds(batch) * self._chance.lognormvariate(0, JITTER)


def cost_model(config: EngineConfig, limits: Limits) -> CostModel:
    """The step times, bucket by bucket; all of the host's work is booked as the dispatch."""
    header = Header(
        version="none",
        platform="gpu",
        device="an H100, computed",
        vocab_size=VOCAB,
        max_position_embeddings=MODEL.max_position_embeddings,
        started=0.0,
        config=config,
        limits=limits,
    )

    def cost(bucket: Bucket) -> BucketCost:
        base = max(WEIGHTS_S, bucket.num_tokens * TOKEN_S)
        return BucketCost(bucket, base, per_token=0.0, per_kv=KV_S, per_pair=PAIR_S, steps=0, error=0.0)

    host = dict.fromkeys(("schedule", "build", "commit"), HostCost(0.0, 0.0)) | {"dispatch": HostCost(HOST_S, 0.0)}
    return CostModel(header, list(map(cost, buckets(limits))), host, 0.0, Stalls(), num_steps=0, num_exact=0)


def serve(arrivals: Sequence[Arrival], **options: Any) -> tuple[list[Served], Engine]:
    """Serves a trace; `options` are EngineConfig's. Returns what became of it, and the engine with its counters."""
    sizes: dict[str, Any] = {"max_model_len": 16384, "num_pages": 24_000}
    config = EngineConfig(**(sizes | options))
    limits = resolve(config, MODEL, platform="gpu", num_pages=1)
    if config.swap_space_gib:
        limits = replace(
            limits,
            num_swap_pages=int(config.swap_space_gib * 2**30 / (limits.page_size * 128 * 1024)),
            swap_page_seconds=PAGE_COPY_S,
            token_seconds=TOKEN_S,
        )
    clock, cost = VirtualClock(), cost_model(config, limits)
    engine = Engine(
        _Device(limits, cost, clock),
        None,
        vocab_size=VOCAB,
        eos_token_ids=(),
        config=config,
        clock=clock,
        builder=VirtualBuilder(limits, cost, clock, {}),
    )
    line = deque(sorted(enumerate(arrivals), key=lambda entry: entry[1].time))
    served: dict[str, Served] = {}
    while line or engine.has_work:
        if not engine.has_work:
            clock.sleep_until(line[0][1].time)
        while line and line[0][1].time <= clock.now:
            index, arrival = line.popleft()
            _submit(engine, str(index), arrival)
            served[str(index)] = Served(arrival)
        for output in engine.step():
            _take(served[output.request_id], output, clock.now)
    return list(served.values()), engine


def _submit(engine: Engine, request_id: str, arrival: Arrival) -> None:
    params = SamplingParams(
        temperature=0.0, max_tokens=arrival.num_output, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    request = engine.make_request(request_id, arrival.prompt, params, user=arrival.user, slo_class=arrival.slo_class)
    engine.submit(request)


def _take(entry: Served, output: RequestOutput, now: float) -> None:
    entry.token_times += [now] * len(output.outputs[0].token_ids)
    entry.num_cached = output.num_cached_tokens
