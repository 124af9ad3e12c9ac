"""Load on a running server, as its clients see it: `jax-engine bench serve`.

    jax-engine bench serve --url=http://127.0.0.1:8000 --workload=chat --rate=2,4,8 --slo_ttft_ms=500 --slo_itl_ms=50
    jax-engine bench serve --url=http://127.0.0.1:8000 --workload=cpu8 --concurrency=1,4,16

With --rate the load is open: requests leave at Poisson times whatever the server does, so a slow server cannot slow
its clients down and hide it. With --concurrency the load is closed: as many clients as that, each with one request at
a time. Prompts are random token ids of the workload's lengths, outputs are forced to theirs. Any server that speaks
/v1/completions with token ids, streaming and `ignore_eos` can be measured.
"""

import asyncio
import dataclasses
import os
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec
import numpy as np
from absl import flags as absl_flags

from benchmarks import report, workload
from jax_engine import ConfigError
from serving import flags

MS = 1e3
#: Token ids of prompts are in [_LOWEST_ID, vocab_size): special tokens tend to have the lowest ids.
_LOWEST_ID = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured. Every field is a flag.

    Raises:
        ConfigError: a value is out of range, or neither or both of rate and concurrency are given.
    """

    url: str = dataclasses.field(default="http://127.0.0.1:8000", metadata={"help": "Of the server."})
    model: str | None = dataclasses.field(default=None, metadata={"help": "Default: the first the server names."})
    workload: str = dataclasses.field(default="cpu8", metadata={"help": "JSON file, or a name in workloads/."})
    requests: int | None = dataclasses.field(default=None, metadata={"help": "Only the workload's first ones."})
    rate: tuple[float, ...] = dataclasses.field(default=(), metadata={"help": "Requests per second; one run each."})
    concurrency: tuple[int, ...] = dataclasses.field(default=(), metadata={"help": "Clients; one run each."})
    slo_ttft_ms: float = dataclasses.field(default=1000.0, metadata={"help": "A good request's time to first token."})
    slo_itl_ms: float = dataclasses.field(default=100.0, metadata={"help": "A good request's mean time per token."})
    vocab_size: int = dataclasses.field(default=1000, metadata={"help": "Prompt token ids are below this."})
    temperature: float = dataclasses.field(default=0.0, metadata={"help": "Of every request."})
    seed: int = dataclasses.field(default=0, metadata={"help": "Of prompts and arrival times."})
    timeout_s: float = dataclasses.field(default=600.0, metadata={"help": "Of one request."})
    out: str | None = dataclasses.field(default=None, metadata={"help": "Results file to write (JSON)."})
    plot: str | None = dataclasses.field(default=None, metadata={"help": "PNG to draw (needs the extra `bench`)."})

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise ConfigError(f"url must begin with http:// or https://, got {self.url!r}")
        if bool(self.rate) == bool(self.concurrency):
            raise ConfigError("give either --rate or --concurrency")
        if any(load <= 0 for load in (*self.rate, *self.concurrency)):
            raise ConfigError(f"loads must be above 0, got {self.rate or self.concurrency}")
        if self.vocab_size <= _LOWEST_ID:
            raise ConfigError(f"vocab_size must be above {_LOWEST_ID}, got {self.vocab_size}")

    @property
    def loads(self) -> Sequence[float]:
        """One run each."""
        return self.rate or self.concurrency


@dataclasses.dataclass(slots=True)
class Sample:
    """One request as its client saw it; seconds on one clock.

    Attributes:
        due: when it should have left. times: when each chunk with text or token ids came, and tokens of each.
    """

    due: float
    sent: float = 0.0
    times: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    ended: float = 0.0
    num_tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        """From when it was due, so that a client that fell behind does not flatter the server."""
        return self.times[0][0] - self.due

    @property
    def itl(self) -> float:
        """Mean seconds per token after the first chunk."""
        later = self.num_tokens - self.times[0][1]
        return (self.times[-1][0] - self.times[0][0]) / later if later > 0 else 0.0


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; see cli.main for what it raises and returns."""
    flag_values = absl_flags.FlagValues()
    absl_flags.DEFINE_boolean("help", False, "This listing.", flag_values=flag_values, module_name="bench serve")
    flags.define(flag_values, Options, group="bench serve")
    others = flags.parse(flag_values, argv[0], argv[1:])
    if flag_values["help"].value:
        print(f"usage: {argv[0]} [--flag=value ...]\n\n{__doc__}\n{flags.listing(flag_values)}")
        return 0
    if others:
        raise flags.UsageError(f"only flags are expected, got {' '.join(others)!r}")
    options = Options(**flags.values(flag_values, Options))
    results = asyncio.run(measure(options))
    print(_table(options, results["runs"]))
    if options.out is not None:
        report.write(options.out, report.document("benchmarks.serve", argv, **results))
    if options.plot is not None:
        plot(options.plot, results["runs"], "requests/s offered" if options.rate else "clients")
    return 0 if all(not run["failed"] for run in results["runs"]) else 1


