"""The engine on a tiny real model, against itself in other modes and other company."""

import dataclasses
import random

import jax
import pytest

from checkpoints import orbax_io
from checkpoints.formats import open_checkpoint
from jax_engine.engine import Engine
from jax_engine.model_runner import count_compilations
from jax_engine.request import FinishReason, RequestOutput
from jax_engine.sampling_params import RequestOutputKind, SamplingParams

MODES = [("static", 1), ("sync", 1), ("async", 2), ("async", 4)]


def random_params(chance: random.Random) -> SamplingParams:
    """Any mix of the sampling features."""

    def sometimes(value, default, odds=0.3):
        return value if chance.random() < odds else default

    max_tokens = chance.randint(1, 20)
    return SamplingParams(
        n=sometimes(chance.randint(2, 3), 1, 0.15),
        temperature=sometimes(0.0, chance.uniform(0.2, 1.5), 0.4),
        top_p=sometimes(chance.uniform(0.3, 0.99), 1.0),
        top_k=sometimes(chance.randint(1, 40), 0),
        min_p=sometimes(chance.uniform(0.01, 0.2), 0.0),
        presence_penalty=sometimes(chance.uniform(-2, 2), 0.0),
        frequency_penalty=sometimes(chance.uniform(-2, 2), 0.0),
        repetition_penalty=sometimes(chance.uniform(0.5, 2), 1.0),
        logit_bias=sometimes({chance.randrange(320): chance.uniform(-100, 100) for _ in range(3)}, None),
        seed=sometimes(chance.getrandbits(60), None, 0.5),
        stop=sometimes([chr(chance.randint(33, 120)), "ab"], None),
        stop_token_ids=sometimes([chance.randrange(320) for _ in range(20)], None),
        include_stop_str_in_output=chance.random() < 0.5,
        ignore_eos=chance.random() < 0.3,
        max_tokens=max_tokens,
        min_tokens=sometimes(chance.randint(0, max_tokens), 0),
        logprobs=sometimes(chance.randint(0, 20), None, 0.6),
        prompt_logprobs=sometimes(chance.randint(0, 5), None, 0.2),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def random_requests(seed: int, count: int) -> list[tuple[list[int], SamplingParams]]:
    chance = random.Random(seed)
    return [
        ([chance.randrange(256) for _ in range(chance.choice([1, 2, 7, 8, 9, 30, 70]))], random_params(chance))
        for _ in range(count)
    ]


def serve(engine: Engine, requests, *, together: bool = True, chance: random.Random | None = None) -> list:
    """Runs requests to their end: all at once, at random times, or (not together) each alone."""
    outputs: dict[str, RequestOutput] = {}
    waiting = list(enumerate(requests))
    while waiting or engine.has_work:
        alone_and_busy = not together and engine.has_work
        while waiting and not alone_and_busy and (chance is None or chance.random() < 0.3):
            number, (prompt, params) = waiting.pop(0)
            engine.submit(engine.make_request(str(number), prompt, params))
            alone_and_busy = not together
        for output in engine.step():
            outputs[output.request_id] = output
    engine.scheduler.check()
    assert engine.scheduler.pool.num_free == engine.limits.num_pages, "pages are missing from an idle engine"
    return [outputs[str(number)] for number in range(len(requests))]


def content(output: RequestOutput) -> tuple:
    """All of an output that has to be the same whatever else ran."""
    return (output.outputs, output.prompt_logprobs, output.finished)


@pytest.mark.parametrize(("scheduling", "depth"), MODES[:1] + MODES[2:])
def test_every_mode_gives_what_sync_gives_bit_for_bit(one_bucket, scheduling, depth):
    requests = random_requests(1, 40)
    want = serve(one_bucket.engine("sync"), requests)
    got = serve(one_bucket.engine(scheduling, depth), requests)
    assert list(map(content, got)) == list(map(content, want))
    assert len({output.outputs[0].finish_reason for output in want}) == 2, "the requests should stop in both ways"


def test_arrivals_at_any_time_change_nothing(one_bucket):
    requests = random_requests(2, 30)
    want = serve(one_bucket.engine("sync"), requests)
    got = serve(one_bucket.engine("async", 3), requests, chance=random.Random(5))
    assert list(map(content, got)) == list(map(content, want))


def test_alone_gives_what_together_gives_bit_for_bit(one_bucket):
    requests = random_requests(3, 25)
    together = serve(one_bucket.engine("async"), requests)
    alone = serve(one_bucket.engine("async"), requests, together=False)
    assert list(map(content, alone)) == list(map(content, together))


def test_preempted_requests_give_the_same_bit_for_bit(one_bucket):
    requests = [
        (prompt[:16], dataclasses.replace(params, max_tokens=70, ignore_eos=True, stop_token_ids=None, n=1))
        for prompt, params in random_requests(4, 25)
    ]
    want = serve(one_bucket.engine("sync"), requests)
    engine = one_bucket.engine("async", num_pages=20)
    got = serve(engine, requests)
    assert engine.metrics.preemptions > 10
    assert list(map(content, got)) == list(map(content, want))


def test_several_buckets_give_the_same_tokens_near_ties_apart(many_buckets):
    requests = [
        (prompt, dataclasses.replace(params, logprobs=5, stop=None)) for prompt, params in random_requests(6, 40)
    ]
    want = serve(many_buckets.engine("sync"), requests)
    got = serve(many_buckets.engine("async"), requests, chance=random.Random(7))
    differing = 0
    for mine, other in zip(got, want, strict=True):
        for a, b in zip(mine.outputs, other.outputs, strict=True):
            common = next(
                (i for i, (s, t) in enumerate(zip(a.token_ids, b.token_ids, strict=False)) if s != t),
                min(len(a.token_ids), len(b.token_ids)),
            )
            differing += a.token_ids != b.token_ids
            for left, right in zip(a.logprobs[:common], b.logprobs[:common], strict=True):
                token = next(iter(left))
                assert abs(left[token].logprob - right[token].logprob) < 1e-3
    assert differing <= 2, "only near-ties may fall the other way"


def test_nothing_compiles_once_ready(many_buckets):
    engine = many_buckets.engine("async", 3)
    requests = random_requests(8, 200)
    compiled = []
    count_compilations(lambda: compiled.append(1))
    serve(engine, requests, chance=random.Random(9))
    assert not compiled


def test_aborts_give_back_their_pages_and_spare_the_others(one_bucket):
    requests = random_requests(10, 30)
    want = serve(one_bucket.engine("sync"), requests)
    engine = one_bucket.engine("async", 3)
    chance = random.Random(11)
    for number, (prompt, params) in enumerate(requests):
        engine.submit(engine.make_request(str(number), prompt, params))
    outputs, aborted = {}, set()
    while engine.has_work:
        if chance.random() < 0.5:
            victim = str(chance.randrange(len(requests)))
            if victim not in outputs and (output := engine.abort(victim)) is not None:
                assert any(c.finish_reason is FinishReason.ABORT for c in output.outputs)
                aborted.add(victim)
        for output in engine.step():
            outputs[output.request_id] = output
    assert len(aborted) > 5
    assert engine.scheduler.pool.num_free == engine.limits.num_pages
    for number, output in enumerate(want):
        if str(number) not in aborted:
            assert content(outputs[str(number)]) == content(output)


def test_an_orbax_folder_gives_what_its_source_gives(one_bucket, tmp_path):
    requests = random_requests(12, 5)
    want = serve(one_bucket.engine("sync"), requests)
    source = open_checkpoint(one_bucket.config.model)
    weights = jax.tree_util.tree_leaves_with_path(one_bucket.runner.weights)
    params = {".".join(str(part.key) for part in path): weight for path, weight in weights}
    orbax_io.save(tmp_path / "copy", params, config=source.config)
    copy = type(one_bucket)(model=str(tmp_path / "copy"), token_buckets=(24,), decode_buckets=())
    assert list(map(content, serve(copy.engine("sync"), requests))) == list(map(content, want))
