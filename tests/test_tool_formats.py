"""Parsers of tool calls and reasoning: the same message however the text is cut, linear work, grammars that agree."""

import json
import random

import pytest

from jax_engine.grammar import GrammarCompiler
from jax_engine.structured_outputs import StructuredOutputsParams
from jax_engine.testing.byte_tokenizer import ByteTokenizer
from serving.chat_output import ChatOutput
from serving.tools import formats, gpt_oss, hermes, llama3, mistral, thinking
from serving.tools.formats import OutputFormat, answer_grammar, detect, json_grammar

ARGS = '{"city": "Köln \\"}{\\\\", "days": [1, {"a": null}]}'
CALL = f'{{"name": "weather", "arguments": {ARGS}}}'
HERMES = f"<tool_call>\n{CALL}\n</tool_call>"
LLAMA = f'{{"name": "weather", "parameters": {ARGS}}}'
OSS_CALL = f"<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{ARGS}"
OSS_THOUGHT = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
ONE, TWO = [("weather", ARGS)], [("weather", ARGS), ("weather", ARGS)]

#: (format, reasoning, text, content, reasoning content, calls)
CASES = [
    ("hermes", None, "Hello <b> world \n", "Hello <b> world \n", "", []),
    ("hermes", None, HERMES, "", "", ONE),
    ("hermes", None, f"Let me look.\n\n{HERMES}\n{HERMES}", "Let me look.", "", TWO),
    ("hermes", None, f"{HERMES}\nDone.", "Done.", "", ONE),
    ("hermes", None, '<tool_call>{"name": "f"}</tool_call>', "", "", [("f", "{}")]),
    ("hermes", None, '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", "", [("f", '{"a": 1}')]),
    ("hermes", None, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", "", [("f", '{"a": 1}')]),
    ("hermes", None, '<tool_call>{"id": 7, "name": "f", "arguments": {}, "x": [1]}', "", "", [("f", "{}")]),
    ("hermes", None, "<tool_call>nonsense</tool_call> and more", "<tool_call>nonsense</tool_call> and more", "", []),
    ("hermes", None, '<tool_call>{"city": 1}</tool_call>', '<tool_call>{"city": 1}</tool_call>', "", []),
    ("hermes", None, '<tool_call>{"name": "f"', '<tool_call>{"name": "f"', "", []),
    ("hermes", None, '<tool_call>{"name": "f", "arguments": {"a": [1,', "", "", [("f", '{"a": [1,')]),
    ("hermes", None, "a <tool_ca", "a <tool_ca", "", []),
    ("hermes", "think", f"<think>\nHm <b>.\n</think>\n\n{HERMES}", "", "Hm <b>.", ONE),
    ("hermes", "think", "<think>\n\n</think>\n\nYes.\n", "Yes.\n", "", []),
    ("hermes", "think", "No thought.", "No thought.", "", []),
    ("hermes", "think", "<think>cut of", "", "cut of", []),
    (None, "think", "<think>a</think>b", "b", "a", []),
    (None, "mistral", "[THINK]a[/THINK]b", "b", "a", []),
    ("llama3", None, LLAMA, "", "", ONE),
    ("llama3", None, f"{LLAMA}; {LLAMA}", "", "", TWO),
    ("llama3", None, f"<|python_tag|>{LLAMA}", "", "", ONE),
    ("llama3", None, '{"type": "function", "name": "f", "parameters": {}}', "", "", [("f", "{}")]),
    ("llama3", None, '{"answer": 42}', '{"answer": 42}', "", []),
    ("llama3", None, "The answer {is} 42.", "The answer {is} 42.", "", []),
    ("llama3", None, " {}", " {}", "", []),
    ("mistral", None, f"[TOOL_CALLS][{CALL}, {CALL}]", "", "", TWO),
    ("mistral", None, f"[TOOL_CALLS] [{CALL}]", "", "", ONE),
    ("mistral", None, f"[TOOL_CALLS]{CALL}", "", "", ONE),
    ("mistral", None, f"Well.[TOOL_CALLS]weather[ARGS]{ARGS}[TOOL_CALLS]weather{ARGS}", "Well.", "", TWO),
    ("mistral", None, f"[TOOL_CALLS]weather[CALL_ID]abc123def[ARGS]{ARGS}", "", "", ONE),
    ("mistral", None, "plain [TOOL] text", "plain [TOOL] text", "", []),
    ("gpt_oss", None, f"{OSS_THOUGHT}<|channel|>final<|message|>Yes.", "Yes.", "Hm.", []),
    ("gpt_oss", None, f"{OSS_THOUGHT}{OSS_CALL}", "", "Hm.", ONE),
    ("gpt_oss", None, f" to=functions.weather<|channel|>commentary json<|message|>{ARGS}<|call|>", "", "", ONE),
    ("gpt_oss", None, f"{OSS_CALL}<|call|><|start|>assistant{OSS_CALL}<|call|>", "", "", TWO),
    ("gpt_oss", None, "<|channel|>final<|message|>", "", "", []),
    ("gpt_oss", None, "No channels at all.", "No channels at all.", "", []),
]  # fmt: skip


def run(tools, reasoning, parts, prompt="") -> ChatOutput:
    output = ChatOutput(OutputFormat(tools, reasoning).parser(with_tools=True, prompt=prompt))
    deltas = []
    for part in parts:
        deltas += [output.delta(piece) for piece in output.push(part, False)]
    deltas += [output.delta(piece) for piece in output.push("", True)]
    assert "".join(delta.get("content", "") for delta in deltas) == output.content
    streamed: dict[int, str] = {}
    for delta in deltas:
        for call in delta.get("tool_calls", ()):
            streamed[call["index"]] = streamed.get(call["index"], "") + call["function"]["arguments"]
    assert list(streamed.values()) == [call.arguments for call in output.calls]
    return output


@pytest.mark.parametrize(("tools", "reasoning", "text", "content", "thought", "calls"), CASES)
def test_every_cut_gives_the_same_message(tools, reasoning, text, content, thought, calls):
    chance = random.Random(text)
    cuts = [[text], list(text)]
    for _ in range(20):
        at = sorted(chance.sample(range(len(text) + 1), min(4, len(text))))
        cuts.append([text[i:j] for i, j in zip([0, *at], [*at, len(text)], strict=True)])
    for parts in cuts:
        output = run(tools, reasoning, parts)
        assert output.content == content
        assert output.reasoning == thought
        assert [(call.name, call.arguments) for call in output.calls] == calls


def test_reasoning_that_the_prompt_has_opened():
    output = run("hermes", "think", ["so ", "it is</th", "ink>\n\nYes"], prompt="<|im_start|>assistant\n<think>\n")
    assert (output.reasoning, output.content) == ("so it is", "Yes")


def test_arguments_are_streamed_as_they_come():
    output = ChatOutput(OutputFormat("hermes").parser(with_tools=True, prompt=""))
    seen = [output.push(part, False) for part in ('<tool_call>{"name": "f", "argu', 'ments": {"a": "bc', "de", '"}}')]
    assert [[(piece.kind, piece.text) for piece in pieces] for pieces in seen] == [
        [],
        [("call", "f"), ("arguments", '{"a": "bc')],
        [("arguments", "de")],
        [("arguments", '"}')],
    ]


def test_only_the_first_of_several_calls_and_no_reasoning_where_the_client_says_so():
    output = ChatOutput(
        OutputFormat("hermes", "think").parser(with_tools=True, prompt=""), several_calls=False, reasoning=False
    )
    output.push(f"<think>x</think>{HERMES}{HERMES}", True)
    message = output.message()
    assert len(message["tool_calls"]) == 1 and message["content"] is None and "reasoning_content" not in message


@pytest.mark.parametrize("tools", formats.TOOL_FORMATS)
@pytest.mark.parametrize("unit", ["<tool_cal", "a b\n", "{", '{"name": "', "[TOOL_CALL", "<|channel|", "\\", "[", "; "])
def test_work_is_linear_in_the_text(tools, unit, monkeypatch):
    work = 0
    for module in (gpt_oss, hermes, llama3, mistral, thinking):
        split = module.split_at

        def counted(text, markers, split=split):
            nonlocal work
            work += len(text)
            return split(text, markers)

        monkeypatch.setattr(module, "split_at", counted)
    text = unit * 2000
    for prefix in ("", HERMES[:40], "[TOOL_CALLS]", "<|channel|>final<|message|>"):
        work = 0
        parser = OutputFormat(tools).parser(with_tools=True, prompt="")
        for character in prefix + text:
            parser.push(character)
        parser.finish()
        assert work < 400 * len(text), "a held text is looked at again and again"


def test_detection():
    assert detect("... <tool_call> ... </think>") == OutputFormat("hermes", "think")
    assert detect("[TOOL_CALLS]") == OutputFormat("mistral", None)
    assert detect("<|start|><|channel|>").tools == "gpt_oss"
    assert detect("<|python_tag|>").tools == "llama3"
    assert detect(None) == OutputFormat()
    assert detect("<tool_call>", tools="none") == OutputFormat()
    assert detect("", tools="llama3", reasoning="think") == OutputFormat("llama3", "think")


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
FUNCTIONS = [{"name": "count", "parameters": SCHEMA}, {"name": "stop", "parameters": None}]


def matches(grammar: str, text: str) -> bool:
    state = (
        GrammarCompiler(ByteTokenizer(), 258, [257]).compile(StructuredOutputsParams(grammar=grammar)).start().matcher
    )
    data = list(text.encode())
    return state.try_consume_tokens(data) == len(data) and state.is_accepting()


def call_text(tools: str, name: str, arguments: str) -> str:
    form = formats.TOOL_FORMATS[tools]
    if tools == "gpt_oss":
        return f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}"
    body = f'{{"name": "{name}", "{form.arguments_key}": {arguments}}}'
    return form.begin + body + form.end


@pytest.mark.parametrize("tools", ["hermes", "llama3", "mistral"])
def test_grammars_admit_calls_that_fit_and_the_parser_reads_them(tools):
    options = {"special_token": lambda text: None, "several": True}
    required = answer_grammar(OutputFormat(tools), FUNCTIONS, required=True, **options)
    free = answer_grammar(OutputFormat(tools), FUNCTIONS, required=False, **options)
    good, other = call_text(tools, "count", '{"n": 3}'), call_text(tools, "stop", "{}")
    for text in (good, other, good + formats.TOOL_FORMATS[tools].separator + other):
        assert matches(required, text) and matches(free, text), text
        assert run(tools, None, [text]).calls[0].name in ("count", "stop")
    for text in (call_text(tools, "count", '{"n": "x"}'), call_text(tools, "other", "{}")):
        assert not matches(required, text) and not matches(free, text)
    assert not matches(required, "Hello") and matches(free, "Hello")


def test_grammar_of_one_call_or_json_and_after_reasoning():
    options = {"special_token": lambda text: None, "required": False, "several": False, "schema": SCHEMA}
    grammar = answer_grammar(OutputFormat("hermes", "think"), FUNCTIONS, **options)
    good = call_text("hermes", "count", '{"n": 3}')
    for text in (good, '{"n": 4}', f"<think>hm</think>\n\n{good}", '<think>x</think>{"n":1}'):
        assert matches(grammar, text), text
    for text in (good + "\n" + good, "Hello", '{"n": 4}x'):
        assert not matches(grammar, text), text
    opened = answer_grammar(OutputFormat("hermes", "think"), FUNCTIONS, thinks=True, **options)
    assert matches(opened, f"hm</think>\n\n{good}") and not matches(opened, good)


def test_grammar_of_json_after_reasoning():
    grammar = json_grammar(OutputFormat(None, "think"), SCHEMA, lambda text: None, thinks=False)
    assert matches(grammar, '<think>{"n"</think>\n{"n": 1}') and matches(grammar, '{"n": 1}')
    assert not matches(grammar, "<think>x</think>")
    assert json_grammar(OutputFormat(None), SCHEMA, lambda text: None, thinks=False) is None
    harmony = json_grammar(OutputFormat("gpt_oss"), SCHEMA, lambda text: None, thinks=False)
    assert matches(harmony, '<|channel|>final<|message|>{"n": 1}')
    assert matches(harmony, OSS_THOUGHT + '<|channel|>final<|message|>{"n": 1}')


def test_harmony_answers_think_call_or_answer():
    options = {"special_token": lambda text: None, "several": True}
    free = answer_grammar(OutputFormat("gpt_oss"), FUNCTIONS, required=False, **options)
    required = answer_grammar(OutputFormat("gpt_oss"), FUNCTIONS, required=True, **options)
    preamble = "<|channel|>commentary<|message|>I shall count.<|end|><|start|>assistant"
    good = call_text("gpt_oss", "count", '{"n": 3}')
    for text in (good, OSS_THOUGHT + good, OSS_THOUGHT + preamble + OSS_THOUGHT + call_text("gpt_oss", "stop", "{}")):
        assert matches(free, text) and matches(required, text), text
        assert run("gpt_oss", None, [text]).calls[0].name in ("count", "stop")
    final = OSS_THOUGHT + "<|channel|>final<|message|>Three {."
    assert matches(free, final) and not matches(required, final)
    for bad in (call_text("gpt_oss", "count", '{"n": "x"}'), call_text("gpt_oss", "other", "{}"), "Hello"):
        assert not matches(free, OSS_THOUGHT + bad) and not matches(required, OSS_THOUGHT + bad), bad


def test_special_tokens_keep_text_and_calls_apart():
    def tokens(text, marks):
        for mark in marks:
            text = text.replace(mark, "\x00")
        return [256 if character == "\x00" else ord(character) for character in text]

    for tools, good, bad in (
        ("mistral", '[TOOL_CALLS]count[ARGS]{"n": 3}', '[TOOL_CALLS]count[ARGS]{"n": "x"}'),
        ("gpt_oss", call_text("gpt_oss", "count", '{"n": 3}'), call_text("gpt_oss", "count", '{"n": "x"}')),
    ):
        marks = formats.TOOL_FORMATS[tools].special
        ids = dict.fromkeys(marks, 256)
        grammar = answer_grammar(OutputFormat(tools), FUNCTIONS, ids.get, required=False, several=True)
        before = "Well." if tools == "mistral" else OSS_THOUGHT
        answer = "Hello" if tools == "mistral" else "<|channel|>final<|message|>Hello"
        compiled = GrammarCompiler(ByteTokenizer(), 258, [257]).compile(StructuredOutputsParams(grammar=grammar))
        for text, wanted in ((good, True), (before + good, True), (answer, True), (bad, False), (before + bad, False)):
            state, ids_of_text = compiled.start().matcher, tokens(text, marks)
            whole = state.try_consume_tokens(ids_of_text) == len(ids_of_text) and state.is_accepting()
            assert whole is wanted, (tools, text)


def test_special_tokens_in_grammars():
    ids = dict.fromkeys(formats.TOOL_FORMATS["mistral"].special, 256)
    grammar = answer_grammar(OutputFormat("mistral"), FUNCTIONS, ids.get, required=True, several=True)
    assert '<[256]> "count" <[256]> %json' in grammar and json.dumps("[TOOL_CALLS]") not in grammar
