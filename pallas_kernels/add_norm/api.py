"""The contract of add_norm, and the choice of who fulfils it on which platform.

Called by a model's layer twice: behind attention and behind the feed-forward. On a GPU gpu.py is used where steps were
measured to be faster with it, elsewhere xla.py, which XLA fuses as it likes.

Axis letters: T tokens, D model.
"""

from jaxtyping import Array, Float

from pallas_kernels.add_norm import gpu, xla

IMPLEMENTATIONS = ("auto", "gpu", "xla")
#: Fewest tokens for which `auto` takes the kernel. A decode step of the 8B shape took 17.5 ms with it and 18.0 without
#: at 256 rows, 8.15 and 8.1 at 32, 6.7 and 6.6 at one (benchmarks/results/h100_steps_variants.json: base, noan).
MIN_TOKENS = 128


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
        implementation: `auto`: gpu.py on a GPU for at least MIN_TOKENS tokens of a shape it takes, else xla.py; or one
            of them by name.

    Raises:
        ValueError: there is no such implementation, or it does not take the shape.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}; got {implementation!r}")
    fits = gpu.supports(x)
    if implementation == "gpu" and not fits:
        raise ValueError(f"{gpu.ALLOWED}; got {x.dtype} and D = {x.shape[1]}; take 'xla'")
    best = platform == "gpu" and fits and x.shape[0] >= MIN_TOKENS
    if implementation == "gpu" or (implementation == "auto" and best):
        return gpu.add_norm(x, added, weight, eps)
    return xla.add_norm(x, added, weight, eps)
