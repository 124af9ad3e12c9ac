"""The planner: which configuration meets latency targets for a trace at the least cost, and what else would do.

Cost is the number of replicas: each holds a device, busy or not. The search goes in three steps, because a simulation
takes a second or so: how many replicas the measured configuration needs; whether another token budget or number of
sequences needs fewer; and then, with these sizes, whether a simpler mode or fewer compiled buckets do as well.
"""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from jax_engine.errors import ConfigError
from jax_engine.planning.cost_model import CostModel
from jax_engine.planning.simulator import Prediction, limits_for, simulate
from jax_engine.planning.trace import TraceRequest

#: Of two configurations that differ by less, the simpler one does as well: about what a prediction is off by.
_AS_WELL = 0.1


class Targets(msgspec.Struct, frozen=True):
    """Milliseconds that a percentile (`p50`, `p90` or `p99`) of the trace's requests must stay within; None: any."""

    ttft_ms: float | None
    itl_ms: float | None
    percentile: str = "p99"

    def loads(self, prediction: Prediction) -> dict[str, float]:
        """Each target's share that is used up; up to 1 it is met."""
        figures = prediction.figures
        pairs = {"TTFT": (figures.ttft_ms, self.ttft_ms), "inter-token": (figures.inter_token_ms, self.itl_ms)}
        return {name: got[self.percentile] / target for name, (got, target) in pairs.items() if target is not None}


class Candidate(msgspec.Struct, frozen=True):
    """A configuration and what it would do.

    Attributes:
        options: fields of EngineConfig that differ from the measured engine's.
        load: the largest share of a target that is used up; at most 1 if all are met and no request is refused.
    """

    options: dict[str, Any]
    replicas: int
    prediction: Prediction
    load: float

    @property
    def meets(self) -> bool:
        """Whether every target is met and every request served."""
        return self.load <= 1


class Plan(msgspec.Struct, frozen=True):
    """What came of a search.

    Attributes:
        best: the choice; if nothing meets the targets, what comes nearest with the most replicas.
        measured: the measured configuration with as many replicas as the best.
        tried: all of them, in order.
        simpler: label -> the best one's sizes in another mode, or with fewer buckets.
    """

    targets: Targets
    best: Candidate
    measured: Candidate
    tried: list[Candidate]
    simpler: dict[str, Candidate]


