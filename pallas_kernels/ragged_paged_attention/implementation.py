"""What an implementation of ragged_paged_attention is: a module with these functions, named in api.py's table.

xla.py is one. Each owns the layout of its pool and the form of its work list; neither is known outside this package.
"""

from typing import Any, NamedTuple, Protocol

import jax


class Options(NamedTuple):
    """What a model's attention has beside the plain form; static except for `sinks`. See api.ragged_paged_attention."""

    scale: float
    sliding_window: int | None = None
    logits_soft_cap: float | None = None
    sinks: jax.Array | None = None
    value_dim: int | None = None


class Device(NamedTuple):
    """The device a program is made for. It need not be here, so nobody asks jax.devices() for it.

    Attributes:
        platform: `cpu`, `gpu` or `tpu`.
        kind: jax's name of the device, as `TPU v6 lite`; empty for any of the platform.
    """

    platform: str
    kind: str = ""


class Implementation(Protocol):
    """The functions of an implementation. Pages are of one layer; `first_page` is where the layer's pages start."""

    def pool_shape(
        self, num_layers: int, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int
    ) -> tuple[int, ...]:
        """Shape of the pool in this implementation's layout. xla.py also has one of keys only."""
        ...

    def make_work_list(
        self,
        page_table: jax.Array,
        kv_lens: jax.Array,
        query_starts: jax.Array,
        num_decodes: jax.Array,
        *,
        num_tokens: int,
        num_pages: int,
        page_size: int,
        decode_only: bool = False,
        device: Device,
    ) -> Any:
        """What the layers of a step share, as a pytree; the arguments are the parts of api.Ragged and of api.plan.

        Sizes of tiles are chosen for `device`, and for nothing else outside the arguments.
        """
        ...

    def write_kv(
        self,
        pool: jax.Array,
        k: jax.Array,
        v: jax.Array | None,
        slots: jax.Array,
        work: Any,
        first_page: jax.Array,
    ) -> jax.Array:
        """The pool with k and v [T, K, H] written at flat slots [T] of the layer; a negative slot writes nothing.

        `work` is the step's work list, which may hold the same in another form.
        """
        ...

    def attend(self, q: jax.Array, pool: jax.Array, work: Any, first_page: jax.Array, options: Options) -> jax.Array:
        """Attention of q [T, N, H] on the layer's pages, [T, N, H] of q's dtype."""
        ...
