"""The sampler: from logits to tokens and log-probabilities, on the device.

Called by step.py: `greedy` where all rows are and nobody asks for log-probabilities, else `sample`, one program for
every setting: each optional part stands under `lax.cond` on its bit of `features`, so that a batch nobody uses it in
does not pay for it, and no combination of settings compiles anything. It never reads anything back, never keeps state,
and never looks at a row's slot or neighbours: randomness is a function of seed and position.
"""

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.random import threefry_2x32
from jaxtyping import Array, Float, Int32, UInt32

from jax_engine.features import Feature
from jax_engine.truncation import least_weight

#: Most tokens reported beside the chosen one.
NUM_TOP_LOGPROBS = 20
#: Temperatures below this one are greedy.
GREEDY_TEMPERATURE = 1e-5


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingInputs:
    """One row per sequence of the step. A axis: adjustments; S axis: positions; W and L axes: bans and their tokens;
    M axis: words of 32 tokens.

    Attributes:
        temperature: below GREEDY_TEMPERATURE: greedy. top_p: 1 for off. min_p: 0 for off. top_k: below 1 for off.
        presence_penalty, frequency_penalty: 0 for off. repetition_penalty: 1 for off.
        seed: the two words of the sequence's random key. position: where in the sequence the sampled token will stand.
        prompt_len: number of prompt tokens.
        token_ids, page_table, page_size: where each row's token ids stand, the prompt, then the output: that of
            position p at page_table[row, p // page_size] * page_size + p % page_size; valid below `position`.
        adjust_ids, adjust_values, adjust_until: `value` is added to the logit of `id` while position < `until`; an id
            below 0 is unused. Serves logit_bias (until: the largest int32) and min_tokens (value: -inf).
        bans, mask: see constraints.Constraints.
        features: Feature bits.
    """

    temperature: Float[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    presence_penalty: Float[Array, "B"]
    frequency_penalty: Float[Array, "B"]
    repetition_penalty: Float[Array, "B"]
    top_k: Int32[Array, "B"]
    seed: UInt32[Array, "B 2"]
    position: Int32[Array, "B"]
    prompt_len: Int32[Array, "B"]
    token_ids: Int32[Array, " places"]
    page_table: Int32[Array, "B P"]
    adjust_ids: Int32[Array, "B A"]
    adjust_values: Float[Array, "B A"]
    adjust_until: Int32[Array, "B A"]
    bans: Int32[Array, "B W L"]
    mask: Int32[Array, "B M"]
    features: Int32[Array, ""]
    page_size: int = field(metadata={"static": True})

    def history(self) -> Int32[Array, "B S"]:
        """Token ids by position. Large, so only those ask who need it."""
        places = self.page_table[:, :, None] * self.page_size + jnp.arange(self.page_size, dtype=jnp.int32)
        return self.token_ids[places.reshape(places.shape[0], -1)]


class SamplerOutput(NamedTuple):
    """What `sample` chose. The log-probability fields are zero unless Feature.LOGPROBS is set.

    Attributes:
        tokens: [B] int32; -1 where the row's logits hold NaN, -2 where every token is forbidden.
        logprob, rank: of the token, in the raw logits. rank is 1 + the number of likelier tokens.
        top_ids, top_logprobs: the likeliest tokens, likeliest first, lowest id first among equals; -1 and -inf where
            the vocabulary has no more.
    """

    tokens: Int32[Array, "B"]
    logprob: Float[Array, "B"]
    rank: Int32[Array, "B"]
    top_ids: Int32[Array, "B 20"]
    top_logprobs: Float[Array, "B 20"]


def sample(logits: Float[Array, "B V"], inputs: SamplingInputs) -> SamplerOutput:
    """Chooses one token per row.

    Order: repetition penalty (prompt and output; CTRL, arXiv 1909.05858), frequency and presence penalty (output),
    adjustments, bans and mask, temperature, min_p, top_k, top_p (nucleus sampling, arXiv 1904.09751, on what min_p and
    top_k left), then a draw by the exponential race, which is the Gumbel-max method with one logarithm less.
    Log-probabilities are those of `logits` before all of this.

    Truncation is exact on the float32 weights exp((x - max) / temperature): tokens of equal weight are kept or dropped
    together, so ties at a threshold are all kept; the token whose mass crosses top_p is kept.

    Args:
        logits: float32. Minus infinity forbids a token.
    """
    has = _has(inputs)
    # One switch and no condition that hands the logits through: on a GPU that would copy them.
    path = jnp.where(has(_CHANGES), 2, jnp.where(has(Feature.RANDOM), 1, 0))
    tokens = jax.lax.switch(
        path,
        [
            lambda: greedy(logits),
            lambda: _choose(logits, inputs),
            lambda: _choose(_change(logits, inputs), inputs),
        ],
    )
    shape = jax.eval_shape(token_logprobs, logits, tokens)
    parts = jax.lax.cond(
        has(Feature.LOGPROBS),
        lambda: token_logprobs(logits, tokens),
        lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape),
    )
    return SamplerOutput(tokens, *parts)


