"""Traces, cost models, the simulator and the planner; and their commands, from a log to a plan."""

import json

import msgspec
import numpy as np
import pytest

from jax_engine.batch import Bucket
from jax_engine.errors import ConfigError
from jax_engine.planning import cost_model, planner, trace
from jax_engine.planning.cost_model import CostModel, Work
from jax_engine.planning.simulator import simulate
from jax_engine.planning.trace import TraceError
from jax_engine.planning.traffic import Seen, figures
from jax_engine.replay import Replay
from jax_engine.step_log import Done, LogReader, Step
from serving.cli import main
from tests.planning import VOCAB, make_cost, random_trace, requests_of

# Traces.


@pytest.mark.parametrize("kind", ["poisson", "bursty"])
def test_arrivals_have_their_mean_rate(kind):
    chance = np.random.default_rng(1)
    arrivals = trace.poisson(5, 20_000, chance) if kind == "poisson" else trace.bursty(5, 20_000, 10, chance)
    assert arrivals[0] == 0 and arrivals == sorted(arrivals)
    assert len(arrivals) / arrivals[-1] == pytest.approx(5, rel=0.05)
    gaps = np.diff(arrivals)
    variation = gaps.std() / gaps.mean()
    assert variation == pytest.approx(1, rel=0.05) if kind == "poisson" else variation > 2.5


def test_lengths_have_their_mean_and_spread():
    chance = np.random.default_rng(2)
    drawn = np.array(trace.lengths(200, 0.5, 20_000, chance))
    assert drawn.mean() == pytest.approx(200, rel=0.02) and drawn.std() / drawn.mean() == pytest.approx(0.5, rel=0.05)
    assert set(trace.lengths(7, 0, 10, chance)) == {7}


def test_a_trace_survives_its_file(tmp_path):
    made = random_trace(50, 3, groups=4, prefix_tokens=40)
    made += requests_of((1.0, 5, 6), priority=2, user="a", ends="stop")
    trace.write(str(tmp_path / "t"), made)
    assert trace.read(str(tmp_path / "t")) == sorted(made, key=lambda request: request.arrival_s)


def test_prefix_groups_share_their_beginning_and_nothing_else():
    made = random_trace(40, 3, groups=3, prefix_tokens=50)
    all_prompts = list(trace.prompts(made, VOCAB))
    assert all_prompts == list(trace.prompts(made, VOCAB)), "the same trace, the same prompts"
    assert {request.prefix_group for request in made} == {"group-0", "group-1", "group-2"}
    for one, prompt in zip(made, all_prompts, strict=True):
        assert len(prompt) == one.prompt_tokens and min(prompt) >= 1 and max(prompt) < VOCAB
        for other, others in zip(made, all_prompts, strict=True):
            same = one.prefix_group == other.prefix_group
            assert (prompt[:50] == others[:50]) == same


def test_a_workload_becomes_a_trace(tmp_path, capsys):
    work, out = tmp_path / "work.json", str(tmp_path / "t")
    work.write_text('{"name": "w", "requests": [[5, 6], [7, 8]]}')
    assert main(["trace", "--workload", str(work), "--rate=inf", "--out", out]) == 0
    assert [(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in trace.read(out)] == [(0, 5, 6), (0, 7, 8)]
    work.write_text('{"requests": []}')
    assert main(["trace", "--workload", str(work), "--out", out]) == 1
    assert "length >= 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":1: Input data was truncated"),
        ('{"arrival_s": 0, "prompt_tokens": 1}', "missing required field `output_tokens`"),
        ('{"arrival_s": -1, "prompt_tokens": 1, "output_tokens": 1}', "Expected `float` >= 0"),
        ('{"arrival_s": 0, "prompt_tokens": 0, "output_tokens": 1}', "Expected `int` >= 1"),
        ('{"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1, "x": 1}', "unknown field `x`"),
        ('{"arrival_s": 0, "prompt_tokens": 9, "output_tokens": 1, "prefix_group": "a"}', "prefix_tokens"),
        ("\n", "holds no request"),
    ],
)
def test_what_is_no_trace_is_told(tmp_path, line, message):
    path = tmp_path / "t"
    path.write_text(line)
    with pytest.raises(TraceError, match=message):
        trace.read(str(path))


