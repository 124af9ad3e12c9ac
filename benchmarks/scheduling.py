"""What each scheduling decision is worth: the same traffic with and without it, in virtual time.

    python -m benchmarks.scheduling --out=FILE.json

The real engine and scheduler, on the device of benchmarks/virtual_device.py. `padding`: cutting prompts where they fill
a bucket. `gap`: the bound on decode gaps while long prompts arrive. `fair`: a light user beside a hog. `slo`: requests
of two latency classes under overload. `cache`: the prefix cache on conversations, and on a shared system prompt.
`preemption`: both ways back, from a pool that holds half of what runs.
"""

import random
from collections.abc import Iterable, Sequence
from typing import Any

from absl import flags

from benchmarks import program, report
from benchmarks.virtual_device import VOCAB, Arrival, Served, serve

MS = 1e3


def poisson(chance: random.Random, rate: float, seconds: float) -> Iterable[float]:
    """Arrival times at `rate` a second."""
    now = chance.expovariate(rate)
    while now < seconds:
        yield now
        now += chance.expovariate(rate)


def tokens(chance: random.Random, count: int) -> list[int]:
    """A prompt that is like no other."""
    return [chance.randrange(2, VOCAB) for _ in range(count)]


def chat_lengths(chance: random.Random) -> tuple[int, int]:
    """Prompt and output lengths as of a chat service."""
    return int(min(chance.lognormvariate(5.5, 1.0), 4000)) + 1, int(min(chance.lognormvariate(5.0, 0.8), 1000)) + 1


def latencies(served: Sequence[Served]) -> dict[str, Any]:
    """Milliseconds to the first token, and between two tokens of a stream."""
    return {
        "ttft_ms": report.percentiles(entry.ttft * MS for entry in served),
        "gap_ms": report.percentiles(gap * MS for entry in served for gap in entry.gaps),
    }


def padding() -> dict[str, Any]:
    """Chat traffic at three loads, and a thousand requests at once, with and without filling buckets."""
    results = {}
    for rate in (5, 15, 25, None):
        chance = random.Random(1)
        arrivals = []
        for time in [0.0] * 1000 if rate is None else poisson(chance, rate, 60):
            num_prompt, num_output = chat_lengths(chance)
            arrivals.append(Arrival(time, tokens(chance, num_prompt), num_output))
        for fill in (False, True):
            served, engine = serve(arrivals, fill_buckets=fill)
            counters = engine.metrics.snapshot()
            prompt_steps = {b: n for b, n in engine.metrics.steps.items() if not b.decode_only}
            computed = sum(bucket.num_tokens * count for bucket, count in prompt_steps.items())
            load = "at once" if rate is None else f"{rate}/s"
            results[f"{load}, {'filling' if fill else 'spilling'}"] = {
                "padding_share": counters["padding_tokens"] / counters["batched_tokens"],
                "prompt_steps": sum(prompt_steps.values()),
                "tokens_of_prompt_steps": computed,
                "makespan_s": engine.clock(),
            } | latencies(served)
    return results


def gap() -> dict[str, Any]:
    """32 streams, and a prompt of 4,096 tokens about twice a second, under several bounds."""
    results = {}
    for bound in (None, 40.0, 25.0, 18.0):
        chance = random.Random(2)
        streams = [Arrival(0.0, tokens(chance, 64), 8000) for _ in range(32)]
        prompts = [Arrival(time, tokens(chance, 4096), 4) for time in poisson(chance, 2.0, 60)]
        served, _ = serve([*streams, *prompts], max_decode_gap_ms=bound, num_pages=40_000)
        gaps = sorted(gap * MS for entry in served[:32] for gap in entry.gaps)
        results[f"bound {bound} ms" if bound else "no bound"] = {
            "gap_ms": {str(p): gaps[int(len(gaps) * p / 100)] for p in (50, 99, 99.9)} | {"max": gaps[-1]},
            "ttft_ms": report.percentiles(entry.ttft * MS for entry in served[32:]),
        }
    return results


def fair() -> dict[str, Any]:
    """A hog with 3,000 requests at once; a light user with one every second."""
    results = {}
    for policy in ("fcfs", "fair"):
        chance = random.Random(3)
        hog = [Arrival(0.0, tokens(chance, 512), 256, "hog") for _ in range(3000)]
        light = [Arrival(time, tokens(chance, 256), 64, "light") for time in range(1, 61)]
        served, engine = serve([*hog, *light], policy=policy)
        makespan = engine.clock()
        for user in ("hog", "light"):
            of_user = [entry for entry in served if entry.arrival.user == user]
            results[f"{policy}, {user}"] = latencies(of_user) | {"makespan_s": makespan}
    return results


