"""Sequence: one completion in the making, as the scheduler sees it.

A request with `n` completions becomes `n` sequences. Each field has one writer, named beside it. Engine thread only.
"""

import enum
from dataclasses import dataclass, field

from jax_engine.request import FinishReason, Request

#: In a table: a page that the sequence no longer looks at, and does not hold.
NO_PAGE = -1


class Status(enum.Enum):
    """WAITING holds no slot; RUNNING holds a slot and pages; FINISHED will be given no more work."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens and counters of one completion.

    There is no prefill phase and no decode phase: `num_tokens` exist, `num_computed` of them have their KV written (or
    dispatched to be), and each step closes the gap within the token budget.

    Attributes:
        request: what was asked. index: which of the request's n completions this is.
        max_tokens_total: the sequence ends (`length`) when it has this many tokens, prompt included.
        stop_token_ids: tokens that end it (end-of-sequence tokens among them, unless ignored),
            but not within the first min_tokens.
        seed: 64 bits; the randomness of a token is a function of this and of the token's position.
        token_ids: prompt and output tokens known to the host.
        num_prompt_tokens: how many of them are prompt.
    Written by the scheduler:
        order: place in the line of arrivals; kept across preemptions.
        slot: row of the per-slot tables, -1 for none.
        num_computed: tokens whose KV is written or dispatched to be.
        num_pending: sampled tokens that are dispatched but not yet read back.
        num_inflight_steps: dispatched, uncommitted steps with a row of this sequence; while there are any, its pages
            and slot stay its own.
        num_reached: most tokens that were ever computed; what lies below has been computed at least once.
        num_cached: prompt tokens that were found in the cache when the sequence first got a slot; None before.
        swap: where in the host's swap space its first num_swapped tokens are kept; None: nowhere.
    Written by the page pool:
        tables: for each group of layers (see PageGroups), ids of the pages that hold positions [0, len * page_size);
            NO_PAGE for those that have been given back. pages: the first of them, which is the longest.
        num_places: positions for which every table has a page.
        num_dropped: how many pages of each sliding group, from the first on, have been given back.
        num_indexed: how many pages, from the first on, were offered to the index; these are never written again.
        digests: what the pool computes once about the tokens.
    """

    request: Request
    index: int
    max_tokens_total: int
    stop_token_ids: frozenset[int]
    seed: int
    token_ids: list[int] = field(init=False)
    num_prompt_tokens: int = field(init=False)
    order: int = -1
    status: Status = Status.WAITING
    slot: int = -1
    num_computed: int = 0
    num_pending: int = 0
    num_inflight_steps: int = 0
    num_reached: int = 0
    num_cached: int | None = None
    swap: int | None = None
    num_swapped: int = 0
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    tables: list[list[int]] = field(default_factory=lambda: [[]])
    pages: list[int] = field(init=False)
    num_places: int = 0
    num_dropped: int = 0
    num_indexed: int = 0
    digests: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.pages = self.tables[0]

    @property
    def num_tokens(self) -> int:
        """Tokens that exist, those not yet read back included."""
        return len(self.token_ids) + self.num_pending

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's log-probabilities are taken from this sequence; the first of a request does it."""
        return self.index == 0 and self.request.sampling_params.prompt_logprobs is not None

    def prompt_targets(self, start: int, count: int) -> list[int]:
        """The prompt tokens that follow those at [start, start + count), whose logits judge them; fewer at the end of
        the prompt."""
        return self.token_ids[start + 1 : min(start + count + 1, self.num_prompt_tokens)]

    @property
    def num_output_tokens(self) -> int:
        """Output tokens known to the host."""
        return len(self.token_ids) - self.num_prompt_tokens
