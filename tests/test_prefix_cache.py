"""The prefix cache: what is found again, by whom, in which order it goes, and that nothing else changes."""

import dataclasses
import random

import jax
import numpy as np
import pytest

from jax_engine.page_pool import PagePool
from jax_engine.request import FinishReason
from jax_engine.sampling_params import SamplingParams
from tests.scheduling import VOCAB, expected, make_engine, make_limits, make_sequence, run

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def ask(engine, prompt, params=GREEDY, name="r", **request):
    """One request alone, to its end."""
    engine.submit(engine.make_request(name, prompt, params, **request))
    outputs = {}
    while engine.has_work:
        outputs |= {output.request_id: output for output in engine.step()}
    engine.scheduler.check()
    return outputs[name]


def test_a_prompt_is_found_again_but_for_its_last_token():
    engine = make_engine(make_limits())
    prompt = [1, 2] * 8
    assert [ask(engine, prompt).num_cached_tokens for _ in range(3)] == [0, 12, 12]
    assert ask(engine, [*prompt, 9]).num_cached_tokens == 16
    assert ask(engine, [*prompt[:9], 9, 9, 9]).num_cached_tokens == 8
    assert ask(engine, [2, *prompt]).num_cached_tokens == 0


def test_the_next_turn_of_a_chat_finds_the_answer_too():
    engine = make_engine(make_limits())
    prompt = [4] * 10
    first = ask(engine, prompt)
    turn = [*prompt, *first.outputs[0].token_ids, 8, 8]
    assert ask(engine, turn).num_cached_tokens == 12
    assert ask(engine, turn).outputs[0].token_ids == expected(turn, 6, 64, ignore_eos=True)


def test_only_equal_salts_share():
    engine = make_engine(make_limits())
    prompt = [1] * 12
    salts = [None, "a", "b", "a", None, "b"]
    assert [ask(engine, prompt, cache_salt=salt).num_cached_tokens for salt in salts] == [0, 0, 0, 8, 8, 8]


def test_a_salt_cannot_be_made_to_look_like_a_page():
    pool = PagePool(8, 4, caching=True)
    plain = make_sequence([97] * 4 + [98] * 5, 1)
    pool.grow(plain, 3)
    pool.index(plain, 9)
    tokens = pool._tokens(plain, 0).decode()  # what the first page's digest is made of
    assert pool.match(make_sequence([98] * 5, 1, cache_salt=tokens), 5) == [[]]


def test_it_can_be_switched_off():
    engine = make_engine(make_limits(enable_prefix_caching=False))
    assert [ask(engine, [1] * 12).num_cached_tokens for _ in range(2)] == [0, 0]
    assert engine.scheduler.pool.num_indexed == 0


def test_completions_of_one_request_hold_the_prompt_once():
    limits = make_limits(num_pages=16)  # four times the prompt alone would be 20 pages
    engine = make_engine(limits)
    prompt = list(range(18))
    engine.submit(engine.make_request("r", prompt, dataclasses.replace(GREEDY, n=4, max_tokens=2)))
    most = 0
    while engine.has_work:
        outputs = engine.step()
        engine.scheduler.check()
        most = max(most, engine.scheduler.num_running)
    assert most >= 3
    assert [c.token_ids for c in outputs[0].outputs] == [expected(prompt, 2, 64, ignore_eos=True)] * 4
    assert engine.metrics.preemptions == 0


def test_all_completions_run_from_the_end_of_the_prompt_on():
    engine = make_engine(make_limits(max_num_batched_tokens=8))
    engine.submit(engine.make_request("r", [6] * 12, dataclasses.replace(GREEDY, n=3, max_tokens=20)))
    running = []
    for _ in range(6):
        engine.step()
        running.append(engine.scheduler.num_running)
    assert running[0] == 1 and running[-1] == 3


def test_a_prompt_is_computed_once_for_all_completions():
    engine = make_engine(make_limits())
    engine.submit(engine.make_request("r", [6] * 17, dataclasses.replace(GREEDY, n=3, max_tokens=1)))
    run(engine)
    assert engine.metrics.tokens["prompt"] == 17 + 1 + 1


