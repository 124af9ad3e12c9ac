"""What prompt tokens and page copies cost on this device, measured once at start where decisions depend on it.

model_runner.py calls it when its steps are compiled, and puts what it finds into its Limits.
"""

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from jax_engine.batch import Batch, BatchLayout
from jax_engine.buckets import buckets
from jax_engine.config import EngineConfig, Limits
from jax_engine.schedule import Copies, PageCopy
from jax_engine.swap_space import COPY_PAGES

_log = logging.getLogger(__name__)

_NUM_COPIES = 8
_NUM_TRIES = 3


def measure(
    config: EngineConfig,
    limits: Limits,
    page_bytes: int,
    dispatch: Callable[[Batch], Any],
    copy_pages: Callable[[Copies], None],
) -> Limits:
    """The limits with token_seconds, num_swap_pages and swap_page_seconds. What the operator said stands.

    Args:
        page_bytes: of one page. dispatch, copy_pages: the runner's; pages are copied only if there is swap space.
    """
    bucket = max(buckets(limits), key=lambda bucket: bucket.num_tokens)
    layout = BatchLayout.of(bucket, limits)
    packed = np.zeros(layout.size, np.int32)
    layout.unpack(packed)["slots"][:] = limits.max_num_seqs  # every row is padding
    group = PageCopy(-1, 0, list(range(min(COPY_PAGES, limits.num_pages))))
    there, back = Copies([group], [], []), Copies([], [group], [])

    def seconds(num_copies: int) -> float:
        """Of a step without tokens, and copies there and back before it; the best of some."""
        times = []
        for _ in range(_NUM_TRIES):
            started = time.perf_counter()
            for _ in range(num_copies):
                copy_pages(there)
                copy_pages(back)
            dispatch(Batch(bucket, packed, None, None)).result()
            times.append(time.perf_counter() - started)
        return min(times)

    step_seconds = seconds(0)
    changes: dict[str, Any] = {}
    if not config.prefill_tokens_per_s:
        changes["token_seconds"] = step_seconds / bucket.num_tokens
    if config.swap_space_gib:
        changes["num_swap_pages"] = int(config.swap_space_gib * 2**30) // page_bytes
        if config.swap_gib_per_s:
            changes["swap_page_seconds"] = page_bytes / (config.swap_gib_per_s * 2**30)
        else:
            copying = seconds(_NUM_COPIES) - step_seconds
            changes["swap_page_seconds"] = max(copying, 0) / (2 * _NUM_COPIES * COPY_PAGES)
            copy_pages(Copies([], [], [-1]))
    _log.info("measured: %s", ", ".join(f"{name} {value:.3g}" for name, value in changes.items()))
    return dataclasses.replace(limits, **changes)
