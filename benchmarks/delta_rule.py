"""Prefill of a recurrent layer: the gated delta rule in blocks against token by token, by the length of a prompt.

    python -m benchmarks.delta_rule --tokens=64,512 --out=FILE.json

One sequence, of which one step takes all tokens, with the head sizes of Qwen3-Next unless flags say others.
"""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import program, report
from jax_engine.layers.context import StepContext
from jax_engine.layers.delta_rule import DeltaInputs, delta_rule
from pallas_kernels.ragged_paged_attention import api as attention_op

_PAGE = 16


def flag_set() -> flags.FlagValues:
    """The program's flags."""
    flag_values = flags.FlagValues()
    here = {"flag_values": flag_values, "module_name": "Benchmark"}
    flags.DEFINE_list("tokens", ["64", "512", "2048"], "Lengths of the prompt.", **here)
    flags.DEFINE_integer("key_heads", 16, "Key heads.", lower_bound=1, **here)
    flags.DEFINE_integer("group", 2, "Value heads of each key head.", lower_bound=1, **here)
    flags.DEFINE_integer("head_dim", 128, "Size of a head.", lower_bound=1, **here)
    flags.DEFINE_integer("repeat", 10, "Timed runs of each form, in turn.", lower_bound=1, **here)
    flags.DEFINE_string("out", None, "Results file to write (JSON).", **here)
    return flag_values


def measure(tokens: int, flag_values: flags.FlagValues) -> dict[str, Any]:
    """Seconds of one layer for a prompt of so many tokens, the best of some runs of each form, and how they differ."""
    heads, group, size = (flag_values[name].value for name in ("key_heads", "group", "head_dim"))
    rng = np.random.default_rng(0)
    query, key = (rng.standard_normal((tokens, heads, size)) for _ in range(2))
    unit = [part / np.linalg.norm(part, axis=-1, keepdims=True) for part in (query, key)]
    value = rng.standard_normal((tokens, heads, group, size))
    write, log_decay = rng.random((tokens, heads, group)), -rng.exponential(size=(tokens, heads, group))
    inputs = DeltaInputs(*(jnp.asarray(part, jnp.float32) for part in (*unit, value, write, log_decay)))
    states = jnp.zeros((1, 2, heads, group, size, size), jnp.float32)
    forms = {}
    for name, one_way in (("blocks", False), ("tokens", True)):
        arguments = (inputs, states, _one_row(tokens, one_way), jnp.int32(0))
        compiled = jax.jit(delta_rule).lower(*arguments).compile()
        forms[name] = lambda compiled=compiled, arguments=arguments: compiled(*arguments)
    results = [forms[name]()[0] for name in forms]
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(flag_values["repeat"].value):
        for name, run in forms.items():
            started = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - started)
    best = {f"{name}_s": min(seconds) for name, seconds in times.items()}
    return {"tokens": tokens, **best, "largest_difference": float(jnp.abs(results[0] - results[1]).max())}


def _one_row(tokens: int, one_way: bool) -> StepContext:
    starts, none = jnp.array([0, tokens], jnp.int32), jnp.zeros(1, jnp.int32)
    pages = -(-tokens // _PAGE)
    ragged = attention_op.Ragged(jnp.arange(pages, dtype=jnp.int32)[None], starts[1:], starts, none[0])
    plan = attention_op.plan(ragged, num_tokens=tokens, num_pages=pages, page_size=_PAGE)
    return StepContext(plan, none, starts, none[0], False, platform=jax.devices()[0].platform, one_way=one_way)


def main(argv: Sequence[str]) -> int:
    """Measures, prints the table and writes the results."""
    flag_values = flag_set()
    if not program.parse(flag_values, "benchmarks.delta_rule", __doc__, argv[1:]):
        return 0
    rows = [measure(int(tokens), flag_values) for tokens in flag_values["tokens"].value]
    lines = [("tokens", "blocks ms", "token by token ms", "ratio")]
    for row in rows:
        blocks, single = (row[name] * 1e3 for name in ("blocks_s", "tokens_s"))
        lines.append((str(row["tokens"]), f"{blocks:.2f}", f"{single:.2f}", f"{single / blocks:.1f}"))
    print(report.table(lines))
    if flag_values["out"].value:
        sizes = {name: flag_values[name].value for name in ("key_heads", "group", "head_dim")}
        head = report.document("benchmarks.delta_rule", argv, device=report.jax_device())
        report.write(flag_values["out"].value, head | {"sizes": sizes, "rows": rows})
    return 0


if __name__ == "__main__":
    program.run(main)
