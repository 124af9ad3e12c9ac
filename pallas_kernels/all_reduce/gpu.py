"""all_reduce on GPUs that can write to each other's memory: one launch, one way over the links, no barrier.

Every device writes its part into the memory of all others, and adds what it finds in its own to it. Whether a part has
come is told by the part itself: each 8 bytes are 4 bytes of it and the number of the sum, and 8 bytes arrive at once
(the `LL` protocol of NCCL, github.com/NVIDIA/nccl). So nobody waits until a write has arrived to send a flag behind it.

    memory of a device: counters [BLOCKS] int32 | parts [2, n, BLOCKS, _SLOT] bytes, by parity, sender and thread block

A thread block of one device exchanges with the same one of the others, in slots of its own, and counts the sums it has
made: these numbers agree on all devices, since all of them run the same sums in the same order. Sums take turns between
two sets of slots. That is enough: a device that writes the sum after the next has finished the next, so it has that of
all others, who had all read this one before they wrote it.

The host takes no part, so the kernel can be a node of a CUDA graph. The addresses come in an array, since XLA would
exchange them anew at each launch. They are valid for all GPUs of a process, whose peers' memory XLA has made accessible
from each of them. What is written there is none of XLA's arrays as far as XLA knows, so it may run two sums at once, or
in another order than they are written down in, if neither needs the other's result: the array of addresses is returned,
a copy, for the next sum to take.

Called by api.py only. A block that waits keeps its place, so all blocks of a sum have to fit a GPU at once; they do.
"""

# The types of plgpu's own names are not to be had: it exports some of them lazily.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, scf, vector

from pallas_kernels.add_norm import gpu as add_norm

#: Threads of a block, and the bytes that each reads and writes at once.
_THREADS, _UNIT = 128, 16
#: Most thread blocks: two on each multiprocessor of an H100, of at least four that fit.
BLOCKS = 256
#: Most units of a thread.
_MAX_UNITS = 8
#: Most units of a thread, from all devices together, that all_reduce_add_norm holds in registers.
_MAX_PARTS = 32
_WORDS = _UNIT // 4
#: Bytes of a block's slot: each word with the number of its sum.
_SLOT = 2 * _UNIT * _MAX_UNITS * _THREADS
_COUNTER_BYTES = 4 * BLOCKS
_BLOCK_BYTES = _UNIT * _THREADS
MAX_BYTES = BLOCKS * _MAX_UNITS * _BLOCK_BYTES
ALLOWED = (
    f"the GPU kernel takes bfloat16, float16 or float32, a multiple of {_BLOCK_BYTES} bytes up to {MAX_BYTES >> 20} MiB"
)
ALLOWED_ROWS = (
    f"the GPU kernel takes up to {BLOCKS} rows of bfloat16 or float16, of a multiple of {_BLOCK_BYTES // 2} elements "
    f"up to {_MAX_UNITS * _BLOCK_BYTES // 2}, or half of that on 8 devices"
)


def supports(x: jax.Array) -> bool:
    """Whether the kernel takes such an array."""
    size = x.size * x.dtype.itemsize
    return x.dtype in (jnp.bfloat16, jnp.float16, jnp.float32) and 0 < size <= MAX_BYTES and _units(size) > 0


