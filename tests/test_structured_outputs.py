"""Structured outputs, bad words and allowed tokens on the tiny model: every output matches, whatever the schedule."""

import dataclasses
import json
import random
import re

import pytest

from jax_engine.errors import InvalidRequest
from jax_engine.grammar import GrammarCompiler
from jax_engine.model_runner import count_compilations
from jax_engine.request import FinishReason
from jax_engine.sampling_params import RequestOutputKind, SamplingParams
from jax_engine.structured_outputs import MAX_SCHEMA_DEPTH, StructuredOutputsParams
from jax_engine.testing.byte_tokenizer import ByteTokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["ann", "bob", "zoë"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
ARITHMETIC = 'start: sum\nsum: term ("+" term){0,3}\nterm: /[0-9]{1,2}/ | "(" sum ")"\n'
COMPACT = {"disable_any_whitespace": True}
#: name -> (what is asked for, whether a text matches)
FORMS = {
    "json": ({"json": SCHEMA} | COMPACT, lambda text: _valid(json.loads(text))),
    "regex": ({"regex": "(ab|cd){2,5}x?"}, lambda text: re.fullmatch("(ab|cd){2,5}x?", text)),
    "choice": (
        {"choice": ["yes", "no", 'a "quoted" ü\n', "yes sir"]},
        lambda text: text in FORMS["choice"][0]["choice"],
    ),
    "grammar": ({"grammar": ARITHMETIC}, lambda text: re.fullmatch(r"[0-9+()]+", text) and eval_is_int(text)),
}


def _valid(value) -> bool:
    assert set(value) <= set(SCHEMA["properties"]) and {"name", "age"} <= set(value)
    tags = value.get("tags", [])
    return value["name"] in ("ann", "bob", "zoë") and 0 <= value["age"] <= 99 and len(tags) <= 2


def eval_is_int(text: str) -> bool:
    """Whether the brackets match and operands and operators take turns."""
    flat = text
    while "(" in flat:
        shorter = re.sub(r"\([0-9]{1,2}(\+[0-9]{1,2}){0,3}\)", "1", flat)
        assert shorter != flat, text
        flat = shorter
    return bool(re.fullmatch(r"[0-9]{1,2}(\+[0-9]{1,2}){0,3}", flat))


def params(form: str | None, **changes) -> SamplingParams:
    structured = None if form is None else StructuredOutputsParams(**FORMS[form][0])
    return SamplingParams(
        **{
            "max_tokens": 90,
            "structured_outputs": structured,
            "output_kind": RequestOutputKind.FINAL_ONLY,
        }
        | changes
    )


def mixed_requests(seed: int, count: int) -> list[tuple[list[int], SamplingParams]]:
    chance = random.Random(seed)
    requests = []
    for number in range(count):
        form = chance.choice([*FORMS, None, None])
        changes: dict = {"temperature": chance.choice([0.0, 0.7, 1.5]), "seed": number}
        if chance.random() < 0.4:
            changes |= {"logprobs": 3, "frequency_penalty": 0.5, "top_p": 0.9}
        if chance.random() < 0.2:
            changes["n"] = 2
        if form is None:
            changes["max_tokens"] = chance.randint(1, 30)
        prompt = [chance.randrange(256) for _ in range(chance.choice([1, 3, 8, 20, 30]))]
        requests.append((prompt, params(form, **changes)))
    return requests


def serve(engine, requests, chance: random.Random | None = None) -> list:
    outputs = {}
    waiting = list(enumerate(requests))
    while waiting or engine.has_work:
        while waiting and (chance is None or chance.random() < 0.3):
            number, (prompt, request) = waiting.pop(0)
            engine.submit(engine.make_request(str(number), prompt, request))
        for output in engine.step():
            outputs[output.request_id] = output
    engine.scheduler.check()
    assert engine.scheduler.pool.num_free == engine.limits.num_pages
    assert not engine._grammars._states, "states of ended sequences are kept"
    return [outputs[str(number)] for number in range(len(requests))]


def content(output) -> tuple:
    return output.outputs, output.prompt_logprobs, output.error


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_every_output_matches(one_bucket, form, temperature):
    requests = [([65 + n, 66], params(form, temperature=temperature, seed=n)) for n in range(10)]
    ended = 0
    for output in serve(one_bucket.engine(), requests):
        (completion,) = output.outputs
        assert output.error is None
        if completion.finish_reason is FinishReason.STOP:
            ended += 1
            assert FORMS[form][1](completion.text), completion.text
        else:
            assert form == "grammar", completion.text
    assert ended >= (1 if form == "grammar" else 10)


@pytest.mark.parametrize("depth", [2, 4])
def test_async_gives_what_sync_gives_bit_for_bit(one_bucket, depth):
    requests = mixed_requests(1, 40)
    want = serve(one_bucket.engine("sync"), requests)
    got = serve(one_bucket.engine("async", depth), requests, random.Random(2))
    assert list(map(content, got)) == list(map(content, want))
    assert sum(params.structured_outputs is not None for _, params in requests) > 15


def test_unstructured_neighbours_are_unchanged(one_bucket):
    requests = mixed_requests(3, 40)
    plain = [(prompt, request) for prompt, request in requests if request.structured_outputs is None]
    want = iter(serve(one_bucket.engine(), plain))
    for (_, request), output in zip(requests, serve(one_bucket.engine(), requests), strict=True):
        if request.structured_outputs is None:
            assert content(output) == content(next(want))


def test_preemption_keeps_the_grammars_state(one_bucket):
    long = StructuredOutputsParams(regex="((ab|cd)[0-9]){20,25}x?")
    requests = [
        (prompt[:10], dataclasses.replace(request, structured_outputs=request.structured_outputs and long))
        for prompt, request in mixed_requests(4, 24)
    ]
    want = serve(one_bucket.engine("sync"), requests)
    engine = one_bucket.engine("async", num_pages=18)
    got = serve(engine, requests)
    assert engine.metrics.preemptions > 3
    assert list(map(content, got)) == list(map(content, want))


def test_nothing_compiles_once_ready(many_buckets):
    engine = many_buckets.engine("async", 3)
    compiled = []
    count_compilations(lambda: compiled.append(1))
    serve(engine, mixed_requests(5, 60), random.Random(6))
    assert not compiled


def test_aborts_spare_the_others(one_bucket):
    requests = mixed_requests(7, 20)
    want = serve(one_bucket.engine("sync"), requests)
    engine, chance, outputs = one_bucket.engine("async", 3), random.Random(8), {}
    for number, (prompt, request) in enumerate(requests):
        engine.submit(engine.make_request(str(number), prompt, request))
    aborted = set()
    while engine.has_work:
        victim = str(chance.randrange(len(requests)))
        if victim not in outputs and chance.random() < 0.2 and engine.abort(victim) is not None:
            aborted.add(victim)
        outputs |= {output.request_id: output for output in engine.step()}
    assert aborted and not engine._grammars._states
    for number, output in enumerate(want):
        if str(number) not in aborted:
            assert content(outputs[str(number)]) == content(output)


def test_what_excludes_every_token_ends_with_an_error(one_bucket):
    digits = StructuredOutputsParams(regex="[0-9]{3}")
    letters = params(None, structured_outputs=digits, allowed_token_ids=[65, 66])
    others = params(None, temperature=0, max_tokens=5)
    outputs = serve(one_bucket.engine(), [([1, 2], letters), ([3], others)])
    assert outputs[0].outputs[0].finish_reason is FinishReason.ERROR and outputs[0].outputs[0].token_ids == []
    assert outputs[0].error_param == "structured_outputs" and "no token" in outputs[0].error
    assert content(outputs[1]) == content(serve(one_bucket.engine(), [([3], others)])[0])


def test_allowed_tokens_and_grammars_together(one_bucket):
    digits = StructuredOutputsParams(regex="[0-9]{3}")
    (output,) = serve(
        one_bucket.engine(), [([1, 2], params(None, structured_outputs=digits, allowed_token_ids=[*b"7a"]))]
    )
    assert output.outputs[0].text == "777" and output.outputs[0].finish_reason is FinishReason.STOP


def test_the_end_of_the_grammar_ends_the_output_even_with_ignore_eos(one_bucket):
    (output,) = serve(one_bucket.engine(), [([1], params("choice", ignore_eos=True))])
    assert output.outputs[0].text in FORMS["choice"][0]["choice"]


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_allowed_token_ids(one_bucket, depth):
    allowed = [70, 80, 90, 257]
    requests = [([n], params(None, temperature=1, seed=n, allowed_token_ids=allowed)) for n in range(8)]
    for output in serve(one_bucket.engine("async", depth), requests):
        assert set(output.outputs[0].token_ids) <= set(allowed)


def contains(tokens: list[int], part: list[int]) -> bool:
    return any(tokens[i : i + len(part)] == part for i in range(len(tokens)))


def test_bad_words_are_never_completed_and_change_nothing_else(one_bucket):
    plain = params(None, temperature=0, max_tokens=40, ignore_eos=True)
    prompts = [[n, n + 1] for n in range(12)]
    free = serve(one_bucket.engine(), [(prompt, plain) for prompt in prompts])
    for prompt, output in zip(prompts, free, strict=True):
        tokens = output.outputs[0].token_ids
        at = next((i for i in range(4, 38) if all(33 <= t < 127 for t in tokens[i : i + 3])), None)
        if at is None:
            continue
        word = bytes(tokens[at : at + 3]).decode()
        request = dataclasses.replace(plain, bad_words=[word, "never seen here"])
        want = serve(one_bucket.engine("sync"), [(prompt, request)])
        got = serve(one_bucket.engine("async", 3), [(prompt, request), ([9], plain)])
        assert content(got[0]) == content(want[0])
        banned = got[0].outputs[0].token_ids
        assert not contains(banned, list(word.encode()))
        first = next(i for i in range(38) if contains(tokens[: i + 3], list(word.encode())))
        assert banned[: first + 2] == tokens[: first + 2] and banned[first + 2] != tokens[first + 2]
        return
    raise AssertionError("no printable word in any output")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"json": {}, "regex": "a"},
        {"regex": ""},
        {"choice": []},
        {"choice": "yes"},
        {"choice": ["a"] * 2000},
        {"choice": [""]},
        {"grammar": "x" * 300_000},
        {"json": "{"},
        {"json": "[1]"},
        {"json": {"const": float("nan")}},
        {"json": '{"a":' * 100_000 + "1" + "}" * 100_000},
        {"json": {"x": object()}},
    ],
)  # fmt: skip
def test_descriptions_that_are_refused(fields):
    with pytest.raises(InvalidRequest, match="structured_outputs"):
        StructuredOutputsParams(**fields)


