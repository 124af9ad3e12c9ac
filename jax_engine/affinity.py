"""PrefixAffinity: which of several engines most likely holds the beginning of a prompt in its prefix cache.

router.py has one in front of the replicas of one process, serving/ray_app.py one in front of engines elsewhere. Knows
digests and names only: it neither sends requests nor asks an engine. The guess may be wrong (an engine may have dropped
the pages); it then costs a prefill and nothing else.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b

_DIGEST_BYTES = 8


class PrefixAffinity[Name: (str, int)]:
    """Remembers which engine was sent which beginnings. A new one goes to the engine with the least load; among equals,
    to the one with the fewest remembered blocks.

    The engine that was sent the longest equal beginning is chosen, unless its load is above the least one by more than
    `slack`, with what the beginning is worth, and `ratio` times: a popular beginning must not crowd one engine while
    others idle.

    Args:
        max_blocks: remembered blocks; the least recently used are forgotten first.
        block_load: the load that one block of an equal beginning saves.
    """

    def __init__(self, *, max_blocks: int = 200_000, slack: int = 4, ratio: float = 1.5, block_load: int = 0):
        self._max_blocks, self._slack, self._ratio, self._block_load = max_blocks, slack, ratio, block_load
        self._owners: OrderedDict[bytes, Name] = OrderedDict()
        self._owned: Counter[Name] = Counter()

    def choose(self, digests: Sequence[bytes], loads: Mapping[Name, int]) -> Name:
        """The engine for a prompt, which is then expected to hold it.

        Args:
            digests: one for each block of the prompt, each standing for all up to its block's end.
            loads: of each engine that can be chosen, in any unit; not empty.
        """
        least = min(loads, key=lambda name: (loads[name], self._owned[name], name))
        chosen = least
        for count in range(len(digests), 0, -1):
            known = self._owners.get(digests[count - 1])
            if known is not None and known in loads:
                saved = self._slack + count * self._block_load
                if loads[known] <= max(loads[least] + saved, self._ratio * loads[least]):
                    chosen = known
                break
        for digest in digests:
            self._forget(digest)
            self._owners[digest] = chosen  # last, as the most recently used
        self._owned[chosen] += len(digests)
        while len(self._owners) > self._max_blocks:
            self._forget(next(iter(self._owners)))
        return chosen

    def _forget(self, digest: bytes) -> None:
        if (owner := self._owners.pop(digest, None)) is not None:
            self._owned[owner] -= 1


def chain(blocks: Iterable[bytes], start: bytes = b"") -> list[bytes]:
    """A digest for each block of a prompt, each standing for all up to its block's end, `start` before them."""
    digest, digests = start, []
    for block in blocks:
        digest = blake2b(digest + block, digest_size=_DIGEST_BYTES).digest()
        digests.append(digest)
    return digests