def _has(inputs):
    return lambda features: (inputs.features & int(features)) != 0


def greedy(logits: Float[Array, "B V"]) -> Int32[Array, "B"]:
    """Index of each row's first largest logit; -1 for a row with NaN, -2 for one of minus infinities."""
    return _top(logits)[1]


def _top(logits):
    """Each row's largest logit [B, 1], and its index as `greedy` has it."""
    # XLA's own argmax is one pass, but several times slower than two plain ones on a CPU.
    value, first = jax.lax.platform_dependent(logits, cpu=_top_in_two_passes, default=_top_in_one_pass)
    first = jnp.where(value[:, 0] == -jnp.inf, -2, first)
    return value, jnp.where(jnp.isnan(value[:, 0]), -1, first)


def _top_in_two_passes(logits):
    value = logits.max(axis=-1, keepdims=True)
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return value, jnp.where(logits == value, ids, logits.shape[1]).min(axis=-1)


def _top_in_one_pass(logits):
    first = jax.lax.argmax(logits, 1, jnp.int32)
    return jnp.take_along_axis(logits, first[:, None], axis=1), first


def _choose(logits, inputs):
    """Tokens of rows any of which may have a temperature."""
    top, likeliest = _top(logits)
    drawn = jax.lax.cond(_has(inputs)(Feature.RANDOM), lambda: _draw(logits, top, inputs), lambda: likeliest)
    greedy = (inputs.temperature < GREEDY_TEMPERATURE) | (likeliest < 0)
    return jnp.where(greedy, likeliest, drawn)


#: What makes other logits of the model's.
_MASKS = Feature.MASK | Feature.GRAMMAR
_CHANGES = Feature.PENALTIES | Feature.ADJUST | Feature.BANS | _MASKS


def _change(logits, inputs):
    """Logits after penalties, adjustments, bans and mask, as far as any row has them."""
    has = _has(inputs)
    logits = jax.lax.cond(has(Feature.PENALTIES), lambda: _penalize(logits, inputs), lambda: logits)
    adjusted = jax.lax.cond(has(Feature.ADJUST), lambda: _adjust(logits, inputs), lambda: logits)
    allowed = jax.lax.cond(has(Feature.BANS), lambda: _ban(adjusted, inputs), lambda: adjusted)
    return jax.lax.cond(has(_MASKS), lambda: _mask(allowed, inputs), lambda: allowed)


def _penalize(logits, inputs):
    """Logits after the three penalties."""
    batch, vocab_size = logits.shape
    history = inputs.history()
    at = jnp.arange(history.shape[1], dtype=jnp.int32)
    known = (at < inputs.position[:, None]) & (history >= 0)
    output = known & (at >= inputs.prompt_len[:, None])

    def count(which):
        ids = jnp.where(which, history, vocab_size)
        return _scatter("add", jnp.zeros((batch, vocab_size), jnp.int32), ids, jnp.ones_like(ids))

    counts = count(output)
    seen = (count(known & ~output) > 0) | (counts > 0)
    repetition = inputs.repetition_penalty[:, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / repetition, logits * repetition), logits)
    logits = logits - inputs.frequency_penalty[:, None] * counts
    return logits - inputs.presence_penalty[:, None] * (counts > 0)


def _adjust(logits, inputs):
    """Logits plus each row's adjustments that are in force at its position."""
    in_force = (inputs.adjust_ids >= 0) & (inputs.position[:, None] < inputs.adjust_until)
    return _scatter("add", logits, jnp.where(in_force, inputs.adjust_ids, logits.shape[1]), inputs.adjust_values)


def _scatter(method, target, ids, values):
    """target [B, V] after `add` or `set` of values [B, A] at ids [B, A]; an id past the vocabulary changes nothing."""
    # A TPU sorts the indices of a large scatter, and takes minutes to compile the sort; not so for those of one row.
    return jax.lax.platform_dependent(
        target,
        ids,
        values,
        tpu=functools.partial(_scatter_by_row, method),
        default=functools.partial(_scatter_at_once, method),
    )


def _scatter_at_once(method, target, ids, values):
    rows = jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None]
    return getattr(target.at[rows, ids], method)(values, mode="drop")


def _scatter_by_row(method, target, ids, values):
    return jax.lax.map(lambda row: getattr(row[0].at[row[1]], method)(row[2], mode="drop"), (target, ids, values))


