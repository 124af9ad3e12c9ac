"""Log-probabilities in the three shapes of the protocols. JSON has no infinity: what is below -9999 is sent as -9999.

Called by the completion and chat routes.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jax_engine import Logprob

_LOWEST = -9999.0

TokenText = Callable[[int], str]
_Position = dict[int, Logprob]


def token_texts(tokenizer: Any) -> TokenText:
    """Token id -> text; the id itself in writing where the model has no tokenizer."""
    return str if tokenizer is None else tokenizer.token_text


def _value(logprob: float) -> float:
    return logprob if logprob > _LOWEST else _LOWEST  # also for NaN


def _text(token: int, entry: Logprob, token_text: TokenText) -> str:
    return token_text(token) if entry.decoded_token is None else entry.decoded_token


def _likeliest(position: _Position, count: int) -> list[tuple[int, Logprob]]:
    """The `count` most likely entries, best first; the chosen token is among them only if it is one."""
    return sorted(position.items(), key=lambda item: -_value(item[1].logprob))[:count]


def completion_logprobs(
    positions: Sequence[_Position | None],
    token_ids: Sequence[int],
    token_text: TokenText,
    *,
    num_top: int,
    offset: int,
) -> tuple[dict[str, Any], int]:
    """The `logprobs` object of completions.

    Args:
        positions: one per token; None for a prompt's first token, which nothing precedes.
        num_top: entries of `top_logprobs` beside the chosen token.
        offset: characters before the first token.

    Returns:
        The object, and the characters up to the end of the last token.
    """
    tokens, values, tops, offsets = [], [], [], []
    for token, position in zip(token_ids, positions, strict=True):
        text = token_text(token) if position is None else _text(token, position[token], token_text)
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        values.append(None if position is None else _value(position[token].logprob))
        tops.append(None if position is None else _tops(token, position, token_text, num_top))
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}, offset


def _tops(token: int, position: _Position, token_text: TokenText, num_top: int) -> dict[str, float]:
    entries = dict([(token, position[token]), *_likeliest(position, num_top)])
    return {_text(other, entry, token_text): _value(entry.logprob) for other, entry in entries.items()}


def chat_logprobs(
    positions: Sequence[_Position], token_ids: Sequence[int], tokenizer: Any, *, num_top: int
) -> dict[str, Any]:
    """The `logprobs` object of chat completions; exactly `num_top` alternatives per token where there are so many."""

    def entry(token: int, logprob: Logprob) -> dict[str, Any]:
        return {
            "token": _text(token, logprob, tokenizer.token_text),
            "logprob": _value(logprob.logprob),
            "bytes": list(tokenizer.token_bytes(token)),
        }

    content = [
        entry(token, position[token])
        | {"top_logprobs": [entry(other, logprob) for other, logprob in _likeliest(position, num_top)]}
        for token, position in zip(token_ids, positions, strict=True)
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(
    positions: Sequence[_Position | None] | None, token_text: TokenText
) -> list[dict[str, Any] | None] | None:
    """vLLM's `prompt_logprobs`: per prompt token, token id in writing -> logprob, rank and text."""
    if positions is None:
        return None
    return [
        None
        if position is None
        else {
            str(token): {
                "logprob": _value(entry.logprob),
                "rank": entry.rank,
                "decoded_token": _text(token, entry, token_text),
            }
            for token, entry in position.items()
        }
        for position in positions
    ]
