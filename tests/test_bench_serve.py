"""`bench serve` against a server with a fake engine: what it counts is what was there."""

import asyncio
import json
import math

import pytest

from benchmarks import serve, two_clients, workload
from jax_engine import ConfigError
from jax_engine.testing.fake_engine import FakeAsyncEngine
from serving import cli
from tests.test_server_life import serving

WORK = {"name": "w", "about": "a", "requests": [[5, 4], [6, 3], [7, 5]], "total_prompt": 18, "total_output": 12}


@pytest.fixture
def work(tmp_path):
    path = tmp_path / "w.json"
    path.write_text(json.dumps(WORK))
    return str(path)


async def measure(engine, work, **options):
    async with serving(engine) as (session, _):
        chosen = serve.Options(url=str(session._base_url), workload=work, vocab_size=250, **options)
        return await serve.measure(chosen)


@pytest.mark.parametrize("load", [{"rate": (50.0, 100.0)}, {"concurrency": (1, 2)}])
async def test_every_request_is_sent_and_its_tokens_counted(work, load):
    engine = FakeAsyncEngine(delay_s=0.01)
    results = await measure(engine, work, **load)
    assert results["model"] == "fake-model"
    sent = [(len(ids), params.max_tokens) for _, ids, params, _ in engine.submitted]
    assert sorted(sent[1:]) == sorted([(5, 4), (6, 3), (7, 5)] * 2)
    for run in results["runs"]:
        assert run["failed"] == 0 and run["requests"] == 3 and run["good_share"] == 1.0
        assert math.isclose(run["output_tok_per_s"], 12 / run["wall_s"])
        assert run["itl_ms"]["p50"] >= 9 and run["e2e_ms"]["max"] >= 49


async def test_a_server_that_does_not_answer_is_named(work, unused_tcp_port):
    options = serve.Options(url=f"http://127.0.0.1:{unused_tcp_port}", workload=work, vocab_size=250, concurrency=(1,))
    with pytest.raises(ConfigError, match=rf"no server answers: .*127\.0\.0\.1:{unused_tcp_port}"):
        await serve.measure(options)


async def test_closed_load_keeps_to_its_number_of_clients(work):
    engine = FakeAsyncEngine(delay_s=0.005)
    await measure(engine, work, concurrency=(2,))
    assert engine.max_live == 2


async def test_another_client_measures_the_same(work):
    """The openai package in threads: the same tokens, and times that agree as far as a pause of 20 ms rules them."""
    engine = FakeAsyncEngine(delay_s=0.02)
    async with serving(engine) as (session, _):
        options = serve.Options(url=str(session._base_url).rstrip("/"), workload=work, vocab_size=250, concurrency=(2,))
        (ours,) = (await serve.measure(options))["runs"]
        bodies = serve.request_bodies(options, workload.load(work), "fake-model")
        theirs = await asyncio.to_thread(two_clients._by_openai, bodies, 2, options)
    runs = [
        {"client": name, "load": 2} | two_clients._medians(run)
        for name, run in (("bench serve", ours), ("openai", theirs))
    ]
    rows = {row["figure"]: row for row in two_clients._compared(runs)}
    assert theirs["requests"] == 3 and theirs["output_tok_per_s"] == pytest.approx(12 / theirs["wall_s"])
    assert 18 <= rows["itl_ms"]["openai"] <= 40 and rows["itl_ms"]["ratio"] == pytest.approx(1, abs=0.5)
    assert engine.max_live == 2


async def test_failures_are_counted_and_named(work):
    results = await measure(FakeAsyncEngine(fail_after=2), work, concurrency=(1,))
    (run,) = results["runs"]
    assert run["failed"] == 3 and run["ttft_ms"] is None and "the stream failed" in run["errors"][0]


def test_goodput_counts_what_kept_both_targets():
    options = serve.Options(rate=(1.0,), slo_ttft_ms=100, slo_itl_ms=10)
    quick = serve.Sample(0.0, 0.0, [(0.05, 1), (0.06, 2)], 0.06, 3)
    late = serve.Sample(0.0, 0.0, [(0.2, 1), (0.21, 2)], 0.21, 3)
    slow = serve.Sample(0.0, 0.0, [(0.05, 1), (0.15, 2)], 0.15, 3)
    run = serve.figures([quick, late, slow], 2.0, options)
    assert run["goodput_per_s"] == 0.5 and run["good_share"] == 1 / 3
    assert math.isclose(quick.itl, 0.005) and run["ttft_ms"]["max"] == 200


def test_bad_flags_are_one_line(capsys):
    assert cli.main(["bench", "serve"]) == 1
    assert "either --rate or --concurrency" in capsys.readouterr().err
    assert cli.main(["bench", "serve", "--rat=1"]) == 2
    assert "did you mean --rate" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="url must begin"):
        serve.Options(url="file:///etc/passwd", rate=(1.0,))


async def test_the_command_prints_a_table_and_writes_its_results(work, tmp_path, capsys):
    out = tmp_path / "out.json"
    async with serving(FakeAsyncEngine()) as (session, _):
        words = [f"--url={session._base_url}", f"--workload={work}", "--concurrency=1,2", f"--out={out}"]
        assert await asyncio.to_thread(cli.main, ["bench", "serve", "--vocab_size=250", *words]) == 0
    assert "2 clients" in capsys.readouterr().out
    results = json.loads(out.read_text())
    assert [run["load"] for run in results["runs"]] == [1, 2] and results["versions"]["jax"]
