"""What weights, keys and values in 8 bits cost in accuracy, on the default model and the golden answers of the tests.

    python -m benchmarks.quantization --out=benchmarks/results/quantization_cpu.json

The answers, 1,080 tokens of text that the model wrote, were made in float32 by another implementation. Each is given to
the engine as a prompt, and every form reads it once: how far is each token's log-probability from that of the
unquantised engine, and is it still the likeliest.
"""

import json
from collections.abc import Sequence
from typing import Any
from unittest import mock

import jax
import numpy as np
from absl import flags as absl_flags

from benchmarks import program, report
from jax_engine import LLM, SamplingParams
from jax_engine.layers import linear

GOLDEN = report.ROOT / "tests" / "golden" / "smollm2.json"
#: Name -> options of the engine. The first is what the others are compared with.
FORMS: dict[str, dict[str, Any]] = {
    "unquantised": {},
    "int8": {"quantization": "int8"},
    "fp8": {"quantization": "fp8"},
    "fp8, inputs too": {"quantization": "fp8"},
    "int8 cache": {"kv_cache_dtype": "int8"},
    "fp8 cache": {"kv_cache_dtype": "fp8"},
    "int8, int8 cache": {"quantization": "int8", "kv_cache_dtype": "int8"},
    "fp8, fp8 cache": {"quantization": "fp8", "kv_cache_dtype": "fp8"},
}
OPTIONS = {"max_model_len": 176, "max_num_seqs": 16, "token_buckets": (128,), "decode_buckets": (), "num_pages": 256}


def measure(model: str, cases: list[dict[str, Any]], form: str) -> dict[str, Any]:
    """Log-probabilities of the golden tokens, and how often one is the likeliest."""
    # What a GPU does for as many rows as these steps have.
    multiply = linear.multiply_fp8 if form == "fp8, inputs too" else linear.multiply_values
    with mock.patch.object(linear, "multiply_values", multiply):
        llm = LLM(model=model, **OPTIONS, **FORMS[form])
    given = [case["prompt_ids"] + case["output_ids"] for case in cases]
    once = SamplingParams(max_tokens=1, prompt_logprobs=1, temperature=0, ignore_eos=True, detokenize=False)
    logprobs, likeliest = [], []
    for case, output in zip(cases, llm.generate(given, once, use_tqdm=False), strict=True):
        assert output.prompt_logprobs is not None
        for token, entries in zip(case["output_ids"], output.prompt_logprobs[len(case["prompt_ids"]) :], strict=True):
            assert entries is not None
            logprobs.append(entries[token].logprob)
            likeliest.append(entries[token].rank == 1)
    runner = llm._engine._runner
    return {
        "logprobs": np.array(logprobs),
        "likeliest": float(np.mean(likeliest)),
        "weight_bytes": runner.weight_bytes,
        "kv_bytes_per_token": sum(array.nbytes for array in jax.tree.leaves(runner._cache.pool))
        / (runner.limits.num_pages * runner.limits.page_size),
    }


def figures(form: str, found: dict[str, Any], base: np.ndarray) -> dict[str, Any]:
    """The row of one form."""
    logprobs = found.pop("logprobs")
    errors = np.abs(logprobs - base)
    return {
        "form": form,
        "tokens": logprobs.size,
        "logprob_error_mean": float(errors.mean()),
        "logprob_error_p99": float(np.percentile(errors, 99)),
        "logprob_error_max": float(errors.max()),
        "mean_logprob": float(logprobs.mean()),
        **found,
    }


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; argv[0] is the program's name. Returns the exit status.

    Raises:
        UsageError: the command line is wrong. ConfigError, CheckpointError: the engine cannot be built.
    """
    flag_values = absl_flags.FlagValues()
    here = {"flag_values": flag_values, "module_name": "quantization"}
    absl_flags.DEFINE_string("model", "smollm2-135m-instruct", "The model that gave the golden answers.", **here)
    absl_flags.DEFINE_multi_enum("forms", list(FORMS), list(FORMS), "Which forms; the first is compared with.", **here)
    absl_flags.DEFINE_string("out", None, "Results file to write (JSON).", **here)
    if not program.parse(flag_values, "benchmarks.quantization", __doc__, argv[1:]):
        return 0
    cases = json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]
    model, out = flag_values["model"].value, flag_values["out"].value
    rows: list[dict[str, Any]] = []
    base: np.ndarray | None = None
    for form in flag_values["forms"].value:
        found = measure(model, cases, form)
        base = found["logprobs"] if base is None else base
        rows.append(figures(form, found, base))
        print(rows[-1], flush=True)
        if out:
            head = report.document("benchmarks.quantization", argv, device=report.jax_device())
            report.write(out, head | {"model": model, "options": OPTIONS, "rows": rows})
    cells = [
        [r["form"], *(f"{r[f'logprob_error_{m}']:.4f}" for m in ("mean", "p99", "max")), f"{r['likeliest']:.1%}"]
        for r in rows
    ]
    print("\n" + report.table([["", "mean error", "p99", "max", "still likeliest"], *cells]))
    return 0


if __name__ == "__main__":
    program.run(main)
