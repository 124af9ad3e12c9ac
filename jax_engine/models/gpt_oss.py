"""gpt-oss (OpenAI, 2025): sinks, windows in every other layer, YaRN, experts with biases and a clamped SwiGLU."""

import jax.numpy as jnp
import numpy as np

from checkpoints.weight_map import Source, fuse, take
from jax_engine.hf_config import HFConfig
from jax_engine.layers.attention import Attention
from jax_engine.model_config import LayerConfig, ModelConfig, MoEConfig
from jax_engine.models import weights
from jax_engine.models.decoder import Decoder, DecoderLayer


class GptOssLayer(DecoderLayer):
    """Pre-norm layer; each query head has a sink."""

    def make_attention(self, config: ModelConfig, layer: LayerConfig, dtype: jnp.dtype) -> Attention:
        """See DecoderLayer."""
        return Attention(config, layer, dtype, sinks=True)


class GptOss(Decoder):
    """See GptOssLayer and MoE."""

    layer_class = GptOssLayer

    @classmethod
    def read_config(cls, hf: HFConfig) -> ModelConfig:
        """See Decoder."""
        base = hf.base(head_dim=64, norm_eps=1e-5)
        bias = hf.flag("attention_bias", True)
        alternating = ["full_attention" if i % 2 else "sliding_attention" for i in range(base["num_hidden_layers"])]
        moe = MoEConfig(
            num_experts=hf.size("num_local_experts", 128),
            experts_per_token=hf.size("num_experts_per_tok", hf.size("experts_per_token", 4)),
            intermediate_size=base["intermediate_size"],
            router_bias=True,
            expert_bias=True,
            swiglu_limit=hf.number("swiglu_limit", 7.0),
            swiglu_alpha=hf.number("swiglu_alpha", 1.702),
        )
        windows = hf.windows(hf.optional_size("sliding_window", 128), alternating)
        hf.ignore("initial_context_length")  # the same as rope_parameters' original_max_position_embeddings
        return hf.finish(
            **base,
            ropes=(hf.rope(base["head_dim"], default_theta=150000.0),),
            layers=tuple(LayerConfig(sliding_window=window.sliding_window, sparse=True) for window in windows),
            attention_bias=bias,
            output_bias=bias,
            moe=moe,
        )

    @classmethod
    def layer_sources(cls, config: ModelConfig, layer: LayerConfig, name: str) -> dict[str, Source]:
        """See Decoder."""

        def by_kv_head(sinks: np.ndarray) -> np.ndarray:
            return sinks.reshape(config.num_key_value_heads, -1)

        return {
            **weights.norm("input_norm", name + "input_layernorm", config),
            **weights.attention("attention", name + "self_attn.", config),
            "attention.sinks": fuse(by_kv_head, (name + "self_attn.sinks", (config.num_attention_heads,))),
            **weights.norm("post_norm", name + "post_attention_layernorm", config),
            **_moe_sources(config, name + "mlp."),
        }


def _moe_sources(config: ModelConfig, name: str) -> dict[str, Source]:
    """The experts are stored in one piece, inputs first, gate and up in turn."""
    assert config.moe is not None
    embed, hidden, num_experts = config.hidden_size, config.moe.intermediate_size, config.moe.num_experts

    def split(gate_up: np.ndarray) -> np.ndarray:
        outputs_first = gate_up.swapaxes(1, 2) if gate_up.ndim == 3 else gate_up
        pairs = outputs_first.reshape(num_experts, hidden, 2, *outputs_first.shape[2:])
        return pairs.swapaxes(1, 2)

    def swap(down: np.ndarray) -> np.ndarray:
        return down.swapaxes(1, 2)

    return {
        "mlp.router.weight": take(name + "router.weight", (num_experts, embed)),
        "mlp.router.bias": take(name + "router.bias", (num_experts,)),
        "mlp.gate_up": fuse(split, (name + "experts.gate_up_proj", (num_experts, embed, 2 * hidden))),
        "mlp.gate_up_bias": fuse(split, (name + "experts.gate_up_proj_bias", (num_experts, 2 * hidden))),
        "mlp.down": fuse(swap, (name + "experts.down_proj", (num_experts, hidden, embed))),
        "mlp.down_bias": take(name + "experts.down_proj_bias", (num_experts, embed)),
    }
