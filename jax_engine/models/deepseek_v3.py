"""DeepSeek-V3 and R1 (arXiv 2412.19437): latent attention; after some dense layers, many small experts."""

import jax.numpy as jnp
import numpy as np

from checkpoints.weight_map import Source, fuse, take
from jax_engine.hf_config import HFConfig
from jax_engine.layers.latent_attention import LatentAttention
from jax_engine.model_config import LayerConfig, MLAConfig, ModelConfig, MoEConfig
from jax_engine.models import weights
from jax_engine.models.decoder import Decoder, DecoderLayer
from jax_engine.rope_scaling import yarn_mscale


class DeepseekV3Layer(DecoderLayer):
    """Pre-norm layer with latent attention."""

    def make_attention(self, config: ModelConfig, layer: LayerConfig, dtype: jnp.dtype) -> LatentAttention:
        """See DecoderLayer."""
        return LatentAttention(config, layer, dtype)


class DeepseekV3(Decoder):
    """See DeepseekV3Layer, LatentAttention and MoE."""

    #: The head that predicts a second token is stored as one more layer; it has no part in the first.
    IGNORED_TENSORS = (*Decoder.IGNORED_TENSORS, "model.layers.61.*")
    layer_class = DeepseekV3Layer

    @classmethod
    def read_config(cls, hf: HFConfig) -> ModelConfig:
        """See Decoder."""
        return read_latent(hf, dense_layers=3, moe=_read_moe(hf))

    @classmethod
    def layer_sources(cls, config: ModelConfig, layer: LayerConfig, name: str) -> dict[str, Source]:
        """See Decoder."""
        return {
            **weights.norm("input_norm", name + "input_layernorm", config),
            **_attention_sources(config, name + "self_attn."),
            **weights.norm("post_norm", name + "post_attention_layernorm", config),
            **_mlp_sources(config, layer, name + "mlp."),
        }


def read_latent(hf: HFConfig, *, dense_layers: int, moe: MoEConfig) -> ModelConfig:
    """A model with latent attention and these experts; by default its first `dense_layers` layers have none."""
    base = hf.base()
    mla = MLAConfig(
        query_rank=hf.optional_size("q_lora_rank", 1536) or 0,
        latent_dim=hf.size("kv_lora_rank", 512),
        nope_dim=hf.size("qk_nope_head_dim", 128),
        rope_dim=hf.size("qk_rope_head_dim", 64),
        value_dim=hf.size("v_head_dim", 128),
    )
    hf.ignore("num_nextn_predict_layers", "num_mtp_layers", "qk_head_dim")
    rope = hf.rope(mla.rope_dim)
    dense = hf.count("first_k_dense_replace", dense_layers)
    # As the cache sees it: one KV head that holds latent and turning part.
    base |= {"num_key_value_heads": 1, "head_dim": mla.latent_dim + mla.rope_dim}
    return hf.finish(
        **base,
        ropes=(rope,),
        layers=tuple(LayerConfig(sparse=index >= dense) for index in range(base["num_hidden_layers"])),
        attention_bias=hf.flag("attention_bias"),
        attention_scale=(mla.nope_dim + mla.rope_dim) ** -0.5 * _sharpening(hf),
        moe=moe,
        mla=mla,
        interleaved_rope=hf.flag("rope_interleave", True),
    )


def _sharpening(hf: HFConfig) -> float:
    """YaRN's factor of the scores, where the config asks for it in this place too."""
    rope = hf.raw("rope_scaling") or hf.raw("rope_parameters") or {}
    all_dim, factor = rope.get("mscale_all_dim"), rope.get("factor")
    if rope.get("rope_type", rope.get("type", "default")) == "default" or not all_dim or not factor:
        return 1.0
    return yarn_mscale(factor, all_dim) ** 2


def _read_moe(hf: HFConfig) -> MoEConfig:
    hf.only("scoring_func", "sigmoid")
    hf.only("topk_method", "noaux_tc")
    hf.only("moe_layer_freq", 1)
    hf.ignore("ep_size", "aux_loss_alpha", "seq_aux")
    moe = MoEConfig(
        num_experts=hf.size("n_routed_experts", 256),
        experts_per_token=hf.size("num_experts_per_tok", 8),
        intermediate_size=hf.size("moe_intermediate_size", 2048),
        shared_size=hf.size("moe_intermediate_size", 2048) * hf.size("n_shared_experts", 1),
        normalize=hf.flag("norm_topk_prob", True),
        scaling=hf.number("routed_scaling_factor", 2.5),
        sigmoid=True,
        num_groups=hf.optional_size("n_group", 8) or 1,
        groups_per_token=hf.optional_size("topk_group", 4) or 1,
    )
    check_groups(hf, moe)
    return moe


