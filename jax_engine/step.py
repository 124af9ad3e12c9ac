"""The programs of a step: pure functions from weights, cache and batch to new cache and sampled tokens.

model_runner.py compiles and dispatches them one after the other: `compute` once per bucket, `choose_likeliest` or
`choose` once per number of sequences, and, where the log-probabilities of prompts are asked for, `pick` and `score`
for each block of tokens. So the model's program has no conditions. Nothing here waits or reads back.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jax_engine.batch import FLOAT_FIELDS, INT_FIELDS, Adjustments, BatchLayout
from jax_engine.constraints import Constraints
from jax_engine.kv_cache import KVCache
from jax_engine.layers.context import StepContext
from jax_engine.layers.parallel import sums_take
from jax_engine.sampler import SamplerOutput, SamplingInputs, greedy, sample, token_logprobs
from pallas_kernels.ragged_paged_attention import api as attention_op


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepOutput:
    """What the model gives back besides the cache.

    Attributes:
        rows: [size] int32, the packed batch without its tokens, as the BatchLayout of Bucket(0, B, False) has it. Rows
            that have ended are in the slot of padding, so that what is sampled for them goes nowhere: what ended a row
            stays its slot's last token.
        logits: [B, V] float32 of each row's last token. last_hidden: [B, D], the hidden state they were made of.
        hidden: [T, D] of every token; None in a bucket for decode only, whose tokens are their rows' last.
    """

    rows: Int[Array, " size"]
    logits: Float[Array, "B V"]
    last_hidden: Float[Array, "B D"]
    hidden: Float[Array, "T D"] | None


def compute(
    graph: nnx.GraphDef,
    layout: BatchLayout,
    page_size: int,
    device: attention_op.Device,
    one_way: bool,
    weights: Any,
    cache: KVCache,
    packed: Int[Array, " size"],
) -> tuple[KVCache, StepOutput]:
    """Computes the batch's tokens, and the logits of the last of each row.

    Args:
        graph: the model without its weights. layout: of `packed`. page_size: tokens in a page. device: what the
            program is for. one_way: see StepContext. All of these are static.
        weights: the model's weights as plain dicts.
        cache: donated.
        packed: see BatchLayout.

    Returns:
        The cache with the keys and values of the batch's tokens in it, and what sampling needs.
    """
    model = nnx.merge(graph, weights)
    parts = layout.unpack(packed)
    num_single, _ = parts["scalars"]
    ended = ended_rows(parts, cache.last_tokens)
    move_to_one_key(parts, ended, layout, page_size)
    query_starts = parts["query_starts"]
    group_plans = plans(layout, page_size, device, parts, ended, cache, model.config.mla is not None)
    plan = group_plans[0]
    ids = parts["token_ids"]
    ids = jnp.where(ids >= 0, ids, cache.last_tokens[jnp.maximum(-1 - ids, 0)])
    places = jnp.where(plan.slots >= 0, plan.slots, cache.token_ids.size)  # past the end: dropped
    token_ids = cache.token_ids.at[places].set(ids, mode="drop")
    context = StepContext(
        plan,
        parts["slots"],
        query_starts,
        num_single,
        layout.bucket.decode_only,
        group_plans,
        device.platform,
        cache.kv_scales,
        one_way,
        device.kind,
        cache.peers,
    )
    with sums_take(cache.peers):
        hidden, pool = model(ids, cache.pool, context)

    last = jnp.maximum(query_starts[1:] - 1, 0)
    last_hidden = hidden[last]
    output = StepOutput(
        _rows(layout, packed, ended, padding_slot=cache.last_tokens.size - 1),
        model.logits(last_hidden),
        last_hidden,
        None if layout.bucket.decode_only else hidden,
    )
    return replace(cache, pool=pool, token_ids=token_ids), output


def choose_likeliest(
    layout: BatchLayout, last_tokens: Int[Array, " slots"], rows: Int[Array, " size"], logits: Float[Array, "B V"]
) -> tuple[Int[Array, " slots"], Int[Array, " B"]]:
    """Greedy sampling, for a step in which no row uses a feature of features.SAMPLING.

    Args:
        layout: of `rows`, static.
        last_tokens: of the cache, donated.
        rows, logits: see StepOutput.

    Returns:
        The cache's last tokens, updated in the rows' slots; and the most likely token of each row.
    """
    tokens = greedy(logits)
    return last_tokens.at[layout.unpack(rows)["slots"]].set(tokens), tokens


def choose(
    layout: BatchLayout,
    page_size: int,
    last_tokens: Int[Array, " slots"],
    rows: Int[Array, " size"],
    logits: Float[Array, "B V"],
    token_ids: Int[Array, " places"],
    adjustments: Adjustments,
    constraints: Constraints,
) -> tuple[Int[Array, " slots"], SamplerOutput]:
    """Sampling with every feature, for any step.

    Args:
        page_size: tokens in a page, static. token_ids: of the cache after the step.
        adjustments, constraints: see Batch; the grammars' masks are among the constraints.
        The others: see choose_likeliest.

    Returns:
        The cache's last tokens, updated in the rows' slots; and what was sampled, with log-probabilities.
    """
    parts = layout.unpack(rows)
    sampled = sample(logits, _sampling_inputs(layout, parts, token_ids, page_size, adjustments, constraints))
    return last_tokens.at[parts["slots"]].set(sampled.tokens), sampled


def pick(hidden: Float[Array, "T D"], at: Int[Array, " n"]) -> Float[Array, "n D"]:
    """The hidden states of some of a step's tokens."""
    return hidden[at]


