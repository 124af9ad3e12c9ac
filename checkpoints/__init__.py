"""Weights and tokenizers in: safetensors, GGUF and Orbax. Knows nothing of the engine, and never imports it."""
