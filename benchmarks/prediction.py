"""Prediction against reality: traces through the real engine in open loop, and through the simulator.

    python -m benchmarks.prediction --logs=FOLDER --record           # runs the engine, in real time
    python -m benchmarks.prediction --logs=FOLDER --out=FILE.json    # fits, simulates, compares

A trace is predicted with a cost model fitted from a calibration trace that runs before and after it, never from its own
log; what that would give is written down beside it, as the part of the error that is not the calibration's. Recording
and comparing are apart, and --traces chooses, so that the machine has to be quiet only for a minute at
a time. A prediction is within bounds if throughput is off by at most 10 %, and the median and the 99th percentile of
the time to first token by at most 25 %.
"""

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from absl import flags

from benchmarks import program, report
from checkpoints.formats import open_checkpoint
from jax_engine.config import EngineConfig
from jax_engine.engine import Engine
from jax_engine.planning import cost_model, trace
from jax_engine.planning.simulator import simulate
from jax_engine.planning.traffic import Figures, drive, figures
from jax_engine.step_log import LogReader, StepLog

CALIBRATION = "calibration"
#: Requests that come at once, time after time.
CALIBRATION_GROUPS = (1, 4, 2, 12, 3, 5, 1, 9, 2)
#: How far a prediction may be off: figure -> largest relative error.
BOUNDS = {"output_tok_per_s": 0.10, "ttft_p50_ms": 0.25, "ttft_p99_ms": 0.25}


def flag_set() -> flags.FlagValues:
    """The program's flags."""
    flag_values = flags.FlagValues()
    here: dict[str, Any] = {"flag_values": flag_values, "module_name": "Benchmark"}
    flags.DEFINE_string("logs", None, "Folder of the traces, step logs and figures.", required=True, **here)
    flags.DEFINE_boolean("record", False, "Run the real engine; else compare what lies in the folder.", **here)
    flags.DEFINE_string("model", EngineConfig.model, "See EngineConfig.model.", **here)
    flags.DEFINE_string("scheduling", "async", "See EngineConfig.scheduling.", **here)
    flags.DEFINE_float("rate", 1.8, "Requests a second of the traces.", **here)
    flags.DEFINE_float("seconds", 36.0, "Length of each trace's arrivals.", **here)
    flags.DEFINE_list("traces", ["poisson", "bursty", "prefix"], "Which of them to run.", **here)
    flags.DEFINE_string("out", None, "Results file to write (JSON).", **here)
    return flag_values


def make_trace(name: str, rate: float, seconds: float) -> list[trace.TraceRequest]:
    """One of the traces that are predicted; each has lengths and seed of its own."""
    chance = np.random.default_rng({"poisson": 1, "bursty": 2, "prefix": 3}[name])
    count = max(2, round(rate * seconds))
    arrivals = trace.bursty(rate, count, 6, chance) if name == "bursty" else trace.poisson(rate, count, chance)
    prompt, output = {"poisson": (60, 12), "bursty": (100, 10), "prefix": (40, 12)}[name]
    groups = 3 if name == "prefix" else 0
    return trace.make(
        arrivals,
        trace.lengths(prompt, 0.8, count, chance),
        trace.lengths(output, 0.6, count, chance),
        groups=groups,
        prefix_tokens=64,
        chance=chance,
    )


def make_calibration() -> list[trace.TraceRequest]:
    """Groups of every size, so that every bucket is used often and at several times; and single requests that join
    them, for steps that mix prompts with decoding. It has nothing of the traces that are predicted."""
    chance = np.random.default_rng(0)
    arrivals, now = [], 0.0
    for size in CALIBRATION_GROUPS:
        arrivals += [now] * size + [now + 0.3, now + 0.8]
        now += 1.4 + 0.18 * size
    count = len(arrivals)
    return trace.make(
        sorted(arrivals), trace.lengths(60, 0.7, count, chance), trace.lengths(12, 0.5, count, chance), chance=chance
    )


class Recorder:
    """The real engine: one set of compiled steps, and a fresh scheduler for every run."""

    def __init__(self, folder: Path, model: str, scheduling: str):
        from jax_engine.model_runner import ModelRunner

        self.folder = folder
        # Short contexts and few sequences: on a CPU a longer trace would take minutes.
        self.config = EngineConfig(
            model=model, scheduling=scheduling, max_model_len=1024, max_num_seqs=16, max_num_batched_tokens=256
        )
        checkpoint = open_checkpoint(self.config.model)
        self.runner = ModelRunner(self.config, checkpoint)

    def run(self, requests: Sequence[trace.TraceRequest], name: str) -> None:
        """One trace in real time; leaves its step log and what it showed in the folder."""
        from jax_engine.start import log_header

        log = StepLog(header=log_header(self.config, self.runner), path=str(self.folder / f"{name}.log"))
        vocab_size = self.runner.model_config.vocab_size
        engine = Engine(self.runner, None, vocab_size=vocab_size, eos_token_ids=(), config=self.config, step_log=log)
        prompts = list(trace.prompts(requests, vocab_size))
        before = CpuTime.now()
        seen = drive(engine, requests, prompts, lambda moment: time.sleep(max(0.0, moment - time.monotonic())))
        others = CpuTime.now().share_of_others(before)
        log.close()
        found = Real(figures(seen), others)
        (self.folder / f"{name}.json").write_bytes(msgspec.json.encode(found))
        print(
            f"{name}: {found.figures.duration_s:.1f} s, {found.figures.output_tok_per_s:.1f} output tok/s, "
            f"{others:.0%} of the processor taken by others",
            flush=True,
        )


