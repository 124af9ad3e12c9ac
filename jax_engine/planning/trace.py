"""Traces: who asks when, for how much. One JSON object a line; made up, taken from a step log, or written by a user.

A trace holds no text and no tokens. Prompts are made from it when it is run: random token ids, the same for the same
trace; requests of one prefix group begin with the same tokens.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np

from jax_engine.errors import ConfigError
from jax_engine.sampling_params import RequestOutputKind, SamplingParams
from jax_engine.step_log import Added, Done, Ended, LogReader, Step

MAX_TOKENS = 1 << 24
MAX_REQUESTS = 1_000_000
#: Prompts that agree in this many tokens are taken to share a prefix on purpose.
_SAME_BEGINNING = 32
_Count = Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)]


class TraceError(ConfigError):
    """A file is no trace."""


class TraceRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One request.

    Attributes:
        arrival_s: seconds since the trace began.
        prefix_group: requests of a group begin with the same `prefix_tokens` tokens (the smaller number of two).
        ends: `length`: the scheduler knows how long it will be. `stop`: it learns so from the last token, as with an
            end-of-sequence token, and may have scheduled more by then.
    """

    arrival_s: Annotated[float, msgspec.Meta(ge=0)]
    prompt_tokens: _Count
    output_tokens: _Count
    prefix_group: str | None = None
    prefix_tokens: Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)] = 0
    priority: int = 0
    user: str | None = None
    ends: Literal["length", "stop"] = "length"

    def __post_init__(self) -> None:
        if self.prefix_tokens > self.prompt_tokens or (self.prefix_group is None) != (self.prefix_tokens == 0):
            raise ValueError(
                f"prefix_group goes with prefix_tokens, at most prompt_tokens {self.prompt_tokens}; "
                f"got {self.prefix_group!r} with {self.prefix_tokens}"
            )

    def sampling_params(self, stop_token: int) -> SamplingParams:
        """Greedy, with the output length of the trace; only a simulated device can end it by `stop_token`."""
        stops = self.ends == "stop"
        return SamplingParams(
            temperature=0.0,
            max_tokens=2 * self.output_tokens if stops else self.output_tokens,
            stop_token_ids=(stop_token,) if stops else (),
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )


def read(path: str) -> list[TraceRequest]:
    """A trace from a file, in order of arrival.

    Raises:
        TraceError: there is none; the line at fault is named.
    """
    decode = msgspec.json.Decoder(TraceRequest).decode
    requests = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if number > MAX_REQUESTS:
                    raise TraceError(f"{path}: more than {MAX_REQUESTS} requests")
                if line.strip():
                    try:
                        requests.append(decode(line))
                    except msgspec.MsgspecError as error:
                        raise TraceError(f"{path}:{number}: {error}") from None
    except OSError as error:
        raise TraceError(f"trace {path!r} cannot be read: {error.strerror}") from None
    if not requests:
        raise TraceError(f"trace {path!r} holds no request")
    return sorted(requests, key=lambda request: request.arrival_s)


def write(path: str, requests: Iterable[TraceRequest]) -> None:
    """Writes a trace.

    Raises:
        TraceError: the file cannot be written.
    """
    try:
        Path(path).write_bytes(b"".join(msgspec.json.encode(request) + b"\n" for request in requests))
    except OSError as error:
        raise TraceError(f"trace {path!r} cannot be written: {error.strerror}") from None


def prompts(requests: Iterable[TraceRequest], vocab_size: int, seed: int = 0) -> Iterator[list[int]]:
    """The prompt of each request: token ids in [1, vocab_size)."""
    chance = np.random.default_rng(seed)
    prefixes: dict[str, np.ndarray] = {}
    for request in requests:
        own = chance.integers(1, vocab_size, request.prompt_tokens)
        if request.prefix_group is not None:
            shared = prefixes.get(request.prefix_group, own[:0])
            # Grown where a later member shares more than those before it had; what is there stays.
            shared = np.concatenate([shared, own[len(shared) : request.prefix_tokens]])
            prefixes[request.prefix_group] = shared
            own[: request.prefix_tokens] = shared[: request.prefix_tokens]
        yield own.tolist()


def lengths(mean: float, spread: float, count: int, chance: np.random.Generator) -> list[int]:
    """Log-normal lengths of this mean, at least 1. `spread`: standard deviation over mean; 0 for all alike."""
    variance = np.log1p(spread**2)
    drawn = chance.lognormal(np.log(mean) - variance / 2, np.sqrt(variance), count)
    return np.clip(np.rint(drawn), 1, MAX_TOKENS).astype(int).tolist()


class _Workload(msgspec.Struct):
    """The part of a workload file (see benchmarks/workloads) that a trace needs."""

    requests: Annotated[list[tuple[_Count, _Count]], msgspec.Meta(min_length=1, max_length=MAX_REQUESTS)]


def lengths_of_workload(path: str) -> tuple[list[int], list[int]]:
    """Prompt and output lengths of a workload file.

    Raises:
        TraceError: it is none.
    """
    try:
        pairs = msgspec.json.decode(Path(path).read_bytes(), type=_Workload).requests
    except (OSError, msgspec.MsgspecError) as error:
        raise TraceError(f"workload {path!r} cannot be read: {error}") from None
    return [prompt for prompt, _ in pairs], [output for _, output in pairs]


