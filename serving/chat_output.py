"""ChatOutput: one choice of a chat, from the model's text to reasoning, content and tool calls, whole or in deltas.

Called by the chat routes of all protocols.
"""

import uuid
from typing import Any, NamedTuple

from jax_engine import FinishReason
from serving.tools.pieces import OutputParser, Piece


class ToolCall(NamedTuple):
    """A call that the model asks for; `arguments` is JSON text, as far as the model has written it."""

    id: str
    name: str
    arguments: str


class ChatOutput:
    """One choice.

    Args:
        parser: None where all text is content.
        prefix: content that comes before the model's.
        several_calls: calls after the first are kept. reasoning: so is reasoning.
    """

    def __init__(
        self, parser: OutputParser | None, *, prefix: str = "", several_calls: bool = True, reasoning: bool = True
    ):
        self._parser, self._prefix = parser, prefix
        self._several_calls, self._with_reasoning = several_calls, reasoning
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[tuple[str, str, list[str]]] = []  # id, name, parts of the arguments

    @property
    def content(self) -> str:
        """All content so far."""
        return "".join(self._content)

    @property
    def reasoning(self) -> str:
        """All reasoning so far."""
        return "".join(self._reasoning)

    @property
    def calls(self) -> list[ToolCall]:
        """All tool calls so far."""
        return [ToolCall(call_id, name, "".join(parts)) for call_id, name, parts in self._calls]

    def push(self, text: str, ended: bool) -> list[Piece]:
        """What is new, as pieces the client is to see."""
        if self._parser is None:
            pieces = [Piece("content", text)] if text else []
        else:
            pieces = self._parser.push(text) + (self._parser.finish() if ended else [])
        if self._prefix:
            pieces, self._prefix = [Piece("content", self._prefix), *pieces], ""
        pieces = _joined([piece for piece in pieces if self._is_wanted(piece)])
        for piece in pieces:
            self._keep(piece)
        return pieces

    def _is_wanted(self, piece: Piece) -> bool:
        if piece.kind == "reasoning":
            return self._with_reasoning
        return self._several_calls or piece.call == 0

    def _keep(self, piece: Piece) -> None:
        if piece.kind == "content":
            self._content.append(piece.text)
        elif piece.kind == "reasoning":
            self._reasoning.append(piece.text)
        elif piece.kind == "call":
            self._calls.append((f"call_{uuid.uuid4().hex[:24]}", piece.text, []))
        else:
            self._calls[piece.call][2].append(piece.text)

    def message(self) -> dict[str, Any]:
        """The whole message, under OpenAI's names."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content, "refusal": None}
        if self._reasoning:
            message["reasoning_content"] = self.reasoning
        if self._calls:
            calls = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls
            ]
            message |= {"content": self.content or None, "tool_calls": calls}
        return message

    def delta(self, piece: Piece) -> dict[str, Any]:
        """One piece as the delta of a chunk; `push` has given it."""
        match piece.kind:
            case "content":
                return {"content": piece.text}
            case "reasoning":
                return {"reasoning_content": piece.text}
            case "call":
                call_id = self.call_id(piece.call)
                function = {"name": piece.text, "arguments": ""}
                return {"tool_calls": [{"index": piece.call, "id": call_id, "type": "function", "function": function}]}
            case _:
                return {"tool_calls": [{"index": piece.call, "function": {"arguments": piece.text}}]}

    def call_id(self, call: int) -> str:
        """The id of a call that has begun."""
        return self._calls[call][0]

    def finish_reason(self, reason: FinishReason | None, *, forced: bool) -> str | None:
        """The reason as OpenAI names it. forced: the client has named the tool to be called."""
        if reason is FinishReason.STOP and self._calls and not forced:
            return "tool_calls"
        return reason


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbouring pieces of one kind made one."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last is not None and piece.kind != "call" and (last.kind, last.call) == (piece.kind, piece.call):
            joined[-1] = last._replace(text=last.text + piece.text)
        else:
            joined.append(piece)
    return joined
