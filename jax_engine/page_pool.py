"""PagePool: who holds which KV page, and which pages hold what a later sequence could use again.

The scheduler calls it; it is the only writer of a sequence's pages and digests. It never touches a device: pages are
ids in [0, num_pages), and what they hold is known by the tokens that were written to them.

Prefix cache. A full page is found by a digest of its tokens and of the digest of the page before it, so equal digests
mean equal tokens from the first position on. A full page is never written again, so it is shared without copying. Pages
that nobody holds stay in the index until their place is needed, least recently used first.

Groups of layers (page_groups.py) share the pool: any page serves any group. A sliding group gives back what its window
has passed when the sequence needs further pages. Steps in flight may still read these pages; whoever gets them writes
to them in a step that is dispatched later, and a device runs steps in the order of their dispatch.
"""

import os
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from hashlib import blake2b
from itertools import chain, zip_longest
from typing import NamedTuple

from jax_engine.page_groups import PageGroups
from jax_engine.sequence import NO_PAGE, Sequence

_DIGEST_BYTES = 16
_ONE_GROUP = PageGroups()


class _Contents(NamedTuple):
    """What an indexed page holds: its tokens, after those that `parent` stands for. `key`: see PagePool._key_of."""

    key: bytes
    parent: bytes
    tokens: bytes


