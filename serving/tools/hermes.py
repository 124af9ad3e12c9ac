"""Tool calls as Hermes and Qwen models write them: <tool_call>{"name": ..., "arguments": {...}}</tool_call>.

Called through tools.FORMATS.
"""

from serving.tools.pieces import CallScanner, Piece, TextRun, split_at

_BEGIN, _END = "<tool_call>", "</tool_call>"


class HermesParser:
    """See pieces.OutputParser."""

    def __init__(self) -> None:
        self._text = TextRun()
        self._held = ""
        self._scanner: CallScanner | None = None
        self._num_calls = 0
        self._after_object = False

    def push(self, text: str) -> list[Piece]:
        """See OutputParser.push."""
        pieces: list[Piece] = []
        text, self._held = self._held + text, ""
        while text:
            if self._after_object:
                _, marker, text = split_at(text, [_END, _BEGIN])
                if marker is None:
                    self._held = text
                    break
                self._after_object = False
                self._scanner = CallScanner(self._num_calls) if marker == _BEGIN else None
            elif self._scanner is not None:
                text = self._in_call(self._scanner, text, pieces)
            else:
                before, marker, text = split_at(text, [_BEGIN])
                pieces += self._text.push(before, at_start=self._num_calls > 0)
                if marker is None:
                    self._held = text
                    break
                self._scanner = CallScanner(self._num_calls)
        return pieces

    def _in_call(self, scanner: CallScanner, text: str, pieces: list[Piece]) -> str:
        new, rest = scanner.push(text)
        if new:
            self._text.drop()
        pieces += new
        if scanner.done or (scanner.failed and scanner.begun):
            self._num_calls += 1
            self._scanner, self._after_object = None, True
        elif scanner.failed:
            pieces += self._text.push(_BEGIN + scanner.raw)
            self._scanner = None
        return rest

    def finish(self) -> list[Piece]:
        """See OutputParser.finish."""
        scanner, held = self._scanner, self._held
        self._scanner, self._held = None, ""
        if scanner is not None and not scanner.begun:
            return self._text.push(_BEGIN + scanner.raw) + self._text.finish()
        if scanner is not None or self._after_object:
            return []
        pieces = self._text.push(held) if held else []
        return pieces + ([] if self._num_calls else self._text.finish())
