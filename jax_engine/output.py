"""From tokens to what the caller sees: text, log-probabilities, RequestOutputs.

One OutputState per request, fed by the engine with each accepted token. It decides nothing about scheduling: when it
finds a stop string it says so, and the engine ends the sequence.
"""

from dataclasses import dataclass

import numpy as np

from jax_engine.completion_text import CompletionText
from jax_engine.request import (
    CompletionOutput,
    FinishReason,
    Logprob,
    PositionLogprobs,
    Request,
    RequestMetrics,
    RequestOutput,
)
from jax_engine.sampling_params import RequestOutputKind
from jax_engine.sequence import Sequence, Status
from jax_engine.tokenizer import Tokenizer


@dataclass(slots=True)
class _Completion:
    """What has been made of one sequence so far, and how much of it the caller has been given."""

    sequence: Sequence
    text: CompletionText
    logprobs: list[PositionLogprobs] | None = None
    cumulative_logprob: float | None = None
    sent_tokens: int = 0
    sent_end: bool = False


class OutputState:
    """The outputs of one request.

    Args:
        request: what was asked.
        sequences: its n sequences.
        tokenizer: None for a model without one; the text is then empty.
    """

    def __init__(self, request: Request, sequences: list[Sequence], tokenizer: Tokenizer | None):
        self.request = request
        self.sequences = sequences
        self.metrics = RequestMetrics(request.arrival_time)
        params = request.sampling_params
        self.prompt_logprobs: list[PositionLogprobs | None] | None = None if params.prompt_logprobs is None else [None]
        self._params = params
        self._only_final = params.output_kind is RequestOutputKind.FINAL_ONLY
        self._only_news = params.output_kind is RequestOutputKind.DELTA
        self._prompt_token_ids = list(request.prompt_token_ids)
        self._tokenizer = tokenizer
        self.embedding: np.ndarray | None = None
        self._error: str | None = None
        self._error_param: str | None = None
        self._completions = [
            _Completion(
                sequence,
                CompletionText(tokenizer, params),
                logprobs=None if params.logprobs is None else [],
                cumulative_logprob=None if params.logprobs is None else 0.0,
            )
            for sequence in sequences
        ]

    @property
    def finished(self) -> bool:
        """Whether every completion has ended."""
        if len(self.sequences) == 1:  # asked for every token, so the common case is kept cheap
            return self.sequences[0].status is Status.FINISHED
        return all(sequence.status is Status.FINISHED for sequence in self.sequences)

    def fail(self, message: str, param: str | None = None) -> None:
        """Notes why the request failed; the caller reads it as RequestOutput.error and error_param. The first reason
        stands."""
        if self._error is None:
            self._error, self._error_param = message, param

    def append(self, sequence: Sequence, token: int, logprobs: PositionLogprobs | None) -> str | None:
        """Takes in an accepted token. Returns the stop string that it completed, if it did."""
        completion = self._completions[sequence.index]
        if logprobs is not None:
            assert completion.logprobs is not None and completion.cumulative_logprob is not None
            completion.logprobs.append(self._decoded(logprobs))
            completion.cumulative_logprob += logprobs[token].logprob
        reason = sequence.finish_reason
        return completion.text.push(
            token, sequence.num_output_tokens, last=reason is not None, stops=reason is FinishReason.STOP
        )

    def add_prompt_logprobs(self, first: int, logprobs: list[PositionLogprobs]) -> None:
        """Takes in those of the prompt tokens from position `first` on; what is known already is passed over."""
        assert self.prompt_logprobs is not None
        known = len(self.prompt_logprobs)
        self.prompt_logprobs.extend(self._decoded(entry) for entry in logprobs[max(0, known - first) :])

    def _decoded(self, logprobs: PositionLogprobs) -> PositionLogprobs:
        if self._tokenizer is None or not self._params.detokenize:
            return logprobs
        decode = self._tokenizer.token_text
        return {token: Logprob(entry.logprob, entry.rank, decode(token)) for token, entry in logprobs.items()}

    def output(self) -> RequestOutput | None:
        """What the caller is to be given now, or None; as the request's output_kind says."""
        finished = self.finished
        if self._only_final and not finished:
            return None
        outputs = []
        for completion in self._completions:
            new = self._new_output(completion)
            if new is not None:
                outputs.append(new)
        if not outputs and not finished:
            return None
        return RequestOutput(  # by position, as below: by name it takes twice as long
            self.request.request_id,
            self.request.prompt,
            self._prompt_token_ids,
            outputs,
            finished,
            self.metrics,
            self.prompt_logprobs,
            self.sequences[0].num_cached or 0,
            self.embedding,
            self._error,
            self._error_param,
        )

    def _new_output(self, completion: _Completion) -> CompletionOutput | None:
        """What the caller is to be given of a completion; None if it is a stream of news and there are none."""
        sequence, tokens = completion.sequence, 0
        num_tokens = len(sequence.token_ids) - sequence.num_prompt_tokens
        ended = sequence.finish_reason is not None
        if self._only_news:
            tokens = completion.sent_tokens
            if num_tokens <= tokens and (not ended or completion.sent_end):
                return None
        logprobs = completion.logprobs
        completion.sent_tokens = num_tokens
        completion.sent_end = ended
        return CompletionOutput(
            sequence.index,
            completion.text.take(ended=ended, new_only=self._only_news),
            sequence.token_ids[sequence.num_prompt_tokens + tokens :],
            completion.cumulative_logprob,
            None if logprobs is None else logprobs[tokens:],
            sequence.finish_reason,
            sequence.stop_reason,
        )


def unit_vector(vector: np.ndarray) -> np.ndarray:
    """The vector made length 1."""
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def position_logprobs(
    token: int, wanted: int, logprob: np.ndarray, rank: np.ndarray, top_ids: np.ndarray, top_logprobs: np.ndarray
) -> PositionLogprobs:
    """The chosen token and the `wanted` likeliest ones at a position, from the arrays that a step gave."""
    entries = {token: Logprob(float(logprob), int(rank))}
    for i in range(wanted):
        entries.setdefault(int(top_ids[i]), Logprob(float(top_logprobs[i]), i + 1))
    return entries
