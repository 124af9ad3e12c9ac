"""Single steps of a model with dummy weights on a GPU or TPU: milliseconds on the device and on the host.

    python -m benchmarks.steps --rows=1,32,256 --context=768 --out=benchmarks/results/h100_steps.json
    python -m benchmarks.steps --rows=1,240 --prompts=220,60 --trace=FOLDER
    python -m benchmarks.steps --layers=2 --rows=32 --prompts=512,512,512 --steps=10 --trace=FOLDER
    python -m benchmarks.steps --model=llama-3.1-70b --quantization=fp8 --tensor_parallel_size=2 --rows=32,64

Steps of decodes, or with --prompts of decodes and of whole prompts in the bucket that the engine takes for them.
Neither scheduler nor engine takes part: the same batch is dispatched over and over, its tokens fed back on the device,
results read one step late, as the engine does. The floor is the weights' and keys' bytes at the speed of a device copy,
which is measured first. With --trace, some steps are run under the profiler; every kernel's time is listed there, and
the results have sums by what kernels are for. --layers makes a model of a few layers, which is soon compiled, as they
are all alike.
"""

import dataclasses
import functools
import math
import os
import re
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags as absl_flags

from benchmarks import program, report
from benchmarks.ceilings import copy_bytes_per_s
from checkpoints.loader import dummy
from jax_engine.batch import FLOAT_FIELDS, INT_FIELDS, BatchLayout, no_adjustments
from jax_engine.buckets import Bucket, choose_bucket
from jax_engine.config import EngineConfig, resolve
from jax_engine.constraints import unconstrained
from jax_engine.features import Feature
from jax_engine.free_places import leave_free
from jax_engine.kv_cache import empty_cache
from jax_engine.models import read_config
from jax_engine.models.shapes import NAMED_SHAPES
from jax_engine.peer_memory import open_peer_memory
from jax_engine.program import ModelProgram, Part, nested
from jax_engine.sharding import choose_devices
from jax_engine.xla_flags import set_xla_flags

MS = 1e3
#: (plane, name, count, microseconds) of a kernel in a trace.
Kernel = tuple[str, str, int, float]
#: What a kernel is for -> a pattern in its name: cuBLAS's, XLA's or this project's.
KINDS = {
    "products": "nvjet|gemm|cutlass|cublas|block_tail|gated_matmul",
    "attention": "attention_",
    "sums over devices": "all_reduce|nccl",
    "copies": "^(?i:mem(cpy|set))",
}
#: Name -> temperature, top-p, features of the batch.
SAMPLING = {
    "greedy": (0.0, 1.0, Feature.NONE),
    "random": (1.0, 1.0, Feature.RANDOM),
    "top_p": (1.0, 0.9, Feature.RANDOM | Feature.TRUNCATE),
}


