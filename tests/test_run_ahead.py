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
from jax_engine.step import ended_rows
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


def test_ended_rows_are_those_whose_pending_token_ends_them():
    limits = make_limits()
    builder = BatchBuilder(limits, 23)
    layout = builder.layout(Bucket(4, 4, True))
    sequences = [make_sequence(3, 9) for _ in range(4)]
    for slot, sequence in enumerate(sequences):
        sequence.slot, sequence.num_pending = slot, 1
    rows = [Row(sequence, 3, 1, True) for sequence in sequences]
    schedule = Schedule(rows, 4, 4, layout.bucket, sequences, [], [], [], [], [], 0.0)
    packed = builder.build(schedule).packed
    with jax.transfer_guard("allow"):
        last_tokens = jnp.asarray([3, 4, -1, 3, 0])  # EOS, another, NaN, EOS
        got = np.asarray(ended_rows(layout.unpack(jnp.asarray(packed)), last_tokens))
    assert got.tolist() == [True, False, True, True]
