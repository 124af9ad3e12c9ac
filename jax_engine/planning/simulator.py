"""The engine in virtual time: the real loop, scheduler and ring of steps, on a device and a clock that cost nothing.

Called by `jax-engine simulate`, by the planner and by benchmarks. Engine.step is run as it is. Instead of a batch it
is handed the step's size; dispatching moves the clock by what the host's work costs and books the device from the
moment it is free; asking for a result moves the clock to the moment when it is there. So overlap, ring depth and the
late learning of a stop come from the engine itself and are not modelled a second time.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from jax_engine.batch import StepResult
from jax_engine.buckets import Bucket
from jax_engine.config import EngineConfig, Limits, resolve
from jax_engine.engine import Engine
from jax_engine.errors import ConfigError
from jax_engine.model_config import ModelConfig
from jax_engine.planning.cost_model import CostModel, Work
from jax_engine.planning.trace import TraceRequest, prompts
from jax_engine.planning.traffic import STOP_TOKEN, Figures, Seen, drive, figures
from jax_engine.schedule import Copies, Schedule
from jax_engine.step_log import StepLog

_PLAIN_TOKEN = 1


class VirtualClock:
    """Time that passes only when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Lets time pass."""
        self.now += seconds

    def sleep_until(self, time: float) -> None:
        """Lets time pass up to a moment, unless that is over."""
        self.now = max(self.now, time)


class VirtualBatch(NamedTuple):
    """What the device needs to know of a step."""

    bucket: Bucket
    work: Work
    tokens: list[int]  # one per row
    structured: bool = False  # no request of a trace has a grammar


class VirtualBuilder:
    """Stands in for BatchBuilder: sizes and outcomes instead of arrays.

    Args:
        lengths: output tokens of each request that ends by a stop token, by request id.
    """

    def __init__(self, limits: Limits, cost: CostModel, clock: VirtualClock, lengths: dict[str, int]):
        self._cost, self._clock, self._lengths = cost, clock, lengths

    def build(self, schedule: Schedule) -> VirtualBatch:
        """The step's size; takes the time of scheduling and building."""
        rows = schedule.rows
        host = self._cost.host
        self._clock.advance(host["schedule"].seconds(len(rows)) + host["build"].seconds(len(rows)))
        assert schedule.bucket is not None
        return VirtualBatch(schedule.bucket, Work.of(rows), [self._token(row) for row in rows])

    def _token(self, row: Any) -> int:
        sequence = row[0]
        length = self._lengths.get(sequence.request.request_id)
        return STOP_TOKEN if length == row[1] + row[2] - sequence.num_prompt_tokens + 1 else _PLAIN_TOKEN


class VirtualHandle:
    """A step in flight on the virtual device."""

    def __init__(self, device: "VirtualDevice", clock: VirtualClock, ready: float, tokens: list[int]):
        self._device, self._clock, self._ready, self._tokens = device, clock, ready, tokens

    def is_ready(self) -> bool:
        """Whether the device has finished the step."""
        return self._clock.now >= self._ready

    def result(self) -> StepResult:
        """The step's tokens; lets time pass until they are there."""
        self._clock.sleep_until(self._ready)
        self._device.rows_read = len(self._tokens)
        return StepResult(self._tokens)


class VirtualDevice:
    """Runs one step after the other, each from when it was dispatched and the one before it is finished.

    Attributes:
        busy: seconds it has worked. padding, slots: computed token slots without a token, and all of them.
    """

    def __init__(self, limits: Limits, cost: CostModel, clock: VirtualClock):
        self.limits = limits
        self.busy = 0.0
        self.steps = self.slots = self.padding = 0
        self.rows_read = 0  # of the step whose result was read in this turn
        self._cost, self._clock = cost, clock
        self._free_at = 0.0

    def dispatch(self, batch: VirtualBatch) -> VirtualHandle:
        """Books a step; takes the time of a dispatch."""
        self._clock.advance(self._cost.host["dispatch"].seconds(len(batch.tokens)))
        self.steps += 1
        stalls = self._cost.stalls
        if stalls.every and self.steps % max(1, round(stalls.every)) == 0:
            self._clock.advance(stalls.seconds)
        seconds = self.seconds(batch)
        self._free_at = max(self._free_at, self._clock.now) + seconds
        self.busy += seconds
        self.slots += batch.bucket.num_tokens
        self.padding += batch.bucket.num_tokens - batch.work.tokens
        return VirtualHandle(self, self._clock, self._free_at, batch.tokens)

    def seconds(self, batch: VirtualBatch) -> float:
        """How long the device takes for a step."""
        return self._cost.device_seconds(batch.bucket, batch.work)

    def copy_pages(self, copies: Copies) -> None:
        """Books the copies of a schedule, at what the measured engine's cost."""
        pages = sum(len(copy.pages) for copy in (*copies.swapped_out, *copies.swapped_in))
        seconds = pages * self.limits.swap_page_seconds
        self._free_at = max(self._free_at, self._clock.now) + seconds
        self.busy += seconds

    def sample(self, handle: VirtualHandle, batch: Any, mask: Any) -> None:
        """Never called: no batch here is structured."""
        raise AssertionError("a virtual step has no grammar to wait for")


