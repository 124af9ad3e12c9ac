"""SamplingParams: each field refuses what it cannot mean, names itself, and says what it allows."""

import dataclasses

import pytest

from jax_engine import InvalidRequest, RequestOutputKind, SamplingParams, StructuredOutputsParams

#: field -> (values that are refused, what each error says beside the field's name)
REFUSED = {
    "n": ([0, 129, 1.5, "1", None, True], r"\[1, 128\]"),
    "presence_penalty": ([-2.1, 2.1, "0", None, float("nan")], r"\[-2, 2\]"),
    "frequency_penalty": ([-2.1, 2.1, "0", None, float("inf")], r"\[-2, 2\]"),
    "repetition_penalty": ([0, 2.1, "1", None, True], r"\(0, 2\]"),
    "temperature": ([-0.1, 101, "hot", None], r"\[0, 100\]"),
    "top_p": ([0, 1.1, "1", None], r"\(0, 1\]"),
    "top_k": ([-2, 2**31, 0.5, "1", None], r"\[-1, 2147483647\]"),
    "min_p": ([-0.1, 1.1, "0", None], r"\[0, 1\]"),
    "seed": ([2**63, 1.5, "1"], r"\[-9223372036854775808, 9223372036854775807\]"),
    "stop": ([5, b"a", {"a": 1}, [5], [""], ["a"] * 17], "a string or a list of strings|of 1 to 1024|at most 16"),
    "stop_token_ids": ([5, "12", {1: 2}, ["1"], [-1], [1] * 129], r"a list of token ids|\[0, 2147|at most 128"),
    "include_stop_str_in_output": ([1, "false", None], "True or False"),
    "ignore_eos": ([1, "false", None], "True or False"),
    "max_tokens": ([0, 1.5, "16", True], r"\[1, 2147483647\]"),
    "min_tokens": ([-1, 17, 1.5, "1", None], r"\[0, 2147483647\]|at most max_tokens \(16\)"),
    "logprobs": ([-1, 21, 1.5, "1", True], r"\[0, 20\]"),
    "prompt_logprobs": ([-1, 21, 1.5, "1", True], r"\[0, 20\]"),
    "detokenize": ([1, "false", None], "True or False"),
    "skip_special_tokens": ([0, "false", None], "True or False"),
    "logit_bias": (
        [5, "a", [(1, 2.0)], {"1": 1.0}, {-1: 1.0}, {1: 101}, {1: None}, dict.fromkeys(range(301), 1)],
        r"a dict of token id -> bias|must be token ids|\[-100, 100\]|at most 300",
    ),
    "bad_words": ([5, "word", {"a": 1}, [5], [" "], ["a"] * 65], "a list of words|of 1 to 64|at most 64"),
    "allowed_token_ids": ([5, "12", {1: 2}, ["1"], [-1], []], r"a list of token ids|\[0, 2147|is empty"),
    "truncate_prompt_tokens": ([0, -2, 1.5, "1", True], r"-1 or an integer in \[1, 2147483647\]"),
    "structured_outputs": ([{"json": {}}, "json", 5], "StructuredOutputsParams"),
    "output_kind": ([0, "DELTA", None], "RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA"),
}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(SamplingParams)])
def test_what_a_field_cannot_mean_is_refused_in_words(name):
    values, allowed = REFUSED[name]
    for value in values:
        with pytest.raises(InvalidRequest, match=allowed) as refused:
            SamplingParams(**{name: value})
        assert refused.value.param == name and name in str(refused.value)


@pytest.mark.parametrize("name", ["stop", "stop_token_ids", "logit_bias", "bad_words", "allowed_token_ids"])
def test_lists_are_kept_and_can_be_given_again(name):
    value = {1: 2.0} if name == "logit_bias" else ["a", "b"] if name in ("stop", "bad_words") else [1, 2]
    params = SamplingParams(**{name: value})
    assert getattr(params, name) == (value if name == "logit_bias" else tuple(value))
    assert dataclasses.replace(params, output_kind=RequestOutputKind.DELTA) != params
    assert dataclasses.replace(params) == params


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"choice": 5}, "1 to 1024 texts"),
        ({"choice": "yes"}, "1 to 1024 texts"),
        ({"choice": {"yes": 1}}, "1 to 1024 texts"),
        ({"json_object": "yes"}, "json_object must be True or False"),
        ({"json": {}, "disable_any_whitespace": "no"}, "disable_any_whitespace must be True or False"),
        ({"json": 5}, "must be a JSON schema"),
        ({"regex": 5}, "regex must be a text"),
    ],
)
def test_forms_of_the_wrong_type_are_refused_in_words(fields, message):
    with pytest.raises(InvalidRequest, match=message) as refused:
        StructuredOutputsParams(**fields)
    assert refused.value.param == "structured_outputs"
