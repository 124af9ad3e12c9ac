"""What architectures cost besides speed: compile time, temporaries beside the pool; and how experts multiply on a CPU.

    python -m benchmarks.models --models=tests/golden/tiny/* --out=FILE.json

Compiles the steps of each model for the device at hand, without weights. The experts' table compares one block of rows
after the other, as the engine does on a CPU, with XLA's ragged_dot, on the same rows.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import program, report
from checkpoints.formats import open_checkpoint
from jax_engine.buckets import buckets
from jax_engine.config import EngineConfig, resolve
from jax_engine.layers import linear
from jax_engine.models import read_config
from jax_engine.program import ModelProgram

NUM_PAGES = 4096
MIB = 2**20


def flag_set() -> flags.FlagValues:
    """The program's flags."""
    flag_values = flags.FlagValues()
    here = {"flag_values": flag_values, "module_name": "Benchmark"}
    flags.DEFINE_list("models", [], "Folders of models whose steps to compile.", **here)
    flags.DEFINE_list("rows", ["4", "128", "2048"], "Rows that the experts share (tokens times experts each).", **here)
    flags.DEFINE_integer("experts", 32, "Number of experts.", lower_bound=1, **here)
    flags.DEFINE_integer("embed", 512, "Size of a row.", lower_bound=1, **here)
    flags.DEFINE_integer("hidden", 768, "Size of a result.", lower_bound=1, **here)
    flags.DEFINE_integer("repeat", 5, "Timed runs of each product.", lower_bound=1, **here)
    flags.DEFINE_string("out", None, "Results file to write (JSON).", **here)
    return flag_values


def compile_steps(model: str) -> dict[str, Any]:
    """Seconds to trace and to compile a prefill and a decode step, and the memory of the larger."""
    config = read_config(open_checkpoint(model, weights=False).config)
    options = EngineConfig(
        max_model_len=min(512, config.max_position_embeddings), max_num_seqs=8, token_buckets=(64,), decode_buckets=(8,)
    )
    limits = resolve(options, config, platform=jax.devices()[0].platform, num_pages=NUM_PAGES)
    made = ModelProgram(config.served(limits.max_model_len), "auto", jax.devices()[:1])
    result: dict[str, Any] = {"model": config.architecture, "layers": config.num_hidden_layers}
    for bucket in buckets(limits):
        started = time.perf_counter()
        _, lowered = made.lower(bucket, limits)
        traced = time.perf_counter()
        memory = lowered.compile().memory_analysis()
        name = "decode" if bucket.decode_only else "prefill"
        result[name] = {"trace_s": traced - started, "compile_s": time.perf_counter() - traced}
        assert memory is not None, "the compiler reports no memory use"
        result["temporary_bytes"] = max(result.get("temporary_bytes", 0), memory.temp_size_in_bytes)
    result["pool_bytes"] = made.page_bytes(limits.page_size) * limits.num_pages
    return result


def time_experts(rows: int, flag_values: flags.FlagValues) -> dict[str, Any]:
    """Seconds of a product by experts, the best of some runs, in both forms."""
    experts, embed, hidden = (flag_values[name].value for name in ("experts", "embed", "hidden"))
    rng = np.random.default_rng(0)
    sizes = np.bincount(rng.integers(0, experts, rows), minlength=experts).astype(np.int32)
    x = jnp.asarray(rng.standard_normal((rows, embed)), jnp.float32)
    weight = jnp.asarray(rng.standard_normal((experts, hidden, embed)), jnp.float32)
    result: dict[str, Any] = {"rows": rows}
    for name, function in (("blocks", linear.multiply_blocks), ("ragged_dot", linear.ragged_dot)):
        started = time.perf_counter()
        compiled = jax.jit(function).lower(x, jnp.asarray(sizes), weight).compile()
        compile_s = time.perf_counter() - started
        seconds = _best(lambda run=compiled: run(x, jnp.asarray(sizes), weight), flag_values["repeat"].value)
        result[name] = {"compile_s": compile_s, "seconds": seconds}
    return result


def _best(run: Callable[[], jax.Array], repeat: int) -> float:
    times = []
    for _ in range(repeat + 1):
        started = time.perf_counter()
        run().block_until_ready()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def main(argv: Sequence[str]) -> int:
    """Runs both parts, prints their tables and writes the results."""
    flag_values = flag_set()
    if not program.parse(flag_values, "benchmarks.models", __doc__, argv[1:]):
        return 0
    models = [compile_steps(model) for model in flag_values["models"].value]
    experts = [time_experts(int(rows), flag_values) for rows in flag_values["rows"].value]
    if models:
        lines = [("model", "prefill s", "decode s", "temporaries MiB", "pool MiB")]
        for row in models:
            seconds = (f"{sum(row[name].values()):.1f}" for name in ("prefill", "decode"))
            memory = (f"{row[name] / MIB:.1f}" for name in ("temporary_bytes", "pool_bytes"))
            lines.append((row["model"], *seconds, *memory))
        print(report.table(lines), end="\n\n")
    lines = [("rows of experts", "blocks ms", "ragged_dot ms", "ratio")]
    for row in experts:
        blocks, ragged = (row[name]["seconds"] * 1e3 for name in ("blocks", "ragged_dot"))
        lines.append((str(row["rows"]), f"{blocks:.2f}", f"{ragged:.2f}", f"{ragged / blocks:.1f}"))
    print(report.table(lines))
    if flag_values["out"].value:
        sizes = {name: flag_values[name].value for name in ("experts", "embed", "hidden")}
        head = report.document("benchmarks.models", argv, device=report.jax_device())
        report.write(flag_values["out"].value, head | {"models": models, "sizes": sizes, "experts": experts})
    return 0


if __name__ == "__main__":
    program.run(main)
