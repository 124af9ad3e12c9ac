"""The same load on the same server by two clients: `jax-engine bench serve`, and the `openai` package in threads.

    python -m benchmarks.two_clients --url=http://127.0.0.1:8000 --workload=cpu8 --concurrency=1,4,8 --rounds=2

What a benchmark says of a server is also what it says of itself. The other client shares nothing with ours: another
HTTP library, another reader of streams, threads for an event loop, and clocks around the calls a user makes. Loads
alternate between the two, with fresh prompts each time, so that neither drift nor the prefix cache favours one.
"""

import asyncio
import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
from absl import app, flags

from benchmarks import report, serve, workload

_URL = flags.DEFINE_string("url", "http://127.0.0.1:8000", "Of the server.")
_WORKLOAD = flags.DEFINE_string("workload", "cpu8", "JSON file, or a name in workloads/.")
_CONCURRENCY = flags.DEFINE_list("concurrency", ["1", "4", "8"], "Clients at a time; one run each.")
_ROUNDS = flags.DEFINE_integer("rounds", 2, "Runs of each load by each client.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "Results file to write (JSON).")

#: What both clients measure, and what is compared.
_FIGURES = ("output_tok_per_s", "ttft_ms", "itl_ms", "e2e_ms")


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    work = workload.load(_WORKLOAD.value)
    runs: list[dict[str, Any]] = []
    for number in range(_ROUNDS.value):
        for load in map(int, _CONCURRENCY.value):
            seed = 2 * (number * 100 + load)
            options = serve.Options(url=_URL.value, workload=_WORKLOAD.value, concurrency=(load,), seed=seed)
            measured = asyncio.run(serve.measure(options))
            model = measured["model"]
            runs.append({"client": "bench serve", "load": load} | _medians(measured["runs"][0]))
            bodies = serve.request_bodies(dataclasses.replace(options, seed=seed + 1), work, model)
            runs.append({"client": "openai", "load": load} | _medians(_by_openai(bodies, load, options)))
    compared = _compared(runs)
    print(_table(compared))
    if _OUT.value is not None:
        fields = {"workload": work.name, "openai": openai.__version__, "compared": compared, "runs": runs}
        report.write(_OUT.value, report.document("benchmarks.two_clients", sys.argv, **fields))


def _by_openai(bodies: Sequence[dict[str, Any]], load: int, options: serve.Options) -> dict[str, Any]:
    """The figures of one run by the `openai` package: `load` threads, each with one request at a time."""
    client = openai.OpenAI(base_url=f"{options.url}/v1", api_key="none", max_retries=0, timeout=options.timeout_s)

    def ask(body: dict[str, Any]) -> serve.Sample:
        known = ("model", "prompt", "max_tokens", "temperature", "stream", "stream_options")
        extra = {name: value for name, value in body.items() if name not in known}
        sample = serve.Sample(time.perf_counter())
        sample.sent = sample.due
        for chunk in client.completions.create(**{name: body[name] for name in known}, extra_body=extra):
            new = chunk.usage.completion_tokens - sample.num_tokens if chunk.usage else 0
            if new > 0:
                sample.times.append((time.perf_counter(), new))
                sample.num_tokens += new
        sample.ended = time.perf_counter()
        assert sample.num_tokens == body["max_tokens"], f"{sample.num_tokens} tokens came"
        return sample

    started = time.perf_counter()
    with ThreadPoolExecutor(load) as threads:
        samples = list(threads.map(ask, bodies))
    return serve.figures(samples, time.perf_counter() - started, options)


def _medians(run: dict[str, Any]) -> dict[str, float]:
    assert not run["failed"], run["errors"]
    return {name: run[name]["p50"] if isinstance(run[name], dict) else run[name] for name in _FIGURES}


def _compared(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each load: the median of the rounds by each client, their ratio, and the spread among one client's rounds."""
    rows = []
    for load in sorted({run["load"] for run in runs}):
        for name in _FIGURES:
            values = {
                client: [run[name] for run in runs if (run["client"], run["load"]) == (client, load)]
                for client in ("bench serve", "openai")
            }
            middle = {client: statistics.median(found) for client, found in values.items()}
            spread = max(max(found) / min(found) - 1 for found in values.values())
            ratio = middle["openai"] / middle["bench serve"]
            rows.append({"load": load, "figure": name, **middle, "ratio": ratio, "spread": spread})
    return rows


def _table(rows: Sequence[dict[str, Any]]) -> str:
    head = ["clients", "median", "bench serve", "openai", "ratio", "spread of rounds"]
    return report.table(
        [
            head,
            *(
                [
                    f"{row['load']}",
                    row["figure"],
                    f"{row['bench serve']:.1f}",
                    f"{row['openai']:.1f}",
                    f"{row['ratio']:.3f}",
                    f"{row['spread']:.1%}",
                ]
                for row in rows
            ),
        ]
    )


if __name__ == "__main__":
    app.run(main, argv=sys.argv)
