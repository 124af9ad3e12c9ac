"""Reasoning between <think> and </think> (Qwen, DeepSeek) or [THINK] and [/THINK] (Mistral), before the answer.

Called through tools.FORMATS; what follows the reasoning goes to the parser of tool calls.
"""

from serving.tools.pieces import OutputParser, Piece, TextRun, split_at


class PlainParser:
    """See pieces.OutputParser. All text is content."""

    def push(self, text: str) -> list[Piece]:
        """See OutputParser.push."""
        return [Piece("content", text)] if text else []

    def finish(self) -> list[Piece]:
        """See OutputParser.finish."""
        return []


class ThinkingParser:
    """See pieces.OutputParser.

    Args:
        begin, end: the marks around the reasoning.
        answer: parser of what follows.
        inside: the prompt has opened the reasoning already.
    """

    def __init__(self, begin: str, end: str, answer: OutputParser, inside: bool = False):
        self._begin, self._end, self._answer = begin, end, answer
        self._state = "inside" if inside else "before"
        self._held = ""
        self._run = TextRun()
        self._at_start = True

    def push(self, text: str) -> list[Piece]:
        """See OutputParser.push."""
        if self._state == "after":
            return self._after(text)
        text, self._held = self._held + text, ""
        if self._state == "before":
            start = text.lstrip()
            if not start.startswith(self._begin):
                if self._begin.startswith(start):
                    self._held = text
                    return []
                self._state, self._at_start = "after", False
                return self._answer.push(text)
            self._state, text = "inside", start[len(self._begin) :]
        before, marker, rest = split_at(text, [self._end])
        pieces = self._reasoning(before)
        if marker is None:
            self._held = rest
            return pieces
        self._run.drop()
        self._state, self._at_start = "after", True
        return pieces + self._after(rest)

    def _reasoning(self, text: str) -> list[Piece]:
        pieces = [piece._replace(kind="reasoning") for piece in self._run.push(text, at_start=self._at_start)]
        self._at_start = self._at_start and not pieces
        return pieces

    def _after(self, text: str) -> list[Piece]:
        """The answer, without the line breaks that part it from the reasoning."""
        if self._at_start:
            text = text.lstrip()
            self._at_start = not text
        return self._answer.push(text) if text else []

    def finish(self) -> list[Piece]:
        """See OutputParser.finish."""
        held, self._held = self._held, ""
        if self._state == "after":
            return self._answer.finish()
        if self._state == "before":
            return self._answer.push(held) + self._answer.finish()
        return self._reasoning(held)
