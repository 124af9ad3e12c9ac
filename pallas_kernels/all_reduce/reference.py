"""all_reduce and all_reduce_add_norm written from the maths, in float64; tests and benchmarks only."""

from collections.abc import Sequence

import numpy as np

from pallas_kernels.add_norm import reference


def all_reduce(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The sum of the devices' parts, without any rounding."""
    return np.sum([np.asarray(part, np.float64) for part in parts], axis=0)


def all_reduce_add_norm(x, parts: Sequence[np.ndarray], weight, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """(x + the sum of the parts, its norm), rounded nowhere but where add_norm rounds: the sum, to x's dtype."""
    return reference.add_norm(x, all_reduce(parts), weight, eps)
