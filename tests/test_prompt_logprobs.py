"""Log-probabilities of prompts: scored in blocks beside the model's program, put back in the order of the step."""

import numpy as np
import pytest

from jax_engine.model_runner import _PromptScores
from jax_engine.program import PROMPT_BLOCK
from jax_engine.sampling_params import SamplingParams
from tests.test_engine import serve

PARAMS = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, prompt_logprobs=3)


@pytest.fixture(scope="module")
def large_steps(make_modes):
    """Steps that hold several blocks of prompt tokens."""
    return make_modes(token_buckets=(4 * PROMPT_BLOCK,), decode_buckets=(), max_model_len=256)


def test_prompts_of_several_blocks_and_rows_that_want_none(large_steps, one_bucket):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, size).tolist() for size in (90, 1, 40, 2, 100)]
    plain = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    requests = [(prompt, plain if number == 2 else PARAMS) for number, prompt in enumerate(prompts)]
    outputs, chunked = (serve(modes.engine(), requests) for modes in (large_steps, one_bucket))
    assert outputs[2].prompt_logprobs is None
    for number in (0, 1, 3, 4):
        got, want = outputs[number].prompt_logprobs, chunked[number].prompt_logprobs
        assert len(got) == len(prompts[number]) and got[0] is None
        for token, entries, others in zip(prompts[number][1:], got[1:], want[1:], strict=True):
            assert entries[token].rank == others[token].rank and set(entries) == set(others)
            assert abs(entries[token].logprob - others[token].logprob) < 1e-4


def test_scores_go_back_to_their_tokens():
    at = np.arange(3, 3 + 2 * (PROMPT_BLOCK + 6), 2)
    values = np.zeros(2 * PROMPT_BLOCK, np.float32)
    values[: at.size] = at
    values[at.size :] = 1e9  # padding
    halves = np.split(values, 2)
    blocks = [(half, half.astype(np.int32), *(np.tile(half[:, None], 20) for _ in range(2))) for half in halves]
    spread = _PromptScores(400, at, []).spread(blocks)
    want = np.zeros(400)
    want[at] = at
    for part in spread:
        np.testing.assert_array_equal(part if part.ndim == 1 else part[:, 7], want)
