"""Mixture of experts: a router sends each token to a few of many feed-forward networks (arXiv 1701.06538, 2401.04088).

Tokens are sorted by expert, so that each expert multiplies a run of rows; nothing is dropped, and on one shape a
token's result does not depend on the other tokens.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from jax_engine.layers.linear import grouped_matmul, matmul, small, with_weight
from jax_engine.layers.mlp import FUNCTIONS, GatedMLP
from jax_engine.layers.parallel import shard_index, total
from jax_engine.layers.param import declare
from jax_engine.model_config import ModelConfig, MoEConfig


class Router(nnx.Module):
    """Chooses experts and their weights for each token, in float32."""

    def __init__(self, embed: int, moe: MoEConfig, dtype: jnp.dtype):
        self.weight = declare((moe.num_experts, embed), dtype, (None, "embed"))
        if moe.router_bias:
            self.bias = declare((moe.num_experts,), dtype, (None,), init="zeros")
        if moe.sigmoid:
            self.correction = declare((moe.num_experts,), jnp.dtype(jnp.float32), (None,), init="zeros")
        self.moe = moe

    def __call__(self, x: Float[Array, "T D"]) -> tuple[Int32[Array, "T k"], Float[Array, "T k"]]:
        """The chosen experts, likeliest first, and their weights."""
        moe = self.moe
        logits = with_weight(_logits, x, weight=self.weight)
        if moe.router_bias:
            logits = logits + self.bias[...].astype(jnp.float32)
        if moe.sigmoid:
            scores = jax.nn.sigmoid(logits)
            # The correction balances the load: it has a part in the choice, not in the weights.
            _, chosen = jax.lax.top_k(_within_groups(scores + self.correction[...], moe), moe.experts_per_token)
            weights = jnp.take_along_axis(scores, chosen, axis=1)
        else:
            weights, chosen = jax.lax.top_k(_within_groups(jax.nn.softmax(logits), moe), moe.experts_per_token)
        if moe.normalize:
            weights = weights / (weights.sum(axis=1, keepdims=True) + (1e-20 if moe.sigmoid else 0))
        return chosen, weights * moe.scaling


def _logits(x: Float[Array, "T D"], weight: Float[Array, "E D"]) -> Float[Array, "T E"]:
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _within_groups(scores: Float[Array, "T E"], moe: MoEConfig) -> Float[Array, "T E"]:
    """Scores, minus infinity outside the groups whose best experts score highest: the best one (arXiv 2405.04434), or,
    where experts are scored one by one, the best two (arXiv 2412.19437)."""
    if moe.num_groups == 1:
        return scores
    groups = scores.reshape(scores.shape[0], moe.num_groups, -1)
    best, _ = jax.lax.top_k(groups, min(2 if moe.sigmoid else 1, groups.shape[2]))
    _, chosen = jax.lax.top_k(best.sum(axis=2), moe.groups_per_token)
    allowed = (chosen[:, :, None] == jnp.arange(moe.num_groups)).any(axis=1)
    return jnp.where(allowed[:, :, None], groups, -jnp.inf).reshape(scores.shape)


class MoE(nnx.Module):
    """Router, experts, and where the model has one, an expert that all tokens pass."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype):
        assert config.moe is not None
        moe, embed, experts, hidden = (
            config.moe,
            config.hidden_size,
            config.moe.num_experts,
            config.moe.intermediate_size,
        )
        self.router = Router(embed, moe, dtype)
        self.gate_up = declare(
            (experts, 2, hidden, embed), dtype, ("expert", "gate_up", "expert_mlp", "embed"), inputs=1
        )
        self.down = declare((experts, embed, hidden), dtype, ("expert", "embed", "expert_mlp"), inputs=1)
        if moe.expert_bias:
            axes = ("expert", "gate_up", "expert_mlp")
            self.gate_up_bias = declare((experts, 2, hidden), dtype, axes, init="zeros")
            self.down_bias = declare((experts, embed), dtype, (None, "embed"), init="zeros")
        if moe.shared_size:
            self.shared = GatedMLP(embed, moe.shared_size, dtype, activation=config.activation)
        if moe.shared_gate:
            self.shared_gate = declare((1, embed), dtype, (None, "embed"))
        self.moe = moe
        self.activation = config.activation

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        chosen, weights = self.router(x)
        tokens, per_token = chosen.shape
        # Of this device's experts; what others have comes last, as if of one expert more.
        num_experts, own = self.gate_up.shape[0], chosen.reshape(-1)
        if num_experts < self.moe.num_experts:
            own = own - shard_index() * num_experts
            own = jnp.where((own >= 0) & (own < num_experts), own, num_experts)
        # Row i of the sorted rows is token order[i] // per_token.
        order = jnp.argsort(own, stable=True)
        experts = own[order]
        sizes = jnp.zeros(num_experts, jnp.int32).at[experts].add(1, mode="drop")
        gate_up = grouped_matmul(x[order // per_token], sizes, self.gate_up)
        if self.moe.expert_bias:
            biases = small(self.gate_up_bias).reshape(num_experts, -1)
            gate_up = gate_up + biases[jnp.minimum(experts, num_experts - 1)]
        down = grouped_matmul(self._gate(*jnp.split(gate_up, 2, axis=-1)), sizes, self.down)
        if num_experts < self.moe.num_experts:
            down = jnp.where((experts < num_experts)[:, None], down, 0)
        # Back to the order of tokens; each sums its experts in the router's order.
        down = jnp.zeros_like(down).at[order].set(down, unique_indices=True).reshape(tokens, per_token, -1)
        out = jnp.einsum("tkd,tk->td", down.astype(jnp.float32), weights)
        out = total(out.astype(x.dtype), self.down)
        if self.moe.expert_bias:
            biases = small(self.down_bias)[chosen].astype(jnp.float32)
            out = out + jnp.einsum("tkd,tk->td", biases, weights).astype(x.dtype)
        if self.moe.shared_size:
            shared = self.shared(x)
            out = out + (shared * jax.nn.sigmoid(matmul(x, self.shared_gate)) if self.moe.shared_gate else shared)
        return out

    def _gate(self, gate: Float[Array, "S F"], up: Float[Array, "S F"]) -> Float[Array, "S F"]:
        limit = self.moe.swiglu_limit
        if limit is None:
            return FUNCTIONS[self.activation](gate) * up
        gate = jnp.minimum(gate, limit)
        return gate * jax.nn.sigmoid(gate * self.moe.swiglu_alpha) * (jnp.clip(up, -limit, limit) + 1)
