"""CostModel: how long a step takes, fitted from a step log; the clock of the simulator.

Device time of a step in its bucket is linear in what the bucket's size does not fix already:

    seconds = base + per_token * tokens + per_kv * kv + per_pair * pairs

with the step's real tokens, the KV positions read by rows of one token, and the query-key pairs of longer rows; no
coefficient is negative. A bucket that was seen too seldom for a slope takes the slopes of all buckets of its kind; one
never seen lies on the line through its neighbours. Host time is linear in the number of rows, phase by phase.
"""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from jax_engine.batch import Bucket
from jax_engine.errors import ConfigError
from jax_engine.step_log import Done, Header, LogReader, Step

FORMAT = 1
#: A bucket needs this many steps for slopes of its own, and a model this many at all.
_ENOUGH_FOR_SLOPES = 24
_ENOUGH = 8
#: A shared machine is slow for a second or two at a time, so as many steps in a row say as much as one.
_STEPS_THAT_VARY_TOGETHER = 10


class CostError(ConfigError):
    """No cost model can be read or fitted."""


class Work(NamedTuple):
    """What of a step's size counts for its device time."""

    tokens: int
    kv: int
    pairs: int

    @classmethod
    def of(cls, rows: Iterable[Sequence[Any]]) -> "Work":
        """Of rows that are [sequence, start, count, ...]."""
        tokens = kv = pairs = 0
        for _, start, count, *_ in rows:
            tokens += count
            if count == 1:
                kv += start + 1
            else:
                pairs += count * start + count * (count + 1) // 2
        return cls(tokens, kv, pairs)


class BucketCost(msgspec.Struct, frozen=True):
    """Seconds of a step in one bucket; `steps` it was fitted from, mean relative `error` of these."""

    bucket: Bucket
    base: float
    per_token: float
    per_kv: float
    per_pair: float
    steps: int
    error: float

    def seconds(self, work: Work) -> float:
        """Device time."""
        return self.base + self.per_token * work.tokens + self.per_kv * work.kv + self.per_pair * work.pairs


class HostCost(msgspec.Struct, frozen=True):
    """Seconds of one phase on the host."""

    base: float
    per_row: float

    def seconds(self, num_rows: int) -> float:
        """For a step of so many rows."""
        return self.base + self.per_row * num_rows


class Stalls(msgspec.Struct, frozen=True):
    """Compilations after ready: one in so many steps (0: none), and how long it held everything up."""

    every: float = 0.0
    seconds: float = 0.0


class CostModel(msgspec.Struct, frozen=True):
    """What `jax-engine fit` writes.

    Attributes:
        header: of the log: the machine and the configuration that was measured.
        host: schedule, build, dispatch and commit.
        turn: seconds of a turn outside of these phases.
        num_steps, num_exact: of the log; those whose device time was more than an upper bound.
    """

    header: Header
    buckets: list[BucketCost]
    host: dict[str, HostCost]
    turn: float
    stalls: Stalls
    num_steps: int
    num_exact: int
    format: int = FORMAT

    def device_seconds(self, bucket: Bucket, work: Work) -> float:
        """Device time of a step."""
        known = {cost.bucket: cost for cost in self.buckets}
        if bucket in known:
            return known[bucket].seconds(work)
        kind = sorted((cost for cost in self.buckets if cost.bucket.decode_only == bucket.decode_only), key=_size)
        kind = kind or sorted(self.buckets, key=_size)
        below = [cost for cost in kind if _size(cost) <= bucket.num_tokens]
        above = [cost for cost in kind if _size(cost) > bucket.num_tokens]
        if not below:  # smaller than any: surely no slower than the smallest
            return above[0].seconds(work)
        if not above:  # larger than any: in proportion, which is right once a step is bound by arithmetic
            return below[-1].seconds(work) * bucket.num_tokens / _size(below[-1])
        low, high = below[-1], above[0]
        share = (bucket.num_tokens - _size(low)) / (_size(high) - _size(low))
        return (1 - share) * low.seconds(work) + share * high.seconds(work)


def _size(cost: BucketCost) -> int:
    return cost.bucket.num_tokens


class _Sample(NamedTuple):
    bucket: Bucket
    work: Work
    seconds: float