class Stepper:
    """A model on the device, and steps of it at one context length.

    Args:
        shape: name in models.shapes.NAMED_SHAPES. max_rows: most decodes of a step. context: keys of each.
        prompts: lengths of the prompts in every step; where there are none, steps are of decodes only.
        num_devices: that hold the model between them. quantization: see ModelProgram.
        layers: the model is its first so many; all of them when None.
    """

    def __init__(
        self,
        shape: str,
        max_rows: int,
        context: int,
        prompts: Sequence[int] = (),
        num_devices: int = 1,
        quantization: str | None = None,
        layers: int | None = None,
    ):
        set_xla_flags()
        [devices] = choose_devices(jax.devices(), num_devices)
        platform = devices[0].platform
        model = read_config(NAMED_SHAPES[shape])
        if layers is not None:
            model = dataclasses.replace(model, num_hidden_layers=layers, layers=model.layers[:layers])
        self.context, self.prompts = context, prompts
        limits = resolve(EngineConfig(), model, platform=platform, num_pages=1)
        self.pages = -(-context // limits.page_size)
        num_pages = max(self.pages * max_rows + self._prompt_pages(limits.page_size), limits.max_pages_per_seq)
        self.limits = resolve(EngineConfig(), model, platform=platform, num_pages=num_pages)
        served = model.served(self.limits.max_model_len)
        self.program = ModelProgram(served, "bfloat16", devices, quantization=quantization)
        arrays = dummy(self.program.wanted, 0)
        unread = "embed.weight" if "lm_head.weight" in arrays else None
        read = [array for name, array in arrays.items() if name != unread]
        self.read_bytes = sum(map(_bytes_per_device, jax.tree.leaves(read)))
        self.weights = nested(arrays)
        self._peer_memory = open_peer_memory(self.program.mesh)
        self.cache = empty_cache(self.program.cache_shapes(self.limits), self._peer_memory)
        self.put = functools.partial(jax.device_put, device=self.program.replicated)
        self.between_places = leave_free(self.put)

    def _prompt_pages(self, page_size: int) -> int:
        return sum(-(-length // page_size) for length in self.prompts)

    def bucket(self, rows: int) -> Bucket:
        """Of a step of so many decodes, and the prompts."""
        if not self.prompts:
            return Bucket(rows, rows, True)
        return choose_bucket(self.limits, rows + sum(self.prompts), rows, rows + len(self.prompts))

    def compile(self, rows: int) -> tuple[BatchLayout, dict[str, Any], dict[str, float]]:
        """The programs of a step of so many decodes by kind, and the seconds it took to make the model's."""
        bucket = self.bucket(rows)
        start = time.perf_counter()
        layout, lowered = self.program.lower(bucket, self.limits)
        middle = time.perf_counter()
        compiled = {"model": lowered.compile(compiler_options=self.program.compiler_options(bucket))}
        seconds = {"lower_s": middle - start, "compile_s": time.perf_counter() - middle}
        for kind in ("likeliest", "sample"):
            source = self.program.part(Part(kind, Bucket(0, bucket.num_seqs, False)), self.limits)
            compiled[kind] = source.lower().compile(compiler_options=source.options)
        return layout, compiled, seconds

    def packed(self, layout: BatchLayout, rows: int, sampling: str) -> np.ndarray:
        """A step of full rows, each with one new token that the step before it sampled, and of the prompts."""
        temperature, top_p, features = SAMPLING[sampling]
        packed = np.zeros(layout.size, np.int32)
        parts = layout.unpack(packed)
        counts = np.zeros(layout.bucket.num_seqs, np.int32)
        counts[: rows + len(self.prompts)] = [1] * rows + list(self.prompts)
        parts["token_ids"][:rows] = -1 - np.arange(rows)
        parts["query_starts"][1:] = np.cumsum(counts)
        parts["starts"][:rows] = self.context - 1
        parts["slots"][:] = np.where(counts > 0, np.arange(counts.size), self.limits.max_num_seqs)
        order = np.random.default_rng(0).permutation(self.limits.num_pages)
        lengths = [self.context] * rows + list(self.prompts)
        for row, length in enumerate(lengths):
            pages, order = np.split(order, [-(-length // self.limits.page_size)])
            parts["page_table"][row, : pages.size] = pages
        parts["stop_ids"][:] = -1
        parts["settings"][INT_FIELDS.index("seed_low")] = np.arange(counts.size)
        floats = dict.fromkeys(FLOAT_FIELDS, 0.0) | {"temperature": temperature, "top_p": top_p}
        floats["repetition_penalty"] = 1.0
        values = np.array(list(floats.values()), np.float32).view(np.int32)
        parts["settings"][len(INT_FIELDS) :] = values[:, None]
        parts["scalars"][:] = rows, int(features)
        return packed

    def run(self, layout: BatchLayout, compiled: dict[str, Any], packed: np.ndarray, count: int) -> dict[str, Any]:
        """Runs `count` steps, two in flight at most. Milliseconds of a step, of its dispatch, and of the
        upload and the model's part in that."""
        rows = layout.bucket.num_seqs
        changes = self.put((no_adjustments(rows), unconstrained(rows, self.program.model_config.vocab_size)))
        pending: list[Any] = []
        uploads, models, dispatches = [], [], []
        start = time.perf_counter()
        for _ in range(count):
            began = time.perf_counter()
            uploaded = self.put(packed)
            uploads.append(time.perf_counter() - began)
            self.cache, output = compiled["model"](self.weights, self.cache, uploaded)
            models.append(time.perf_counter() - began)
            given = (self.cache.last_tokens, output.rows, output.logits)
            if packed[-1]:
                last_tokens, (tokens, *_) = compiled["sample"](*given, self.cache.token_ids, *changes)
            else:
                last_tokens, tokens = compiled["likeliest"](*given)
            self.cache = dataclasses.replace(self.cache, last_tokens=last_tokens)
            tokens.copy_to_host_async()
            dispatches.append(time.perf_counter() - began)
            pending.append(tokens)
            del output, given, tokens
            if len(pending) == 2:
                jax.device_get(pending.pop(0))
        jax.device_get(pending)
        wall = time.perf_counter() - start
        return {
            "step_ms": wall / count * MS,
            "model_dispatch_ms": report.percentiles(seconds * MS for seconds in models),
            "upload_ms": report.percentiles(seconds * MS for seconds in uploads),
            "dispatch_ms": report.percentiles(seconds * MS for seconds in dispatches),
        }

    def floor_ms(self, rows: int, copy_speed: float) -> float:
        """What each device has to read for a step, at the speed of a copy in bytes per second."""
        page = self.program.page_bytes(self.limits.page_size) / self.limits.page_size
        keys = rows * self.context + sum(self.prompts)
        return (self.read_bytes + keys * page) / copy_speed * MS


def _bytes_per_device(array: jax.Array) -> int:
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def trace_lines(folder: str) -> Iterator[tuple[str, Any]]:
    """(plane, line with its events) of every stream of a trace's devices, and of every thread of the host."""
    for file in Path(folder).rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                if "device" not in plane.name or "Stream" in line.name:
                    yield plane.name, line


def kernels(folder: str) -> Iterator[Kernel]:
    """(plane, name, count, microseconds) of what a trace's devices ran, and of the host's longest events."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    total: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for plane, line in trace_lines(folder):
        for event in line.events:
            counts[plane][event.name] += 1
            total[plane][event.name] += event.duration_ns / 1e3
    for plane, times in total.items():
        for name, microseconds in times.most_common(80):
            yield plane, name, counts[plane][name], microseconds


def kind_of(kernel: str) -> str:
    """What a kernel of a step is for, by the name that a trace has for it."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel)), "other")


def milliseconds_by_kind(found: Iterable[Kernel], count: int) -> dict[str, float]:
    """Of one of the `count` steps that a trace has, by kind_of; of several devices, the mean."""
    totals: Counter[str] = Counter()
    devices = set()
    for plane, name, _, microseconds in found:
        if "device:" in plane:
            devices.add(plane)
            totals[kind_of(name)] += microseconds / 1e3
    return {kind: total / count / len(devices) for kind, total in totals.most_common()}


def trace(
    stepper: Stepper, layout: BatchLayout, compiled: dict[str, Any], packed: np.ndarray, out: Path, count: int = 4
) -> dict[str, float]:
    """Writes a table of the kernels of `count` steps. Returns milliseconds_by_kind."""
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        with jax.profiler.trace(folder, profiler_options=options):
            stepper.run(layout, compiled, packed, count)
        found = list(kernels(folder))
    write_kernels(found, out, count)
    return milliseconds_by_kind(found, count)


def write_kernels(found: Iterable[Kernel], out: Path, count: int) -> None:
    """Writes a table of what a trace of `count` steps has."""
    rows = [
        [plane.removeprefix("/"), f"{total / count:.1f}", f"{times / count:g}", name[:90]]
        for plane, name, times, total in found
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(report.table([["plane", "us/step", "calls/step", "name"], *rows]) + "\n")


def table(found: Sequence[dict[str, Any]]) -> str:
    """What the program prints in the end, a line for every kind of step."""
    cells = [
        [
            f"{f['rows']} {f['sampling']}",
            f"{f['step_ms']:.2f}",
            f"{f['floor_ms']:.2f}",
            f"{f['dispatch_ms']['p50']:.2f}",
        ]
        for f in found
    ]
    return report.table([["rows", "step ms", "floor ms", "dispatch p50 ms"], *cells])


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; argv[0] is the program's name. Returns the exit status.

    Raises:
        UsageError: the command line is wrong.
    """
    values = absl_flags.FlagValues()
    here = {"flag_values": values, "module_name": "steps"}
    absl_flags.DEFINE_string("model", "llama-3.1-8b", "A named shape.", **here)
    absl_flags.DEFINE_list("rows", ["1", "32", "256"], "Sequences of the step, in turn.", **here)
    absl_flags.DEFINE_integer("context", 768, "Keys of every sequence.", lower_bound=1, **here)
    absl_flags.DEFINE_list("prompts", [], "Lengths of the prompts in every step.", **here)
    absl_flags.DEFINE_integer("tensor_parallel_size", 1, "GPUs that hold the model.", lower_bound=1, **here)
    absl_flags.DEFINE_enum("quantization", None, ["int8", "fp8"], "Of the weights.", **here)
    absl_flags.DEFINE_integer("layers", None, "Of the model, its first ones; all by default.", lower_bound=1, **here)
    absl_flags.DEFINE_list("sampling", ["greedy"], f"In turn: {', '.join(SAMPLING)}.", **here)
    absl_flags.DEFINE_integer("steps", 60, "Timed steps of each.", lower_bound=1, **here)
    absl_flags.DEFINE_string("trace", None, "Folder for tables of kernels.", **here)
    absl_flags.DEFINE_string("out", None, "Results file to write (JSON).", **here)
    if not program.parse(values, "benchmarks.steps", __doc__, argv[1:]):
        return 0
    sizes = [int(size) for size in values["rows"].value]
    prompts = [int(length) for length in values["prompts"].value]
    stepper = Stepper(
        values["model"].value,
        max(sizes),
        values["context"].value,
        prompts,
        values["tensor_parallel_size"].value,
        values["quantization"].value,
        values["layers"].value,
    )
    copy_speed = copy_bytes_per_s()
    found = []
    for rows in sizes:
        layout, compiled, seconds = stepper.compile(rows)
        for sampling in values["sampling"].value:
            packed = stepper.packed(layout, rows, sampling)
            stepper.run(layout, compiled, packed, 5)
            figures = stepper.run(layout, compiled, packed, values["steps"].value)
            floor = stepper.floor_ms(rows, copy_speed)
            bucket = list(layout.bucket)
            found.append(
                {"rows": rows, "bucket": bucket, "sampling": sampling, "floor_ms": floor, **seconds, **figures}
            )
            if values["trace"].value:
                listing = Path(values["trace"].value) / f"{rows}_{sampling}.txt"
                found[-1]["kernels_ms"] = trace(stepper, layout, compiled, packed, listing)
            print(found[-1], flush=True)
    print(table(found))
    if values["out"].value:
        fields = {"model": values["model"].value, "context": stepper.context, "prompts": prompts}
        fields |= {"copy_bytes_per_s": copy_speed, "rows": found}
        flags = os.environ.get("XLA_FLAGS", "")
        document = report.document("benchmarks.steps", argv, device=report.jax_device(), xla_flags=flags, **fields)
        report.write(values["out"].value, document)
    return 0


if __name__ == "__main__":
    program.run(main)
