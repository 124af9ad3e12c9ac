"""Feed-forward layers."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jax_engine.layers.linear import matmul, matmul_part, small
from jax_engine.layers.parallel import Part
from jax_engine.layers.param import declare

#: The names in model_config.ACTIVATIONS -> functions.
FUNCTIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class GatedMLP(nnx.Module):
    """Gated feed-forward, SwiGLU and its like (arXiv 2002.05202), gate and up from one matrix product."""

    def __init__(self, embed: int, hidden: int, dtype: jnp.dtype, *, activation: str = "silu", bias: bool = False):
        self.gate_up = declare((2, hidden, embed), dtype, ("gate_up", "mlp", "embed"), inputs=1)
        self.down = declare((embed, hidden), dtype, ("embed", "mlp"), inputs=1)
        if bias:
            self.gate_up_bias = declare((2, hidden), dtype, ("gate_up", "mlp"), init="zeros")
            self.down_bias = declare((embed,), dtype, ("embed",), init="zeros")
        self.activation = activation
        self.bias = bias

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        down = matmul(self._gated(x), self.down)
        return down + self.down_bias[...] if self.bias else down

    def part(self, x: Float[Array, "T D"]) -> Part | Float[Array, "T D"]:
        """The same without the last sum over the devices, for layers without a bias."""
        return matmul_part(self._gated(x), self.down)

    def _gated(self, x: Float[Array, "T D"]) -> Float[Array, "T F"]:
        gate_up = matmul(x, self.gate_up)
        if self.bias:
            gate_up = gate_up + small(self.gate_up_bias).reshape(-1)
        gate, up = jnp.split(gate_up, 2, axis=-1)
        return FUNCTIONS[self.activation](gate) * up


class MLP(nnx.Module):
    """Feed-forward without a gate, with biases."""

    def __init__(self, embed: int, hidden: int, dtype: jnp.dtype, *, activation: str):
        self.up = declare((hidden, embed), dtype, ("mlp", "embed"), inputs=1)
        self.up_bias = declare((hidden,), dtype, ("mlp",), init="zeros")
        self.down = declare((embed, hidden), dtype, ("embed", "mlp"), inputs=1)
        self.down_bias = declare((embed,), dtype, ("embed",), init="zeros")
        self.activation = activation

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        up = matmul(x, self.up) + self.up_bias[...]
        return matmul(FUNCTIONS[self.activation](up), self.down) + self.down_bias[...]
