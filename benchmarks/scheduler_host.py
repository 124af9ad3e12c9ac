"""Host cost of one turn of the engine's loop without a device: schedule, build the batch, commit.

    python -m benchmarks.scheduler_host --out=FILE.json

The real engine, scheduler and batch builder run at full speed against a device that answers at once. `steady`: every
sequence decodes and none ends. `churn`: sequences end after `--output` tokens, at staggered times, and a new one takes
the place of each, so that joining, paging and leaving are part of the cost. `commit` includes making the outputs, but
no text: there is no tokenizer. `waiting`: churn of 256 running sequences with that many more in line, and under each
policy with the longest line. `idle`: processor time of an engine without work; how long a request waits until the
engine's thread has woken up and schedules it; and how long it takes from the caller's coroutine to its first token and
back, over a device that answers at once.
"""

import asyncio
import dataclasses
import gc
import itertools
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

from benchmarks import program, report
from jax_engine.async_engine import AsyncEngine
from jax_engine.config import SCHEDULING_POLICIES, EngineConfig, Limits, resolve
from jax_engine.engine import Engine
from jax_engine.metrics import PHASES
from jax_engine.model_config import ModelConfig
from jax_engine.sampling_params import RequestOutputKind, SamplingParams
from jax_engine.testing.fake_runner import FakeRunner

WARMUP_STEPS = 20
NUM_RUNNING_BESIDE_LINE = 256
NUM_USERS = 50
IDLE_REQUESTS = 200
MAX_NUM_BATCHED_TOKENS = 8192
PAGE_SIZE = 16
US = 1e6
MODEL = ModelConfig.placeholder(2, 2**20)


def flag_set() -> flags.FlagValues:
    """The program's flags."""
    flag_values = flags.FlagValues()
    here = {"flag_values": flag_values, "module_name": "Benchmark"}
    flags.DEFINE_list("running", ["16", "64", "256", "1024"], "Numbers of running sequences.", **here)
    flags.DEFINE_list("waiting", ["0", "1000", "10000", "100000"], "Lengths of the line beside 256 running.", **here)
    flags.DEFINE_integer("steps", 500, "Timed steps of each case.", lower_bound=10, **here)
    flags.DEFINE_integer("prompt", 128, "Prompt tokens of each sequence.", lower_bound=1, **here)
    flags.DEFINE_integer("output", 256, "Output tokens of each sequence under churn.", lower_bound=2, **here)
    flags.DEFINE_integer("max_inflight_steps", 2, "Steps in flight.", lower_bound=1, **here)
    kinds = [kind.name.lower() for kind in RequestOutputKind]
    flags.DEFINE_enum("output_kind", "delta", kinds, "delta: as for streams. final_only: as LLM.generate.", **here)
    flags.DEFINE_string("out", None, "Results file to write (JSON).", **here)
    return flag_values


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all cases have in common; see flag_set."""

    steps: int
    prompt: int
    output: int
    max_inflight_steps: int
    output_kind: str


def make_limits(num_running: int, max_model_len: int, max_inflight_steps: int) -> Limits:
    """Limits under which the sequences all fit at full length, so that none is preempted."""
    config = EngineConfig(
        max_model_len=max_model_len,
        max_num_seqs=num_running,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        max_inflight_steps=max_inflight_steps,
        page_size=PAGE_SIZE,
    )
    num_pages = (num_running + 1) * (max_model_len // PAGE_SIZE + 2)
    return resolve(config, MODEL, platform="gpu", num_pages=num_pages)


class Load:
    """An engine on a fake device, kept at `num_running` requests.

    Args:
        first_outputs: output lengths of the first requests; all others have `output`.
        num_waiting: requests beyond those that can run. policy: in which order they wait.
    """

    def __init__(
        self,
        limits: Limits,
        settings: Settings,
        num_running: int,
        output: int,
        first_outputs: Sequence[int],
        num_waiting: int = 0,
        policy: str = "fcfs",
    ):
        runner = FakeRunner(limits, check=False)
        config = EngineConfig(policy=policy)
        self.engine = Engine(runner, None, vocab_size=runner.vocab_size, eos_token_ids=(), config=config)
        self.num_running = num_running + num_waiting
        self.prompt = (1,) * settings.prompt
        self.output_kind = RequestOutputKind[settings.output_kind.upper()]
        self.outputs = itertools.chain(first_outputs, itertools.repeat(output))
        self.numbers = itertools.count()

    def step(self) -> dict[str, float]:
        """Tops up the requests and runs one turn. Microseconds of the turn's phases and of all of it."""
        while self.engine.num_requests < self.num_running:
            params = SamplingParams(
                temperature=0.0, max_tokens=next(self.outputs), ignore_eos=True, output_kind=self.output_kind
            )
            number = next(self.numbers)
            user = f"user {number % NUM_USERS}"
            self.engine.submit(self.engine.make_request(str(number), self.prompt, params, user=user))
        self.engine.metrics.reset()
        start = time.perf_counter()
        self.engine.step()
        total = time.perf_counter() - start
        phases = self.engine.metrics.host_seconds
        return {phase: phases[phase] * US for phase in PHASES} | {"total": total * US}


