"""Soak: a real server at a share of its capacity for minutes, with clients that leave; nothing may leak or change.

    python -m benchmarks.soak --minutes=10 --out=benchmarks/results/soak.json

Measures the server's capacity with a short closed loop, then offers `load` of it as Poisson arrivals; every tenth
client leaves in mid-stream. Once a minute, and at the end, it asks the same greedy question and reads memory,
threads and open files of the process, KV pages and compilations. It fails if an answer changes, a step compiles, a page
stays taken, or memory, threads or files grow past what the first sample (taken after the warm-up) allows.
"""

import asyncio
import dataclasses
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from benchmarks import program, report, server_process

ABORTED_SHARE = 0.1
PROMPT, OUTPUT = 24, 24
MAX_RUNNING = 64
#: Memory may move by this much while nothing leaks: caches fill, the allocator keeps what it had.
MEMORY_SLACK = 1.10
CANARY = {"prompt": "The capital of France is", "max_tokens": 12, "temperature": 0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Every field is a flag."""

    minutes: float = dataclasses.field(default=10.0, metadata={"help": "Length of the soak."})
    load: float = dataclasses.field(default=0.8, metadata={"help": "Share of the measured capacity."})
    sample_s: float = dataclasses.field(default=60.0, metadata={"help": "Seconds between two looks at the process."})
    serve_flags: str = dataclasses.field(
        default="--max_model_len=256 --max_num_seqs=8 --token_buckets=64 --decode_buckets=1,4,8",
        metadata={"help": "Of the server under test, blank-separated."},
    )
    out: str | None = dataclasses.field(default=None, metadata={"help": "Results file to write (JSON)."})


def main(argv: Sequence[str]) -> int:
    """Runs the soak. Returns 1 if something leaked or changed."""
    options = program.read(Options, "benchmarks.soak", __doc__, argv[1:])
    if options is None:
        return 0
    with server_process.running(options.serve_flags.split()) as server:
        results = asyncio.run(_soak(server.pid, server.url, options))
    rows = [list(results["samples"][0])]
    rows += [[f"{value:.0f}" for value in sample.values()] for sample in results["samples"]]
    print(report.table(rows))
    print("\n".join(results["problems"]) or "nothing leaked, nothing compiled, no answer changed")
    if options.out is not None:
        report.write(options.out, report.document("benchmarks.soak", argv, **results))
    return 1 if results["problems"] else 0


async def _soak(pid: int, url: str, options: Options) -> dict[str, Any]:
    async with _clients(url) as session:
        canary = await _canary(session)
        async with _clients(url) as clients:
            capacity = await _capacity(clients)
        samples = [await _sample(session, pid, 0.0)]
        counts = {"finished": 0, "left": 0, "failed": 0, "held_back": 0}
        problems: set[str] = set()
        started = time.perf_counter()
        load = asyncio.create_task(_load(url, capacity * options.load, started + options.minutes * 60, counts))
        while not load.done():
            await asyncio.wait([load], timeout=options.sample_s)
            if await _canary(session) != canary:
                problems.add("an answer changed under load")
            samples.append(await _sample(session, pid, time.perf_counter() - started))
        await load
        await asyncio.sleep(2.0)
        samples.append(await _sample(session, pid, time.perf_counter() - started))
        if await _canary(session) != canary:
            problems.add("an answer changed after the load")
    return {
        "capacity_requests_per_s": capacity,
        "offered_requests_per_s": capacity * options.load,
        **counts,
        "samples": samples,
        "problems": sorted(problems | set(_leaks(samples, counts))),
    }


def _clients(url: str) -> aiohttp.ClientSession:
    """A session whose connections end with it: the server's open files are compared without those of the load."""
    patient = aiohttp.ClientTimeout(total=None)
    return aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0), timeout=patient)


def _leaks(samples: Sequence[dict[str, float]], counts: dict[str, int]) -> list[str]:
    """What the last sample, without load, has more of than the one before the load; of memory, than the first one under
    load, when caches and buffers have been filled."""
    before, under_load, last = samples[0], samples[1], samples[-1]
    problems = []
    if last["rss_mib"] > under_load["rss_mib"] * MEMORY_SLACK:
        problems.append(f"memory grew from {under_load['rss_mib']:.0f} to {last['rss_mib']:.0f} MiB")
    for name in ("threads", "files"):
        if last[name] > before[name] + 2:
            problems.append(f"{name} grew from {before[name]:.0f} to {last[name]:.0f}")
    if last["pages"]:
        problems.append(f"{last['pages']:.0f} pages are held with no request running")
    if last["compiles"]:
        problems.append(f"{last['compiles']:.0f} programs were compiled after ready")
    if counts["failed"]:
        problems.append(f"{counts['failed']} requests failed")
    return problems


async def _canary(session: aiohttp.ClientSession) -> str:
    async with session.post("/v1/completions", json=CANARY) as response:
        return (await response.json())["choices"][0]["text"]


async def _sample(session: aiohttp.ClientSession, pid: int, at: float) -> dict[str, float]:
    async with session.get("/metrics") as response:
        text = await response.text()
    status = Path(f"/proc/{pid}/status").read_text()

    def metric(name: str) -> float:
        found = re.search(rf"^jax_engine_{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else float("nan")

    return {
        "seconds": at,
        "rss_mib": int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024,
        "threads": int(re.findall(r"Threads:\s+(\d+)", status)[0]),
        "files": len(os.listdir(f"/proc/{pid}/fd")),
        "pages": metric("kv_pages_used"),
        "compiles": metric("compiles_after_ready_total"),
        "tokens": metric("generated_tokens_total"),
    }


async def _capacity(session: aiohttp.ClientSession, clients: int = 8, each: int = 3) -> float:
    """Requests per second of a closed loop."""
    counts = {"finished": 0, "left": 0, "failed": 0}
    random = np.random.default_rng(1)

    async def client() -> None:
        for _ in range(each):
            await _request(session, random, False, counts)

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return counts["finished"] / (time.perf_counter() - started)


async def _load(url: str, rate: float, until: float, counts: dict[str, int]) -> None:
    """Poisson arrivals; every so-many-th client leaves. Where the machine has become slower than it was when its
    capacity was measured, arrivals beyond a bound are counted and not sent: else the queue would grow without one."""
    random = np.random.default_rng(0)
    running: set[asyncio.Task[None]] = set()
    async with _clients(url) as session, asyncio.TaskGroup() as group:
        while time.perf_counter() < until:
            if len(running) < MAX_RUNNING:
                task = group.create_task(_request(session, random, random.random() < ABORTED_SHARE, counts))
                running.add(task)
                task.add_done_callback(running.discard)
            else:
                counts["held_back"] += 1
            await asyncio.sleep(random.exponential(1 / rate))


async def _request(session: aiohttp.ClientSession, random: np.random.Generator, leaves: bool, counts: dict) -> None:
    prompt = random.integers(10, 1000, PROMPT).tolist()
    body = {"prompt": prompt, "max_tokens": OUTPUT, "ignore_eos": True, "stream": True, "temperature": 1}
    try:
        async with session.post("/v1/completions", json=body) as response:
            if response.status != 200:
                counts["failed"] += 1
                return
            async for line in response.content:
                if leaves and line.startswith(b"data: "):
                    response.close()
                    counts["left"] += 1
                    return
                if line.startswith(b"data: [DONE]"):
                    counts["finished"] += 1
    except aiohttp.ClientError:
        counts["failed"] += 1


if __name__ == "__main__":
    program.run(main)