@pytest.mark.parametrize("ends", ["length", "stop"])
@pytest.mark.parametrize("scheduling", ["static", "sync", "async"])
def test_a_trace_comes_back_from_the_log_of_its_run(tmp_path, ends, scheduling):
    path = str(tmp_path / "log")
    made = [msgspec.structs.replace(request, ends=ends) for request in random_trace(40, 5, groups=2, prefix_tokens=40)]
    simulate(made, make_cost(), {"step_log": path, "scheduling": scheduling})
    assert Replay(LogReader(path)).run() is None
    back = trace.from_log(LogReader(path))
    assert [(r.prompt_tokens, r.output_tokens, r.ends) for r in back] == [
        (r.prompt_tokens, r.output_tokens, r.ends) for r in made
    ]
    assert [r.arrival_s for r in back] == pytest.approx([r.arrival_s for r in made], abs=1e-5)
    names = {}
    for one, other in zip(made, back, strict=True):
        assert names.setdefault(one.prefix_group, other.prefix_group) == other.prefix_group
        assert other.prefix_tokens in (40, other.prompt_tokens)  # a group's first prompt has all in common with itself


# Costs.


def write_log(path, cost: CostModel, samples, *, compiled=(), exact=True) -> None:
    """A log of steps of (bucket, rows), whose device times are the cost model's."""
    lines = [msgspec.json.encode(cost.header)]
    for number, (bucket, rows) in enumerate(samples):
        seconds = cost.device_seconds(bucket, Work.of(rows)) + (5.0 if number in compiled else 0.0)
        decision = {"rows": [[*row, True] for row in rows], "num_tokens": sum(row[2] for row in rows)}
        host = [1e-4 + 1e-5 * len(rows), 2e-4, 3e-4 + (5.0 if number in compiled else 0.0)]
        step = Step(number, number * 1.0, decision, bucket, 5, 5, 0, host, int(number in compiled))
        lines += [msgspec.json.encode(step)]
        lines += [msgspec.json.encode(Done(number, number + 0.5, seconds, exact, 0.1, 5e-4 + 1e-5 * len(rows)))]
    path.write_bytes(b"\n".join(lines) + b"\n")


