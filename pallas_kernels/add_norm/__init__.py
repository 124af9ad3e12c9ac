"""Adding to the residual stream and normalising it, as one kernel on a GPU."""

from pallas_kernels.add_norm.api import add_norm as add_norm
