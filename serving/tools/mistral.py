"""Tool calls as Mistral models write them: [TOOL_CALLS] and a list of calls, or [TOOL_CALLS]name[ARGS]{...}, repeated.

Called through tools.FORMATS.
"""

from serving.tools.pieces import CallScanner, Piece, TextRun, split_at

_BEGIN, _ARGS, _CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_MAX_NAME_CHARS = 256


class MistralParser:
    """See pieces.OutputParser."""

    def __init__(self) -> None:
        self._text = TextRun()
        self._held = ""
        self._state = "text"  # head: after the marker; list: between calls of a list; call: in one; dropped: after all
        self._scanner: CallScanner | None = None
        self._num_calls = 0
        self._name: str | None = None  # of the call under way, where it stands before the arguments

    def push(self, text: str) -> list[Piece]:
        """See OutputParser.push."""
        pieces: list[Piece] = []
        rest: str | None = self._held + text
        self._held = ""
        while rest:
            rest = getattr(self, f"_in_{self._state}")(rest, pieces)
        return pieces

    def _in_text(self, text: str, pieces: list[Piece]) -> str | None:
        before, marker, rest = split_at(text, [_BEGIN])
        pieces += self._text.push(before, at_start=self._num_calls > 0)
        if marker is None:
            self._held = rest
            return None
        self._state = "head"
        return rest

    def _in_head(self, text: str, pieces: list[Piece]) -> str | None:
        body = text.lstrip()
        if not body:
            return self._hold(text)
        if body[0] == "[":
            self._state = "list"
            return body[1:]
        if body[0] == "{":
            return self._begin_call(body)
        name, marker, rest = split_at(body, [_ARGS, _CALL_ID, "{"])
        if marker == _CALL_ID:
            _, marker, rest = split_at(rest, [_ARGS, "{"])
        if marker is None and len(body) > _MAX_NAME_CHARS:
            self._state = "text"
            pieces += self._text.push(_BEGIN + text)
            return None
        if marker is None:
            return self._hold(text)
        self._begin_call("", name.strip())
        return rest if marker == _ARGS else "{" + rest

    def _hold(self, text: str) -> None:
        self._held = text

    def _begin_call(self, text: str, name: str | None = None) -> str:
        self._scanner, self._state, self._name = CallScanner(self._num_calls, name), "call", name
        return text

    def _in_list(self, text: str, pieces: list[Piece]) -> str | None:
        body = text.lstrip(", \n\t\r")
        if not body:
            return None
        if body[0] == "{":
            return self._begin_call(body)
        self._state = "text"
        return body.removeprefix("]")

    def _in_call(self, text: str, pieces: list[Piece]) -> str | None:
        scanner = self._scanner
        assert scanner is not None
        new, rest = scanner.push(text)
        if new:
            self._text.drop()
        pieces += new
        if scanner.done or (scanner.failed and scanner.begun):
            self._num_calls += 1
            self._state = "list" if self._name is None else "text"
            self._scanner = None
        elif scanner.failed:
            self._state, self._scanner = "text", None
            pieces += self._text.push(_BEGIN + (self._name or "") + scanner.raw)
        return rest

    def finish(self) -> list[Piece]:
        """See OutputParser.finish."""
        scanner, held = self._scanner, self._held
        if self._state == "call" and scanner is not None and not scanner.begun:
            return self._text.push(_BEGIN + (self._name or "") + scanner.raw) + self._text.finish()
        if self._state != "text":
            return self._text.push(_BEGIN + held) if self._state == "head" else []
        pieces = self._text.push(held) if held else []
        return pieces + ([] if self._num_calls else self._text.finish())
