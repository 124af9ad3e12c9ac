"""Grammars through the real engine over a fake device: every schedule gives the same, and failures stay alone."""

import dataclasses
import random
import re
import threading

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from benchmarks.scheduler_host import make_limits
from jax_engine import grammar
from jax_engine.batch import BatchBuilder
from jax_engine.config import EngineConfig
from jax_engine.engine import Engine
from jax_engine.errors import InvalidRequest
from jax_engine.grammar import _MAX_LEXERS, GrammarCompiler, GrammarStates
from jax_engine.request import FinishReason, Request
from jax_engine.sampling_params import RequestOutputKind, SamplingParams
from jax_engine.schedule import Row
from jax_engine.sequence import Sequence
from jax_engine.structured_outputs import StructuredOutputsParams
from jax_engine.testing.byte_tokenizer import EOS, ByteTokenizer
from jax_engine.testing.fake_runner import FakeRunner

REGEXES = ["[a-f]{3,9}", "(ab|cd)+x", "[0-9]{40}", "(yes|no|maybe)"]


@pytest.fixture(autouse=True, scope="module")
def _never_few():
    """All masks are made by other threads, however few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grammar, "_FEW", 0)
        yield


def make_engine(depth: int, num_pages: int | None = None) -> Engine:
    limits = make_limits(4, 128, depth)
    limits = dataclasses.replace(limits, max_inflight_steps=depth, num_pages=num_pages or limits.num_pages)
    vocab_size = ByteTokenizer.vocab_size
    return Engine(
        FakeRunner(limits, vocab_size),
        ByteTokenizer(),
        vocab_size=vocab_size,
        eos_token_ids=[EOS],
        config=EngineConfig(model="fake"),
    )


def params(regex: str | None, **fields) -> SamplingParams:
    form = None if regex is None else StructuredOutputsParams(regex=regex)
    kind = RequestOutputKind.FINAL_ONLY
    return SamplingParams(**{"max_tokens": 60, "structured_outputs": form, "output_kind": kind} | fields)


def serve(engine: Engine, requests, chance: random.Random) -> list:
    outputs, waiting = {}, list(enumerate(requests))
    while waiting or engine.has_work:
        while waiting and chance.random() < 0.5:
            number, (prompt, request) = waiting.pop(0)
            engine.submit(engine.make_request(str(number), prompt, request))
        outputs |= {output.request_id: output for output in engine.step()}
        engine.scheduler.check()
    assert engine.scheduler.pool.num_free == engine.limits.num_pages and not engine._grammars._states
    return [outputs[str(number)] for number in range(len(requests))]


def content(output) -> list:
    return [(c.token_ids, c.text, c.finish_reason) for c in output.outputs]


@settings(max_examples=25, deadline=None)
@given(
    wanted=st.lists(
        st.tuples(st.sampled_from([*REGEXES, None]), st.integers(1, 40), st.integers(1, 2)), min_size=1, max_size=10
    ),
    depth=st.integers(1, 4),
    num_pages=st.integers(9, 24),
    seed=st.integers(0, 1000),
)
def test_every_schedule_gives_the_same(wanted, depth, num_pages, seed):
    requests = [([(n * 7 + i) % 250 for i in range(size)], params(regex, n=n)) for regex, size, n in wanted]
    want = serve(make_engine(1), requests, random.Random(0))
    got = serve(make_engine(depth, num_pages), requests, random.Random(seed))
    assert list(map(content, got)) == list(map(content, want))
    for (regex, _, _), output in zip(wanted, got, strict=True):
        for completion in output.outputs:
            if regex is not None and completion.finish_reason is FinishReason.STOP:
                assert re.fullmatch(regex, completion.text), completion.text


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_state_that_fails_ends_its_request_alone(depth):
    engine = make_engine(depth)
    for number, regex in enumerate(["[0-9]{40}", "[0-9]{40}", None]):
        engine.submit(engine.make_request(str(number), [5, 6], params(regex, n=2 if number == 0 else 1)))
    outputs = {}
    for turn in range(500):
        if turn == 8:
            if engine._grammars._begun is not None:
                engine._grammars._begun.done.result()
            victim = next(s for s in engine._grammars._states if s.request.request_id == "0")
            assert not engine._grammars._states[victim].matcher.consume_token(ord("x"))
        outputs |= {output.request_id: output for output in engine.step()}
        if not engine.has_work:
            break
    assert {c.finish_reason for c in outputs["0"].outputs} == {FinishReason.ERROR}
    assert outputs["0"].error_param == "structured_outputs"
    assert re.fullmatch("[0-9]{40}", outputs["1"].outputs[0].text) and outputs["2"].error is None
    assert engine.scheduler.pool.num_free == engine.limits.num_pages and not engine._grammars._states


def test_a_model_without_an_end_token_refuses():
    engine = make_engine(2)
    engine = Engine(
        engine._runner, ByteTokenizer(), vocab_size=258, eos_token_ids=[], config=EngineConfig(model="fake")
    )
    with pytest.raises(InvalidRequest, match="ends an output"):
        engine.make_request("a", [5], params("a+"))


def test_the_same_grammar_is_shared_and_has_lexers_for_its_sequences():
    engine = make_engine(2)
    first, second = (engine.make_request(str(n), [5], params("a+")).grammar for n in range(2))
    assert first is second is not None
    assert engine.make_request("x", [5], params("b+")).grammar is not first
    engine.make_request("y", [5], params("a+", n=100))
    lexers = [first.start().lexer for _ in range(100)]
    assert len(set(lexers)) == _MAX_LEXERS and len(first._matchers) == _MAX_LEXERS


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_is_committed_and_the_next_one_built_while_masks_are_made(monkeypatch, fails):
    engine, fill, build = make_engine(2), grammar.fill_next_token_bitmask_par, BatchBuilder.build
    built, calls = threading.Event(), []

    def slow_fill(executor, matchers, array):
        calls.append(len(engine._states["0"].sequences[0].token_ids))
        if len(calls) == 4:
            built.clear()
            assert built.wait(20), "nothing was built while the masks were made"
            calls.append(len(engine._states["0"].sequences[0].token_ids))
            if fails:
                assert not matchers[0][0].consume_token(ord("!"))
        fill(executor, matchers, array)

    def note_build(builder, schedule):
        built.set()
        return build(builder, schedule)

    monkeypatch.setattr(grammar, "fill_next_token_bitmask_par", slow_fill)
    monkeypatch.setattr(BatchBuilder, "build", note_build)
    (output,) = serve(engine, [([5, 6], params("[a-f]{20}", max_tokens=40))], random.Random(0))
    assert calls[4] == calls[3] + 1, "the step before was not committed"
    if fails:
        assert output.outputs[0].finish_reason is FinishReason.ERROR and "structured_outputs" in output.error
    else:
        assert re.fullmatch("[a-f]{20}", output.outputs[0].text)


def test_rows_of_all_lexers_get_their_own_masks():
    """As many sequences as there are lexers and more, each at another place of one grammar."""
    compiler = GrammarCompiler(ByteTokenizer(), ByteTokenizer.vocab_size, [EOS])
    form = StructuredOutputsParams(regex="[a-z]{30}[0-9]")
    grammar = compiler.compile(form, 100)
    request = Request(request_id="a", prompt_token_ids=(5,), sampling_params=SamplingParams(), grammar=grammar)
    sequences = [Sequence(request, number, 100, frozenset(), 0) for number in range(3 * _MAX_LEXERS)]
    states = GrammarStates(ByteTokenizer.vocab_size)
    for number, sequence in enumerate(sequences):
        states.add(sequence)
        for _ in range(30 if number % 3 else number % 30):
            states.advance([Row(sequence, 0, 1, True)], [ord("q")])
            assert not states.is_complete(sequence)
    rows = [Row(sequence, 0, 1, True) for sequence in sequences]
    for turn in (rows, rows[::-1], rows[::2], rows):  # a mask leaves nothing behind for the next
        states.begin_masks(turn, len(rows) + 1)
        masks, failed = states.end_masks()
        assert not failed and (masks[len(turn) :] == -1).all()
        for row, mask in zip(turn, masks, strict=False):
            digit = sequences.index(row.sequence) % 3
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            assert allowed.tolist() == list(b"0123456789" if digit else b"abcdefghijklmnopqrstuvwxyz")
