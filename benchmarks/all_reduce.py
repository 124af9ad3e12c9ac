"""Sums over the GPUs that hold one model: microseconds of each, where a program has as many as a step.

    python -m benchmarks.all_reduce --devices=2 --rows=1,32,256 --out=benchmarks/results/h200x2_all_reduce.json

A sum is `jax.lax.psum` of [rows, width] bfloat16 under shard_map, as the layers make them, each of what the one before
gave, divided by the number of devices. XLA_FLAGS chooses how they are done; the file says what it was.
"""

import os
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags
from jax.sharding import PartitionSpec

from benchmarks import program, report
from jax_engine.sharding import TENSOR, choose_devices, make_mesh, replicated
from jax_engine.xla_flags import GPU_COMPILER_OPTIONS, set_xla_flags

WARM_UP, TIMED = 5, 30


def measure(mesh: jax.sharding.Mesh, rows: int, width: int, count: int) -> dict[str, Any]:
    """Times a program of `count` sums of [rows, width], run back to back.

    Raises:
        RuntimeError: the sums are wrong.
    """

    def add_up(x: jax.Array) -> jax.Array:
        for _ in range(count):
            x = jax.lax.psum(x * (1 / mesh.size), TENSOR)
        return x

    # What is whole on every device stays so, which tracing cannot prove.
    whole = PartitionSpec()
    function = jax.shard_map(add_up, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
    x = jax.device_put(np.ones((rows, width), jnp.bfloat16), replicated(mesh))
    compiled = jax.jit(function).lower(x).compile(compiler_options=GPU_COMPILER_OPTIONS)
    for _ in range(WARM_UP):
        x = compiled(x)
    jax.block_until_ready(x)
    dispatches = []
    start = time.perf_counter()
    for _ in range(TIMED):
        began = time.perf_counter()
        x = compiled(x)
        dispatches.append(time.perf_counter() - began)
    jax.block_until_ready(x)
    wall = time.perf_counter() - start
    if not (np.asarray(x) == 1).all():
        raise RuntimeError(f"sums of {rows} rows are wrong")
    return {
        "rows": rows,
        "kib": x.nbytes / 1024,
        "us_each": wall / TIMED / count * 1e6,
        "dispatch_ms": report.percentiles(seconds * 1e3 for seconds in dispatches),
    }


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; argv[0] is the program's name. Returns the exit status.

    Raises:
        UsageError: the command line is wrong.
        ConfigError: there are not so many devices.
    """
    values = absl_flags.FlagValues()
    here = {"flag_values": values, "module_name": "all_reduce"}
    absl_flags.DEFINE_integer("devices", 2, "GPUs to add up over.", lower_bound=2, **here)
    absl_flags.DEFINE_list("rows", ["1", "8", "32", "64", "256"], "Of what is added up, in turn.", **here)
    absl_flags.DEFINE_integer("width", 4096, "Elements of a row.", lower_bound=1, **here)
    absl_flags.DEFINE_integer("count", 64, "Sums in the program.", lower_bound=1, **here)
    absl_flags.DEFINE_string("out", None, "Results file to write (JSON).", **here)
    if not program.parse(values, "benchmarks.all_reduce", __doc__, argv[1:]):
        return 0
    set_xla_flags()
    [devices] = choose_devices(jax.devices(), values["devices"].value)
    mesh = make_mesh(devices)
    found = [measure(mesh, int(rows), values["width"].value, values["count"].value) for rows in values["rows"].value]
    cells = [[f"{f['kib']:g}", f"{f['us_each']:.1f}", f"{f['dispatch_ms']['p50']:.2f}"] for f in found]
    print(report.table([["KiB", "us each", "dispatch p50 ms"], *cells]))
    if values["out"].value:
        fields = {"devices": mesh.size, "count": values["count"].value, "sums": found}
        flags = os.environ["XLA_FLAGS"]
        document = report.document("benchmarks.all_reduce", argv, device=report.jax_device(), xla_flags=flags, **fields)
        report.write(values["out"].value, document)
    return 0


if __name__ == "__main__":
    program.run(main)
