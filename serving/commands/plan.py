"""`jax-engine plan`: the cheapest configuration that meets latency targets for a trace."""

import sys
from collections.abc import Sequence

import msgspec
from absl import flags as absl_flags

from jax_engine import EngineConfig
from serving import flags
from serving.commands import common


def run(argv: Sequence[str]) -> int:
    """0: a configuration meets the targets. 1: none does. See cli.main for what else it raises and returns."""
    flag_values = common.planning_flags()
    here = {"flag_values": flag_values, "module_name": "Targets"}
    absl_flags.DEFINE_float("slo_ttft_ms", None, "Time to first token to stay within.", **here)
    absl_flags.DEFINE_float("slo_itl_ms", None, "Time between two tokens to stay within.", **here)
    absl_flags.DEFINE_enum("slo_percentile", "p99", ["p50", "p90", "p99"], "Of requests and of gaps.", **here)
    absl_flags.DEFINE_integer("max_replicas", 8, "Most engines to think of.", lower_bound=1, upper_bound=1000, **here)
    absl_flags.DEFINE_boolean("json", False, "One JSON object instead of tables.", **here)
    if common.parse_tool(flag_values, "plan", None, argv) is None:
        return 0
    from jax_engine.planning import planner
    from jax_engine.planning.report import plan_table

    given = common.options(flag_values)
    targets = planner.check_targets(given["slo_ttft_ms"], given["slo_itl_ms"], given["slo_percentile"])
    trace, cost = common.trace_and_cost(flag_values, "plan")
    plan = planner.Planner(
        trace,
        cost,
        targets,
        flags.values(flag_values, EngineConfig),
        max_replicas=given["max_replicas"],
        progress=lambda line: print(line, file=sys.stderr),
    ).plan()
    if given["json"]:
        print(msgspec.json.encode(plan).decode())
    else:
        print(f"{plan_table(plan)}\n\n{planner.verdict(plan)}")
    return 0 if plan.best.meets else 1
