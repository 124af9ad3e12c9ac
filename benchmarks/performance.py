"""Writes the tables and the plot of docs/performance.md from the files of runs on GPUs and on a CPU.

    python -m benchmarks.performance            # the tables; with --plot=docs/performance.png the plot as well

The text around the tables is written by hand; what stands between two marks is replaced.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from benchmarks import program, report
from benchmarks.steps import KINDS

RESULTS = report.ROOT / "benchmarks" / "results"
PAGE = report.ROOT / "docs" / "performance.md"
#: Output tokens per second: of vLLM 0.26.0 with async scheduling, measured on an H100 80GB with the same workload
#: files; what the bytes and operations of the workload allow at the rates of copies and products measured there, where
#: that was worked out; and what this project aims at.
PEERS = {
    "decode1": (152, 193, 172),
    "decode32": (3536, 4400, 4000),
    "decode128": (7595, 9250, 8400),
    "decode256": (9247, 11300, 10000),
    "chat": (9059, 14000, 11000),
    "chat_temperature": (7199, None, 10000),
    "blog32": (4202, 5400, 4800),
    "skewed": (4461, 5300, 4900),
    "uniform": (9230, 11300, 10000),
    "long": (1480, 1650, 1560),
    "qwen3_decode1": (555, None, 800),
    "qwen3_decode32": (10904, None, 14000),
    "qwen3_decode256": (25910, None, 32000),
}


def load(name: str) -> dict[str, Any] | None:
    """A results file, None where there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def throughput() -> list[list[str]]:
    """A row for each workload that has been run on an H100, beside its peer."""
    rows = [["workload", "output tok/s", "vLLM", "ratio", "target", "floor", "of floor", "gap p50, ms", "idle"]]
    for name, (peer, floor, target) in PEERS.items():
        results = load(f"h100_{name}")
        if results is None:
            continue
        run = results["runs"]["async"][0]
        rate = run["output_tok_per_s"]
        cells = [f"{rate:,.0f}", f"{peer:,}", f"{rate / peer:.2f}", f"{target:,}"]
        cells += [f"{floor:,}", f"{rate / floor:.0%}"] if floor else ["", ""]
        rows.append([name, *cells, f"{run['inter_token_ms']['p50']:.1f}", f"{run['device_idle_share']:.1%}"])
    return rows


def throughput_alone(device: str) -> list[list[str]]:
    """A row for each workload that has been run on another device, where no peer was."""
    rows = [["workload", "output tok/s", "gap p50, ms", "dispatch, ms", "idle", "padding"]]
    for name in PEERS:
        results = load(f"{device}_{name}")
        if results is None:
            continue
        run = results["runs"]["async"][0]
        times = f"{run['inter_token_ms']['p50']:.1f}", f"{run['host_ms_per_step']['dispatch']:.1f}"
        shares = f"{run['device_idle_share']:.1%}", f"{run['padding_share']:.1%}"
        rows.append([name, f"{run['output_tok_per_s']:,.0f}", *times, *shares])
    return rows


def modes(device: str) -> list[list[str]]:
    """A row for each comparison of a scheduling mode with the asynchronous one."""
    rows = [["workload", "mode", "tok/s", "async tok/s", "async over it", "idle", "async idle"]]
    for path in sorted(RESULTS.glob(f"{device}_modes_*.json")):
        results = json.loads(path.read_text())
        mode, base = next(iter(results["runs"].items()))
        pair = base[0], results["runs"]["async"][0]
        cells = [f"{run['output_tok_per_s']:,.0f}" for run in pair]
        idle = [f"{run['device_idle_share']:.1%}" for run in pair]
        rows.append([results["workload"]["name"], mode, *cells, f"{results['ratios']['async']['median']:.2f}", *idle])
    return rows


def steps(device: str) -> list[list[str]]:
    """A row for each size of benchmarks.steps."""
    results = load(f"{device}_steps") or {"rows": []}
    rows = [["single step", "ms", "floor", "over it", "dispatch p50, ms"]]
    for row in results["rows"]:
        name = f"{row['rows']} rows of {results['context']} keys, {row['sampling']}"
        over = row["step_ms"] / row["floor_ms"] - 1
        times = [f"{row['step_ms']:.2f}", f"{row['floor_ms']:.2f}", f"{over:.0%}", f"{row['dispatch_ms']['p50']:.2f}"]
        rows.append([name, *times])
    return rows


