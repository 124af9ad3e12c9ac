"""block_tail on Hopper: one kernel that hardly ever stops fetching weights.

With few tokens a product takes as long as its weights take to arrive, so fetches must not pause: not between tiles, not
between products, not while one thread block waits for another. A persistent kernel has one thread block on every
multiprocessor, and each owns some outputs of every product for all tokens: it reads their weights from end to end and
has their sums in registers, so nothing is added up across blocks. A memory warpgroup streams these weights through a
ring in shared memory and waits for nothing but free places in it; a second one fetches the matching inputs; a compute
warpgroup multiplies. Weights take the rows of the matrix instruction and tokens its columns, so few tokens cost little
padding.

All blocks wait for one another twice, where a product's outputs become the inputs of the next. Meanwhile the ring fills
with the next weights.

    output product, sum with the residual, times the norm's weight | gate and up, gated | down

The norm's own factor, one number for each token, is known only when the whole token is; it is applied behind the
product of gate and up instead of before it.

Called by api.py only. A token's result depends on nothing but the token and compiled sizes.
"""

# The types of plgpu's own names are not to be had: it exports some of them lazily.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_counters import add_to, wait_for_count

COMPUTE, WEIGHTS, INPUTS = 0, 1, 2
#: Rows of a matrix instruction.
_INSTRUCTION_ROWS = 64
#: Inputs of a block of weights: a row of what the tensor cores read from shared memory.
_BLOCK = 64
_TRANSFORMS = (plgpu.TilingTransform((8, _BLOCK)), plgpu.SwizzleTransform(128))
#: Rows of a place in the ring of weights: a block of as many outputs, or several blocks of fewer.
_PLACE_ROWS = 128
#: The two times all workers wait for one another, and when everybody has done so.
_NORMALISED, _GATED, _PASSED = range(3)


@dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Attributes:
        num_workers: thread blocks. They wait for one another, so all must run at once: one on each multiprocessor.
        weight_places, input_places: of the two rings in shared memory.
        max_blocks: most blocks of a place.
        alone: there is one worker and nobody to wait for; the interpreter knows no semaphores.
    """

    num_workers: int = 132
    weight_places: int = 8
    input_places: int = 4
    max_blocks: int = 4
    alone: bool = False


#: For GPU interpret mode.
INTERPRETED = Tiles(num_workers=1, weight_places=4, input_places=2, alone=True)
#: Shared memory of a block, bytes, less what barriers take.
_SHARED_BYTES = 227 * 1024 - 1024
ALLOWED = (
    f"the GPU kernel takes bfloat16 or float16, widths that are multiples of 8 and at most {_PLACE_ROWS} times its "
    "workers, and as many tokens as fit shared memory"
)


def tiles_for(workers: int) -> Tiles:
    """How the work is cut for a GPU of so many multiprocessors."""
    return INTERPRETED if workers == 1 else Tiles(workers)


def supports(tokens: int, embed: int, attended: int, hidden: int, dtype, tiles: Tiles) -> bool:
    """Whether the kernel takes such a layer."""
    sizes = _Sizes(tokens, *products(embed, attended, hidden, tiles), 0.0, tiles)
    fits = all(product.fits for product in (sizes.output, sizes.up, sizes.down))
    return fits and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and sizes.shared_bytes <= _SHARED_BYTES


@dataclass(frozen=True)
class Product:
    """A product with weights [outputs, inputs] and how it is shared out."""

    outputs: int
    inputs: int
    tiles: Tiles

    @property
    def rows(self) -> int:
        """Outputs of a worker: rows of eight, as the copy engine writes the tensor cores' layout."""
        return -(-self.outputs // self.tiles.num_workers // 8) * 8

    @property
    def wide_rows(self) -> int:
        """The same, rounded up to what instructions multiply; what they make of the rest is dropped."""
        return -(-self.rows // _INSTRUCTION_ROWS) * _INSTRUCTION_ROWS

    @property
    def blocks(self) -> int:
        """Blocks of a place: the same outputs, one piece of the inputs after the other."""
        return max(min(_PLACE_ROWS // self.rows, self.tiles.max_blocks), 1)

    @property
    def steps(self) -> int:
        """Places that a worker's weights go through."""
        return -(-self.inputs // (_BLOCK * self.blocks))

    @property
    def fits(self) -> bool:
        """Whether the kernel takes such a product."""
        return self.outputs % 8 == 0 and self.inputs % 8 == 0 and self.rows <= _PLACE_ROWS

    def my_steps(self):
        """Steps of this worker: none when there are no outputs left for it."""
        return jnp.where(lax.axis_index("worker") * self.rows < self.outputs, jnp.int32(self.steps), jnp.int32(0))

    def my_rows(self, first: int = 0):
        """Where this worker's outputs are."""
        return pl.ds(first + lax.axis_index("worker") * self.rows, self.rows)


@dataclass(frozen=True)
class _Sizes:
    """Everything static about one call; `tokens` is the true number."""

    tokens: int
    output: Product
    up: Product
    down: Product
    eps: float
    tiles: Tiles

    @property
    def columns(self) -> int:
        """Tokens, rounded up to what instructions multiply."""
        return -(-self.tokens // 8) * 8

    @property
    def embed(self) -> int:
        """Width of the residual stream."""
        return self.down.outputs

    @property
    def ring_rows(self) -> int:
        """Rows of the ring of weights, and past them what an instruction reads beyond the last block."""
        ends = (p.rows * (p.blocks - 1) + p.wide_rows for p in (self.output, self.up, self.down))
        return self.tiles.weight_places * _PLACE_ROWS + max(0, max(ends) - _PLACE_ROWS)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block, but for its barriers."""
        inputs = self.tiles.input_places * self.tiles.max_blocks * self.columns
        return 2 * (_BLOCK * (self.ring_rows + inputs) + _PLACE_ROWS * (self.columns + 1)) + 4 * self.columns


def products(embed: int, attended: int, hidden: int, tiles: Tiles) -> tuple[Product, Product, Product]:
    """Of what attention leaves, of gate and of up (one of the two), and down."""
    return Product(embed, attended, tiles), Product(hidden, embed, tiles), Product(embed, hidden, tiles)


def block_tail(attended, residual, output, norm, gate_up, down, eps: float, tiles: Tiles):
    """See api.block_tail."""
    tokens, embed = residual.shape
    sizes = _Sizes(tokens, *products(embed, attended.shape[1], down.shape[1], tiles), eps, tiles)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=residual.dtype)
    sums = -(-tiles.num_workers // _INSTRUCTION_ROWS) * _INSTRUCTION_ROWS
    run = plgpu.kernel(
        functools.partial(_entry, sizes),
        out_type=(
            shape((tokens, embed)),
            shape((tokens, embed)),
            shape((sizes.columns, embed)),
            shape((sizes.columns, down.shape[1])),
            shape((sums, sizes.columns), dtype=jnp.float32),
        ),
        grid=(tiles.num_workers,),
        grid_names=("worker",),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="block_tail",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    if tiles.alone:  # the interpreter reads nothing past the end, where the copy engine fills in zeros
        attended, residual = (jnp.pad(x, ((0, sizes.columns - tokens), (0, 0))) for x in (attended, residual))
    counters = jnp.zeros(_PASSED + 1, jnp.int32)
    total, result, *_ = run(attended, residual, output, norm, gate_up, down, counters)
    return total, result


class _Arrays(NamedTuple):
    """Arrays in device memory.

    Given: attended [T, N*H], residual [T, D], output [D, N*H], norm [D], gate_up [2F, D], down [D, F]. Made: total and
    result [T, D]. In between: scaled [T, D], the sum times the norm's weight; gated [T, F]; squares [workers, T]
    float32, sums of squares over the outputs of each worker.

    counters: [3] int32, how many workers have got as far as _NORMALISED, _GATED and _PASSED. Zeros before and after:
    the kernel writes to what it was given, but leaves it as it was, so that all layers of a step can share it.
    """

    attended: Any
    residual: Any
    output: Any
    norm: Any
    gate_up: Any
    down: Any
    counters: Any
    total: Any
    result: Any
    scaled: Any
    gated: Any
    squares: Any


class _Shared(NamedTuple):
    """Shared memory of a thread block, and the barriers that hand its parts over.

    `made` says within a block what the counters say to all: that inputs of the next product have been written.
    """

    weights: Any
    inputs: Any
    staging: Any
    norm: Any
    factor: Any
    weights_full: Any
    inputs_full: Any
    weights_free: Any
    inputs_free: Any
    loaded: Any
    made: Any
    factor_known: Any


def _entry(sizes: _Sizes, *refs):
    """Allocates shared memory and barriers, then runs the warpgroups."""
    arrays = _Arrays(*refs)
    tiles, dtype = sizes.tiles, arrays.result.dtype

    def run(*scratch):
        memory = _Shared(*scratch)
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup == WEIGHTS)(lambda: _fetch_weights(sizes, arrays, memory))
        pl.when(warpgroup == INPUTS)(lambda: _fetch_inputs(sizes, arrays, memory))
        pl.when(warpgroup == COMPUTE)(lambda: _compute(sizes, arrays, memory))

    pl.run_scoped(
        run,
        plgpu.SMEM((sizes.ring_rows, _BLOCK), dtype, transforms=_TRANSFORMS),
        plgpu.SMEM((tiles.input_places, tiles.max_blocks, sizes.columns, _BLOCK), dtype, transforms=_TRANSFORMS),
        plgpu.SMEM((sizes.columns, _PLACE_ROWS), dtype),
        plgpu.SMEM((_PLACE_ROWS,), dtype),
        plgpu.SMEM((sizes.columns,), jnp.float32),
        plgpu.Barrier(num_arrivals=tiles.max_blocks, num_barriers=tiles.weight_places),
        plgpu.Barrier(num_arrivals=tiles.max_blocks, num_barriers=tiles.input_places),
        plgpu.Barrier(num_barriers=tiles.weight_places),
        plgpu.Barrier(num_barriers=tiles.input_places),
        plgpu.Barrier(num_arrivals=2),
        plgpu.Barrier(),
        plgpu.Barrier(),
        collective_axes="warpgroup",
    )


def _fetch_weights(sizes: _Sizes, arrays: _Arrays, memory: _Shared):
    """The first memory warpgroup: this worker's outputs of all weights, without a pause."""
    plgpu.set_max_registers(40, action="decrease")
    places, barriers = sizes.tiles.weight_places, (memory.weights_full, memory.weights_free)
    hidden = sizes.up.outputs

    def fetch(product: Product, source, first: int, step, done):
        def copy(place, block, full):
            here = source.at[product.my_rows(first), _inputs(product, step, block)]
            target = memory.weights.at[pl.ds(place * _PLACE_ROWS + block * product.rows, product.rows)]
            plgpu.copy_gmem_to_smem(here, target, full)

        return _fill(sizes, product, places, *barriers, copy, done)

    def fetch_both(step, done):
        return fetch(sizes.up, arrays.gate_up, hidden, step, fetch(sizes.up, arrays.gate_up, 0, step, done))

    fetch_output = functools.partial(fetch, sizes.output, arrays.output, 0)
    fetch_down = functools.partial(fetch, sizes.down, arrays.down, 0)
    done = lax.fori_loop(0, sizes.output.my_steps(), fetch_output, jnp.int32(0))
    done = lax.fori_loop(0, sizes.up.my_steps(), fetch_both, done)
    done = lax.fori_loop(0, sizes.down.my_steps(), fetch_down, done)
    _drain(places, memory.weights_free, done)


def _fetch_inputs(sizes: _Sizes, arrays: _Arrays, memory: _Shared):
    """The second: the products' inputs, as soon as they exist. It has time for the norm's factor too."""
    plgpu.set_max_registers(96, action="decrease")
    places, barriers = sizes.tiles.input_places, (memory.inputs_full, memory.inputs_free)
    # Traced, for that may lead past the end: what comes of columns without a token is dropped.
    tokens = pl.ds(lax.axis_index("worker") * 0, sizes.columns)
    mine = pl.ds(sizes.output.my_rows().start, _PLACE_ROWS)
    plgpu.copy_gmem_to_smem(arrays.residual.at[tokens, mine], memory.staging, memory.loaded)
    plgpu.copy_gmem_to_smem(arrays.norm.at[mine], memory.norm, memory.loaded)

    def fetch(product: Product, source, step, done):
        def copy(place, block, full):
            here = source.at[tokens, _inputs(product, step, block)]
            plgpu.copy_gmem_to_smem(here, memory.inputs.at[place, block], full)

        return _fill(sizes, product, places, *barriers, copy, done)

    fetch_output = functools.partial(fetch, sizes.output, arrays.attended)
    fetch_up = functools.partial(fetch, sizes.up, arrays.scaled)
    fetch_down = functools.partial(fetch, sizes.down, arrays.gated)
    done = lax.fori_loop(0, sizes.output.my_steps(), fetch_output, jnp.int32(0))
    plgpu.barrier_wait(memory.made)
    _wait_for_all(sizes, arrays, _NORMALISED)
    # Compute waits for the factor at the end of gate and up only, and for inputs all the time: halfway they are ahead.
    steps = sizes.up.my_steps()
    done = lax.fori_loop(0, steps // 2, fetch_up, done)
    _store(memory.factor, _norm_factor(sizes, arrays.squares))
    plgpu.barrier_arrive(memory.factor_known)
    done = lax.fori_loop(steps // 2, steps, fetch_up, done)
    plgpu.barrier_wait(memory.made)
    _wait_for_all(sizes, arrays, _GATED)
    done = lax.fori_loop(0, sizes.down.my_steps(), fetch_down, done)
    _reset(sizes, arrays)
    _drain(places, memory.inputs_free, done)


def _inputs(product: Product, step, block: int):
    """Which inputs a block of a step is about."""
    return pl.ds((step * product.blocks + block) * _BLOCK, _BLOCK)


def _fill(sizes: _Sizes, product: Product, places: int, full, free, copy, done):
    """copy(place, block, barrier) for the blocks of the next place of a ring, when it comes free.

    `done` places were filled before; returns how many then are.
    """
    place = lax.rem(done, jnp.int32(places))
    pl.when(done >= places)(lambda: plgpu.barrier_wait(free.at[place]))
    for block in range(product.blocks):
        copy(place, block, full.at[place])
    for _ in range(sizes.tiles.max_blocks - product.blocks):
        plgpu.barrier_arrive(full.at[place])  # the barrier counts as many copies for every product
    return done + 1


def _drain(places: int, free, done):
    """Nobody may leave while arrivals are outstanding."""

    @pl.loop(jnp.maximum(done - places, 0), done)
    def _(step):
        plgpu.barrier_wait(free.at[lax.rem(step, jnp.int32(places))])


class _Done(NamedTuple):
    """Places of both rings that were used up."""

    weights: Any
    inputs: Any


def _compute(sizes: _Sizes, arrays: _Arrays, memory: _Shared):
    """The compute warpgroup."""
    plgpu.set_max_registers(232, action="increase")
    dtype = arrays.result.dtype
    done = _Done(jnp.int32(0), jnp.int32(0))
    (added,), done = _multiply(sizes, sizes.output, 1, memory, done)
    total = _normalise(sizes, arrays, memory, added)
    _tell(sizes, arrays, memory, _NORMALISED)
    _write(sizes, arrays.total, memory, sizes.output, total)
    (gate, up), done = _multiply(sizes, sizes.up, 2, memory, done)
    plgpu.barrier_wait(memory.factor_known)
    factor = _load(memory.factor, plgpu.Layout.WGMMA.reduce(0))
    factor = lax.broadcast_in_dim(factor, gate.shape, [1])
    # Rounded as the products of the plain form are.
    gate, up = ((value * factor).astype(dtype).astype(jnp.float32) for value in (gate, up))
    _write(sizes, arrays.gated, memory, sizes.up, gate / (1 + jnp.exp(-gate)) * up)
    _tell(sizes, arrays, memory, _GATED)
    (result,), _ = _multiply(sizes, sizes.down, 1, memory, done)
    _write(sizes, arrays.result, memory, sizes.down, result)


def _tell(sizes: _Sizes, arrays: _Arrays, memory: _Shared, when: int):
    """Lets those who fetch inputs know that this worker has made its share of them."""
    if not sizes.tiles.alone:
        add_to(arrays.counters.at[when], 1)
    plgpu.barrier_arrive(memory.made)


def _wait_for_all(sizes: _Sizes, arrays: _Arrays, when: int):
    if not sizes.tiles.alone:
        wait_for_count(arrays.counters.at[when], sizes.tiles.num_workers)


def _reset(sizes: _Sizes, arrays: _Arrays):
    """Sets the counters to zero again, for whoever gets them next, as soon as nobody waits for them any more."""
    if sizes.tiles.alone:
        return
    add_to(arrays.counters.at[_PASSED], 1)

    @pl.when(lax.axis_index("worker") == 0)
    def _():
        _wait_for_all(sizes, arrays, _PASSED)
        for when in (_NORMALISED, _GATED, _PASSED):
            add_to(arrays.counters.at[when], -sizes.tiles.num_workers)


def _multiply(sizes: _Sizes, product: Product, count: int, memory: _Shared, done: _Done):
    """This worker's outputs of `count` products with the same inputs, [wide_rows, T] float32 each.

    Their weights come in turns. Rows past the worker's own are of no meaning: instructions multiply whatever lies
    behind a block in the ring.
    """
    tiles, rows = sizes.tiles, product.rows

    def accumulate(*accs):
        def multiply(_, done):
            inputs = lax.rem(done.inputs, jnp.int32(tiles.input_places))
            plgpu.barrier_wait(memory.inputs_full.at[inputs])
            for index, acc in enumerate(accs):
                place = lax.rem(done.weights + index, jnp.int32(tiles.weight_places))
                plgpu.barrier_wait(memory.weights_full.at[place])
                for block in range(product.blocks):
                    weights = memory.weights.at[pl.ds(place * _PLACE_ROWS + block * rows, product.wide_rows)]
                    plgpu.wgmma(acc, weights, memory.inputs.at[inputs, block].transpose((1, 0)))
            plgpu.wgmma_wait(0)
            for index in range(count):
                place = lax.rem(done.weights + index, jnp.int32(tiles.weight_places))
                plgpu.barrier_arrive(memory.weights_free.at[place])
            plgpu.barrier_arrive(memory.inputs_free.at[inputs])
            return _Done(done.weights + count, done.inputs + 1)

        after = lax.fori_loop(0, product.my_steps(), multiply, done)
        return tuple(acc[...] for acc in accs), after

    return pl.run_scoped(accumulate, *[plgpu.ACC((product.wide_rows, sizes.columns), jnp.float32)] * count)


def _normalise(sizes: _Sizes, arrays: _Arrays, memory: _Shared, added):
    """This worker's outputs of the sum with the residual, which are returned; writes all that the norm needs of it."""
    dtype, wide_rows = arrays.total.dtype, sizes.output.wide_rows
    plgpu.barrier_wait(memory.loaded)
    mine = pl.ds(0, wide_rows)
    residual = _load(memory.staging.at[:, mine].transpose((1, 0)), plgpu.Layout.WGMMA_TRANSPOSED)
    residual = plgpu.layout_cast(residual, plgpu.Layout.WGMMA).astype(jnp.float32)
    weight = _load(memory.norm.at[mine], plgpu.Layout.WGMMA.reduce(1)).astype(jnp.float32)
    total = (residual + added.astype(dtype).astype(jnp.float32)).astype(dtype)
    wide = total.astype(jnp.float32)
    row = plgpu.broadcasted_iota(jnp.int32, wide.shape, 0, layout=plgpu.Layout.WGMMA)
    squares = jnp.where(row < sizes.output.rows, wide * wide, 0.0)
    _store(arrays.squares.at[lax.axis_index("worker")], jnp.sum(squares, axis=0))
    _write(sizes, arrays.scaled, memory, sizes.output, wide * lax.broadcast_in_dim(weight, wide.shape, [0]))
    return total


def _norm_factor(sizes: _Sizes, squares):
    """What the norm multiplies each token with, [T] float32."""
    total, workers = 0.0, sizes.tiles.num_workers
    for first in range(0, workers, _INSTRUCTION_ROWS):
        sums = _load(squares.at[pl.ds(first, _INSTRUCTION_ROWS)], plgpu.Layout.WGMMA)
        if workers - first < _INSTRUCTION_ROWS:  # nobody wrote the rest
            row = plgpu.broadcasted_iota(jnp.int32, sums.shape, 0, layout=plgpu.Layout.WGMMA)
            sums = jnp.where(row < workers - first, sums, 0.0)
        total = total + sums
    return lax.rsqrt(jnp.sum(total, axis=0) / sizes.embed + sizes.eps)


def _write(sizes: _Sizes, target, memory: _Shared, product: Product, value):
    """Writes this worker's outputs, of value [wide_rows, T], to its columns of target [T, outputs], and waits."""
    _store(memory.staging.at[:, pl.ds(0, product.wide_rows)].transpose((1, 0)), value.astype(target.dtype))
    plgpu.commit_smem()

    @pl.loop(0, sizes.tokens)
    def _(token):
        source = memory.staging.at[token, pl.ds(0, product.rows)]
        plgpu.copy_smem_to_gmem(source, target.at[token, product.my_rows()])

    plgpu.wait_smem_to_gmem(0)


def _load(source, layout):
    return plgpu.load(source, layout=layout, optimized=False)


def _store(target, value):
    """Stores in whatever pieces the value's layout allows, which jax asks for in two ways."""
    if hasattr(plgpu, "store"):
        plgpu.store(target, value, optimized=False)
    else:  # before jax 0.12
        target[...] = value
