"""Grammars of answers in the harmony format of gpt-oss models: any thoughts first, then a call, an answer, or JSON.

Called by formats.py. The messages are those that tools/gpt_oss.py reads; a call ends the answer, as the models do it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from serving.tools.lark import SpecialToken, json_rule, terms

MARKS = ("<|channel|>", "<|message|>", "<|constrain|>", "<|start|>", "<|end|>")


def answer_grammar(
    functions: Sequence[Mapping[str, Any]],
    special_token: SpecialToken,
    *,
    required: bool,
    schema: Mapping[str, Any] | None,
) -> str:
    """The Lark grammar of an answer.

    Args:
        functions: name and parameters (a JSON schema) of those that may be called.
        required: the answer is a call; else it may be a text, or what `schema` says.
    """

    def text(words: str) -> str:
        return terms(words, MARKS, special_token)

    channel, message, begin = text("<|channel|>"), text("<|message|>"), text("<|start|>assistant")
    ends = [] if required else ["final"]
    lines = [r"TEXT: /(.|\n)*/", f'thought: {channel} ("analysis" | "commentary") {message} body {begin}']
    if special_token("<|end|>") is None:
        lines.append(f"body[lazy]: TEXT {text('<|end|>')}")
    else:
        lines.append(f"body: TEXT {text('<|end|>')}")
    if not required:
        lines.append(f"final: {text('<|channel|>final<|message|>')} {'TEXT' if schema is None else json_rule(schema)}")
    for index, function in enumerate(functions):
        head = f"<|channel|>commentary to=functions.{function['name']} <|constrain|>json<|message|>"
        arguments = json_rule(function.get("parameters") or {"type": "object"})
        lines.append(f"call_{index}: {text(head)} {arguments}")
        ends.append(f"call_{index}")
    return "\n".join([*lines, f"start: thought* ({' | '.join(ends)})", ""])
