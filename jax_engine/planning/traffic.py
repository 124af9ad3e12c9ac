"""Runs a trace through an engine in open loop, and says what the clients saw.

The same loop drives the real engine on a real clock (benchmarks/prediction.py) and on a virtual one (simulator.py), so
that the two can be compared. Each request is put in at its time of arrival, or as soon after as the step in hand ends.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import msgspec
import numpy as np

from jax_engine.engine import Engine
from jax_engine.errors import EngineError
from jax_engine.planning.trace import TraceRequest

PERCENTILES = (50, 90, 99)
MS = 1e3

#: Ends a request whose trace says `stop`; prompts never hold it.
STOP_TOKEN = 0


class Seen(msgspec.Struct):
    """One request as its client saw it; seconds since the trace began."""

    arrival: float
    tokens: list[float] = []  # when each token came
    finished: float | None = None
    refused: str | None = None


class Figures(msgspec.Struct, frozen=True):
    """What the clients of a trace saw; latencies in milliseconds, by percentile (p50, p90, p99, mean, max).

    Attributes:
        duration_s: from the first arrival to the last token.
        inter_token_ms: of all gaps between two tokens of one request.
    """

    num_requests: int
    num_refused: int
    duration_s: float
    output_tok_per_s: float
    requests_per_s: float
    ttft_ms: dict[str, float]
    inter_token_ms: dict[str, float]
    latency_ms: dict[str, float]


def drive(
    engine: Engine,
    trace: Sequence[TraceRequest],
    prompts: Iterable[list[int]],
    sleep_until: Callable[[float], None],
    after_turn: Callable[[], None] = lambda: None,
) -> list[Seen]:
    """Runs all of a trace, sorted by arrival.

    Args:
        sleep_until: waits until the engine's clock shows that time.
        after_turn: called after each turn of the engine.
    """
    start = engine.clock()
    seen = [Seen(request.arrival_s) for request in trace]
    waiting = iter(enumerate(zip(trace, prompts, strict=True)))
    coming = next(waiting, None)
    while coming is not None or engine.has_work:
        while coming is not None and start + coming[1][0].arrival_s <= engine.clock():
            number, (request, prompt) = coming
            _submit(engine, str(number), request, prompt, start, seen[number])
            coming = next(waiting, None)
        if not engine.has_work:
            if coming is not None:
                sleep_until(start + coming[1][0].arrival_s)
            continue
        for output in engine.step():
            own = seen[int(output.request_id)]
            time = output.metrics.last_token_time
            if time is not None and output.outputs:
                own.tokens += [time - start] * len(output.outputs[0].token_ids)
            if output.finished:
                own.finished, own.refused = engine.clock() - start, output.error
        after_turn()
    return seen


def _submit(
    engine: Engine, request_id: str, request: TraceRequest, prompt: list[int], start: float, seen: Seen
) -> None:
    try:
        made = engine.make_request(request_id, prompt, request.sampling_params(STOP_TOKEN), request.priority)
        engine.submit(dataclasses.replace(made, arrival_time=start + request.arrival_s))
    except EngineError as error:
        seen.refused = str(error)


def figures(seen: Sequence[Seen]) -> Figures:
    """The figures of a run, or of several beside each other."""
    served = [one for one in seen if one.refused is None and one.tokens]
    end = max((one.tokens[-1] for one in served), default=0.0)
    duration = max(end - min((one.arrival for one in seen), default=0.0), 1e-9)
    gaps = [np.diff(one.tokens) for one in served]
    return Figures(
        num_requests=len(seen),
        num_refused=len(seen) - len(served),
        duration_s=duration,
        output_tok_per_s=sum(len(one.tokens) for one in served) / duration,
        requests_per_s=len(served) / duration,
        ttft_ms=_percentiles([one.tokens[0] - one.arrival for one in served]),
        inter_token_ms=_percentiles(np.concatenate(gaps) if gaps else []),
        latency_ms=_percentiles([one.tokens[-1] - one.arrival for one in served]),
    )


def _percentiles(seconds: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Milliseconds; zeros where there are no values."""
    values = np.asarray(seconds, float) * MS if len(seconds) else np.zeros(1)
    marks = {f"p{mark}": float(np.percentile(values, mark)) for mark in PERCENTILES}
    return marks | {"mean": float(values.mean()), "max": float(values.max())}
