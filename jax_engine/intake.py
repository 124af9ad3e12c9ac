"""Intake: from what a caller asks for to a Request that the engine can serve, or to the reason why it cannot.

The engine has one; its `make_request` may be called from any thread. It looks at one request at a time: what the queue
can take is request_queue.py's matter.
"""

from collections.abc import Callable, Iterable, Sequence as AbstractSequence

from jax_engine.config import Limits
from jax_engine.constraints import MAX_BAN_TOKENS
from jax_engine.errors import InvalidRequest, prompt_too_long
from jax_engine.grammar import Grammar, GrammarCompiler
from jax_engine.request import MAX_NAME_CHARS, Request
from jax_engine.sampling_params import SamplingParams
from jax_engine.tokenizer import Tokenizer


class Intake:
    """Tokenizes, compiles grammars, and checks against the engine's sizes.

    Args:
        tokenizer: None for a model without one; prompts are then token ids.
        vocab_size: token ids are below it.
        eos_token_ids: what may end a structured output.
        clock: seconds; gives the time of arrival.
    """

    def __init__(
        self,
        limits: Limits,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        clock: Callable[[], float],
    ):
        self._limits = limits
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._compiler = GrammarCompiler(tokenizer, vocab_size, frozenset(eos_token_ids)) if tokenizer else None
        self._clock = clock

    def make_request(
        self,
        request_id: str,
        prompt: str | AbstractSequence[int],
        params: SamplingParams,
        priority: int = 0,
        *,
        embed: bool = False,
        user: str | None = None,
        slo_class: str | None = None,
        cache_salt: str | None = None,
    ) -> Request:
        """Tokenizes and checks; may be called from any thread. See Request for the arguments.

        Raises:
            InvalidRequest: this engine could never serve it.
        """
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise InvalidRequest("the model has no tokenizer: give the prompt as token ids", "prompt")
            token_ids = self._tokenizer.encode(prompt)
        else:
            token_ids = list(prompt)
        token_ids = params.truncated(token_ids, self._limits.max_model_len)
        self._check(token_ids, params)
        self._check_names(user=user, slo_class=slo_class, cache_salt=cache_salt)
        return Request(
            request_id=request_id,
            prompt_token_ids=tuple(token_ids),
            sampling_params=params,
            prompt=prompt if isinstance(prompt, str) else None,
            arrival_time=self._clock(),
            priority=priority,
            bad_token_ids=self._bad_token_ids(params),
            grammar=self._grammar(params),
            embed=embed,
            user=user,
            slo_class=slo_class,
            cache_salt=cache_salt,
        )

    def _check_names(self, **names: str | None) -> None:
        for name, text in names.items():
            if text is not None and len(text) > MAX_NAME_CHARS:
                raise InvalidRequest(f"{name} has {len(text)} characters; at most {MAX_NAME_CHARS} are allowed", name)
        slo_class = names["slo_class"]
        if slo_class is not None and slo_class not in self._limits.slo_classes:
            known = ", ".join(self._limits.slo_classes)
            raise InvalidRequest(f"slo_class must be one of {known}; got {slo_class!r}", "slo_class")

    def _bad_token_ids(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        if not params.bad_words:
            return ()
        if self._tokenizer is None:
            raise InvalidRequest("the model has no tokenizer: bad_words cannot be turned into tokens", "bad_words")
        found: dict[tuple[int, ...], None] = {}
        for word in params.bad_words:
            for text in (word.lstrip(), f" {word.lstrip()}"):
                tokens = self._tokenizer.encode(text, add_special_tokens=False, parse_special=False)
                if len(tokens) > MAX_BAN_TOKENS:
                    raise InvalidRequest(
                        f"bad_words: {text!r} is {len(tokens)} tokens long; at most {MAX_BAN_TOKENS} are allowed",
                        "bad_words",
                    )
                found[tuple(tokens)] = None
        return tuple(found)

    def _grammar(self, params: SamplingParams) -> Grammar | None:
        if params.structured_outputs is None:
            return None
        if self._compiler is None:
            raise InvalidRequest("the model has no tokenizer: outputs cannot be structured", "structured_outputs")
        return self._compiler.compile(params.structured_outputs, params.n)

    def _check(self, token_ids: list[int], params: SamplingParams) -> None:
        if not token_ids:
            raise InvalidRequest("the prompt is empty", "prompt")
        if len(token_ids) >= self._limits.max_model_len:
            raise prompt_too_long(len(token_ids), self._limits.max_model_len)
        for name, ids in (
            ("prompt", token_ids),
            ("stop_token_ids", params.stop_token_ids or ()),
            ("logit_bias", params.logit_bias or ()),
            ("allowed_token_ids", params.allowed_token_ids or ()),
        ):
            wrong = next((i for i in ids if type(i) is not int or not 0 <= i < self._vocab_size), None)
            if wrong is not None:
                raise InvalidRequest(f"{name}: token ids are integers in [0, {self._vocab_size}), got {wrong!r}", name)
        if params.stop and self._tokenizer is None:
            raise InvalidRequest("the model has no tokenizer: stop strings cannot be found", "stop")
