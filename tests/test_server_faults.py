"""Faults on purpose: a broken request harms nobody else; a broken engine is told, and ends the process."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import aiohttp
import pytest

from jax_engine.config import EngineConfig
from jax_engine.errors import EngineStopped, SlowReader
from jax_engine.sampling_params import RequestOutputKind, SamplingParams
from tests import faulty_server
from tests.test_server_life import serving, until

ROOT = Path(__file__).resolve().parents[1]
COMPLETIONS = "/v1/completions"
CANARY = {"prompt": "canary", "max_tokens": 12, "temperature": 0}
ENDLESS = {"prompt": "x", "max_tokens": 400, "stream": True, "temperature": 0}


async def canary(session):
    async with session.post(COMPLETIONS, json=CANARY) as response:
        assert response.status == 200
        return (await response.json())["choices"]


def num_files():
    return len(os.listdir("/proc/self/fd"))


async def settled(engine):
    pool = engine._engine.scheduler.pool
    await until(lambda: engine.num_requests == 0 and pool.num_free == pool.num_pages)


async def not_a_number(session):
    async with session.post(COMPLETIONS, json={"prompt": [1, faulty_server.NOT_A_NUMBER]}) as response:
        return response.status, await response.text()


async def no_text(session):
    async with session.post(COMPLETIONS, json={"prompt": [1, faulty_server.NO_TEXT], "n": 3}) as response:
        return response.status, await response.text()


async def no_text_in_a_stream(session):
    async with session.post(COMPLETIONS, json={"prompt": [faulty_server.NO_TEXT], "stream": True}) as response:
        return response.status, await response.text()


async def no_tokens(session):
    async with session.post(COMPLETIONS, json={"prompt": faulty_server.BROKEN_TEXT}) as response:
        return response.status, await response.text()


async def truncated(session):
    async with session.post(COMPLETIONS, data=b'{"prompt": "x"', headers={"Content-Type": "application/json"}) as r:
        return r.status, await r.text()


async def raw(session, data):
    """What comes back for bytes that no HTTP client would send."""
    port = session._base_url.port
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    answer = (await asyncio.wait_for(reader.read(), 10)).decode()
    writer.close()
    return int(answer.split(" ", 2)[1]), answer


async def no_http(session):
    return await raw(session, b"\x00\x01\x02 hello\r\n\r\n")


async def huge_header(session):
    return await raw(session, b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 100_000 + b"\r\n\r\n")


async def many_headers(session):
    return await raw(session, b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X-A: a\r\n" * 400 + b"\r\n")


async def left_at_once(session):
    _, writer = await asyncio.open_connection("127.0.0.1", session._base_url.port)
    writer.close()
    return 0, ""


async def left_in_the_head(session):
    _, writer = await asyncio.open_connection("127.0.0.1", session._base_url.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConte")
    await writer.drain()
    writer.close()
    return 0, ""


async def reset_while_streaming(session):
    reader, writer = await asyncio.open_connection("127.0.0.1", session._base_url.port)
    body = json.dumps(ENDLESS).encode()
    head = (
        f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    )
    writer.write(head.encode() + b"\r\n" + body)
    await reader.readuntil(b"data: ")
    writer.transport.abort()
    return 0, ""


async def left_while_waiting(session):
    """Of more requests than there are slots, those in line are given up before they were ever scheduled."""
    posts = [asyncio.create_task(session.post(COMPLETIONS, json=ENDLESS | {"stream": False})) for _ in range(40)]
    while (await (await session.get("/load")).json())["waiting"] < 5:
        await asyncio.sleep(0.005)
    for post in posts:
        post.cancel()
    await asyncio.gather(*posts, return_exceptions=True)
    return 0, ""


async def no_grammar(session):
    body = {"prompt": "x", "structured_outputs": {"grammar": "start: ("}}
    async with session.post(COMPLETIONS, json=body) as response:
        return response.status, await response.text()


async def left_in_the_body(session):
    _, writer = await asyncio.open_connection("127.0.0.1", session._base_url.port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n"
    )
    writer.write(b'\r\n{"prompt": ')
    await writer.drain()
    writer.close()
    return 0, ""


async def left_while_streaming(session):
    response = await session.post(COMPLETIONS, json=ENDLESS)
    await response.content.readline()
    response.close()
    return response.status, ""


async def left_before_the_answer(session):
    with contextlib.suppress(TimeoutError):
        await session.post(COMPLETIONS, json=ENDLESS | {"stream": False}, timeout=aiohttp.ClientTimeout(0.05))
    return 0, ""


FAULTS = {
    not_a_number: 500,
    no_text: 500,
    no_text_in_a_stream: 500,
    no_tokens: 500,
    truncated: 400,
    no_http: 400,
    huge_header: 400,
    many_headers: 400,
    no_grammar: 400,
    left_at_once: 0,
    left_in_the_head: 0,
    left_in_the_body: 0,
    left_while_waiting: 0,
    reset_while_streaming: 0,
    left_while_streaming: 200,
    left_before_the_answer: 0,
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
async def test_a_fault_harms_nobody_else(fault):
    engine = faulty_server.build()
    try:
        async with serving(engine) as (session, _):
            before = await canary(session)
            await settled(engine)
            files, threads = num_files(), threading.active_count()
            beside = asyncio.create_task(session.post(COMPLETIONS, json=ENDLESS | {"max_tokens": 60}))
            await until(lambda: engine.num_requests == 1)
            status, text = await fault(session)
            assert status == FAULTS[fault]
            for secret in ("Traceback", "/work", "/secret", ".py", "Error("):
                assert secret not in text
            assert (await (await beside).text()).endswith("data: [DONE]\n\n")
            assert (await session.get("/health")).status == 200
            assert await canary(session) == before
            await settled(engine)
            await until(lambda: num_files() <= files + 2)
            assert threading.active_count() <= threads + 1
    finally:
        engine.shutdown()


async def test_faults_at_two_api_processes_harm_nobody_else():
    """The same, except for a tokenizer's own faults: those of a real one cannot be brought about."""
    with server_process("--api_processes=2") as (process, url, _):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()

        def files():
            return [len(os.listdir(f"/proc/{pid}/fd")) for pid in (process.pid, *children)]

        async with aiohttp.ClientSession(url) as session:
            before, opened = await canary(session), files()
            for fault, wanted in FAULTS.items():
                if fault in (no_text, no_text_in_a_stream, no_tokens, huge_header):  # the last resets its connection
                    continue
                async with aiohttp.ClientSession(url) as other:  # a connection of its own, to either process
                    status, text = await fault(other)
                assert status == wanted, fault
                for secret in ("Traceback", "/work", "/secret", ".py", "Error("):
                    assert secret not in text
                assert (await session.get("/health")).status == 200
                assert await canary(session) == before
                async with asyncio.timeout(30):
                    while (load := await (await session.get("/load")).json())["server_load"] or load["kv_pages_used"]:
                        await asyncio.sleep(0.01)
            await until(lambda: all(now <= then + 3 for now, then in zip(files(), opened, strict=True)))