class PagePool:
    """Free pages, a reference count per page, and the index of pages by contents. Everything is O(1) per page.

    Args:
        num_pages: pages in the pool.
        page_size: tokens in a page.
        caching: keep an index; else every page that nobody holds is simply free.
        groups: of layers. step_tokens: most tokens of one step; sets how far ahead a sliding group takes pages.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        caching: bool = False,
        groups: PageGroups = _ONE_GROUP,
        step_tokens: int = 1,
    ):
        self.groups = groups
        self.span = groups.span(page_size, step_tokens)
        self._is_sliding = [False] * groups.num_full + [True] * groups.num_sliding
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

    def match(self, sequence: Sequence, num_tokens: int) -> list[list[int]]:
        """Tables of pages that already hold the beginning of the sequence's first `num_tokens` tokens, the longest that
        serves every group; takes none of them. In sliding groups NO_PAGE stands for what nobody would look at."""
        length = num_tokens // self.page_size if self.caching else 0
        full = []
        for group in range(self.groups.num_full):
            table: list[int] = []
            for number in range(length):
                page = self._find(sequence, group, number)
                if page is None:
                    break
                table.append(page)
            length = len(table)
            full.append(table)
        sliding = self._match_windows(sequence, length)
        length = len(sliding[0]) if sliding else length
        return [table[:length] for table in full] + sliding

    def _match_windows(self, sequence: Sequence, length: int) -> list[list[int]]:
        """The same for the sliding groups: of the beginnings of at most `length` pages, the longest whose last window
        is there."""
        sliding = range(self.groups.num_full, self.groups.num)
        tables = [[NO_PAGE] * length for _ in sliding]
        number = length - 1
        while number >= self._first_kept(length * self.page_size):
            for group, table in zip(sliding, tables, strict=True):
                page = self._find(sequence, group, number)
                if page is None:
                    length = number
                    break
                table[number] = page
            number -= 1
        first = self._first_kept(length * self.page_size)
        return [[NO_PAGE] * first + table[first:length] for table in tables]

    def price_to_join(self, found: list[list[int]], count: int, start: int) -> int:
        """How many fewer pages are free when a sequence has shared what `match` found and has grown to `count` pages.

        Args:
            start: the first token to compute.
        """
        first = self._first_kept(start)
        shared = chain(*found[: self.groups.num_full], *(table[first:] for table in found[self.groups.num_full :]))
        num_free = sum(page != NO_PAGE and not self._references[page] for page in shared)
        return num_free + self._num_new(found, count, first)

    def share(self, sequence: Sequence, found: list[list[int]]) -> None:
        """Gives the sequence, which has no pages, those that `match` found for it just now."""
        for table, pages in zip(self._tables(sequence), found, strict=True):
            for page in pages:
                if page != NO_PAGE:
                    if not self._references[page]:
                        del self._unused[page]
                    self._references[page] += 1
            table.extend(pages)
        sequence.num_indexed = len(sequence.pages)
        sequence.num_dropped = self._first_kept(len(sequence.pages) * self.page_size)
        sequence.num_places = len(sequence.pages) * self.page_size

    def price(self, sequence: Sequence, count: int) -> int:
        """How many fewer pages `grow` would leave free; may be negative."""
        if not self.groups.num_sliding:
            return count - len(sequence.pages)  # there is one group then
        tables, first = self._tables(sequence), self._first_kept(sequence.num_computed)
        passed = chain(*(table[sequence.num_dropped : first] for table in tables[self.groups.num_full :]))
        num_freed = sum(self._references[page] == 1 for page in passed)
        return self._num_new(tables, count, first) - num_freed

    def grow(self, sequence: Sequence, count: int) -> list[tuple[int, int, list[int]]]:
        """Gives the sequence pages, up to `count` in each full group, and in each sliding group up to what a step can
        add to the window; takes back what the window has passed.

        Returns:
            What changes in the tables: group, number of the first page, ids. Where a page was taken back, another that
            is full stands for it: kernels may read it, and see nothing of it.

        Raises:
            ValueError: fewer are free; the caller looks first.
        """
        price = self.price(sequence, count)
        if price > self.num_free:
            raise ValueError(f"{price} pages asked for, {self.num_free} of {self.num_pages} free")
        if not self.groups.num_sliding:  # the shortest way where there is one group, for it is gone for every page
            length, pages = len(sequence.pages), [self._take() for _ in range(price)]
            sequence.pages.extend(pages)
            sequence.num_places = count * self.page_size
            return [(0, length, pages)]
        tables, dropped = self._tables(sequence), sequence.num_dropped
        first = self._give_back(sequence)
        changes = []
        for group, table in enumerate(tables):
            length = len(table)
            pages = [self._take() for _ in range(self._length(group, count, first) - length)]
            table.extend(pages)
            if self._is_sliding[group] and first > dropped:
                changes.append((group, dropped, [table[first]] * (first - dropped)))
            if pages:
                changes.append((group, length, pages))
        sequence.num_places = len(tables[-1]) * self.page_size
        return changes

    def _give_back(self, sequence: Sequence) -> int:
        """Takes back what the sequence's windows have passed. Returns the number of the first page that they keep."""
        first = self._first_kept(sequence.num_computed)
        for table in sequence.tables[self.groups.num_full :]:
            for number in range(sequence.num_dropped, min(first, len(table))):
                self._let_go(table[number])
                table[number] = NO_PAGE
            table.extend([NO_PAGE] * (first - len(table)))
        sequence.num_dropped = first
        return first

    def shown(self, sequence: Sequence) -> list[list[int]]:
        """The sequence's tables as the device is to have them, with a page in every place; see `grow`."""
        first = sequence.num_dropped
        return [
            table[first : first + 1] * first + table[first:] if is_sliding else list(table)
            for is_sliding, table in zip(self._is_sliding, sequence.tables, strict=True)
        ]

    def index(self, sequence: Sequence, num_tokens: int) -> None:
        """Enters the sequence's pages that its first `num_tokens` tokens fill.

        Those tokens must be known to the host, and their KV written or dispatched to be written. Whoever finds a page
        reads it in a step that is dispatched later, and a device runs steps in the order of their dispatch.
        """
        if not self.caching:
            return
        for number in range(sequence.num_indexed, num_tokens // self.page_size):
            digest = self._digest(sequence, number)
            for group, table in enumerate(sequence.tables):
                key, page = self._key_of(digest, group), table[number]
                # Else another page holds the same, and this one stays private.
                if page != NO_PAGE and key not in self._index:
                    self._index[key] = page
                    self._contents[page] = _Contents(key, sequence.digests[number], self._tokens(sequence, number))
            sequence.num_indexed = number + 1

    def release(self, sequence: Sequence) -> None:
        """Takes back the sequence's references; pages that nobody holds any more become free."""
        # The last page first: a page is of no use without those before it, so it must not outlive them.
        for pages in reversed(list(zip_longest(*sequence.tables, fillvalue=NO_PAGE))):
            for page in pages:
                if page != NO_PAGE:
                    self._let_go(page)
        for table in sequence.tables:
            table.clear()
        sequence.num_indexed = sequence.num_dropped = sequence.num_places = 0

    def forget(self, sequence: Sequence) -> None:
        """Takes the sequence's pages out of the index, those it has given back too: what they hold is not to be
        trusted."""
        for page in chain(*sequence.tables):
            if page != NO_PAGE:
                self._forget(page)
        for number in range(min(sequence.num_dropped, sequence.num_indexed)):
            for group in range(self.groups.num_full, self.groups.num):
                page = self._index.get(self._key_of(self._digest(sequence, number), group))
                if page is not None:
                    self._forget(page)

    def clear_index(self) -> None:
        """Takes every page out of the index; who holds one keeps it."""
        self._free.extend(self._unused)
        self._unused.clear()
        self._index.clear()
        self._contents = [None] * self.num_pages

    def _first_kept(self, num_tokens: int) -> int:
        return self.groups.first_kept(num_tokens, self.page_size)

    def _length(self, group: int, count: int, first: int) -> int:
        """How long the group's table is when it has grown to `count` pages of which the first `first` are passed."""
        return min(count, first + self.span) if self._is_sliding[group] else count

    def _num_new(self, tables: list[list[int]], count: int, first: int) -> int:
        """Pages that these tables have yet to be given to be of that length."""
        held = (
            len(table) if group < self.groups.num_full else max(len(table), first) for group, table in enumerate(tables)
        )
        return sum(self._length(group, count, first) - length for group, length in enumerate(held))

    def _tables(self, sequence: Sequence) -> list[list[int]]:
        """The sequence's tables, one for each group also where it never had pages."""
        tables = sequence.tables
        while len(tables) < len(self._is_sliding):
            tables.append([])
        return tables

    def _take(self) -> int:
        """A free page, which is the caller's now."""
        page = self._free.pop() if self._free else self._evict()
        self._references[page] = 1
        return page

    def _let_go(self, page: int) -> None:
        """Takes back one reference."""
        self._references[page] -= 1
        if not self._references[page]:
            if self._contents[page] is None:
                self._free.append(page)
            else:
                self._unused[page] = None

    def _evict(self) -> int:
        """Takes the least recently used page out of the index."""
        page, _ = self._unused.popitem(last=False)
        self._unindex(page)
        return page

    def _forget(self, page: int) -> None:
        """Takes a page out of the index, if it is there."""
        if self._contents[page] is not None:
            self._unindex(page)
            if page in self._unused:
                del self._unused[page]
                self._free.append(page)

    def _unindex(self, page: int) -> None:
        contents = self._contents[page]
        assert contents is not None
        del self._index[contents.key]
        self._contents[page] = None

    def _find(self, sequence: Sequence, group: int, number: int) -> int | None:
        """The page that already holds page `number` of the sequence, of that group."""
        digest = self._digest(sequence, number)
        key = self._key_of(digest, group)
        page = self._index.get(key)
        if page is None:
            return None
        # Another text with the same digest is as good as impossible, and no reason to trust luck.
        expected = _Contents(key, sequence.digests[number], self._tokens(sequence, number))
        return page if self._contents[page] == expected else None

    @staticmethod
    def _key_of(digest: bytes, group: int) -> bytes:
        """Under what the index has the page of a group; those of the first group under the digest itself."""
        return digest + bytes((group,)) if group else digest

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
        held = Counter(page for sequence in owners for page in chain(*sequence.tables) if page != NO_PAGE)
        free = [*self._free, *self._unused]
        assert len(set(free)) == len(free), "a page is free twice"
        assert all(0 <= page < self.num_pages for page in [*held, *free]), "a page outside the pool"
        assert not held.keys() & set(free), "a held page is free"
        assert len(held) + len(free) == self.num_pages, "held + free is not all"
        assert all(self._references[page] == held[page] for page in range(self.num_pages)), "reference counts are off"
        indexed = {contents.key: page for page, contents in enumerate(self._contents) if contents is not None}
        assert indexed == self._index, "the index names pages that hold something else"
        assert all(self._contents[page] is None for page in self._free), "an indexed page is in the free list"
        assert all(self._contents[page] is not None for page in self._unused), "an unused page is in no index"
        for sequence in owners:
            self._check_tables(sequence, held)

    def _check_tables(self, sequence: Sequence, held: Counter[int]) -> None:
        first = sequence.num_dropped
        assert len(sequence.tables) == self.groups.num or not sequence.pages
        assert sequence.num_places == min(map(len, sequence.tables)) * self.page_size
        for group, table in enumerate(sequence.tables):
            dropped = first if group >= self.groups.num_full else 0
            assert [page == NO_PAGE for page in table] == [number < dropped for number in range(len(table))]
            assert len(table) <= len(sequence.pages), "a table is longer than the first"
            assert group < self.groups.num_full or len(table) - first <= self.span, "more than a window and a step"
            shared = {page for page in table[dropped:] if held[page] > 1}
            assert shared <= set(table[: sequence.num_indexed]), "a page that may be written is shared"
