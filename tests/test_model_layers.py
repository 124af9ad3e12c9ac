"""Layers that are more than a product and a norm: experts, a loop over layers of several kinds, recurrent state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_engine.layers import linear
from jax_engine.layers.context import StepContext
from jax_engine.layers.param import declare
from jax_engine.layers.recurrent import GatedDeltaNet, RecurrentCache
from jax_engine.layers.stack import run_layers
from jax_engine.model_config import DeltaConfig, LayerConfig, ModelConfig
from pallas_kernels.ragged_paged_attention import Ragged, plan


@pytest.mark.parametrize(
    "sizes", [[5, 0, 11], [0, 0, 16], [16, 0, 0], [1, 14, 1], [8, 8, 0], [7, 9, 0], [130, 3, 67]], ids=str
)
def test_grouped_matmul_gives_each_run_of_rows_its_own_matrix(sizes):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((sum(sizes), 12)).astype(np.float32)
    weight = rng.standard_normal((3, 2, 5, 12)).astype(np.float32)
    got = jax.jit(linear.multiply_blocks)(x, jnp.array(sizes), weight.reshape(3, 10, 12))
    parts = np.split(x, np.cumsum(sizes)[:-1])
    want = np.concatenate([part @ weight[i].reshape(10, 12).T for i, part in enumerate(parts)])
    np.testing.assert_allclose(got, want, atol=1e-5)
    got = jax.jit(linear.ragged_dot)(x, jnp.array(sizes), weight.reshape(3, 10, 12))
    np.testing.assert_allclose(got, want, atol=1e-5)


class Scale(nnx.Module):
    """x times a weight, one of two kinds; notes its place."""

    def __init__(self, sign: int, size: int):
        self.weight = declare((size, size), jnp.dtype(jnp.float32), (None, None))
        self.sign = sign

    def __call__(self, x, order, context, place):
        """`order` takes down which page of its group each layer saw, and its place."""
        return self.sign * linear.matmul(x, self.weight), order * 100 + context.plan.slots[0] * 10 + place


@pytest.mark.parametrize("unroll", [True, False])
def test_layers_of_several_kinds_run_in_their_order(unroll):
    signs = [1, -1, -1, 1]
    rng = np.random.default_rng(1)
    matrices = [rng.standard_normal((4, 4)).astype(np.float32) for _ in signs]
    layers = [Scale(sign, 4) for sign in signs]
    for layer, matrix in zip(layers, matrices, strict=True):
        layer.weight.set_value(jnp.asarray(matrix))
    x = rng.standard_normal((3, 4)).astype(np.float32)
    one = jnp.ones(1, jnp.int32)
    starts = jnp.arange(2, dtype=jnp.int32)
    tables = (jnp.full((1, 1), page, jnp.int32) for page in (3, 4))
    ragged = (Ragged(table, one, starts, one[0]) for table in tables)
    plans = tuple(plan(rows, num_tokens=1, num_pages=8, page_size=1) for rows in ragged)
    context = StepContext(plans[0], 0 * one, starts, one[0], False, plans)
    places = [(0, 0), (1, 5), (0, 1), (1, 2)]
    got, order = run_layers(layers, (jnp.asarray(x), jnp.int32(0)), context, places=places, unroll=unroll)
    want = x
    for sign, matrix in zip(signs, matrices, strict=True):
        want = sign * want @ matrix.T
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert int(order) == 30453142


DELTA = DeltaConfig(num_key_heads=2, num_value_heads=4, key_dim=6, value_dim=5, width=4)
CONFIG = ModelConfig(
    architecture="none", vocab_size=2, hidden_size=8, intermediate_size=1, num_hidden_layers=2, num_attention_heads=1,
    num_key_value_heads=1, head_dim=8, max_position_embeddings=64, delta=DELTA,
    layers=(LayerConfig(recurrent=True),) * 2,
)  # fmt: skip


@pytest.fixture(scope="module")
def delta_net() -> GatedDeltaNet:
    layer = GatedDeltaNet(CONFIG, jnp.dtype(jnp.float32))
    rng = np.random.default_rng(2)
    graph, state = nnx.split(layer)
    return nnx.merge(graph, jax.tree.map(lambda w: jnp.asarray(rng.standard_normal(w.shape), w.dtype), state))


def delta_step(layer, x, starts, slots, positions, cache, num_decodes):
    """One step of ragged rows; positions are those of the rows' first tokens."""
    lengths = np.diff(starts) + positions
    table = jnp.zeros((len(slots), 8), jnp.int32)
    ragged = Ragged(table, jnp.asarray(lengths), jnp.asarray(starts), jnp.int32(num_decodes))
    shared = plan(ragged, num_tokens=len(x), num_pages=64, page_size=8)
    context = StepContext(shared, jnp.asarray(slots), jnp.asarray(starts), jnp.int32(num_decodes), False)
    return layer(x, cache, context, jnp.int32(1))


