"""StepContext: what all layers of a step share besides their weights and the cache."""

from dataclasses import dataclass, field

import jax
from jaxtyping import Array, Int32

from pallas_kernels.ragged_paged_attention.api import Plan


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepContext:
    """Made once per step by step.py; the model adds its rotations.

    Attributes:
        plan: rows and positions of the packed tokens, and the attention op's work list, over the pages of the layer's
            group.
        slots: [B] int32, where a recurrent layer keeps row i's state; the last place for rows of padding.
        query_starts: [B + 1] int32, row i's tokens are [query_starts[i], query_starts[i + 1]).
        num_decodes: int32, how many of the first rows have one token and take the path of single tokens.
        decode_only: there are no other rows, and no code for them.
        platform: of the devices that the step is for: `cpu`, `gpu` or `tpu`.
        plans: of every group of layers, of which `plan` is one.
        kv_scales: [L, 2, K] float32, what one unit of an integer pool's numbers is worth, for each layer of the pool,
            keys and values, and kv head; None for other pools. Layers in one place of their groups share them.
        rotations: cosine and sine of every position's angles, one pair for each of ModelConfig.ropes.
    """

    plan: Plan
    slots: Int32[Array, " B"]
    query_starts: Int32[Array, " B+1"]
    num_decodes: Int32[Array, ""]
    decode_only: bool = field(metadata={"static": True})
    plans: tuple[Plan, ...] = ()
    platform: str = field(default="cpu", metadata={"static": True})
    kv_scales: Array | None = None
    rotations: tuple[tuple[Array, Array], ...] = ()
