"""The formats of tool calls and of reasoning: which one a model writes, its parser, and its grammar.

Called by the routes of chats. A new format is a parser in a file of its own and a line in the tables here.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serving.tools import harmony
from serving.tools.gpt_oss import GptOssParser
from serving.tools.hermes import HermesParser
from serving.tools.lark import SpecialToken, json_rule, terms
from serving.tools.llama3 import Llama3Parser
from serving.tools.mistral import MistralParser
from serving.tools.pieces import OutputParser
from serving.tools.thinking import PlainParser, ThinkingParser


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes tool calls.

    Attributes:
        begin, end: what stands around each call; a special token where `special` names it.
        arguments_key: how the call's object names its arguments.
        traits: texts, one of which a chat template of such models holds.
        bare: the call is the name, `infix` and the arguments, rather than an object.
    """

    parser: Callable[[], OutputParser]
    begin: str
    end: str
    traits: tuple[str, ...]
    arguments_key: str = "arguments"
    bare: bool = False
    infix: str = ""
    separator: str = ""
    special: tuple[str, ...] = ()


TOOL_FORMATS = {
    "gpt_oss": ToolFormat(
        GptOssParser,
        "<|channel|>commentary to=functions.",
        "",
        ("<|channel|>",),
        bare=True,
        infix=" <|constrain|>json<|message|>",
        special=harmony.MARKS,
    ),
    "hermes": ToolFormat(HermesParser, "<tool_call>\n", "\n</tool_call>", ("<tool_call>",), separator="\n"),
    "mistral": ToolFormat(
        MistralParser,
        "[TOOL_CALLS]",
        "",
        ("[TOOL_CALLS]",),
        bare=True,
        infix="[ARGS]",
        special=("[TOOL_CALLS]", "[ARGS]"),
    ),
    "llama3": ToolFormat(
        Llama3Parser, "", "", ("<|python_tag|>", "Environment: ipython"), arguments_key="parameters", separator="; "
    ),
}

#: name -> (mark before, mark after)
REASONING_MARKS = {"think": ("<think>", "</think>"), "mistral": ("[THINK]", "[/THINK]")}


@dataclass(frozen=True)
class OutputFormat:
    """What a model's answers look like, as chosen by the operator or read off its chat template.

    Attributes:
        tools: a key of TOOL_FORMATS, or None: tool calls are not offered.
        reasoning: a key of REASONING_MARKS, or None.
    """

    tools: str | None = None
    reasoning: str | None = None

    @property
    def tool_format(self) -> ToolFormat | None:
        """How tool calls are written."""
        return None if self.tools is None else TOOL_FORMATS[self.tools]

    def reads_special_tokens(self, *, with_tools: bool) -> bool:
        """Whether the parser has to see the text of special tokens."""
        if self.tools == "gpt_oss" or self.reasoning == "mistral":
            return True
        return with_tools and self.tools in ("llama3", "mistral")

    def parser(self, *, with_tools: bool, prompt: str) -> OutputParser | None:
        """A parser for one answer to this prompt; None where all text is content."""
        if self.tools == "gpt_oss":
            return GptOssParser()
        tool_format = self.tool_format if with_tools else None
        answer = PlainParser() if tool_format is None else tool_format.parser()
        if self.reasoning is None:
            return None if tool_format is None else answer
        begin, end = REASONING_MARKS[self.reasoning]
        return ThinkingParser(begin, end, answer, inside=prompt.rstrip().endswith(begin))


def detect(template: str | None, *, tools: str = "auto", reasoning: str = "auto") -> OutputFormat:
    """The format that fits a chat template.

    Args:
        tools, reasoning: the operator's choice: a name, `none`, or `auto`: by the template.
    """
    template = template or ""
    if tools == "auto":
        fitting = (name for name, form in TOOL_FORMATS.items() if any(trait in template for trait in form.traits))
        tools = next(fitting, "none")
    if reasoning == "auto":
        reasoning = next((name for name, marks in REASONING_MARKS.items() if marks[1] in template), "none")
    return OutputFormat(None if tools == "none" else tools, None if reasoning == "none" else reasoning)


