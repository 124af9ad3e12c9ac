"""Which request fields are refused because ignoring them would give an answer the client did not ask for.

Called by schema.parse. A field that only hints (store, metadata, user ...) is accepted and has no effect; one that
constrains the output is refused, known or not, and so is a likely misspelling of a field we do serve.
"""

import difflib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from jax_engine import StructuredOutputsParams
from serving.errors import bad_request

#: Accepted, without effect: they choose nothing about the text.
IGNORED = frozenset(
    {
        "metadata", "moderation", "prediction", "prompt_cache_key", "prompt_cache_options",
        "prompt_cache_retention", "request_id", "safety_identifier", "service_tier",
        "spaces_between_special_tokens", "store", "verbosity",
    }
)  # fmt: skip

#: Bounds on what is compared with the known names.
_MAX_UNKNOWN = 64
_MAX_NAME_CHARS = 128

_Fields = Mapping[str, Any]

#: Field -> whether its value asks for nothing that we do not do. A missing or null field is always allowed.
_ALLOWED_VALUES: dict[str, Callable[[Any, _Fields], bool]] = {
    "tools": lambda value, _: value == [],
    "functions": lambda value, _: value == [],
    "tool_choice": lambda value, _: value in ("none", "auto"),
    "function_call": lambda value, _: value in ("none", "auto"),
    "best_of": lambda value, fields: value == (fields.get("n") or 1),
    "modalities": lambda value, _: value == ["text"],
    "use_beam_search": lambda value, _: value is False,
    "echo": lambda value, _: value is False,
    "suffix": lambda value, _: value == "",
    "documents": lambda value, _: value == [],
    "length_penalty": lambda value, _: value == 1,
    "logits_processors": lambda value, _: value == [],
    "top_logprobs": lambda value, _: value == 0,
    "add_generation_prompt": lambda value, _: value is True,
    "continue_final_message": lambda value, _: value is False,
}

#: Names that constrain the output in some engine or other.
_CONSTRAINT = re.compile(
    r"(guided_|structured_|json_|regex|grammar|ebnf|choice|top_|min_|max_|stop|bad_|allowed_|banned_|truncate_"
    r"|audio$|web_search|logits_processors|length_penalty|typical_p|mirostat|dry_|xtc_|adapter|lora"
    r"|documents$|chat_template$|messages$|prompt$|.*_penalty$|.*temperature)"
)


def check(fields: _Fields, known: Collection[str]) -> None:
    """Refuses what cannot be honoured.

    Args:
        fields: the decoded body.
        known: the fields the endpoint serves.

    Raises:
        ApiError: 400, naming the field.
    """
    unknown = [name for name in fields if name not in known and name not in IGNORED]
    if len(unknown) > _MAX_UNKNOWN or any(len(name) > _MAX_NAME_CHARS for name in unknown):
        raise bad_request(
            f"more than {_MAX_UNKNOWN} unknown fields, or one of more than {_MAX_NAME_CHARS} characters",
            code="unknown_field",
        )
    for name in unknown:
        value = fields[name]
        if value is None:
            continue
        if name in _ALLOWED_VALUES:
            if not _ALLOWED_VALUES[name](value, fields):
                raise bad_request(f"{name} is not supported with this value by this server", name, "unsupported_field")
            continue
        form = name.removeprefix("guided_")
        if form != name and form in StructuredOutputsParams.__dataclass_fields__ and "structured_outputs" in known:
            way = f'"structured_outputs": {{"{form}": ...}}'
            also = " or with response_format" if form.startswith("json") else ""
            raise bad_request(f"{name} is an old name; ask with {way}{also}", name, "unsupported_field")
        near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.85)
        if near:
            raise bad_request(f"unknown field {name!r}; did you mean {near[0]!r}?", name, "unknown_field")
        if _CONSTRAINT.match(name):
            raise bad_request(f"{name} is not supported by this server", name, "unsupported_field")
