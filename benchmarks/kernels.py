"""The attention kernels by themselves, on a GPU: bytes or operations per second, and their error against the reference.

    python -m benchmarks.kernels --out=benchmarks/results/h100_kernels.json

Decode is bound by memory: the figure is the KV bytes read over the time. Prefill is bound by arithmetic: the figure is
the operations a causal attention needs over the time. Several calls run back to back inside one program, each on the
result of the one before, so launches and the host are not measured; nor is the plan, which is made once per step and
timed by itself. The kernel of longer rows is also asked for the same tokens in rows cut in other ways: no bit may
differ. Pages are in random order. A case that fails is reported and the others go on; the results file is written anew
after every case, so that a run that is cut off leaves what it has.
"""

import dataclasses
import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags

from benchmarks import program, report
from benchmarks.ceilings import PEAKS
from pallas_kernels.ragged_paged_attention import Plan, Ragged, plan, ragged_paged_attention, reference, write_kv
from pallas_kernels.ragged_paged_attention.api import largest_number
from pallas_kernels.ragged_paged_attention.cases import MIXES, SHAPES, Mix, Shape, in_8_bits, make_inputs

MODEL = SHAPES["llama-8b"]
MAX_LEN = 8192
#: Of keys and values, by the engine's names.
POOL_DTYPES = {"auto": jnp.bfloat16, "fp8": jnp.float8_e4m3fn, "int8": jnp.int8}
ROUNDS, REPEATS = 3, 8
#: Calls written out in a program's loop; 64 take a minute to compile where a row may have 64 pieces.
UNROLLED = 8


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of a step: `kv_lens` positions each, of which the last `query_lens` are queries."""

    name: str
    kv_lens: list[int]
    query_lens: list[int]
    shape: Shape = MODEL
    pool_dtype: Any = jnp.bfloat16

    @property
    def decode_only(self) -> bool:
        """Every row has one query token."""
        return all(length == 1 for length in self.query_lens)

    @property
    def kernel(self) -> str:
        """Which of the two the case is about."""
        return "decode" if self.decode_only else "prefill"

    @property
    def work(self) -> int:
        """Bytes of KV that a decode reads, or operations of a causal attention."""
        heads, size = self.shape.num_heads, self.shape.head_dim
        if self.decode_only:
            return sum(self.kv_lens) * self.shape.num_kv_heads * size * 2 * jnp.dtype(self.pool_dtype).itemsize
        pairs = sum(q * (kv - q) + q * (q + 1) // 2 for q, kv in zip(self.query_lens, self.kv_lens, strict=True))
        return 4 * pairs * heads * size

    @property
    def calls(self) -> int:
        """How many run back to back: enough that the host, which takes about 0.3 ms a program, is not what is timed."""
        return 64 if self.kernel == "decode" and sum(self.kv_lens) <= 32 * 1024 else 8

    @property
    def kv_scales(self) -> jax.Array | None:
        """Of a pool of 8 bits."""
        if self.pool_dtype == jnp.bfloat16:
            return None
        return jnp.full((2, self.shape.num_kv_heads), 5 / largest_number(self.pool_dtype))

    def arrays(self, page_size: int) -> tuple[jax.Array, jax.Array, Ragged, int]:
        """q [T, N, H], the pool, the rows, and the number of pages."""
        random = np.random.default_rng(0)
        pages_of = [-(-length // page_size) for length in self.kv_lens]
        num_pages = sum(pages_of)
        table = np.zeros((len(pages_of), MAX_LEN // page_size), np.int32)
        order = np.split(random.permutation(num_pages), np.cumsum(pages_of)[:-1])
        for row, pages in enumerate(order):
            table[row, : pages.size] = pages
        pool_shape = (num_pages, self.shape.num_kv_heads, 2, page_size, self.shape.head_dim)
        q_shape = (sum(self.query_lens), self.shape.num_heads, self.shape.head_dim)
        ragged = Ragged(
            page_table=jnp.asarray(table),
            kv_lens=jnp.asarray(self.kv_lens, jnp.int32),
            query_starts=jnp.asarray(np.cumsum([0, *self.query_lens]), jnp.int32),
            num_decodes=jnp.int32(sum(length == 1 for length in self.query_lens)),
        )
        q, pool = (jax.random.normal(jax.random.key(i), s, jnp.bfloat16) for i, s in enumerate((q_shape, pool_shape)))
        if self.kv_scales is not None:
            pool = jnp.clip(pool / self.kv_scales[0, 0], -100, 100)
        return q, pool.astype(self.pool_dtype), ragged, num_pages

    def seconds(self, page_size: int, implementation: str) -> tuple[float, float]:
        """Of one call of the op, and of one plan."""
        q, pool, ragged, num_pages = self.arrays(page_size)

        @jax.jit
        def make_plan(ragged: Ragged) -> Plan:
            return plan(
                ragged,
                num_tokens=q.shape[0],
                num_pages=num_pages,
                page_size=page_size,
                decode_only=self.decode_only,
                implementation=implementation,
            )

        @jax.jit  # by itself, so that it is traced and lowered once
        def once(q: jax.Array, pool: jax.Array, shared: Plan) -> jax.Array:
            options = {"scale": self.shape.head_dim**-0.5, "kv_scales": self.kv_scales}
            return ragged_paged_attention(q, pool, shared, jnp.int32(0), **options)

        @jax.jit
        def attend(q: jax.Array, pool: jax.Array, shared: Plan) -> jax.Array:
            def some(_: jax.Array, q: jax.Array) -> jax.Array:
                for _ in range(UNROLLED):
                    q = once(q, pool, shared)
                return q

            return jax.lax.fori_loop(0, self.calls // UNROLLED, some, q)

        shared = make_plan(ragged)
        return best_of(lambda: attend(q, pool, shared)) / self.calls, best_of(lambda: make_plan(ragged).slots)


def cases() -> Iterator[Case]:
    """What is timed: the steps that the project's targets name, and some beside them."""
    random = np.random.default_rng(0)
    many = (256, 1024), (128, 1024), (64, 4096), (32, 1024), (32, 768), (256, 256)
    few = (8, 8192), (1, 8192), (1, 1024), (1, 768)
    for rows, length in (*many, *few):
        yield Case(f"{rows} x {length}", [length] * rows, [1] * rows)
    lens = np.clip(random.lognormal(6, 1, 256).astype(int), 16, 8000).tolist()
    yield Case("256, log-normal", lens, [1] * len(lens))
    ragged = np.random.default_rng(0).integers(64, 1025, 15).tolist()
    for name, lens in (("1 x 4096", [4096]), ("1 x 8192", [8192]), ("2 x 2048", [2048] * 2), ("16 x 512", [512] * 16)):
        yield Case(name, lens, lens)
    yield Case("15 x 64..1024", ragged, ragged)
    yield Case("512 after 3584", [4096], [512])
    yield Case("1 x 4096, head 256", [4096], [4096], SHAPES["gemma3-4b"])