def fit(logs: Sequence[LogReader]) -> CostModel:
    """A model of the engine that wrote the logs.

    Raises:
        CostError: the logs hold too few steps. LogError: one is damaged.
    """
    pairs: list[tuple[Step, Done]] = []
    gaps: list[float] = []
    for log in logs:
        _collect(log, pairs, gaps)
    if len(pairs) < _ENOUGH:
        raise CostError(f"the log holds {len(pairs)} finished steps; at least {_ENOUGH} are needed")
    normal = [(step, done) for step, done in pairs if not step.compiles]
    exact = [(step, done) for step, done in normal if done.exact]
    # Where the host is the slower one nearly no device time is exact; then the bounds are the best there is.
    used = exact if len(exact) >= max(_ENOUGH, len(normal) // 20) else normal
    samples = [_Sample(step.bucket, Work.of(step.decision["rows"]), done.device) for step, done in used if step.bucket]
    return CostModel(
        header=logs[0].header,
        buckets=_fit_buckets(samples),
        host=_fit_host(normal),
        turn=max(0.0, float(np.median(gaps))) if gaps else 0.0,
        stalls=_fit_stalls(pairs),
        num_steps=len(pairs),
        num_exact=len(exact),
    )


def _collect(log: LogReader, pairs: list[tuple[Step, Done]], gaps: list[float]) -> None:
    """Adds the log's finished steps, and the seconds between two turns of the engine's loop."""
    steps: dict[int, Step] = {}
    turn_end = None
    for event in log:
        if isinstance(event, Step):
            if turn_end is not None:
                gaps.append(event.time - turn_end)
            turn_end = event.time + sum(event.host)
            if event.bucket is not None:
                steps[event.number] = event
        elif isinstance(event, Done) and event.number in steps:
            pairs.append((steps.pop(event.number), event))
            turn_end = event.ready + event.commit


def _fit_buckets(samples: list[_Sample]) -> list[BucketCost]:
    costs = []
    for decode_only in (True, False):
        kind = [sample for sample in samples if sample.bucket.decode_only == decode_only]
        buckets = sorted({sample.bucket for sample in kind})
        if not kind:
            continue
        # One base for each bucket, slopes for all.
        bases = np.array([[sample.bucket == bucket for bucket in buckets] for sample in kind], float)
        common = _least_squares(kind, bases)[len(buckets) :] if len(kind) >= _ENOUGH_FOR_SLOPES else [0.0] * 3
        for bucket in buckets:
            own = [sample for sample in kind if sample.bucket == bucket]
            ones = np.ones((len(own), 1))
            if len(own) >= _ENOUGH_FOR_SLOPES:
                base, *slopes = _least_squares(own, ones)
            else:
                slopes = common
                rest = [sample.seconds - float(np.dot(slopes, sample.work)) for sample in own]
                base = max(0.0, float(np.mean(rest)))
            cost = BucketCost(bucket, float(base), *map(float, slopes), steps=len(own), error=0.0)
            errors = [abs(cost.seconds(sample.work) / max(sample.seconds, 1e-9) - 1) for sample in own]
            costs.append(msgspec.structs.replace(cost, error=float(np.mean(errors))))
    return costs


def _least_squares(samples: list[_Sample], bases: np.ndarray) -> np.ndarray:
    """Coefficients of the bases and of the three parts of the work, none negative. Of all choices of slopes that may be
    other than zero, the best by Schwarz's criterion (BIC), so that noise gives no slope."""
    independent = max(2.0, len(samples) / _STEPS_THAT_VARY_TOGETHER)
    work = np.array([sample.work for sample in samples], float)
    seconds = np.array([sample.seconds for sample in samples])
    best, least = np.zeros(bases.shape[1] + 3), np.inf
    for count in range(4):
        for chosen in itertools.combinations(range(3), count):
            matrix = np.hstack([bases, work[:, chosen]])
            scale = np.maximum(np.abs(matrix).max(axis=0), 1e-30)
            found, *_ = np.linalg.lstsq(matrix / scale, seconds, rcond=None)
            found = found / scale
            mean_square = float(((matrix @ found - seconds) ** 2).mean()) + 1e-18
            loss = independent * np.log(mean_square) + count * np.log(independent)
            if (found >= 0).all() and loss < least:
                least = loss
                best = np.zeros(bases.shape[1] + 3)
                best[: bases.shape[1]] = found[: bases.shape[1]]
                best[[bases.shape[1] + part for part in chosen]] = found[bases.shape[1] :]
    return best


def _fit_host(pairs: list[tuple[Step, Done]]) -> dict[str, HostCost]:
    rows = np.array([len(step.decision["rows"]) for step, _ in pairs], float)
    columns = {
        "schedule": [step.host[0] for step, _ in pairs],
        "build": [step.host[1] for step, _ in pairs],
        "dispatch": [step.host[2] for step, _ in pairs],
        "commit": [done.commit for _, done in pairs],
    }
    return {phase: _line(rows, np.array(seconds)) for phase, seconds in columns.items()}


def _line(x: np.ndarray, y: np.ndarray) -> HostCost:
    """Least squares with base and slope of at least zero."""
    spread = float(((x - x.mean()) ** 2).sum())
    slope = max(0.0, float(((x - x.mean()) * (y - y.mean())).sum()) / spread) if spread else 0.0
    base = float(y.mean()) - slope * float(x.mean())
    if base < 0:
        return HostCost(0.0, float(y.mean() / x.mean()))
    return HostCost(base, slope)


def _fit_stalls(pairs: list[tuple[Step, Done]]) -> Stalls:
    stalled = [sum(step.host) for step, _ in pairs if step.compiles]
    if not stalled:
        return Stalls()
    return Stalls(len(pairs) / len(stalled), float(np.mean(stalled)))


def read(path: str) -> CostModel:
    """A model from a file.

    Raises:
        CostError: there is none.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise CostError(f"cost model {path!r} cannot be read: {error.strerror}") from None
    try:
        model = msgspec.json.decode(content, type=CostModel)
    except msgspec.MsgspecError as error:
        raise CostError(f"{path} is no cost model of this version; make one with `jax-engine fit`: {error}") from None
    if model.format != FORMAT or not model.buckets:
        raise CostError(f"{path}: format {FORMAT} with buckets is read, got {model.format}")
    return model


def write(path: str, model: CostModel) -> None:
    """Writes a model.

    Raises:
        CostError: the file cannot be written.
    """
    try:
        Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(model), indent=1) + b"\n")
    except OSError as error:
        raise CostError(f"cost model {path!r} cannot be written: {error.strerror}") from None
