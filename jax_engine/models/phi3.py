"""Phi-3, 3.5 and 4 (arXiv 2404.14219): Llama's layer, stored with fused weights, with LongRoPE for long contexts."""

import numpy as np

from checkpoints.weight_map import Source, fuse, take
from jax_engine.hf_config import HFConfig
from jax_engine.model_config import LayerConfig, ModelConfig
from jax_engine.models import weights
from jax_engine.models.decoder import Decoder


class Phi3(Decoder):
    """Pre-norm decoder; a part of each head may stay unturned."""

    @classmethod
    def read_config(cls, hf: HFConfig) -> ModelConfig:
        """See Decoder. Older files call LongRoPE `su` or `yarn`."""
        base = hf.base(norm_eps=1e-5)
        rope = hf.rope(base["head_dim"], partial=1.0, names={"su": "longrope", "yarn": "longrope"})
        window = hf.optional_size("sliding_window")
        for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
            hf.only(name, False)
        hf.ignore("full_attn_mod", "interpolate_factor")  # of Phi-4-mini's own code; both say what is done here
        layers = (LayerConfig(sliding_window=window),) * base["num_hidden_layers"]
        return hf.finish(**base, ropes=(rope,), layers=layers)

    @classmethod
    def layer_sources(cls, config: ModelConfig, layer: LayerConfig, name: str) -> dict[str, Source]:
        """See Decoder."""
        embed, hidden, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
        q_size, kv_size = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim

        def regroup(qkv: np.ndarray) -> np.ndarray:
            return weights.join_heads(config, *np.split(qkv, [q_size, q_size + kv_size]))

        def split(gate_up: np.ndarray) -> np.ndarray:
            return gate_up.reshape(2, hidden, embed)

        attention, mlp = name + "self_attn.", name + "mlp."
        return {
            **weights.norm("input_norm", name + "input_layernorm", config),
            "attention.qkv": fuse(regroup, (attention + "qkv_proj.weight", (q_size + 2 * kv_size, embed))),
            **weights.attention_output("attention", attention + "o_proj", config),
            **weights.norm("post_norm", name + "post_attention_layernorm", config),
            "mlp.gate_up": fuse(split, (mlp + "gate_up_proj.weight", (2 * hidden, embed))),
            "mlp.down": take(mlp + "down_proj.weight", (embed, hidden)),
        }
