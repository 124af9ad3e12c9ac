"""What the planning commands print: tables of costs, predictions and plans."""

from collections.abc import Mapping

from jax_engine.planning.cost_model import CostModel
from jax_engine.planning.planner import Plan, describe
from jax_engine.planning.simulator import Prediction
from jax_engine.text_table import table

_MS = 1e3
_NS = 1e9


def cost_table(model: CostModel) -> str:
    """A cost model, a line for each bucket and phase."""
    rows = [["bucket", "base, ms", "ns/token", "ns/KV position", "ns/query-key", "steps", "mean error"]]
    for cost in model.buckets:
        name = f"{cost.bucket.num_tokens} {'decode' if cost.bucket.decode_only else 'mixed'}"
        slopes = (cost.per_token, cost.per_kv, cost.per_pair)
        rows.append([name, f"{cost.base * _MS:.3f}", *(f"{slope * _NS:.2f}" for slope in slopes)])
        rows[-1] += [str(cost.steps), f"{cost.error:.1%}"]
    host = [["host", "base, ms", "us/row"]]
    host += [[phase, f"{cost.base * _MS:.3f}", f"{cost.per_row * 1e6:.2f}"] for phase, cost in model.host.items()]
    host.append(["rest of a turn", f"{model.turn * _MS:.3f}", "-"])
    source = f"{model.num_steps} steps on {model.header.device}, device time exact in {model.num_exact}"
    if model.num_exact < model.num_steps // 20:
        source += " (too few: the host was the slower one, and upper bounds were used)"
    return f"{source}\n\n{table(rows)}\n\n{table(host)}"


def prediction_table(predictions: Mapping[str, Prediction]) -> str:
    """Predictions side by side."""
    rows = [["", *predictions]]
    all_of = list(predictions.values())
    rows.append(["requests", *(str(one.figures.num_requests) for one in all_of)])
    rows.append(["refused", *(str(one.figures.num_refused) for one in all_of)])
    rows.append(["duration, s", *(f"{one.figures.duration_s:.1f}" for one in all_of)])
    rows.append(["output tok/s", *(f"{one.figures.output_tok_per_s:.1f}" for one in all_of)])
    for label, name in (
        ("time to first token", "ttft_ms"),
        ("inter-token", "inter_token_ms"),
        ("latency", "latency_ms"),
    ):
        for mark in ("p50", "p90", "p99"):
            rows.append([f"{label} {mark}, ms", *(f"{getattr(one.figures, name)[mark]:.1f}" for one in all_of)])
    rows.append(["device busy", *(f"{one.utilisation:.1%}" for one in all_of)])
    rows.append(["padding", *(f"{one.padding:.1%}" for one in all_of)])
    rows.append(["preemptions", *(str(one.preemptions) for one in all_of)])
    rows.append(["steps", *(str(one.steps) for one in all_of)])
    return table(rows)


def plan_table(plan: Plan) -> str:
    """What was tried, the best marked; load is the share of the tightest target that is used up."""
    mark = plan.targets.percentile
    rows = [["", f"TTFT {mark}, ms", f"inter-token {mark}, ms", "output tok/s", "busy", "padding", "load", ""]]
    for candidate in plan.tried:
        one = candidate.prediction
        note = "best" if candidate is plan.best else "" if candidate.meets else "misses"
        latencies = [f"{values[mark]:.1f}" for values in (one.figures.ttft_ms, one.figures.inter_token_ms)]
        rows.append([describe(candidate), *latencies, f"{one.figures.output_tok_per_s:.1f}", f"{one.utilisation:.0%}"])
        rows[-1] += [f"{one.padding:.0%}", f"{candidate.load:.2f}", note]
    return table(rows)
