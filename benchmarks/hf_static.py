"""The baseline outside the engine: `generate` of transformers in float32, one static batch, on the CPU.

    python -m benchmarks.hf_static --workloads=cpu1,cpu8,cpu32 --out=FILE.json

Takes the same workloads and the same prompts as benchmarks.offline, so the figures can be put side by side. torch and
transformers are no dependencies of this project; install them yourself where you want this comparison.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks import program, report, workload
from checkpoints import known_models
from jax_engine import ConfigError, EngineConfig

WARMUP_OUTPUT = 4


def flag_set() -> flags.FlagValues:
    """The program's flags."""
    flag_values = flags.FlagValues()
    here = {"flag_values": flag_values, "module_name": "Benchmark"}
    flags.DEFINE_string("gguf", None, "Model file of a type transformers can read. Default: the engine's own.", **here)
    flags.DEFINE_list("workloads", ["cpu1", "cpu8", "cpu32"], "Workloads of uniform lengths.", **here)
    flags.DEFINE_integer("repeat", 3, "Timed runs of each workload.", lower_bound=1, **here)
    flags.DEFINE_integer("prompt_seed", 0, "Of the random prompts.", **here)
    flags.DEFINE_string("out", None, "Results file to write (JSON).", **here)
    return flag_values


def uniform_lengths(work: workload.Workload) -> tuple[int, int]:
    """Prompt and output length of every request.

    Raises:
        ConfigError: the lengths differ, so that a static batch would be padded and not comparable.
    """
    lengths = set(work.requests)
    if len(lengths) > 1:
        raise ConfigError(f"workload {work.name} has {len(lengths)} different lengths; a static batch needs one")
    return lengths.pop()


def run(torch: Any, model: Any, prompts: Any, output_len: int) -> float:
    """Seconds for one batch, greedy, output length forced.

    Raises:
        RuntimeError: not every row gave output_len tokens.
    """
    start = time.perf_counter()
    with torch.inference_mode():
        result = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            min_new_tokens=output_len,
            max_new_tokens=output_len,
            pad_token_id=0,
        )
    wall = time.perf_counter() - start
    if tuple(result.shape) != (prompts.shape[0], prompts.shape[1] + output_len):
        raise RuntimeError(f"generate gave shape {tuple(result.shape)} for {output_len} tokens each")
    return wall


def measure(torch: Any, model: Any, work: workload.Workload, seed: int, repeat: int) -> dict[str, Any]:
    """Runs one workload `repeat` times after a warm-up; figures are those of the median run."""
    _, output_len = uniform_lengths(work)
    prompts = torch.tensor(work.prompts(model.config.vocab_size, seed))
    run(torch, model, prompts, WARMUP_OUTPUT)
    walls = sorted(run(torch, model, prompts, output_len) for _ in range(repeat))
    wall = walls[len(walls) // 2]
    return {"wall_s": wall, "output_tok_per_s": work.total_output / wall, "all_wall_s": walls}


def main(argv: Sequence[str]) -> int:
    """Runs the comparison; argv[0] is the program's name. Returns the exit status.

    Raises:
        UsageError: the command line is wrong. ConfigError: a library is missing, or a workload is of no use here.
    """
    flag_values = flag_set()
    if not program.parse(flag_values, "benchmarks.hf_static", __doc__, argv[1:]):
        return 0
    try:
        import torch
        import transformers
    except ImportError as missing:
        raise ConfigError(f"{missing}; this comparison needs: pip install torch transformers") from None
    works = [workload.load(name) for name in flag_values["workloads"].value]
    path = Path(flag_values["gguf"].value or known_models.fetch(EngineConfig.model))
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model.eval()
    seed, repeat = flag_values["prompt_seed"].value, flag_values["repeat"].value
    results = {work.name: measure(torch, model, work, seed, repeat) for work in works}
    rows = [["static batch, transformers", "output tok/s", "seconds"]]
    rows += [[name, f"{result['output_tok_per_s']:.2f}", f"{result['wall_s']:.2f}"] for name, result in results.items()]
    print(report.table(rows))
    if flag_values["out"].value:
        baseline = {"model": path.name, "threads": torch.get_num_threads()}
        baseline |= {module.__name__: module.__version__ for module in (torch, transformers)}
        document = report.document("benchmarks.hf_static", argv, baseline=baseline, results=results)
        report.write(flag_values["out"].value, document)
    return 0


if __name__ == "__main__":
    program.run(main)
