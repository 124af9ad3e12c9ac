"""Free places for small arrays in a GPU's memory, so that the temporaries of steps keep their address.

A step is one CUDA graph. Each of its nodes that touches a buffer whose address is another than at the last launch is
written anew before the next, which for temporaries is nearly all of them: a millisecond or more of the host's time.
XLA's allocator gives them at every launch the smallest free stretch that is large enough, from its start on; so they
move whenever a small array, such as the tokens of a step that is still to be read, lies at that start in one step and
elsewhere in the next. Small arrays go there only if there is no smaller stretch for them, so some are made.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

#: Bytes of the places: from the least that the allocator gives to what the grammars' masks of 256 rows take.
SIZES = tuple(1 << power for power in range(8, 24))
#: Places of each size: a few arrays of two steps in flight.
PLACES = 4


def leave_free(put: Callable[[np.ndarray], jax.Array]) -> list[Any]:
    """Makes the places, 64 MiB in all. Returns the arrays between them, as large: it is for the caller to keep these.

    Args:
        put: puts an array on the devices.
    """
    return [put(np.zeros(size, np.int8)) for size in SIZES for _ in range(2 * PLACES)][1::2]