async def measure(options: Options) -> dict[str, Any]:
    """One run per load, in order.

    Raises:
        ConfigError: the server cannot be reached or refuses.
    """
    work = workload.load(options.workload)
    if options.requests is not None:
        work = dataclasses.replace(work, requests=work.requests[: options.requests])
    key = os.environ.get("JAX_ENGINE_API_KEY", "")
    session = aiohttp.ClientSession(
        options.url.rstrip("/"),
        headers={"Authorization": f"Bearer {key}"} if key else {},
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=options.timeout_s),
    )
    async with session:
        model = options.model or await _first_model(session)
        bodies = request_bodies(options, work, model)
        await _request(session, bodies[0] | {"max_tokens": 2, "min_tokens": 2}, Sample(time.perf_counter()))
        runs = []
        for load in options.loads:
            started = time.perf_counter()
            samples = await (_open(session, bodies, load, options) if options.rate else _closed(session, bodies, load))
            runs.append({"load": load} | figures(samples, time.perf_counter() - started, options))
    return {"model": model, "workload": work.name, "options": dataclasses.asdict(options), "runs": runs}


async def _first_model(session: aiohttp.ClientSession) -> str:
    try:
        async with session.get("/v1/models") as response:
            response.raise_for_status()
            return (await response.json())["data"][0]["id"]
    except aiohttp.ClientConnectionError as error:
        raise ConfigError(f"no server answers: {error}") from None
    except (aiohttp.ClientError, TimeoutError, KeyError, IndexError) as error:
        raise ConfigError(f"the server does not name its models: {error!r}; is it up, and is the key right?") from None


def request_bodies(options: Options, work: workload.Workload, model: str) -> list[dict[str, Any]]:
    """The requests, in the workload's order."""
    random = np.random.default_rng(options.seed)
    return [
        {
            "model": model,
            "prompt": random.integers(_LOWEST_ID, options.vocab_size, prompt).tolist(),
            "max_tokens": output,
            "min_tokens": output,
            "ignore_eos": True,
            "temperature": options.temperature,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "return_token_ids": True,  # so that a token without text of its own makes an event too
        }
        for prompt, output in work.requests
    ]


async def _open(session: aiohttp.ClientSession, bodies: list[Any], rate: float, options: Options) -> list[Sample]:
    """Requests leave at Poisson times."""
    gaps = np.random.default_rng(options.seed + 1).exponential(1 / rate, len(bodies))
    start = time.perf_counter()
    samples = [Sample(start + due) for due in np.cumsum(gaps) - gaps[0]]

    async def later(body: dict[str, Any], sample: Sample) -> None:
        await asyncio.sleep(sample.due - time.perf_counter())
        await _request(session, body, sample)

    await asyncio.gather(*map(later, bodies, samples))
    return samples


async def _closed(session: aiohttp.ClientSession, bodies: list[Any], clients: float) -> list[Sample]:
    """Each client sends its next request when its last is done."""
    samples: list[Sample] = []
    left = iter(bodies)

    async def client() -> None:
        for body in left:
            samples.append(sample := Sample(time.perf_counter()))
            await _request(session, body, sample)

    await asyncio.gather(*(client() for _ in range(int(clients))))
    return samples


