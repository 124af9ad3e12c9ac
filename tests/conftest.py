"""What the tests share: a tiny model whose steps are compiled once, and engines over it in every mode."""

import dataclasses
import json
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

# Shapes and dtypes at the borders of device code are checked here, and nowhere else.
install_import_hook(["jax_engine.layers", "jax_engine.models", "jax_engine.sampler"], "beartype.beartype")

from checkpoints.formats import open_checkpoint  # noqa: E402
from jax_engine.config import EngineConfig  # noqa: E402
from jax_engine.engine import Engine  # noqa: E402
from jax_engine.model_runner import ModelRunner  # noqa: E402
from jax_engine.testing.byte_tokenizer import ByteTokenizer  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module", autouse=True)
def transfer_guard(request):
    """Data reaches or leaves a device only where the code says so; tests of device functions feed them directly, as
    interpreters of kernels do."""
    feeds_device = request.module.__name__.split(".")[-1].startswith(
        ("test_sampler", "test_ragged", "test_model_layers", "test_kept_programs", "test_block_tail", "test_gpu_engine")
    )
    jax.config.update("jax_transfer_guard", "allow" if feeds_device else "disallow")
    yield
    jax.config.update("jax_transfer_guard", "allow")


class Modes:
    """One compiled runner, and engines over it that differ only in how they schedule."""

    def __init__(self, **options):
        self.config = EngineConfig(
            **(
                {
                    "model": str(GOLDEN / "tiny/llama"),
                    "max_model_len": 128,
                    "page_size": 8,
                    "max_num_seqs": 8,
                    "compilation_cache_dir": "",
                }
                | options
            )
        )
        checkpoint = open_checkpoint(self.config.model, weights=self.config.load_format != "dummy")
        self.runner = ModelRunner(self.config, checkpoint)
        self.limits = self.runner.limits

    def engine(self, scheduling: str = "async", depth: int = 2, config: EngineConfig | None = None, **limits) -> Engine:
        """An engine with the runner's compiled steps; its cache holds whatever the engine before left there."""
        depth = depth if scheduling == "async" else 1
        self.runner.limits = dataclasses.replace(self.limits, scheduling=scheduling, max_inflight_steps=depth, **limits)
        config = config or self.config
        return Engine(self.runner, ByteTokenizer(), vocab_size=320, eos_token_ids=[257], config=config)


@pytest.fixture(scope="session")
def make_modes() -> type[Modes]:
    """Modes for a test that brings a model of its own."""
    return Modes


class GoldenCase(dict):
    """A greedy answer of the default model in another implementation: prompt, tokens, text, log-probabilities."""

    NEAR_TIE = 0.02
    TOLERANCE = 2e-3

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation of a chat case."""
        return [{"role": "user", "content": self["prompt"]}]

    def check(self, token_ids: list[int], logprobs: list[float]) -> bool:
        """Asserts that an answer is this one. A near-tie may fall the other way; what follows is then not compared.

        Returns:
            Whether the whole answer is the same.
        """
        want = self["output_ids"]
        same = next((i for i, pair in enumerate(zip(token_ids, want, strict=False)) if len(set(pair)) > 1), None)
        if same is not None:
            first, second = self["top5_logprobs"][same][:2]
            assert first - second < self.NEAR_TIE, f"{self['prompt']!r} differs at token {same}, which is no near-tie"
            assert token_ids[same] == self["top5_ids"][same][1]
        else:
            assert token_ids == want, self["prompt"]
        assert len(logprobs) == len(token_ids)
        np.testing.assert_allclose(logprobs[:same], self["logprobs"][:same], rtol=0, atol=self.TOLERANCE)
        return same is None


@pytest.fixture(scope="session")
def golden_cases() -> list[GoldenCase]:
    """Ten conversations and six texts, continued by the default model."""
    return [GoldenCase(case) for case in json.loads((GOLDEN / "smollm2.json").read_text(encoding="utf-8"))["cases"]]


@pytest.fixture(scope="session")
def one_bucket() -> Modes:
    """Every step has the same shape, so results are comparable bit for bit."""
    return Modes(token_buckets=(24,), decode_buckets=())


@pytest.fixture(scope="session")
def many_buckets() -> Modes:
    """Steps of several shapes."""
    return Modes(token_buckets=(8, 32), decode_buckets=(1, 2, 8))