def measure(
    settings: Settings, num_running: int, churn: bool, num_waiting: int = 0, policy: str = "fcfs"
) -> dict[str, Any]:
    """Microseconds per turn of each phase and of all of it, as percentiles."""
    prefill_steps = num_running * settings.prompt // MAX_NUM_BATCHED_TOKENS
    output = settings.output if churn else settings.steps + prefill_steps + 2 * WARMUP_STEPS
    staggered = [1 + index * output // num_running for index in range(num_running)] if churn else []
    limits = make_limits(num_running, settings.prompt + output, settings.max_inflight_steps)
    load = Load(limits, settings, num_running, output, staggered, num_waiting, policy)
    for _ in range(prefill_steps + WARMUP_STEPS):
        load.step()
    gc.collect()
    samples = [load.step() for _ in range(settings.steps)]
    return {name: report.percentiles(sample[name] for sample in samples) for name in samples[0]}


def measure_idle() -> dict[str, Any]:
    """Share of a core that an idle engine takes; microseconds until it is awake, and until it has answered."""
    limits = make_limits(4, 64, 2)
    runner = FakeRunner(limits, check=False)
    config = EngineConfig()
    engine = AsyncEngine(config, Engine(runner, None, vocab_size=runner.vocab_size, eos_token_ids=(), config=config))

    async def answers() -> list[tuple[float, float]]:
        times = []
        for _ in range(IDLE_REQUESTS):
            await asyncio.sleep(0.005)  # long enough to fall asleep
            start = time.perf_counter()
            async for output in engine.generate([1], SamplingParams(max_tokens=1)):
                answered = time.perf_counter() - start
                assert output.metrics.first_scheduled_time is not None
                awake = output.metrics.first_scheduled_time - output.metrics.arrival_time
                times.append((awake * US, answered * US))
        return times

    awake, answered = zip(*asyncio.run(answers()), strict=True)
    busy, wall = time.process_time(), time.perf_counter()
    time.sleep(1.0)
    share = (time.process_time() - busy) / (time.perf_counter() - wall)
    engine.shutdown()
    return {
        "core_share": share,
        "us_to_wake_up": report.percentiles(awake),
        "us_to_answer": report.percentiles(answered),
    }


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; argv[0] is the program's name. Returns the exit status.

    Raises:
        UsageError: the command line is wrong.
    """
    flag_values = flag_set()
    if not program.parse(flag_values, "benchmarks.scheduler_host", __doc__, argv[1:]):
        return 0
    settings = Settings(**{field.name: flag_values[field.name].value for field in dataclasses.fields(Settings)})
    results: dict[str, dict[str, Any]] = {"steady": {}, "churn": {}}
    rows = [["host time per turn, us (p50)", *PHASES, "total", "total p99"]]
    for kind, cases in results.items():
        for num_running in map(int, flag_values["running"].value):
            case = cases[str(num_running)] = measure(settings, num_running, kind == "churn")
            medians = [f"{case[name]['p50']:.0f}" for name in (*PHASES, "total")]
            rows.append([f"{kind}, {num_running} running", *medians, f"{case['total']['p99']:.0f}"])
    results["waiting"] = {}
    lines = [(num_waiting, "fcfs") for num_waiting in map(int, flag_values["waiting"].value)]
    if lines:
        lines += [(lines[-1][0], policy) for policy in SCHEDULING_POLICIES if policy != "fcfs"]
    for num_waiting, policy in lines:
        case = measure(settings, NUM_RUNNING_BESIDE_LINE, True, num_waiting, policy)
        results["waiting"][f"{num_waiting}, {policy}"] = case
        medians = [f"{case[name]['p50']:.0f}" for name in (*PHASES, "total")]
        rows.append([f"{num_waiting} waiting, {policy}", *medians, f"{case['total']['p99']:.0f}"])
    idle = measure_idle()
    print(report.table(rows))
    marks = {
        name: f"{idle[name]['p50']:.0f} us (p99 {idle[name]['p99']:.0f})" for name in ("us_to_wake_up", "us_to_answer")
    }
    print(
        f"idle: {idle['core_share']:.2%} of a core; it wakes up within {marks['us_to_wake_up']}, "
        f"and an answer takes {marks['us_to_answer']}"
    )
    if flag_values["out"].value:
        fields = {"settings": dataclasses.asdict(settings), "us_per_turn": results, "idle": idle}
        report.write(flag_values["out"].value, report.document("benchmarks.scheduler_host", argv, **fields))
    return 0


if __name__ == "__main__":
    program.run(main)