def random_steps(cost: CostModel, count: int, seed: int = 0) -> list:
    chance = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        if chance.random() < 0.6:
            size = int(chance.choice([1, 2, 4, 8]))
            rows = [(n, int(chance.integers(1, 900)), 1) for n in range(chance.integers(size // 2 + 1, size + 1))]
            samples.append((Bucket(size, size, True), rows))
        else:
            chunk = int(chance.integers(2, 60))
            rows = [(0, int(chance.integers(1, 900)), 1), (1, int(chance.integers(0, 500)), chunk)]
            samples.append((Bucket(64, 8, False), rows))
    return samples


def test_a_fit_finds_the_costs_again(tmp_path):
    cost = make_cost()
    write_log(tmp_path / "log", cost, random_steps(cost, 400), compiled={100, 200})
    found = cost_model.fit([LogReader(str(tmp_path / "log"))])
    assert found.num_steps == 400 and found.num_exact == 398
    assert max(bucket.error for bucket in found.buckets) < 1e-6
    for bucket, rows in random_steps(cost, 50, seed=9):
        assert found.device_seconds(bucket, Work.of(rows)) == pytest.approx(
            cost.device_seconds(bucket, Work.of(rows)), rel=1e-6
        )
    assert found.host["schedule"].seconds(4) == pytest.approx(1.4e-4) and found.host["commit"].seconds(4) == (
        pytest.approx(5.4e-4)
    )
    assert found.stalls.every == 200 and found.stalls.seconds == pytest.approx(5, rel=0.01)
    cost_model.write(str(tmp_path / "cost"), found)
    assert cost_model.read(str(tmp_path / "cost")) == found


def test_noise_gives_no_absurd_slopes(tmp_path):
    cost = make_cost()
    chance = np.random.default_rng(3)
    samples = random_steps(cost, 60)
    write_log(tmp_path / "log", cost, samples)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    for line in lines:
        if line["type"] == "done":
            line["device"] *= float(chance.lognormal(0, 0.3))
    (tmp_path / "log").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = cost_model.fit([LogReader(str(tmp_path / "log"))])
    for bucket, rows in samples:
        ratio = found.device_seconds(bucket, Work.of(rows)) / cost.device_seconds(bucket, Work.of(rows))
        assert 0.5 < ratio < 2


def test_a_bucket_never_seen_lies_between_its_neighbours():
    cost = make_cost()
    work = Work(3, 0, 0)
    assert cost.device_seconds(Bucket(6, 6, True), work) == pytest.approx(6e-3)
    assert cost.device_seconds(Bucket(16, 16, True), work) == pytest.approx(16e-3)
    assert cost.device_seconds(Bucket(32, 8, False), work) == cost.device_seconds(Bucket(64, 8, False), work)
    only_decode = msgspec.structs.replace(cost, buckets=[one for one in cost.buckets if one.bucket.decode_only])
    assert only_decode.device_seconds(Bucket(64, 8, False), work) == pytest.approx(64e-3)


def test_upper_bounds_are_used_where_there_is_nothing_better(tmp_path):
    cost = make_cost()
    write_log(tmp_path / "log", cost, random_steps(cost, 50), exact=False)
    found = cost_model.fit([LogReader(str(tmp_path / "log"))])
    assert found.num_exact == 0 and found.buckets


def test_what_cannot_be_fitted_or_read_is_told(tmp_path):
    cost = make_cost()
    write_log(tmp_path / "log", cost, random_steps(cost, 5))
    with pytest.raises(cost_model.CostError, match="5 finished steps; at least 8"):
        cost_model.fit([LogReader(str(tmp_path / "log"))])
    (tmp_path / "x").write_text("{}")
    with pytest.raises(cost_model.CostError, match="no cost model of this version"):
        cost_model.read(str(tmp_path / "x"))
    with pytest.raises(cost_model.CostError, match="cannot be read"):
        cost_model.read(str(tmp_path / "y"))


def test_figures_of_what_clients_saw():
    seen = [Seen(1.0, [1.5, 1.6, 1.8], 1.9), Seen(2.0, [2.1, 2.2], 2.2), Seen(2.0, refused="full")]
    found = figures(seen)
    assert found.num_refused == 1 and found.duration_s == pytest.approx(1.2)
    assert found.output_tok_per_s == pytest.approx(5 / 1.2)
    assert found.ttft_ms["mean"] == pytest.approx(300) and found.ttft_ms["max"] == pytest.approx(500)
    assert found.inter_token_ms["p50"] == pytest.approx(100) and found.inter_token_ms["max"] == pytest.approx(200)
    assert figures([Seen(0.0, refused="full")]).output_tok_per_s == 0


# The planner.


def plan_for(load, cost, ttft=None, itl=None, **options) -> planner.Plan:
    return planner.Planner(load, cost, planner.check_targets(ttft, itl, "p99"), {}, **options).plan()


def test_a_plan_takes_the_fewest_replicas_that_meet_the_targets():
    load = random_trace(150, 60, seed=7)
    cost = make_cost(host_ms=0.2)
    plan = plan_for(load, cost, ttft=400)
    assert plan.best.meets and plan.best.replicas > 1
    assert plan.best.prediction.figures.ttft_ms["p99"] <= 400
    fewer = [candidate for candidate in plan.tried if candidate.replicas == plan.best.replicas - 1]
    assert fewer and not any(candidate.meets for candidate in fewer)
    assert set(plan.simpler) == {"sync", "static", "largest buckets only"}
    assert "meets the targets" in planner.verdict(plan)


def test_a_plan_says_when_a_simpler_mode_does_as_well():
    load = requests_of(*[(n * 1.0, 20, 5) for n in range(30)])
    plan = plan_for(load, make_cost(), ttft=200)
    assert plan.best.replicas == 1 and plan.best.options == {}, "the measured configuration is kept where it is enough"
    assert "`sync` does as well" in planner.verdict(plan)


def test_a_plan_says_why_nothing_meets_the_targets():
    load = requests_of(*[(n * 1.0, 20, 5) for n in range(10)])
    plan = plan_for(load, make_cost(), ttft=1, max_replicas=2)
    assert not plan.best.meets and "the step itself is too slow" in planner.verdict(plan)
    crowded = plan_for(random_trace(100, 80, seed=8), make_cost(), ttft=40, max_replicas=1)
    assert "More replicas may help" in planner.verdict(crowded)
    with pytest.raises(ConfigError, match="slo_ttft_ms or --slo_itl_ms"):
        planner.check_targets(None, None, "p99")


# The commands.


def test_from_a_log_to_a_plan(tmp_path, capsys):
    files = {name: str(tmp_path / name) for name in ("made", "log", "own", "cost", "fitted")}
    cost_model.write(files["cost"], make_cost(host_ms=0.3))
    make = ["trace", "--requests=120", "--rate=15", "--prompt-tokens=60", "--output-tokens=20", "--out", files["made"]]
    assert main([*make, "--kind=bursty", "--prefix-groups=2", "--prefix-tokens=32"]) == 0
    assert "120 requests" in capsys.readouterr().out
    both = ["--trace", files["made"], "--model-cost", files["cost"]]
    assert main(["simulate", *both, "--json", "--step-log", files["log"]]) == 0
    first = json.loads(capsys.readouterr().out)
    assert main(["replay", files["log"]]) == 0
    assert main(["trace", "--kind=log", "--log", files["log"], "--out", files["own"]]) == 0
    assert main(["fit", files["log"], "--out", files["fitted"]]) == 0
    assert "ns/KV position" in capsys.readouterr().out
    both = ["--trace", files["own"], "--model-cost", files["fitted"]]
    assert main(["simulate", *both, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    for name in ("ttft_ms", "latency_ms"):
        assert again["figures"][name]["p50"] == pytest.approx(first["figures"][name]["p50"], rel=0.02)
    assert main(["simulate", *both, "--scheduling=sync", "--replicas=2"]) == 0
    assert "time to first token p99" in capsys.readouterr().out
    assert main(["plan", *both, "--slo-ttft-ms=2000", "--slo-itl-ms=500"]) == 0
    printed = capsys.readouterr().out
    assert "best" in printed and "meets the targets" in printed
    assert main(["plan", *both, "--slo-ttft-ms=0.01", "--json", "--max-replicas=1"]) == 1
    assert json.loads(capsys.readouterr().out)["best"]["replicas"] == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trace"], "trace: --out is missing"),
        (["trace", "--out=x", "--kind=log"], "--log goes with --kind=log"),
        (["fit", "--out=x"], "fit: one LOG expected, got none"),
        (["fit", "x"], "fit: --out is missing"),
        (["simulate", "--trace=x"], "simulate: --model_cost is missing"),
        (["plan", "x", "--slo-ttft-ms=1"], "plan: only flags expected, got 'x'"),
        (["replay"], "replay: one LOG expected"),
    ],
)
def test_wrong_command_lines(argv, message, capsys):
    assert main(argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["replay", "trace", "fit", "simulate", "plan"])
def test_help(command, capsys):
    assert main([command, "--help"]) == 0
    assert "usage: jax-engine" in capsys.readouterr().out
