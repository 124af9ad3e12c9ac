"""What a decode step must move and compute on a TPU, and the least time that takes: a calculation, not a measurement.

Chip figures are those jax publishes (pltpu.get_tpu_info_for_chip). Bytes are the weights once, the keys and values of
every sequence once, and what this project's kernels move besides: a tile row group read and written back for every new
token, and query vectors padded to whole sublanes.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags

from benchmarks import program, report
from jax_engine.model_config import ModelConfig
from jax_engine.models import read_config
from jax_engine.models.shapes import NAMED_SHAPES

BATCHES = (1, 8, 32, 64, 128, 256)
#: Chip, bytes of a weight, and of a key's or value's number: in bfloat16 the 8B model leaves a v5e no room for a pool.
#: Of a TPU7x one of two devices.
CHIPS = (("v5e", 1, 2), ("v5e", 1, 1), ("v6e", 2, 2), ("v6e", 2, 1), ("7x", 2, 2))
_SUBLANES, _QUERY_BYTES = 8, 2


def weight_count(model: ModelConfig) -> int:
    """Weights that a step multiplies with; of the embedding table it reads single rows."""
    heads = model.num_attention_heads + 2 * model.num_key_value_heads
    attention = model.hidden_size * model.head_dim * (heads + model.num_attention_heads)
    layer = attention + 3 * model.hidden_size * model.intermediate_size
    return model.num_hidden_layers * layer + model.vocab_size * model.hidden_size


def step(model: ModelConfig, batch: int, context: int, weight_bytes: int, kv_bytes: int) -> dict[str, float]:
    """Bytes and operations of one decode step."""
    token = 2 * model.num_key_value_heads * model.head_dim * kv_bytes
    layers = model.num_hidden_layers
    vectors = model.num_key_value_heads * max(_SUBLANES, model.num_attention_heads // model.num_key_value_heads)
    weights = weight_count(model)
    return {
        "weight_bytes": weights * weight_bytes,
        "kv_bytes": batch * layers * context * token,
        "write_bytes": batch * layers * token * (2 * _unit_rows(kv_bytes) + 1),
        "query_bytes": batch * layers * 2 * vectors * model.head_dim * _QUERY_BYTES,
        "operations": 2 * weights * batch + 4 * batch * layers * context * model.num_attention_heads * model.head_dim,
    }


def _unit_rows(kv_bytes: int) -> int:
    """Rows that tpu_write.py moves for one token."""
    return 16 if kv_bytes > 1 else 32


def roofline(model: ModelConfig, context: int) -> list[dict[str, Any]]:
    """One entry for each chip and batch."""
    from jax.experimental.pallas import tpu as pltpu

    entries = []
    for name, weight_bytes, kv_bytes in CHIPS:
        chip = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(name), 1)
        for batch in BATCHES:
            work = step(model, batch, context, weight_bytes, kv_bytes)
            moved = sum(value for key, value in work.items() if key.endswith("bytes"))
            memory, compute = moved / chip.mem_bw_bytes_per_second, work["operations"] / chip.bf16_ops_per_second
            entries.append(
                {
                    "chip": name,
                    "bytes_of_a_weight": weight_bytes,
                    "bytes_of_a_kv_number": kv_bytes,
                    "batch": batch,
                    **work,
                    "memory_ms": memory * 1e3,
                    "compute_ms": compute * 1e3,
                    "tokens_per_second": batch / max(memory, compute),
                    "fits": work["weight_bytes"] + work["kv_bytes"] < chip.hbm_capacity_bytes * 0.9,
                }
            )
    return entries


def main(argv: Sequence[str]) -> int:
    flag_values = absl_flags.FlagValues()
    here = {"flag_values": flag_values, "module_name": "benchmarks.tpu_roofline"}
    absl_flags.DEFINE_string("shape", "llama-3.1-8b", "Named shape of the model.", **here)
    absl_flags.DEFINE_integer("context", 1024, "Tokens of every sequence.", **here)
    absl_flags.DEFINE_string("out", None, "File for the figures, as JSON.", **here)
    if not program.parse(flag_values, "benchmarks.tpu_roofline", __doc__, argv[1:]):
        return 0
    context = flag_values["context"].value
    entries = roofline(read_config(NAMED_SHAPES[flag_values["shape"].value]), context)
    rows = [
        ("chip", "KV bits", "batch", "weights GB", "KV GB", "writes GB", "memory ms", "compute ms", "tokens/s", "fits")
    ]
    for entry in entries:
        gigabytes = [f"{entry[name] / 1e9:.2f}" for name in ("weight_bytes", "kv_bytes", "write_bytes")]
        times = [f"{entry[name]:.2f}" for name in ("memory_ms", "compute_ms")]
        fits = "yes" if entry["fits"] else "no"
        rows.append(
            (
                entry["chip"],
                str(8 * entry["bytes_of_a_kv_number"]),
                str(entry["batch"]),
                *gigabytes,
                *times,
                f"{entry['tokens_per_second']:.0f}",
                fits,
            )
        )
    print(report.table(rows))
    if flag_values["out"].value:
        report.write(
            flag_values["out"].value, report.document("benchmarks.tpu_roofline", argv, context=context, steps=entries)
        )
    return 0


if __name__ == "__main__":
    program.run(main)
