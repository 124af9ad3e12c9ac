"""Whether several devices give the tokens that one gives: greedy, for every placement of a model and both modes.

    python -m benchmarks.equality --models=tests/golden/tiny/llama --tensor_parallel_sizes=2 --data_parallel_sizes=2

Each model is run on one device, then as every size says. Tokens are compared up to the first difference; that one has
to be a near-tie: two tokens whose log-probabilities are closer than sums in another order may move them. Within one
placement the synchronous and the asynchronous mode have to give the same tokens.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags as absl_flags

from benchmarks import program, report
from jax_engine import LLM, RequestOutput, SamplingParams

#: Log-probabilities that are closer than this may change places.
NEAR_TIE = 0.02
PROMPT_LENGTHS = (3, 17, 40, 64, 5, 29, 51, 9)
OUTPUT_TOKENS = 32


def outputs(model: str, dtype: str, mode: str, tensor: int, data: int) -> list[RequestOutput]:
    """The answers to the same random prompts."""
    llm = LLM(
        model,
        dtype=dtype,
        scheduling=mode,
        tensor_parallel_size=tensor,
        data_parallel_size=data,
        max_model_len=128,
        max_num_seqs=8,
        num_pages=64,
        token_buckets=(64,),
        decode_buckets=(8,),
    )
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, llm.vocab_size, length).tolist() for length in PROMPT_LENGTHS]
    params = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True, logprobs=5, detokenize=False)
    return llm.generate(prompts, params, use_tqdm=False)


def differences(want: Sequence[RequestOutput], got: Sequence[RequestOutput]) -> dict[str, int]:
    """How many requests have the same tokens, differ first at a near-tie, or differ."""
    counts = {"equal": 0, "near_tie": 0, "different": 0}
    for one, other in zip(want, got, strict=True):
        a, b = one.outputs[0], other.outputs[0]
        first = next(
            (i for i, pair in enumerate(zip(a.token_ids, b.token_ids, strict=True)) if len(set(pair)) > 1), None
        )
        if first is None:
            counts["equal"] += 1
            continue
        entries = (a.logprobs or [])[first]
        rival = entries.get(b.token_ids[first])
        near = rival is not None and entries[a.token_ids[first]].logprob - rival.logprob < NEAR_TIE
        counts["near_tie" if near else "different"] += 1
    return counts


def row(model: str, dtype: str, tensor: int, data: int, want: Sequence[RequestOutput]) -> dict[str, Any]:
    """One placement against one device, and its modes against each other."""
    got = {mode: outputs(model, dtype, mode, tensor, data) for mode in ("sync", "async")}
    same = [o.outputs[0].token_ids for o in got["sync"]] == [o.outputs[0].token_ids for o in got["async"]]
    return {
        "model": model,
        "tensor_parallel_size": tensor,
        "data_parallel_size": data,
        "async_is_sync": same,
        **differences(want, got["async"]),
    }


def main(argv: Sequence[str]) -> int:
    """Runs the comparison; argv[0] is the program's name. Returns 1 if any tokens differ that may not.

    Raises:
        UsageError: the command line is wrong. ConfigError, CheckpointError: a model cannot be run.
    """
    flag_values = absl_flags.FlagValues()
    here = {"flag_values": flag_values, "module_name": "equality"}
    absl_flags.DEFINE_list("models", None, "Folders of models.", required=True, **here)
    absl_flags.DEFINE_list("tensor_parallel_sizes", ["2"], "Placements: devices that share the model.", **here)
    absl_flags.DEFINE_list("data_parallel_sizes", ["2"], "Placements: replicas.", **here)
    absl_flags.DEFINE_string("dtype", "float32", "Of weights, activations and KV.", **here)
    absl_flags.DEFINE_string("out", None, "Results file to write (JSON).", **here)
    if not program.parse(flag_values, "benchmarks.equality", __doc__, argv[1:]):
        return 0
    placements = [(int(size), 1) for size in flag_values["tensor_parallel_sizes"].value]
    placements += [(1, int(size)) for size in flag_values["data_parallel_sizes"].value]
    dtype, rows = flag_values["dtype"].value, []
    for model in flag_values["models"].value:
        want = outputs(model, dtype, "sync", 1, 1)
        for tensor, data in placements:
            rows.append(row(model, dtype, tensor, data, want))
            print(rows[-1], flush=True)
    if flag_values["out"].value:
        document = report.document("benchmarks.equality", argv, device=report.jax_device(), dtype=dtype, rows=rows)
        report.write(flag_values["out"].value, document)
    return int(any(row["different"] or not row["async_is_sync"] for row in rows))


if __name__ == "__main__":
    program.run(main)
