"""Throughput with structured outputs over that without, on the same engine and prompts, in alternating runs.

    python -m benchmarks.structured --model=qwen3-0.6b --load_format=dummy --requests=256 --out=FILE.json

`structured`: every request has the same JSON schema, whose answers never end before `--output` tokens. `half`: every
second one has it. `bounded`: every one has a schema whose texts have a greatest length, the dearest masks we know.
A named shape has no tokenizer. `--vocabulary` gives the real tokens of its model, in the format of tiktoken's files;
otherwise they are made up, bytes first and words after. The `grammar` phase is the host's work on states and masks, as
far as it has to wait for it: masks are made while the host does other things, and the device runs the model.
"""

import base64
import dataclasses
import itertools
import random
import string
import time
from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags

from benchmarks import program, report
from jax_engine import EngineConfig, SamplingParams, StructuredOutputsParams
from jax_engine.engine import Engine
from jax_engine.models.shapes import NAMED_SHAPES
from jax_engine.request import Request
from jax_engine.sampling_params import RequestOutputKind
from jax_engine.start import start_engines
from jax_engine.testing.byte_tokenizer import ByteTokenizer
from serving import flags
from serving.commands import common

MODES = ("plain", "half", "structured", "bounded")


def schema(bounded: bool) -> dict[str, Any]:
    """A list of records. bounded: its texts have a greatest length."""
    name, tag = ({"maxLength": 40}, {"maxLength": 12}) if bounded else ({}, {})
    item = {
        "type": "object",
        "properties": {
            "name": {"type": "string", **name},
            "kind": {"enum": ["river", "lake", "sea", "ocean"]},
            "length_km": {"type": "integer", "minimum": 0, "maximum": 100000},
            "tags": {"type": "array", "items": {"type": "string", **tag}, "maxItems": 3},
        },
        "required": ["name", "kind", "length_km", "tags"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": item, "minItems": 1000}


class MadeUpTokenizer(ByteTokenizer):
    """A vocabulary of some size: the bytes, BOS and EOS, and random words."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        chance = random.Random(0)
        letters = string.ascii_lowercase * 3 + string.digits + ' _,.:"{}[]'
        self._words = [
            (" " * chance.randrange(2) + "".join(chance.choices(letters, k=chance.randint(2, 9)))).encode()
            for _ in range(vocab_size - ByteTokenizer.vocab_size)
        ]

    def token_bytes(self, token_id: int) -> bytes:
        """See Tokenizer.token_bytes."""
        at = token_id - ByteTokenizer.vocab_size
        return self._words[at] if at >= 0 else super().token_bytes(token_id)


class FileTokenizer(ByteTokenizer):
    """The tokens of a file in tiktoken's format, a line for each: base64 of its bytes, and its rank, which is its id.
    Of the ids above, the first two are BOS and EOS, and the others no token.
    """

    def __init__(self, path: str, vocab_size: int):
        self.vocab_size = vocab_size
        with open(path, "rb") as file:
            pairs = [line.split() for line in file]
        self._ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        self._tokens = {rank: token for token, rank in self._ranks.items()}
        self.bos_token_id = len(pairs)
        self.eos_token_ids = (self.bos_token_id + 1,)
        self.special_token_ids = frozenset((self.bos_token_id, *self.eos_token_ids))

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Byte-pair encoding of the text as one word: the pair of lowest rank is joined, until none has a rank."""
        parts = [bytes([byte]) for byte in text.encode()]
        while pairs := [self._ranks[a + b] for a, b in itertools.pairwise(parts) if a + b in self._ranks]:
            joined = self._tokens[min(pairs)]
            at = next(i for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b == joined)
            parts[at : at + 2] = [joined]
        return [self.bos_token_id] * add_special_tokens + [self._ranks[part] for part in parts]

    def token_bytes(self, token_id: int) -> bytes:
        """See Tokenizer.token_bytes."""
        if token_id in self.special_token_ids:
            return f"<{token_id}>".encode()
        return self._tokens.get(token_id, b"")


def flag_set() -> absl_flags.FlagValues:
    """The engine's flags and the benchmark's own."""
    flag_values = common.engine_flags(log_level="warning")
    here = {"flag_values": flag_values, "module_name": "Benchmark"}
    absl_flags.DEFINE_integer("requests", 8, "Requests of each run.", lower_bound=2, **here)
    absl_flags.DEFINE_integer("prompt", 32, "Prompt tokens of each.", lower_bound=1, **here)
    absl_flags.DEFINE_integer("output", 128, "Output tokens of each.", lower_bound=2, **here)
    absl_flags.DEFINE_float("temperature", 1.0, "Of every request.", lower_bound=0, **here)
    absl_flags.DEFINE_integer("repeat", 3, "Timed runs of each mode.", lower_bound=1, **here)
    absl_flags.DEFINE_string("vocabulary", None, "Tokens of a named shape: a file in tiktoken's format.", **here)
    absl_flags.DEFINE_string("out", None, "Results file to write (JSON).", **here)
    return flag_values


@dataclasses.dataclass(frozen=True)
class Job:
    """What every run has in common."""

    requests: int
    prompt: int
    output: int
    temperature: float

    def requests_of(self, engine: Engine, mode: str) -> list[Request]:
        """The requests of one run."""
        form = StructuredOutputsParams(json=schema(mode == "bounded"), disable_any_whitespace=True)
        chance = random.Random(1)
        made = []
        for index in range(self.requests):
            structured = mode in ("structured", "bounded") or (mode == "half" and index % 2)
            params = SamplingParams(
                temperature=self.temperature,
                seed=index,
                max_tokens=self.output,
                ignore_eos=True,
                detokenize=False,
                structured_outputs=form if structured else None,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            prompt = [chance.randrange(256) for _ in range(self.prompt)]
            made.append(engine.make_request(f"{mode}{index}", prompt, params))
        return made

    def run(self, engine: Engine, mode: str) -> dict[str, Any]:
        """One run; its throughput and the host's time.

        Raises:
            RuntimeError: a request failed, or did not give the tokens asked for.
        """
        made = self.requests_of(engine, mode)
        engine.metrics.reset()
        started = time.perf_counter()
        for request in made:
            engine.submit(request)
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        wall = time.perf_counter() - started
        for output in outputs:
            if output.error or len(output.outputs[0].token_ids) != self.output:
                raise RuntimeError(f"{output.request_id}: {output.error or output.outputs[0].finish_reason}")
        snapshot = engine.metrics.snapshot()
        return {
            "output_tok_per_s": self.requests * self.output / wall,
            "wall_s": wall,
            "ms_per_step": wall / snapshot["steps"] * 1e3,
            "host_ms_per_step": {k: v / snapshot["steps"] * 1e3 for k, v in snapshot["host_seconds"].items()},
            "idle_share_by_cause": {k: v / wall for k, v in snapshot["device_idle_seconds"].items()},
            "compiles_after_ready": snapshot["compiles_after_ready"],
        }


def main(argv: Sequence[str]) -> int:
    """Runs the modes in turn, prints a table, writes the results."""
    flag_values = flag_set()
    if not common.parse(flag_values, "structured", __doc__ or "", argv[1:]):
        return 0
    options = flag_values.flag_values_dict()
    config = EngineConfig(**flags.values(flag_values, EngineConfig))
    tokenizer = None
    if config.model in NAMED_SHAPES:
        vocab_size = NAMED_SHAPES[config.model]["vocab_size"]
        path = options["vocabulary"]
        tokenizer = FileTokenizer(path, vocab_size) if path else MadeUpTokenizer(vocab_size)
    (engine,) = start_engines(config, tokenizer)
    job = Job(**{field.name: options[field.name] for field in dataclasses.fields(Job)})
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    for mode in MODES:
        dataclasses.replace(job, output=4).run(engine, mode)
    for _ in range(options["repeat"]):
        for mode in MODES:
            runs[mode].append(job.run(engine, mode))
    ratios = {}
    for mode in MODES:
        pairs = zip(runs[mode], runs["plain"], strict=True)
        each = [run["output_tok_per_s"] / base["output_tok_per_s"] for run, base in pairs]
        ratios[mode] = sorted(each)[len(each) // 2]
        run = sorted(runs[mode], key=lambda run: run["output_tok_per_s"])[len(each) // 2]
        print(
            f"{mode:10} {run['output_tok_per_s']:9.1f} tok/s  {ratios[mode]:.3f} of plain  "
            f"{run['ms_per_step']:.2f} ms/step, grammar {run['host_ms_per_step']['grammar']:.3f} ms"
        )
    if options["out"]:
        fields = {"config": config.non_defaults(), "job": dataclasses.asdict(job), "ratios": ratios, "runs": runs}
        head = report.document("benchmarks.structured", argv, device=report.jax_device(), **fields)
        report.write(options["out"], head)
    return 0


if __name__ == "__main__":
    program.run(main)
