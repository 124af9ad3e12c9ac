"""A server whose engine breaks on demand: the real server, engine, scheduler and threads over FakeRunner.

A prompt that holds one of the token ids below brings the fault about in the step that computes it. Run as a program it
is `jax-engine serve`; imported it gives the engine.
"""

import ctypes
import itertools
import sys
import time

import jax_engine
from jax_engine.async_engine import AsyncEngine
from jax_engine.batch import BatchLayout
from jax_engine.config import EngineConfig, ModelConfig, resolve
from jax_engine.engine import Engine
from jax_engine.scheduler import INVALID_TOKEN
from jax_engine.testing.byte_tokenizer import ByteTokenizer, byte_text_tokenizer
from jax_engine.testing.fake_runner import FakeHandle, FakeRunner
from jax_engine.tokenizer import Tokenizer

RAISE, HANG, HOLD_LOCK, NOT_A_NUMBER, NO_MEMORY, LATE, NO_TEXT = range(300, 307)
VOCAB_SIZE = 320
#: A token that FaultyTokenizer can make no text of, and a text that it cannot make tokens of.
BROKEN_TOKEN, BROKEN_TEXT = 319, "cannot be tokenized"
SLOW_LOAD_S = 30.0
MODEL = ModelConfig(
    architecture="Fake",
    vocab_size=VOCAB_SIZE,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=512,
)


class FaultyTokenizer(ByteTokenizer):
    """ByteTokenizer with one bad token and one bad text."""

    def encode(self, text, add_special_tokens=True, parse_special=True):
        """Fails on BROKEN_TEXT."""
        if text == BROKEN_TEXT:
            raise RuntimeError("tokenizer: panicked at /secret/path/src/lib.rs")
        return super().encode(text, add_special_tokens, parse_special)

    def token_bytes(self, token_id):
        """Fails on BROKEN_TOKEN."""
        if token_id == BROKEN_TOKEN:
            raise RuntimeError("tokenizer: panicked at /secret/path/src/lib.rs")
        return super().token_bytes(token_id)


class FaultyRunner(FakeRunner):
    """FakeRunner with faults, and steps that take some time."""

    step_s = 0.002

    def dispatch(self, batch):
        """Computes a step, or fails as a token in it says."""
        parts = BatchLayout.of(batch.bucket, self.limits).unpack(batch.packed)
        tokens = set(parts["token_ids"].tolist())
        time.sleep(self.step_s)
        if RAISE in tokens:
            raise RuntimeError("the device said /secret/path is wrong")
        if NO_MEMORY in tokens:
            raise MemoryError("RESOURCE_EXHAUSTED: out of memory while trying to allocate 8589934592 bytes")
        if HANG in tokens:
            time.sleep(3600)
        if HOLD_LOCK in tokens:
            ctypes.PyDLL(None).sleep(3600)
        handle = super().dispatch(batch)
        if LATE in tokens:
            return LateFailure(handle)
        for marker, token in ((NOT_A_NUMBER, INVALID_TOKEN), (NO_TEXT, BROKEN_TOKEN)):
            for row, (first, last) in enumerate(itertools.pairwise(parts["query_starts"])):
                if marker in parts["token_ids"][first:last]:
                    handle.tokens[row] = token
        return handle


class LateFailure(FakeHandle):
    """A step that was enqueued well and fails on the device."""

    def __init__(self, handle):
        super().__init__(handle.tokens, ready=False)

    def result(self):
        """Fails, as reading back a failed step does."""
        raise RuntimeError("INTERNAL: the step failed on the device")


def build(config: EngineConfig | None = None, tokenizer: Tokenizer | None = None) -> AsyncEngine:
    """A running engine; by default with a FaultyTokenizer."""
    config = config or EngineConfig(model="faulty")
    limits = resolve(config, MODEL, platform="cpu", num_pages=64)
    engine = Engine(
        FaultyRunner(limits, ByteTokenizer.vocab_size),
        tokenizer or FaultyTokenizer(),
        vocab_size=VOCAB_SIZE,
        eos_token_ids=[],
        config=config,
    )
    return AsyncEngine(config, engine)


def slow_build(config: EngineConfig) -> AsyncEngine:
    """What a large model is like: it takes long to load."""
    time.sleep(SLOW_LOAD_S)
    return build(config)


def build_for_others(config: EngineConfig) -> AsyncEngine:
    """An engine whose tokenizer can be sent to API processes."""
    return build(config, byte_text_tokenizer())


if __name__ == "__main__":
    from serving.cli import main

    words = sys.argv[1:]
    if "--slow-steps" in words:
        FaultyRunner.step_s = 0.03
    quick = build_for_others if any(word.startswith("--api_processes") for word in words) else build
    jax_engine.AsyncEngine = slow_build if "--slow-load" in words else quick  # type: ignore[misc]
    sys.exit(main(["serve", "faulty", "--port=0", *(word for word in words if not word.startswith("--slow-"))]))