def best_of(call: Callable[[], jax.Array], repeats: int = REPEATS) -> float:
    """Seconds of one call, in the best of some rounds of `repeats` calls."""
    call().block_until_ready()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(repeats):
            result = call()
        result.block_until_ready()
        times.append((time.perf_counter() - start) / repeats)
    return min(times)


def measure(case: Case, page_size: int, implementation: str) -> dict[str, Any]:
    """A row of figures."""
    seconds, planning = case.seconds(page_size, implementation)
    rate = case.work / seconds
    figures = {"us": seconds * 1e6, "plan_us": planning * 1e6, "per_s": rate}
    peak = PEAKS.get(jax.devices()[0].device_kind)
    if peak:
        figures["share_of_peak"] = rate / (peak.bytes_per_s if case.decode_only else peak.operations_per_s)
    return figures


#: Longer and less regular than the shared mixes: cut rows, chunks, every remainder of a tile.
RAGGED = Mix(((1, 1), (5000, 1), (700, 1), (2049, 1), (130, 130), (77, 9), (1500, 203), (64, 64), (515, 2)), 512, 16)
OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "window": {"sliding_window": 100},
    "cap": {"logits_soft_cap": 3.0},
    "sinks": {"sinks": "by head"},
}


def checks() -> Iterator[tuple[str, Shape, Mix, str, dict[str, Any]]]:
    """(name, shape, mix, dtype, options of the op) of what is compared with the reference."""
    for name, mix in (*MIXES.items(), ("ragged", RAGGED)):
        if mix.rows:
            yield f"llama-8b, {name}", MODEL, mix, "bfloat16", {}
    for name in ("qwen3-0.6b", "smollm2-135m", "mha", "mqa", "phi3-mini", "gemma3-4b"):
        yield f"{name}, ragged", SHAPES[name], RAGGED, "bfloat16", {}
    yield "llama-8b, ragged, float16", MODEL, RAGGED, "float16", {}
    for name, options in OPTIONS.items():
        if options:
            yield f"qwen3-0.6b, ragged, {name}", SHAPES["qwen3-0.6b"], RAGGED, "bfloat16", options


