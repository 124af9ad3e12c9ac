"""The step: one pure function from weights, cache and batch to new cache and sampled tokens.

model_runner.py compiles it once per bucket, with the cache donated. Where a row has a grammar, the step leaves the
choice of tokens to `sample_step`, which is dispatched when the mask is known. Nothing here waits or reads back.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jax_engine.batch import FLOAT_FIELDS, INT_FIELDS, Adjustments, BatchLayout
from jax_engine.constraints import Constraints
from jax_engine.features import Feature
from jax_engine.kv_cache import KVCache
from jax_engine.layers.context import StepContext
from jax_engine.layers.window_cache import ring_table
from jax_engine.sampler import SamplerOutput, SamplingInputs, prompt_logprobs, sample
from pallas_kernels.ragged_paged_attention import api as attention_op


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepOutput:
    """What a step gives back besides the cache.

    Attributes:
        sampled: a token per row, with its log-probabilities where anybody asked for them.
        logits: [B, V] of each row's last token. hidden: [B, D] float32, the hidden state they were made of.
        prompt_logprobs: (logprob [T], rank [T], top ids [T, 20], top log-probabilities [T, 20]) of the prompt targets.
    """

    sampled: SamplerOutput
    logits: Array
    hidden: Array
    prompt_logprobs: tuple[Array, Array, Array, Array]


def step(
    graph: nnx.GraphDef,
    layout: BatchLayout,
    page_size: int,
    ring_pages: int,
    device: attention_op.Device,
    weights: Any,
    cache: KVCache,
    packed: Int[Array, " size"],
    adjustments: Adjustments,
    prompt_targets: Int[Array, " T"],
    constraints: Constraints,
) -> tuple[KVCache, StepOutput]:
    """Computes the batch's tokens and samples one token per row.

    Args:
        graph: the model without its weights. layout: of `packed`. page_size: tokens in a page.
        ring_pages: pages of a slot's ring, 0 where layers with windows have none.
        device: what the program is for. All of these are static.
        weights: the model's weights as plain dicts.
        cache: donated; comes back updated.
        packed: see BatchLayout. adjustments, prompt_targets, constraints: see Batch.
    """
    model = nnx.merge(graph, weights)
    parts = layout.unpack(packed)
    num_single, features = parts["scalars"]
    ended = ended_rows(parts, cache.last_tokens)
    move_to_one_key(parts, ended, page_size)
    query_starts = parts["query_starts"]
    plan, ring_plan = plans(layout, page_size, ring_pages, device, parts, ended, cache, model.config.mla is not None)
    ids = parts["token_ids"]
    ids = jnp.where(ids >= 0, ids, cache.last_tokens[jnp.maximum(-1 - ids, 0)])
    places = jnp.where(plan.slots >= 0, plan.slots, cache.token_ids.size)  # past the end: dropped
    token_ids = cache.token_ids.at[places].set(ids, mode="drop")
    context = StepContext(
        plan, parts["slots"], query_starts, num_single, layout.bucket.decode_only, ring_plan, device.platform
    )
    hidden, pool = model(ids, cache.pool, context)

    last = jnp.maximum(query_starts[1:] - 1, 0)
    last_hidden = hidden[last]
    logits = model.logits(last_hidden)
    sampled = sample(logits, _sampling_inputs(parts, token_ids, page_size, adjustments, constraints))
    prompt = prompt_logprobs(hidden, model.logits, prompt_targets, (features & Feature.PROMPT_LOGPROBS) != 0)
    tokens = jnp.where(ended, cache.last_tokens[parts["slots"]], sampled.tokens)  # what ended a row stays its last
    last_tokens = cache.last_tokens.at[parts["slots"]].set(tokens)
    return KVCache(pool, token_ids, last_tokens), StepOutput(sampled, logits, last_hidden.astype(jnp.float32), prompt)


def sample_step(
    layout: BatchLayout,
    page_size: int,
    token_ids: Int[Array, " places"],
    last_tokens: Int[Array, " slots"],
    packed: Int[Array, " size"],
    logits: Float[Array, "B V"],
    adjustments: Adjustments,
    constraints: Constraints,
) -> tuple[Int[Array, " slots"], SamplerOutput]:
    """Samples what a deferred step left open.

    Args:
        layout: of a bucket of B sequences and no tokens. page_size: tokens in a page. Both static.
        token_ids, last_tokens: of the cache after that step; last_tokens is donated.
        packed: of that step, without its tokens, and without Feature.DEFERRED.
        logits: of that step. adjustments, constraints: as for `step`, the grammars' masks among them.
    """
    parts = layout.unpack(packed)
    sampled = sample(logits, _sampling_inputs(parts, token_ids, page_size, adjustments, constraints))
    return last_tokens.at[parts["slots"]].set(sampled.tokens), sampled


def plans(
    layout: BatchLayout,
    page_size: int,
    ring_pages: int,
    device: attention_op.Device,
    parts: dict[str, Array],
    ended: Bool[Array, " B"],
    cache: KVCache,
    keys_only: bool,
) -> tuple[attention_op.Plan, attention_op.Plan | None]:
    """Where the step's tokens are written and what they attend to: in pages, and in rings where there are any.

    Args:
        ended: rows that write nothing. keys_only: the pool has no values of its own. The others: see `step`.
    """
    query_starts = parts["query_starts"]
    lengths = parts["starts"] + query_starts[1:] - query_starts[:-1]
    num_single, _ = parts["scalars"]

    def make_plan(page_table: Int[Array, "B P"], num_pages: int) -> attention_op.Plan:
        made = attention_op.plan(
            attention_op.Ragged(page_table, lengths, query_starts, num_single),
            num_tokens=layout.bucket.num_tokens,
            num_pages=num_pages,
            page_size=page_size,
            decode_only=layout.bucket.decode_only,
            device=device,
            keys_only=keys_only,
        )
        return replace(made, slots=jnp.where(ended[made.rows], -1, made.slots))

    plan = make_plan(parts["page_table"], cache.token_ids.size // page_size)
    if not ring_pages:
        return plan, None
    rings = ring_table(parts["slots"], layout.max_pages_per_seq, ring_pages)
    return plan, make_plan(rings, cache.last_tokens.size * ring_pages)


def ended_rows(parts: dict[str, Array], last_tokens: Int[Array, " slots"]) -> Bool[Array, " B"]:
    """Rows whose sequence has ended, which the host will learn only later: the token they are to compute, sampled by a
    step before, is one that ends them, or came of logits with a NaN. What such a row gives is dropped."""
    first = parts["token_ids"][jnp.minimum(parts["query_starts"][:-1], parts["token_ids"].size - 1)]
    last = last_tokens[jnp.maximum(-1 - first, 0)]
    stops = (last == parts["stop_ids"]).any(axis=0)
    is_row = parts["query_starts"][1:] > parts["query_starts"][:-1]
    return is_row & (first < 0) & (stops | (last < 0))


def move_to_one_key(parts: dict[str, Array], ended: Bool[Array, " B"], page_size: int) -> None:
    """Lets ended rows stand at position 0, where there is one key to attend to, of the page they stood in.

    That page is their sequence's alone. Page 0 of the sequence may be shared, and not every kernel can be told to
    write nothing.
    """
    table, starts = parts["page_table"], parts["starts"]
    own = jnp.take_along_axis(table, jnp.minimum(starts // page_size, table.shape[1] - 1)[:, None], axis=1)[:, 0]
    parts["page_table"] = table.at[:, 0].set(jnp.where(ended, own, table[:, 0]))
    parts["starts"] = jnp.where(ended, 0, starts)


def _sampling_inputs(
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
        page_table=parts["page_table"],
        page_size=page_size,
        adjust_ids=adjustments.ids,
        adjust_values=adjustments.values,
        adjust_until=adjustments.until,
        bans=constraints.bans,
        mask=constraints.mask,
        features=parts["scalars"][1],
    )
