"""The sampler's parts, each against a plain numpy version of its definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_engine import sampler, truncation
from jax_engine.sampler import Feature, SamplingInputs, greedy, sample

V, S, A, B = 61, 24, 6, 6
ALL = ~Feature.NONE
MAX_INT = 2**31 - 1
run = jax.jit(sample)


def make_inputs(features, batch=B, **fields) -> SamplingInputs:
    """Neutral inputs of `batch` rows; a field may be one value for all rows or an array."""
    history = np.broadcast_to(fields.pop("history", 0), (batch, S))
    fields |= {"page_table": np.arange(batch)[:, None]}
    shapes = {"seed": (2,), "page_table": (1,), "adjust_ids": (A,), "adjust_values": (A,), "adjust_until": (A,)}
    shapes |= {"bans": (3, 4), "mask": (-(-V // 32),)}
    neutral = {
        "bans": -1,
        "mask": -1,
        "top_p": 1,
        "repetition_penalty": 1,
        "adjust_ids": -1,
        "position": S - 1,
        "prompt_len": S // 2,
    }
    made = {}
    for field in dataclasses.fields(SamplingInputs):
        if field.name in ("token_ids", "page_size"):
            continue
        kind = field.type.__name__.split("[")[0]
        dtype = {"Float": np.float32, "UInt32": np.uint32, "Int32": np.int32}[kind]
        shape = () if field.name == "features" else (batch, *shapes.get(field.name, ()))
        value = features if field.name == "features" else fields.pop(field.name, neutral.get(field.name, 0))
        made[field.name] = jnp.asarray(np.broadcast_to(np.asarray(value).astype(dtype), shape))
    assert not fields
    return SamplingInputs(**made, token_ids=jnp.asarray(history.reshape(-1), jnp.int32), page_size=S)


def draw_logits(seed=0, batch=B, scale=3.0):
    return (np.random.default_rng(seed).standard_normal((batch, V)) * scale).astype(np.float32)


def support(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """(mask, probabilities) of what truncation leaves of one row, by sorting, in float64."""
    p = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    keep = p >= min_p * p.max()
    if 0 < top_k < len(p):
        keep &= p >= np.sort(p)[-top_k]
    if top_p < 1:
        order = np.argsort(-np.where(keep, p, 0), kind="stable")
        mass = np.cumsum(np.where(keep, p, 0)[order])
        needed = int(np.searchsorted(mass, top_p * mass[-1])) + 1
        keep &= p >= p[order[needed - 1]]
    return keep, np.where(keep, p, 0) / np.where(keep, p, 0).sum()


def draw_many(logits, count, first_seed=0, **fields):
    """`count` draws from one row of logits, each with its own seed."""
    seeds = np.stack([np.arange(count) + first_seed, np.full(count, 7)], axis=1)
    inputs = make_inputs(Feature.RANDOM | Feature.TRUNCATE, count, seed=seeds, **fields)
    return np.asarray(run(np.tile(logits, (count, 1)), inputs).tokens)


def test_greedy_takes_the_first_of_the_likeliest():
    logits = draw_logits()
    logits[2, [5, 9]] = 50
    tokens = np.asarray(run(logits, make_inputs(0)).tokens)
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))
    assert tokens[2] == 5
    np.testing.assert_array_equal(np.asarray(run(logits, make_inputs(ALL)).tokens), tokens)
    np.testing.assert_array_equal(np.asarray(jax.jit(greedy)(logits)), tokens)


def test_a_greedy_row_is_the_same_in_a_mixed_batch():
    logits = draw_logits(1)
    temperature = np.array([0, 1, 0, 5, 1e-6, 2])
    tokens = np.asarray(run(logits, make_inputs(Feature.RANDOM, temperature=temperature)).tokens)
    greedy = temperature < 1e-5
    np.testing.assert_array_equal(tokens[greedy], logits.argmax(axis=1)[greedy])


def test_bans():
    rng = np.random.default_rng(20)
    logits, history = draw_logits(20), rng.integers(0, 3, (B, S))  # few ids, so that prefixes match often
    position, prompt_len = rng.integers(3, S, B), rng.integers(1, 6, B)
    bans = rng.integers(0, 3, (B, 3, 4))
    bans[:, :, -1] = rng.integers(0, V, (B, 3))
    for row in bans.reshape(-1, 4):
        row[: rng.integers(1, 4)] = -1
    bans[0, 1] = -1  # unused
    logits[np.arange(B), bans[:, 0, -1]] = 40
    inputs = make_inputs(Feature.BANS, position=position, prompt_len=prompt_len, history=history, bans=bans)
    wanted = logits.copy()
    for b in range(B):
        output = history[b, prompt_len[b] : position[b]].tolist()
        for *before, last in bans[b].tolist():
            before = [token for token in before if token >= 0]
            if last >= 0 and before == output[len(output) - len(before) :]:
                wanted[b, last] = -np.inf
    tokens = np.asarray(run(logits, inputs).tokens)
    np.testing.assert_array_equal(tokens, wanted.argmax(axis=1))
    assert (tokens != logits.argmax(axis=1)).any() and (tokens == logits.argmax(axis=1)).any()


def test_masks_and_rows_without_a_choice():
    rng = np.random.default_rng(21)
    logits, allowed = draw_logits(21), rng.random((B, 64)) < 0.3
    allowed[4] = False
    mask = np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
    wanted = np.where(allowed[:, :V], logits, -np.inf).argmax(axis=1)
    wanted[4] = -2
    np.testing.assert_array_equal(np.asarray(run(logits, make_inputs(Feature.MASK, mask=mask)).tokens), wanted)
    drawn = make_inputs(Feature.MASK | Feature.RANDOM, mask=mask, temperature=5, seed=rng.integers(0, 99, (B, 2)))
    tokens = np.asarray(run(logits, drawn).tokens)
    assert tokens[4] == -2 and all(allowed[row, token] for row, token in enumerate(tokens) if row != 4)


def test_penalties():
    rng = np.random.default_rng(2)
    logits, history = draw_logits(2), rng.integers(0, V, (B, S))
    position, prompt_len = rng.integers(4, S, B), rng.integers(1, 4, B)
    repetition, frequency, presence = rng.uniform(0.5, 2, B), rng.uniform(-2, 2, B), rng.uniform(-2, 2, B)
    wanted = logits.astype(np.float64)
    for row in range(B):
        prompt, output = history[row, : prompt_len[row]], history[row, prompt_len[row] : position[row]]
        for token in set(prompt) | set(output):
            value = wanted[row, token]
            wanted[row, token] = value / repetition[row] if value > 0 else value * repetition[row]
        for token in set(output):
            wanted[row, token] -= frequency[row] * list(output).count(token) + presence[row]
    inputs = make_inputs(
        Feature.PENALTIES,
        history=history,
        position=position,
        prompt_len=prompt_len,
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
    )
    # Each token in turn is given just enough to win or just not enough, so that the argmax shows its logit.
    for token in range(V):
        rest = np.delete(wanted, token, axis=1).max(axis=1)
        for margin, wins in ((1e-3, True), (-1e-3, False)):
            boost = rest - wanted[:, token] + margin
            adjusted = dataclasses.replace(
                inputs,
                features=jnp.int32(Feature.PENALTIES | Feature.ADJUST),
                adjust_ids=jnp.full((B, A), -1, jnp.int32).at[:, 0].set(token),
                adjust_values=jnp.zeros((B, A)).at[:, 0].set(boost.astype(np.float32)),
                adjust_until=jnp.full((B, A), MAX_INT, jnp.int32),
            )
            assert ((np.asarray(run(logits, adjusted).tokens) == token) == wins).all()


def test_adjustments_end_at_their_position():
    logits = draw_logits(3)
    best, second = np.argsort(-logits, axis=1)[:, :2].T
    ids = np.full((B, A), -1)
    ids[:, 2] = best
    values = np.full((B, A), -np.inf)
    until = np.where(np.arange(B) % 2, 10, 9)[:, None]
    inputs = make_inputs(Feature.ADJUST, adjust_ids=ids, adjust_values=values, adjust_until=until, position=9)
    np.testing.assert_array_equal(np.asarray(run(logits, inputs).tokens), np.where(np.arange(B) % 2, second, best))


def test_adjustments_of_one_token_add_up():
    logits = np.zeros((B, V), np.float32)
    logits[:, 4] = 2.5
    inputs = make_inputs(Feature.ADJUST, adjust_ids=7, adjust_values=0.5, adjust_until=MAX_INT)
    assert (np.asarray(run(logits, inputs).tokens) == 7).all()


@pytest.mark.parametrize("seed", range(4))
def test_truncation_keeps_exactly_the_defined_set(seed):
    """Every token of some probability is drawn, and none outside the set."""
    rng = np.random.default_rng(seed)
    settings = {
        "top_k": int(rng.choice([0, 1, 3, 20, V, 1000])),
        "top_p": float(rng.choice([1.0, rng.uniform(0.2, 0.99)])),
        "min_p": float(rng.choice([0.0, rng.uniform(0.01, 0.3)])),
        "temperature": float(rng.uniform(1, 4)),
    }
    logits = draw_logits(seed, 1, 1.0)[0]
    keep, p = support(logits, **settings)
    draws = draw_many(logits, 20000, **settings)
    common = np.flatnonzero(p > 1e-3)
    assert set(common) <= set(draws) <= set(np.flatnonzero(keep))


def kept(logits, ways, **fields):
    """The kept sets of rows of logits, from the threshold itself."""
    inputs = make_inputs(0, len(logits), **fields)
    weights = jnp.exp((logits - logits.max(axis=1, keepdims=True)) / inputs.temperature[:, None])
    by_count = (inputs.top_k > 0) & (inputs.top_k < V)
    run = jax.jit(truncation.search, static_argnames="ways")
    least = run(weights, inputs.top_p < 1, by_count, inputs.min_p, inputs.top_k, inputs.top_p, ways=ways)
    return np.asarray(weights >= least[:, None])


@pytest.mark.parametrize("ways", [2, 8])  # of a CPU, and of the others
def test_thresholds_equal_those_of_sorting(ways):
    rng, batch = np.random.default_rng(5), 300
    logits = (rng.standard_normal((batch, V)) * rng.uniform(0.1, 8, (batch, 1))).astype(np.float32)
    top_k = rng.choice([0, 1, 2, 5, 40, V - 1, V, 99], batch)
    top_p = np.where(rng.random(batch) < 0.3, 1, rng.uniform(0.01, 0.999, batch)).astype(np.float32)
    min_p = np.where(rng.random(batch) < 0.5, 0, rng.uniform(0, 1, batch)).astype(np.float32)
    temperature = rng.uniform(0.3, 3, batch).astype(np.float32)
    mine = kept(logits, ways, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    for row in range(batch):
        wanted, _ = support(logits[row], temperature[row], top_k[row], top_p[row], min_p[row])
        np.testing.assert_array_equal(mine[row], wanted, err_msg=f"row {row}")


@pytest.mark.parametrize("ways", [2, 8])
def test_ties_at_a_threshold_are_kept_together(ways):
    logits = np.array([[3, 2, 2, 2, 1, 0, -np.inf] + [-5] * (V - 7)], np.float32)
    assert kept(logits, ways, temperature=1, top_k=2)[0].nonzero()[0].tolist() == [0, 1, 2, 3]
    assert kept(logits, ways, temperature=1, top_k=4)[0].nonzero()[0].tolist() == [0, 1, 2, 3]
    assert kept(logits, ways, temperature=1, top_p=0.6)[0].nonzero()[0].tolist() == [0, 1, 2, 3]
    assert kept(logits, ways, temperature=1, min_p=1.0)[0].nonzero()[0].tolist() == [0]
    assert kept(np.zeros((1, V), np.float32), ways, temperature=1, top_k=1, top_p=0.1).all()


def test_a_forbidden_token_is_never_drawn():
    logits = np.full(V, -np.inf, np.float32)
    logits[[3, 8]] = 0
    assert set(draw_many(logits, 200, temperature=1)) == {3, 8}
    assert set(draw_many(logits, 200, temperature=1, top_p=0.9)) == {3, 8}


def test_a_draw_depends_on_seed_and_position_alone():
    rng, batch = np.random.default_rng(6), 9
    logits = draw_logits(6, batch, 1.0)
    fields = {
        "temperature": rng.uniform(0.5, 2, batch),
        "top_p": rng.uniform(0.5, 1, batch),
        "top_k": rng.integers(0, 30, batch),
        "seed": rng.integers(0, 2**32, (batch, 2)),
        "position": rng.integers(1, S, batch),
        "history": rng.integers(0, V, (batch, S)),
        "frequency_penalty": rng.uniform(0, 1, batch),
    }
    together = np.asarray(run(logits, make_inputs(ALL, batch, **fields)).tokens)
    order = rng.permutation(batch)
    moved = run(logits[order], make_inputs(ALL, batch, **{name: x[order] for name, x in fields.items()}))
    np.testing.assert_array_equal(np.asarray(moved.tokens), together[order])
    for row in (0, batch - 1):
        alone = run(logits[[row]], make_inputs(ALL, 1, **{name: x[[row]] for name, x in fields.items()}))
        assert alone.tokens[0] == together[row]
    later = run(logits, make_inputs(ALL, batch, **{**fields, "position": fields["position"] + 1}))
    reseeded = run(logits, make_inputs(ALL, batch, **{**fields, "seed": fields["seed"] ^ [0, 1]}))
    assert (np.asarray(later.tokens) != together).any() and (np.asarray(reseeded.tokens) != together).any()


@pytest.mark.parametrize("features", [0, Feature.RANDOM | Feature.TRUNCATE, ALL])
def test_nan_is_reported_and_stays_in_its_row(features):
    logits = draw_logits(7)
    inputs = make_inputs(features, temperature=1, top_p=0.9, top_k=9, seed=np.arange(2 * B).reshape(B, 2))
    clean = np.asarray(run(logits, inputs).tokens)
    logits[3, 11] = np.nan
    tokens = np.asarray(run(logits, inputs).tokens)
    assert tokens[3] == -1
    np.testing.assert_array_equal(np.delete(tokens, 3), np.delete(clean, 3))


def _log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def test_logprobs_are_those_of_the_raw_logits():
    logits = draw_logits(8)
    inputs = make_inputs(ALL, temperature=3, top_k=7, history=4, presence_penalty=2, seed=np.arange(12).reshape(6, 2))
    out = run(logits, inputs)
    wanted, tokens = _log_softmax(logits), np.asarray(out.tokens)
    np.testing.assert_allclose(out.logprob, wanted[np.arange(B), tokens], atol=1e-5)
    np.testing.assert_array_equal(out.rank, 1 + (logits > logits[np.arange(B), tokens][:, None]).sum(axis=1))
    order = np.argsort(-logits, axis=1, kind="stable")[:, :20]
    np.testing.assert_array_equal(out.top_ids, order)
    np.testing.assert_allclose(out.top_logprobs, np.take_along_axis(wanted, order, axis=1), atol=1e-5)
    without = run(logits, dataclasses.replace(inputs, features=inputs.features & ~Feature.LOGPROBS))
    np.testing.assert_array_equal(without.tokens, tokens)
    assert not any(np.asarray(part).any() for part in without[1:])


def test_a_small_vocabulary_has_fewer_top_tokens():
    out = run(draw_logits(9)[:, :5], make_inputs(Feature.LOGPROBS))
    assert (np.asarray(out.top_ids)[:, 5:] == -1).all() and np.isneginf(np.asarray(out.top_logprobs)[:, 5:]).all()


def test_one_program_serves_every_combination():
    traces = []

    @jax.jit
    def traced(logits, inputs):
        traces.append(1)
        return sample(logits, inputs)

    for features in range(32):
        traced(draw_logits(), make_inputs(features, temperature=1, top_p=0.9))
    assert len(traces) == 1


@pytest.mark.parametrize("method", ["add", "set"])
def test_scatter_row_by_row_is_scatter_at_once(method):
    rng = np.random.default_rng(3)
    target = jnp.asarray(rng.integers(0, 9, (5, 40)), jnp.int32)
    ids = jnp.asarray(rng.integers(0, 44, (5, 60)), jnp.int32)  # some past the end, many twice
    values = jnp.full((5, 60), 7, jnp.int32)
    ways = [way(method, target, ids, values) for way in (sampler._scatter_at_once, sampler._scatter_by_row)]
    np.testing.assert_array_equal(*ways)