def with_sinks(shape: Shape, options: dict[str, Any]) -> dict[str, Any]:
    """The options, with a sink for each head where they ask for some."""
    return options | ({"sinks": jnp.linspace(-2.0, 3.0, shape.num_heads)} if "sinks" in options else {})


def error(
    shape: Shape, mix: Mix, dtype: str, options: dict[str, Any], pool_dtype: Any, page_size: int, implementation: str
) -> dict[str, Any]:
    """Relative error, by the norm, of a step whose unused slots hold NaN: of all of it, and of each row by itself."""
    inputs = make_inputs(shape, mix, page_size=page_size, dtype=jnp.dtype(dtype))
    options = with_sinks(shape, options) | {"scale": shape.head_dim**-0.5}
    kv_scales = None
    if pool_dtype != jnp.bfloat16:
        inputs, kv_scales = in_8_bits(inputs, pool_dtype)

    @jax.jit
    def run(inputs_pool: jax.Array, ragged: Ragged) -> tuple[jax.Array, jax.Array]:
        shared = plan(
            ragged,
            num_tokens=mix.num_tokens,
            num_pages=inputs.num_pages,
            page_size=page_size,
            implementation=implementation,
        )
        pool = write_kv(inputs_pool, inputs.k, inputs.v, shared, jnp.int32(1), kv_scales=kv_scales)
        return ragged_paged_attention(inputs.q, pool, shared, jnp.int32(1), kv_scales=kv_scales, **options), pool

    out, pool = run(inputs.pool, inputs.ragged)
    out = np.asarray(out, np.float32)
    if kv_scales is not None:
        pool = np.asarray(pool, np.float32) * np.asarray(kv_scales).T[None, :, :, None, None]
    wanted = reference.ragged_paged_attention(inputs.q, pool, inputs.ragged, 1, inputs.num_pages, **options)

    def relative(tokens: slice) -> float:
        return float(np.linalg.norm(out[tokens] - wanted[tokens]) / np.linalg.norm(wanted[tokens]))

    starts = np.asarray(inputs.ragged.query_starts)
    by_row = [relative(slice(starts[row], starts[row + 1])) for row in range(len(mix.rows))]
    return {"error": relative(slice(None)), "worst_row": max(by_row), "row": list(mix.rows[int(np.argmax(by_row))])}


#: Ends of the rows that the same tokens are cut into, after some tokens of a row of their own.
CUTS: tuple[tuple[int, list[int]], ...] = ((37, [900]), (0, [1, 77, 130, 389, 771, 900]), (100, [*range(852, 901)]))


