"""What the step log costs: host time of a turn without it, with the memory only, and with a file.

    python -m benchmarks.step_log_host --out=FILE.json

The engine, scheduler and batch builder run at full speed against a device that answers at once, as in
benchmarks.scheduler_host; every sequence decodes. Turns of the three are taken in alternation, so that a drift of the
machine meets all alike. The figure is the median of the differences.
"""

import gc
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks import program, report, scheduler_host
from jax_engine.config import EngineConfig
from jax_engine.step_log import Header, StepLog

KINDS = ("off", "memory", "file")


def flag_set() -> flags.FlagValues:
    """The program's flags."""
    flag_values = flags.FlagValues()
    here: dict[str, Any] = {"flag_values": flag_values, "module_name": "Benchmark"}
    flags.DEFINE_list("running", ["16", "64", "256"], "Numbers of running sequences.", **here)
    flags.DEFINE_integer("steps", 500, "Timed turns of each case.", lower_bound=10, **here)
    flags.DEFINE_string("out", None, "Results file to write (JSON).", **here)
    return flag_values


def make_log(kind: str, load: scheduler_host.Load, folder: str) -> StepLog:
    """A log of that kind for the load's engine."""
    if kind != "file":
        return StepLog(capacity=0 if kind == "off" else 1024)
    header = Header(
        version="benchmark",
        platform="none",
        device="none",
        vocab_size=load.engine.vocab_size,
        max_position_embeddings=load.engine.limits.max_model_len,
        started=0.0,
        config=EngineConfig(),
        limits=load.engine.limits,
    )
    return StepLog(header=header, path=str(Path(folder) / "log"))


def measure(num_running: int, steps: int, folder: str) -> dict[str, float]:
    """Microseconds of a turn with each kind, and of what each adds to `off`; bytes of a step in the file."""
    settings = scheduler_host.Settings(
        steps=steps, prompt=128, output=256, max_inflight_steps=2, output_kind="final_only"
    )
    warm_up = num_running * settings.prompt // scheduler_host.MAX_NUM_BATCHED_TOKENS + scheduler_host.WARMUP_STEPS
    output = steps + 2 * warm_up
    limits = scheduler_host.make_limits(num_running, settings.prompt + output, settings.max_inflight_steps)
    loads = {kind: scheduler_host.Load(limits, settings, num_running, output, []) for kind in KINDS}
    for kind, load in loads.items():
        load.engine.step_log = make_log(kind, load, folder)
        for _ in range(warm_up):
            load.step()
    log = loads["file"].engine.step_log
    log.flush()
    before = (Path(folder) / "log").stat().st_size
    gc.collect()
    samples = [{kind: load.step()["total"] for kind, load in loads.items()} for _ in range(steps)]
    log.close()
    result = {kind: statistics.median(sample[kind] for sample in samples) for kind in KINDS}
    for kind in KINDS[1:]:
        result[f"{kind}_adds"] = statistics.median(sample[kind] - sample["off"] for sample in samples)
    result["file_bytes_per_step"] = ((Path(folder) / "log").stat().st_size - before) / steps
    return result


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; argv[0] is the program's name. Returns the exit status.

    Raises:
        UsageError: the command line is wrong.
    """
    flag_values = flag_set()
    if not program.parse(flag_values, "benchmarks.step_log_host", __doc__, argv[1:]):
        return 0
    options = {name: flag_values[name].value for name in flag_values}
    with tempfile.TemporaryDirectory() as folder:
        results = {number: measure(int(number), options["steps"], folder) for number in options["running"]}
    rows = [["host time per turn, us", *KINDS, "memory adds", "file adds", "bytes per step"]]
    for number, result in results.items():
        rows.append([f"{number} running", *(f"{value:.0f}" for value in result.values())])
    print(report.table(rows))
    if options["out"]:
        report.write(options["out"], report.document("benchmarks.step_log_host", argv, us_per_turn=results))
    return 0


if __name__ == "__main__":
    program.run(main)
