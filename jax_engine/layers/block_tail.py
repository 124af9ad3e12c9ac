"""What a decoder layer does behind its attention as one kernel, where there is one that is faster.

Called by models/decoder.py; the kernel's contract and rule are those of pallas_kernels.block_tail.
"""

import math

import jax
from flax import nnx
from jaxtyping import Array, Float

from jax_engine.layers.attention import Attention
from jax_engine.layers.context import StepContext
from jax_engine.layers.mlp import GatedMLP
from jax_engine.layers.norm import RMSNorm
from jax_engine.layers.parallel import is_split
from pallas_kernels import block_tail


def is_plain(attention: nnx.Module, norm: nnx.Module, mlp: nnx.Module) -> bool:
    """Whether nothing is done with what attention and a gated feed-forward give, but that it is added up and normed."""
    if not (type(attention) is Attention and type(norm) is RMSNorm and type(mlp) is GatedMLP):
        return False
    return not (hasattr(attention, "output_bias") or norm.unit_offset or mlp.bias)


def takes(attention: Attention, mlp: GatedMLP, tokens: int, context: StepContext) -> bool:
    """Whether the kernel does what these layers, which are plain, do one after the other, and faster."""
    if mlp.activation != "silu":
        return False
    if not all(map(_is_whole_array, (attention.output, mlp.gate_up, mlp.down))):
        return False
    embed, *heads = attention.output.shape
    dtype = attention.output.get_value().dtype
    return block_tail.takes(tokens, embed, math.prod(heads), mlp.down.shape[1], dtype, context.device_kind)


def apply(
    attention: Attention,
    norm: RMSNorm,
    mlp: GatedMLP,
    attended: Float[Array, "T A"],
    residual: Float[Array, "T D"],
    context: StepContext,
) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
    """(residual with attention's output, what the feed-forward adds to that), for layers that `takes` accepts."""
    embed = residual.shape[1]
    return block_tail.block_tail(
        attended,
        residual,
        attention.output[...].reshape(embed, -1),
        norm.weight[...],
        mlp.gate_up[...].reshape(-1, embed),
        mlp.down[...],
        eps=norm.eps,
        device_kind=context.device_kind,
    )


def _is_whole_array(weight: nnx.Param) -> bool:
    """Not quantised, not chosen by a traced index, and not split: then sums over devices come in between."""
    return isinstance(weight.get_value(), jax.Array) and not is_split(weight)
