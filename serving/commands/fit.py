"""`jax-engine fit`: from a step log to a cost model, for `simulate` and `plan`."""

from collections.abc import Sequence

from absl import flags as absl_flags

from serving import flags
from serving.commands import common


def run(argv: Sequence[str]) -> int:
    """Fits and writes a model. See cli.main for what it raises and returns."""
    flag_values = common.tool_flags()
    absl_flags.DEFINE_string(
        "out", None, "Cost model to write (JSON).", flag_values=flag_values, module_name="Cost model"
    )
    path = common.parse_tool(flag_values, "fit", "LOG", argv)
    if path is None:
        return 0
    out = common.options(flag_values)["out"]
    if out is None:
        raise flags.UsageError("fit: --out is missing")
    from jax_engine.planning import cost_model
    from jax_engine.planning.report import cost_table
    from jax_engine.step_log import LogReader

    log = LogReader(path)
    model = cost_model.fit([log])
    if log.cut_off:
        print("the last line of the log is cut off; fitted from what is before it")
    cost_model.write(out, model)
    print(cost_table(model))
    return 0
