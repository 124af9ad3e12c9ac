"""The contract of block_tail, and the rule by which a layer takes it instead of its parts.

Called by a decoder layer of plain form: output product of attention, residual sum, RMSNorm, SwiGLU (arXiv 2002.05202).
Of interest while products are bound by their weights' way from memory, so for few tokens.

Axis letters: T tokens, D model, F feed-forward, A what attention leaves of a token (heads times head size).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.block_tail import gpu, xla

IMPLEMENTATIONS = ("gpu", "xla")
#: For how many tokens the kernel is taken. A step of the 8B shape took an H200 5.69 ms with it and 5.87 without at 32
#: rows, 4.59 and 4.60 at one (benchmarks/results/h200_steps_block_tail.json and h200_steps_no_block_tail.json); a
#: forerunner took an H100 from 6.80 to 6.77 at 16 and from 7.69 to 7.61 at 32, and lost at 8 and one (h100_steps_...).
#: With more tokens, inputs would leave too little shared memory to weights.
MIN_TOKENS, MAX_TOKENS = 16, 32
#: Bytes of the weights from which it is taken: those of the 8B shape are 386 MB, and much smaller layers, where waiting
#: for one another is a larger part, have not been measured.
MIN_WEIGHT_BYTES = 300_000_000
#: jax's name of a device -> its multiprocessors. On any other the kernel's blocks might wait for one that cannot start.
MULTIPROCESSORS = {"NVIDIA H100 80GB HBM3": 132, "NVIDIA H200": 132}


def takes(tokens: int, embed: int, attended: int, hidden: int, dtype, device_kind: str) -> bool:
    """Whether the kernel serves, and is faster than the operations it stands for: D, A and F in this order.

    Args:
        device_kind: jax's name of the device that the program is for.
    """
    workers = MULTIPROCESSORS.get(device_kind)
    if workers is None or not MIN_TOKENS <= tokens <= MAX_TOKENS:
        return False
    if embed * (attended + 3 * hidden) * jnp.dtype(dtype).itemsize < MIN_WEIGHT_BYTES:
        return False
    return gpu.supports(tokens, embed, attended, hidden, dtype, gpu.tiles_for(workers))


def block_tail(
    attended: Float[Array, "T A"],
    residual: Float[Array, "T D"],
    output: Float[Array, "D A"],
    norm: Float[Array, " D"],
    gate_up: Float[Array, "2*F D"],
    down: Float[Array, "D F"],
    *,
    eps: float,
    device_kind: str,
    implementation: str = "gpu",
) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
    """(total, result) of

        total = residual + attended @ output^T
        normed = RMSNorm(total) * norm
        result = (silu(normed @ gate^T) * (normed @ up^T)) @ down^T

    with gate and up the halves of gate_up; both of residual's dtype. Products are summed in float32. Between them
    values are rounded to residual's dtype, but where is the implementation's choice. A token's results depend on
    nothing but the token and T.

    Args:
        eps: added to the mean of the squares.
        device_kind: jax's name of the device that the program is for.
        implementation: `gpu` or `xla`; `takes` says which of them is the better one.

    Raises:
        ValueError: there is no such implementation, or it does not take the shape or the device.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}; got {implementation!r}")
    if implementation == "xla":
        return xla.block_tail(attended, residual, output, norm, gate_up, down, eps)
    if device_kind not in MULTIPROCESSORS:
        raise ValueError(f"the GPU kernel is for {', '.join(MULTIPROCESSORS)}; got {device_kind!r}; take 'xla'")
    tiles = gpu.tiles_for(MULTIPROCESSORS[device_kind])
    tokens, embed, width, hidden = *residual.shape, attended.shape[1], down.shape[1]
    if not gpu.supports(tokens, embed, width, hidden, residual.dtype, tiles):
        shape = tokens, embed, width, hidden
        raise ValueError(f"{gpu.ALLOWED}; got T, D, A, F = {shape} of {residual.dtype}; take 'xla'")
    return gpu.block_tail(attended, residual, output, norm, gate_up, down, eps, tiles)
