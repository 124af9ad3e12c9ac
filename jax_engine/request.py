"""What goes into the engine (Request) and what comes out of it (RequestOutput and its parts).

Field names of the outputs are vLLM's. Nothing here touches a device.
"""

import enum
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from jax_engine.sampling_params import SamplingParams

#: Longest user, slo_class or cache_salt of a request.
MAX_NAME_CHARS = 512


class FinishReason(enum.StrEnum):
    """Why a completion ended; the values are those of the OpenAI API, plus `abort` and `error`."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and how to continue it.

    Attributes:
        request_id: unique among live requests.
        prompt_token_ids: at least one token.
        sampling_params: checked; see SamplingParams.
        prompt: the prompt's text, when it was given as text; carried through to the output.
        arrival_time: seconds on the engine's monotonic clock.
        priority: lower is served first, where the policy looks at it.
        bad_token_ids: the token sequences of `sampling_params.bad_words`.
        grammar: `sampling_params.structured_outputs`, compiled: a grammar.Grammar.
        embed: the prompt's embedding is wanted; the one token that is sampled has no meaning.
        user: who asks; the fair policy shares the engine among users. None: one nameless user.
        slo_class: name of one of the operator's latency classes; None: the first. Read by the slo policy.
        cache_salt: requests use each other's cached prefixes only if their salts are equal.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling_params: SamplingParams
    prompt: str | None = None
    arrival_time: float = 0.0
    priority: int = 0
    bad_token_ids: tuple[tuple[int, ...], ...] = ()
    grammar: Any = None
    embed: bool = False
    user: str | None = None
    slo_class: str | None = None
    cache_salt: str | None = None


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of one token under the model's raw logits; `rank` 1 is the most likely token."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


#: For one position: token id -> Logprob; the chosen (or prompt) token comes first, then the most likely ones in order.
PositionLogprobs = dict[int, Logprob]


class CompletionOutput(msgspec.Struct, gc=False):  # made for every token of every stream: a struct is made in C
    """One completion of a request.

    In a stream `text` and `token_ids` hold everything so far, or only what is new, as the method that made them says.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def take_in(self, newer: "CompletionOutput") -> None:
        """Joins the next part of a stream of DELTA outputs to this one."""
        self.text += newer.text
        self.token_ids += newer.token_ids
        if self.logprobs is not None and newer.logprobs is not None:
            self.logprobs += newer.logprobs
        self.cumulative_logprob = newer.cumulative_logprob
        self.finish_reason, self.stop_reason = newer.finish_reason, newer.stop_reason


@dataclass(slots=True)
class RequestMetrics:
    """Seconds on the engine's monotonic clock; None until the event has happened."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0


class RequestOutput(msgspec.Struct, gc=False):
    """The state of one request, as handed to the caller. `finished` is true once every completion has ended.

    `embedding`, of a request with `embed`: the last hidden state of the prompt's last token, [D] float32, of length 1.
    `error` says why a request failed inside; `error_param` names the parameter, where the request itself is at fault.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    #: Prompt tokens whose KV was found in the prefix cache.
    num_cached_tokens: int = 0
    embedding: np.ndarray | None = None
    error: str | None = None
    error_param: str | None = None

    def take_in(self, newer: "RequestOutput") -> None:
        """Joins the next output of a stream of DELTA outputs to this one."""
        mine = {output.index: output for output in self.outputs}
        for output in newer.outputs:
            if output.index in mine:
                mine[output.index].take_in(output)
            else:
                self.outputs.append(output)
        self.finished, self.metrics = newer.finished, newer.metrics
        self.prompt_logprobs, self.num_cached_tokens = newer.prompt_logprobs, newer.num_cached_tokens
        self.embedding, self.error, self.error_param = newer.embedding, newer.error, newer.error_param
