"""Every named shape is a configuration the engine can read."""

import pytest

from jax_engine.models import read_config
from jax_engine.models.shapes import NAMED_SHAPES


@pytest.mark.parametrize("name", sorted(NAMED_SHAPES))
def test_named_shape_reads_as_a_config(name: str) -> None:
    model = read_config(NAMED_SHAPES[name])
    assert model.num_attention_heads % model.num_key_value_heads == 0


def test_llama_8b_has_eight_billion_parameters() -> None:
    model = read_config(NAMED_SHAPES["llama-3.1-8b"])
    assert model.ropes[0].frequencies[-1] < 500_000 ** (-126 / 128) / 7.9, "long wavelengths are stretched by 8"
    attention = model.hidden_size * model.head_dim * 2 * (model.num_attention_heads + model.num_key_value_heads)
    layer = attention + 3 * model.hidden_size * model.intermediate_size
    parameters = model.num_hidden_layers * layer + 2 * model.vocab_size * model.hidden_size
    assert 8.0e9 < parameters < 8.1e9
