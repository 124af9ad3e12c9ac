"""Running ahead of the device: what a step does for a sequence that has ended when the host does not know it yet."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_engine.batch import BatchBuilder
from jax_engine.buckets import Bucket
from jax_engine.sampling_params import SamplingParams
from jax_engine.schedule import Row, Schedule
from jax_engine.step import ended_rows, move_to_one_key
from tests.scheduling import make_limits, make_sequence

UNWRITTEN = -7


def finish_all(engine):
    outputs = {}
    while engine.has_work:
        outputs |= {output.request_id: output for output in engine.step()}
    return outputs


@pytest.mark.parametrize("modes", ["one_bucket", "many_buckets"])
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_an_ended_row_writes_nothing_more(modes, depth, request):
    modes = request.getfixturevalue(modes)
    prompt, params = [5, 6, 7], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    alone = modes.engine("sync")
    alone.submit(alone.make_request("r", prompt, params))
    tokens = finish_all(alone)["r"].outputs[0].token_ids
    stop = next(token for token in tokens[3:] if token not in tokens[:3])
    length = len(prompt) + tokens.index(stop) + 1

    def places_written(params: SamplingParams) -> int:
        engine = modes.engine("async", depth, enable_prefix_caching=False)
        cache = modes.runner._cache
        with jax.transfer_guard("allow"):
            modes.runner._cache = dataclasses.replace(cache, token_ids=jnp.full_like(cache.token_ids, UNWRITTEN))
        engine.submit(engine.make_request("r", prompt, params))
        pages = []
        schedule = engine.scheduler.schedule

        def recording(now):
            made = schedule(now)
            for _, _, new in made.grown:
                pages.extend(new)
            return made

        engine.scheduler.schedule = recording
        output = finish_all(engine)["r"].outputs[0]
        assert output.token_ids == tokens[: length - len(prompt)]
        with jax.transfer_guard("allow"):
            written = np.asarray(modes.runner._cache.token_ids).reshape(-1, modes.limits.page_size)[pages].ravel()
        return int((written != UNWRITTEN).sum())

    # The stop token itself is never computed: the row had ended when its turn came. But for many stop tokens the
    # device knows only the first few, and surplus steps write what they please.
    stopping = dataclasses.replace(params, stop_token_ids=[stop])
    assert places_written(stopping) == length - 1
    unknown = dataclasses.replace(params, stop_token_ids=[*(t for t in range(20) if t not in tokens), stop])
    if stop >= 20:
        assert places_written(unknown) == length - 1 + depth - 1


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_page_whose_last_token_ended_the_sequence_is_not_found(one_bucket, depth):
    """No step computes that token, so its keys and values are missing from the page."""
    size = one_bucket.limits.page_size
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, logprobs=0)

    def ask(engine, prompt, params):
        engine.submit(engine.make_request("r", prompt, params))
        return finish_all(engine)["r"].outputs[0]

    for length in range(2, 2 + 2 * size):
        prompt = [5] * length
        tokens = ask(one_bucket.engine("sync", enable_prefix_caching=False), prompt, params).token_ids
        ends = [n for n, token in enumerate(tokens) if token not in tokens[:n] and (length + n) % size == size - 1]
        if ends and ends[-1] > 1:
            break
    stop = tokens[ends[-1]]

    def fill_pool():
        with jax.transfer_guard("allow"):
            cache = one_bucket.runner._cache
            one_bucket.runner._cache = dataclasses.replace(cache, pool=jnp.full_like(cache.pool, 3.0))

    engine = one_bucket.engine("async", depth)
    fill_pool()
    first = ask(engine, prompt, dataclasses.replace(params, stop_token_ids=[stop]))
    assert first.token_ids[-1] == stop and (length + len(first.token_ids)) % size == 0
    turn = [*prompt, *first.token_ids, 9, 9]
    want = ask(one_bucket.engine("sync", enable_prefix_caching=False), turn, params)
    fill_pool()
    engine = one_bucket.engine("async", depth)
    ask(engine, prompt, dataclasses.replace(params, stop_token_ids=[stop]))
    assert ask(engine, turn, params) == want


def test_ended_rows_are_those_whose_pending_token_ends_them():
    limits = make_limits()
    builder = BatchBuilder(limits, 23)
    layout = builder.layout(Bucket(4, 4, True))
    sequences = [make_sequence(5, 9) for _ in range(4)]
    for slot, sequence in enumerate(sequences):
        sequence.slot, sequence.num_pending = slot, 1
    rows = [Row(sequence, 5, 1, True) for sequence in sequences]
    schedule = Schedule(rows, 4, 4, layout.bucket, sequences, [], [], [], [], [], 0.0)
    for sequence in sequences:
        schedule.grown.append((sequence, 0, [10 + sequence.slot, 20 + sequence.slot]))
    packed = builder.build(schedule).packed
    with jax.transfer_guard("allow"):
        last_tokens = jnp.asarray([3, 4, -1, 3, 0])  # EOS, another, NaN, EOS
        parts = layout.unpack(jnp.asarray(packed))
        ended = ended_rows(parts, last_tokens)
        move_to_one_key(parts, ended, layout, limits.page_size)
        got, starts, pages = (np.asarray(array) for array in (ended, parts["starts"], parts["page_table"][:, 0]))
    assert got.tolist() == [True, False, True, True]
    # They stand in the page they stood in, which is the second here, and never in the first, which others may share.
    assert starts.tolist() == [0, 5, 0, 0] and pages.tolist() == [20, 11, 22, 23]