def test_the_least_recently_used_pages_go_first_and_the_last_of_a_prompt_before_its_first():
    engine = make_engine(make_limits(num_pages=16, max_model_len=48))
    one, two = [1] * 17, [2] * 17
    for prompt in (one, two, one):
        ask(engine, prompt, dataclasses.replace(GREEDY, max_tokens=1))
    ask(engine, [9] * 40, dataclasses.replace(GREEDY, max_tokens=1))  # 10 of 16 pages: 8 are in the index, 8 free
    assert ask(engine, one, dataclasses.replace(GREEDY, max_tokens=1)).num_cached_tokens == 16
    assert ask(engine, two, dataclasses.replace(GREEDY, max_tokens=1)).num_cached_tokens == 4


def test_a_page_is_found_from_its_last_token_on():
    pool = PagePool(8, 4, caching=True)
    sequence = make_sequence([1] * 9, 1)
    pool.grow(sequence, 3)
    pool.index(sequence, 7)
    assert pool.match(make_sequence([1] * 9, 1), 8) == [sequence.pages[:1]]
    pool.index(sequence, 8)
    assert pool.match(make_sequence([1] * 9, 1), 8) == [sequence.pages[:2]]


def test_another_text_under_the_same_digest_is_not_used():
    pool = PagePool(8, 4, caching=True)
    first, second = make_sequence([1] * 9, 1), make_sequence([2] * 9, 1)
    pool.grow(first, 3)
    pool.index(first, 8)
    assert pool.match(make_sequence([1] * 9, 1), 8) == [first.pages[:2]]
    pool._index[pool._digest(second, 0)] = first.pages[0]  # as if the digests had collided
    assert pool.match(second, 8) == [[]]


def test_pages_survive_preemption():
    limits = make_limits(num_pages=17, max_num_seqs=2, max_num_batched_tokens=32, token_buckets=(32,))
    engine = make_engine(limits)
    for name in "ab":
        prompt = [int(name, 16)] * 20
        engine.submit(engine.make_request(name, prompt, dataclasses.replace(GREEDY, max_tokens=40)))
    outputs = run(engine)
    assert engine.metrics.preemptions > 0
    computed = engine.metrics.tokens["prompt"] + engine.metrics.tokens["decode"]
    assert computed < 2 * 60 + 40, "a preempted sequence was computed anew from the start"
    for name in "ab":
        assert outputs[name].outputs[0].token_ids == expected([int(name, 16)] * 20, 40, 64, ignore_eos=True)


def test_thousands_of_requests_leave_nothing_behind():
    engine = make_engine(make_limits())
    chance = random.Random(0)
    for number in range(300):
        ask(engine, [chance.randrange(VOCAB) for _ in range(chance.randint(1, 30))], name=str(number))
    pool = engine.scheduler.pool
    assert pool.num_free == pool.num_pages
    assert len(pool._index) == sum(contents is not None for contents in pool._contents) <= pool.num_pages
    assert engine.scheduler._followers == {} and engine.scheduler._following == set()


# On the tiny real model.


@pytest.mark.parametrize("params", [{}, {"prompt_logprobs": 3}, {"repetition_penalty": 1.5, "n": 3}])
def test_found_pages_change_no_bit(one_bucket, params):
    prompt = [7, 8, 9, 10] * 10
    settings = SamplingParams(**({"temperature": 0.8, "seed": 4, "max_tokens": 20, "logprobs": 4} | params))
    want = ask(one_bucket.engine("async", enable_prefix_caching=False), prompt, settings)
    engine = one_bucket.engine("async")
    for _ in range(2):
        got = ask(engine, prompt, settings)
        assert got.outputs == want.outputs and got.prompt_logprobs == want.prompt_logprobs
    assert got.num_cached_tokens == (0 if "prompt_logprobs" in params else 32)


def test_a_poisoned_page_fails_one_request_and_is_not_used_again(one_bucket):
    engine = one_bucket.engine("async")
    prompt = [3] * 30
    good = ask(engine, prompt)
    page = next(iter(engine.scheduler.pool._index.values()))
    runner = one_bucket.runner
    with jax.transfer_guard("allow"):
        runner._cache = dataclasses.replace(runner._cache, pool=runner._cache.pool.at[page].set(np.nan))
    assert ask(engine, prompt).outputs[0].finish_reason is FinishReason.ERROR
    again = ask(engine, prompt)
    assert again.outputs == good.outputs and again.num_cached_tokens == 0
