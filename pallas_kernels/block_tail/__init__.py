"""What a decoder layer does behind its attention, as one kernel on a GPU that streams all weights."""

from pallas_kernels.block_tail.api import block_tail as block_tail, takes as takes