def by_hand(layer: GatedDeltaNet, x: np.ndarray) -> np.ndarray:
    """One sequence from its start, token by token and head by head, in float64."""
    group, key_dim = 2, DELTA.key_dim
    weights = {name: np.asarray(getattr(layer, name).get_value(), np.float64) for name in (
        "project", "project_gates", "convolution", "log_decay", "time_bias", "output"
    )}  # fmt: skip
    norm = np.asarray(layer.norm.weight.get_value(), np.float64)
    out = np.zeros((len(x), 2, group, DELTA.value_dim))

    def silu(a):
        return a / (1 + np.exp(-a))

    for head in range(2):
        mixed = x @ weights["project"][head].T
        gates = x @ weights["project_gates"][head].T
        channels = weights["convolution"].shape[1]
        padded = np.concatenate([np.zeros((3, channels)), mixed[:, :channels]])
        state = np.zeros((group, key_dim, DELTA.value_dim))
        for t in range(len(x)):
            row = silu((padded[t : t + 4] * weights["convolution"][head].T).sum(axis=0))
            query, key, values = row[:key_dim], row[key_dim : 2 * key_dim], row[2 * key_dim :].reshape(group, -1)
            query = query / np.sqrt((query**2).sum() + 1e-6) / np.sqrt(key_dim)
            key = key / np.sqrt((key**2).sum() + 1e-6)
            for v in range(group):
                time = np.log1p(np.exp(gates[t, group + v] + weights["time_bias"][head, v]))
                state[v] *= np.exp(-np.exp(weights["log_decay"][head, v]) * time)
                write = 1 / (1 + np.exp(-gates[t, v]))
                state[v] += np.outer(key, write * (values[v] - key @ state[v]))
                found = query @ state[v]
                found = found / np.sqrt((found**2).mean() + CONFIG.norm_eps) * norm
                out[t, head, v] = found * silu(mixed[t, channels:].reshape(group, -1)[v])
    return out.reshape(len(x), -1) @ weights["output"].reshape(8, -1).T


def empty_cache(num_slots: int) -> RecurrentCache:
    """A cache with something in every slot that nobody may see."""
    return RecurrentCache(
        jnp.zeros(0), jnp.full((2, num_slots + 1, 2, 3, 22), 7.0), jnp.full((2, num_slots + 1, 2, 2, 6, 5), jnp.nan)
    )


def test_delta_net_in_ragged_steps_against_the_recurrence_by_hand(delta_net):
    rng = np.random.default_rng(3)
    sequences = [rng.standard_normal((length, 8)).astype(np.float32) for length in (9, 6, 1)]
    want = [by_hand(delta_net, x.astype(np.float64)) for x in sequences]
    # (sequence, first token, tokens) of each row; single tokens first.
    steps = [
        [(2, 0, 1), (0, 0, 2), (1, 0, 4)],
        [(1, 4, 1), (0, 2, 3)],
        [(0, 5, 1), (1, 5, 1)],
        [(0, 6, 3)],
    ]
    slots = {0: 2, 1: 0, 2: 1}
    cache = empty_cache(3)
    for rows in steps:
        x = np.zeros((12, 8), np.float32)
        starts = np.zeros(5, np.int32)
        starts[1 : len(rows) + 1] = np.cumsum([count for _, _, count in rows])
        starts[len(rows) + 1 :] = starts[len(rows)]
        for (sequence, first, count), start in zip(rows, starts, strict=False):
            x[start : start + count] = sequences[sequence][first : first + count]
        row_slots = np.array([slots[row[0]] for row in rows] + [3] * (4 - len(rows)), np.int32)
        positions = np.array([row[1] for row in rows] + [0] * (4 - len(rows)), np.int32)
        singles = sum(count == 1 for _, _, count in rows)
        out, cache = delta_step(delta_net, jnp.asarray(x), starts, row_slots, positions, cache, singles)
        for (sequence, first, count), start in zip(rows, starts, strict=False):
            got = out[start : start + count]
            np.testing.assert_allclose(got, want[sequence][first : first + count], rtol=1e-3, atol=1e-4)
