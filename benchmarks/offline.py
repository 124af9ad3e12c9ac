"""Offline benchmark: a whole workload at once through `LLM.generate`, in one or several scheduling modes.

    python -m benchmarks.offline --model=llama-3.1-8b --load_format=dummy --workload=skewed --compare=static,sync,async

Prompts are random token ids, the same in every run; output lengths are forced. Each engine is warmed up with a few
requests before anything is timed. With --compare every round runs each mode once, so that a drift of the machine
meets all of them alike. Figures are those of the run of median throughput.
"""

import dataclasses
import sys
import time
import uuid
from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags

from benchmarks import report, workload
from jax_engine import LLM, ConfigError, EngineConfig, RequestOutput, SamplingParams
from serving import cli, flags
from serving.commands import common

WARMUP_REQUESTS = 4
WARMUP_OUTPUT = 16
MS = 1e3


def flag_set() -> absl_flags.FlagValues:
    """The engine's flags and the benchmark's own."""
    flag_values = common.engine_flags(log_level="warning")
    here = {"flag_values": flag_values, "module_name": "Benchmark"}
    absl_flags.DEFINE_list("workload", "cpu8", "JSON files, or names in benchmarks/workloads/, in turn.", **here)
    absl_flags.DEFINE_string("out", None, "Results file to write (JSON); {workload}: its name.", **here)
    absl_flags.DEFINE_list("compare", None, "Scheduling modes to run side by side, the first as baseline.", **here)
    absl_flags.DEFINE_integer("repeat", 1, "Timed runs of each mode.", lower_bound=1, **here)
    absl_flags.DEFINE_float("temperature", 0.0, "Of every request; 0 is greedy.", **here)
    absl_flags.DEFINE_float("top_p", 1.0, "Of every request.", **here)
    absl_flags.DEFINE_integer("prompt_seed", 0, "Of the random prompts.", **here)
    return flag_values


@dataclasses.dataclass(frozen=True)
class Job:
    """What is run: the same for every mode."""

    work: workload.Workload
    prompt_seed: int
    temperature: float
    top_p: float

    def params(self, work: workload.Workload) -> list[SamplingParams]:
        """One per request, with its output length forced and its own seed."""
        return [
            SamplingParams(
                temperature=self.temperature,
                top_p=self.top_p,
                seed=index,
                max_tokens=output,
                min_tokens=output,
                ignore_eos=True,
                detokenize=False,
            )
            for index, (_, output) in enumerate(work.requests)
        ]

    def run(self, llm: LLM, work: workload.Workload | None = None) -> dict[str, Any]:
        """Runs the workload once, timed, and returns its figures. No run finds the prefixes that another has cached.

        Raises:
            RuntimeError: a request did not give the number of tokens asked for.
        """
        work = work or self.work
        prompts = work.prompts(llm.vocab_size, self.prompt_seed)
        params = self.params(work)
        llm.reset_metrics()
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False, cache_salt=uuid.uuid4().hex)
        wall = time.perf_counter() - start
        for index, (output, (_, wanted)) in enumerate(zip(outputs, work.requests, strict=True)):
            got = len(output.outputs[0].token_ids)
            if got != wanted:
                raise RuntimeError(f"request {index} gave {got} tokens instead of {wanted}: {output.error}")
        return figures(work, outputs, wall) | engine_figures(llm.metrics.snapshot())


def figures(work: workload.Workload, outputs: Sequence[RequestOutput], wall: float) -> dict[str, Any]:
    """Throughput and latencies, as a client sees them. Times in milliseconds but for wall_s."""
    first, latency, gaps = [], [], []
    for output in outputs:
        metrics, count = output.metrics, len(output.outputs[0].token_ids)
        first.append((metrics.first_token_time - metrics.arrival_time) * MS)
        latency.append((metrics.finished_time - metrics.arrival_time) * MS)
        if count > 1:
            gaps.append((metrics.last_token_time - metrics.first_token_time) / (count - 1) * MS)
    return {
        "wall_s": wall,
        "output_tok_per_s": work.total_output / wall,
        "total_tok_per_s": (work.total_prompt + work.total_output) / wall,
        "requests_per_s": len(work.requests) / wall,
        "ttft_ms": report.percentiles(first),
        "inter_token_ms": report.percentiles(gaps),
        "latency_ms": report.percentiles(latency),
    }


def engine_figures(snapshot: dict[str, Any]) -> dict[str, Any]:
    """What the engine counted itself: host time, idle device, padding."""
    steps = max(snapshot["steps"], 1)
    wall = snapshot["wall_seconds"]
    idle = {cause: seconds / wall for cause, seconds in snapshot["device_idle_seconds"].items()}
    return {
        "host_ms_per_step": {phase: seconds / steps * MS for phase, seconds in snapshot["host_seconds"].items()},
        "device_idle_share": sum(idle.values()),
        "device_idle_share_by_cause": idle,
        "padding_share": snapshot["padding_tokens"] / max(snapshot["batched_tokens"], 1),
        "engine": snapshot,
    }


