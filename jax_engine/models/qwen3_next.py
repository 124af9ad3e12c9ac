"""Qwen3-Next (Qwen, 2025): three of four layers are gated delta nets, the fourth is gated attention; all are sparse."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from checkpoints.weight_map import Source, fuse, take
from jax_engine.hf_config import HFConfig
from jax_engine.layers.attention import Attention
from jax_engine.layers.context import StepContext
from jax_engine.layers.mlp import GatedMLP
from jax_engine.layers.moe import MoE
from jax_engine.layers.norm import RMSNorm
from jax_engine.layers.recurrent import GatedDeltaNet, RecurrentCache
from jax_engine.model_config import DeltaConfig, LayerConfig, ModelConfig
from jax_engine.models import weights
from jax_engine.models.decoder import Decoder
from jax_engine.models.qwen3_moe import mlp_sources, read_moe, read_sparse_layers


class Qwen3NextLayer(nnx.Module):
    """Delta net or attention, and feed-forward, each behind a norm that scales by 1 + weight."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, dtype: jnp.dtype):
        self.input_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype, unit_offset=True)
        self.post_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype, unit_offset=True)
        if layer.recurrent:
            self.delta = GatedDeltaNet(config, dtype)
        else:
            self.attention = Attention(config, layer, dtype, qk_norm="head", unit_offset=True, gated=True)
        if layer.sparse:
            self.mlp = MoE(config, dtype)
        else:
            self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, dtype, activation=config.activation)
        self.recurrent = layer.recurrent

    def __call__(
        self, x: Float[Array, "T D"], cache: RecurrentCache, context: StepContext, place: Array
    ) -> tuple[Float[Array, "T D"], Any]:
        if self.recurrent:
            mixed, cache = self.delta(self.input_norm(x), cache, context, place)
        else:
            mixed, pages = self.attention(self.input_norm(x), cache.pages, context, place)
            cache = cache._replace(pages=pages)
        x = x + mixed
        return x + self.mlp(self.post_norm(x)), cache


class Qwen3Next(Decoder):
    """See Qwen3NextLayer."""

    #: The heads that predict further tokens have no part in the first.
    IGNORED_TENSORS = (*Decoder.IGNORED_TENSORS, "mtp.*")
    layer_class = Qwen3NextLayer

    def make_norm(self, config: ModelConfig, dtype: jnp.dtype) -> nnx.Module:
        """See Decoder."""
        return RMSNorm(config.hidden_size, config.norm_eps, dtype, unit_offset=True)

    @classmethod
    def read_config(cls, hf: HFConfig) -> ModelConfig:
        """See Decoder."""
        base = hf.base(head_dim=256)
        num_layers, interval = base["num_hidden_layers"], hf.size("full_attention_interval", 4)
        kinds = ("linear_attention", "full_attention")
        numbers = range(1, num_layers + 1)
        by_number = ["linear_attention" if number % interval else "full_attention" for number in numbers]
        types = hf.choices("layer_types", kinds, by_number)
        sparse = read_sparse_layers(hf, num_layers)
        hf.only("use_sliding_window", False)
        bias = hf.flag("attention_bias")
        shared = hf.size("shared_expert_intermediate_size", 512)
        return hf.finish(
            **base,
            ropes=(hf.rope(base["head_dim"], partial=0.25),),
            layers=tuple(
                LayerConfig(recurrent=kind == "linear_attention", sparse=is_sparse)
                for kind, is_sparse in zip(types, sparse, strict=True)
            ),
            attention_bias=bias,
            output_bias=bias,
            moe=read_moe(
                hf,
                num_experts=512,
                experts_per_token=10,
                hidden=512,
                normalize=True,
                shared_size=shared,
                shared_gate=True,
            ),
            delta=_read_delta(hf),
        )

    @classmethod
    def layer_sources(cls, config: ModelConfig, layer: LayerConfig, name: str) -> dict[str, Source]:
        """See Decoder."""
        sources = {
            **weights.norm("input_norm", name + "input_layernorm", config),
            **weights.norm("post_norm", name + "post_attention_layernorm", config),
            **mlp_sources(config, layer, name + "mlp."),
        }
        if layer.sparse:
            assert config.moe is not None
            gate = name + "mlp.shared_expert_gate.weight"
            sources |= weights.gated_mlp("mlp.shared", name + "mlp.shared_expert.", config, config.moe.shared_size)
            sources["mlp.shared_gate"] = take(gate, (1, config.hidden_size))
        if layer.recurrent:
            return sources | _delta_sources(config, name + "linear_attn.")
        return sources | weights.attention("attention", name + "self_attn.", config, qk_norm="head", gated=True)


def _read_delta(hf: HFConfig) -> DeltaConfig:
    delta = DeltaConfig(
        num_key_heads=hf.size("linear_num_key_heads", 16),
        num_value_heads=hf.size("linear_num_value_heads", 32),
        key_dim=hf.size("linear_key_head_dim", 128),
        value_dim=hf.size("linear_value_head_dim", 128),
        width=hf.size("linear_conv_kernel_dim", 4),
    )
    if delta.num_value_heads % delta.num_key_heads:
        hf.problem(f"{delta.num_value_heads} value heads are no multiple of {delta.num_key_heads} key heads")
    if delta.width < 2:
        hf.problem(f"linear_conv_kernel_dim must be at least 2, got {delta.width}")
    return delta


def _delta_sources(config: ModelConfig, name: str) -> dict[str, Source]:
    delta, embed = config.delta, config.hidden_size
    assert delta is not None
    heads, group = delta.num_key_heads, delta.num_value_heads // delta.num_key_heads
    keys, values = heads * delta.key_dim, delta.num_value_heads * delta.value_dim

    def by_head(array: np.ndarray) -> np.ndarray:
        return array.reshape(heads, -1, embed)

    def by_key_head(array: np.ndarray) -> np.ndarray:
        return array.reshape(heads, group)

    def taps(convolution: np.ndarray) -> np.ndarray:
        # Stored as all queries, all keys, all values; here each key head has its own beside each other.
        parts = np.split(convolution, [keys, 2 * keys])
        return np.concatenate([part.reshape(heads, -1, delta.width) for part in parts], axis=1)

    def split(output: np.ndarray) -> np.ndarray:
        return output.reshape(embed, heads, -1)

    return {
        "delta.project": fuse(by_head, (name + "in_proj_qkvz.weight", (2 * keys + 2 * values, embed))),
        "delta.project_gates": fuse(by_head, (name + "in_proj_ba.weight", (2 * heads * group, embed))),
        "delta.convolution": fuse(taps, (name + "conv1d.weight", (2 * keys + values, 1, delta.width))),
        "delta.log_decay": fuse(by_key_head, (name + "A_log", (delta.num_value_heads,))),
        "delta.time_bias": fuse(by_key_head, (name + "dt_bias", (delta.num_value_heads,))),
        **weights.norm("delta.norm", name + "norm", config, delta.value_dim),
        "delta.output": fuse(split, (name + "out_proj.weight", (embed, values))),
    }