def step_kernels(device: str) -> list[list[str]]:
    """A row for each size of benchmarks.steps that was traced: milliseconds by what kernels are for."""
    traced = [row for row in (load(f"{device}_steps") or {"rows": []})["rows"] if "kernels_ms" in row]
    kinds = [kind for kind in (*KINDS, "other") if any(kind in row["kernels_ms"] for row in traced)]
    rows = [["single step, ms by kernel", *kinds]]
    for row in traced:
        name = f"{row['rows']} rows, {row['sampling']}"
        rows.append([name, *(f"{row['kernels_ms'].get(kind, 0.0):.2f}" for kind in kinds)])
    return rows


def kernels(device: str) -> list[list[str]]:
    """A row for each case of benchmarks.kernels."""
    rows = [["kernel", "us", "rate", "share of peak"]]
    for row in (load(f"{device}_kernels") or {"rows": []})["rows"]:
        if "failed" in row:
            continue
        rate = f"{row['per_s'] / 1e9:,.0f} GB/s" if row["kernel"] == "decode" else f"{row['per_s'] / 1e12:,.0f} TFLOP/s"
        rows.append([f"{row['kernel']} {row['case']}", f"{row['us']:.1f}", rate, f"{row['share_of_peak']:.0%}"])
    return rows


def details(device: str) -> list[list[list[str]]]:
    """The tables of modes, steps and kernels of a device."""
    return [table(device) for table in (modes, steps, step_kernels, kernels)]


def cpu() -> list[list[str]]:
    """A row for each workload run on a CPU, beside transformers' static batch."""
    rows = [["workload", "async tok/s", "sync tok/s", "static tok/s", "transformers tok/s", "async over transformers"]]
    peers = (load("cpu_hf_static") or {"results": {}})["results"]
    for name, peer in peers.items():
        results = load(name)
        if results is None:
            continue
        rates = {
            mode: statistics.median(run["output_tok_per_s"] for run in runs) for mode, runs in results["runs"].items()
        }
        cells = [f"{rates[mode]:.0f}" for mode in ("async", "sync", "static")]
        rows.append(
            [name, *cells, f"{peer['output_tok_per_s']:.0f}", f"{rates['async'] / peer['output_tok_per_s']:.2f}"]
        )
    return rows


def markdown(rows: list[list[str]]) -> str:
    """A table."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" + "|---:" * (len(rows[0]) - 1) + "|", *body])


def write(name: str, *tables: list[list[str]]) -> None:
    """Puts tables that have rows between the page's marks of that name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = PAGE.read_text().split(begin)
    text = "\n\n".join(markdown(rows) for rows in tables if len(rows) > 1)
    PAGE.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def plot(path: Path) -> None:
    """Throughput of each workload as a share of its floor, vLLM beside it."""
    import matplotlib.pyplot as plt

    rows = [row for row in throughput()[1:] if row[6]]
    figure, axes = plt.subplots(figsize=(8, 3))
    for shift, label, shares in (
        (-0.2, "jax-engine", [float(row[6].rstrip("%")) for row in rows]),
        (0.2, "vLLM 0.26", [100 * PEERS[row[0]][0] / (PEERS[row[0]][1] or 1) for row in rows]),
    ):
        axes.bar([index + shift for index in range(len(rows))], shares, 0.4, label=label)
    axes.set_xticks(range(len(rows)), [row[0] for row in rows])
    axes.set_ylabel("% of the floor")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main(argv: Sequence[str]) -> int:
    """Rewrites the page; argv[0] is the program's name. Returns the exit status.

    Raises:
        UsageError: the command line is wrong.
    """
    flag_values = absl_flags.FlagValues()
    absl_flags.DEFINE_string("plot", None, "Image to write.", flag_values=flag_values, module_name="performance")
    if not program.parse(flag_values, "benchmarks.performance", __doc__, argv[1:]):
        return 0
    write("tables", throughput(), *details("h100"))
    write("h200", throughput_alone("h200"), *details("h200"))
    write("cpu", cpu())
    if flag_values["plot"].value:
        plot(Path(flag_values["plot"].value))
    return 0


if __name__ == "__main__":
    program.run(main)