def check_groups(hf: HFConfig, moe: MoEConfig) -> None:
    """Notes as a problem that the experts cannot be chosen by group."""
    if moe.num_experts % moe.num_groups or moe.groups_per_token > moe.num_groups:
        hf.problem(
            f"{moe.num_experts} experts cannot be chosen from {moe.groups_per_token} of {moe.num_groups} equal groups"
        )


def _attention_sources(config: ModelConfig, name: str) -> dict[str, Source]:
    mla = config.mla
    assert mla is not None
    embed, heads = config.hidden_size, config.num_attention_heads

    def keys(up: np.ndarray) -> np.ndarray:
        return up.reshape(heads, -1, mla.latent_dim)[:, : mla.nope_dim].swapaxes(1, 2)

    def values(up: np.ndarray) -> np.ndarray:
        return up.reshape(heads, -1, mla.latent_dim)[:, mla.nope_dim :]

    def latents(down: np.ndarray) -> np.ndarray:
        return np.concatenate([down[: mla.latent_dim], _in_halves(config, down[mla.latent_dim :])])

    def split(output: np.ndarray) -> np.ndarray:
        return output.reshape(embed, heads, mla.value_dim)

    up = (name + "kv_b_proj.weight", (heads * (mla.nope_dim + mla.value_dim), mla.latent_dim))
    sources = {
        **_query_sources(config, name),
        "attention.latent_down": fuse(latents, (name + "kv_a_proj_with_mqa.weight", (config.head_dim, embed))),
        **weights.norm("attention.latent_norm", name + "kv_a_layernorm", config, mla.latent_dim),
        "attention.key_up": fuse(keys, up),
        "attention.value_up": fuse(values, up),
        "attention.output": fuse(split, (name + "o_proj.weight", (embed, heads * mla.value_dim))),
    }
    if config.attention_bias:
        sources["attention.latent_bias"] = fuse(latents, (name + "kv_a_proj_with_mqa.bias", (config.head_dim,)))
        sources["attention.output_bias"] = take(name + "o_proj.bias", (embed,))
    return sources


def _query_sources(config: ModelConfig, name: str) -> dict[str, Source]:
    mla = config.mla
    assert mla is not None
    embed, rows = config.hidden_size, config.num_attention_heads * (mla.nope_dim + mla.rope_dim)

    def queries(query: np.ndarray) -> np.ndarray:
        query = query.reshape(config.num_attention_heads, mla.nope_dim + mla.rope_dim, -1)
        fixed, turning = np.split(query, [mla.nope_dim], axis=1)
        return np.concatenate([fixed, _in_halves(config, turning.swapaxes(0, 1)).swapaxes(0, 1)], axis=1)

    if not mla.query_rank:
        return {"attention.query": fuse(queries, (name + "q_proj.weight", (rows, embed)))}
    sources = {
        "attention.query_down": take(name + "q_a_proj.weight", (mla.query_rank, embed)),
        **weights.norm("attention.query_norm", name + "q_a_layernorm", config, mla.query_rank),
        "attention.query": fuse(queries, (name + "q_b_proj.weight", (rows, mla.query_rank))),
    }
    if config.attention_bias:
        sources["attention.query_bias"] = take(name + "q_a_proj.bias", (mla.query_rank,))
    return sources


def _in_halves(config: ModelConfig, turning: np.ndarray) -> np.ndarray:
    """Turning dimensions (the first axis) in the order in which halves, not neighbours, turn against each other."""
    return np.concatenate([turning[::2], turning[1::2]]) if config.interleaved_rope else turning


def _mlp_sources(config: ModelConfig, layer: LayerConfig, name: str) -> dict[str, Source]:
    if not layer.sparse:
        return weights.gated_mlp("mlp", name, config)
    assert config.moe is not None
    num_experts = config.moe.num_experts
    sources = {"mlp.router.weight": take(name + "gate.weight", (num_experts, config.hidden_size))}
    if config.moe.sigmoid:
        sources["mlp.router.correction"] = take(name + "gate.e_score_correction_bias", (num_experts,))
    return {
        **sources,
        **weights.experts("mlp", name, config, ("gate_proj", "up_proj", "down_proj")),
        **weights.gated_mlp("mlp.shared", name + "shared_experts.", config, config.moe.shared_size),
    }
