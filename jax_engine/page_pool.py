"""PagePool: who holds which KV page.

The pool counts references; it knows nothing of what the pages hold or where they lie. The scheduler calls it; it is
the only writer of `Sequence.pages`. Pages are ids in [0, num_pages).
"""

from collections import Counter
from collections.abc import Iterable

from jax_engine.sequence import Sequence


class PagePool:
    """A free list and a reference count per page.

    Args:
        num_pages: pages in the pool.
        page_size: tokens in a page.
    """

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages = num_pages
        self.page_size = page_size
        # The last page of the list is handed out first, so a page freed a moment ago is used again while it is warm.
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def references(self) -> list[int]:
        """How many sequences hold each page; may be called from any thread."""
        return self._references.copy()

    def pages_for(self, num_tokens: int) -> int:
        """Pages needed to hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def missing(self, sequence: Sequence, num_tokens: int) -> int:
        """How many more pages the sequence needs to hold `num_tokens` tokens; negative if it has spare ones."""
        return self.pages_for(num_tokens) - len(sequence.pages)

    def grow(self, sequence: Sequence, count: int) -> list[int]:
        """Gives `count` free pages to the sequence and returns their ids.

        Raises:
            ValueError: fewer are free; the caller looks first.
        """
        if count > len(self._free):
            raise ValueError(f"{count} pages asked for, {len(self._free)} of {self.num_pages} free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        sequence.pages.extend(pages)
        return pages

    def release(self, sequence: Sequence) -> None:
        """Takes back the sequence's references; pages that nobody holds any more become free."""
        for page in sequence.pages:
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)
        sequence.pages.clear()

    def check(self, owners: Iterable[Sequence]) -> None:
        """Asserts the invariants; for tests.

        Args:
            owners: every sequence that holds pages.
        """
        held = Counter(page for sequence in owners for page in sequence.pages)
        assert len(set(self._free)) == len(self._free), "a page is in the free list twice"
        assert all(0 <= page < self.num_pages for page in [*held, *self._free]), "a page outside the pool"
        assert not held.keys() & set(self._free), "a held page is in the free list"
        assert len(held) + len(self._free) == self.num_pages, "held + free is not all"
        assert all(self._references[page] == held[page] for page in range(self.num_pages)), "reference counts are off"
