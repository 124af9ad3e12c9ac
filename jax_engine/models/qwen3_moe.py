"""Qwen3 with a mixture of experts (arXiv 2505.09388): Qwen3's layer; some or all layers are sparse."""

from typing import Any

from checkpoints.weight_map import Source, take
from jax_engine.hf_config import HFConfig
from jax_engine.model_config import LayerConfig, ModelConfig, MoEConfig
from jax_engine.models import weights
from jax_engine.models.decoder import Decoder
from jax_engine.models.qwen3 import Qwen3Layer


class Qwen3Moe(Decoder):
    """See Qwen3Layer and MoE."""

    layer_class = Qwen3Layer

    @classmethod
    def read_config(cls, hf: HFConfig) -> ModelConfig:
        """See Decoder."""
        base = hf.base()
        bias = hf.flag("attention_bias")
        window = hf.optional_size("sliding_window") if hf.flag("use_sliding_window") else None
        hf.ignore("sliding_window", "max_window_layers")  # the window, where there is one, is that of all layers
        sparse = read_sparse_layers(hf, base["num_hidden_layers"])
        return hf.finish(
            **base,
            ropes=(hf.rope(base["head_dim"]),),
            layers=tuple(LayerConfig(sliding_window=window, sparse=is_sparse) for is_sparse in sparse),
            attention_bias=bias,
            output_bias=bias,
            moe=read_moe(hf, num_experts=128, experts_per_token=8, hidden=768, normalize=False),
        )

    @classmethod
    def layer_sources(cls, config: ModelConfig, layer: LayerConfig, name: str) -> dict[str, Source]:
        """See Decoder."""
        return {
            **weights.norm("input_norm", name + "input_layernorm", config),
            **weights.attention("attention", name + "self_attn.", config, qk_norm="head"),
            **weights.norm("post_norm", name + "post_attention_layernorm", config),
            **mlp_sources(config, layer, name + "mlp."),
        }


def read_sparse_layers(hf: HFConfig, num_layers: int) -> list[bool]:
    """Which layers have experts: every decoder_sparse_step-th, but for those in mlp_only_layers."""
    step, dense = hf.size("decoder_sparse_step", 1), hf.raw("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(index) is int for index in dense):
        hf.problem(f"mlp_only_layers must be a list of layer numbers, got {str(dense)[:80]}")
        dense = []
    return [(index + 1) % step == 0 and index not in dense for index in range(num_layers)]


def read_moe(
    hf: HFConfig, *, num_experts: int, experts_per_token: int, hidden: int, normalize: bool, **more: Any
) -> MoEConfig:
    """The experts of Qwen3's sparse models; the arguments are the defaults, `more` is what no field says."""
    # transformers 5 writes num_local_experts, 4 wrote num_experts.
    return MoEConfig(
        num_experts=hf.size("num_local_experts", hf.size("num_experts", num_experts)),
        experts_per_token=hf.size("num_experts_per_tok", experts_per_token),
        intermediate_size=hf.size("moe_intermediate_size", hidden),
        normalize=hf.flag("norm_topk_prob", normalize),
        **more,
    )


def mlp_sources(config: ModelConfig, layer: LayerConfig, name: str) -> dict[str, Source]:
    """A layer's feed-forward, sparse or dense."""
    if not layer.sparse:
        return weights.gated_mlp("mlp", name, config)
    assert config.moe is not None
    return {
        "mlp.router.weight": take(name + "gate.weight", (config.moe.num_experts, config.hidden_size)),
        **weights.experts("mlp", name, config, ("gate_proj", "up_proj", "down_proj")),
    }
