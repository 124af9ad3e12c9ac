"""The flags of XLA that steps rely on, all in one place.

model_runner.py sets them before it first asks for a device, which is when XLA reads them. A flag that the operator has
put into XLA_FLAGS stays as it is.
"""

import os

#: Flag -> value, and why.
FLAGS = {
    # A step then is one CUDA graph. Without it, each `while` in the step and each `cond` around one (the search for
    # the sampling threshold, the log-probabilities of prompts) is driven from the host, which waits for the device to
    # learn the condition: measured on an H100, dispatch took as long as the step itself, so nothing ran ahead.
    # What GPUs that hold one model exchange through NCCL belongs to the graph too. Their sums of up to 2 MiB do not go
    # through NCCL (docs/adr/0032, docs/adr/0035).
    "xla_gpu_enable_command_buffer": "+WHILE,+COLLECTIVES",
}


#: For compiling a step for a GPU; given step by step, as other platforms need what this switches off. XLA takes a pool
#: that fills the memory, counted twice as it comes in and goes out, for a step that does not fit, and then computes in
#: every layer anew what the layers share: seven kernels a layer.
GPU_COMPILER_OPTIONS = {"xla_disable_hlo_passes": "rematerialization"}

#: Share of a GPU's memory that jax reserves when it starts; its own default of 0.75 would leave a quarter to nobody.
#: CUDA graphs and libraries take theirs from the rest.
MEMORY_FRACTION = "0.95"


def set_xla_flags() -> None:
    """Adds FLAGS to XLA_FLAGS, and says how much of a GPU is ours."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_FRACTION)
    present = os.environ.get("XLA_FLAGS", "")
    added = [f"--{name}={value}" for name, value in FLAGS.items() if f"--{name}=" not in present]
    os.environ["XLA_FLAGS"] = " ".join([*present.split(), *added])
