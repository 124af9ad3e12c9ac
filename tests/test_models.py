"""Every architecture against the answers of another implementation, transformers, in all ways of computing them."""

import dataclasses
import functools
import random
from pathlib import Path

import numpy as np
import pytest

from jax_engine.engine import Engine
from jax_engine.request import RequestOutput
from jax_engine.sampling_params import RequestOutputKind, SamplingParams

TINY = Path(__file__).parent / "golden/tiny"
TOLERANCE = 2e-3
NEAR_TIE = 0.02
#: Compiling takes nearly all of the time here, so the programs for decoding alone are made for some models only: those
#: with windows and soft caps, or a cache of their own.
WITH_DECODE_BUCKET = ("gemma2", "deepseek_v3", "qwen3_next")


class Golden:
    """A tiny model, compiled once, and what transformers says of three sequences."""

    def __init__(self, architecture: str, make_modes):
        self._make = functools.partial(
            make_modes, model=str(TINY / architecture), max_num_seqs=3, token_buckets=(64,), num_pages=280
        )
        self.modes = self._make(decode_buckets=(3,) if architecture in WITH_DECODE_BUCKET else ())
        expected = np.load(TINY / architecture / "expected.npz")
        self.tokens = expected["tokens"].tolist()
        self.logprobs, self.greedy = expected["logprobs"], expected["greedy"].tolist()

    @functools.cached_property
    def one_way(self):
        """The same with one bucket, for comparing bits."""
        return self._make(decode_buckets=()) if self.modes.limits.decode_buckets else self.modes

    def check_prompt(self, output: RequestOutput, number: int) -> None:
        """Compares the likeliest tokens, and the one that came, at every position of a prompt."""
        assert len(output.prompt_logprobs) == len(self.tokens[number])
        for position, entries in enumerate(output.prompt_logprobs[1:]):
            ids = list(entries)
            got = [entries[token].logprob for token in ids]
            np.testing.assert_allclose(got, self.logprobs[number, position, ids], rtol=0, atol=TOLERANCE)

    def check_greedy(self, output: RequestOutput, number: int) -> None:
        """Compares the continuation, up to where two tokens are so near that the order of a sum decides."""
        (completion,) = output.outputs
        for got, want, entries in zip(completion.token_ids, self.greedy[number], completion.logprobs, strict=True):
            if got != want:
                assert entries[got].logprob - entries[want].logprob < NEAR_TIE, "another token, and no near-tie"
                return


@pytest.fixture(scope="module", params=sorted(path.name for path in TINY.iterdir()))
def golden(request, make_modes) -> Golden:
    return Golden(request.param, make_modes)


def run(engine: Engine, prompts: list[list[int]], params: SamplingParams, budgets: random.Random | None = None) -> list:
    """Serves the prompts together; `budgets` draws a token budget for every step."""
    for number, prompt in enumerate(prompts):
        engine.submit(engine.make_request(str(number), prompt, params))
    outputs = {}
    while engine.has_work:
        if budgets is not None:
            budget = budgets.choice([3, 4, 5, 7, 11, 17, 23])
            engine.scheduler.limits = dataclasses.replace(engine.limits, max_num_batched_tokens=budget)
        outputs |= {output.request_id: output for output in engine.step()}
    engine.scheduler.check()
    return [outputs[str(number)] for number in range(len(prompts))]


PROMPT = SamplingParams(
    temperature=0, max_tokens=1, prompt_logprobs=20, output_kind=RequestOutputKind.FINAL_ONLY, ignore_eos=True
)
GREEDY = dataclasses.replace(PROMPT, max_tokens=24, prompt_logprobs=None, logprobs=5)


def test_full_prefill(golden):
    for number, prompt in enumerate(golden.tokens):
        golden.check_prompt(run(golden.modes.engine("sync"), [prompt], PROMPT)[0], number)


def test_prefill_in_random_chunks(golden):
    outputs = run(golden.modes.engine(), golden.tokens, PROMPT, budgets=random.Random(3))
    for number, output in enumerate(outputs):
        golden.check_prompt(output, number)


def test_every_token_as_a_step_of_its_own(golden):
    outputs = run(golden.modes.engine(max_num_batched_tokens=1), golden.tokens[:1], PROMPT)
    golden.check_prompt(outputs[0], 0)


def test_async_in_company_gives_what_sync_gives_alone_bit_for_bit(golden):
    params = dataclasses.replace(PROMPT, temperature=0.9, seed=5, max_tokens=8, prompt_logprobs=2, logprobs=2)
    want = [run(golden.one_way.engine("sync"), [prompt], params)[0] for prompt in golden.tokens]
    engine = golden.one_way.engine("async", 3)
    for got, alone in zip(run(engine, golden.tokens, params, budgets=random.Random(4)), want, strict=True):
        assert (got.outputs, got.prompt_logprobs) == (alone.outputs, alone.prompt_logprobs)


def test_greedy_tokens(golden):
    for number, output in enumerate(run(golden.modes.engine(), golden.tokens, GREEDY)):
        golden.check_greedy(output, number)


def test_greedy_tokens_after_preemption(golden):
    if golden.modes.limits.page_groups.num_sliding:
        pytest.skip("tests/test_page_groups.py has pools that are too small for models with windows")
    # 72 tokens take 9 pages each; 22 pages let three sequences join, but do not hold them to their end.
    engine = golden.modes.engine(num_pages=22)
    outputs = run(engine, golden.tokens, GREEDY)
    assert engine.metrics.preemptions > 0
    for number, output in enumerate(outputs):
        golden.check_greedy(output, number)
