"""`jax-engine convert`: any checkpoint to an Orbax one, which restores in parallel to any number of devices."""

from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags

from serving import flags
from serving.cli import COMMANDS
from serving.commands import common


def run(argv: Sequence[str]) -> int:
    """Converts one model. See cli.main for what it raises and returns."""
    flag_values = common.general_flags(log_level="info")
    here = {"flag_values": flag_values, "module_name": "Conversion"}
    absl_flags.DEFINE_string("model", None, "Known model name, folder, .gguf file, or Hugging Face id.", **here)
    absl_flags.DEFINE_string("out", None, "Folder to write; must not exist.", **here)
    absl_flags.DEFINE_string("tokenizer", None, "Folder or file of the tokenizer, if not with the model.", **here)
    absl_flags.DEFINE_string(
        "dtype",
        "auto",
        "Of the weights: auto (the source's; float32 if it is quantised), float32, bfloat16, float16.",
        **here,
    )
    absl_flags.DEFINE_enum("quantization", None, ("int8", "fp8"), "Store weights in 8 bits.", **here)
    if not common.parse(flag_values, "convert", COMMANDS["convert"], argv):
        return 0
    model, out = flag_values["model"].value, flag_values["out"].value
    if not model or not out:
        raise flags.UsageError("both are needed: the model (--model), and the folder to write (--out)")
    from jax_engine.convert import convert

    options: dict[str, Any] = {name: flag_values[name].value for name in ("dtype", "quantization", "tokenizer")}
    print(convert(model, out, **options))
    return 0
