"""Embeddings on the tiny model: the hidden state that the next token is made of, whatever else is in the batch."""

import numpy as np
import pytest

from jax_engine.async_engine import AsyncEngine
from jax_engine.errors import InvalidRequest
from jax_engine.sampling_params import RequestOutputKind, SamplingParams

PROMPTS = [[5], [7, 8, 9], list(range(60)), list(range(100, 140))]
ONE_TOKEN = SamplingParams(temperature=0, max_tokens=1, output_kind=RequestOutputKind.FINAL_ONLY)


def run(engine, *, embed: bool, noise: int = 0) -> list:
    for number, prompt in enumerate(PROMPTS):
        engine.submit(engine.make_request(str(number), prompt, ONE_TOKEN, embed=embed))
    for number in range(noise):
        engine.submit(engine.make_request(f"noise{number}", [number, 3], SamplingParams(max_tokens=20)))
    outputs = {}
    while engine.has_work:
        outputs |= {output.request_id: output for output in engine.step()}
    return [outputs[str(number)] for number in range(len(PROMPTS))]


def test_embeddings_are_what_the_next_token_is_made_of(one_bucket):
    outputs = run(one_bucket.engine(), embed=True)
    head = np.asarray(one_bucket.runner.weights["embed"]["weight"], np.float32)
    for output in outputs:
        assert output.embedding.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(output.embedding), 1, rtol=1e-5)
        assert int((head @ output.embedding).argmax()) == output.outputs[0].token_ids[0]
    assert all(output.embedding is None for output in run(one_bucket.engine(), embed=False))


@pytest.mark.parametrize("depth", [1, 3])
def test_neighbours_and_depth_change_nothing_bit_for_bit(one_bucket, depth):
    want = run(one_bucket.engine("sync"), embed=True)
    got = run(one_bucket.engine("async", depth), embed=True, noise=9)
    for mine, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(mine.embedding, other.embedding)


async def test_async_engine_embeds(one_bucket):
    engine = AsyncEngine(one_bucket.config, one_bucket.engine())
    try:
        output = await engine.embed([7, 8, 9])
        want = run(one_bucket.engine("sync"), embed=True)[1]
        np.testing.assert_array_equal(output.embedding, want.embedding)
        long = await engine.embed(list(range(200)), truncate=True)
        assert len(long.prompt_token_ids) == one_bucket.limits.max_model_len - 1
        with pytest.raises(InvalidRequest):
            await engine.embed(list(range(200)))
    finally:
        engine.shutdown()
