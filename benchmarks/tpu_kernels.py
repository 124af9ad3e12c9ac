"""The TPU kernels as the compiler lays them out for chips that are not here: instruction bundles, spills, in-place use.

A static profile, not a measurement: a bundle is what a core issues in one cycle if it waits for nothing. It shows a
regression of a kernel, and whether the instructions of a KV block can keep up with the block's bytes. Needs libtpu
(extra `tpu`). tests/test_tpu_compile.py does the same and compares with benchmarks/results/tpu_kernels.json.
"""

import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags as absl_flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import program, report
from jax_engine.targets import ONE_CHIP, open_target
from pallas_kernels.ragged_paged_attention import Device, Ragged, plan, pool_shape, ragged_paged_attention, write_kv
from pallas_kernels.ragged_paged_attention.cases import SHAPES, Shape
from pallas_kernels.ragged_paged_attention.tpu_tiles import tiles_for

LAYERS, PAGES, PAGE_SIZE, MAX_MODEL_LEN = 3, 1024, 64, 8192
KERNELS = ("ragged_paged_attention", "write_kv")
#: Name -> packed tokens, rows, whether all rows decode; and the pool's dtype.
STEPS = {
    "decode": ((256, 256, True), jnp.bfloat16),
    "mixed": ((512, 64, False), jnp.bfloat16),
    "decode int8": ((256, 256, True), jnp.int8),
    "decode fp8": ((256, 256, True), jnp.float8_e4m3fn),
}


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of write and attention of LAYERS layers. Bytes.

    pool_bytes: of the pool. alias_bytes: of what is updated in place. temp_bytes: beside the arguments.
    """

    pool_bytes: int
    alias_bytes: int
    temp_bytes: int


def compile_op(
    chip: str,
    shape: Shape,
    tokens: int,
    rows: int,
    decode_only: bool,
    *,
    layers: int = LAYERS,
    dtype: Any = jnp.bfloat16,
    pool_dtype: Any = None,
    sinks: bool = False,
    **options: Any,
) -> Compiled:
    """Compiles a step's write and attention for a chip, one device of it.

    Args:
        dtype: of queries, keys and values. pool_dtype: of the pool, where it is another.
        options: of ragged_paged_attention.
    """
    device = open_target(chip).devices[0]
    mesh = Mesh([device], ("one",))
    place = NamedSharding(mesh, PartitionSpec())

    def array(dims: tuple[int, ...], kind: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, kind, sharding=place)

    def step(pool, q, k, v, ragged, sink_values, kv_scales):
        shared = plan(
            ragged,
            num_tokens=tokens,
            num_pages=PAGES,
            page_size=PAGE_SIZE,
            decode_only=decode_only,
            device=Device("tpu", device.device_kind),
        )
        for layer in range(layers):
            pool = write_kv(pool, k, v, shared, jnp.int32(layer), kv_scales=kv_scales)
            q = ragged_paged_attention(
                q, pool, shared, jnp.int32(layer), scale=0.1, sinks=sink_values, kv_scales=kv_scales, **options
            )
        return pool, q

    dims = pool_shape(layers, PAGES, PAGE_SIZE, shape.num_kv_heads, shape.head_dim, implementation="tpu")
    ragged = Ragged(array((rows, MAX_MODEL_LEN // PAGE_SIZE)), array((rows,)), array((rows + 1,)), array(()))
    kv = array((tokens, shape.num_kv_heads, shape.head_dim), dtype)
    q = array((tokens, shape.num_heads, shape.head_dim), dtype)
    sink_values = array((shape.num_heads,), jnp.float32) if sinks else None
    kv_scales = array((2, shape.num_kv_heads), jnp.float32) if pool_dtype == jnp.int8 else None
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(step, donate_argnums=0).lower(
            array(dims, pool_dtype or dtype), q, kv, kv, ragged, sink_values, kv_scales
        )
    memory = lowered.compile().memory_analysis()
    assert memory is not None, "the compiler reports no memory use"
    pool_bytes = math.prod(dims) * jnp.dtype(pool_dtype or dtype).itemsize
    return Compiled(pool_bytes, memory.alias_size_in_bytes, memory.temp_size_in_bytes)


def profile(chip: str, steps: Iterable[str], folder: Path) -> Iterator[dict[str, Any]]:
    """One entry for each step and kernel of the 8B shape.

    Args:
        folder: where the compiler writes what it made; see `dump_to`.
    """
    for step in steps:
        before = set(folder.iterdir())
        sizes, pool_dtype = STEPS[step]
        compile_op(chip, SHAPES["llama-8b"], *sizes, layers=1, pool_dtype=pool_dtype)
        files = sorted(set(folder.iterdir()) - before)
        for kernel in KERNELS:
            name = {"chip": chip, "step": step, "kernel": kernel}
            yield name | _figures(files, kernel) | _pace(chip, step, kernel, files)


def dump_to(folder: Path) -> None:
    """Has the compiler write what it makes of each kernel; to be called before anything of libtpu is."""
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v6e-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def _text(files: Sequence[Path], kernel: str, kind: str) -> str:
    [file] = [file for file in files if f"-{kernel}." in file.name and file.name.endswith(f"-{kind}.txt")]
    return file.read_text()


def _figures(files: Sequence[Path], kernel: str) -> dict[str, int]:
    """Bundles of a kernel, those that do nothing, and vector registers that go to memory and back for want of room."""
    analysis = _text(files, kernel, "schedule-analysis_final_bundles")
    total, empty = (int(re.findall(rf"{name} scheduled bundles: +(\d+)", analysis)[0]) for name in ("total", "\tempty"))
    columns, rows = _text(files, kernel, "final_hlo-static-per-bundle-utilization").split("== UTILIZATION:\n")
    names = [name.strip() for name in columns.splitlines()[1].split(",")]
    used = [list(map(int, row.split())) for row in rows.splitlines() if row.strip()]
    sums = {name: sum(row[index] for row in used) for index, name in enumerate(names)}
    return {"bundles": total, "empty": empty, "fills": sums["VLOAD:FILL"], "spills": sums["VSTORE:SPILL"]}


def _pace(chip: str, step: str, kernel: str, files: Sequence[Path]) -> dict[str, float]:
    """What one turn of the decode walk issues, and at which clock that takes as long as the block's bytes do.

    A turn is a full block of keys and values of one row. In a mixed step a turn is one of two kinds, which the text
    does not tell apart.
    """
    (_, _, decode_only), pool_dtype = STEPS[step]
    if kernel != "ragged_paged_attention" or not decode_only:
        return {}
    from jax.experimental.pallas import tpu as pltpu

    kind = open_target(chip).devices[0].device_kind
    turn, fetch = turn_bundles(_text(files, kernel, "final_bundles"))
    pages = tiles_for(kind).block_kv // PAGE_SIZE
    issued = turn + pages * fetch
    shape = SHAPES["llama-8b"]
    block = 2 * tiles_for(kind).block_kv * shape.num_kv_heads * shape.head_dim * jnp.dtype(pool_dtype).itemsize
    name = chip.partition(":")[0].removeprefix("tpu")
    seconds = block / pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(name), 1).mem_bw_bytes_per_second
    return {
        "turn_bundles": turn,
        "fetch_bundles": fetch,
        "issued_per_block": issued,
        "block_us_by_bandwidth": seconds * 1e6,
        "clock_ghz_needed": issued / seconds / 1e9,
    }


def turn_bundles(bundles: str) -> tuple[int, int]:
    """Bundles of the walk's loop, without its inner loops, and of the inner loop that fetches one page.

    Args:
        bundles: the compiler's listing; a bundle's loop depth is its number of `>`.
    """
    loops: list[dict[str, Any]] = []
    for line in bundles.splitlines():
        found = re.match(r" *(?:0x[0-9a-f]+|0) +(LB)?[A-Z ]*: (>*)", line)
        if not found:
            continue
        depth = len(found[2])
        if found[1]:
            loops.append({"depth": depth, "bundles": 0, "dma": False, "inner": []})
            if depth > 1:
                outer = next(loop for loop in reversed(loops) if loop["depth"] < depth)
                outer["inner"].append(loops[-1])
        owner = next((loop for loop in reversed(loops) if loop["depth"] == depth), None)
        if depth and owner:
            owner["bundles"] += 1
            owner["dma"] |= "dma." in line
    walk = max((loop for loop in loops if loop["depth"] == 1), key=lambda loop: loop["bundles"])
    return walk["bundles"], sum(loop["bundles"] for loop in walk["inner"] if loop["dma"])


def main(argv: Sequence[str]) -> int:
    flag_values = absl_flags.FlagValues()
    here = {"flag_values": flag_values, "module_name": "benchmarks.tpu_kernels"}
    absl_flags.DEFINE_list("chips", ",".join(ONE_CHIP), "Targets to compile for.", **here)
    absl_flags.DEFINE_list("steps", ",".join(STEPS), "Kinds of steps.", **here)
    absl_flags.DEFINE_string("out", None, "File for the figures, as JSON.", **here)
    if not program.parse(flag_values, "benchmarks.tpu_kernels", __doc__, argv[1:]):
        return 0
    entries: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        dump_to(Path(folder))
        for chip in flag_values["chips"].value:  # a file after each: a chip takes minutes
            entries += profile(chip, flag_values["steps"].value, Path(folder))
            if flag_values["out"].value:
                compiler = {name: version(name) for name in ("jax", "libtpu")}
                document = report.document("benchmarks.tpu_kernels", argv, compiler=compiler, kernels=entries)
                report.write(flag_values["out"].value, document)
    columns = ("bundles", "empty", "fills", "spills", "issued_per_block", "clock_ghz_needed")
    rows = [("kernel", *columns)]
    for entry in entries:
        cells = (f"{entry[name]:.4g}" if name in entry else "-" for name in columns)
        rows.append((f"{entry['chip']} {entry['step']} {entry['kernel']}", *cells))
    print(report.table(rows))
    return 0


if __name__ == "__main__":
    program.run(main)
