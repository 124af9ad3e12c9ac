"""`jax-engine simulate`: what an engine would do with a trace, from the real scheduler in virtual time."""

from collections.abc import Sequence

import msgspec
from absl import flags as absl_flags

from jax_engine import EngineConfig
from serving import flags
from serving.commands import common


def run(argv: Sequence[str]) -> int:
    """Predicts. See cli.main for what it raises and returns."""
    flag_values = common.planning_flags()
    here = {"flag_values": flag_values, "module_name": "Simulation"}
    absl_flags.DEFINE_integer("replicas", 1, "Engines that share the trace, each in turn.", lower_bound=1, **here)
    absl_flags.DEFINE_boolean("json", False, "One JSON object instead of a table.", **here)
    if common.parse_tool(flag_values, "simulate", None, argv) is None:
        return 0
    trace, cost = common.trace_and_cost(flag_values, "simulate")
    from jax_engine.planning.report import prediction_table
    from jax_engine.planning.simulator import simulate

    given = common.options(flag_values)
    prediction = simulate(trace, cost, flags.values(flag_values, EngineConfig), replicas=given["replicas"])
    if given["json"]:
        print(msgspec.json.encode(prediction).decode())
    else:
        print(prediction_table({"predicted": prediction}))
    return 0