@dataclasses.dataclass(frozen=True)
class Real:
    """What a real run showed, and the share of the machine's processor time that other processes took meanwhile."""

    figures: Figures
    others: float


@dataclasses.dataclass(frozen=True)
class CpuTime:
    """Processor seconds of this process and of all, so that a disturbed measurement can be told."""

    own: float
    busy: float
    total: float

    @classmethod
    def now(cls) -> "CpuTime":
        """As /proc/stat has it."""
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        tick = os.sysconf("SC_CLK_TCK")
        times = os.times()
        return cls(times.user + times.system, (sum(fields) - fields[3] - fields[4]) / tick, sum(fields) / tick)

    def share_of_others(self, before: "CpuTime") -> float:
        """Of the time since `before`."""
        others = (self.busy - before.busy) - (self.own - before.own)
        return max(0.0, others) / max(self.total - before.total, 1e-9)


def record(folder: Path, options: dict[str, Any]) -> None:
    """Runs each trace, and the calibration trace before and after it."""
    folder.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(folder, options["model"], options["scheduling"])
    calibration = make_calibration()
    recorder.run(calibration[:9], "warm-up")
    for name in options["traces"]:
        requests = make_trace(name, options["rate"], options["seconds"])
        trace.write(str(folder / f"{name}.trace"), requests)
        recorder.run(calibration, f"{name}-{CALIBRATION}-before")
        recorder.run(requests, name)
        recorder.run(calibration, f"{name}-{CALIBRATION}-after")


def compare(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Prediction and reality of each trace, and how far they are apart."""
    results = {}
    for name in names:
        logs = [str(folder / f"{name}-{CALIBRATION}-{when}.log") for when in ("before", "after")]
        model = cost_model.fit([LogReader(log) for log in logs])
        own = cost_model.fit([LogReader(str(folder / f"{name}.log"))])
        requests = trace.read(str(folder / f"{name}.trace"))
        real = json.loads((folder / f"{name}.json").read_text())
        predicted, from_own = (msgspec.to_builtins(simulate(requests, fitted)) for fitted in (model, own))
        errors = _errors(predicted, real)
        results[name] = {
            "real": real,
            "predicted": predicted,
            "error": errors,
            "within_bounds": {figure: abs(errors[figure]) <= bound for figure, bound in BOUNDS.items()},
            "error_if_fitted_on_itself": _errors(from_own, real),
            "cost_model": msgspec.to_builtins(model),
        }
    return results


def _errors(predicted: dict[str, Any], real: dict[str, Any]) -> dict[str, float]:
    """Relative errors of the figures."""
    flat = _flat(predicted["figures"])
    return {figure: flat[figure] / value - 1 for figure, value in _flat(real["figures"]).items() if value}


def _flat(found: dict[str, Any]) -> dict[str, float]:
    flat = {"output_tok_per_s": found["output_tok_per_s"]}
    for name, short in (("ttft_ms", "ttft"), ("inter_token_ms", "inter_token"), ("latency_ms", "latency")):
        flat |= {f"{short}_{mark}_ms": found[name][mark] for mark in ("p50", "p90", "p99")}
    return flat


def table(results: dict[str, Any]) -> str:
    """Real, predicted and error, figure by figure."""
    rows = [["", *(f"{name} {what}" for name in results for what in ("real", "predicted", "error"))]]
    for figure in _flat(next(iter(results.values()))["real"]["figures"]):
        cells = []
        for result in results.values():
            real, predicted = _flat(result["real"]["figures"])[figure], _flat(result["predicted"]["figures"])[figure]
            cells += [f"{real:.1f}", f"{predicted:.1f}", f"{result['error'].get(figure, 0.0):+.1%}"]
        rows.append([figure.replace("_", " "), *cells])
    return report.table(rows)


def main(argv: Sequence[str]) -> int:
    """Runs one half of the benchmark; argv[0] is the program's name. Returns the exit status.

    Raises:
        UsageError: the command line is wrong. ConfigError: the folder does not hold what is to be compared.
    """
    flag_values = flag_set()
    if not program.parse(flag_values, "benchmarks.prediction", __doc__, argv[1:]):
        return 0
    options = {name: flag_values[name].value for name in flag_values}
    folder = Path(options["logs"])
    if options["record"]:
        record(folder, options)
        return 0
    found = compare(folder, options["traces"])
    print(table(found))
    if options["out"]:
        within = all(all(result["within_bounds"].values()) for result in found.values())
        document = report.document("benchmarks.prediction", argv, bounds=BOUNDS, within_bounds=within, traces=found)
        report.write(options["out"], document)
    return 0


if __name__ == "__main__":
    program.run(main)
