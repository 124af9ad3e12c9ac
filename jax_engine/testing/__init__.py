"""Stand-ins for tests and benchmarks: a runner, an engine without a device, a tokenizer of bytes. None imports jax."""
