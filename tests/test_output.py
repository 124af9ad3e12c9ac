"""Text, stop strings and deltas, as a caller sees them."""

import pytest
from hypothesis import given, strategies as st

from jax_engine.output import OutputState
from jax_engine.request import FinishReason, Logprob, Request
from jax_engine.sampling_params import RequestOutputKind, SamplingParams
from jax_engine.sequence import Sequence, Status
from jax_engine.testing.byte_tokenizer import ByteTokenizer


def make_state(n: int = 1, **params) -> OutputState:
    request = Request(request_id="r", prompt_token_ids=(1, 2), sampling_params=SamplingParams(n=n, **params))
    sequences = [Sequence(request, index, 100, frozenset(), 0) for index in range(n)]
    return OutputState(request, sequences, ByteTokenizer())


def feed(state: OutputState, text: str | bytes, index: int = 0, end: FinishReason | None = None):
    """Gives a sequence the text's bytes as tokens; yields (stop string found, output) after each."""
    sequence = state.sequences[index]
    data = text.encode() if isinstance(text, str) else text
    for number, byte in enumerate(data):
        sequence.token_ids.append(byte)
        if end is not None and number == len(data) - 1:
            sequence.status, sequence.finish_reason = Status.FINISHED, end
        stop = state.append(sequence, byte, None)
        if stop is not None:
            sequence.status, sequence.finish_reason, sequence.stop_reason = Status.FINISHED, FinishReason.STOP, stop
        yield stop, state.output()
        if stop is not None:
            return


def final(state: OutputState, text: str | bytes, end: FinishReason | None = FinishReason.LENGTH):
    *_, (_, output) = feed(state, text, end=end)
    return output.outputs[0]


def test_a_stop_string_ends_the_text_before_it():
    completion = final(make_state(stop=["</end>", "zz"]), "hello</end>more")
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("hello", "stop", "</end>")
    assert bytes(completion.token_ids) == b"hello</end>"


def test_a_stop_string_can_be_kept():
    completion = final(make_state(stop="lo", include_stop_str_in_output=True), "hello world")
    assert completion.text == "hello"


def test_the_earliest_stop_string_wins():
    assert final(make_state(stop=["world", "o w"]), "hello world").text == "hell"


def test_a_stop_string_of_a_multibyte_character():
    assert final(make_state(stop="é"), "caffé latte").text == "caff"


def test_stop_strings_wait_for_min_tokens():
    assert final(make_state(stop="a", min_tokens=3), "abcade").text == "abc"


def test_an_incomplete_character_is_flushed_at_the_end():
    assert final(make_state(), "né".encode()[:2]).text == "n\N{REPLACEMENT CHARACTER}"


@given(
    text=st.text(alphabet="ab<é", max_size=30),
    stops=st.lists(st.text(alphabet="ab<é", min_size=1, max_size=4), max_size=3),
    keep=st.booleans(),
)
def test_deltas_add_up_and_never_show_part_of_a_stop_string(text, stops, keep):
    params = {"stop": stops, "include_stop_str_in_output": keep}
    state = make_state(output_kind=RequestOutputKind.DELTA, **params)
    shown, tokens, ended = "", [], False
    for _, output in feed(state, text, end=FinishReason.LENGTH):
        for completion in output.outputs if output else ():
            shown += completion.text
            tokens += completion.token_ids
            ended = completion.finish_reason is not None
    if not text:
        return
    whole = final(make_state(**params), text)
    assert ended and shown == whole.text and tokens == whole.token_ids
    first = min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
    if first is None:
        assert shown == text
    elif not keep:
        assert all(stop not in shown for stop in stops)


def test_text_without_stops_is_streamed_at_once():
    state = make_state(output_kind=RequestOutputKind.DELTA)
    assert [output.outputs[0].text for _, output in feed(state, "abc")] == ["a", "b", "c"]


def test_only_what_may_begin_a_stop_string_is_held_back():
    state = make_state(output_kind=RequestOutputKind.DELTA, stop="</s>")
    assert [output.outputs[0].text for _, output in feed(state, "a</b")] == ["a", "", "", "</b"]


def test_final_only_gives_one_output():
    state = make_state(output_kind=RequestOutputKind.FINAL_ONLY)
    outputs = [output for _, output in feed(state, "abc", end=FinishReason.LENGTH) if output is not None]
    assert [output.outputs[0].text for output in outputs] == ["abc"]


def test_a_request_is_finished_when_all_its_completions_are():
    state = make_state(n=2)
    (*_, (_, first)) = feed(state, "ab", 0, FinishReason.LENGTH)
    (*_, (_, second)) = feed(state, "xy", 1, FinishReason.LENGTH)
    assert (first.finished, second.finished) == (False, True)
    assert [completion.text for completion in second.outputs] == ["ab", "xy"]


def test_logprobs_carry_text_and_add_up():
    state = make_state(logprobs=1)
    sequence = state.sequences[0]
    for byte in b"hi":
        sequence.token_ids.append(byte)
        state.append(sequence, byte, {byte: Logprob(-0.5, 1)})
    completion = state.output().outputs[0]
    assert completion.cumulative_logprob == pytest.approx(-1.0)
    assert [entry.decoded_token for position in completion.logprobs for entry in position.values()] == ["h", "i"]
