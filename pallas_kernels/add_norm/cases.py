"""Shapes that tests and benchmarks of add_norm share."""

from typing import NamedTuple


class Case(NamedTuple):
    """Rows and their width, as a model has them."""

    tokens: int
    width: int


CASES = {
    "llama-8b, one row": Case(1, 4096),
    "llama-8b, ragged": Case(37, 4096),
    "llama-8b, decode": Case(256, 4096),
    "qwen3-0.6b": Case(32, 1024),
    "odd width": Case(5, 896),
    "wide": Case(3, 8192),
}
