"""add_norm written from the maths, in float64; tests only."""

import numpy as np


def add_norm(x, added, weight, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """(sum, norm) without any rounding in between but that of the sum to x's dtype, which the contract asks for."""
    total = (np.asarray(x, np.float64) + np.asarray(added, np.float64)).astype(x.dtype)
    wide = total.astype(np.float64)
    root = np.sqrt((wide * wide).mean(axis=1, keepdims=True) + eps)
    return wide, wide / root * np.asarray(weight, np.float64)
