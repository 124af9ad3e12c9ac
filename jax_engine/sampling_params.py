"""SamplingParams: how one request's tokens are chosen, and every range check on it.

The same object and the same checks serve the library and HTTP. Field names and defaults are vLLM's, so scripts port
by changing the import. Nothing here touches a device.
"""

import enum
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jax_engine.errors import InvalidRequest
from jax_engine.structured_outputs import StructuredOutputsParams

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIASES = 300
MAX_BAD_WORDS = 64
MAX_BAD_WORD_CHARS = 64
_INT32_MAX = 2**31 - 1


class RequestOutputKind(enum.Enum):
    """What each RequestOutput of a stream holds: everything so far, only what is new, or one output at the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


def _check_number(name: str, value: object, low: float, high: float, allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidRequest(f"{name} must be a finite int or float, got {value!r}; allowed: {allowed}", name)
    if not low <= value <= high:
        raise InvalidRequest(f"{name} must be in {allowed}, got {value!r}", name)


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} must be an integer in [{low}, {high}], got {value!r}", name)
    if not low <= value <= high:
        raise InvalidRequest(f"{name} must be in [{low}, {high}], got {value}", name)


def _check_type(name: str, value: object, wanted: type, allowed: str) -> None:
    if not isinstance(value, wanted):
        raise InvalidRequest(f"{name} must be {allowed}, got {value!r}", name)


def _items(name: str, value: object, allowed: str, most: int | None = None) -> tuple:
    """The items of a list; None has none. A text is no list, though Python can walk through its letters."""
    if value is None:
        return ()
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise InvalidRequest(f"{name} must be {allowed}, got {value!r}", name)
    items = tuple(value)
    if most is not None and len(items) > most:
        raise InvalidRequest(f"{name} holds {len(items)} items; at most {most} are allowed", name)
    return items


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling settings of one request.

    The order in which they act on the float32 logits of a position: `repetition_penalty` (CTRL, arXiv 1909.05858,
    over prompt and output), `frequency_penalty` and `presence_penalty` (over output), `logit_bias` and the
    `min_tokens` mask, `bad_words`, `allowed_token_ids` and `structured_outputs`, `temperature`, `min_p`, `top_k`,
    `top_p` (nucleus sampling, arXiv 1904.09751). Log-probabilities are those of the model's raw logits, before any of
    these.

    Attributes:
        n: completions per prompt.
        presence_penalty, frequency_penalty: in [-2, 2].
        repetition_penalty: in (0, 2]; above 1 discourages tokens already seen.
        temperature: at least 0; 0 (below 1e-5) means greedy.
        top_p: in (0, 1]. top_k: 0 or -1 for all, else at least 1. min_p: in [0, 1].
        seed: any integer fitting in 64 bits signed; None takes one from the engine's seed and the request's number.
        stop: strings that end the output; the output ends before the string, or after it with
            `include_stop_str_in_output`.
        stop_token_ids: token ids that end the output. The token is part of `token_ids`, its text is not in `text`.
        ignore_eos: go on after an end-of-sequence token.
        max_tokens: most output tokens; None means as many as fit.
        min_tokens: no end-of-sequence and no stop token before this many output tokens.
        logprobs: None for none, else the number of most likely tokens reported beside the chosen one.
        prompt_logprobs: the same for each prompt token.
        detokenize: produce text. skip_special_tokens: leave special tokens out of the text.
        logit_bias: token id -> value in [-100, 100] added to its logit.
        bad_words: texts that the output must not hold. Each is forbidden as the tokenizer writes it, with and without
            a space before it; a text the model spells with other tokens is not found.
        allowed_token_ids: the only tokens that may be chosen; end-of-sequence tokens are not among them unless named.
        truncate_prompt_tokens: keep only so many of the prompt's last tokens; -1: as many as leave room for output.
        structured_outputs: what the output has to match.
        output_kind: what the outputs of a stream hold; has no meaning offline.

    Raises:
        InvalidRequest: a value has the wrong type or is out of its range; `param` names it.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    logit_bias: Mapping[int, float] | None = None
    bad_words: Sequence[str] | None = None
    allowed_token_ids: Sequence[int] | None = None
    truncate_prompt_tokens: int | None = None
    structured_outputs: StructuredOutputsParams | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        _check_int("n", self.n, 1, MAX_N)
        _check_number("presence_penalty", self.presence_penalty, -2, 2, "[-2, 2]")
        _check_number("frequency_penalty", self.frequency_penalty, -2, 2, "[-2, 2]")
        _check_number("repetition_penalty", self.repetition_penalty, 1e-6, 2, "(0, 2]")
        _check_number("temperature", self.temperature, 0, 100, "[0, 100]")
        _check_number("top_p", self.top_p, 1e-9, 1, "(0, 1]")
        _check_int("top_k", self.top_k, -1, _INT32_MAX)
        _check_number("min_p", self.min_p, 0, 1, "[0, 1]")
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), 2**63 - 1)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, _INT32_MAX)
        _check_int("min_tokens", self.min_tokens, 0, _INT32_MAX)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}", "min_tokens"
            )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0, MAX_LOGPROBS)
        self._check_truncation()
        for name in ("include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens"):
            _check_type(name, getattr(self, name), bool, "True or False")
        kinds = ", ".join(f"RequestOutputKind.{kind.name}" for kind in RequestOutputKind)
        _check_type("output_kind", self.output_kind, RequestOutputKind, f"one of {kinds}")
        if self.structured_outputs is not None:
            wanted = "StructuredOutputsParams(json=...) or the like"
            _check_type("structured_outputs", self.structured_outputs, StructuredOutputsParams, wanted)
        self._freeze_stops()
        self._freeze_biases()
        self._freeze_choices()

    def _check_truncation(self) -> None:
        keep = self.truncate_prompt_tokens
        if keep is None or keep == -1:
            return
        if isinstance(keep, bool) or not isinstance(keep, int) or not 1 <= keep <= _INT32_MAX:
            raise InvalidRequest(
                f"truncate_prompt_tokens must be -1 or an integer in [1, {_INT32_MAX}], got {keep!r}",
                "truncate_prompt_tokens",
            )

    def _freeze_stops(self) -> None:
        listed = [self.stop] if isinstance(self.stop, str) else self.stop
        stop = _items("stop", listed, "a string or a list of strings", MAX_STOP_STRINGS)
        for text in stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_STRING_CHARS:
                raise InvalidRequest(f"each stop must be a string of 1 to {MAX_STOP_STRING_CHARS} characters", "stop")
        if stop and not self.detokenize:
            raise InvalidRequest("stop strings need detokenize=True", "stop")
        ids = _items("stop_token_ids", self.stop_token_ids, "a list of token ids", MAX_STOP_TOKEN_IDS)
        for token in ids:
            _check_int("stop_token_ids", token, 0, _INT32_MAX)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", ids)

    def _freeze_biases(self) -> None:
        if self.logit_bias is not None:
            _check_type("logit_bias", self.logit_bias, Mapping, "a dict of token id -> bias")
        biases = dict(self.logit_bias or {})
        if len(biases) > MAX_LOGIT_BIASES:
            raise InvalidRequest(
                f"logit_bias holds {len(biases)} tokens; at most {MAX_LOGIT_BIASES} are allowed", "logit_bias"
            )
        for token, value in biases.items():
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token <= _INT32_MAX:
                raise InvalidRequest(f"the keys of logit_bias must be token ids, got {token!r}", "logit_bias")
            _check_number("logit_bias", value, -100, 100, "[-100, 100]")
        object.__setattr__(self, "logit_bias", biases)

    def _freeze_choices(self) -> None:
        words = _items("bad_words", self.bad_words, "a list of words", MAX_BAD_WORDS)
        for word in words:
            if not isinstance(word, str) or not 0 < len(word.strip()) <= len(word) <= MAX_BAD_WORD_CHARS:
                raise InvalidRequest(
                    f"each of bad_words must be a text of 1 to {MAX_BAD_WORD_CHARS} characters", "bad_words"
                )
        object.__setattr__(self, "bad_words", words)
        if self.allowed_token_ids is not None:
            ids = _items("allowed_token_ids", self.allowed_token_ids, "a list of token ids")
            if not ids:
                raise InvalidRequest("allowed_token_ids is empty, so no token could be chosen", "allowed_token_ids")
            for token in ids:
                _check_int("allowed_token_ids", token, 0, _INT32_MAX)
            object.__setattr__(self, "allowed_token_ids", ids)

    def truncated(self, token_ids: list[int], max_model_len: int) -> list[int]:
        """A prompt's tokens, as truncate_prompt_tokens has them."""
        keep = self.truncate_prompt_tokens
        if keep is None:
            return token_ids
        return token_ids[-(keep if keep > 0 else max(1, max_model_len - (self.max_tokens or 1))) :]

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, so that no randomness is used."""
        return self.temperature < 1e-5

    @property
    def penalized(self) -> bool:
        """Whether any of the three penalties is on."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


def checked(params: object) -> SamplingParams:
    """What a caller gave as SamplingParams.

    Raises:
        InvalidRequest: it is something else.
    """
    if not isinstance(params, SamplingParams):
        raise InvalidRequest(f"SamplingParams are needed, got {type(params).__name__}", "sampling_params")
    return params


def embedding_params(truncate: bool) -> SamplingParams:
    """Of a request that only wants an embedding. truncate: keep the end of a prompt that is too long."""
    return SamplingParams(
        temperature=0,
        max_tokens=1,
        detokenize=False,
        truncate_prompt_tokens=-1 if truncate else None,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
