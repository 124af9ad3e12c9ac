"""Counters in device memory, by which the thread blocks of a Mosaic GPU kernel learn of one another's progress.

int32 each, and zero whenever no kernel runs that uses them: a kernel writes to the zeros it is given, but leaves them
as they were, so that all calls of a program share them. Those calls must follow one another, as layers do. Pallas's own
semaphores are zeroed by a kernel before each call. Everything here is done by a whole warpgroup. The interpreter knows
none of it.
"""

# The types of plgpu's own names are not to be had: it exports some of them lazily.
# pyright: reportPrivateImportUsage=false

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

#: Adds one, or makes zero of the last; the copy engine, too, sees after it what other blocks wrote before they counted.
#: The barrier tells all threads what the one that counted has found.
_ARRIVE = f"""{{
    .reg .pred last;
    .reg .u32 before;
    mov.u32 before, 0xffffffff;
    @$2 atom.acq_rel.gpu.global.inc.u32 before, [$1], $3;
    @$2 fence.proxy.async;
    setp.eq.u32 last, before, $3;
    barrier.cta.red.or.pred last, $4, {mgpu.utils.WARPGROUP_SIZE}, last;
    selp.u32 $0, 1, 0, last;
}}"""


def add_to(counter, by: int):
    """Adds to a counter, after all that this warpgroup has written."""

    def add(semaphore):
        mgpu.utils.warpgroup_barrier()
        semaphore.signal(by % 2**32, memory_scope="gpu")

    _with_semaphore(counter, add)


def wait_for_count(counter, count: int):
    """Waits until a counter has come to `count`; what was written before it was counted can then be read."""
    _with_semaphore(counter, lambda semaphore: semaphore.wait(count, decrement=False, memory_scope="gpu"))


def is_last(counter, others):
    """Whether the `others` [int32] have asked this before; the one that is told so finds all that they had written.

    What a warpgroup has written by the copy engine it must have waited for. The counter is zero again after the last.
    """
    scalar = plgpu.Layout.WG_SPLAT(())
    wrap: Any = plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), scalar),
        return_type=plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), layout=scalar),
    )

    def arrive(_, counter, others):
        utils = mgpu.utils
        utils.warpgroup_barrier()
        last = utils.inline_ptx(
            _ARRIVE,
            utils.memref_ptr(counter),
            utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP),
            others.registers.item(),
            utils.warpgroup_barrier_idx(sync=False),
            result_types=others.mlir_dtype,
            has_side_effects=True,
            convergent=True,
        )
        return mgpu.FragmentedArray.splat(last, (), is_signed=True)

    return wrap(arrive)(counter, others) != 0


def _with_semaphore(counter, act: Callable[[Any], None]):
    wrap: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    wrap(lambda _, ref: act(mgpu.utils.SemaphoreRef(mgpu.utils.memref_ptr(ref))))(counter)