async def test_what_is_no_http_leaves_one_line_in_the_log():
    with server_process("--log_format=json") as (_, url, lines):
        async with aiohttp.ClientSession(url) as session:
            for fault in (huge_header, many_headers):
                with contextlib.suppress(ConnectionError):
                    assert (await fault(session))[0] == 400
            await raw(session, b"GET / HTTP/9.9\r\n\r\n")
            await until(lambda: any("Invalid HTTP version" in line for line in lines))
    told = [line for line in map(json.loads, lines) if line["logger"] == "serving.connections"]
    assert len(told) == 3 and all(line["level"] == "info" and "exception" not in line for line in told)
    assert "16384" in told[0]["message"]


async def test_a_reader_too_slow_is_aborted_with_its_request():
    engine = faulty_server.build(EngineConfig(model="faulty", max_unread_outputs=5))
    params = SamplingParams(max_tokens=400, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    try:
        outputs = engine.generate([1], params)
        num_tokens = len((await anext(outputs)).outputs[0].token_ids)
        await until(lambda: engine.gauges.used_pages == 0)
        with pytest.raises(SlowReader, match="5 outputs were left unread"):
            async for output in outputs:  # what was left unread comes joined
                num_tokens += len(output.outputs[0].token_ids)
        assert 5 <= num_tokens <= 7
        assert [o async for o in engine.generate([1], params)][-1].finished
        await settled(engine)
    finally:
        engine.shutdown()


async def test_requests_that_have_not_reached_a_dead_engine_are_told():
    engine = faulty_server.build()
    with pytest.raises(EngineStopped):
        async for _ in engine.generate([faulty_server.RAISE], SamplingParams()):
            pass
    assert not engine.is_alive and engine.turn_seconds == 0
    with pytest.raises(EngineStopped):
        await anext(engine.generate([1], SamplingParams()))


@contextlib.contextmanager
def server_process(*flags, ready=" at http://"):
    """(process, URL, lines of its log so far) of a server of tests/faulty_server.py."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faulty_server", "--log_interval_s=0.2", *flags],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
    )
    lines = []
    seen = threading.Event()

    def read():
        for line in process.stderr:
            lines.append(line)
            if ready in line:
                seen.set()
        seen.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert seen.wait(60) and any(ready in line for line in lines), "".join(lines)
        url = next((word for line in lines for word in re.findall(r"https?://[\w.:]+", line)), None)
        yield process, url, lines
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stderr.close()


@pytest.mark.parametrize(
    ("marker", "stacks"),
    [
        (faulty_server.RAISE, "RuntimeError: the device said /secret/path is wrong"),
        (faulty_server.LATE, "RuntimeError: INTERNAL: the step failed on the device"),
        (faulty_server.NO_MEMORY, "RESOURCE_EXHAUSTED"),
        (faulty_server.HANG, "in dispatch"),
    ],
)
async def test_an_engine_that_dies_or_hangs_is_told_and_ends_the_process(marker, stacks):
    with server_process("--step_timeout_s=0.5") as (process, url, lines):
        async with aiohttp.ClientSession(url) as session:
            running = await session.post(COMPLETIONS, json=ENDLESS)
            await running.content.readline()
            broken = await session.post(COMPLETIONS, json={"prompt": [marker]})
            assert broken.status == 503
            error = (await broken.json())["error"]
            assert error["code"] == "engine_stopped" and "/secret" not in error["message"]
            frames = (await running.text()).split("\n\n")
            assert json.loads(frames[-3].strip().removeprefix("data: "))["error"]["code"] == "engine_stopped"
            assert frames[-2] == "data: [DONE]"
            with contextlib.suppress(aiohttp.ClientError):
                assert (await session.get("/health")).status == 503
        assert await asyncio.to_thread(process.wait, 20) == 1
    log = "".join(lines)
    assert stacks in log and "ending the process" in log and "Current thread" in log


async def test_a_step_that_holds_pythons_lock_ends_the_process_all_the_same():
    with server_process("--step_timeout_s=0.5") as (process, url, lines):
        async with aiohttp.ClientSession(url) as session:
            with contextlib.suppress(aiohttp.ClientError):
                await session.post(COMPLETIONS, json={"prompt": [faulty_server.HOLD_LOCK]})
        assert await asyncio.to_thread(process.wait, 20) == 1
    assert "Timeout" in "".join(lines) and "in dispatch" in "".join(lines)


async def test_loading_is_said_on_the_port_and_a_signal_ends_it():
    with server_process("--slow-load", ready="listening on") as (process, url, _):
        async with aiohttp.ClientSession(url) as session:
            for path in ("/health", "/ready", "/v1/models"):
                response = await session.get(path)
                assert response.status == 503 and int(response.headers["Retry-After"]) >= 1
                assert (await response.json())["error"]["code"] == "loading"
            assert (await session.get("/version")).status == 200
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 10) == 128 + signal.SIGTERM


async def test_sigterm_ends_an_idle_server_at_once_and_figures_are_logged(tmp_path):
    trace = tmp_path / "trace.json"
    with server_process("--log_format=json", f"--trace_file={trace}") as (process, url, lines):
        async with aiohttp.ClientSession(url) as session:
            await canary(session)
            await until(lambda: any("tok/s" in line for line in lines))
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 10) == 0
    assert all(json.loads(line)["message"] for line in lines)
    assert any(event["name"] == "step 0" for event in json.loads(trace.read_text())["traceEvents"])


@pytest.mark.long
async def test_ten_thousand_connections_leave_the_server_serving():
    with server_process("--max_connections=500", "--idle_timeout_s=600") as (process, url, _):
        host, port = re.search(r"//([\d.]+):(\d+)", url).groups()
        files = Path(f"/proc/{process.pid}/fd")
        async with aiohttp.ClientSession(url) as session:  # one connection, which stays
            before = await canary(session)
            num_before, held, num_refused = len(list(files.iterdir())), [], 0
            for _ in range(20):
                batch = await asyncio.gather(*(asyncio.open_connection(host, port) for _ in range(500)))
                held += batch
                num_refused += sum(await asyncio.gather(*(was_refused(reader) for reader, _ in batch)))
            assert num_refused == 10_000 - 499
            assert len(list(files.iterdir())) <= num_before + 500
            assert await canary(session) == before
            for _, writer in held:
                writer.close()
            await until(lambda: len(list(files.iterdir())) <= num_before + 2)
            assert await canary(session) == before
        async with aiohttp.ClientSession(url) as session:
            assert await canary(session) == before


async def was_refused(reader):
    """Whether the server closed the connection, saying why; it says nothing to one that it keeps."""
    try:
        async with asyncio.timeout(3.0):
            return b" 503 " in await reader.read()
    except TimeoutError:
        return False