def cuts(shape: Shape, options: dict[str, Any], page_size: int, implementation: str) -> dict[str, Any]:
    """How many of a sequence's tokens change a bit with the cuts of its row, all on the path of longer rows."""
    tokens, rows, total = 1024, 64, CUTS[0][1][-1]
    random = np.random.default_rng(0)
    num_pages = -(-total // page_size)
    pages = random.permutation(num_pages)
    pool_shape = (num_pages, shape.num_kv_heads, 2, page_size, shape.head_dim)
    pool = jax.random.normal(jax.random.key(0), pool_shape, jnp.bfloat16)
    queries = jax.random.normal(jax.random.key(1), (total, shape.num_heads, shape.head_dim), jnp.bfloat16)

    @jax.jit
    def run(q: jax.Array, ragged: Ragged) -> jax.Array:
        sizes = {"num_tokens": tokens, "num_pages": num_pages, "page_size": page_size}
        shared = plan(ragged, implementation=implementation, **sizes)
        return ragged_paged_attention(q, pool, shared, jnp.int32(0), scale=shape.head_dim**-0.5, **options)

    def result(lead: int, ends: list[int]) -> np.ndarray:
        lens = [lead, *ends] if lead else ends
        query_lens = [lead, *np.diff([0, *ends])] if lead else np.diff([0, *ends])
        parts = (np.pad(np.asarray(part, np.int32), (0, rows - len(lens))) for part in (lens, query_lens))
        kv_lens, query_lens = parts
        table = jnp.asarray(np.tile(pages, (rows, 1)), jnp.int32)
        starts = jnp.asarray(np.cumsum([0, *query_lens]), jnp.int32)
        q = jnp.zeros((tokens, *queries.shape[1:]), queries.dtype)
        q = q.at[:lead].set(queries[:lead]).at[lead : lead + total].set(queries)
        out = run(q, Ragged(table, jnp.asarray(kv_lens), starts, jnp.int32(0)))
        return np.asarray(out[lead : lead + total]).view(np.uint16)

    want = result(0, [total])
    differ = [int((result(*cut) != want).any(axis=(1, 2)).sum()) for cut in CUTS]
    return {"tokens": total, "tokens_that_differ": differ}


def attempt(row: dict[str, Any], what: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row with what the call returns, or with the reason why it returns nothing."""
    try:
        start = time.perf_counter()
        row |= what() | {"with_compilation_s": round(time.perf_counter() - start, 1)}
    except Exception as reason:  # of any kind: one case must not cost the others
        row |= {"failed": f"{type(reason).__name__}: {reason}"[:500]}
    print(row, flush=True)
    return row


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; argv[0] is the program's name. Returns the exit status: 1 when a case failed.

    Raises:
        UsageError: the command line is wrong.
    """
    flag_values = absl_flags.FlagValues()
    here = {"flag_values": flag_values, "module_name": "kernels"}
    absl_flags.DEFINE_integer("page_size", 64, "Tokens in a page.", lower_bound=16, **here)
    absl_flags.DEFINE_string("implementation", "auto", "Of the op: auto, gpu or xla.", **here)
    absl_flags.DEFINE_enum("kv_cache_dtype", "auto", list(POOL_DTYPES), "Of keys and values; auto: bfloat16.", **here)
    absl_flags.DEFINE_string("only", "", "Only cases whose kernel and name match this expression.", **here)
    absl_flags.DEFINE_string("out", None, "Results file to write (JSON).", **here)
    if not program.parse(flag_values, "benchmarks.kernels", __doc__, argv[1:]):
        return 0
    page_size, implementation = flag_values["page_size"].value, flag_values["implementation"].value
    only, out = flag_values["only"].value, flag_values["out"].value
    pool_dtype = POOL_DTYPES[flag_values["kv_cache_dtype"].value]
    fields = {"page_size": page_size, "implementation": implementation, "rows": [], "relative_error": [], "cuts": []}
    document = report.document("benchmarks.kernels", argv, device=report.jax_device(), **fields)

    def record(part: str, row: dict[str, Any], what: Callable[[], dict[str, Any]]) -> None:
        document[part].append(attempt(row, what))
        if out:
            report.write(out, document)

    for case in (dataclasses.replace(case, pool_dtype=pool_dtype) for case in cases()):
        if re.search(only, f"{case.kernel} {case.name}"):
            row = {"kernel": case.kernel, "case": case.name}
            record("rows", row, lambda case=case: measure(case, page_size, implementation))
    for name, *case in checks():
        if re.search(only, f"check {name}"):
            row = {"case": name}
            record("relative_error", row, lambda case=case: error(*case, pool_dtype, page_size, implementation))
    for shape, (name, options) in itertools.product(("llama-8b", "smollm2-135m"), OPTIONS.items()):
        if re.search(only, f"cuts {shape} {name}"):
            row, given = {"case": f"{shape}, {name}".rstrip(", ")}, with_sinks(SHAPES[shape], options)
            record("cuts", row, lambda shape=shape, given=given: cuts(SHAPES[shape], given, page_size, implementation))
    show(document["rows"], document["relative_error"], document["cuts"])
    done = (*document["rows"], *document["relative_error"], *document["cuts"])
    return int(any("failed" in row or any(row.get("tokens_that_differ", ())) for row in done))


def show(rows: list[dict[str, Any]], errors: list[dict[str, Any]], cut: list[dict[str, Any]]) -> None:
    """Prints the tables."""
    cells = [[f"{r['kernel']} {r['case']}", f"{r['us']:.1f}", f"{r['per_s'] / 1e12:.2f}"] for r in rows if "us" in r]
    print("\n" + report.table([["", "us", "T/s"], *cells]))
    cells = [[row["case"], f"{row['error']:.1e}" if "error" in row else row["failed"]] for row in errors]
    print("\n" + report.table([["relative error", ""], *cells]))
    cells = [[row["case"], str(row.get("tokens_that_differ", row.get("failed")))] for row in cut]
    print("\n" + report.table([["tokens that differ by cut", ""], *cells]))


if __name__ == "__main__":
    program.run(main)
