"""StepContext: what all layers of a step share besides their weights and the cache."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from pallas_kernels.all_reduce import Peers
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
        platform: of the devices that the step is for: `cpu`, `gpu` or `tpu`. device_kind: jax's name of them.
        plans: of every group of layers, of which `plan` is one.
        kv_scales: [L, 2, K] float32, what one unit of an 8-bit pool's numbers is worth, for each layer of the pool,
            keys and values, and kv head; None for other pools. Layers in one place of their groups share them.
        one_way: single tokens are computed as longer rows are, and a token's bits may not depend on how its sequence is
            cut into steps.
        peers: for the sums over the devices; see pallas_kernels.all_reduce.
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
    one_way: bool = field(default=False, metadata={"static": True})
    device_kind: str = field(default="", metadata={"static": True})
    peers: Peers | None = None
    rotations: tuple[tuple[Array, Array], ...] = ()

    @property
    def starts_anew(self) -> Bool[Array, " B"]:
        """Rows whose first token is their sequence's first; anything for rows of padding."""
        first = jnp.minimum(self.query_starts[:-1], self.plan.positions.shape[0] - 1)
        return self.plan.positions[first] == 0
