"""How long weights take from disk to their devices, and how much host memory that takes beside them.

Makes a checkpoint of random weights of a named shape (`make`), or takes one that is there, loads it as the engine does,
each time in a process of its own with the file's pages dropped from the cache before, and compares it with an Orbax
checkpoint that it converts from it. On a CPU the device's arrays lie in host memory too; what they take is taken off.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import report

_MIB = 1 << 20


def _status(field: str) -> int:
    """A memory figure of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


@contextmanager
def _peaks(placed: list[int]) -> Iterator[dict[str, int]]:
    """Highest memory during the block beyond that before it and beyond the bytes placed on CPU devices by then.

    `anonymous` is memory of the process's own; `resident` also counts pages of mapped files, which the kernel takes
    back when it needs them.
    """
    names = {"anonymous": "RssAnon", "resident": "VmRSS"}
    before = {key: _status(name) for key, name in names.items()}
    peaks = dict.fromkeys(names, 0)
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            on_device = sum(placed)
            for key, name in names.items():
                peaks[key] = max(peaks[key], _status(name) - before[key] - on_device)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        stop.set()
        thread.join()


def _load_once(path: str, dtype: str) -> dict[str, Any]:
    """One load in this process."""
    import jax

    from checkpoints import loader
    from checkpoints.formats import open_checkpoint
    from jax_engine.models import read_config
    from jax_engine.program import ModelProgram

    device = jax.devices()[0]
    opened = time.perf_counter()
    checkpoint = open_checkpoint(path)
    program = ModelProgram(read_config(checkpoint.config), dtype, [device])
    placed: list[int] = []
    place = loader._place

    def placing(array: Any, want: Any) -> Any:
        result = place(array, want)
        if device.platform == "cpu":
            placed.append(result.nbytes)
        return result

    loader._place = placing
    with _peaks(placed) as peaks:
        started = time.perf_counter()
        params = loader.load(
            program.renamed(checkpoint), program.wanted, ignore=program.ignored_tensors, progress=False
        )
        jax.block_until_ready(params)
        seconds = time.perf_counter() - started
    largest = max(params.values(), key=lambda array: array.nbytes).nbytes
    return {
        "format": checkpoint.format,
        "open_s": started - opened,
        "load_s": seconds,
        "bytes": sum(array.nbytes for array in params.values()),
        "largest_parameter_bytes": largest,
        "peak_host_bytes": peaks if checkpoint.format != "orbax" or device.platform != "cpu" else None,
        "bound_bytes": int(1.2 * largest) + (1 << 30),
        "device": report.jax_device(),
    }


def _drop_cache(path: Path) -> None:
    """Asks the kernel to forget the file's pages."""
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _make(shape: str, layers: int, folder: Path) -> None:
    """A checkpoint of random bfloat16 weights, a layer a shard."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    from jax_engine.models import model_class, read_config
    from jax_engine.models.shapes import NAMED_SHAPES

    config = NAMED_SHAPES[shape] | {"num_hidden_layers": layers}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    model_config = read_config(config)
    shards: dict[str, dict[str, Any]] = {}
    random = np.random.default_rng(0)
    for path, source in model_class(model_config).weight_map(model_config).items():
        shard = path.split(".")[1] if path.startswith("layers.") else "rest"
        for name, size in source.tensors:
            bits = random.integers(0, 1 << 14, size, np.uint16)  # finite, and no denormals are needed
            shards.setdefault(shard, {})[name] = bits.view(ml_dtypes.bfloat16)
    for shard, tensors in shards.items():
        save_file(tensors, folder / f"model-{shard}.safetensors")


def _child(*arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks.loading", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout.strip().splitlines()[-1]


def main(argv: list[str]) -> None:
    """See the module; `--load` is what it runs in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--load", help=argparse.SUPPRESS)
    parser.add_argument("--model", help="a checkpoint; by default one of random weights is made")
    parser.add_argument("--shape", default="qwen3-0.6b", help="named shape of the random weights")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--dtypes", default="bfloat16,float32", help="comma-separated types to load as")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", default="benchmarks/results/loading.json")
    options = parser.parse_args(argv[1:])
    if options.load:
        print(json.dumps(_load_once(options.load, options.dtypes)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(options.model) if options.model else Path(scratch) / "made"
        if not options.model:
            _make(options.shape, options.layers, source)
        converted = Path(scratch) / "converted"
        from jax_engine.convert import convert

        convert(str(source), converted)
        runs = []
        for path in (source, converted):
            for dtype in options.dtypes.split(","):
                for _ in range(options.repeat):
                    _drop_cache(path)
                    runs.append({"dtype": dtype, **json.loads(_child("--load", str(path), "--dtypes", dtype))})
    report.write(options.out, report.document("benchmarks.loading", argv, shape=options.shape, runs=runs))
    print(_table(runs))


def _table(runs: list[dict[str, Any]]) -> str:
    rows = [["format, type", "GiB", "load s (best)", "GiB/s", "peak anonymous MiB", "peak resident MiB", "bound MiB"]]
    for key in dict.fromkeys((run["format"], run["dtype"]) for run in runs):
        same = [run for run in runs if (run["format"], run["dtype"]) == key]
        best = min(run["load_s"] for run in same)
        gib = same[0]["bytes"] / 2**30
        peaks = [run["peak_host_bytes"] for run in same if run["peak_host_bytes"]]
        shown = [
            f"{max(peak[kind] for peak in peaks) / _MIB:.0f}" if peaks else "-" for kind in ("anonymous", "resident")
        ]
        bound = f"{same[0]['bound_bytes'] / _MIB:.0f}"
        rows.append([", ".join(key), f"{gib:.2f}", f"{best:.2f}", f"{gib / best:.2f}", *shown, bound])
    return report.table(rows)


if __name__ == "__main__":
    main(sys.argv)
