"""gpt-oss (OpenAI, 2025): sinks, windows in every other layer, YaRN, experts with biases and a clamped SwiGLU."""

import jax.numpy as jnp
import numpy as np

from checkpoints.weight_map import Source, fuse, take
from jax_engine.hf_config import HFConfig
from jax_engine.layers.attention import Attention
from jax_engine.model_config import LayerConfig, ModelConfig, MoEConfig
from jax_engine.models import weights
from jax_engine.models.decoder import Decoder, DecoderLayer

#: Numbers that share an exponent in MXFP4, and what the sixteen codes of a number mean.
_BLOCK = 32
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


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
            mxfp4_experts=_read_mxfp4(hf),
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


def _read_mxfp4(hf: HFConfig) -> bool:
    """Whether the experts are in MXFP4, as all published checkpoints have them."""
    quantization = hf.raw("quantization_config")
    if quantization is None:
        return False
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != "mxfp4":
        hf.problem(f"quantization_config: method {str(method)[:80]!r} is not supported, only 'mxfp4'")
    if hf.size("hidden_size") % _BLOCK or hf.size("intermediate_size") % _BLOCK:
        hf.problem(f"quantization_config: MXFP4 needs sizes that are multiples of {_BLOCK}")
    return True


def _moe_sources(config: ModelConfig, name: str) -> dict[str, Source]:
    assert config.moe is not None
    embed, hidden, num_experts = config.hidden_size, config.moe.intermediate_size, config.moe.num_experts
    unpack = _unpack_mxfp4 if config.mxfp4_experts else _outputs_first

    def pair(*parts: np.ndarray) -> np.ndarray:
        """Rows of gate and up, stored in turn, as [E, 2, F, ...]."""
        rows = unpack(*parts) if parts[0].ndim > 2 else parts[0]
        return rows.reshape(num_experts, hidden, 2, *rows.shape[2:]).swapaxes(1, 2)

    def tensors(part: str, outputs: int, inputs: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
        if not config.mxfp4_experts:
            return ((f"{name}experts.{part}", (num_experts, inputs, outputs)),)
        shape = (num_experts, outputs, inputs // _BLOCK)
        return ((f"{name}experts.{part}_blocks", (*shape, _BLOCK // 2)), (f"{name}experts.{part}_scales", shape))

    return {
        "mlp.router.weight": take(name + "router.weight", (num_experts, embed)),
        "mlp.router.bias": take(name + "router.bias", (num_experts,)),
        "mlp.gate_up": fuse(pair, *tensors("gate_up_proj", 2 * hidden, embed)),
        "mlp.gate_up_bias": fuse(pair, (name + "experts.gate_up_proj_bias", (num_experts, 2 * hidden))),
        "mlp.down": fuse(unpack, *tensors("down_proj", embed, hidden)),
        "mlp.down_bias": take(name + "experts.down_proj_bias", (num_experts, embed)),
    }


def _outputs_first(weight: np.ndarray) -> np.ndarray:
    return weight.swapaxes(1, 2)


def _unpack_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[E, F, D / 32, 16] bytes, two numbers each, and exponents [E, F, D / 32] -> bfloat16 [E, F, D], which is exact.

    OCP Microscaling Formats 1.0: the low half of a byte comes first; an exponent is biased by 127.
    """
    numbers = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], _BLOCK)
    out = np.empty((*scales.shape[:2], scales.shape[2] * _BLOCK), jnp.bfloat16)
    for expert in range(len(out)):  # one at a time, for float32 is wide
        values = np.ldexp(_FP4[numbers[expert]], scales[expert].astype(np.int32)[..., None] - 127)
        out[expert] = values.reshape(out.shape[1:]).astype(jnp.bfloat16)
    return out