def _ban(logits, inputs):
    """Logits without the tokens that would complete one of a row's bans."""
    before, last = inputs.bans[:, :, :-1], inputs.bans[:, :, -1]
    at = inputs.position[:, None] - before.shape[2] + jnp.arange(before.shape[2], dtype=jnp.int32)
    tail = jnp.take_along_axis(inputs.history(), jnp.maximum(at, 0), axis=1)
    tail = jnp.where(at >= inputs.prompt_len[:, None], tail, -2)  # only the output counts
    completes = ((before == tail[:, None]) | (before < 0)).all(axis=-1) & (last >= 0)
    return _scatter("set", logits, jnp.where(completes, last, logits.shape[1]), jnp.full(last.shape, -jnp.inf))


def _mask(logits, inputs):
    """Logits without the tokens whose bit in the mask is not set."""
    bits = (inputs.mask[:, :, None] >> jnp.arange(32, dtype=jnp.int32)) & 1
    return jnp.where(bits.reshape(logits.shape[0], -1)[:, : logits.shape[1]] == 1, logits, -jnp.inf)


def _draw(logits, top, inputs):
    """A random token per row, in proportion to the weights that truncation leaves; top [B, 1] is the largest logit."""
    temperature = jnp.maximum(inputs.temperature, GREEDY_TEMPERATURE)[:, None]
    weights = jnp.exp(jnp.where(logits == top, 0, (logits - top) / temperature))
    active = inputs.temperature >= GREEDY_TEMPERATURE
    least = jax.lax.cond(
        _has(inputs)(Feature.TRUNCATE),
        lambda: least_weight(weights, active, inputs.min_p, inputs.top_k, inputs.top_p),
        lambda: jnp.zeros(logits.shape[0], jnp.float32),
    )
    race = weights / _exponentials(inputs.seed, inputs.position, logits.shape[1])
    return greedy(jnp.where(weights >= least[:, None], race, -1))


def _exponentials(seed, position, vocab_size):
    """[B, V] float32 of the unit exponential distribution; a function of seed and position alone.

    All 32 bits are used, at full relative precision near zero, where the race is decided: with the usual 23 bits a
    large flat vocabulary would tie.
    """

    def one(words, position):
        key = jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), position)
        return threefry_2x32(jax.random.key_data(key), jnp.arange(vocab_size, dtype=jnp.uint32))

    uniform = (jax.vmap(one)(seed, position).astype(jnp.float32) + 0.5) * 2.0**-32
    return -jnp.log1p(-jnp.minimum(uniform, 1 - 2.0**-24))


def token_logprobs(
    logits: Float[Array, "n V"], tokens: Int32[Array, "n"]
) -> tuple[Float[Array, "n"], Int32[Array, "n"], Int32[Array, "n 20"], Float[Array, "n 20"]]:
    """logprob, rank, top_ids and top_logprobs of given tokens in raw logits; see SamplerOutput."""
    normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, jnp.maximum(tokens, 0)[:, None], axis=1)
    rank = 1 + (logits > chosen).sum(axis=-1, dtype=jnp.int32)
    count = min(NUM_TOP_LOGPROBS, logits.shape[1])
    values, ids = _largest(logits, count)
    padding = ((0, 0), (0, NUM_TOP_LOGPROBS - count))
    top_ids = jnp.pad(ids, padding, constant_values=-1)
    top_logprobs = jnp.pad(values - normalizer, padding, constant_values=-jnp.inf)
    return (chosen - normalizer)[:, 0], rank, top_ids, top_logprobs


def _largest(logits, count):
    """Values and ids [n, count] of each row's largest logits, the lowest id first among equals.

    One pass over the vocabulary for each of them: XLA's top_k of this many sorts the whole of it on a GPU, and that
    sort cannot be part of a CUDA graph.
    """
    all_ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)

    def take(index, carry):
        values, ids, last_value, last_id = carry
        left = (logits < last_value) | ((logits == last_value) & (all_ids > last_id))
        value = jnp.where(left, logits, -jnp.inf).max(axis=-1, keepdims=True)
        first = jnp.where(left & (logits == value), all_ids, logits.shape[1]).min(axis=-1, keepdims=True)
        here = jnp.arange(count) == index  # not an update of a slice: that would leave the graph too
        return jnp.where(here, value, values), jnp.where(here, first, ids), value, first

    rows = logits.shape[0]
    blank = jnp.zeros((rows, count), logits.dtype), jnp.zeros((rows, count), jnp.int32)
    start = jnp.full((rows, 1), jnp.inf, logits.dtype), jnp.full((rows, 1), -1, jnp.int32)
    return jax.lax.fori_loop(0, count, take, (*blank, *start))[:2]
