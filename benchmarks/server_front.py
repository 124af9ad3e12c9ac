"""Streamed tokens per second through the HTTP server, with an engine whose device answers at once or at a fixed pace.

    python -m benchmarks.server_front --streams=64 --step_ms=3 --out=FILE.json

The real engine, scheduler, event loop, routes and event streams; no model. The clients are a process of their own that
counts the tokens in the bytes it reads. `offered` is what the paced device makes; where `received` falls behind it, the
front is the limit. `--step_ms=0`: as fast as everything together goes. `--api_processes=0,1,2`: cases with so many
processes for the HTTP side (0: none but the engine's).
"""

import asyncio
import contextlib
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop
from absl import flags

from benchmarks import program, report
from benchmarks.scheduler_host import make_limits
from jax_engine.async_engine import AsyncEngine
from jax_engine.batch import Batch, StepResult
from jax_engine.config import EngineConfig
from jax_engine.engine import Engine
from jax_engine.testing.byte_tokenizer import EOS, byte_text_tokenizer
from jax_engine.testing.fake_runner import FakeRunner
from serving import front, server
from serving.options import ServerOptions
from serving.remote import supervisor

#: The fake device's only token, the byte 1, as JSON writes it.
_TOKEN_TEXT = rb"\u0001"
_PATHS = {
    "completions": ("/v1/completions", {"prompt": "x" * 32}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 32}]}),
}


def flag_set() -> flags.FlagValues:
    """The program's flags."""
    flag_values = flags.FlagValues()
    here = {"flag_values": flag_values, "module_name": "Benchmark"}
    flags.DEFINE_list("streams", ["16", "64", "256"], "Numbers of concurrent streams.", **here)
    flags.DEFINE_float("step_ms", 3.0, "Time of a step on the fake device; 0: none.", lower_bound=0, **here)
    flags.DEFINE_float("seconds", 8.0, "Measured time of each case.", lower_bound=0.5, **here)
    flags.DEFINE_list("api_processes", ["0"], "Numbers of processes for the HTTP side.", **here)
    flags.DEFINE_list("endpoint", ["completions", "chat"], "Which endpoints.", **here)
    flags.DEFINE_string("out", None, "Results file to write (JSON).", **here)
    return flag_values


class PacedRunner(FakeRunner):
    """A fake runner whose steps take time, one after the other, as on a device."""

    def __init__(self, limits, step_s: float):
        super().__init__(limits, EOS + 1, check=False)
        self._step_s, self._free_at = step_s, 0.0

    def dispatch(self, batch: Batch):
        """Computes a step, which is ready a step's time after the one before."""
        handle = super().dispatch(batch)
        self._free_at = max(self._free_at, time.monotonic()) + self._step_s
        return _PacedHandle(handle, self._free_at)


class _PacedHandle:
    def __init__(self, handle, ready_at: float):
        self._handle, self._ready_at = handle, ready_at

    def is_ready(self) -> bool:
        return time.monotonic() >= self._ready_at

    def result(self) -> StepResult:
        wait_s = self._ready_at - time.monotonic()
        if wait_s > 0:
            time.sleep(wait_s)
        return self._handle.result()


def make_engine(num_streams: int, step_s: float) -> AsyncEngine:
    """The real engine over the paced device."""
    config = EngineConfig(model="fake")
    engine = Engine(
        PacedRunner(make_limits(num_streams, 2048, 2), step_s),
        byte_text_tokenizer(),
        vocab_size=EOS + 1,
        eos_token_ids=[],
        config=config,
    )
    return AsyncEngine(config, engine)


@contextlib.asynccontextmanager
async def serving(engine: AsyncEngine, processes: int):
    """The server around an engine, once it serves: its port."""
    options = ServerOptions(port=0, api_processes=processes, log_interval_s=0.0, drain_timeout_s=0.1)
    listeners = front.bind_all(options, max(1, processes))
    port = listeners[0].getsockname()[1]
    if processes:
        life = supervisor.run_processes(lambda: engine, options, listeners, (), (), "warning", "text")
    else:
        life = server.run_server(lambda: engine, options, listeners[0])
    running = asyncio.create_task(life)
    try:
        while not await _answers(port):
            await asyncio.wait([running], timeout=0.2)
            if running.done():
                running.result()
        await asyncio.sleep(0.5 * processes)  # until every process listens
        yield port
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        for listener in listeners:
            listener.close()


async def _answers(port: int) -> bool:
    with contextlib.suppress(OSError):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
        return answer.startswith(b"HTTP/1.1 200")
    return False


