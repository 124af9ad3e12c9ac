"""RemoteRequest: one request of an API process: from parts without text to outputs with it.

Made by client.py. Does what output.OutputState does in the engine's process, on what the engine sends: the engine
neither makes text nor knows of stop strings, so a stop string is found here, and the engine is told to end there.
"""

import dataclasses
from collections.abc import Callable, Sequence

from jax_engine import (
    CompletionOutput,
    EngineError,
    FinishReason,
    RequestMetrics,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)
from jax_engine.completion_text import CompletionText
from jax_engine.output_stream import OutputStream
from jax_engine.request import PositionLogprobs
from jax_engine.tokenizer import Tokenizer
from serving.remote import wire


class _Completion:
    """One of the n completions."""

    __slots__ = ("ended", "num_tokens", "text")

    def __init__(self, text: CompletionText):
        self.text = text
        self.num_tokens = 0
        self.ended = False


class RemoteRequest:
    """The reader's side of one request.

    Args:
        stream: where outputs go.
        params: as the client asked; what is not asked for as DELTA comes in one piece.
        eos_token_ids: of the model.
        stop: called with a completion's index and the stop string that was found in its text.

    Attributes:
        params: what the engine is asked for.
        ended: nothing more is expected.
    """

    def __init__(
        self,
        stream: OutputStream,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        eos_token_ids: frozenset[int],
        stop: Callable[[int, str], None],
    ):
        self._kind = params.output_kind
        in_parts = bool(params.stop) or self._kind is not RequestOutputKind.FINAL_ONLY
        self.params = dataclasses.replace(
            params,
            stop=None,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA if in_parts else RequestOutputKind.FINAL_ONLY,
        )
        self.ended = False
        self._stream, self._stop = stream, stop
        self._prompt_token_ids = list(prompt_token_ids)
        self._stops = frozenset(params.stop_token_ids or ()) | (frozenset() if params.ignore_eos else eos_token_ids)
        self._completions = [_Completion(CompletionText(tokenizer, params)) for _ in range(params.n)]
        self._prompt_logprobs: list[PositionLogprobs | None] | None = None
        self._so_far: RequestOutput | None = None  # where the client wants all in one piece

    def fail(self, error: EngineError) -> None:
        """Ends the stream with an error."""
        self.ended = True
        self._stream.put(error)

    def take(self, part: wire.Part) -> None:
        """Takes in what is new."""
        outputs = [self._with_text(piece) for piece in part.pieces if not self._completions[piece.index].ended]
        self._prompt_logprobs = part.prompt_logprobs or self._prompt_logprobs
        self.ended = part.finished or all(completion.ended for completion in self._completions)
        if not outputs and not self.ended:
            return
        output = RequestOutput(
            request_id=self._stream.request_id,
            prompt=None,
            prompt_token_ids=self._prompt_token_ids,
            outputs=outputs,
            finished=self.ended,
            metrics=part.metrics or RequestMetrics(0.0),
            prompt_logprobs=self._prompt_logprobs,
            num_cached_tokens=part.num_cached_tokens,
            embedding=wire.embedding(part.embedding),
            error=part.error,
            error_param=part.error_param,
        )
        if self._kind is not RequestOutputKind.DELTA:
            if self._so_far is not None:
                self._so_far.take_in(output)
                output = self._so_far
            self._so_far = output
            if not self.ended:
                return
        self._stream.put(output)

    def _with_text(self, piece: wire.Piece) -> CompletionOutput:
        """The completion's output; cut behind the token that completed a stop string."""
        completion = self._completions[piece.index]
        last = len(piece.token_ids) - 1
        for at, token in enumerate(piece.token_ids):
            completion.num_tokens += 1
            reason = piece.finish_reason if at == last else None
            stops = reason is FinishReason.STOP and token in self._stops
            ends = stops or reason is FinishReason.LENGTH
            found = completion.text.push(token, completion.num_tokens, last=ends, stops=stops)
            if found is not None:
                if reason is None:
                    self._stop(piece.index, found)
                if not ends:
                    _cut(piece, at + 1, found)
                break
        completion.ended = piece.finish_reason is not None
        return wire.completion(piece, completion.text.take(ended=completion.ended, new_only=True))


def _cut(piece: wire.Piece, count: int, stop: str) -> None:
    """Leaves a piece its first tokens: the output has ended there."""
    if piece.logprobs is not None and piece.cumulative_logprob is not None:
        dropped = zip(piece.token_ids[count:], piece.logprobs[count:], strict=True)
        piece.cumulative_logprob -= sum(position[token].logprob for token, position in dropped)
        piece.logprobs = piece.logprobs[:count]
    piece.token_ids = piece.token_ids[:count]
    piece.finish_reason, piece.stop_reason = FinishReason.STOP, stop
