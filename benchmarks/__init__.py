"""Benchmarks: programs that measure the engine and write what they measured to benchmarks/results/."""
