"""The JSON body of Anthropic's POST /v1/messages and /v1/messages/count_tokens, and what becomes of it as a chat.

Called by routes/messages.py.
"""

import json
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from serving.chat_schema import MAX_TOOLS, ChatRequest, Function, FunctionName, Message, NamedTool, Tool
from serving.errors import bad_request
from serving.schema import Body

_Content = str | list[dict[str, Any]]


class Turn(msgspec.Struct, kw_only=True):
    """One message."""

    role: Literal["user", "assistant"]
    content: _Content


class InputTool(msgspec.Struct, kw_only=True):
    """A tool of the client's own; `type` custom or missing."""

    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None


class ToolChoice(msgspec.Struct, kw_only=True):
    """`any`: some tool has to be called; `tool`: the one named."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, kw_only=True):
    """Whether the model may reason. `budget_tokens` is accepted, without effect."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None


class Metadata(msgspec.Struct, kw_only=True):
    """Who asks."""

    user_id: str | None = None


class CountTokensRequest(Body, kw_only=True):
    """Body of POST /v1/messages/count_tokens."""

    messages: Annotated[list[Turn], Meta(min_length=1)]
    system: _Content | None = None
    tools: Annotated[list[InputTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None

    def to_chat(self, **fields: Any) -> ChatRequest:
        """The same as a chat.

        Raises:
            ApiError: 400, a content block that cannot be part of a chat, or contradicting fields.
        """
        choice = self.tool_choice or ToolChoice(type="auto")
        if choice.type == "tool" and choice.name is None:
            raise bad_request("tool_choice of type tool needs a name", "tool_choice")
        chosen: Any = {"auto": "auto", "any": "required", "none": "none"}.get(choice.type)
        thinking: Any = {} if self.thinking is None else {"enable_thinking": self.thinking.type != "disabled"}
        chat = ChatRequest(
            model=self.model,
            messages=self._messages(),
            tools=[
                Tool(
                    function=Function(
                        name=t.name, description=t.description, parameters=t.input_schema, strict=t.strict
                    )
                )
                for t in self.tools or ()
            ],
            tool_choice=NamedTool(function=FunctionName(name=choice.name)) if choice.name else chosen,
            parallel_tool_calls=not choice.disable_parallel_tool_use,
            chat_template_kwargs=thinking,
            **fields,
        )
        chat.check()
        return chat

    def _messages(self) -> list[Message]:
        messages = []
        if self.system:
            messages.append(Message(role="system", content=_text(self.system, "system")))
        for index, turn in enumerate(self.messages):
            messages += _turn(turn, f"messages[{index}]")
        return messages


class MessagesRequest(CountTokensRequest, kw_only=True):
    """Body of POST /v1/messages."""

    max_tokens: Annotated[int, Meta(ge=1)]
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: Metadata | None = None
    service_tier: str | None = None

    def to_chat(self, **fields: Any) -> ChatRequest:
        """See CountTokensRequest.to_chat."""
        return super().to_chat(
            max_tokens=self.max_tokens,
            stop=self.stop_sequences,
            stream=self.stream,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            user=None if self.metadata is None else self.metadata.user_id,
            **fields,
        )


def _turn(turn: Turn, where: str) -> list[Message]:
    """The messages of one turn: tool results come first, as messages of their own."""
    if isinstance(turn.content, str):
        return [Message(role=turn.role, content=turn.content)]
    results, texts, calls, thoughts = [], [], [], []
    for block in turn.content:
        kind = block.get("type")
        if kind == "text" and isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif kind == "thinking" and isinstance(block.get("thinking"), str):
            thoughts.append(block["thinking"])
        elif kind == "tool_use" and isinstance(block.get("id"), str) and isinstance(block.get("name"), str):
            function = {"name": block["name"], "arguments": json.dumps(block.get("input") or {})}
            calls.append({"id": block["id"], "type": "function", "function": function})
        elif kind == "tool_result" and isinstance(block.get("tool_use_id"), str):
            content = _text(block.get("content") or "", where)
            results.append(Message(role="tool", tool_call_id=block["tool_use_id"], content=content))
        elif kind != "redacted_thinking":
            raise bad_request(
                f"{where}: a content block must be text, thinking, tool_use or tool_result, with its fields; "
                f"got {str(kind)[:40]!r}",
                "messages",
            )
    if not texts and not calls and results:
        return results
    message = Message(
        role=turn.role,
        content="\n".join(texts),
        tool_calls=calls or None,
        reasoning_content="\n".join(thoughts) or None,
    )
    return [*results, message]


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(
        isinstance(block, dict) and block.get("type") == "text" and isinstance(block.get("text"), str)
        for block in content
    ):
        raise bad_request(f"{where}: the content must be text, or blocks of type text", where.partition("[")[0])
    return "\n".join(block["text"] for block in content)
