"""EngineConfig: what an operator or a script may write, and what they are told of what they may not."""

import dataclasses
from pathlib import Path

import pytest

from jax_engine import ConfigError, EngineConfig


def _wrong(option: dataclasses.Field) -> list:
    """Values that no field of this type takes."""
    return {
        str: [5, None],
        bool: [1, "no"],
        int: ["8", 2.5, True],
        float: ["0.9", True],
        str | None: [5],
        int | None: ["big", 2.5, True],
        float | None: ["1", True],
        tuple[int, ...] | None: [64, ["64"], [True]],
        tuple[str, ...]: ["a", [5]],
    }[option.type]


@pytest.mark.parametrize("option", dataclasses.fields(EngineConfig), ids=lambda option: option.name)
def test_values_of_the_wrong_type_are_refused_in_words(option):
    for value in _wrong(option):
        with pytest.raises(ConfigError, match=f"^{option.name} must be of type .*, got "):
            EngineConfig(**{option.name: value})


def test_lists_and_paths_are_taken():
    config = EngineConfig(model=Path("/a"), token_buckets=[8, 16], user_weights=["ann=2"], gpu_memory_utilization=1)  # type: ignore[arg-type]
    assert config.model == "/a" and config.token_buckets == (8, 16) and config.user_weights == ("ann=2",)
    assert config == dataclasses.replace(config)
