"""CompletionText: the text of one completion, made token by token, and the search for stop strings in it.

Used by output.py in the engine's process, and by a server that makes texts in processes of its own. It decides nothing
about scheduling: when it finds a stop string it says so.
"""

from jax_engine.sampling_params import SamplingParams
from jax_engine.tokenizer import Tokenizer


class CompletionText:
    """One completion's text.

    Args:
        tokenizer: None for a model without one; the text is then empty.
        params: of the request.
    """

    __slots__ = ("_num_given", "_num_held", "_params", "_stream", "_text")

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams):
        self._params = params
        self._stream = tokenizer.stream(params.skip_special_tokens) if tokenizer and params.detokenize else None
        self._text = ""
        self._num_held = 0  # characters at the end that may be the beginning of a stop string
        self._num_given = 0

    def push(self, token: int, num_tokens: int, *, last: bool = False, stops: bool = False) -> str | None:
        """Takes in the next token.

        Args:
            num_tokens: of the output so far, this one included.
            last: no token follows. stops: because this one ends the output.

        Returns:
            The stop string that it completed, if it did; the text then ends there.
        """
        if self._stream is None:
            return None
        if stops and not self._params.include_stop_str_in_output:
            self._text += self._stream.flush()
            return None
        new = self._stream.push(token)
        if last:
            new += self._stream.flush()
        self._text += new
        return self._find_stop(len(new), num_tokens) if self._params.stop else None

    def _find_stop(self, num_new_chars: int, num_tokens: int) -> str | None:
        """Looks for a stop string that ends in the new characters; cuts the text there."""
        if num_tokens < self._params.min_tokens:
            return None
        text, best = self._text, None
        for stop in self._params.stop or ():
            at = text.find(stop, max(0, len(text) - num_new_chars - len(stop) + 1))
            if at >= 0 and (best is None or at < best[0]):
                best = at, stop
        if best is not None:
            at, stop = best
            self._text = text[: at + len(stop) if self._params.include_stop_str_in_output else at]
            self._num_held = 0
            return stop
        self._num_held = max(_overlap(text, stop) for stop in self._params.stop or ())
        return None

    def take(self, *, ended: bool, new_only: bool) -> str:
        """The text that may be shown: all of it, or what was not taken before. What may become a stop string is kept
        back until the output has ended."""
        end = len(self._text) - (0 if ended else self._num_held)
        text = self._text[self._num_given if new_only else 0 : end]
        self._num_given = end
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
