"""The attention kernels by themselves, on a GPU: bytes or operations per second, and their error against the reference.

    python -m benchmarks.kernels --out=benchmarks/results/h100_kernels.json

Decode is bound by memory: the figure is the KV bytes read over the time. Prefill is bound by arithmetic: the figure is
the operations a causal attention needs over the time. Several calls run back to back inside one program, each on the
result of the one before, so launches and the host are not measured. Pages are in random order.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags

from benchmarks import program, report
from pallas_kernels.ragged_paged_attention import Ragged, plan, ragged_paged_attention, reference, write_kv
from pallas_kernels.ragged_paged_attention.cases import MIXES, SHAPES, Shape, make_inputs

MODEL = SHAPES["llama-8b"]
MAX_LEN = 8192
CALLS, ROUNDS, REPEATS = 4, 3, 10
#: Of one H100 80GB: bytes per second by its data sheet, and dense bfloat16 operations per second.
PEAK_BYTES, PEAK_OPERATIONS = 3.35e12, 989e12


def decode_cases() -> dict[str, list[int]]:
    """Name -> KV length of each row."""
    random = np.random.default_rng(0)
    cases = {f"{rows} x {length}": [length] * rows for rows, length in ((256, 1024), (128, 1024), (64, 4096))}
    cases |= {f"{rows} x {length}": [length] * rows for rows, length in ((32, 1024), (8, 8192), (1, 8192), (256, 256))}
    return cases | {"256, log-normal": np.clip(random.lognormal(6, 1, 256).astype(int), 16, 8000).tolist()}


def prefill_cases() -> dict[str, list[int]]:
    """Name -> prompt length of each row."""
    ragged = np.random.default_rng(0).integers(64, 1025, 15).tolist()
    return {"1 x 4096": [4096], "1 x 8192": [8192], "2 x 2048": [2048] * 2, "15 x 64..1024": ragged}


@dataclasses.dataclass(frozen=True)
class Step:
    """Rows of a step: `kv_lens` positions each, of which the last `query_lens` are queries."""

    kv_lens: list[int]
    query_lens: list[int]
    page_size: int
    shape: Shape = MODEL

    def arrays(self) -> tuple[jax.Array, jax.Array, Ragged, int]:
        """q [T, N, H], the pool, the rows, and the number of pages."""
        random = np.random.default_rng(0)
        pages_of = [-(-length // self.page_size) for length in self.kv_lens]
        num_pages = sum(pages_of)
        table = np.zeros((len(pages_of), MAX_LEN // self.page_size), np.int32)
        order = np.split(random.permutation(num_pages), np.cumsum(pages_of)[:-1])
        for row, pages in enumerate(order):
            table[row, : pages.size] = pages
        pool_shape = (num_pages, self.shape.num_kv_heads, 2, self.page_size, self.shape.head_dim)
        q_shape = (sum(self.query_lens), self.shape.num_heads, self.shape.head_dim)
        ragged = Ragged(
            page_table=jnp.asarray(table),
            kv_lens=jnp.asarray(self.kv_lens, jnp.int32),
            query_starts=jnp.asarray(np.cumsum([0, *self.query_lens]), jnp.int32),
            num_decodes=jnp.int32(sum(length == 1 for length in self.query_lens)),
        )
        q, pool = (jax.random.normal(jax.random.key(i), s, jnp.bfloat16) for i, s in enumerate((q_shape, pool_shape)))
        return q, pool, ragged, num_pages

    def seconds(self, implementation: str) -> float:
        """Of one call of the op."""
        q, pool, ragged, num_pages = self.arrays()
        decode_only = all(length == 1 for length in self.query_lens)

        @jax.jit
        def run(q: jax.Array, pool: jax.Array, ragged: Ragged) -> jax.Array:
            shared = plan(
                ragged,
                num_tokens=q.shape[0],
                num_pages=num_pages,
                page_size=self.page_size,
                decode_only=decode_only,
                implementation=implementation,
            )
            for _ in range(CALLS):
                q = ragged_paged_attention(q, pool, shared, jnp.int32(0), scale=self.shape.head_dim**-0.5)
            return q

        return best_of(lambda: run(q, pool, ragged)) / CALLS


def best_of(call: Callable[[], jax.Array]) -> float:
    """Seconds of one call, in the best of some rounds."""
    call().block_until_ready()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(REPEATS):
            result = call()
        result.block_until_ready()
        times.append((time.perf_counter() - start) / REPEATS)
    return min(times)


def measure(page_size: int, implementation: str) -> list[dict[str, Any]]:
    """A row of figures for every case."""
    rows = []
    for name, lens in decode_cases().items():
        seconds = Step(lens, [1] * len(lens), page_size).seconds(implementation)
        moved = sum(lens) * MODEL.num_kv_heads * MODEL.head_dim * 2 * 2
        rows.append(_row("decode", name, seconds, moved / seconds, PEAK_BYTES))
    for name, lens in prefill_cases().items():
        seconds = Step(lens, lens, page_size).seconds(implementation)
        operations = sum(2 * length * (length + 1) * MODEL.num_heads * MODEL.head_dim for length in lens)
        rows.append(_row("prefill", name, seconds, operations / seconds, PEAK_OPERATIONS))
    return rows


def _row(kernel: str, name: str, seconds: float, rate: float, peak: float) -> dict[str, Any]:
    print(f"{kernel} {name}: {seconds * 1e6:.1f} us, {rate / 1e9:,.0f} G/s", flush=True)
    return {"kernel": kernel, "case": name, "us": seconds * 1e6, "per_s": rate, "share_of_peak": rate / peak}


def errors(page_size: int, implementation: str) -> dict[str, float]:
    """Relative error, by the norm, of every shared mix in bfloat16; unused slots hold NaN."""
    found = {}
    for name, mix in MIXES.items():
        if not mix.rows:
            continue
        inputs = make_inputs(MODEL, mix, page_size=page_size, dtype=jnp.bfloat16)
        shared = plan(
            inputs.ragged,
            num_tokens=mix.num_tokens,
            num_pages=inputs.num_pages,
            page_size=page_size,
            implementation=implementation,
        )
        pool = write_kv(inputs.pool, inputs.k, inputs.v, shared, jnp.int32(1))
        scale = MODEL.head_dim**-0.5
        out = np.asarray(ragged_paged_attention(inputs.q, pool, shared, jnp.int32(1), scale=scale), np.float32)
        wanted = reference.ragged_paged_attention(inputs.q, pool, inputs.ragged, 1, inputs.num_pages, scale=scale)
        found[name] = float(np.linalg.norm(out - wanted) / np.linalg.norm(wanted))
    return found


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; argv[0] is the program's name. Returns the exit status.

    Raises:
        UsageError: the command line is wrong.
    """
    flag_values = absl_flags.FlagValues()
    here = {"flag_values": flag_values, "module_name": "kernels"}
    absl_flags.DEFINE_integer("page_size", 64, "Tokens in a page.", lower_bound=16, **here)
    absl_flags.DEFINE_string("implementation", "auto", "Of the op: auto, gpu or xla.", **here)
    absl_flags.DEFINE_string("out", None, "Results file to write (JSON).", **here)
    if not program.parse(flag_values, "benchmarks.kernels", __doc__, argv[1:]):
        return 0
    page_size, implementation = flag_values["page_size"].value, flag_values["implementation"].value
    rows, error = measure(page_size, implementation), errors(page_size, implementation)
    cells = [[f"{r['kernel']} {r['case']}", f"{r['us']:.1f}", f"{r['per_s'] / 1e12:.2f}"] for r in rows]
    print("\n" + report.table([["", "us", "T/s"], *cells]))
    print("\n" + report.table([["relative error", ""], *([name, f"{value:.1e}"] for name, value in error.items())]))
    if flag_values["out"].value:
        fields = {"page_size": page_size, "implementation": implementation, "rows": rows, "relative_error": error}
        document = report.document("benchmarks.kernels", argv, device=report.jax_device(), **fields)
        report.write(flag_values["out"].value, document)
    return 0


if __name__ == "__main__":
    program.run(main)
