"""Shapes that tests and benchmarks of all_reduce share."""

from typing import NamedTuple


class Case(NamedTuple):
    """Rows of the residual stream and their width, and their dtype's name."""

    rows: int
    width: int
    dtype: str = "bfloat16"


CASES = {
    "llama-8b, one row": Case(1, 4096),
    "llama-8b, decode": Case(32, 4096),
    "llama-8b, 256 rows": Case(256, 4096),
    "llama-70b, decode": Case(64, 8192),
    "odd rows": Case(37, 896 * 8),
    "float16": Case(8, 1024, "float16"),
    "float32": Case(8, 64, "float32"),
}
