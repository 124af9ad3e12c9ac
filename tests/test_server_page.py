"""The page and what it draws: files, headers, the engine's view, the trace for Perfetto."""

import json
import re

from jax_engine.engine_view import ReplicaView
from jax_engine.testing.fake_engine import FakeAsyncEngine
from jax_engine.timeline import HostSpan, StepSpan
from serving.trace import IdleSpan, chrome_trace, idle_spans, write_trace
from tests.test_server_errors import client_of, error_of


def step(number, start, ready):
    return StepSpan(number, start, start, ready, 3, 4, 2, 2, 2, 1, 5)


def replica(host, steps):
    return ReplicaView(gauges=FakeAsyncEngine().gauges, host=host, steps=steps, inflight=[], pages=[])


HOST = [HostSpan("schedule", 1.0, 2.0), HostSpan("build", 2.0, 4.0), HostSpan("no_work", 4.0, 9.0)]


def test_idle_time_is_cut_where_the_host_goes_on():
    steps = [step(0, 0.0, 1.5), step(1, 3.0, 3.5), step(2, 3.5, 4.5), step(3, 6.0, 7.0)]
    assert idle_spans(HOST, steps) == [
        IdleSpan(1.5, 2.0, "schedule"),
        IdleSpan(2.0, 3.0, "build"),
        IdleSpan(4.5, 6.0, "no_work"),
    ]
    assert idle_spans(HOST, steps[:1]) == idle_spans([], []) == []


def test_the_trace_is_what_perfetto_reads(tmp_path):
    write_trace(str(tmp_path / "trace.json"), [replica(HOST, [step(0, 0.0, 1.5), step(1, 3.0, 3.5)])])
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    rows = {event["args"]["name"]: event["tid"] for event in events if event["name"] == "thread_name"}
    slices = [event for event in events if event["ph"] == "X"]
    assert all(event["pid"] == 1 and event["tid"] in rows.values() and event["dur"] >= 0 for event in slices)
    device = [(e["name"], e["ts"], e["dur"]) for e in slices if e["tid"] == rows["device"]]
    assert ("step 1", 3e6, 0.5e6) in device and ("idle: build", 2e6, 1e6) in device
    assert {e["name"] for e in events if e["ph"] == "C"} == {"running", "waiting", "used_pages"}
    events = chrome_trace([replica([], []), replica(HOST, [])])["traceEvents"]
    assert {event["pid"] for event in events} == {1, 2}, "a process for each replica"


def engine_with_spans():
    engine = FakeAsyncEngine()
    now = engine.metrics.now()
    engine.timeline.add_phase("schedule", now - 60, now - 59)
    engine.timeline.add_phase("build", now - 0.3, now - 0.2)
    engine.timeline.add_dispatch(now - 0.2, 3, 4, 2, 2, 2, 1, 5)
    engine.timeline.add_result(now - 0.1)
    return engine


async def test_the_engines_view_holds_the_last_seconds_only():
    async with client_of(engine_with_spans()) as client:
        view = await (await client.get("/debug/engine?seconds=1")).json()
        trace = await client.get("/debug/trace")
        assert "attachment" in trace.headers["Content-Disposition"]
        assert len((await trace.json())["traceEvents"]) == 3 + 2 + 4
        for seconds in ("0", "11", "x", "nan", "-1"):
            assert (await error_of(await client.get(f"/debug/engine?seconds={seconds}"), 400))["param"] == "seconds"
        for replica in ("1", "-1", "x"):
            assert (await error_of(await client.get(f"/debug/engine?replica={replica}"), 400))["param"] == "replica"
    assert [span[0] for span in view["host"]] == ["build"]
    assert [(s["num_tokens"], s["batched_tokens"], s["used_pages"]) for s in view["steps"]] == [(3, 4, 5)]
    assert view["pages"]["per_cell"] == 1 and len(view["pages"]["cells"]) == view["gauges"]["num_pages"]
    assert view["histograms"].keys() == {"time_to_first_token", "inter_token"}


async def test_a_large_pool_is_drawn_with_few_cells(monkeypatch):
    monkeypatch.setattr(FakeAsyncEngine, "page_references", lambda self: [1] * 1500 + [0] * 1000)
    async with client_of(FakeAsyncEngine()) as client:
        pages = (await (await client.get("/debug/engine")).json())["pages"]
    assert pages["per_cell"] == 3 and len(pages["cells"]) == 834 and sum(pages["cells"]) == 1500


async def test_the_page_loads_from_here_alone_and_needs_no_key():
    async with client_of(FakeAsyncEngine(), api_keys=["k"]) as client:
        seen, wanted = {}, ["/"]
        while wanted:
            path = wanted.pop()
            response = await client.get(path)
            assert response.status == 200, path
            policy = response.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy
            seen[path] = text = await response.text()
            wanted += [found for found in set(re.findall(r'"(/page/[\w.]+)"', text)) if found not in seen]
        assert set(seen) == {"/", *(f"/page/{name}" for name in ("page.css", "icon.svg", "chat.js", "common.js"))} | {
            "/page/engine.js",
            "/page/draw.js",
        }
        whole = "".join(seen.values())
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", whole)
        assert not re.search(r"\bstyle=|<script>|\bon(click|load)=|innerHTML|eval\(", whole)
        ids = set(re.findall(r'\bid="([\w-]+)"', seen["/"]))
        assert set(re.findall(r'\$\("([\w-]+)"\)', whole)) <= ids
        for path in ("/debug/engine", "/debug/trace"):
            await error_of(await client.get(path), 401)
        assert (await client.get("/page/nothing.js")).status == 404


async def test_the_page_can_be_left_out():
    async with client_of(FakeAsyncEngine(), with_page=False) as client:
        await error_of(await client.get("/"), 404)


async def test_every_colour_has_a_light_and_a_dark_value():
    async with client_of(FakeAsyncEngine()) as client:
        css = await (await client.get("/page/page.css")).text()
        draw = await (await client.get("/page/draw.js")).text()
    light, dark = (set(re.findall(r"(--[\w]+):", block)) for block in css.split("* {")[0].split('[data-theme="dark"]'))
    assert light == dark
    assert {f"--{used}" for used in re.findall(r'colour\("(\w+)"\)', draw)} <= light
