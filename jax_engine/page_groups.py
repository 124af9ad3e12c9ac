"""PageGroups: how a model's layers share pages, and which pages of a sequence they still look at (docs/adr/0025).

A page holds `page_size` tokens of one group of layers, and all groups have as many layers, so any page serves any
group. Each sequence has a table of pages per group. Pure arithmetic: models, limits, scheduler and page pool ask it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PageGroups:
    """The groups, those that see all positions first.

    Attributes:
        num_full: groups whose layers see every position. The first one's pages also keep the token ids.
        num_sliding: groups whose layers see the `window` latest positions, their own included.
        window: the widest of these layers; 0 where there are none.
    """

    num_full: int = 1
    num_sliding: int = 0
    window: int = 0

    @property
    def num(self) -> int:
        """Groups, and tables of a sequence."""
        return self.num_full + self.num_sliding

    def first_kept(self, num_tokens: int, page_size: int) -> int:
        """Number of the first page that a sliding group keeps when the tokens from `num_tokens` on are yet to be
        computed: all that these see, and at least one page that is full, which stands in the table for those before.
        """
        if not self.num_sliding:
            return 0
        return max(0, min(num_tokens - self.window + 1, num_tokens - page_size) // page_size)

    def span(self, page_size: int, step_tokens: int) -> int:
        """Pages that a sequence has at most in a sliding group: what is seen, and what one step can add."""
        return (max(self.window - 1, page_size) + step_tokens - 1) // page_size + 2

    def num_kept(self, num_tokens: int, page_size: int) -> int:
        """Pages that hold what is needed of a sequence's first `num_tokens` tokens."""
        end = -(-num_tokens // page_size)
        return self.num_full * end + self.num_sliding * (end - self.first_kept(num_tokens, page_size))

    def most_pages(self, num_tokens: int, page_size: int, step_tokens: int) -> int:
        """Most pages that a sequence has at once on its way to `num_tokens` tokens."""
        end = -(-num_tokens // page_size)
        return self.num_full * end + self.num_sliding * min(end, self.span(page_size, step_tokens))

    def most_tokens(self, num_pages: int, page_size: int, step_tokens: int) -> int:
        """Tokens of the longest sequence that so many pages hold, alone."""
        count, span = num_pages // self.num, self.span(page_size, step_tokens)
        if self.num_sliding and count >= span:
            count = (num_pages - self.num_sliding * span) // self.num_full
        return count * page_size