def score(
    graph: nnx.GraphDef, weights: Any, hidden: Float[Array, "n D"], targets: Int[Array, " n"]
) -> tuple[Array, Array, Array, Array]:
    """Log-probabilities of the tokens that follow some hidden states; see sampler.token_logprobs."""
    return token_logprobs(nnx.merge(graph, weights).logits(hidden), targets)


def _rows(
    layout: BatchLayout, packed: Int[Array, " size"], ended: Bool[Array, " B"], padding_slot: int
) -> Int[Array, " size"]:
    offset, (num_seqs,) = layout.parts["slots"]
    slots = jnp.where(ended, padding_slot, packed[offset : offset + num_seqs])
    # Not an update of a slice: that would be two nodes of a CUDA graph.
    return jnp.concatenate([packed[layout.bucket.num_tokens : offset], slots, packed[offset + num_seqs :]])


def plans(
    layout: BatchLayout,
    page_size: int,
    device: attention_op.Device,
    parts: dict[str, Array],
    ended: Bool[Array, " B"],
    cache: KVCache,
    keys_only: bool,
) -> tuple[attention_op.Plan, ...]:
    """Where the step's tokens are written and what they attend to, in the pages of each group of layers.

    Args:
        ended: rows that write nothing. keys_only: the pool has no values of its own. The others: see `compute`.
    """
    query_starts = parts["query_starts"]
    lengths = parts["starts"] + query_starts[1:] - query_starts[:-1]
    num_single, _ = parts["scalars"]

    def make_plan(page_table: Int[Array, "B P"]) -> attention_op.Plan:
        made = attention_op.plan(
            attention_op.Ragged(page_table, lengths, query_starts, num_single),
            num_tokens=layout.bucket.num_tokens,
            num_pages=cache.token_ids.size // page_size,
            page_size=page_size,
            decode_only=layout.bucket.decode_only,
            device=device,
            keys_only=keys_only,
        )
        return replace(made, slots=jnp.where(ended[made.rows], -1, made.slots))

    return tuple(map(make_plan, jnp.split(parts["page_table"], layout.num_tables, axis=1)))


def ended_rows(parts: dict[str, Array], last_tokens: Int[Array, " slots"]) -> Bool[Array, " B"]:
    """Rows whose sequence has ended, which the host will learn only later: the token they are to compute, sampled by a
    step before, is one that ends them, or came of logits with a NaN. What such a row gives is dropped."""
    first = parts["token_ids"][jnp.minimum(parts["query_starts"][:-1], parts["token_ids"].size - 1)]
    last = last_tokens[jnp.maximum(-1 - first, 0)]
    stops = (last == parts["stop_ids"]).any(axis=0)
    is_row = parts["query_starts"][1:] > parts["query_starts"][:-1]
    return is_row & (first < 0) & (stops | (last < 0))


def move_to_one_key(parts: dict[str, Array], ended: Bool[Array, " B"], layout: BatchLayout, page_size: int) -> None:
    """Moves ended rows, by changing `parts`, to position 0 of the page they stood in, where there is one key to see.

    That page is their sequence's alone. Page 0 of the sequence may be shared, and not every kernel can be told to
    write nothing.
    """
    starts, width = parts["starts"], layout.max_pages_per_seq
    column = jnp.minimum(starts // page_size, width - 1)[:, None]
    for first in range(0, layout.num_tables * width, width):
        table = parts["page_table"]
        own = jnp.take_along_axis(table, first + column, axis=1)[:, 0]
        parts["page_table"] = table.at[:, first].set(jnp.where(ended, own, table[:, first]))
    parts["starts"] = jnp.where(ended, 0, starts)


def _sampling_inputs(
    layout: BatchLayout,
    parts: dict[str, Array],
    token_ids: Int[Array, " places"],
    page_size: int,
    adjustments: Adjustments,
    constraints: Constraints,
) -> SamplingInputs:
    query_starts = parts["query_starts"]
    settings = parts["settings"]
    ints = dict(zip(INT_FIELDS, settings, strict=False))
    bits = settings[len(INT_FIELDS) :]
    floats: dict[str, Float[Array, " B"]] = dict(
        zip(FLOAT_FIELDS, jax.lax.bitcast_convert_type(bits, jnp.float32), strict=True)
    )
    seed = jnp.stack([ints.pop("seed_high"), ints.pop("seed_low")], axis=-1)
    return SamplingInputs(
        **floats,
        **ints,
        seed=jax.lax.bitcast_convert_type(seed, jnp.uint32),
        position=parts["starts"] + query_starts[1:] - query_starts[:-1],
        token_ids=token_ids,
        page_table=parts["page_table"][:, : layout.max_pages_per_seq],
        page_size=page_size,
        adjust_ids=adjustments.ids,
        adjust_values=adjustments.values,
        adjust_until=adjustments.until,
        bans=constraints.bans,
        mask=constraints.mask,
        features=parts["scalars"][1],
    )
