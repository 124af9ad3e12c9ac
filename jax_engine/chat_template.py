"""ChatTemplate: messages in, the prompt's text out, through the model's own jinja template.

tokenizer.py calls it and turns the text into tokens. Control tokens come from the template only: where a caller's
message holds the text of one, a placeholder character goes through the template in its place, and the text comes back
when the prompt is encoded, as plain text. Nothing here touches a device.
"""

import datetime
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from jax_engine.errors import InvalidRequest

#: Supplementary private use area B: characters that no text has a use for.
_PRIVATE_USE = range(0x100000, 0x10FFFE)


class ChatTemplateError(InvalidRequest):
    """There is no chat template, or it cannot be applied to these messages."""

    def __init__(self, message: str):
        super().__init__(message, "messages")


@dataclass(frozen=True)
class Rendered:
    """A prompt as the template made it. `placeholders`: character in the text -> what the caller wrote there."""

    text: str
    placeholders: Mapping[str, str]

    def restore(self, text: str) -> str:
        """The text with what the callers wrote."""
        for character, original in self.placeholders.items():
            text = text.replace(character, original)
        return text


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: jinja, in the dialect of Hugging Face chat templates.
        special_tokens: bos_token and the like -> text; names the template may use.
        control_texts: texts of control tokens, which callers' strings must not bring in.

    Raises:
        ChatTemplateError: the source is not valid jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], control_texts: Iterable[str]):
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the model's chat template is not valid: {error}") from error
        self._special_tokens = dict(special_tokens)
        longest_first = sorted(filter(None, set(control_texts)), key=len, reverse=True)
        self._controls = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        template_kwargs: Mapping[str, Any],
    ) -> Rendered:
        """Applies the template. Arguments are those of Tokenizer.chat_prompt.

        Raises:
            ChatTemplateError: the messages are of no use, or the template refuses them.
        """
        if continue_final_message and add_generation_prompt:
            raise ChatTemplateError("continue_final_message needs add_generation_prompt=False: no new turn begins")
        plain = normalize_messages(messages)
        try:
            characters = _Placeholders([plain, tools, template_kwargs])
            if self._controls is not None:
                plain, tools, template_kwargs = characters.cover(self._controls, [plain, tools, template_kwargs])
            end = characters.new("") if continue_final_message else ""
            plain[-1]["content"] += end
            names = {"messages": plain, "tools": tools, "add_generation_prompt": add_generation_prompt}
            text = self._template.render({**self._special_tokens, **template_kwargs, **names})
        except ChatTemplateError:
            raise
        except Exception as error:  # a template can raise whatever the operations in it raise
            raise ChatTemplateError(f"the model's chat template refuses these messages: {error}") from error
        if end:
            if end not in text:
                raise ChatTemplateError("continue_final_message: the chat template leaves the final message out")
            text = text[: text.rindex(end)]
        return Rendered(text, characters.originals)


class _Placeholders:
    """Hands out characters that occur nowhere in the given values, and remembers what each stands for."""

    def __init__(self, values: Any):
        used: set[str] = set()
        _map_strings(values, lambda text: used.update(text) or text)
        self._free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
        self._characters: dict[str, str] = {}
        self.originals: dict[str, str] = {}

    def new(self, original: str) -> str:
        character = next(self._free, None)
        if character is None:
            raise ChatTemplateError("messages use up the private use characters of Unicode")
        self.originals[character] = original
        return character

    def cover(self, pattern: re.Pattern[str], values: Any) -> Any:
        def stand_in(match: re.Match[str]) -> str:
            if match[0] not in self._characters:
                self._characters[match[0]] = self.new(match[0])
            return self._characters[match[0]]

        return _map_strings(values, lambda text: pattern.sub(stand_in, text))


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of nested lists and mappings with every string changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(key, change): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value


def normalize_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates expect them: content a string, tool-call arguments an object.

    Text parts are joined with newlines, as vLLM does.

    Raises:
        ChatTemplateError: no messages, or one without a role or with content that is no text.
    """
    if not messages:
        raise ChatTemplateError("messages must hold at least one message")
    normalized = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ChatTemplateError(f"messages[{index}] must be an object with a role")
        entry = dict(message) | {"content": _content(message.get("content"), index)}
        calls = message.get("tool_calls") or ()
        if not isinstance(calls, list | tuple):
            raise ChatTemplateError(f"messages[{index}].tool_calls must be a list")
        if calls:
            entry["tool_calls"] = [_tool_call(call, index) for call in calls]
        normalized.append(entry)
    return normalized


def _content(content: Any, index: int) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple) or not all(map(_is_text_part, content)):
        raise ChatTemplateError(
            f'messages[{index}].content must be a string or a list of {{"type": "text", "text": ...}} parts'
        )
    return "\n".join(part["text"] for part in content)


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _tool_call(call: Any, index: int) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise ChatTemplateError(f"messages[{index}].tool_calls must be objects with a function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments else {}
        except (ValueError, RecursionError) as error:
            raise ChatTemplateError(f"messages[{index}].tool_calls: arguments must be JSON: {error}") from error
    return dict(call) | {"function": dict(function) | {"arguments": arguments}}


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`, a mark for training: renders its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes, unlike jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