async def measure(processes: int, num_streams: int, endpoint: str, step_s: float, seconds: float) -> dict[str, Any]:
    """One case: tokens per second that reach the clients."""
    engine = make_engine(num_streams, step_s)
    async with serving(engine, processes) as port:
        parent, child = multiprocessing.get_context("spawn").Pipe()
        arguments = (child, port, num_streams, endpoint, seconds)
        clients = multiprocessing.get_context("spawn").Process(target=_clients, args=arguments)
        clients.start()
        child.close()  # so that clients that die are noticed
        try:
            await asyncio.to_thread(parent.recv)  # the clients are warm
            pids = [os.getpid(), *_api_processes()]
            started, cpu, made = time.monotonic(), [_cpu_s(pid) for pid in pids], engine.metrics.tokens["decode"]
            received = await asyncio.to_thread(parent.recv)
            wall = time.monotonic() - started
            made = engine.metrics.tokens["decode"] - made
            shares = [(_cpu_s(pid) - before) / wall for pid, before in zip(pids, cpu, strict=True)]
        finally:
            clients.terminate()
            clients.join()
    rate = received["tokens"] / received["seconds"]
    return {
        "api_processes": processes,
        "streams": num_streams,
        "endpoint": endpoint,
        "step_ms": step_s * 1e3,
        "offered_tokens_per_s": made / wall,
        "received_tokens_per_s": rate,
        "reads_per_s": received["reads"] / received["seconds"],
        "server_cpu_share": sum(shares),
        "engine_process_cpu_share": shares[0],
        "received_tokens_per_server_cpu_s": rate / sum(shares),
        "received_tokens_per_engine_process_cpu_s": rate / shares[0],
        "client_cpu_share": received["cpu_s"] / received["seconds"],
    }


def _api_processes() -> list[int]:
    """The process ids of the server's processes beside this one."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in children if b"serving.remote.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def _cpu_s(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _clients(pipe, port: int, num_streams: int, endpoint: str, seconds: float) -> None:
    uvloop.run(_run_clients(pipe, port, num_streams, endpoint, seconds))


async def _run_clients(pipe, port: int, num_streams: int, endpoint: str, seconds: float) -> None:
    counts = {"tokens": 0, "reads": 0}
    path, body = _PATHS[endpoint]
    data = json.dumps(body | {"stream": True, "max_tokens": 1900, "ignore_eos": True}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    request = head.encode() + data

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while True:
            writer.write(request)
            end = b""
            while b"[DONE]" not in end:
                part = await reader.read(65536)
                if not part or part.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5")):
                    raise ConnectionError(f"a stream failed: {part[:500]!r}")
                counts["tokens"] += (end[1 - len(_TOKEN_TEXT) :] + part).count(_TOKEN_TEXT)
                counts["reads"] += 1
                end = end[-16:] + part

    tasks = [asyncio.create_task(client()) for _ in range(num_streams)]
    await asyncio.sleep(1.0)
    pipe.send("warm")
    counts.update(tokens=0, reads=0)
    started, cpu = time.monotonic(), _cpu_s(os.getpid())
    await asyncio.sleep(seconds)
    pipe.send(counts | {"seconds": time.monotonic() - started, "cpu_s": _cpu_s(os.getpid()) - cpu})
    for task in tasks:
        if task.done():
            task.result()  # a client that has failed
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def main(argv: Sequence[str]) -> int:
    """Runs the cases, prints a table, writes the results."""
    flag_values = flag_set()
    if not program.parse(flag_values, "benchmarks.server_front", __doc__, argv[1:]):
        return 0
    options = flag_values.flag_values_dict()
    rows = []
    for endpoint in options["endpoint"]:
        for streams, processes in itertools.product(map(int, options["streams"]), map(int, options["api_processes"])):
            case = measure(processes, streams, endpoint, options["step_ms"] / 1e3, options["seconds"])
            rows.append(uvloop.run(case))
            row = rows[-1]
            print(
                f"{endpoint:12} {streams:5} streams, {processes} API processes: "
                f"offered {row['offered_tokens_per_s']:8.0f} tok/s, received {row['received_tokens_per_s']:8.0f}, "
                f"server {row['server_cpu_share']:.2f} cores, "
                f"engine's process {row['engine_process_cpu_share']:.2f}, "
                f"clients {row['client_cpu_share']:.2f}, {row['received_tokens_per_server_cpu_s']:.0f} tok per CPU s",
                flush=True,
            )
    if options["out"]:
        report.write(options["out"], report.document("benchmarks.server_front", argv, cases=rows))
    return 0


if __name__ == "__main__":
    program.run(main)