def test_deep_schemas_are_refused():
    schema: dict = {}
    for _ in range(MAX_SCHEMA_DEPTH):
        schema = {"items": schema}
    with pytest.raises(InvalidRequest, match="deeper"):
        StructuredOutputsParams(json=schema)


@pytest.mark.parametrize(
    "fields",
    [
        {"json": False},
        {"json": {"type": "integer", "minimum": 3, "maximum": 2}},
        {"json": {"type": "wizard"}},
        {"json": {"$ref": "#/$defs/missing"}},
        {"json": {"$ref": "https://example.com/schema.json"}},
        {"regex": "[a-"},
        {"regex": "(?=a)b"},
        {"grammar": 'start: "a" nope'},
        {"grammar": "no rules"},
        {"json_object": True, "whitespace_pattern": "[a-"},
    ],
)
def test_grammars_that_cannot_be_compiled(fields):
    compiler = GrammarCompiler(ByteTokenizer(), 320, [257])
    with pytest.raises(InvalidRequest, match="structured_outputs") as refused:
        compiler.compile(StructuredOutputsParams(**fields))
    assert len(str(refused.value)) < 700 and "\n" not in str(refused.value)


def test_white_space_in_json_is_bounded():
    compiler = GrammarCompiler(ByteTokenizer(), 320, [257])
    state = compiler.compile(StructuredOutputsParams(json_object=True)).start().matcher
    assert state.try_consume_tokens(list(b"{\n" + b" " * 100)) == 42
