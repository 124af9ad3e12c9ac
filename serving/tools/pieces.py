"""Pieces: what a model's text turns out to be, and the two scanners that all formats share.

Called by the formats beside this file. Linear in the text: a character is looked at once, and no more is held back than
the beginning of a marker. Nothing is ever evaluated.
"""

import json
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol


class Piece(NamedTuple):
    """A part of an answer.

    Attributes:
        kind: content and reasoning: text for the client. call: a tool call begins, `text` is the tool's name.
            arguments: more of that call's arguments, as JSON text.
        call: number of the call, from 0; of no meaning for text.
    """

    kind: Literal["content", "reasoning", "call", "arguments"]
    text: str
    call: int = 0


class OutputParser(Protocol):
    """Takes one completion's text as it comes."""

    def push(self, text: str) -> list[Piece]:
        """What the new text makes certain."""
        ...

    def finish(self) -> list[Piece]:
        """The rest, at the end of the output."""
        ...


def split_at(text: str, markers: Sequence[str]) -> tuple[str, str | None, str]:
    """Cuts a text at the first of some markers.

    Returns:
        The text before it, the marker, the text after it. Without a marker: the text that is certainly before one,
        None, and the end of the text, which may be the beginning of a marker.
    """
    found = min(((at, marker) for marker in markers if (at := text.find(marker)) >= 0), default=None)
    if found is not None:
        at, marker = found
        return text[:at], marker, text[at + len(marker) :]
    longest = max(map(len, markers))
    for at in range(max(0, len(text) - longest + 1), len(text)):
        if any(marker.startswith(text[at:]) for marker in markers):
            return text[:at], None, text[at:]
    return text, None, ""


class TextRun:
    """Content whose white space is sent only when more content follows: models put line breaks around tool calls."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str, *, at_start: bool = False) -> list[Piece]:
        """Takes in content. at_start: it follows a call, so that white space before it is left out."""
        text = self._held + text
        if at_start:
            text = text.lstrip()
        kept = text.rstrip()
        self._held = text[len(kept) :]
        return [Piece("content", kept)] if kept else []

    def drop(self) -> None:
        """Forgets white space before a call."""
        self._held = ""

    def finish(self) -> list[Piece]:
        """The white space at the end of an answer."""
        text, self._held = self._held, ""
        return [Piece("content", text)] if text else []


#: Keys that a call may begin with; another one shows at once that an object is no call.
_FIRST_KEYS = frozenset({"name", "arguments", "parameters", "type", "id"})


class CallScanner:
    """Reads one `{"name": ..., "arguments": {...}}`, character by character, and hands its arguments on as they come.

    `parameters` is another name of `arguments`. Attributes: `done`, the object is complete; `failed`, it is not such
    an object; `raw`, its text, for the case that it is none; `begun`, the call has been handed on.

    Args:
        number: of the call.
        name: the tool's, where it is known already: what is read is then the arguments alone.
    """

    def __init__(self, number: int, name: str | None = None):
        self.done = self.failed = self.begun = False
        self._number, self._name = number, name
        self._arguments_only = name is not None
        self._raw: list[str] = []
        self._expect = "value" if self._arguments_only else "{"  # then: key, :, value, next
        self._key: str | None = "arguments" if self._arguments_only else None
        self._is_first_key = True
        self._token: list[str] = []  # of a key or value under way
        self._depth, self._in_string, self._escaped = 0, False, False
        self._arguments: list[str] = []  # that wait for the name
        self._has_arguments = False

    @property
    def raw(self) -> str:
        """All text so far."""
        return "".join(self._raw)

    def push(self, text: str) -> tuple[list[Piece], str]:
        """The new pieces, and the text that is left over when the object is done or has failed."""
        for at, character in enumerate(text):
            self._raw.append(character)
            self._step(character)
            if self.done or self.failed:
                return self._news(), text[at + 1 :]
        return self._news(), ""

    def _news(self) -> list[Piece]:
        if self._name is None or not (self._arguments or self.done):
            return []
        pieces = []
        if not self.begun:
            pieces.append(Piece("call", self._name, self._number))
            self.begun = True
        if self.done and not self._has_arguments:
            self._arguments = ["{}"]
        if self._arguments:
            pieces.append(Piece("arguments", "".join(self._arguments), self._number))
            self._arguments = []
        return pieces

    def _step(self, character: str) -> None:
        if self._in_string or self._depth:
            self._inside(character)
        elif self._expect == "value" and self._token and character in ",}":  # the end of a number, true, null ...
            self._end_value()
            self._between(character)
        elif self._expect == "value" and self._token and not character.isspace():
            self._token.append(character)
        elif not character.isspace():
            self._between(character)

    def _between(self, character: str) -> None:
        expect = self._expect
        if expect == "{" and character == "{":
            self._expect = "key"
        elif expect in ("key", "next") and character == "}":
            self.done = self._name is not None
            self.failed = not self.done
        elif expect == "next" and character == ",":
            self._expect = "key"
        elif expect == ":" and character == ":":
            self._expect = "value"
        elif expect == "key" and character == '"':
            self._token, self._in_string = [character], True
        elif expect == "value" and character not in ",:}]":
            self._token = [character]
            self._in_string, self._depth = character == '"', int(character in "{[")
            if self._depth and self._is_arguments():
                self._has_arguments = True
                self._arguments.append(character)
        else:
            self.failed = True

    def _inside(self, character: str) -> None:
        """Within a string, an object or a list."""
        streamed = self._depth > 0 and self._is_arguments()
        if streamed:
            self._arguments.append(character)
        else:
            self._token.append(character)
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_string = False
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
        if self._in_string or self._depth:
            return
        if self._expect == "key":
            self._end_key()
        else:
            self._end_value()

    def _is_arguments(self) -> bool:
        return self._key in ("arguments", "parameters") and self._expect == "value"

    def _end_key(self) -> None:
        self._key = _string("".join(self._token))
        self.failed = self._key is None or (self._is_first_key and self._key not in _FIRST_KEYS)
        self._token, self._expect, self._is_first_key = [], ":", False

    def _end_value(self) -> None:
        value = "".join(self._token)
        if self._key == "name":
            self._name = _string(value)
            self.failed = not self._name
        elif self._is_arguments() and not self._has_arguments:
            text = _string(value)  # some models write the arguments as a string that holds JSON
            if text is not None:
                self._arguments.append(text)
                self._has_arguments = True
        self._token, self._expect = [], "next"
        self.done = self._arguments_only


def _string(text: str) -> str | None:
    """What a JSON string holds; None for what is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
