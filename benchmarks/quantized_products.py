"""The products of a decoder layer in every form that could serve, with weights of 16 and of 8 bits: time against bytes.

    python -m benchmarks.quantized_products --out=benchmarks/results/h100_quantized_products.json

One layer of the 8B shape without its attention: four products, two norms and the gate, so that what a form needs
around its products (quantising its inputs, scaling its outputs) counts too. Some layers run one after the other inside
one program, each with weights of its own, so no weight is found in a cache. `floor` is the weights' bytes over the
bandwidth of a device copy, measured first.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags as absl_flags

from benchmarks import program, report
from benchmarks.ceilings import copy_bytes_per_s
from benchmarks.kernels import best_of
from jax_engine.xla_flags import set_xla_flags
from pallas_kernels.block_tail import block_tail
from pallas_kernels.block_tail.api import MAX_TOKENS

EMBED, HIDDEN, QKV = 4096, 14336, 6144
SHAPES = {"qkv": (QKV, EMBED), "output": (EMBED, EMBED), "gate_up": (2 * HIDDEN, EMBED), "down": (EMBED, HIDDEN)}
LAYERS, REPEATS = 4, 10
FP8 = jnp.float8_e4m3fn

Weight = tuple[jax.Array, jax.Array]


def _dot(x: jax.Array, values: jax.Array, out: Any) -> jax.Array:
    return jax.lax.dot_general(x, values, (((1,), (1,)), ((), ())), preferred_element_type=out)


def plain(x: jax.Array, weight: Weight) -> jax.Array:
    """bfloat16 weights."""
    return _dot(x, weight[0], x.dtype)


def weight_only(x: jax.Array, weight: Weight) -> jax.Array:
    """The values are converted on their way into the product, its outputs are scaled."""
    return (_dot(x, weight[0].astype(x.dtype), jnp.float32) * weight[1]).astype(x.dtype)


def weight_only_rounded(x: jax.Array, weight: Weight) -> jax.Array:
    """The same with the product rounded to bfloat16 before it is scaled."""
    return (_dot(x, weight[0].astype(x.dtype), x.dtype) * weight[1]).astype(x.dtype)


def both(x: jax.Array, weight: Weight) -> jax.Array:
    """The inputs are quantised too, each token by its own scale."""
    limit = 127.0 if weight[0].dtype == jnp.int8 else 448.0
    wide = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(wide), axis=1, keepdims=True), 1e-12) / limit
    wide = wide / scale
    narrow = jnp.round(wide).astype(jnp.int8) if weight[0].dtype == jnp.int8 else wide.astype(FP8)
    product = _dot(narrow, weight[0], jnp.int32 if weight[0].dtype == jnp.int8 else jnp.float32)
    return (product.astype(jnp.float32) * scale * weight[1]).astype(x.dtype)


def apart(product: Callable) -> Callable:
    """A layer of single products."""

    def layer(x: jax.Array, weights: dict[str, Weight]) -> jax.Array:
        heads = product(_norm(x), weights["qkv"])[:, :EMBED]
        x = x + product(heads, weights["output"])
        gate, up = jnp.split(product(_norm(x), weights["gate_up"]), 2, axis=1)
        return x + product(jax.nn.silu(gate) * up, weights["down"])

    return layer


def tail_in_one(x: jax.Array, weights: dict[str, Weight]) -> jax.Array:
    """A layer whose last three products are one kernel."""
    heads = plain(_norm(x), weights["qkv"])[:, :EMBED]
    output, gate_up, down = (weights[name][0] for name in ("output", "gate_up", "down"))
    norm = jnp.ones(EMBED, x.dtype)
    kind = jax.devices()[0].device_kind
    return jnp.add(*block_tail(heads, x, output, norm, gate_up, down, eps=1e-5, device_kind=kind))


#: Name -> type of the weights' values, and the layer.
FORMS: dict[str, tuple[Any, Callable]] = {
    "bf16": (jnp.bfloat16, apart(plain)),
    "bf16 block_tail": (jnp.bfloat16, tail_in_one),
    "int8": (jnp.int8, apart(weight_only)),
    "int8 rounded": (jnp.int8, apart(weight_only_rounded)),
    "fp8": (FP8, apart(weight_only)),
    "fp8 rounded": (FP8, apart(weight_only_rounded)),
    "fp8 x fp8": (FP8, apart(both)),
    "int8 x int8": (jnp.int8, apart(both)),
}


#: Most rows that a form takes.
MOST_ROWS = {"bf16 block_tail": MAX_TOKENS}


def _layers(layer: Callable, x: jax.Array, layers: list[dict[str, Weight]]) -> jax.Array:
    for weights in layers:
        x = layer(x, weights)
    return x


def _norm(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=1, keepdims=True) + 1e-5)).astype(x.dtype)


def _draw(dtype: Any) -> list[dict[str, Weight]]:
    def draw(key: jax.Array) -> list[dict[str, Weight]]:
        def one(layer: int, name: str) -> Weight:
            own = jax.random.fold_in(key, layer * len(SHAPES) + list(SHAPES).index(name))
            normal = jax.random.normal(own, SHAPES[name], jnp.float32)
            size = {jnp.dtype(jnp.int8): 32.0, jnp.dtype(FP8): 100.0}.get(jnp.dtype(dtype), 0.02)
            return (normal * size).astype(dtype), jnp.full(SHAPES[name][0], 0.02 / size, jnp.float32)

        return [{name: one(layer, name) for name in SHAPES} for layer in range(LAYERS)]

    return jax.jit(draw)(jax.random.key(0))


def _kernels(text: str) -> dict[str, int]:
    """What the products became, counted in the compiled program."""
    found = re.findall(r'custom_call_target="(__cu[^"]+)"|"kind":"(__triton[^"]+)"|kind: "(__triton[^"]+)"', text)
    return dict(Counter(next(filter(None, names)) for names in found))


def measure(form: str, sizes: Sequence[int], copy_speed: float) -> list[dict[str, Any]]:
    """A row of figures for every number of tokens; copy_speed is that of a device copy, bytes per second."""
    dtype, layer = FORMS[form]
    sizes = [size for size in sizes if size <= MOST_ROWS.get(form, size)]
    layers = _draw(dtype)
    floor = sum(outputs * inputs for outputs, inputs in SHAPES.values()) * jnp.dtype(dtype).itemsize / copy_speed

    def compile_for(tokens: int) -> Any:
        x = jax.ShapeDtypeStruct((tokens, EMBED), jnp.bfloat16)
        start = time.perf_counter()
        compiled = jax.jit(lambda x, layers: _layers(layer, x, layers)).lower(x, layers).compile()
        return compiled, time.perf_counter() - start

    rows = []
    with ThreadPoolExecutor(len(sizes)) as pool:
        for tokens, (compiled, compile_s) in zip(sizes, pool.map(compile_for, sizes), strict=True):
            x = jax.random.normal(jax.random.key(1), (tokens, EMBED), jnp.bfloat16)
            seconds = best_of(lambda: compiled(x, layers), REPEATS) / LAYERS  # noqa: B023
            rows.append(
                {
                    "form": form,
                    "tokens": tokens,
                    "us": seconds * 1e6,
                    "floor_us": floor * 1e6,
                    "tera_operations_per_s": 2 * tokens * sum(o * i for o, i in SHAPES.values()) / seconds / 1e12,
                    "compile_s": compile_s,
                    "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
                    "kernels": _kernels(compiled.as_text()),
                }
            )
            print(rows[-1], flush=True)
    return rows


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; argv[0] is the program's name. Returns the exit status.

    Raises:
        UsageError: the command line is wrong.
    """
    flag_values = absl_flags.FlagValues()
    here = {"flag_values": flag_values, "module_name": "quantized_products"}
    absl_flags.DEFINE_list("forms", list(FORMS), "Which forms.", **here)
    absl_flags.DEFINE_list("tokens", ["1", "8", "32", "128", "256", "1024", "4096"], "Rows of the inputs.", **here)
    absl_flags.DEFINE_string("out", None, "Results file to write (JSON).", **here)
    if not program.parse(flag_values, "benchmarks.quantized_products", __doc__, argv[1:]):
        return 0
    set_xla_flags()
    sizes = [int(size) for size in flag_values["tokens"].value]
    copy_speed = copy_bytes_per_s()
    rows: list[dict[str, Any]] = []
    for form in flag_values["forms"].value:
        rows += measure(form, sizes, copy_speed)
        if flag_values["out"].value:  # after each form, for a later one may fail
            head = report.document("benchmarks.quantized_products", argv, device=report.jax_device())
            report.write(
                flag_values["out"].value, head | {"layer": SHAPES, "copy_bytes_per_s": copy_speed, "rows": rows}
            )
    cells = [[r["form"], str(r["tokens"]), f"{r['us']:.1f}", f"{r['floor_us'] / r['us']:.0%}"] for r in rows]
    print("\n" + report.table([["form", "tokens", "us a layer", "of floor"], *cells]))
    return 0


if __name__ == "__main__":
    program.run(main)
