"""The contract of block_tail, and the rule by which a layer takes it instead of its parts.

Called by a decoder layer of plain form: output product of attention, residual sum, RMSNorm, SwiGLU (arXiv 2002.05202).
Of interest while products are bound by their weights' way from memory, so for few tokens.

Axis letters: T tokens, D model, F feed-forward, A what attention leaves of a token (heads times head size).
"""

from jaxtyping import Array, Float

from pallas_kernels.block_tail import gpu, xla

IMPLEMENTATIONS = ("gpu", "xla")
#: For how many tokens the kernel is taken. Behind the attention of one layer of the 8B shape an H200 took 106.7 us with
#: it and 104.5 without at one token, 105.3 and 105.9 at 8, 109.7 and 111.3 at 16, 111.1 and 116.4 at 32
#: (benchmarks/results/h200_block_tail.json). With more, inputs would leave too little shared memory to weights.
MIN_TOKENS, MAX_TOKENS = 16, 32
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