class Planner:
    """One search.

    Args:
        progress: called with a line about each simulation.
    """

    def __init__(
        self,
        trace: Sequence[TraceRequest],
        cost: CostModel,
        targets: Targets,
        base: dict[str, Any],
        *,
        max_replicas: int = 8,
        progress: Callable[[str], None] = lambda line: None,
    ):
        self._trace, self._cost, self._targets, self._base = trace, cost, targets, base
        self._max_replicas = min(max_replicas, len(trace))
        self._progress = progress
        self._known: dict[bytes, Candidate] = {}

    def plan(self) -> Plan:
        """Searches.

        Raises:
            ConfigError: the base configuration is not possible.
        """
        replicas = self._least_replicas()
        best = self._best_sizes(replicas)
        while best.meets and replicas > 1 and (fewer := self._best_sizes(replicas - 1)).meets:
            best, replicas = fewer, replicas - 1
        return Plan(
            targets=self._targets,
            best=best,
            measured=self._try({}, replicas),
            simpler=self._simpler(best),
            tried=list(self._known.values()),
        )

    def _least_replicas(self) -> int:
        """With the measured sizes: by doubling, then by halving the interval."""
        high = 1
        while not self._try({}, high).meets:
            if high == self._max_replicas:
                return high
            high = min(2 * high, self._max_replicas)
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            if self._try({}, middle).meets:
                high = middle
            else:
                low = middle
        return high

    def _best_sizes(self, replicas: int) -> Candidate:
        """The least loaded of the measured sizes and those around them; the measured ones unless others are better by
        more than a prediction is off."""
        measured = self._try({}, replicas)
        candidates = [self._try(options, replicas) for options in self._sizes()]
        best = min([measured, *candidates], key=lambda candidate: candidate.load)
        return measured if measured.meets and measured.load <= best.load * (1 + _AS_WELL) else best

    def _sizes(self) -> list[dict[str, Any]]:
        """Token budgets and numbers of sequences up to those that were measured: beyond is guesswork."""
        _, limits = limits_for(self._cost, self._base)
        sizes = []
        for seqs in (limits.max_num_seqs, limits.max_num_seqs // 2, limits.max_num_seqs // 4):
            for budget in (limits.max_num_batched_tokens // part for part in (1, 2, 4, 8)):
                if seqs >= 1 and budget >= seqs:
                    sizes.append({"max_num_seqs": seqs, "max_num_batched_tokens": budget})
        return [
            options
            | {"token_buckets": _up_to(limits.token_buckets, options["max_num_batched_tokens"])}
            | {"decode_buckets": _up_to(limits.decode_buckets, options["max_num_seqs"])}
            for options in sizes[1:]
        ]

    def _simpler(self, best: Candidate) -> dict[str, Candidate]:
        _, limits = limits_for(self._cost, self._base | best.options)
        variants: dict[str, dict[str, Any]] = {
            mode: {"scheduling": mode} for mode in ("async", "sync", "static") if mode != limits.scheduling
        }
        fewest = {"token_buckets": limits.token_buckets[-1:], "decode_buckets": limits.decode_buckets[-1:]}
        if len(limits.token_buckets) + len(limits.decode_buckets) > 2:
            variants["largest buckets only"] = fewest
        return {label: self._try(best.options | options, best.replicas) for label, options in variants.items()}

    def _try(self, options: dict[str, Any], replicas: int) -> Candidate:
        key = msgspec.json.encode((sorted(options.items()), replicas))
        if key not in self._known:
            prediction = simulate(self._trace, self._cost, self._base | options, replicas=replicas)
            refused = prediction.figures.num_refused > 0
            load = float("inf") if refused else max(self._targets.loads(prediction).values())
            self._known[key] = Candidate(options, replicas, prediction, load)
            outcome = "refuses requests" if refused else f"{load:.0%} of the targets"
            self._progress(f"{describe(self._known[key])}: {outcome}")
        return self._known[key]


def _up_to(buckets: tuple[int, ...], largest: int) -> tuple[int, ...]:
    """The buckets below a size, and that size; none stay none."""
    return (*(size for size in buckets if size < largest), largest) if buckets else ()


def describe(candidate: Candidate) -> str:
    """A candidate in a few words."""
    words = [f"{candidate.replicas} x"]
    options = candidate.options
    if "scheduling" in options:
        words.append(str(options["scheduling"]))
    if "max_num_seqs" in options:
        words.append(f"{options['max_num_seqs']} sequences, {options['max_num_batched_tokens']} tokens")
    elif len(options) == 0:
        words.append("as measured")
    if len(options.get("token_buckets", ())) == 1 and len(options.get("decode_buckets", ())) == 1:
        words.append("one bucket each")
    return " ".join(words)


def verdict(plan: Plan) -> str:
    """The plan in a paragraph."""
    best, targets = plan.best, plan.targets
    loads = targets.loads(best.prediction)
    tightest = max(loads, key=lambda target: loads[target])
    if not best.meets:
        text = f"No configuration tried meets the targets. Nearest is {describe(best)}: "
        if best.load == float("inf"):
            return text + "but it refuses requests that are too long for it; raise max_model_len or the pool."
        text += f"its {tightest} {targets.percentile} is {loads[tightest]:.2f} times what is allowed. "
        if best.prediction.utilisation < 0.3:
            return text + "Its devices are mostly idle, so more replicas will not help: the step itself is too slow."
        return text + "More replicas may help (--max_replicas)."
    text = f"{describe(best)} meets the targets with {best.load:.0%} of the tightest one ({tightest}) used"
    text += f" and its devices {best.prediction.utilisation:.0%} busy. "
    if best.options and not plan.measured.meets:
        text += f"The measured sizes would not do with {best.replicas}. "
    good = [label for label, other in plan.simpler.items() if other.meets and other.load <= best.load * (1 + _AS_WELL)]
    enough = [label for label, other in plan.simpler.items() if other.meets and label not in good]
    failing = [label for label, other in plan.simpler.items() if not other.meets]
    for labels, words in ((good, "does as well"), (enough, "meets the targets too, with less to spare")):
        text += "".join(f"`{label}` {words}. " for label in labels)
    return (text + "".join(f"`{label}` does not meet them. " for label in failing)).strip()


def check_targets(ttft_ms: float | None, itl_ms: float | None, percentile: str) -> Targets:
    """Targets from a command line.

    Raises:
        ConfigError: there is none, or one is not above 0.
    """
    given = [value for value in (ttft_ms, itl_ms) if value is not None]
    if not given or min(given) <= 0:
        raise ConfigError(f"give --slo_ttft_ms or --slo_itl_ms, above 0; got {ttft_ms} and {itl_ms}")
    return Targets(ttft_ms, itl_ms, percentile)