def supports_rows(x: jax.Array, num_devices: int) -> bool:
    """Whether all_reduce_add_norm takes such rows."""
    units, rest = divmod(x.shape[1] * x.dtype.itemsize, _BLOCK_BYTES)
    fits = 0 < units <= min(_MAX_UNITS, _MAX_PARTS // num_devices) and x.shape[0] <= BLOCKS
    return fits and not rest and x.dtype in (jnp.bfloat16, jnp.float16)


def memory_bytes(num_devices: int) -> int:
    """Bytes of each device's memory."""
    return _COUNTER_BYTES + 2 * num_devices * BLOCKS * _SLOT


def _units(size: int) -> int:
    """Units of each thread; 0 where blocks would have unlike sizes, or there are too many."""
    fitting = (units for units in range(1, _MAX_UNITS + 1) if size % (units * _BLOCK_BYTES) == 0)
    return next((units for units in fitting if size <= BLOCKS * units * _BLOCK_BYTES), 0)


def all_reduce(x, peers):
    """See api.all_reduce."""
    size = _units(x.size * x.dtype.itemsize) * _BLOCK_BYTES // x.dtype.itemsize
    run = plgpu.kernel(
        _sum_block,
        out_type=(jax.ShapeDtypeStruct((x.size // size, size), x.dtype), _like(peers)),
        kernel_name="all_reduce",
        grid=(x.size // size,),
        grid_names=("block",),
    )
    total, peers = run(x.reshape(-1, size), peers)
    return total.reshape(x.shape), peers


def all_reduce_add_norm(x, part, weight, peers, eps: float):
    """See api.all_reduce_add_norm."""
    run = plgpu.kernel(
        functools.partial(_sum_row, eps),
        out_type=(_like(x), _like(x), _like(peers)),
        kernel_name="all_reduce_add_norm",
        grid=(x.shape[0],),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return run(x, part, weight, peers)


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _sum_block(x_ref, peers_ref, out_ref, next_ref):
    layout = plgpu.Layout.WG_STRIDED((x_ref.shape[1],), vec_size=_UNIT // x_ref.dtype.itemsize)
    block = lax.axis_index("block")
    out_ref[block] = _sum(x_ref.at[block], layout, peers_ref, next_ref).astype(out_ref.dtype)


def _sum_row(eps: float, x_ref, part_ref, weight_ref, peers_ref, sum_ref, norm_ref, next_ref):
    row, layout = lax.axis_index("block"), add_norm.row_layout(x_ref.shape[1])
    total = add_norm.read(x_ref.at[row], layout) + _sum(part_ref.at[row], layout, peers_ref, next_ref)
    add_norm.write(total, layout, eps, weight_ref, sum_ref.at[row], norm_ref.at[row])


def _sum(part_ref, layout, peers_ref, next_ref):
    """The sum of what all devices have of this block, [D] float32 in that layout."""
    exchange: Any = plgpu.inline_mgpu(
        arg_types=(layout, plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT),
        return_type=plgpu.ShapeDtypeStruct(part_ref.shape, jnp.dtype(jnp.float32), layout=layout),
    )
    part, num_devices = plgpu.layout_cast(part_ref[...], layout), peers_ref.shape[0] - 2
    run = exchange(lambda _, *args: _exchange(num_devices, *args))
    return run(part, peers_ref, next_ref, lax.axis_index("block"))


def _exchange(num_devices: int, x, table_ref, next_ref, block):
    """Sends this thread's part to all others, and adds up what comes and its own, in the order of devices."""
    i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)

    def constant(value: int):
        return mgpu.utils.c(value, i64)

    def at(address, offset: int = 0):
        return llvm.inttoptr(llvm.PointerType.get(), arith.addi(address, constant(offset)))

    def entry(index: int):
        return llvm.load(i64, mgpu.utils.getelementptr(mgpu.utils.memref_ptr(table_ref), [index], i64))

    entries = [entry(index) for index in range(num_devices + 2)]
    *addresses, rank, own = entries
    block = arith.extui(i64, block.registers.flat[0])
    counter = at(arith.addi(own, arith.muli(block, constant(4))))
    number = arith.addi(llvm.load(i32, counter), mgpu.utils.c(1, i32))
    thread = arith.remui(arith.index_cast(i64, gpu.thread_id(gpu.Dimension.x)), constant(_THREADS))
    parity = arith.extui(i64, arith.andi(number, mgpu.utils.c(1, i32)))

    # From the start of a memory to this thread's first unit in the slot of a sender.
    slot = arith.addi(arith.muli(block, constant(_SLOT)), arith.muli(thread, constant(2 * _UNIT)))
    slot = arith.addi(slot, arith.muli(parity, constant(num_devices * BLOCKS * _SLOT)))
    slot = arith.addi(slot, constant(_COUNTER_BYTES))
    offsets = [2 * _UNIT * _THREADS * unit + half for unit in range(x.registers.size) for half in (0, _UNIT)]

    words = []
    for register in x.registers.flat:
        packed = mgpu.utils.bitcast(register, ir.VectorType.get((_WORDS,), i32))
        words += [vector.extract(packed, [], [word]) for word in range(_WORDS)]
    mine = arith.addi(slot, arith.muli(rank, constant(BLOCKS * _SLOT)))
    for receiver, address in enumerate(addresses):
        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ne, rank, constant(receiver))):
            target = arith.addi(address, mine)
            for first, second, offset in zip(words[::2], words[1::2], offsets, strict=True):
                line = at(target, offset), first, number, second
                mgpu.utils.inline_ptx("st.volatile.global.v4.b32 [$0], {$1, $2, $3, $2};", *line)

    total = None
    for sender in range(num_devices):
        is_own = arith.cmpi(arith.CmpIPredicate.eq, rank, constant(sender))
        choice: Any = scf.IfOp(is_own, [i32] * len(words), has_else=True)
        with ir.InsertionPoint.at_block_begin(choice.then_block):
            scf.yield_(words)
        with ir.InsertionPoint.at_block_begin(choice.else_block):
            source = arith.addi(own, arith.addi(slot, constant(sender * BLOCKS * _SLOT)))
            scf.yield_(_receive([at(source, offset) for offset in offsets], number))
        part = _as_part(x, list(choice.results))
        total = part if total is None else total + part
    # No thread may still have to read the counter.
    mgpu.utils.warpgroup_barrier()
    with mgpu.utils.single_thread(mgpu.utils.ThreadSubset.WARPGROUP):
        llvm.store(number, counter)
        for index, value in enumerate(entries):
            llvm.store(value, mgpu.utils.getelementptr(mgpu.utils.memref_ptr(next_ref), [index], i64))
    return total


def _receive(lines: list, number) -> list:
    """The words of a part, as soon as all of its lines bear the number."""
    i32 = ir.IntegerType.get_signless(32)
    loop = scf.WhileOp([i32] * 2 * len(lines), [])
    with ir.InsertionPoint.at_block_begin(loop.before.blocks.append()):
        words, unlike = [], mgpu.utils.c(0, i32)
        for line in lines:
            first, first_number, second, second_number = mgpu.utils.inline_ptx(
                "ld.volatile.global.v4.b32 {$0, $1, $2, $3}, [$4];",
                line,
                result_types=[i32] * 4,
                has_side_effects=True,
            )
            words += [first, second]
            for found in (first_number, second_number):
                unlike = arith.ori(unlike, arith.xori(found, number))
        scf.condition(arith.cmpi(arith.CmpIPredicate.ne, unlike, mgpu.utils.c(0, i32)), words)
    with ir.InsertionPoint.at_block_begin(loop.after.blocks.append(*[i32] * len(words))):
        scf.yield_([])
    return list(loop.results)


def _as_part(x, words: list):
    """Words as float32 numbers, laid out over the threads as x is."""
    i32 = ir.IntegerType.get_signless(32)
    registers = np.empty(x.registers.size, object)
    for index in range(registers.size):
        unit = words[index * _WORDS : (index + 1) * _WORDS]
        packed = vector.from_elements(ir.VectorType.get((_WORDS,), i32), unit)
        registers[index] = mgpu.utils.bitcast(packed, ir.VectorType.get((_UNIT * 8 // _bits(x),), x.mlir_dtype))
    part = mgpu.FragmentedArray(
        _registers=registers.reshape(x.registers.shape), _layout=x.layout, _is_signed=x.is_signed
    )
    return part.astype(ir.F32Type.get())


def _bits(x) -> int:
    return mgpu.utils.bitwidth(x.mlir_dtype)
