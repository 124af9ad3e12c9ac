"""Shapes that tests and benchmarks of block_tail share."""

from typing import NamedTuple


class Case(NamedTuple):
    """Widths of a layer: model, what attention leaves, feed-forward."""

    embed: int
    attended: int
    hidden: int

    @property
    def weight_bytes(self) -> int:
        """Of the layer's weights in 16 bits."""
        return 2 * self.embed * (self.attended + 3 * self.hidden)


CASES = {
    "llama-8b": Case(4096, 4096, 14336),
    "llama-8b, half": Case(4096, 2048, 7168),
    "qwen3-0.6b": Case(1024, 2048, 3072),
}
#: For the interpreter, in which one worker does everything: each of a product's outputs fills a place of the ring, or
#: several blocks of fewer outputs do; inputs end inside a block and inside a place.
SMALL_CASES = {
    "whole blocks": Case(64, 64, 128),
    "odd rows": Case(40, 72, 112),
    "short blocks": Case(24, 200, 40),
}
