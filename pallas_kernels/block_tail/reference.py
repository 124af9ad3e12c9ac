"""block_tail written from the maths, in float64; tests only."""

import numpy as np


def block_tail(attended, residual, output, norm, gate_up, down, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """(total, result) without any rounding in between."""
    attended, residual, output, norm, gate_up, down = (
        np.asarray(array, np.float64) for array in (attended, residual, output, norm, gate_up, down)
    )
    total = residual + attended @ output.T
    normed = total / np.sqrt((total * total).mean(axis=1, keepdims=True) + eps) * norm
    gate, up = np.split(normed @ gate_up.T, 2, axis=1)
    return total, (gate / (1 + np.exp(-gate)) * up) @ down.T
