"""The gated delta rule in blocks and token by token, over ragged rows, against the recurrence in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_engine.layers.context import StepContext
from jax_engine.layers.delta_rule import BLOCK, DeltaInputs, delta_rule
from pallas_kernels.ragged_paged_attention import Ragged, plan

HEADS, GROUP, KEY, VALUE = 2, 2, 16, 12


def random_inputs(rng: np.random.Generator, tokens: int, kind: str) -> DeltaInputs:
    """Inputs in float32; `kind` says what is hard about them."""
    query, key = (rng.standard_normal((tokens, HEADS, KEY)) for _ in range(2))
    write = 1 / (1 + np.exp(-rng.standard_normal((tokens, HEADS, GROUP))))
    log_decay = -0.05 * rng.exponential(size=(tokens, HEADS, GROUP))
    if kind == "strong decay":  # nearly nothing is left of the past now and then, and nearly all of it in between
        log_decay = np.where(rng.random(log_decay.shape) < 0.1, -(10 ** rng.uniform(0, 4, log_decay.shape)), log_decay)
    elif kind == "no decay":
        log_decay = np.zeros_like(log_decay)
    elif kind == "keys alike":  # as of a text that repeats one token: powers of the system's matrix would be huge
        key = key[:1] + 0.01 * key
        write, log_decay = np.full_like(write, 0.999), 0.001 * log_decay
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    query /= np.linalg.norm(query, axis=-1, keepdims=True) * KEY**0.5
    value = rng.standard_normal((tokens, HEADS, GROUP, VALUE))
    return DeltaInputs(*(part.astype(np.float32) for part in (query, key, value, write, log_decay)))


def by_hand(inputs: DeltaInputs, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each token of one sequence finds, and the state after them all, token by token in float64."""
    query, key, value, write, log_decay = (np.asarray(part, np.float64) for part in inputs)
    found, state = np.zeros(value.shape), state.astype(np.float64)
    for t in range(len(value)):
        for k in range(HEADS):
            for v in range(GROUP):
                left = np.exp(log_decay[t, k, v]) * state[k, v]
                state[k, v] = left + np.outer(key[t, k], write[t, k, v] * (value[t, k, v] - key[t, k] @ left))
                found[t, k, v] = query[t, k] @ state[k, v]
    return found, state


def step_context(
    counts: list[int], starts: list[int], tokens: int, slots: list[int], one_way: bool, platform: str = "cpu"
) -> StepContext:
    """Rows of so many tokens each, which begin at these positions of their sequences; single tokens first."""
    query_starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    singles = 0 if one_way else sum(count == 1 for count in counts)
    lengths = np.add(counts, starts).astype(np.int32)
    ragged = Ragged(jnp.zeros((len(counts), 64), jnp.int32), lengths, query_starts, jnp.int32(singles))
    shared = plan(ragged, num_tokens=tokens, num_pages=64, page_size=8)
    slots_array = jnp.asarray(slots, jnp.int32)
    return StepContext(
        shared, slots_array, jnp.asarray(query_starts), jnp.int32(singles), False, platform=platform, one_way=one_way
    )


run = jax.jit(delta_rule)


@pytest.mark.parametrize(
    ("one_way", "platform"), [(False, "cpu"), (False, "gpu"), (True, "cpu")], ids=["blocks of 32", "of 64", "tokens"]
)
@pytest.mark.parametrize("kind", ["usual", "strong decay", "no decay", "keys alike"])
@pytest.mark.parametrize(
    ("counts", "tokens"),
    [
        ([1, 1, 2, BLOCK, BLOCK + 1, 0], 160),
        ([1, 3 * BLOCK + 7, BLOCK - 1], 320),
        ([500], 500),
        ([1, 5, 9], 24),
        ([1, 1, 0], 2),
    ],
    ids=str,
)
def test_rows_of_any_length_go_on_from_their_states(counts, tokens, kind, one_way, platform):
    rng = np.random.default_rng(sum(counts))
    inputs = random_inputs(rng, tokens, kind)
    states = rng.standard_normal((2, len(counts) + 1, HEADS, GROUP, KEY, VALUE)).astype(np.float32)
    starts = [0 if number % 2 else 40 for number in range(len(counts))]  # every other row starts anew
    slots = list(rng.permutation(len(counts)))
    slots = [len(counts) if count == 0 else int(slot) for count, slot in zip(counts, slots, strict=True)]
    context = step_context(counts, starts, tokens, slots, one_way, platform)
    found, after = run(inputs, states, context, jnp.int32(1))
    np.testing.assert_array_equal(after[0], states[0])
    first = 0
    for count, slot, start in zip(counts, slots, starts, strict=True):
        if not count:
            continue
        row = DeltaInputs(*(part[first : first + count] for part in inputs))
        want, state = by_hand(row, states[1, slot] if start else np.zeros_like(states[1, slot]))
        np.testing.assert_allclose(found[first : first + count], want, rtol=0, atol=2e-5)
        np.testing.assert_allclose(after[1, slot], state, rtol=0, atol=2e-5)
        first += count
    untouched = sorted(set(range(len(counts))) - set(slots))
    np.testing.assert_array_equal(after[1, untouched], states[1, untouched])


def test_bits_do_not_depend_on_the_cut_where_they_may_not():
    rng = np.random.default_rng(5)
    inputs = random_inputs(rng, 96, "usual")
    states = np.zeros((1, 2, HEADS, GROUP, KEY, VALUE), np.float32)

    def take(cuts: list[int], one_way: bool) -> tuple[np.ndarray, np.ndarray]:
        found, after = [], states
        for start, end in zip([0, *cuts], [*cuts, 96], strict=True):
            part = DeltaInputs(*(np.roll(each, -start, axis=0) for each in inputs))
            out, after = run(part, after, step_context([end - start], [start], 96, [0], one_way), jnp.int32(0))
            found.append(out[: end - start])
        return np.concatenate(found), after[0, 0]

    whole, cut = take([], True), take([1, 2, 40, 41], True)
    np.testing.assert_array_equal(whole[0], cut[0])
    np.testing.assert_array_equal(whole[1], cut[1])
    for got, want in zip(take([1, 2, 40, 41], False), whole, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
