"""prefix_digests: what a request's body begins with, for jax_engine.affinity.

Used by ray_app.py, in front of the engines, which has texts and no tokenizer.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from jax_engine.affinity import chain

#: Bytes of JSON in one block: some 64 to 128 tokens, a few pages.
_BLOCK_BYTES = 256
#: Prompts are compared no further than this many blocks.
_MAX_BLOCKS = 256
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
    starts = range(0, min(len(text), _MAX_BLOCKS * _BLOCK_BYTES) - _BLOCK_BYTES + 1, _BLOCK_BYTES)
    return tuple(chain(text[start : start + _BLOCK_BYTES] for start in starts))
