"""Tool calls as Llama 3 writes them: the whole answer is {"name": ..., "parameters": {...}}, or several after `;`.

Called through tools.FORMATS. An answer that begins with another object is content.
"""

from serving.tools.pieces import CallScanner, Piece, split_at

_TAG = "<|python_tag|>"


class Llama3Parser:
    """See pieces.OutputParser."""

    def __init__(self) -> None:
        self._held = ""
        self._scanner: CallScanner | None = None
        self._num_calls = 0
        self._is_text = False
        self._held_space = ""  # before the object under way

    def push(self, text: str) -> list[Piece]:
        """See OutputParser.push."""
        pieces: list[Piece] = []
        text, self._held = self._held + text, ""
        while text:
            if self._is_text:
                before, marker, text = split_at(text, [_TAG])
                pieces += [Piece("content", before)] if before else []
                self._is_text = marker is None
                if marker is None:
                    self._held = text
                    break
            elif self._scanner is not None:
                text = self._in_call(self._scanner, text, pieces)
            else:
                after = self._between_calls(text)
                if after is None:
                    break
                text = after
        return pieces

    def _between_calls(self, text: str) -> str | None:
        """At the start, or after a call: what follows is a call or text. None: not yet known."""
        rest = text.lstrip("; \n\t\r" if self._num_calls else " \n\t\r")
        if rest.startswith(_TAG):
            return rest[len(_TAG) :]
        if rest.startswith("{"):
            self._scanner = CallScanner(self._num_calls)
            self._held_space = text[: len(text) - len(rest)]
            return rest
        if _TAG.startswith(rest):
            self._held = text
            return None
        self._is_text = True
        return text

    def _in_call(self, scanner: CallScanner, text: str, pieces: list[Piece]) -> str:
        new, rest = scanner.push(text)
        pieces += new
        if scanner.done or (scanner.failed and scanner.begun):
            self._num_calls += 1
            self._scanner = None
        elif scanner.failed:
            pieces.append(Piece("content", self._held_space + scanner.raw))
            self._scanner, self._is_text = None, True
        return rest

    def finish(self) -> list[Piece]:
        """See OutputParser.finish."""
        scanner, text = self._scanner, self._held
        self._scanner, self._held = None, ""
        if scanner is not None and not scanner.begun:
            text = self._held_space + scanner.raw
        elif self._num_calls and not self._is_text:
            text = ""
        return [Piece("content", text)] if text else []
