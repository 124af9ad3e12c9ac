"""Sums over the GPUs that hold one model: whether they are right, and microseconds of each.

    python -m benchmarks.all_reduce --devices=2 --rows=1,32,256 --out=benchmarks/results/h200x2_all_reduce.json

A sum is `all_reduce` of [rows, width] bfloat16 under shard_map, as the layers make them, each of what the one before
gave, divided by the number of devices: as many in one program as a step has. Then the same with residual sum and norm,
`all_reduce_add_norm`. Both are compared with what they must give in programs of their own, the sums many times over.
XLA_FLAGS chooses how XLA does them; the file says what it was.
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import program, report
from jax_engine.peer_memory import PeerMemory, memory_bytes
from jax_engine.sharding import TENSOR, choose_devices, make_mesh, replicated
from jax_engine.xla_flags import GPU_COMPILER_OPTIONS, set_xla_flags
from pallas_kernels.all_reduce import IMPLEMENTATIONS, all_reduce, all_reduce_add_norm

WARM_UP, TIMED = 5, 30
EPS = 1e-5
#: Of a norm, in units of its row's largest number: a few roundings to bfloat16.
MAX_ERROR = 2**-6
#: Sums of a program that compares them.
COMPARED = 8
#: Numbers below it: their sums over eight devices are exact in bfloat16.
BOUND = 32


class Bench:
    """Programs of many sums over the devices of a mesh.

    Args:
        width: elements of a row. count: sums of a program. implementation: see all_reduce.
    """

    def __init__(self, mesh: jax.sharding.Mesh, width: int, count: int, implementation: str):
        self.mesh, self.width, self.count = mesh, width, count
        self.peers = None
        if memory_bytes(mesh):
            self._memory = PeerMemory(mesh)
            self.peers = jax.device_put(self._memory.peers(), NamedSharding(mesh, PartitionSpec(TENSOR)))
        # One function for all sums, so that they are traced once.
        self._sum = jax.jit(lambda x, peers: all_reduce(x, TENSOR, peers, implementation=implementation))
        options = {"eps": EPS, "platform": mesh.devices.flat[0].platform, "implementation": implementation}
        self._norm = jax.jit(lambda x, part, w, peers: all_reduce_add_norm(x, part, w, TENSOR, peers, **options))

    def compile(self, function: Callable[..., jax.Array], given: jax.Array) -> Callable[[jax.Array], jax.Array]:
        """function(given, peers) on each device; what is given and returned is whole on every one."""
        # What is whole stays so, which tracing cannot prove.
        whole, own = PartitionSpec(), PartitionSpec(TENSOR)
        mapped = jax.shard_map(function, mesh=self.mesh, in_specs=(whole, own), out_specs=whole, check_vma=False)
        compiled = jax.jit(mapped).lower(given, self.peers).compile(compiler_options=GPU_COMPILER_OPTIONS)
        return lambda given: compiled(given, self.peers)

    def put(self, array: np.ndarray) -> jax.Array:
        """The array whole on every device."""
        return jax.device_put(array, replicated(self.mesh))

    def wrong(self, rows: int, repeats: int) -> int:
        """How many elements of [rows, width] come out wrong, over all sums of so many programs."""

        def compare(seed: jax.Array, peers: Any) -> jax.Array:
            def part(rank: Any, number: int) -> jax.Array:
                at = jnp.arange(rows)[:, None] * 7 + jnp.arange(self.width) * 3
                return ((at + seed[0] * 131 + number * 17 + rank * 29) % BOUND).astype(jnp.bfloat16)

            found = jnp.int32(0)
            for number in range(COMPARED):
                whole, peers = self._sum(part(jax.lax.axis_index(TENSOR), number), peers)
                found += (whole != sum(part(rank, number) for rank in range(self.mesh.size))).sum()
            return jax.lax.psum(found, TENSOR)

        run = self.compile(compare, self.put(np.zeros(1, np.int32)))
        return sum(map(int, [run(self.put(np.full(1, seed, np.int32))) for seed in range(repeats)]))

    def norm_error(self, rows: int) -> float:
        """The largest difference of a norm from what it must be, in units of the largest number of its row."""

        def compare(x: jax.Array, peers: Any) -> jax.Array:
            rank = jax.lax.axis_index(TENSOR)
            weight = (1 + jnp.arange(self.width) / self.width).astype(x.dtype)
            _, norm, _ = self._norm(x, x * (rank + 1).astype(x.dtype), weight, peers)
            total = x.astype(jnp.float32) * (1 + self.mesh.size * (self.mesh.size + 1) / 2)
            want = total * jax.lax.rsqrt(jnp.mean(total * total, axis=1, keepdims=True) + EPS) * weight
            return jax.lax.pmax((jnp.abs(norm - want) / jnp.abs(want).max(axis=1, keepdims=True)).max(), TENSOR)

        x = self.put(np.random.default_rng(0).standard_normal((rows, self.width)).astype(jnp.bfloat16))
        return float(self.compile(compare, x)(x))

    def measure(self, rows: int) -> dict[str, Any]:
        """Times a program of sums of [rows, width], and one of sums with norms, run back to back."""

        def add_up(x: jax.Array, peers: Any) -> jax.Array:
            for _ in range(self.count):
                x, peers = self._sum(x * (1 / self.mesh.size), peers)
            return x

        def add_up_and_norm(x: jax.Array, peers: Any) -> jax.Array:
            weight, total = jnp.ones(self.width, x.dtype), x
            for _ in range(self.count):
                total, x, peers = self._norm(total, x, weight, peers)
            return x

        x = self.put(np.ones((rows, self.width), jnp.bfloat16))
        us_each, dispatches = self._time(add_up, x)
        norm_us_each, _ = self._time(add_up_and_norm, x)
        sizes = {"rows": rows, "kib": x.nbytes / 1024}
        return sizes | {"us_each": us_each, "norm_us_each": norm_us_each, "dispatch_ms": report.percentiles(dispatches)}

    def _time(self, function: Callable[..., jax.Array], x: jax.Array) -> tuple[float, list[float]]:
        """Microseconds of each of the function's sums, and the milliseconds of each dispatch."""
        run, dispatches = self.compile(function, x), []
        for _ in range(WARM_UP):
            x = run(x)
        jax.block_until_ready(x)
        start = time.perf_counter()
        for _ in range(TIMED):
            began = time.perf_counter()
            x = run(x)
            dispatches.append((time.perf_counter() - began) * 1e3)
        jax.block_until_ready(x)
        return (time.perf_counter() - start) / TIMED / self.count * 1e6, dispatches


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; argv[0] is the program's name. Returns 1 if a sum was wrong.

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
    absl_flags.DEFINE_list("implementations", ["gpu", "xla"], f"In turn: {', '.join(IMPLEMENTATIONS)}.", **here)
    absl_flags.DEFINE_integer("repeats", 1250, f"Programs of {COMPARED} sums that are compared.", lower_bound=0, **here)
    absl_flags.DEFINE_string("out", None, "Results file to write (JSON).", **here)
    if not program.parse(values, "benchmarks.all_reduce", __doc__, argv[1:]):
        return 0
    set_xla_flags()
    [devices] = choose_devices(jax.devices(), values["devices"].value)
    mesh = make_mesh(devices)
    sizes, repeats = [int(rows) for rows in values["rows"].value], values["repeats"].value
    found = []
    for implementation in values["implementations"].value:
        bench = Bench(mesh, values["width"].value, values["count"].value, implementation)
        for rows in sizes:
            wrong = bench.wrong(rows, repeats) if repeats else None
            checks = {"wrong_elements": wrong, "norm_error": bench.norm_error(rows)}
            found.append({"implementation": implementation, **checks, **bench.measure(rows)})
            print(found[-1], flush=True)
    cells = [[f["implementation"], *(f"{f[key]:.4g}" for key in ("kib", "us_each", "norm_us_each"))] for f in found]
    print(report.table([["", "KiB", "us each", "with norm"], *cells]))
    if values["out"].value:
        fields = {"devices": mesh.size, "count": values["count"].value, "compared": repeats * COMPARED, "sums": found}
        flags = os.environ["XLA_FLAGS"]
        document = report.document("benchmarks.all_reduce", argv, device=report.jax_device(), xla_flags=flags, **fields)
        report.write(values["out"].value, document)
    return int(any(f["wrong_elements"] or f["norm_error"] > MAX_ERROR for f in found))


if __name__ == "__main__":
    program.run(main)