def poisson(rate: float, count: int, chance: np.random.Generator) -> list[float]:
    """Arrival times of independent requests, `rate` a second (infinite: all at once); the first at 0."""
    return np.round(np.cumsum([0.0, *chance.exponential(1 / rate, count - 1)]), 6).tolist()


def bursty(rate: float, count: int, burst: int, chance: np.random.Generator) -> list[float]:
    """Arrival times in bursts of `burst` requests on average (geometric), ten times denser than the mean rate; the
    pauses between bursts keep the mean at `rate` a second."""
    gaps = chance.exponential(1 / (10 * rate), count - 1)
    pauses = chance.random(count - 1) < 1 / burst
    gaps[pauses] += chance.exponential(0.9 * burst / rate, int(pauses.sum()))
    return np.round(np.cumsum([0.0, *gaps]), 6).tolist()


def make(
    arrivals: list[float],
    prompt_lengths: list[int],
    output_lengths: list[int],
    *,
    groups: int = 0,
    prefix_tokens: int = 0,
    chance: np.random.Generator,
) -> list[TraceRequest]:
    """A trace from its parts. With groups, each request belongs to one, the first ones being the most popular (Zipf),
    and its prompt is the group's prefix and then as many tokens as `prompt_lengths` says."""
    members = [None] * len(arrivals)
    if groups:
        popularity = 1 / np.arange(1, groups + 1)
        members = chance.choice(groups, len(arrivals), p=popularity / popularity.sum()).tolist()
    return [
        TraceRequest(
            arrival_s=arrival,
            prompt_tokens=prompt + (prefix_tokens if groups else 0),
            output_tokens=output,
            prefix_group=None if member is None else f"group-{member}",
            prefix_tokens=prefix_tokens if groups else 0,
        )
        for arrival, prompt, output, member in zip(arrivals, prompt_lengths, output_lengths, members, strict=True)
    ]


def from_log(log: LogReader) -> list[TraceRequest]:
    """What a step log saw, a request of n completions as n requests. Only finished ones with output are taken.

    Prompts that begin with the same tokens form a prefix group; what a request shares is counted against the group's
    first prompt, so the growing history of one conversation is shared only as far as that goes.
    """
    added, outputs, stopped = _read_outputs(log)
    if not added:
        return []
    start = min(event.request.arrival_time for event in added.values())
    firsts: dict[tuple[int, ...], tuple[int, tuple[int, ...]]] = {}  # beginning -> group, first prompt
    requests = []
    for number, event in added.items():
        if outputs[number]:
            request = event.request
            group, shared = _shared(request.prompt_token_ids, firsts)
            requests.append(
                TraceRequest(
                    arrival_s=round(request.arrival_time - start, 6),
                    prompt_tokens=len(request.prompt_token_ids),
                    output_tokens=outputs[number],
                    prefix_group=group,
                    prefix_tokens=shared,
                    priority=request.priority,
                    user=getattr(request, "user", None),
                    ends="stop" if number in stopped else "length",
                )
            )
    return sorted(requests, key=lambda request: request.arrival_s)


def _read_outputs(log: LogReader) -> tuple[dict[int, Added], dict[int, int], set[int]]:
    """By sequence: its request and its number of output tokens; and which ended by a stop."""
    added: dict[int, Added] = {}
    outputs: dict[int, int] = {}
    stopped: set[int] = set()
    rows: dict[int, list[list]] = {}
    for event in log:
        match event:
            case Added():
                for number, *_ in event.sequences:
                    added[number], outputs[number] = event, 0
            case Step() if event.bucket is not None:
                rows[event.number] = event.decision["rows"]
            case Done():
                _count_outputs(rows.pop(event.number), event.tokens, added, outputs, stopped)
            case Ended():
                stopped.add(event.sequence)
    return added, outputs, stopped


def _count_outputs(
    rows: list[list], tokens: list[int], added: dict[int, Added], outputs: dict[int, int], stopped: set[int]
) -> None:
    for (number, _, _, samples, *_), token in zip(rows, tokens, strict=True):
        if samples and number not in stopped:
            own = next(own for own in added[number].sequences if own[0] == number)
            prompt = len(added[number].request.prompt_token_ids)
            if prompt + outputs[number] < own[2]:
                outputs[number] += 1
                if token in own[3]:
                    stopped.add(number)


def _shared(
    prompt: tuple[int, ...], firsts: dict[tuple[int, ...], tuple[int, tuple[int, ...]]]
) -> tuple[str | None, int]:
    """The prompt's group and how many tokens it has in common with the group's first prompt."""
    if len(prompt) < _SAME_BEGINNING:
        return None, 0
    beginning = prompt[:_SAME_BEGINNING]
    number, first = firsts.setdefault(beginning, (len(firsts), prompt))
    same = next((i for i, pair in enumerate(zip(first, prompt, strict=False)) if pair[0] != pair[1]), None)
    return f"prefix-{number}", min(len(first), len(prompt)) if same is None else same
