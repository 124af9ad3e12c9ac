"""The contract of ragged_paged_attention, and the choice of who fulfils it on which platform.

Called by a model's step: `plan` once per step, then `write_kv` and `ragged_paged_attention` once per layer. The KV pool
is one array flattened over the layers, so that a layer updates it in place; its layout is private to this package. This
module never computes attention itself and knows nothing of requests, schedulers or models.

Axis letters: T packed new tokens, B rows (sequences), P pages per row, L layers, N query heads, K kv heads, H head dim.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.ragged_paged_attention import gpu, tpu, xla
from pallas_kernels.ragged_paged_attention.implementation import Device, Implementation, Options

_IMPLEMENTATIONS: dict[str, Implementation] = {"gpu": gpu, "xla": xla, "tpu": tpu}
_PREFERRED = {"cpu": "xla", "gpu": "gpu", "tpu": "tpu"}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ragged:
    """Which rows are in the step. Made once per step, shared by all layers.

    The rows of exactly one query token come first, `num_decodes` of them; longer rows follow; rows of padding, which
    have no query token, come last.

    Attributes:
        page_table: [B, P] int32, pages of one layer's share of the pool, in the order of the positions they hold.
            Entries past a row's need may be any integer.
        kv_lens: [B] int32, positions with KV after this step's tokens are written.
        query_starts: [B + 1] int32, offset of each row's tokens in the packed tokens; flat over padding rows.
        num_decodes: int32 scalar.
    """

    page_table: Int32[Array, "B P"]
    kv_lens: Int32[Array, "B"]
    query_starts: Int32[Array, "B+1"]
    num_decodes: Int32[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """What a step's layers share, derived from its Ragged.

    Attributes:
        rows: [T] int32, the row of each packed token; B - 1 for padding tokens.
        positions: [T] int32, its position in its sequence; 0 for padding tokens.
        slots: [T] int32, where its KV goes: page * page_size + offset, in one layer; -1 for padding tokens.
        work: the implementation's own list of work.
        num_pages: pages per layer. implementation: which one the work list was made for.
    """

    rows: Int32[Array, "T"]
    positions: Int32[Array, "T"]
    slots: Int32[Array, "T"]
    work: Any
    num_pages: int = field(metadata={"static": True})
    implementation: str = field(metadata={"static": True})


def _here() -> Device:
    return Device(jax.default_backend())


def _choose(implementation: str, device: Device, keys_only: bool) -> str:
    preferred = "xla" if keys_only else _PREFERRED.get(device.platform, "xla")
    name = preferred if implementation == "auto" else implementation
    if name not in _IMPLEMENTATIONS:
        allowed = ", ".join(("auto", *_IMPLEMENTATIONS))
        raise ValueError(f"implementation must be one of {allowed}; got {implementation!r}")
    return name


def pool_shape(
    num_layers: int,
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    device: Device | None = None,
    keys_only: bool = False,
    implementation: str = "auto",
) -> tuple[int, ...]:
    """Shape of the KV pool. Page p of layer l is index l * num_pages + p of its first axis, kv heads are its second.

    Args:
        num_pages: pages per layer. page_size: tokens per page, a power of two.
        device, keys_only, implementation: as in `plan`.
    """
    if page_size < 1 or page_size & (page_size - 1):
        raise ValueError(f"page_size must be a power of two, got {page_size}")
    owner = _IMPLEMENTATIONS[_choose(implementation, device or _here(), keys_only)]
    shape = owner.pool_shape(num_layers, num_pages, page_size, num_kv_heads, head_dim)
    return xla.keys_only_shape(shape) if keys_only else shape


def plan(
    ragged: Ragged,
    *,
    num_tokens: int,
    num_pages: int,
    page_size: int,
    decode_only: bool = False,
    device: Device | None = None,
    keys_only: bool = False,
    implementation: str = "auto",
) -> Plan:
    """Derives what all layers of a step share. Call it once per step, inside jit.

    Args:
        num_tokens: T, the packed tokens of the step, padding included.
        num_pages: pages per layer. page_size: tokens per page.
        decode_only: the step has no row of more than one token; the program for it has no code for such rows.
        device: which device the program is for; jax's default one when None.
        keys_only: values are the leading dimensions of the keys, and are not stored; xla.py alone can do with it.
        implementation: `auto` (by the device's platform) or a name.

    Raises:
        ValueError: there is no such implementation.
    """
    device = device or _here()
    name = _choose(implementation, device, keys_only)
    starts, lens, table = ragged.query_starts, ragged.kv_lens, ragged.page_table
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    row = jnp.searchsorted(starts[1:], token, side="right", method="compare_all").astype(jnp.int32)  # no loop
    row = jnp.minimum(row, lens.shape[0] - 1)
    real = token < starts[-1]
    position = jnp.where(real, lens[row] - (starts[row + 1] - token), 0)
    page = table[row, jnp.clip(position // page_size, 0, table.shape[1] - 1)]
    writable = real & (page >= 0) & (page < num_pages)
    return Plan(
        rows=row,
        positions=position,
        slots=jnp.where(writable, page * page_size + position % page_size, -1),
        work=_IMPLEMENTATIONS[name].make_work_list(
            table,
            lens,
            starts,
            ragged.num_decodes,
            num_tokens=num_tokens,
            num_pages=num_pages,
            page_size=page_size,
            decode_only=decode_only,
            device=device,
        ),
        num_pages=num_pages,
        implementation=name,
    )


def write_kv(
    pool: Float[Array, "..."],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"] | None,
    plan: Plan,
    layer: Int32[Array, ""],
    *,
    kv_scales: Float[Array, "2 K"] | None = None,
) -> Float[Array, "..."]:
    """Writes each real token's key and value at its place in `layer`; in place when the pool is donated.

    k and v are rounded to the pool's dtype, and what is past the largest number of an 8-bit one becomes that number.
    Padding tokens write nothing. v is None where the pool has keys only.

    Args:
        kv_scales: float32, what one unit of the pool's numbers is worth, for each kv head's keys and values; 1 if None.
    """
    if kv_scales is not None:
        assert v is not None, "a pool of keys only has no scales"
        k, v = (x.astype(jnp.float32) / scales[:, None] for x, scales in zip((k, v), kv_scales, strict=True))
    if pool.dtype.itemsize == 1:
        # Its type has no infinity: what does not fit would become NaN, or wrap around, and spoil its sequence.
        k = _rounded(k, pool.dtype)
        v = None if v is None else _rounded(v, pool.dtype)
    return _IMPLEMENTATIONS[plan.implementation].write_kv(pool, k, v, plan.slots, plan.work, layer * plan.num_pages)


def largest_number(dtype: jnp.dtype) -> float:
    """The largest number that a pool of the dtype holds; its negative is the least."""
    return float(jnp.iinfo(dtype).max if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).max)


def _rounded(x: Array, dtype: jnp.dtype) -> Array:
    largest = largest_number(dtype)
    return jnp.clip(jnp.round(x) if jnp.issubdtype(dtype, jnp.integer) else x, -largest, largest)


def largest_values(pool: Float[Array, "..."], num_pages: int) -> Float[Array, "L 2 K"]:
    """The largest absolute value of each layer's and kv head's keys and values, of a pool that began as zeros.

    Args:
        num_pages: pages per layer.
    """
    layers = pool.shape[0] // num_pages
    if pool.shape[2] == 1:  # tpu.py keeps small heads' keys and values side by side
        pool = jnp.concatenate(jnp.split(pool, 2, axis=-1), axis=2)
    by_page = jnp.abs(pool.astype(jnp.float32)).max(axis=(3, 4))
    return by_page.reshape(layers, num_pages, *by_page.shape[1:]).max(axis=1).swapaxes(1, 2)


def ragged_paged_attention(
    q: Float[Array, "T N H"],
    pool: Float[Array, "..."],
    plan: Plan,
    layer: Int32[Array, ""],
    *,
    scale: float,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    value_dim: int | None = None,
    kv_scales: Float[Array, "2 K"] | None = None,
) -> Float[Array, "T N V"]:
    """Causal attention: the token at position p sees its row's positions 0..p, as the pool holds them.

    Softmax and sums are float32 whatever the dtype of q and pool. The pool's is q's, or float8_e4m3fn or int8, whose
    numbers become q's where they are read, exactly. Query head n reads kv head n // (N // K). Slots nobody has written
    may hold anything, NaN included. On one shape a row's result does not depend on the other rows.

    Args:
        scale: factor of the scores, usually H ** -0.5.
        sliding_window: see at most this many latest positions, one's own included.
        logits_soft_cap: c in c * tanh(score / c), applied after `scale`.
        sinks: logits that take part in each head's softmax and carry no value.
        value_dim: where the pool has keys only: how many leading dimensions of a key are its value.
        kv_scales: those that the pool was written with. They leave the products: keys' are put on the queries, values'
            on the result, so that kernels need not know of them.

    Returns:
        [T, N, V] of q's dtype, V the size of a value, usually H; padding tokens are zero.
    """
    if q.shape[1] % pool.shape[1]:
        raise ValueError(f"query heads ({q.shape[1]}) must be a multiple of kv heads ({pool.shape[1]})")
    options = Options(scale, sliding_window, logits_soft_cap, sinks, value_dim)
    attend = _IMPLEMENTATIONS[plan.implementation].attend
    if kv_scales is None:
        return attend(q, pool, plan.work, layer * plan.num_pages, options)
    of_keys, of_values = jnp.repeat(kv_scales, q.shape[1] // pool.shape[1], axis=1)[:, :, None]
    scaled = (q.astype(jnp.float32) * of_keys).astype(q.dtype)
    attended = attend(scaled, pool, plan.work, layer * plan.num_pages, options)
    return (attended.astype(jnp.float32) * of_values).astype(q.dtype)
