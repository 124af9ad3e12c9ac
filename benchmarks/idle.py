"""Device idle time as the engine counts it, checked against a profiler trace of the same run, on a GPU.

    python -m benchmarks.idle --model=llama-3.1-8b --out=benchmarks/results/h100_idle.json

The engine calls the device idle while the host knows of no unfinished step; it cannot see gaps between kernels. The
trace can: here the device is busy while any kernel or copy runs, from the first of the run to the last. CUDA graphs
stay on under the profiler, which costs the run some speed, so its rates are not to be quoted.
"""

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
from absl import flags as absl_flags

from benchmarks import offline, program, report, steps, workload
from jax_engine import LLM

#: Kernels within a step follow each other with gaps of about this length, which no scheduling could fill.
LAUNCH_GAP_NS = 20_000
GRAPHS_UNDER_PROFILER = "--xla_enable_command_buffers_during_profiling=true"


def device_spans(folder: str) -> list[tuple[float, float]]:
    """(begin, end) in nanoseconds of everything that the trace's devices ran, in order of begin."""
    spans = []
    for plane, line in steps.trace_lines(folder):
        if plane.startswith("/device:"):
            spans += [(event.start_ns, event.start_ns + event.duration_ns) for event in line.events]
    return sorted(spans)


def gaps(spans: Iterable[tuple[float, float]]) -> list[float]:
    """Lengths of the times between the first begin and the last end in which nothing ran."""
    found, until = [], None
    for begin, end in spans:
        if until is not None and begin > until:
            found.append(begin - until)
        until = end if until is None else max(until, end)
    return found


def main(argv: Sequence[str]) -> int:
    """Runs the check; argv[0] is the program's name. Returns the exit status.

    Raises:
        UsageError: the command line is wrong.
    """
    values = absl_flags.FlagValues()
    here = {"flag_values": values, "module_name": "idle"}
    absl_flags.DEFINE_string("model", "llama-3.1-8b", "A named shape; its weights are dummies.", **here)
    absl_flags.DEFINE_string("workload", "blog32", "As in benchmarks.offline.", **here)
    absl_flags.DEFINE_integer("output", 100, "Tokens of each request: a trace of more is too large.", **here)
    absl_flags.DEFINE_integer("num_pages", None, "Of the engine.", **here)
    absl_flags.DEFINE_string("compilation_cache_dir", None, "Of the engine.", **here)
    absl_flags.DEFINE_string("kernels", None, "Text file to write: every kernel's time, a step.", **here)
    absl_flags.DEFINE_string("out", None, "Results file to write (JSON).", **here)
    if not program.parse(values, "benchmarks.idle", __doc__, argv[1:]):
        return 0
    flags = os.environ.get("XLA_FLAGS", "")
    if GRAPHS_UNDER_PROFILER not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {GRAPHS_UNDER_PROFILER}".strip()
    engine = {name: values[name].value for name in ("model", "num_pages", "compilation_cache_dir")}
    llm = LLM(load_format="dummy", **engine)
    work = workload.load(values["workload"].value)
    work = work.head(len(work.requests), values["output"].value)
    job = offline.Job(work, 0, 0.0, 1.0)
    job.run(llm, work.head(4, 16))
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        with jax.profiler.trace(folder, profiler_options=options):
            run = job.run(llm)
        spans = device_spans(folder)
        if values["kernels"].value:
            steps.write_kernels(steps.kernels(folder), Path(values["kernels"].value), run["engine"]["steps"])
    if not spans:
        print("the trace has no device events: this needs a GPU")
        return 1
    idle = gaps(spans)
    wall = max(end for _, end in spans) - spans[0][0]
    found = {
        "engine_idle_share": run["device_idle_share"],
        "trace_idle_share": sum(gap for gap in idle if gap > LAUNCH_GAP_NS) / wall,
        "trace_gaps_between_kernels_share": sum(gap for gap in idle if gap <= LAUNCH_GAP_NS) / wall,
        "trace_seconds": wall / 1e9,
        "run_seconds": run["wall_s"],
        "events": len(spans),
        "longest_gaps_us": [gap / 1e3 for gap in sorted(idle, reverse=True)[:10]],
    }
    print(report.table([["", ""], *([name, str(value)] for name, value in found.items())]))
    if values["out"].value:
        document = report.document("benchmarks.idle", argv, device=report.jax_device(), **engine, **found)
        report.write(values["out"].value, document)
    return 0


if __name__ == "__main__":
    program.run(main)