def slo() -> dict[str, Any]:
    """Interactive and batch requests at more load than the device can take, and how many met their targets."""
    targets = {"interactive": (0.5, 0.1), "batch": (20.0, 1.0)}
    classes = tuple(f"{name}:{ttft * MS:g}:{itl * MS:g}" for name, (ttft, itl) in targets.items())
    results = {}
    for policy in ("fcfs", "slo"):
        chance = random.Random(4)
        arrivals = []
        for time in poisson(chance, 75, 40):
            name = chance.choice(list(targets))
            arrivals.append(Arrival(time, tokens(chance, chance.randint(200, 1000)), 128, slo_class=name))
        served, _ = serve(arrivals, policy=policy, slo_classes=classes, prefill_tokens_per_s=40_000)
        for name, (ttft, _) in targets.items():
            of_class = [entry for entry in served if entry.arrival.slo_class == name]
            met = sum(entry.ttft <= ttft for entry in of_class) / len(of_class)
            results[f"{policy}, {name}"] = {"met_ttft_share": met} | latencies(of_class)
    return results


def conversations(chance: random.Random) -> list[Arrival]:
    """200 conversations of up to six turns; each turn sends all that was said before."""
    arrivals: list[Arrival] = []
    for _ in range(200):
        said: list[int] = []
        time = chance.uniform(0, 60)
        for _ in range(chance.randint(1, 6)):
            asked, num_output = tokens(chance, chance.randint(20, 300)), chance.randint(50, 300)
            said = [*said, *asked]
            arrivals.append(Arrival(time, list(said), num_output))
            said += [1] * num_output  # what the virtual device answers
            time += chance.uniform(5, 30)
    return arrivals


def cache() -> dict[str, Any]:
    """Hit rates and times to the first token with the prefix cache and without."""
    chance = random.Random(5)
    system = tokens(chance, 1500)
    shared = [
        Arrival(time, [*system, *tokens(chance, chance.randint(20, 200))], 100) for time in poisson(chance, 20, 60)
    ]
    results = {}
    for name, arrivals in (("conversations", conversations(chance)), ("system prompt", shared)):
        for caching in (False, True):
            served, _ = serve(arrivals, enable_prefix_caching=caching)
            results[f"{name}, {'cache' if caching else 'no cache'}"] = {
                "hit_rate": sum(entry.num_cached for entry in served) / sum(entry.num_prompt for entry in served),
            } | latencies(served)
    return results


def preemption() -> dict[str, Any]:
    """More sequences than the pool holds, and both ways back; without prefix cache, which would hide the difference."""
    results = {}
    for mode in ("recompute", "swap", "auto"):
        chance = random.Random(6)
        arrivals = [Arrival(0.0, tokens(chance, chance.randint(500, 2000)), 1000) for _ in range(120)]
        served, engine = serve(
            arrivals, num_pages=4000, swap_space_gib=8.0, preemption_mode=mode, enable_prefix_caching=False
        )
        results[mode] = {
            "makespan_s": engine.clock(),
            "preemptions": engine.metrics.preemptions,
            "prompt_tokens_computed": engine.metrics.tokens["prompt"],
        } | latencies(served)
    return results


EXPERIMENTS = {"padding": padding, "gap": gap, "fair": fair, "slo": slo, "cache": cache, "preemption": preemption}


def shown(name: str, results: dict[str, Any]) -> str:
    """A table of an experiment's figures: shares as they are, times by their percentiles."""
    columns: list[str] = []
    lines = []
    for case, figures in results.items():
        flat: dict[str, str] = {}
        for key, value in figures.items():
            if isinstance(value, dict):
                marks = [mark for mark in value if mark in ("p50", "p99", "50", "99.9", "max")]
                flat |= {f"{key} {mark}": f"{value[mark]:.1f}" for mark in marks}
            else:
                flat[key] = f"{value:.3f}" if isinstance(value, float) else str(value)
        columns = list(flat)
        lines.append([case, *flat.values()])
    return report.table([[name, *columns], *lines])


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; argv[0] is the program's name. Returns the exit status.

    Raises:
        UsageError: the command line is wrong.
    """
    flag_values = flags.FlagValues()
    here: dict[str, Any] = {"flag_values": flag_values, "module_name": "Benchmark"}
    flags.DEFINE_multi_enum("only", list(EXPERIMENTS), list(EXPERIMENTS), "Experiments to run.", **here)
    flags.DEFINE_string("out", None, "Results file to write (JSON).", **here)
    if not program.parse(flag_values, "benchmarks.scheduling", __doc__, argv[1:]):
        return 0
    results = {}
    for name in flag_values["only"].value:
        results[name] = EXPERIMENTS[name]()
        print(shown(name, results[name]) + "\n")
    if flag_values["out"].value:
        document = report.document("benchmarks.scheduling", argv, time="virtual", results=results)
        report.write(flag_values["out"].value, document)
    return 0


if __name__ == "__main__":
    program.run(main)
