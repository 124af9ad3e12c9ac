"""Gemma 3, its text models (arXiv 2503.19786): Gemma 2's layer with normalised queries and keys, without soft caps.

Five of six layers have a sliding window, and rotary positions of their own.
"""

from jax_engine.hf_config import HFConfig
from jax_engine.model_config import ModelConfig, Rope
from jax_engine.models.gemma2 import Gemma2, Gemma2Layer, read_gemma


class Gemma3Layer(Gemma2Layer):
    """Gemma 2's, with each query and key head normalised."""

    qk_norm = "head"


class Gemma3(Gemma2):
    """See Gemma3Layer."""

    layer_class = Gemma3Layer

    @classmethod
    def read_config(cls, hf: HFConfig) -> ModelConfig:
        """See Decoder. transformers 5 gives rotary positions by type of layer, 4 by fields of their own."""
        fields = read_gemma(hf)
        hf.ignore("_sliding_window_pattern")
        pattern = hf.size("sliding_window_pattern", 6)
        numbers = range(1, fields["num_hidden_layers"] + 1)
        by_number = ["sliding_attention" if number % pattern else "full_attention" for number in numbers]
        return hf.finish(
            **fields,
            ropes=_ropes(hf, fields["head_dim"]),
            layers=hf.windows(hf.optional_size("sliding_window", 4096), by_number, sliding_rope=1),
            attention_soft_cap=hf.optional_number("attn_logit_softcapping"),
            logits_soft_cap=hf.optional_number("final_logit_softcapping"),
        )


def _ropes(hf: HFConfig, head_dim: int) -> tuple[Rope, Rope]:
    """Of full attention, of sliding windows."""
    by_type = hf.raw("rope_parameters")
    if not isinstance(by_type, dict):
        by_type = {}
    scaling = hf.raw("rope_scaling")
    full = {"rope_theta": hf.number("rope_theta", 1e6)} | (by_type.get("full_attention") or {}) | (scaling or {})
    sliding = {"rope_theta": hf.number("rope_local_base_freq", 1e4)} | (by_type.get("sliding_attention") or {})
    return hf.rope_from(full, head_dim), hf.rope_from(sliding, head_dim)
