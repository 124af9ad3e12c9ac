"""The JSON bodies of requests that generate: the fields they share, completions, and what becomes of them in
SamplingParams.

Called by the routes through `parse`; chat_schema.py adds chat completions. Ranges are checked by SamplingParams, not
here. `null` means the default.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from jax_engine import RequestOutputKind, SamplingParams, StructuredOutputsParams
from serving import unsupported
from serving.errors import bad_request

DEFAULT_COMPLETION_TOKENS = 16


class Body(msgspec.Struct, kw_only=True):
    """A request body that names a model."""

    model: str | None = None

    def check(self) -> None:
        """Refuses fields that contradict each other."""


class StreamOptions(msgspec.Struct, kw_only=True):
    """What a stream carries beside text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """vLLM's `structured_outputs`; see StructuredOutputsParams."""

    json: str | bool | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: str | None = None

    def to_params(self) -> StructuredOutputsParams:
        """The same, checked."""
        fields: Any = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}
        return StructuredOutputsParams(**fields)


class JsonSchema(msgspec.Struct, kw_only=True):
    """OpenAI's wrapping of a JSON schema. `strict` changes nothing: the schema is always kept."""

    name: str
    schema: dict[str, Any] | bool = {}
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def to_params(self) -> StructuredOutputsParams | None:
        """What the output has to match.

        Raises:
            ApiError: 400, there is no schema.
            InvalidRequest: the schema is too large.
        """
        if self.type == "text":
            return None
        if self.type == "json_object":
            return StructuredOutputsParams(json_object=True)
        if self.json_schema is None:
            raise bad_request("response_format of type json_schema needs json_schema", "response_format")
        return StructuredOutputsParams(json=self.json_schema.schema)


class GenerationRequest(Body, kw_only=True):
    """The fields that completions and chat completions share, under OpenAI's names and vLLM's."""

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
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    truncate_prompt_tokens: int | None = None
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    user: Annotated[str, Meta(max_length=512)] | None = None
    slo_class: Annotated[str, Meta(max_length=512)] | None = None

    def scheduling(self) -> dict[str, Any]:
        """What decides when the request is served and whose cached prefixes it may use, as fields of generation.Job."""
        return {
            "priority": self.priority or 0,
            "user": self.user,
            "slo_class": self.slo_class,
            "cache_salt": self.cache_salt,
        }

    def check(self) -> None:
        """Refuses fields that contradict each other.

        Raises:
            ApiError: 400.
        """
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options is allowed only with stream: true", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise bad_request("prompt_logprobs is not available with stream: true", "prompt_logprobs")

    def sampling_params(
        self, *, detokenize: bool, defaults: Mapping[str, Any] | None = None, **overrides: Any
    ) -> SamplingParams:
        """The sampling settings.

        Args:
            detokenize: the model has a tokenizer.
            defaults: what the model would have where the client says nothing.
            overrides: fields that the endpoint decides.

        Raises:
            InvalidRequest: a value is out of its range.
        """
        kind = RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY
        values: dict[str, Any] = {name: getattr(self, name) for name in _SAMPLING_FIELDS}
        values["logit_bias"] = self._logit_bias()
        values["structured_outputs"] = self.output_form()
        values |= overrides
        given = {name: value for name, value in values.items() if value is not None}
        chosen: Any = {"max_tokens": None, **(defaults or {}), **given}
        return SamplingParams(detokenize=detokenize, output_kind=kind, **chosen)

    def output_form(self) -> StructuredOutputsParams | None:
        """What the output has to match, where anything is asked for.

        Raises:
            ApiError: 400, it is asked for in two ways.
        """
        form = None if self.response_format is None else self.response_format.to_params()
        if self.structured_outputs is None:
            return form
        if form is not None:
            raise bad_request("structured_outputs and response_format exclude each other", "structured_outputs")
        return self.structured_outputs.to_params()

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

    def to_sampling_params(self, *, detokenize: bool, defaults: Mapping[str, Any]) -> SamplingParams:
        """See `sampling_params`; 16 tokens unless asked otherwise."""
        limit = DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        prompt_logprobs = self.prompt_logprobs
        if self.echo and self.logprobs is not None:
            prompt_logprobs = max(self.logprobs, prompt_logprobs or 0)
        return self.sampling_params(
            detokenize=detokenize,
            defaults=defaults,
            max_tokens=1 if self.echo_only else (self.max_completion_tokens or limit),
            logprobs=self.logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt.

        Raises:
            ApiError: 400, an empty list, or texts and token ids in one list.
        """
        return prompt_list(self.prompt, "prompt")


def prompt_list(value: str | list[str | int | list[int]], name: str) -> list[str | list[int]]:
    """One entry per prompt; `name` is the field's.

    Raises:
        ApiError: 400, an empty list, or texts and token ids in one list.
    """
    if isinstance(value, str):
        return [value]
    kinds = {type(part) for part in value}
    if len(kinds) != 1:
        raise bad_request(
            f"{name} must be a text, a list of texts, a list of token ids, or a list of lists of token ids, "
            "and not be empty",
            name,
        )
    return [value] if kinds == {int} else value  # type: ignore[list-item,return-value]


def parse[T: Body](body: bytes, schema: type[T]) -> T:
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
