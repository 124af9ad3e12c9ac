"""Pieces of Lark grammars that the formats of answers are made of."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax_engine.structured_outputs import WHITESPACE

#: Gives the token id of a special token's text, or None where the vocabulary has no such token.
SpecialToken = Callable[[str], int | None]


def json_rule(schema: Mapping[str, Any]) -> str:
    """JSON that a schema admits."""
    return "%json " + json.dumps({"x-guidance": {"whitespace_pattern": WHITESPACE}} | dict(schema))


def terms(text: str, marks: Sequence[str], special_token: SpecialToken) -> str:
    """A text; of the marks in it, those that are special tokens of the vocabulary stand as such."""
    found_terms = []
    while text:
        found = min(((text.find(mark), mark) for mark in marks if mark in text), default=None)
        before = text if found is None else text[: found[0]]
        if before:
            found_terms.append(json.dumps(before))
        if found is None:
            break
        token = special_token(found[1])
        found_terms.append(json.dumps(found[1]) if token is None else f"<[{token}]>")
        text = text[found[0] + len(found[1]) :]
    return " ".join(found_terms)
