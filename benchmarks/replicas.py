"""Whether several replicas serve as many times the load of one, each on devices of its own.

    python -m benchmarks.replicas --model=llama-3.1-8b --load_format=dummy --data_parallel_size=2 --workload=chat

All replicas serve the whole workload, then one serves its share of the requests, and the whole as well: a batch that
gets smaller towards the end is the same part of a share as of the whole only where each replica has a share.
"""

import dataclasses
import gc
from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags

from benchmarks import offline, program, report, workload
from jax_engine import LLM, EngineConfig
from serving import flags
from serving.commands import common


def share(work: workload.Workload, count: int) -> workload.Workload:
    """The first of `count` shares of the requests."""
    return dataclasses.replace(
        work, name=f"{work.name}, 1/{count}", requests=work.requests[: len(work.requests) // count]
    )


def measure(config: dict[str, Any], works: Sequence[workload.Workload]) -> list[dict[str, Any]]:
    """Starts an engine, runs each workload, and returns their figures."""
    llm = LLM(**config)
    found = []
    for work in works:
        job = offline.Job(work, prompt_seed=0, temperature=0.0, top_p=1.0)
        job.run(llm, work.head(offline.WARMUP_REQUESTS, offline.WARMUP_OUTPUT))
        run = job.run(llm)
        replicas = config["data_parallel_size"]
        found.append({"replicas": replicas, "workload": work.name, "requests": len(work.requests), **run})
        print(f"{replicas} replicas, {work.name}: {run['output_tok_per_s']:.1f} output tok/s", flush=True)
    return found


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; argv[0] is the program's name. Returns the exit status.

    Raises:
        UsageError: the command line is wrong. ConfigError, CheckpointError: the engine cannot be built.
    """
    flag_values = common.engine_flags(log_level="warning")
    here = {"flag_values": flag_values, "module_name": "Benchmark"}
    absl_flags.DEFINE_string("workload", "cpu8", "A JSON file, or a name in benchmarks/workloads/.", **here)
    absl_flags.DEFINE_string("out", None, "Results file to write (JSON).", **here)
    if not common.parse(flag_values, "benchmarks.replicas", __doc__ or "", argv[1:]):
        return 0
    config = {"model": EngineConfig.model} | flags.values(flag_values, EngineConfig)
    count = config.setdefault("data_parallel_size", 2)
    work = workload.load(flag_values["workload"].value)
    runs = measure(config, [work])
    gc.collect()  # what the replicas hold of the devices' memory
    runs += measure(config | {"data_parallel_size": 1}, [share(work, count), work])
    many, own, whole = (run["output_tok_per_s"] for run in runs)
    print(f"{count} replicas over one with a share of the requests: {many / own:.3f}, with all: {many / whole:.3f}")
    if flag_values["out"].value:
        document = report.document("benchmarks.replicas", argv, device=report.jax_device(), config=config, runs=runs)
        report.write(flag_values["out"].value, document)
    return 0


if __name__ == "__main__":
    program.run(main)
