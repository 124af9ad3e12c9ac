"""The benchmark programs end to end, on an engine whose device is a fake, and their arithmetic on made-up figures."""

import json
from pathlib import Path

import pytest

from benchmarks import (
    fit,
    hf_static,
    idle,
    offline,
    replicas,
    scheduler_host,
    scheduling,
    server_front,
    soak,
    startup,
    steps,
    structured,
    tpu_kernels,
    virtual_device,
    workload,
)
from jax_engine import ConfigError, EngineConfig, SamplingParams
from jax_engine.config import resolve
from jax_engine.engine import Engine
from jax_engine.model_config import ModelConfig
from jax_engine.request import CompletionOutput, RequestMetrics, RequestOutput
from jax_engine.testing.fake_runner import FakeRunner
from serving.flags import UsageError

MODEL = ModelConfig.placeholder(50, 256)


class FakeLLM:
    """LLM's face over the real engine and a fake device."""

    lost_tokens = 0

    def __init__(self, **options) -> None:
        config = EngineConfig(**options)
        runner = FakeRunner(resolve(config, MODEL, platform="cpu", num_pages=64), MODEL.vocab_size)
        self._engine = Engine(runner, None, vocab_size=MODEL.vocab_size, eos_token_ids=(), config=config)
        self.metrics, self.reset_metrics = self._engine.metrics, self._engine.metrics.reset
        self.limits, self.vocab_size = self._engine.limits, self._engine.vocab_size

    def generate(
        self, prompts: list[list[int]], params: list[SamplingParams], use_tqdm: bool, cache_salt: str
    ) -> list[RequestOutput]:
        for index, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
            self._engine.submit(self._engine.make_request(str(index), prompt, own, cache_salt=cache_salt))
        outputs = {}
        while self._engine.has_work:
            outputs |= {output.request_id: output for output in self._engine.step()}
        for output in outputs.values():
            del output.outputs[0].token_ids[: self.lost_tokens]
        return [outputs[str(index)] for index in range(len(prompts))]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small workload's path; offline runs it on the fake."""
    monkeypatch.setattr(offline, "LLM", FakeLLM)
    path = tmp_path / "small.json"
    requests = [[5, 3], [9, 20], [40, 1]]
    totals = {"total_prompt": 54, "total_output": 24}
    path.write_text(json.dumps({"name": "small", "about": "three", "requests": requests, **totals}))
    return str(path)