class Prediction(msgspec.Struct, frozen=True):
    """What a configuration would do with a trace.

    Attributes:
        utilisation: share of the time in which the device works. padding: share of computed token slots without a
            token. Both over all replicas.
    """

    figures: Figures
    utilisation: float
    padding: float
    preemptions: int
    steps: int


def limits_for(cost: CostModel, options: dict[str, Any]) -> tuple[EngineConfig, Limits]:
    """Configuration and sizes of an engine like the measured one, but for `options` (fields of EngineConfig).

    What the measured engine derived from its device stays: the size of its KV pool, and how fast it computes prompts
    and copies pages. Swap space that it did not have has no speed, and is no choice.

    Raises:
        ConfigError: the choices contradict each other.
    """
    header = cost.header
    config = dataclasses.replace(header.config, **({"step_log": None} | options))
    model = ModelConfig.placeholder(header.vocab_size, header.max_position_embeddings)
    had = header.limits
    if config.swap_space_gib and not had.num_swap_pages:
        raise ConfigError("swap_space_gib: the measured engine had none, so the speed of its copies is not known")
    page_size = config.page_size or had.page_size
    config = dataclasses.replace(config, page_size=page_size)
    pool = had.num_pages * had.page_size // page_size
    limits = resolve(config, model, platform=header.platform, num_pages=max(1, pool))
    model_shares = had.enable_prefix_caching or not header.config.enable_prefix_caching
    scale = page_size / had.page_size
    share = config.swap_space_gib / header.config.swap_space_gib if had.num_swap_pages else 0
    return config, dataclasses.replace(
        limits,
        enable_prefix_caching=limits.enable_prefix_caching and model_shares,
        page_groups=had.page_groups,  # the placeholder has no layers with windows
        num_swap_pages=int(had.num_swap_pages * share / scale),
        swap_page_seconds=had.swap_page_seconds * scale,
        token_seconds=limits.token_seconds or had.token_seconds,
    )


def simulate(
    trace: Sequence[TraceRequest], cost: CostModel, options: dict[str, Any] | None = None, *, replicas: int = 1
) -> Prediction:
    """Predicts a run of the trace, its requests dealt out in turn to `replicas` engines.

    Args:
        options: fields of EngineConfig that differ from the measured engine's. With step_log the virtual engine writes
            a log like a real one.

    Raises:
        ConfigError: the options contradict each other.
    """
    config, limits = limits_for(cost, options or {})
    if config.step_log is not None and replicas > 1:
        raise ConfigError(f"step_log {config.step_log!r} is the log of one engine; got {replicas} replicas")
    all_prompts = list(prompts(trace, cost.header.vocab_size))
    runs = [
        _simulate_one(trace[own::replicas], all_prompts[own::replicas], cost, config, limits)
        for own in range(min(replicas, len(trace)))
    ]
    seen = [one for run in runs for one in run[0]]
    devices = [run[1] for run in runs]
    total = figures(seen)
    return Prediction(
        figures=total,
        utilisation=sum(device.busy for device in devices) / (total.duration_s * replicas),
        padding=sum(device.padding for device in devices) / max(1, sum(device.slots for device in devices)),
        preemptions=sum(run[2] for run in runs),
        steps=sum(device.steps for device in devices),
    )


def _simulate_one(
    trace: Sequence[TraceRequest],
    all_prompts: list[list[int]],
    cost: CostModel,
    config: EngineConfig,
    limits: Limits,
) -> tuple[list[Seen], VirtualDevice, int]:
    clock = VirtualClock()
    device = VirtualDevice(limits, cost, clock)
    lengths = {str(number): request.output_tokens for number, request in enumerate(trace) if request.ends == "stop"}
    header = msgspec.structs.replace(cost.header, started=0.0, config=config, limits=limits)
    log = StepLog(header=header, path=config.step_log, max_bytes=config.step_log_max_mib << 20, capacity=0)
    engine = Engine(
        device,
        None,
        vocab_size=cost.header.vocab_size,
        eos_token_ids=(),
        config=config,
        clock=clock,
        builder=VirtualBuilder(limits, cost, clock, lengths),
        step_log=log,
    )

    def after_turn() -> None:
        clock.advance(cost.turn)
        if device.rows_read:
            clock.advance(cost.host["commit"].seconds(device.rows_read))
            device.rows_read = 0

    seen = drive(engine, trace, all_prompts, clock.sleep_until, after_turn)
    log.close()
    return seen, device, engine.metrics.preemptions
