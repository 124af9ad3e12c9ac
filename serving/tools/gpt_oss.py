"""Channels as gpt-oss models write them (the harmony format): analysis is reasoning, final is the answer, and
commentary that names a function as its recipient is a tool call.

Called through tools.FORMATS. A message is a header, <|message|>, a body, and one of the end marks.
"""

import re

from serving.tools.pieces import Piece, split_at

_MESSAGE = "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
_RECIPIENT = re.compile(r"to=functions\.([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_MAX_HEADER_CHARS = 1024


class GptOssParser:
    """See pieces.OutputParser."""

    def __init__(self) -> None:
        self._held = ""
        self._kind: str | None = None  # of the body under way; None: in a header
        self._num_calls = 0
        self._begun = False
        self._is_empty = True

    def push(self, text: str) -> list[Piece]:
        """See OutputParser.push."""
        pieces: list[Piece] = []
        text, self._held = self._held + text, ""
        while text:
            if self._kind is None:
                header, marker, rest = split_at(text, [_MESSAGE])
                if marker is None:
                    self._hold_header(text, pieces)
                    break
                text = rest
                self._begin(header, pieces)
            else:
                body, marker, text = split_at(text, _ENDS)
                self._add(body, pieces)
                if marker is None:
                    self._held = text
                    break
                self._end(pieces)
        return pieces

    def _hold_header(self, text: str, pieces: list[Piece]) -> None:
        """What does not look like a header is content: the model did not keep to its format."""
        start = text.lstrip()
        looks_right = any(start.startswith(sign) or sign.startswith(start) for sign in ("<|", "to=", "assistant"))
        if self._num_calls or self._begun or (looks_right and len(text) <= _MAX_HEADER_CHARS):
            self._held = text if len(text) <= _MAX_HEADER_CHARS else ""
        else:
            self._kind = "content"
            self._add(text, pieces)

    def _begin(self, header: str, pieces: list[Piece]) -> None:
        self._begun = True
        recipient, channel = _RECIPIENT.search(header), _CHANNEL.search(header)
        if recipient is not None:
            self._kind = "arguments"
            self._is_empty = True
            pieces.append(Piece("call", recipient[1], self._num_calls))
        else:
            self._kind = "reasoning" if channel is not None and channel[1] == "analysis" else "content"

    def _add(self, body: str, pieces: list[Piece]) -> None:
        if body:
            self._is_empty = False
            pieces.append(Piece(self._kind, body, self._num_calls))  # type: ignore[arg-type]

    def _end(self, pieces: list[Piece]) -> None:
        if self._kind == "arguments":
            if self._is_empty:
                pieces.append(Piece("arguments", "{}", self._num_calls))
            self._num_calls += 1
        self._kind = None

    def finish(self) -> list[Piece]:
        """See OutputParser.finish. A header at the end is dropped: it was the beginning of nothing."""
        pieces: list[Piece] = []
        if self._kind is not None:
            self._add(self._held, pieces)
            self._end(pieces)
        elif not self._begun and self._held:
            pieces.append(Piece("content", self._held))
        self._held = ""
        return pieces
