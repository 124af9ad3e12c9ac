"""The JSON body of chat completions: messages, tools and templates; and the tools a client may offer.

Called by the chat routes through schema.parse. The other protocols of chats are turned into these types.
"""

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from jax_engine import SamplingParams
from serving.errors import bad_request
from serving.schema import GenerationRequest

#: Variables a client may pass to the model's chat template.
CHAT_TEMPLATE_KWARGS = frozenset({"enable_thinking", "thinking", "reasoning_effort", "date_string"})
MAX_TOOLS = 128
_FUNCTION_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Message(msgspec.Struct, kw_only=True):
    """One message of a conversation. What content may hold beside text is the chat template's business."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def to_template(self) -> dict[str, Any]:
        """The message without its empty fields; `developer` is the newer name of `system`.

        Raises:
            ApiError: 400, the content is missing.
        """
        if self.content is None and not self.tool_calls and self.reasoning_content is None:
            raise bad_request(f"the content of a message of role {self.role} is missing", "messages")
        fields = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}
        return fields | {"role": "system" if self.role == "developer" else self.role}


class Function(msgspec.Struct, kw_only=True):
    """A function that the model may ask to be called. `parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True):
    """A tool; functions are the only kind."""

    function: Function
    type: Literal["function"] = "function"

    def to_template(self) -> dict[str, Any]:
        """As chat templates expect it."""
        function = {name: value for name, value in msgspec.structs.asdict(self.function).items() if value is not None}
        function.pop("strict", None)
        return {"type": "function", "function": {"parameters": {"type": "object", "properties": {}}} | function}


class FunctionName(msgspec.Struct, kw_only=True):
    """Names a function."""

    name: str


class NamedTool(msgspec.Struct, kw_only=True):
    """The one tool that has to be called."""

    function: FunctionName
    type: Literal["function"] = "function"


class ChatRequest(GenerationRequest, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, str | bool | int | float | None] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    include_reasoning: bool | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    def check(self) -> None:
        """See GenerationRequest.check."""
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise bad_request(
                "continue_final_message and add_generation_prompt exclude each other", "continue_final_message"
            )
        if self.echo and not self.continue_final_message:
            raise bad_request("echo needs continue_final_message: true; it repeats the message continued", "echo")
        for name in self.chat_template_kwargs or ():
            if name not in CHAT_TEMPLATE_KWARGS:
                allowed = ", ".join(sorted(CHAT_TEMPLATE_KWARGS))
                raise bad_request(f"chat_template_kwargs may hold {allowed}; got {name!r}", "chat_template_kwargs")
        self._check_tools()

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools or ()]
        for name in names:
            if not _FUNCTION_NAME.fullmatch(name):
                raise bad_request(
                    f"the name of a function must be 1 to 64 letters, digits, '_', '-' or '.'; got {name[:80]!r}",
                    "tools",
                )
        if len(set(names)) < len(names):
            raise bad_request("two tools have the same name", "tools")
        choice = self.tool_choice
        if choice in (None, "none", "auto"):
            return
        if not names:
            raise bad_request("tool_choice asks for a tool, but there are no tools", "tool_choice")
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise bad_request(
                f"tool_choice names {choice.function.name[:80]!r}, which is none of the tools", "tool_choice"
            )
        if self.structured_outputs is not None or (self.response_format and self.response_format.type != "text"):
            raise bad_request("a tool that has to be called leaves no room for response_format", "tool_choice")

    def offered_tools(self) -> list[Tool]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else list(self.tools or ())

    def to_sampling_params(self, *, detokenize: bool, **overrides: Any) -> SamplingParams:
        """See `sampling_params`; as many tokens as fit unless asked otherwise."""
        return self.sampling_params(
            detokenize=detokenize,
            max_tokens=self.max_completion_tokens or self.max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            **overrides,
        )

    def template_options(self) -> dict[str, Any]:
        """The keyword arguments of Tokenizer.chat_prompt."""
        continued = bool(self.continue_final_message)
        generation = not continued if self.add_generation_prompt is None else self.add_generation_prompt
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return {
            "add_generation_prompt": generation,
            "continue_final_message": continued,
            "tools": [tool.to_template() for tool in self.offered_tools()] or None,
            **effort,
            **(self.chat_template_kwargs or {}),
        }
