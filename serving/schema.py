"""The JSON bodies of completions and chat completions: types, what is refused, and what they become in SamplingParams.

Called by the routes through `parse`. Ranges are checked by SamplingParams, not here. `null` means the default.
"""

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from jax_engine import RequestOutputKind, SamplingParams
from serving import unsupported
from serving.errors import bad_request

#: Variables a client may pass to the model's chat template.
CHAT_TEMPLATE_KWARGS = frozenset({"enable_thinking", "thinking", "reasoning_effort", "date_string"})
DEFAULT_COMPLETION_TOKENS = 16


class StreamOptions(msgspec.Struct, kw_only=True):
    """What a stream carries beside text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(msgspec.Struct, kw_only=True):
    """The fields that completions and chat completions share, under OpenAI's names and vLLM's."""

    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    prompt_logprobs: int | None = None
    seed: int | None = None
    priority: Annotated[int, Meta(ge=-(2**31), lt=2**31)] | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None

    def check(self) -> None:
        """Refuses fields that contradict each other.

        Raises:
            ApiError: 400.
        """
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options is allowed only with stream: true", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise bad_request("prompt_logprobs is not available with stream: true", "prompt_logprobs")

    def sampling_params(self, *, detokenize: bool, **overrides: Any) -> SamplingParams:
        """The sampling settings.

        Args:
            detokenize: the model has a tokenizer.
            overrides: fields that the endpoint decides.

        Raises:
            InvalidRequest: a value is out of its range.
        """
        kind = RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY
        values: dict[str, Any] = {name: getattr(self, name) for name in _SAMPLING_FIELDS}
        values["logit_bias"] = self._logit_bias()
        values |= overrides
        given: Any = {name: value for name, value in values.items() if value is not None or name == "max_tokens"}
        return SamplingParams(detokenize=detokenize, output_kind=kind, **given)

    def _logit_bias(self) -> dict[int, float] | None:
        if self.logit_bias is None:
            return None
        try:
            return {int(token): value for token, value in self.logit_bias.items()}
        except ValueError:
            raise bad_request("the keys of logit_bias must be token ids, written as strings", "logit_bias") from None


_SAMPLING_FIELDS = tuple(set(GenerationRequest.__struct_fields__) & set(SamplingParams.__dataclass_fields__))


class CompletionRequest(GenerationRequest, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None

    @property
    def echo_only(self) -> bool:
        """Only the prompt is wanted back (to score it); the one token that the engine must generate is dropped."""
        return bool(self.echo) and self.max_tokens == 0

    def to_sampling_params(self, *, detokenize: bool) -> SamplingParams:
        """See `sampling_params`; 16 tokens unless asked otherwise."""
        limit = DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        prompt_logprobs = self.prompt_logprobs
        if self.echo and self.logprobs is not None:
            prompt_logprobs = max(self.logprobs, prompt_logprobs or 0)
        return self.sampling_params(
            detokenize=detokenize,
            max_tokens=1 if self.echo_only else (self.max_completion_tokens or limit),
            logprobs=self.logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt.

        Raises:
            ApiError: 400, an empty list, or texts and token ids in one list.
        """
        if isinstance(self.prompt, str):
            return [self.prompt]
        kinds = {type(part) for part in self.prompt}
        if len(kinds) != 1:
            raise bad_request(
                "prompt must be a text, a list of texts, a list of token ids, or a list of lists of token ids, "
                "and not be empty",
                "prompt",
            )
        return [self.prompt] if kinds == {int} else self.prompt  # type: ignore[list-item,return-value]


class Message(msgspec.Struct, kw_only=True):
    """One message of a conversation. What content may hold beside text is the chat template's business."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    def to_template(self) -> dict[str, Any]:
        """The message without its empty fields; `developer` is the newer name of `system`.

        Raises:
            ApiError: 400, the content is missing.
        """
        if self.content is None and not self.tool_calls:
            raise bad_request(f"the content of a message of role {self.role} is missing", "messages")
        fields = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}
        return fields | {"role": "system" if self.role == "developer" else self.role}


class ChatRequest(GenerationRequest, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, str | bool | int | float | None] | None = None

    def check(self) -> None:
        """See GenerationRequest.check."""
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise bad_request(
                "continue_final_message and add_generation_prompt exclude each other", "continue_final_message"
            )
        for name in self.chat_template_kwargs or ():
            if name not in CHAT_TEMPLATE_KWARGS:
                allowed = ", ".join(sorted(CHAT_TEMPLATE_KWARGS))
                raise bad_request(f"chat_template_kwargs may hold {allowed}; got {name!r}", "chat_template_kwargs")

    def to_sampling_params(self, *, detokenize: bool) -> SamplingParams:
        """See `sampling_params`; as many tokens as fit unless asked otherwise."""
        return self.sampling_params(
            detokenize=detokenize,
            max_tokens=self.max_completion_tokens or self.max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )

    def template_options(self) -> dict[str, Any]:
        """The keyword arguments of Tokenizer.chat_prompt."""
        continued = bool(self.continue_final_message)
        generation = not continued if self.add_generation_prompt is None else self.add_generation_prompt
        return {
            "add_generation_prompt": generation,
            "continue_final_message": continued,
            **(self.chat_template_kwargs or {}),
        }


def parse[T: GenerationRequest](body: bytes, schema: type[T]) -> T:
    """Decodes and checks a request body.

    Raises:
        ApiError: 400, naming the field where one is at fault.
    """
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_request(f"The request body is not valid JSON: {error}") from None
    except RecursionError:
        raise bad_request("The request body is nested too deeply.") from None
    if not isinstance(fields, dict):
        raise bad_request("The request body must be a JSON object.")
    unsupported.check(fields, known=schema.__struct_fields__)
    try:
        request = msgspec.convert(fields, schema)
    except msgspec.ValidationError as error:
        raise bad_request(str(error), _field_at_fault(str(error))) from None
    request.check()
    return request


def _field_at_fault(message: str) -> str | None:
    """The top-level field in a msgspec message, such as "Expected `int`, got `str` - at `$.max_tokens`"."""
    found = re.search(r"`\$\.(\w+)", message) or re.search(r"required field `(\w+)`$", message)
    return found.group(1) if found else None