def test_replicas_are_compared_with_one_of_them(small, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(replicas, "LLM", FakeLLM)
    out = tmp_path / "out.json"
    assert replicas.main(["x", f"--workload={small}", "--max_num_seqs=2", f"--out={out}"]) == 0
    assert "2 replicas over one with a share of the requests: " in capsys.readouterr().out
    results = json.loads(out.read_text())
    ran = [(run["replicas"], run["workload"], run["requests"]) for run in results["runs"]]
    assert ran == [(2, "small", 3), (1, "small, 1/2", 1), (1, "small", 3)]
    assert results["runs"][1]["wall_s"] * results["runs"][1]["output_tok_per_s"] == pytest.approx(3)


def test_offline_compares_modes(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    argv = ["x", f"--workload={small}", "--compare=static,sync,async", "--repeat=2", "--max_num_seqs=2", f"--out={out}"]
    assert offline.main(argv) == 0
    printed = capsys.readouterr().out
    assert "output tok/s" in printed and "async over static" in printed
    results = json.loads(out.read_text())
    assert {mode: len(runs) for mode, runs in results["runs"].items()} == {"static": 2, "sync": 2, "async": 2}
    assert [limits["scheduling"] for limits in results["limits"].values()] == ["static", "sync", "async"]
    assert results["config"] == {"model": EngineConfig.model, "max_num_seqs": 2}
    run = results["runs"]["async"][0]
    assert run["engine"]["tokens_by_kind"] == {"prompt": 54, "decode": 21}
    assert run["compiles_after_ready"] == 0
    assert run["output_tok_per_s"] == pytest.approx(24 / run["wall_s"])
    assert results["device"]["platform"] and results["workload"]["requests"] == 3


def test_offline_starts_afresh_at_every_call(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert offline.main(["x", f"--workload={small}", "--repeat=2"]) == 0
    assert "round 2 of 2" in capsys.readouterr().out
    assert offline.main(["x", f"--workload={small}"]) == 0
    assert "round 1 of 1" in capsys.readouterr().out


def test_offline_refuses_short_outputs(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeLLM, "lost_tokens", 1)
    with pytest.raises(RuntimeError, match="instead of"):
        offline.main(["x", f"--workload={small}"])


def test_offline_refuses_unlike_pools(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter((32, 16))

    def build(**options) -> FakeLLM:
        return FakeLLM(**options, num_pages=next(sizes))

    monkeypatch.setattr(offline, "LLM", build)
    with pytest.raises(ConfigError, match="num_pages"):
        offline.main(["x", f"--workload={small}", "--compare=sync,async"])


def test_latencies_of_a_request() -> None:
    work = workload.Workload("w", "", ((2, 5),))
    metrics = RequestMetrics(10.0, first_token_time=10.5, last_token_time=10.9, finished_time=11.0)
    outputs = [CompletionOutput(0, "", [1] * 5)]
    figures = offline.figures(work, [RequestOutput("0", None, [1, 2], outputs, True, metrics)], wall=2.0)
    assert figures["output_tok_per_s"] == 2.5
    assert figures["total_tok_per_s"] == 3.5
    assert figures["ttft_ms"]["p50"] == pytest.approx(500)
    assert figures["inter_token_ms"]["p50"] == pytest.approx(100)
    assert figures["latency_ms"]["p50"] == pytest.approx(1000)


def test_ratios_pair_the_rounds() -> None:
    base = [{"output_tok_per_s": speed} for speed in (100.0, 200.0, 50.0)]
    other = [{"output_tok_per_s": speed} for speed in (150.0, 200.0, 100.0)]
    assert offline.ratios({"sync": base, "async": other}) == {"async": {"median": 1.5, "min": 1.0, "max": 2.0}}


def test_scheduler_host_measures_every_case(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    argv = ["x", "--running=2,5", "--waiting=0,9", "--steps=10", "--prompt=20", "--output=8", f"--out={out}"]
    assert scheduler_host.main(argv) == 0
    results = json.loads(out.read_text())["us_per_turn"]
    assert {kind: list(cases) for kind, cases in results.items()} == {
        "steady": ["2", "5"],
        "churn": ["2", "5"],
        "waiting": ["0, fcfs", "9, fcfs", "9, priority", "9, fair", "9, slo"],
    }
    assert results["steady"]["5"]["total"]["p50"] > 0


def test_steady_load_only_decodes() -> None:
    settings = scheduler_host.Settings(steps=10, prompt=20, output=8, max_inflight_steps=2, output_kind="delta")
    load = scheduler_host.Load(scheduler_host.make_limits(3, 100, 2), settings, 3, 60, [])
    for _ in range(5):
        load.step()
    load.step()
    assert load.engine.metrics.snapshot()["tokens_by_kind"] == {"prompt": 0, "decode": 3}


def test_the_virtual_device_overlaps_steps_with_the_host() -> None:
    arrivals = [virtual_device.Arrival(1.0, [5] * 20, 101) for _ in range(4)]
    sync, _ = virtual_device.serve(arrivals, scheduling="sync")
    overlapped, engine = virtual_device.serve(arrivals)
    assert [len(entry.token_times) for entry in overlapped] == [101] * 4
    assert all(entry.ttft > virtual_device.WEIGHTS_S * 0.8 for entry in overlapped)
    # A hundred steps of the weights' time each, and the host's on top where it waits for every one.
    saved = sync[0].token_times[-1] - overlapped[0].token_times[-1]
    assert 0.5 < saved / (100 * virtual_device.HOST_S) < 1.5
    assert engine.metrics.steps.total() == 101
    assert scheduling.shown("x", {"a": scheduling.latencies(overlapped)}).count("ttft_ms") == 3


def test_static_batch_needs_one_length() -> None:
    assert hf_static.uniform_lengths(workload.load("cpu8")) == (64, 64)
    with pytest.raises(ConfigError, match="different lengths"):
        hf_static.uniform_lengths(workload.load("skewed"))


PROGRAMS = [
    module.main
    for module in (offline, scheduler_host, scheduling, hf_static, server_front, soak, startup, structured, idle, steps)
]


@pytest.mark.parametrize("main", PROGRAMS, ids=lambda main: main.__module__)
def test_help_and_unknown_flags(main, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["x", "--help"]) == 0
    assert "--out" in capsys.readouterr().out
    with pytest.raises(UsageError, match="unknown flag --nonsense"):
        main(["x", "--nonsense=1"])


def test_what_a_server_says_of_its_start_is_read():
    log = """INFO jax_engine.model_runner: compiled 63 programs in 97.2 s
INFO jax_engine.start: 1 replica(s) of llama-3.1-8b on NVIDIA H100 80GB HBM3 (gpu), bfloat16, weights 14.96 GiB
INFO jax_engine.start: engine ready in 124.6 s"""
    said = startup.said(log)
    assert said["device"] == "NVIDIA H100 80GB HBM3 (gpu)"
    assert (said["programs"], said["compile_s"], said["engine_ready_after_s"]) == (63, 97.2, 124.6)
    with pytest.raises(ConfigError, match="nothing like"):
        startup.said("")


def test_an_unknown_kind_of_start_is_refused():
    with pytest.raises(ConfigError, match="got 'warm'"):
        startup.main(["x", "--starts=warm"])


def test_bundles_of_the_walk_are_told_from_those_of_its_inner_loops():
    listing = """
   0x1   :  { start }
   0x2 LB: > { a small loop }
   0x3   : > { dma.hbm_to_vmem }
   0x4   :  { between }
   0x5 LB: > { the walk }
   0x6   : > { before }
   0x7   :  { skipped }
   0x8 LB: >> { fetch }
   0x9   : >> { dma.hbm_to_vmem }
   0xa   : >> { dma.done }
   0xb   : > { compute }
   0xc LB: >> { copy }
   0xd   : >> { copy }
   0xe PF: > { after }
   0xf   :  { end }
"""
    assert tpu_kernels.turn_bundles(listing) == (4, 3)


def test_gaps_are_where_nothing_ran() -> None:
    assert idle.gaps([(0, 10), (5, 20), (6, 8), (30, 40), (40, 41)]) == [10]
    assert idle.gaps([]) == []


def test_fit_records_a_refusal_and_what_was_asked(tmp_path: Path) -> None:
    out = tmp_path / "fit.json"
    asked = ["--model=llama-3.1-8b", "--load_format=dummy", "--target=v9:1x1"]
    assert fit.main(["fit", f"--out={out}", *asked]) == 0
    result = json.loads(out.read_text())
    assert "target 'v9:1x1' cannot be compiled for" in result["refused"] and "compiled" not in result
    assert all(flag in result["command"] for flag in asked)
    with pytest.raises(UsageError, match=r"--out=FILE\.json is missing"):
        fit.main(["fit", *asked])
    assert fit.main(["fit", f"--out={tmp_path / 'no.json'}", "--no_such_flag=1"]) == 2
    assert not (tmp_path / "no.json").exists()


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_sm90_tst_176x128_64x5_1x2_h_bz_TNN", "products"),
        ("gemm_fusion_dot_general_3", "products"),
        ("block_tail_mosaic_gpu_kernel", "products"),
        ("attention_decode_mosaic_gpu_kernel", "attention"),
        ("all_reduce_add_norm_mosaic_gpu_kernel", "sums over devices"),
        ("MemcpyH2D", "copies"),
        ("Memset 0", "copies"),
        ("memcpy32_post", "copies"),
        ("add_norm_mosaic_gpu_kernel", "other"),
        ("loop_multiply_fusion_1", "other"),
    ],
)
def test_kernels_of_a_trace_are_told_apart(kernel: str, kind: str) -> None:
    assert steps.kind_of(kernel) == kind
