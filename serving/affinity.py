"""PrefixAffinity: which of several engines most likely holds the beginning of a prompt in its prefix cache.

Used by ray_app.py, in front of the engines. Knows texts and names only: it neither sends requests nor asks an engine.
The guess may be wrong (an engine may have dropped the pages); it then costs a prefill and nothing else.
"""

from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import msgspec

#: Bytes of JSON in one block: some 64 to 128 tokens, a few pages.
_BLOCK_BYTES = 256
#: Prompts are compared no further than this many blocks.
_MAX_BLOCKS = 256
_DIGEST_BYTES = 8
#: What comes before the conversation in the rendered prompt, in the fields' names of all protocols.
_HEAD_FIELDS = ("cache_salt", "tools", "system", "instructions")
_BODY_FIELDS = ("prompt", "messages", "input")


def prefix_digests(body: Mapping[str, Any]) -> tuple[bytes, ...]:
    """One digest for each whole block of the prompt in a request's body, each standing for all up to its block's end.

    A conversation that continues another has the other's digests first. Token ids and texts, chats, Responses and
    Messages alike; a body without a prompt has none.
    """
    parts = [msgspec.json.encode([body.get(name) for name in _HEAD_FIELDS])]
    for name in _BODY_FIELDS:
        value = body.get(name)
        # Item by item: the bracket after a list's last item would be a difference to the longer list.
        parts += [msgspec.json.encode(item) for item in value] if isinstance(value, list) else []
        parts += [value.encode(errors="replace")] if isinstance(value, str) else []
    text = b",".join(parts)
    digest, digests = b"", []
    for start in range(0, min(len(text), _MAX_BLOCKS * _BLOCK_BYTES) - _BLOCK_BYTES + 1, _BLOCK_BYTES):
        digest = blake2b(digest + text[start : start + _BLOCK_BYTES], digest_size=_DIGEST_BYTES).digest()
        digests.append(digest)
    return tuple(digests)


class PrefixAffinity:
    """Remembers which engine was sent which beginnings. A new one goes to the engine with the fewest requests; among
    equals, to the one with the fewest remembered blocks.

    The engine that was sent the longest equal beginning is chosen, unless it is busier than the least busy one by more
    than `slack` requests and `ratio` times: a popular beginning must not crowd one engine while others idle.

    Args:
        max_blocks: remembered blocks; the least recently used are forgotten first.
    """

    def __init__(self, *, max_blocks: int = 200_000, slack: int = 4, ratio: float = 1.5):
        self._max_blocks, self._slack, self._ratio = max_blocks, slack, ratio
        self._owners: OrderedDict[bytes, str] = OrderedDict()
        self._owned: Counter[str] = Counter()

    def choose(self, digests: Sequence[bytes], loads: Mapping[str, int]) -> str:
        """The engine for a prompt, which is then expected to hold it.

        Args:
            digests: see prefix_digests.
            loads: unfinished requests of each engine that can be chosen; not empty.
        """
        least = min(loads, key=lambda name: (loads[name], self._owned[name], name))
        known = next((owner for d in reversed(digests) if (owner := self._owners.get(d)) in loads), None)
        chosen = least
        if known is not None and loads[known] <= max(loads[least] + self._slack, self._ratio * loads[least]):
            chosen = known
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
