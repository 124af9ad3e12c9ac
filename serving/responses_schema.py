"""The JSON body of POST /v1/responses, and what becomes of it as a chat.

Called by routes/responses.py. The server keeps no responses: what would need one that was kept is refused.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from serving.chat_schema import MAX_TOOLS, ChatRequest, Function, FunctionName, Message, NamedTool, Tool
from serving.errors import bad_request
from serving.schema import Body, JsonSchema, ResponseFormat


class TextFormat(msgspec.Struct, kw_only=True):
    """Of the answer's text."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = "answer"
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, kw_only=True):
    """`verbosity` is accepted, without effect."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningOptions(msgspec.Struct, kw_only=True):
    """`summary` is accepted, without effect: the reasoning itself is sent."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: str | None = None
    generate_summary: str | None = None


class FunctionTool(msgspec.Struct, kw_only=True):
    """A function, flatter than in chat completions."""

    name: str
    type: Literal["function"] = "function"
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(msgspec.Struct, kw_only=True):
    """The function that has to be called."""

    name: str
    type: Literal["function"] = "function"


class ResponsesRequest(Body, kw_only=True):
    """Body of POST /v1/responses."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stream: bool | None = None
    tools: Annotated[list[FunctionTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    priority: int | None = None
    truncation: Literal["disabled", "auto"] | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    include: list[str] | None = None
    store: bool | None = None
    stream_options: dict[str, Any] | None = None
    max_tool_calls: int | None = None
    prompt: Any = None
    top_logprobs: int | None = None

    def check(self) -> None:
        """Refuses what needs state, or would need it."""
        for name in ("previous_response_id", "conversation", "background", "prompt"):
            if getattr(self, name):
                raise bad_request(
                    f"{name} is not supported: this server keeps no responses; send the whole conversation as input",
                    name,
                    "unsupported_field",
                )
        if self.top_logprobs or "message.output_text.logprobs" in (self.include or ()):
            raise bad_request("log-probabilities are available in /v1/chat/completions", "top_logprobs")

    def to_chat(self) -> ChatRequest:
        """The same as a chat.

        Raises:
            ApiError: 400, an input item that cannot be part of a chat, or contradicting fields.
        """
        choice = self.tool_choice
        chat = ChatRequest(
            model=self.model,
            messages=self._messages(),
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stream=self.stream,
            priority=self.priority,
            user=self.user,
            tools=[
                Tool(function=Function(**{k: getattr(tool, k) for k in Function.__struct_fields__}))
                for tool in self.tools or ()
            ],
            tool_choice=NamedTool(function=FunctionName(name=choice.name))
            if isinstance(choice, NamedFunction)
            else choice,
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=self._response_format(),
            reasoning_effort=None if self.reasoning is None else self.reasoning.effort,
            truncate_prompt_tokens=-1 if self.truncation == "auto" else None,
        )
        chat.check()
        return chat

    def _response_format(self) -> ResponseFormat | None:
        form = None if self.text is None else self.text.format
        if form is None:
            return None
        if form.type == "json_schema" and form.schema is None:
            raise bad_request("text.format of type json_schema needs a schema", "text")
        schema = JsonSchema(name=form.name, schema=form.schema or {}) if form.type == "json_schema" else None
        return ResponseFormat(type=form.type, json_schema=schema)

    def _messages(self) -> list[Message]:
        messages = [Message(role="system", content=self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            return [*messages, Message(role="user", content=self.input)]
        for index, item in enumerate(self.input):
            _add_item(messages, item, f"input[{index}]")
        if not self.input:
            raise bad_request("input holds no items", "input")
        return messages


def _add_item(messages: list[Message], item: dict[str, Any], where: str) -> None:
    """Adds one input item; calls and reasoning join the assistant's message that they belong to."""
    kind = item.get("type", "message")
    if kind == "message" and item.get("role") in ("user", "system", "developer", "assistant"):
        messages.append(Message(role=item["role"], content=_text(item.get("content"), where)))
    elif kind == "function_call" and all(isinstance(item.get(key), str) for key in ("call_id", "name", "arguments")):
        function = {"name": item["name"], "arguments": item["arguments"]}
        _assistant(messages).append({"id": item["call_id"], "type": "function", "function": function})
    elif kind == "function_call_output" and isinstance(item.get("call_id"), str):
        messages.append(Message(role="tool", tool_call_id=item["call_id"], content=_text(item.get("output"), where)))
    elif kind == "reasoning":
        text = _text(item.get("content") or [], where)
        messages.append(Message(role="assistant", reasoning_content=text))
    else:
        raise bad_request(
            f"{where} must be a message, a function_call, a function_call_output or reasoning, with its fields", "input"
        )


def _assistant(messages: list[Message]) -> list[dict[str, Any]]:
    """The tool calls of the assistant's message at the end, which is made if need be."""
    if not messages or messages[-1].role != "assistant":
        messages.append(Message(role="assistant"))
    if messages[-1].tool_calls is None:
        messages[-1].tool_calls = []
    return messages[-1].tool_calls


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    kinds = ("input_text", "output_text", "text", "reasoning_text", "refusal")
    if not isinstance(content, list) or not all(
        isinstance(part, dict) and part.get("type") in kinds and isinstance(part.get("text"), str) for part in content
    ):
        raise bad_request(f"{where}: the content must be text, or parts of type input_text or output_text", "input")
    return "\n".join(part["text"] for part in content)