async def _request(session: aiohttp.ClientSession, body: dict[str, Any], sample: Sample) -> None:
    """Sends one request and notes when what came; a failure is noted too."""
    sample.sent = time.perf_counter()
    try:
        async with session.post("/v1/completions", json=body) as response:
            if response.status != 200:
                raise ConfigError(f"status {response.status}: {(await response.text())[:200]}")
            async for event in _events(response):
                _note(sample, event, time.perf_counter())
        if sample.num_tokens != body["max_tokens"]:
            raise ConfigError(f"{sample.num_tokens} tokens came, {body['max_tokens']} were asked for")
    except (aiohttp.ClientError, TimeoutError, ConfigError, msgspec.DecodeError) as error:
        sample.error = str(error) or type(error).__name__
    sample.ended = time.perf_counter()


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in response.content:
        if line.startswith(b"data: {"):
            yield msgspec.json.decode(line[6:])


def _note(sample: Sample, event: dict[str, Any], now: float) -> None:
    if "error" in event:
        raise ConfigError(f"the stream failed: {event['error']}")
    tokens = (event.get("usage") or {}).get("completion_tokens", 0) - sample.num_tokens
    if tokens > 0:
        sample.times.append((now, tokens))
        sample.num_tokens += tokens


def figures(samples: Sequence[Sample], wall: float, options: Options) -> dict[str, Any]:
    """Throughput, latency percentiles in milliseconds, and goodput: requests per second that kept both targets.

    Args:
        wall: seconds from the first request's leaving to the last one's end.
    """
    done = [sample for sample in samples if sample.error is None]
    good = [s for s in done if s.ttft * MS <= options.slo_ttft_ms and s.itl * MS <= options.slo_itl_ms]
    gaps = [
        (later - earlier) * MS
        for sample in done
        for (earlier, _), (later, _) in zip(sample.times, sample.times[1:], strict=False)
    ]
    return {
        "requests": len(samples),
        "failed": len(samples) - len(done),
        "errors": sorted({sample.error for sample in samples if sample.error})[:5],
        "wall_s": wall,
        "requests_per_s": len(done) / wall,
        "output_tok_per_s": sum(sample.num_tokens for sample in done) / wall,
        "ttft_ms": report.percentiles(sample.ttft * MS for sample in done),
        "itl_ms": report.percentiles(sample.itl * MS for sample in done),
        "gap_ms": report.percentiles(gaps),
        "e2e_ms": report.percentiles((sample.ended - sample.due) * MS for sample in done),
        "goodput_per_s": len(good) / wall,
        "good_share": len(good) / len(samples),
        "client_lag_ms": report.percentiles((sample.sent - sample.due) * MS for sample in samples),
    }


def _table(options: Options, runs: Sequence[dict[str, Any]]) -> str:
    unit = "req/s" if options.rate else "clients"
    rows = [
        ["", "failed", "req/s", "output tok/s", "TTFT p50", "p99 ms", "ITL p50", "p99 ms", "E2E p50", "p99", "good"]
    ]
    for run in runs:
        row = [f"{run['load']:g} {unit}", f"{run['failed']}", f"{run['requests_per_s']:.2f}"]
        row.append(f"{run['output_tok_per_s']:.1f}")
        for name in ("ttft_ms", "itl_ms", "e2e_ms"):
            marks = run[name] or {"p50": float("nan"), "p99": float("nan")}
            row += [f"{marks['p50']:.1f}", f"{marks['p99']:.1f}"]
        rows.append([*row, f"{run['good_share']:.0%}"])
    return report.table(rows)


def plot(path: str, runs: Sequence[dict[str, Any]], unit: str) -> None:
    """Latency against throughput, one point per load.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib: install the extra `bench`") from None
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, name, title in zip(
        figure.subplots(1, 2), ("ttft_ms", "itl_ms"), ("Time to first token", "Time per token"), strict=True
    ):
        shown = [run for run in runs if run[name]]
        for mark in ("p50", "p99"):
            x, y = [run["output_tok_per_s"] for run in shown], [run[name][mark] for run in shown]
            axes.plot(x, y, marker="o", label=mark)
        for run in shown:
            axes.annotate(f"{run['load']:g}", (run["output_tok_per_s"], run[name]["p50"]))
        axes.set(xlabel=f"output tokens/s (points: {unit})", ylabel="ms", title=title, ylim=(0, None))
        axes.legend()
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")
