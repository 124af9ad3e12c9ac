"""What scheduling decisions cost and gain with a real model on the device at hand.

    python -m benchmarks.decisions --model=qwen3-0.6b --load_format=dummy --out=FILE.json

The counterpart of benchmarks/scheduling.py, which compares the same decisions in virtual time. `cache`: the prefix
cache on conversations and on a shared system prompt. `preemption`: both ways back, from a pool that holds half of what
runs; answers are compared with those of a run that is never preempted. `copies`: pages on their way to and from the
host beside steps. `gap`: the wait between two tokens of running streams while long prompts arrive, with and without the
bound. `deterministic`: the price of one fixed bucket, and whether answers and log-probabilities are the same there bit
for bit whatever else runs. Prompts are random token ids and output lengths are forced. All cases of an experiment run
on the same compiled steps, `deterministic` on its own.
"""

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags as absl_flags

from benchmarks import program, report
from jax_engine.batch import Batch, BatchLayout
from jax_engine.buckets import buckets
from jax_engine.config import EngineConfig
from jax_engine.engine import Engine
from jax_engine.metrics import PHASES
from jax_engine.model_runner import ModelRunner
from jax_engine.planning import trace
from jax_engine.planning.traffic import Seen, drive, figures
from jax_engine.request import PositionLogprobs
from jax_engine.sampling_params import RequestOutputKind, SamplingParams
from jax_engine.schedule import Copies, PageCopy
from jax_engine.start import open_model
from jax_engine.swap_space import COPY_PAGES
from serving import flags
from serving.commands import common

MS = 1e3
#: Of `copies`: as much as a long sequence has, and steps that take longer than that.
NUM_GROUPS, NUM_STEPS, NUM_TRIES = 8, 24, 3
VOCAB = 256  # prompts are of ids below this, which are in every vocabulary


