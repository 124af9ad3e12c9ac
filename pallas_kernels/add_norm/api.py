"""The contract of add_norm, and the choice of who fulfils it on which platform.

Called by a model's layer twice: behind attention and behind the feed-forward. A decode step of few rows spends most of
its time between products on launches, so one kernel instead of three counts; on a GPU gpu.py is used, elsewhere xla.py,
which XLA fuses as it likes.

Axis letters: T tokens, D model.
"""

from jaxtyping import Array, Float

from pallas_kernels.add_norm import gpu, xla

IMPLEMENTATIONS = ("auto", "gpu", "xla")


def add_norm(
    x: Float[Array, "T D"],
    added: Float[Array, "T D"],
    weight: Float[Array, " D"],
    *,
    eps: float,
    platform: str,
    implementation: str = "auto",
) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
    """(x + added, its root-mean-square norm over D times weight), both of x's dtype.

    The sum is rounded to x's dtype before it is normalised; squares, their mean and the root are float32; the norm is
    rounded before it is multiplied by the weight. A row's result depends on nothing but the row.

    Args:
        added: of any float dtype. eps: added to the mean of the squares.
        platform: which devices the program is for: `cpu`, `gpu` or `tpu`.
        implementation: `auto`: gpu.py on a GPU where it takes the shape, else xla.py; or one of them by name.

    Raises:
        ValueError: there is no such implementation, or it does not take the shape.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}; got {implementation!r}")
    fits = gpu.supports(x)
    if implementation == "gpu" and not fits:
        raise ValueError(f"{gpu.ALLOWED}; got {x.dtype} and D = {x.shape[1]}; take 'xla'")
    if implementation == "gpu" or (implementation == "auto" and platform == "gpu" and fits):
        return gpu.add_norm(x, added, weight, eps)
    return xla.add_norm(x, added, weight, eps)
