"""PagePool: who holds which KV page, and which pages hold what a later sequence could use again.

The scheduler calls it; it is the only writer of a sequence's pages and digests. It never touches a device: pages are
ids in [0, num_pages), and what they hold is known by the tokens that were written to them.

Prefix cache. A full page is found by a digest of its tokens and of the digest of the page before it, so equal digests
mean equal tokens from the first position on. A full page is never written again, so it is shared without copying. Pages
that nobody holds stay in the index until their place is needed, least recently used first.
"""

import os
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from hashlib import blake2b
from typing import NamedTuple

from jax_engine.sequence import Sequence

_DIGEST_BYTES = 16


class _Contents(NamedTuple):
    """What an indexed page holds: its tokens, after those that `parent` stands for."""

    digest: bytes
    parent: bytes
    tokens: bytes


class PagePool:
    """Free pages, a reference count per page, and the index of pages by contents. Everything is O(1) per page.

    Args:
        num_pages: pages in the pool.
        page_size: tokens in a page.
        caching: keep an index; else every page that nobody holds is simply free.
    """

    def __init__(self, num_pages: int, page_size: int, caching: bool = False):
        self.num_pages = num_pages
        self.page_size = page_size
        self.caching = caching
        # The last page of the list is handed out first, so a page freed a moment ago is used again while it is warm.
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages
        self._index: dict[bytes, int] = {}
        self._contents: list[_Contents | None] = [None] * num_pages
        self._unused: OrderedDict[int, None] = OrderedDict()  # indexed, held by nobody; least recently used first
        # A key that nobody outside knows: a client cannot make up prompts whose digests collide. No decision depends
        # on it, since digests are only ever compared for equality.
        self._key = os.urandom(_DIGEST_BYTES)

    @property
    def num_free(self) -> int:
        """Pages that nobody holds, those in the index included."""
        return len(self._free) + len(self._unused)

    @property
    def num_indexed(self) -> int:
        """Pages that a later sequence could use again."""
        return len(self._index)

    def references(self) -> list[int]:
        """How many sequences hold each page; -1 for one that nobody holds but whose contents are kept. For a picture:
        may be called from any thread, and pages may be a step apart."""
        pages = zip(self._references.copy(), self._contents.copy(), strict=True)
        return [-1 if not count and contents is not None else count for count, contents in pages]

    def pages_for(self, num_tokens: int) -> int:
        """Pages needed to hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def match(self, sequence: Sequence, num_tokens: int) -> list[int]:
        """Pages that already hold the beginning of the sequence's first `num_tokens` tokens; takes none of them."""
        found: list[int] = []
        if not self.caching:
            return found
        for number in range(num_tokens // self.page_size):
            digest = self._digest(sequence, number)
            page = self._index.get(digest)
            if page is None:
                break
            contents = self._contents[page]
            expected = _Contents(digest, sequence.digests[number], self._tokens(sequence, number))
            if contents != expected:
                break  # another text with the same digest: as good as impossible, and no reason to trust luck
            found.append(page)
        return found

    def num_free_among(self, pages: list[int]) -> int:
        """How many of the pages nobody holds, so that sharing them makes as many fewer free."""
        return sum(not self._references[page] for page in pages)

    def share(self, sequence: Sequence, pages: list[int]) -> None:
        """Gives the sequence, which has no pages, those that `match` found for it just now."""
        for page in pages:
            if not self._references[page]:
                del self._unused[page]
            self._references[page] += 1
        sequence.pages.extend(pages)
        sequence.num_indexed = len(pages)

    def grow(self, sequence: Sequence, count: int) -> list[int]:
        """Gives `count` free pages to the sequence and returns their ids.

        Raises:
            ValueError: fewer are free; the caller looks first.
        """
        if count > self.num_free:
            raise ValueError(f"{count} pages asked for, {self.num_free} of {self.num_pages} free")
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        sequence.pages.extend(pages)
        return pages

    def index(self, sequence: Sequence, num_tokens: int) -> None:
        """Enters the sequence's pages that its first `num_tokens` tokens fill.

        Those tokens must be known to the host, and their KV written or dispatched to be written. Whoever finds a page
        reads it in a step that is dispatched later, and a device runs steps in the order of their dispatch.
        """
        if not self.caching:
            return
        for number in range(sequence.num_indexed, num_tokens // self.page_size):
            digest = self._digest(sequence, number)
            page = sequence.pages[number]
            if digest not in self._index:  # else another page holds the same, and this one stays private
                self._index[digest] = page
                self._contents[page] = _Contents(digest, sequence.digests[number], self._tokens(sequence, number))
            sequence.num_indexed = number + 1

    def release(self, sequence: Sequence) -> None:
        """Takes back the sequence's references; pages that nobody holds any more become free."""
        # The last page first: a page is of no use without those before it, so it must not outlive them.
        for page in reversed(sequence.pages):
            self._references[page] -= 1
            if not self._references[page]:
                if self._contents[page] is None:
                    self._free.append(page)
                else:
                    self._unused[page] = None
        sequence.pages.clear()
        sequence.num_indexed = 0

    def forget(self, sequence: Sequence) -> None:
        """Takes the sequence's pages out of the index: what they hold is not to be trusted."""
        for page in sequence.pages:
            contents = self._contents[page]
            if contents is not None:
                del self._index[contents.digest]
                self._contents[page] = None

    def clear_index(self) -> None:
        """Takes every page out of the index; who holds one keeps it."""
        self._free.extend(self._unused)
        self._unused.clear()
        self._index.clear()
        self._contents = [None] * self.num_pages

    def _evict(self) -> int:
        """Takes the least recently used page out of the index."""
        page, _ = self._unused.popitem(last=False)
        contents = self._contents[page]
        assert contents is not None
        del self._index[contents.digest]
        self._contents[page] = None
        return page

    def _digest(self, sequence: Sequence, number: int) -> bytes:
        """The digest of the sequence's full page `number`; computed once. digests[k] stands for the first k pages."""
        digests = sequence.digests
        if not digests:
            salt = sequence.request.cache_salt
            digests.append(b"" if salt is None else self._hash(salt.encode(), b"salt"))
        while len(digests) <= number + 1:
            digests.append(self._hash(digests[-1] + self._tokens(sequence, len(digests) - 1), b"page"))
        return digests[number + 1]

    def _hash(self, data: bytes, purpose: bytes) -> bytes:
        return blake2b(data, key=self._key, digest_size=_DIGEST_BYTES, person=purpose).digest()

    def _tokens(self, sequence: Sequence, number: int) -> bytes:
        start = number * self.page_size
        return array("i", sequence.token_ids[start : start + self.page_size]).tobytes()

    def check(self, owners: Iterable[Sequence]) -> None:
        """Asserts the invariants; for tests.

        Args:
            owners: every sequence that holds pages.
        """
        owners = list(owners)
        held = Counter(page for sequence in owners for page in sequence.pages)
        free = [*self._free, *self._unused]
        assert len(set(free)) == len(free), "a page is free twice"
        assert all(0 <= page < self.num_pages for page in [*held, *free]), "a page outside the pool"
        assert not held.keys() & set(free), "a held page is free"
        assert len(held) + len(free) == self.num_pages, "held + free is not all"
        assert all(self._references[page] == held[page] for page in range(self.num_pages)), "reference counts are off"
        indexed = {contents.digest: page for page, contents in enumerate(self._contents) if contents is not None}
        assert indexed == self._index, "the index names pages that hold something else"
        assert all(self._contents[page] is None for page in self._free), "an indexed page is in the free list"
        assert all(self._contents[page] is not None for page in self._unused), "an unused page is in no index"
        for sequence in owners:
            shared = {page for page in sequence.pages if held[page] > 1}
            assert shared <= set(sequence.pages[: sequence.num_indexed]), "a page that may be written is shared"
