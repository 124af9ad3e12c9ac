"""The exception that leaves this package. Whoever opens or loads a checkpoint catches this and no other."""

from collections.abc import Iterable

_MOST_SHOWN = 100


class CheckpointError(Exception):
    """A checkpoint cannot be found, is damaged, or does not hold what the model needs.

    Args:
        problems: one message, or all problems found, each naming its file and, where there is one, its tensor.
    """

    def __init__(self, problems: str | Iterable[str]):
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        shown = self.problems[:_MOST_SHOWN]
        if len(shown) < len(self.problems):
            shown.append(f"... and {len(self.problems) - len(shown)} more")
        super().__init__(shown[0] if len(shown) == 1 else "\n".join([f"{len(self.problems)} problems:", *shown]))
