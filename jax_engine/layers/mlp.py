"""Feed-forward layers."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jax_engine.layers.linear import matmul
from jax_engine.layers.param import declare


class GatedMLP(nnx.Module):
    """SwiGLU feed-forward (arXiv 2002.05202), gate and up from one matrix product."""

    def __init__(self, embed: int, hidden: int, dtype: jnp.dtype):
        self.gate_up = declare((2, hidden, embed), dtype, ("gate_up", "mlp", "embed"))
        self.down = declare((embed, hidden), dtype, ("embed", "mlp"))

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        gate, up = jnp.split(matmul(x, self.gate_up), 2, axis=-1)
        return matmul(jax.nn.silu(gate) * up, self.down)