def flag_set() -> absl_flags.FlagValues:
    """The engine's flags and the benchmark's own."""
    flag_values = common.engine_flags(log_level="warning")
    here: dict[str, Any] = {"flag_values": flag_values, "module_name": "Benchmark"}
    absl_flags.DEFINE_multi_enum("only", list(EXPERIMENTS), list(EXPERIMENTS), "Experiments to run.", **here)
    absl_flags.DEFINE_integer("streams", 8, "Sequences that run at the same time.", lower_bound=1, **here)
    absl_flags.DEFINE_integer("prompt", 64, "Prompt tokens of each.", lower_bound=2, **here)
    absl_flags.DEFINE_integer("output", 64, "Output tokens of each.", lower_bound=2, **here)
    absl_flags.DEFINE_integer("long_prompt", 512, "Of the prompts that come between in `gap`.", lower_bound=2, **here)
    absl_flags.DEFINE_integer("long_prompts", 8, "How many of these.", lower_bound=1, **here)
    absl_flags.DEFINE_list("bounds_ms", ["150"], "Bounds on the decode gap to try in `gap`.", **here)
    absl_flags.DEFINE_string("out", None, "Results file to write (JSON).", **here)
    return flag_values


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the work; see flag_set."""

    streams: int
    prompt: int
    output: int
    long_prompt: int
    long_prompts: int
    bounds_ms: tuple[float, ...]


class Bench:
    """One set of compiled steps, and engines over it that schedule in different ways."""

    def __init__(self, config: EngineConfig, sizes: Sizes):
        self.config, self.sizes = config, sizes
        self.runner = ModelRunner(config, open_model(config))
        self.limits = self.runner.limits

    def engine(self, **changes: Any) -> Engine:
        """A fresh engine whose limits differ in `changes`."""
        gc.collect()
        self.runner.limits = dataclasses.replace(self.limits, **changes)
        vocab_size = self.runner.model_config.vocab_size
        return Engine(self.runner, None, vocab_size=vocab_size, eos_token_ids=(), config=self.config)

    def warm_up(self) -> None:
        """Runs some of everything once, untimed."""
        work = requests(self.sizes.streams, self.sizes.prompt, 4)
        run(self.engine(), work)

    def pages(self, num_tokens: int) -> int:
        """Pages of a sequence of this length."""
        return -(-num_tokens // self.limits.page_size)


def requests(count: int, prompt: int, output: int) -> list[trace.TraceRequest]:
    """All at once."""
    return [trace.TraceRequest(arrival_s=0.0, prompt_tokens=prompt, output_tokens=output) for _ in range(count)]


def run(engine: Engine, work: Sequence[trace.TraceRequest]) -> list[Seen]:
    """A trace in real time."""
    prompts = trace.prompts(work, VOCAB)
    return drive(engine, work, prompts, lambda moment: time.sleep(max(0.0, moment - time.monotonic())))


class Answer(NamedTuple):
    """Tokens of a completion, and the log-probabilities at each where they were asked for."""

    tokens: list[int]
    logprobs: list[PositionLogprobs] | None


def answers_of(
    engine: Engine, prompts: Sequence[Sequence[int]], output: int, *, logprobs: int | None = None, first: int = 0
) -> tuple[list[Answer], float]:
    """The answers to prompts that come at once, number `first` before all, and the seconds until the last token."""
    params = SamplingParams(
        temperature=0.0,
        max_tokens=output,
        ignore_eos=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
        logprobs=logprobs,
    )
    started = time.perf_counter()
    for number in np.roll(np.arange(len(prompts)), -first):
        engine.submit(engine.make_request(str(number), prompts[number], params))
    answers: dict[str, Answer] = {}
    while engine.has_work:
        for made in engine.step():
            answers[made.request_id] = Answer(list(made.outputs[0].token_ids), made.outputs[0].logprobs)
    seconds = time.perf_counter() - started
    return [answers[str(number)] for number in range(len(prompts))], seconds


def preempting(bench: Bench) -> dict[str, dict[str, Any]]:
    """Way back from a preemption -> limits of a pool that holds half of what runs."""
    sizes = bench.sizes
    half = max(bench.pages(bench.limits.max_model_len), bench.pages(sizes.prompt + sizes.output) * sizes.streams // 2)
    modes = ("recompute", "swap", "auto") if bench.limits.num_swap_pages else ("recompute",)
    return {mode: {"num_pages": half, "preemption_mode": mode} for mode in modes}


def host_ms(engine: Engine) -> dict[str, float]:
    """Milliseconds of each phase per step."""
    snapshot = engine.metrics.snapshot()
    return {phase: snapshot["host_seconds"][phase] / max(1, snapshot["steps"]) * MS for phase in PHASES}


def cache(bench: Bench) -> dict[str, Any]:
    """Hit rates, and milliseconds to the first token, with the prefix cache and without."""
    sizes, results = bench.sizes, {}
    for caching in (False, True):
        name = "cache" if caching else "no cache"
        engine = bench.engine(enable_prefix_caching=caching)
        results[f"conversations, {name}"] = conversations(engine, sizes)
        engine = bench.engine(enable_prefix_caching=caching)
        chance = np.random.default_rng(5)
        count = 2 * sizes.streams
        shared = trace.make(
            [0.0] * count, [2 * sizes.prompt] * count, [8] * count, groups=1, prefix_tokens=sizes.prompt, chance=chance
        )
        seen = figures(run(engine, shared))
        results[f"system prompt, {name}"] = hits(engine) | {"ttft_ms": seen.ttft_ms}
    return results


def hits(engine: Engine) -> dict[str, Any]:
    """The share of prompt tokens that were found."""
    counted = engine.metrics.tokens
    return {"hit_rate": counted["cached"] / max(1, counted["looked_up"]), "prompt_tokens_computed": counted["prompt"]}


def conversations(engine: Engine, sizes: Sizes) -> dict[str, Any]:
    """Four turns of every conversation; each turn sends all that was said before, answers included."""
    chance = np.random.default_rng(4)
    said = [chance.integers(1, VOCAB, sizes.prompt).tolist() for _ in range(sizes.streams)]
    params = SamplingParams(
        temperature=0.0, max_tokens=sizes.output // 4, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
    )
    ttft = []
    for turn in range(4):
        for number, prompt in enumerate(said):
            engine.submit(engine.make_request(f"{turn}.{number}", prompt, params))
        while engine.has_work:
            for made in engine.step():
                assert made.metrics.first_token_time is not None
                ttft.append((made.metrics.first_token_time - made.metrics.arrival_time) * MS)
                number = int(made.request_id.split(".")[1])
                asked = chance.integers(1, VOCAB, sizes.prompt // 2).tolist()
                said[number] = [*said[number], *made.outputs[0].token_ids, *asked]
    return hits(engine) | {"ttft_ms": report.percentiles(ttft)}


def preemption(bench: Bench) -> dict[str, Any]:
    """A pool that holds all, and one that holds half, with each way back; without the prefix cache, which would hide
    the difference."""
    sizes, results = bench.sizes, {}
    chance = np.random.default_rng(6)
    prompts = [chance.integers(1, VOCAB, sizes.prompt).tolist() for _ in range(sizes.streams)]
    want: list[Answer] = []
    for mode, changes in ({"never": {}} | preempting(bench)).items():
        engine = bench.engine(enable_prefix_caching=False, **changes)
        got, seconds = answers_of(engine, prompts, sizes.output)
        want = want or got
        results[mode] = {
            "seconds": seconds,
            "output_tok_per_s": len(prompts) * sizes.output / seconds,
            "preemptions": dict(engine.metrics.preemptions_by_way),
            "prompt_tokens_computed": engine.metrics.tokens["prompt"],
            "answers_equal": sum(one == other for one, other in zip(want, got, strict=True)),
            "host_ms_per_step": host_ms(engine),
        }
    prices = {"token_ms": bench.limits.token_seconds * MS, "swap_page_ms": bench.limits.swap_page_seconds * MS}
    return results | {"prices": prices | {"page_tokens": bench.limits.page_size}}


def copies(bench: Bench) -> dict[str, Any]:
    """Milliseconds of steps without copies, of copies without steps, and of both together, each way."""
    runner, limits = bench.runner, bench.limits
    if not limits.num_swap_pages:
        return {}
    bucket = max(buckets(limits), key=lambda bucket: bucket.num_tokens)
    layout = BatchLayout.of(bucket, limits)
    packed = np.zeros(layout.size, np.int32)
    layout.unpack(packed)["slots"][:] = limits.max_num_seqs  # padding, which costs what tokens cost
    pages = list(range(min(NUM_GROUPS * COPY_PAGES, limits.num_pages)))
    out = Copies([PageCopy(-1, 0, pages)], [], [])
    back = Copies([], [PageCopy(-1, 0, pages)], [])

    def steps(between: Copies | None) -> float:
        """Milliseconds of some steps, with copies after the first of them; the best of some."""
        times = []
        for _ in range(NUM_TRIES):
            started = time.perf_counter()
            for number in range(NUM_STEPS):
                handle = runner.dispatch(Batch(bucket, packed, None, None))
                if number == 0 and between is not None:
                    runner.copy_pages(between)
            handle.result()
            jax.block_until_ready(list(runner._page_store._kept.values()))
            times.append((time.perf_counter() - started) * MS)
        return min(times)

    def alone(copies: Copies) -> float:
        times = []
        for _ in range(NUM_TRIES):
            started = time.perf_counter()
            runner.copy_pages(copies)
            jax.block_until_ready((runner._cache.pool, list(runner._page_store._kept.values())))
            times.append((time.perf_counter() - started) * MS)
        return min(times)

    page_bytes = runner._program.page_bytes(limits.page_size)
    results = {"sizes": {"steps": NUM_STEPS, "gib": len(pages) * page_bytes / 2**30}, "steps": {"ms": steps(None)}}
    for way, copy in (("out", out), ("in", back)):
        own, both = alone(copy), steps(copy)
        hidden = (results["steps"]["ms"] + own - both) / own
        results[way] = {"copies_ms": own, "both_ms": both, "hidden_share": hidden}
    runner.copy_pages(Copies([], [], [-1]))
    return results


def gap(bench: Bench) -> dict[str, Any]:
    """Milliseconds between two tokens of a stream, while prompts that are much longer come one after the other."""
    sizes, results = bench.sizes, {}
    streams = requests(sizes.streams, sizes.prompt, sizes.output)
    alone = figures(run(bench.engine(enable_prefix_caching=False), streams))
    # The long prompts come in the middle of the streams' time, evenly.
    every = alone.duration_s / (sizes.long_prompts + 1)
    long = [
        trace.TraceRequest(arrival_s=every * (1 + number), prompt_tokens=sizes.long_prompt, output_tokens=2)
        for number in range(sizes.long_prompts)
    ]
    results["no long prompts"] = {"gap_ms": alone.inter_token_ms}
    for bound in (None, *sizes.bounds_ms):
        engine = bench.engine(enable_prefix_caching=False, max_decode_gap_s=bound and bound / MS)
        seen = run(engine, [*streams, *long])
        gaps = np.concatenate([np.diff(one.tokens) for one in seen[: len(streams)]]) * MS
        marks = {f"p{mark:g}": float(np.percentile(gaps, mark)) for mark in (50, 99, 99.9)}
        results[f"bound {bound:g} ms" if bound else "no bound"] = {
            "gap_ms": marks | {"max": float(gaps.max())},
            "over_bound_share": float((gaps > bound).mean()) if bound else None,
            "ttft_ms": figures(seen[len(streams) :]).ttft_ms,
        }
    return results


def deterministic(bench: Bench) -> dict[str, Any]:
    """Throughput of the same requests with buckets of many sizes and with one; and what is the same in the one."""
    sizes = bench.sizes
    chance = np.random.default_rng(7)
    prompts = [chance.integers(1, VOCAB, sizes.prompt).tolist() for _ in range(sizes.streams)]
    results = {}
    options = {"token_buckets": (), "decode_buckets": None, "max_num_batched_tokens": None}
    fixed = dataclasses.replace(bench.config, deterministic=True, **options)
    for name, own in (("as usual", bench), ("deterministic", Bench(fixed, sizes))):
        own.warm_up()
        for count in sorted({1, max(1, sizes.streams // 4), sizes.streams}):
            _, seconds = answers_of(own.engine(enable_prefix_caching=False), prompts[:count], sizes.output)
            results[f"{count} sequences, {name}"] = {
                "output_tok_per_s": count * sizes.output / seconds,
                "bucket": own.limits.token_buckets[-1],
            }
    return results | same_bits(own)


def same_bits(bench: Bench) -> dict[str, Any]:
    """Requests of many lengths, run together and in other ways: answers whose tokens, and whose tokens and
    log-probabilities, are those of the first run."""
    sizes, alone = bench.sizes, 4
    chance = np.random.default_rng(8)
    lengths = chance.integers(2, sizes.prompt + 1, sizes.streams)
    prompts = [chance.integers(1, VOCAB, length).tolist() for length in lengths]
    plain = {"enable_prefix_caching": False}
    first = sizes.streams // 3

    def run(changes: dict[str, Any], **options: Any) -> tuple[list[Answer], Engine]:
        engine = bench.engine(**changes)
        return answers_of(engine, prompts, sizes.output, logprobs=1, **options)[0], engine

    want, _ = run(plain)
    cases = {"again": plain, "one step at a time": plain | {"max_inflight_steps": 1}}
    cases |= {f"preempted, {mode}": plain | changes for mode, changes in preempting(bench).items()}
    got = {name: run(changes) for name, changes in cases.items()}
    got["in another order"] = run(plain, first=first)
    engine = bench.engine(enable_prefix_caching=True)
    for _ in range(2):
        answers, _ = answers_of(engine, prompts, sizes.output, logprobs=1, first=first)
    got["found in the cache"] = answers, engine
    engine = bench.engine(**plain)
    got["alone"] = [answers_of(engine, [prompt], sizes.output, logprobs=1)[0][0] for prompt in prompts[:alone]], engine
    return {
        name: {
            "answers": len(answers),
            "same_tokens": sum(one.tokens == other.tokens for one, other in zip(want, answers, strict=False)),
            "same_bits": sum(one == other for one, other in zip(want, answers, strict=False)),
            "preemptions": sum(engine.metrics.preemptions_by_way.values()),
            "cached_tokens": engine.metrics.tokens["cached"],
        }
        for name, (answers, engine) in got.items()
    }


EXPERIMENTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "cache": cache,
    "preemption": preemption,
    "copies": copies,
    "gap": gap,
    "deterministic": deterministic,
}


def shown(name: str, results: dict[str, Any]) -> str:
    """A line for each case, with its figures."""
    lines = []
    for case, found in results.items():
        parts = []
        for key, value in found.items():
            if isinstance(value, dict):
                value = ", ".join(f"{k} {v:.3g}" for k, v in value.items())
            parts.append(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")
        lines.append(f"{name}, {case}: " + "; ".join(parts))
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; argv[0] is the program's name. Returns the exit status.

    Raises:
        UsageError: the command line is wrong. ConfigError, CheckpointError: the engine cannot be built.
    """
    flag_values = flag_set()
    if not common.parse(flag_values, "bench", __doc__ or "", argv[1:]):
        return 0
    config = EngineConfig(**flags.values(flag_values, EngineConfig))
    own = {field.name: flag_values[field.name].value for field in dataclasses.fields(Sizes)}
    bench = Bench(config, Sizes(**(own | {"bounds_ms": tuple(map(float, own["bounds_ms"]))})))
    bench.warm_up()
    results = {}
    for name in flag_values["only"].value:
        results[name] = EXPERIMENTS[name](bench)
        print(shown(name, results[name]) + "\n", flush=True)
        if flag_values["out"].value:
            document = report.document(
                "benchmarks.decisions",
                argv,
                device=report.jax_device(),
                model=config.model,
                sizes=dataclasses.asdict(bench.sizes),
                limits=dataclasses.asdict(bench.limits),
                results=results,
            )
            report.write(flag_values["out"].value, document)
    return 0


if __name__ == "__main__":
    program.run(main)