def check_pools(engines: dict[str, LLM]) -> None:
    """Refuses a comparison of engines with unlike KV pools: the first one built may leave the others less memory.

    Raises:
        ConfigError: the pools differ.
    """
    pools = {mode: llm.limits.num_pages for mode, llm in engines.items()}
    if len(set(pools.values())) > 1:
        raise ConfigError(f"the engines' KV pools differ, pages by mode: {pools}; give each the same with --num_pages")


def median_run(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run of median throughput (of two middle ones, the slower)."""
    return sorted(runs, key=lambda run: run["output_tok_per_s"])[(len(runs) - 1) // 2]


def ratios(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Output throughput of each mode over the first one's: of the medians, and the least and most of any round."""
    (_, base), *others = runs.items()
    result = {}
    for mode, own in others:
        rounds = [a["output_tok_per_s"] / b["output_tok_per_s"] for a, b in zip(own, base, strict=True)]
        median = median_run(own)["output_tok_per_s"] / median_run(base)["output_tok_per_s"]
        result[mode] = {"median": median, "min": min(rounds), "max": max(rounds)}
    return result


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """The median runs side by side."""
    columns = {mode: median_run(own) for mode, own in runs.items()}
    any_run = next(iter(columns.values()))
    rows = [["", *columns]]
    for label, key in (
        ("output tok/s", "output_tok_per_s"),
        ("total tok/s", "total_tok_per_s"),
        ("requests/s", "requests_per_s"),
    ):
        rows.append([label, *(f"{run[key]:.2f}" for run in columns.values())])
    for label, key in (("time to first token", "ttft_ms"), ("inter-token", "inter_token_ms")):
        for mark in (f"p{mark}" for mark in report.PERCENTILES):
            rows.append([f"{label} {mark}, ms", *(_cell(run[key], mark) for run in columns.values())])
    for phase in any_run["host_ms_per_step"]:
        rows.append([f"host {phase}/step, ms", *(_cell(run["host_ms_per_step"], phase) for run in columns.values())])
    rows.append(["device idle", *(f"{run['device_idle_share']:.1%}" for run in columns.values())])
    rows.append(["padding", *(f"{run['padding_share']:.1%}" for run in columns.values())])
    rows.append(["compiles after ready", *(str(run["compiles_after_ready"]) for run in columns.values())])
    return report.table(rows)


def _cell(values: dict[str, float] | None, key: str) -> str:
    return f"{values[key]:.3f}" if values else "-"


def compare(job: Job, engines: dict[str, LLM], repeat: int) -> dict[str, list[dict[str, Any]]]:
    """Warms every engine up, then runs each once a round. Returns the runs of each mode."""
    # Compilations are counted for the whole process: building the later engines counted for the earlier ones.
    compiled = {mode: llm.metrics.compiles_after_ready for mode, llm in engines.items()}
    for llm in engines.values():
        job.run(llm, job.work.head(WARMUP_REQUESTS, WARMUP_OUTPUT))
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in engines}
    for round_number in range(repeat):
        for mode, llm in engines.items():
            run = job.run(llm)
            run["compiles_after_ready"] = llm.metrics.compiles_after_ready - compiled[mode]
            runs[mode].append(run)
            print(
                f"round {round_number + 1} of {repeat}, {mode}: {run['output_tok_per_s']:.2f} output tok/s", flush=True
            )
    return runs


def results(argv: Sequence[str], job: Job, config: dict, engines: dict[str, LLM], runs: dict) -> dict[str, Any]:
    """What is written of one workload."""
    work = job.work
    return report.document(
        "benchmarks.offline",
        argv,
        device=report.jax_device(),
        workload={"name": work.name, "about": work.about, "requests": len(work.requests)},
        sampling={"temperature": job.temperature, "top_p": job.top_p, "prompt_seed": job.prompt_seed},
        config={"model": EngineConfig.model} | config,
        limits={mode: dataclasses.asdict(llm.limits) for mode, llm in engines.items()},
        ratios=ratios(runs),
        runs=runs,
    )


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; argv[0] is the program's name. Returns the exit status.

    Raises:
        UsageError: the command line is wrong. ConfigError, CheckpointError: the engine cannot be built.
    """
    flag_values = flag_set()
    if not common.parse(flag_values, "bench", __doc__ or "", argv[1:]):
        return 0
    config = flags.values(flag_values, EngineConfig)
    modes = flag_values["compare"].value or [config.get("scheduling", EngineConfig.scheduling)]
    works = [workload.load(source) for source in flag_values["workload"].value]
    out = flag_values["out"].value
    if out and len(works) > 1 and "{workload}" not in out:
        raise ConfigError(f"--out={out} must contain {{workload}}, as there are {len(works)} workloads")
    engines = {mode: LLM(**(config | {"scheduling": mode})) for mode in modes}
    check_pools(engines)
    for work in works:
        job = Job(work, *(flag_values[name].value for name in ("prompt_seed", "temperature", "top_p")))
        runs = compare(job, engines, flag_values["repeat"].value)
        print(f"\n{work.name}: {work.about}\n\n{table(runs)}", flush=True)
        for mode, ratio in ratios(runs).items():
            print(f"{mode} over {modes[0]}: {ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})")
        if out:
            report.write(out.replace("{workload}", work.name), results(argv, job, config, engines, runs))
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(["bench", *sys.argv[1:]]))
