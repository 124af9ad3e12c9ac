"""DeepSeek-V2, also Lite and Coder (arXiv 2405.04434): DeepSeek-V3's layer, whose experts are scored by a softmax."""

from jax_engine.hf_config import HFConfig
from jax_engine.model_config import ModelConfig, MoEConfig
from jax_engine.models.decoder import Decoder
from jax_engine.models.deepseek_v3 import DeepseekV3, check_groups, read_latent


class DeepseekV2(DeepseekV3):
    """See DeepseekV3Layer, LatentAttention and MoE."""

    IGNORED_TENSORS = Decoder.IGNORED_TENSORS

    @classmethod
    def read_config(cls, hf: HFConfig) -> ModelConfig:
        """See Decoder."""
        return read_latent(hf, dense_layers=0, moe=_read_moe(hf))


def _read_moe(hf: HFConfig) -> MoEConfig:
    hf.only("scoring_func", "softmax")
    hf.only("norm_topk_prob", False)
    hf.only("moe_layer_freq", 1)
    hf.only("mlp_bias", False)
    hf.ignore("ep_size", "aux_loss_alpha", "seq_aux")
    method = hf.choice("topk_method", ("greedy", "group_limited_greedy"), "greedy")
    num_groups, per_token = hf.optional_size("n_group") or 1, hf.optional_size("topk_group") or 1
    moe = MoEConfig(
        num_experts=hf.size("n_routed_experts", 64),
        experts_per_token=hf.size("num_experts_per_tok"),
        intermediate_size=hf.size("moe_intermediate_size", 1407),
        shared_size=hf.size("moe_intermediate_size", 1407) * hf.size("n_shared_experts", 2),
        normalize=False,
        scaling=hf.number("routed_scaling_factor", 1.0),
        num_groups=1 if method == "greedy" else num_groups,
        groups_per_token=1 if method == "greedy" else per_token,
    )
    check_groups(hf, moe)
    return moe
