"""`jax-engine trace`: makes a trace of requests: from random arrivals and lengths, or from a step log."""

from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags

from serving import flags
from serving.commands import common

_KINDS = ("poisson", "bursty", "log")


def run(argv: Sequence[str]) -> int:
    """Writes a trace. See cli.main for what it raises and returns."""
    flag_values = common.tool_flags()
    here: dict[str, Any] = {"flag_values": flag_values, "module_name": "Trace"}
    kinds = "poisson: independent arrivals. bursty: the same rate in bursts. log: what a step log saw."
    absl_flags.DEFINE_enum("kind", "poisson", _KINDS, kinds, **here)
    absl_flags.DEFINE_string("out", None, "Trace to write (JSONL).", **here)
    absl_flags.DEFINE_string("log", None, "Step log to read, for --kind=log.", **here)
    absl_flags.DEFINE_string("workload", None, "File of lengths to take (see benchmarks/workloads).", **here)
    absl_flags.DEFINE_integer("requests", 1000, "How many.", lower_bound=1, upper_bound=1_000_000, **here)
    absl_flags.DEFINE_float("rate", 1.0, "Requests a second; inf: all at once.", lower_bound=1e-6, **here)
    absl_flags.DEFINE_integer("burst", 10, "Requests of a burst, on average.", lower_bound=1, **here)
    absl_flags.DEFINE_float("prompt_tokens", 200, "Mean of prompts, without a shared prefix.", lower_bound=1, **here)
    absl_flags.DEFINE_float("output_tokens", 100, "Mean of outputs.", lower_bound=1, **here)
    absl_flags.DEFINE_float("spread", 1.0, "Standard deviation of lengths over their mean; 0: all alike.", **here)
    absl_flags.DEFINE_integer("prefix_groups", 0, "Groups of requests with one prefix each; 0: none.", **here)
    absl_flags.DEFINE_integer("prefix_tokens", 200, "Length of such a prefix.", lower_bound=1, **here)
    absl_flags.DEFINE_integer("seed", 0, "Of everything random.", **here)
    if common.parse_tool(flag_values, "trace", None, argv) is None:
        return 0
    options = common.options(flag_values)
    if options["out"] is None:
        raise flags.UsageError("trace: --out is missing")
    if (options["log"] is None) == (options["kind"] == "log"):
        raise flags.UsageError("trace: --log goes with --kind=log")
    from jax_engine.planning import trace

    requests = _from_log(options["log"]) if options["log"] else _made_up(options)
    trace.write(options["out"], requests)
    seconds = requests[-1].arrival_s
    tokens = sum(request.prompt_tokens for request in requests), sum(request.output_tokens for request in requests)
    print(f"{len(requests)} requests in {seconds:.1f} s, {tokens[0]} prompt and {tokens[1]} output tokens")
    return 0


def _from_log(path: str) -> list:
    from jax_engine import ConfigError
    from jax_engine.planning import trace
    from jax_engine.step_log import LogReader

    requests = trace.from_log(LogReader(path))
    if not requests:
        raise ConfigError(f"{path}: no request of this log has any output")
    return requests


def _made_up(options: dict[str, Any]) -> list:
    import numpy as np

    from jax_engine.planning import trace

    chance = np.random.default_rng(options["seed"])
    count, rate = options["requests"], options["rate"]
    known = trace.lengths_of_workload(options["workload"]) if options["workload"] else None
    count = len(known[0]) if known else count
    if options["kind"] == "bursty":
        arrivals = trace.bursty(rate, count, options["burst"], chance)
    else:
        arrivals = trace.poisson(rate, count, chance)
    prompts, outputs = known or (
        trace.lengths(options[name], options["spread"], count, chance) for name in ("prompt_tokens", "output_tokens")
    )
    return trace.make(
        arrivals,
        prompts,
        outputs,
        groups=options["prefix_groups"],
        prefix_tokens=options["prefix_tokens"],
        chance=chance,
    )
