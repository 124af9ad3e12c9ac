"""`jax-engine compile`: compiles every step of a model for a named device, on any machine, and says what fits."""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags as absl_flags

from jax_engine import ConfigError
from serving import flags
from serving.cli import COMMANDS
from serving.commands import common

if TYPE_CHECKING:
    from jax_engine.compile_target import Fit, StepReport, Target

_GIB = 1 << 30
_HEADINGS = (
    "step",
    "lower s",
    "compile s",
    "weights GiB",
    "pool GiB",
    "temp MiB",
    "in place",
    "VMEM MiB",
    "collectives",
)


def run(argv: Sequence[str]) -> int:
    """Compiles and reports. See cli.main for what it raises and returns."""
    flag_values = common.engine_flags(log_level="warning")
    here = {"flag_values": flag_values, "module_name": "Target"}
    absl_flags.DEFINE_string(
        "target", None, "Device to compile for, as v6e:1x1. A wrong one lists those known.", **here
    )
    absl_flags.DEFINE_boolean("json", False, "One JSON object instead of a table.", **here)
    if not common.parse(flag_values, "compile", COMMANDS["compile"], argv):
        return 0
    name = flag_values["target"].value
    if name is None:
        raise flags.UsageError("--target is missing, as --target=v6e:1x1")
    config = dataclasses.replace(common.engine_config(flag_values), load_format="dummy")  # weights are not read
    _prepare(name)
    from jax_engine import compile_target
    from jax_engine.models import read_config
    from jax_engine.start import open_model

    target = compile_target.open_target(name)
    program, fit = compile_target.fit(config, read_config(open_model(config).config), target)
    reports = []
    try:
        for report in compile_target.compile_buckets(program, fit.limits):
            reports.append(report)
    except ConfigError as error:
        _show(target, fit, reports, as_json=bool(flag_values["json"].value))
        print(f"jax-engine: {error}", file=sys.stderr)
        return 1
    _show(target, fit, reports, as_json=bool(flag_values["json"].value))
    return 0


def _prepare(target: str) -> None:
    """What the compilers want to find in the environment, set before jax is loaded."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Several compilations at once are several users of libtpu, which it takes for users of one chip.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Without these libtpu looks for a machine that is not there, and says so at length.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{target.partition(':')[0]}-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def _show(target: "Target", fit: "Fit", reports: Sequence["StepReport"], *, as_json: bool) -> None:
    if as_json:
        document = {
            "target": target.name,
            "device": target.devices[0].device_kind,
            "num_devices": len(target.devices),
            "hbm_bytes": target.hbm_bytes,
            "fit": dataclasses.asdict(fit),
            "steps": [dataclasses.asdict(report) | {"bucket": report.bucket._asdict()} for report in reports],
        }
        print(json.dumps(document, indent=1))
        return
    limits = fit.limits
    print(
        f"{target.name}: {len(target.devices)} x {target.devices[0].device_kind}, "
        f"{target.hbm_bytes / _GIB:.2f} GiB each\n"
        f"weights {fit.weight_bytes / _GIB:.2f} GiB, temporaries {fit.temp_bytes / _GIB:.2f} GiB, "
        f"a page of {limits.page_size} tokens {fit.page_bytes / 1024:.0f} KiB (each device)\n"
        f"largest pool that fits: {fit.largest_pages} pages = {fit.largest_pages * limits.page_size} tokens; "
        f"this one: {limits.num_pages} pages = {limits.num_pages * limits.page_size} tokens = "
        f"{limits.num_pages * limits.page_size / limits.max_model_len:.1f} sequences of {limits.max_model_len}"
    )
    rows = [_HEADINGS, *(_row(fit, report) for report in reports)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _row(fit: "Fit", report: "StepReport") -> tuple[str, ...]:
    bucket = report.bucket
    in_place = "yes" if report.alias_bytes >= fit.pool_bytes else "NO"
    return (
        f"{bucket.num_tokens} {'decode' if bucket.decode_only else 'tokens'}",
        f"{report.lower_seconds:.1f}",
        f"{report.compile_seconds:.1f}",
        f"{fit.weight_bytes / _GIB:.2f}",
        f"{fit.pool_bytes / _GIB:.2f}",
        f"{report.temp_bytes / 2**20:.0f}",
        in_place,
        f"{report.vmem_bytes / 2**20:.1f}",
        " ".join(f"{count} {name}" for name, count in report.collectives.items()) or "-",
    )