def answer_grammar(
    output: OutputFormat,
    functions: Sequence[Mapping[str, Any]],
    special_token: SpecialToken,
    *,
    required: bool,
    several: bool,
    schema: Mapping[str, Any] | None = None,
    thinks: bool = False,
) -> str:
    """The Lark grammar of an answer with tool calls that fit their schemas.

    Args:
        functions: name and parameters (a JSON schema) of those that may be called.
        special_token: see SpecialToken.
        required: nothing but calls; else any text, or what `schema` says, may be the answer too.
        several: more than one call is allowed.
        schema: of an answer without calls.
        thinks: the prompt has opened the reasoning, so that its end comes first.
    """
    if output.tools == "gpt_oss":
        return harmony.answer_grammar(functions, special_token, required=required, schema=schema)
    form = output.tool_format
    assert form is not None
    lines = [_call_rule(form, index, function, special_token) for index, function in enumerate(functions)]
    calls = " | ".join(f"call_{index}" for index in range(len(functions)))
    more = f" ({terms(form.separator, form.special, special_token)} call)*" if several and form.separator else ""
    more = " call*" if several and not form.separator else more
    lines.append(f"call: {calls}")
    lines.append(f"calls: call{more}")
    answers = ["calls"]
    if not required and schema is not None:
        lines.append(f"answer: {json_rule(schema)}")
        answers.append("answer")
    elif not required:
        answers += _free_text(form, lines, special_token)
    prefix = _reasoning_rule(output, thinks, lines)
    lines.append(f"start: {prefix}({' | '.join(answers)})")
    return "\n".join(lines) + "\n"


def json_grammar(
    output: OutputFormat, schema: Mapping[str, Any], special_token: SpecialToken, *, thinks: bool
) -> str | None:
    """The Lark grammar of an answer in JSON after the model's reasoning; None where the model does not reason.

    Arguments as for answer_grammar.
    """
    if output.tools == "gpt_oss":
        return harmony.answer_grammar((), special_token, required=False, schema=schema)
    if output.reasoning is None:
        return None
    lines: list[str] = []
    prefix = _reasoning_rule(output, thinks, lines)
    return "\n".join([f"start: {prefix}{json_rule(schema)}", *lines, ""])


def _call_rule(form: ToolFormat, index: int, function: Mapping[str, Any], special_token: SpecialToken) -> str:
    name, schema = function["name"], function.get("parameters") or {"type": "object"}
    begin, end = terms(form.begin, form.special, special_token), terms(form.end, form.special, special_token)
    if form.bare and all(special_token(mark) is not None for mark in form.special):
        head = terms(name, form.special, special_token) + " " + terms(form.infix, form.special, special_token)
        return f"call_{index}: {begin} {head} {json_rule(schema)} {end}"
    wrapped = {
        "type": "object",
        "properties": {"name": {"const": name}, form.arguments_key: schema},
        "required": ["name", form.arguments_key],
        "additionalProperties": False,
    }
    return f"call_{index}: {begin} {json_rule(wrapped)} {end}"


def _free_text(form: ToolFormat, lines: list[str], special_token: SpecialToken) -> list[str]:
    """Rules for an answer of text before calls, or without any; what begins like a call has to be one."""
    if not form.begin:  # Llama 3: an answer is calls from its first character, or none
        lines.append(r"TEXT: /[^{](.|\n)*/")
        return ["TEXT"]
    lines.append(r"TEXT: /(.|\n)*/")
    if any(mark in form.begin and special_token(mark) is not None for mark in form.special):
        return ["TEXT calls", "TEXT"]  # no text holds a special token
    lines.append(f"head[lazy]: TEXT {json.dumps(form.begin)}")
    rests = [
        line.replace(f": {json.dumps(form.begin)} ", ": ", 1).replace("call_", "rest_", 1)
        for line in lines
        if line.startswith("call_")
    ]
    lines += rests
    names = " | ".join(line.partition(":")[0] for line in rests)
    more = f"({json.dumps(form.separator)} call)*" if form.separator else "call*"
    lines.append(f"tail: head ({names}) {more}")
    return ["tail", "TEXT"]


def _reasoning_rule(output: OutputFormat, thinks: bool, lines: list[str]) -> str:
    if output.reasoning is None:
        return ""
    begin, end = (json.dumps(mark) for mark in REASONING_MARKS[output.reasoning])
    lines.append(rf"thought[lazy]: /(.|\n)*/ {end}")
    lines.append(r"GAP: /\n{0,2}/")
    return "thought GAP " if thinks else f"({begin} thought GAP)? "
