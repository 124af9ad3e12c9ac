"""StepTime: how long a step will take, learnt from the steps that were taken.

The scheduler asks it when streams must not wait longer than a bound (`max_decode_gap_ms`). Times come in with each
commit, from one result to the next, so that the host's work counts where the device waits for it; there is no clock
here, so the same calls give the same answers.
"""

from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass

_MEMORY = 100  # measurements of a bucket that its line is fitted to, roughly
_LEARNING_STEPS = 20  # of a bucket, in which an error says nothing of later ones
_MARGIN_DECAY = 0.999  # a slow step is remembered for a thousand
_MAX_MARGIN = 2.0


@dataclass
class _Line:
    """Seconds = base + slope * pairs, by least squares on the latest measurements of one bucket.

    Kept as means, variance and covariance with exponentially falling weights.
    """

    count: int = 0
    pairs: float = 0.0
    seconds: float = 0.0
    variance: float = 0.0
    covariance: float = 0.0

    @property
    def slope(self) -> float:
        return max(0.0, self.covariance / self.variance) if self.variance > 0 else 0.0

    @property
    def base(self) -> float:
        return max(0.0, self.seconds - self.slope * self.pairs)

    def add(self, pairs: int, seconds: float) -> None:
        self.count += 1
        rate = 1 / min(self.count, _MEMORY)
        off_pairs, off_seconds = pairs - self.pairs, seconds - self.seconds
        self.pairs += rate * off_pairs
        self.seconds += rate * off_seconds
        self.variance = (1 - rate) * (self.variance + rate * off_pairs**2)
        self.covariance = (1 - rate) * (self.covariance + rate * off_pairs * off_seconds)


class StepTime:
    """Seconds of a step: base and slope of its bucket, times a margin.

    The slope is per pair of a query token and a key that it attends to. The margin is the second worst recent ratio of
    a measurement to its prediction: the bound is for all but one step in a thousand, so a stall that happens once
    (another process, a page fault) makes nobody wait longer for the next thousand.

    Args:
        sizes: the token counts of the buckets, increasing.
    """

    def __init__(self, sizes: AbstractSequence[int]):
        self._sizes = tuple(sizes)
        self._lines: dict[int, _Line] = {}
        self._worst = [1.0, 1.0]  # ratios, falling

    def learn(self, size: int, pairs: int, seconds: float) -> None:
        """Takes in a measured step of a bucket of `size` tokens."""
        line = self._lines.setdefault(size, _Line())
        predicted = line.base + line.slope * pairs
        if line.count >= _LEARNING_STEPS and predicted > 0:
            remembered = [1 + (ratio - 1) * _MARGIN_DECAY for ratio in self._worst]
            self._worst = sorted([*remembered, min(_MAX_MARGIN, seconds / predicted)], reverse=True)[:2]
        line.add(pairs, seconds)

    def predict(self, size: int, pairs: int) -> float | None:
        """Seconds that such a step should not exceed; None if nothing is known yet.

        Of a bucket that was never used, more than the truth: a token costs no more in a larger step.
        """
        if not self._lines:
            return None
        line, scale = self._lines.get(size), 1.0
        if line is None:
            nearest = max((known for known in self._lines if known < size), default=min(self._lines))
            line, scale = self._lines[nearest], max(1.0, size / nearest)
        return (line.base * scale + line.slope * pairs) * self._worst[1]

    def largest(self, seconds: float, num_decodes: int, num_tokens: int, start: int, decode_pairs: int) -> int:
        """Most prompt tokens beside `num_decodes` single ones so that the step stays within `seconds`.

        Args:
            num_tokens: as many are wanted. start: position of the first of them. decode_pairs: of the single tokens.

        Returns:
            At least 1: prompts must go on, also where the bound cannot be kept.
        """
        fitting = 0
        for size in self._sizes:
            room = min(num_tokens, size - num_decodes)
            if room < 1:
                continue
            predicted = self.predict(size, decode_pairs + room * (start + room))
            if fitting and (predicted is None or predicted > seconds):
                break
            fitting = room
            if room == num_tokens:
                break
        return max(fitting, 1)
