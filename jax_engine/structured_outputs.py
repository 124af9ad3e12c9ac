"""StructuredOutputsParams: the form that an output must have, and the limits on how large its description may be.

Part of SamplingParams; grammar.py compiles it. Field names are vLLM's. Nothing here touches a device.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax_engine.errors import InvalidRequest

MAX_DESCRIPTION_BYTES = 256 * 1024
MAX_SCHEMA_DEPTH = 64
MAX_CHOICES = 1024
#: White space between the parts of JSON, unless the request says otherwise.
WHITESPACE = r"(\r?\n)?[ \t]{0,40}"
_KINDS = ("json", "regex", "choice", "grammar", "json_object")
_PARAM = "structured_outputs"


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """What an output has to match: exactly one of the first five.

    Attributes:
        json: a JSON schema, as an object or as its text. The output is JSON that the schema admits.
        regex: a regular expression that the whole output matches (Rust syntax, no look-around).
        choice: texts, one of which the output is.
        grammar: a context-free grammar in the Lark dialect of llguidance; its first rule is `start`.
        json_object: any JSON object.
        disable_any_whitespace: JSON without white space between its parts.
        whitespace_pattern: a regular expression of the white space allowed there. By default a line break and up to
            40 blanks: a model that loves white space could else write nothing but.

    Raises:
        InvalidRequest: none or several are given, or one has the wrong type or is too large.
    """

    json: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in _KINDS if getattr(self, name) not in (None, False) or name in self._false_schema()]
        if len(given) != 1:
            raise InvalidRequest(
                f"structured_outputs must hold exactly one of {', '.join(_KINDS)}; got {', '.join(given) or 'none'}",
                _PARAM,
            )
        for name in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise InvalidRequest(f"structured_outputs.{name} must be a text that is not empty", _PARAM)
        for name in ("json_object", "disable_any_whitespace"):
            if not isinstance(getattr(self, name), bool | None):
                raise InvalidRequest(f"structured_outputs.{name} must be True or False", _PARAM)
        if self.choice is not None:
            self._freeze_choice(self.choice)
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        size = sum(len(part) for part in (self.json, self.regex, self.grammar, *(self.choice or ())) if part)  # type: ignore[arg-type]
        if size > MAX_DESCRIPTION_BYTES:
            raise InvalidRequest(
                f"structured_outputs is {size} characters long; at most {MAX_DESCRIPTION_BYTES} are allowed", _PARAM
            )

    def _false_schema(self) -> tuple[str, ...]:
        return ("json",) if self.json is False else ()

    def _freeze_choice(self, choice: Sequence[str]) -> None:
        listed = isinstance(choice, Iterable) and not isinstance(choice, str | bytes | Mapping)
        texts = tuple(choice) if listed else ()
        if not 0 < len(texts) <= MAX_CHOICES or not all(isinstance(text, str) and text for text in texts):
            raise InvalidRequest(
                f"structured_outputs.choice must be 1 to {MAX_CHOICES} texts that are not empty", _PARAM
            )
        object.__setattr__(self, "choice", texts)


def _schema_text(schema: Any) -> str:
    """The schema as JSON text, its depth checked.

    Raises:
        InvalidRequest: it is no JSON schema, or nested too deeply.
    """
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        _check_depth(value)
        text = json.dumps(value, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidRequest(f"structured_outputs.json is not a JSON schema: {error}", _PARAM) from None
    if not isinstance(value, Mapping | bool):
        raise InvalidRequest("structured_outputs.json must be a JSON schema: an object, true or false", _PARAM)
    return text


def _check_depth(schema: Any) -> None:
    """Walks level by level, so that no depth can exhaust the stack."""
    level = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [
            child
            for value in level
            if isinstance(value, Mapping | list | tuple)
            for child in (value.values() if isinstance(value, Mapping) else value)
        ]
        if not level:
            return
    raise InvalidRequest(f"structured_outputs.json is nested deeper than {MAX_SCHEMA_DEPTH} levels", _PARAM)
