"""Streamed tokens per second through the HTTP server, with an engine whose device answers at once or at a fixed pace.

    python -m benchmarks.server_front --streams=64 --step_ms=3 --out=FILE.json

The real engine, scheduler, event loop, routes and event streams; no model. The clients are a process of their own that
counts the tokens in the bytes it reads. `offered` is what the paced device makes; where `received` falls behind it, the
front is the limit. `--step_ms=0`: as fast as everything together goes.
"""

import asyncio
import json
import multiprocessing
import resource
import socket
import time
from collections.abc import Sequence
from typing import Any

import uvloop
from absl import flags
from aiohttp import web

from benchmarks import program, report
from benchmarks.scheduler_host import make_limits
from jax_engine.async_engine import AsyncEngine
from jax_engine.batch import Batch, StepResult
from jax_engine.config import EngineConfig
from jax_engine.engine import Engine
from jax_engine.testing.byte_tokenizer import ByteTokenizer
from jax_engine.testing.fake_runner import FakeRunner
from serving.app import create_app

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
    flags.DEFINE_list("endpoint", ["completions", "chat"], "Which endpoints.", **here)
    flags.DEFINE_string("out", None, "Results file to write (JSON).", **here)
    return flag_values


class PacedRunner(FakeRunner):
    """A fake runner whose steps take time, one after the other, as on a device."""

    def __init__(self, limits, step_s: float):
        super().__init__(limits, ByteTokenizer.vocab_size, check=False)
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


async def measure(num_streams: int, endpoint: str, step_s: float, seconds: float) -> dict[str, Any]:
    """One case: tokens per second that reach the clients."""
    limits = make_limits(num_streams, 2048, 2)
    engine = Engine(
        PacedRunner(limits, step_s),
        ByteTokenizer(),
        vocab_size=ByteTokenizer.vocab_size,
        eos_token_ids=[],
        config=EngineConfig(model="fake"),
    )
    served = AsyncEngine(EngineConfig(model="fake"), engine)
    runner = web.AppRunner(create_app(served), handler_cancellation=True, access_log=None)
    await runner.setup()
    listener = socket.create_server(("127.0.0.1", 0))
    await web.SockSite(runner, listener, backlog=1024).start()
    parent, child = multiprocessing.get_context("spawn").Pipe()
    arguments = (child, listener.getsockname()[1], num_streams, endpoint, seconds)
    clients = multiprocessing.get_context("spawn").Process(target=_clients, args=arguments)
    clients.start()
    try:
        await asyncio.to_thread(parent.recv)  # the clients are warm
        started, cpu, made = time.monotonic(), _cpu_s(), engine.metrics.tokens["decode"]
        received = await asyncio.to_thread(parent.recv)
        wall = time.monotonic() - started
        made = engine.metrics.tokens["decode"] - made
        cpu = _cpu_s() - cpu
    finally:
        clients.terminate()
        clients.join()
        await runner.cleanup()
        served.shutdown()
    return {
        "streams": num_streams,
        "endpoint": endpoint,
        "step_ms": step_s * 1e3,
        "offered_tokens_per_s": made / wall,
        "received_tokens_per_s": received["tokens"] / received["seconds"],
        "reads_per_s": received["reads"] / received["seconds"],
        "server_cpu_share": cpu / wall,
        "received_tokens_per_server_cpu_s": received["tokens"] / received["seconds"] / (cpu / wall),
        "client_cpu_share": received["cpu_s"] / received["seconds"],
    }


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


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
                if not part or part.startswith(b"HTTP/1.1 4"):
                    raise ConnectionError(f"a stream failed: {part[:500]!r}")
                counts["tokens"] += (end[1 - len(_TOKEN_TEXT) :] + part).count(_TOKEN_TEXT)
                counts["reads"] += 1
                end = end[-16:] + part

    tasks = [asyncio.create_task(client()) for _ in range(num_streams)]
    await asyncio.sleep(1.0)
    pipe.send("warm")
    counts.update(tokens=0, reads=0)
    started, cpu = time.monotonic(), _cpu_s()
    await asyncio.sleep(seconds)
    pipe.send(counts | {"seconds": time.monotonic() - started, "cpu_s": _cpu_s() - cpu})
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
        for streams in map(int, options["streams"]):
            rows.append(uvloop.run(measure(streams, endpoint, options["step_ms"] / 1e3, options["seconds"])))
            row = rows[-1]
            print(
                f"{endpoint:12} {streams:5} streams: offered {row['offered_tokens_per_s']:8.0f} tok/s, "
                f"received {row['received_tokens_per_s']:8.0f}, server {row['server_cpu_share']:.2f} cores, "
                f"clients {row['client_cpu_share']:.2f}, {row['received_tokens_per_server_cpu_s']:.0f} tok per CPU s",
                flush=True,
            )
    if options["out"]:
        report.write(options["out"], report.document("benchmarks.server_front", argv, cases=rows))
    return 0


if __name__ == "__main__":
    program.run(main)
