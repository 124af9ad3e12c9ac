"""Mixtral (arXiv 2401.04088): Mistral's layer with a mixture of experts for its feed-forward."""

from checkpoints.weight_map import Source, take
from jax_engine.hf_config import HFConfig
from jax_engine.model_config import LayerConfig, ModelConfig, MoEConfig
from jax_engine.models import weights
from jax_engine.models.decoder import Decoder


class Mixtral(Decoder):
    """Pre-norm decoder; each token passes two of eight experts."""

    @classmethod
    def read_config(cls, hf: HFConfig) -> ModelConfig:
        """See Decoder."""
        base = hf.base(norm_eps=1e-5)
        moe = MoEConfig(
            num_experts=hf.size("num_local_experts", 8),
            experts_per_token=hf.size("num_experts_per_tok", 2),
            intermediate_size=base["intermediate_size"],
        )
        layer = LayerConfig(sliding_window=hf.optional_size("sliding_window"), sparse=True)
        return hf.finish(
            **base,
            ropes=(hf.rope(base["head_dim"], default_theta=1e6),),
            layers=(layer,) * base["num_hidden_layers"],
            moe=moe,
        )

    @classmethod
    def layer_sources(cls, config: ModelConfig, layer: LayerConfig, name: str) -> dict[str, Source]:
        """See Decoder."""
        assert config.moe is not None
        moe = name + "block_sparse_moe."
        return {
            **weights.norm("input_norm", name + "input_layernorm", config),
            **weights.attention("attention", name + "self_attn.", config),
            **weights.norm("post_norm", name + "post_attention_layernorm", config),
            "mlp.router.weight": take(moe + "gate.weight", (config.moe.num_experts, config.hidden_size)),
            **weights.experts("mlp", moe, config, ("w1", "w3", "w2")),
        }
