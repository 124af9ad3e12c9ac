"""Token embedding and the projection back to the vocabulary."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jax_engine.layers.linear import matmul_float32
from jax_engine.layers.parallel import gather_columns, take_rows
from jax_engine.layers.param import declare


class Embedding(nnx.Module):
    """A vector per token; `logits` uses the same vectors where a model ties input and output."""

    def __init__(self, vocab: int, embed: int, dtype: jnp.dtype):
        self.weight = declare((vocab, embed), dtype, ("vocab", "embed"), inputs=1)
        self.dtype = dtype

    def __call__(self, ids: Int[Array, " T"]) -> Float[Array, "T D"]:
        return take_rows(self.weight, ids).astype(self.dtype)

    def logits(self, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """Scores of every token, float32."""
        return gather_columns(matmul_float32(hidden, self.weight), self.weight)
