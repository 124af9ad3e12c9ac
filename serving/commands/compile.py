"""`jax-engine compile`: compiles every step of a model for a named device, on any machine, and says what fits."""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from absl import flags as absl_flags

from jax_engine import ConfigError
from jax_engine.xla_flags import set_xla_flags
from serving import flags
from serving.cli import COMMANDS
from serving.commands import common

if TYPE_CHECKING:
    from jax_engine.compile_target import Fit, StepReport
    from jax_engine.targets import Target

_GIB, _MIB = 1 << 30, 1 << 20
_HEADINGS = ("step", "lower s", "compile s", "HBM GiB", "temp MiB", "in place", "VMEM MiB", "collectives")


def run(argv: Sequence[str]) -> int:
    """Compiles and reports. See cli.main for what it raises and returns."""
    flag_values = common.engine_flags(log_level="warning")
    here = {"flag_values": flag_values, "module_name": "Target"}
    absl_flags.DEFINE_string(
        "target", None, "Devices to compile for, as v6e:1x1 or h100. A wrong one lists those known.", **here
    )
    absl_flags.DEFINE_boolean("json", False, "One JSON object instead of a table.", **here)
    if not common.parse(flag_values, "compile", COMMANDS["compile"], argv):
        return 0
    name = flag_values["target"].value
    if name is None:
        raise flags.UsageError("--target is missing, as --target=v6e:1x1")
    config = dataclasses.replace(common.engine_config(flag_values), load_format="dummy")  # weights are not read
    _prepare(name)
    from jax_engine import compile_target, targets
    from jax_engine.models import read_config
    from jax_engine.sharding import choose_devices
    from jax_engine.start import open_model

    target = targets.open_target(name)
    if flag_values["tensor_parallel_size"].present:
        devices = choose_devices(target.devices, config.tensor_parallel_size)[0]
        target = dataclasses.replace(target, devices=devices)
    program, fit = compile_target.fit(config, read_config(open_model(config).config), target)
    reports = compile_target.compile_parts(program, fit.limits)
    show = _show_json if flag_values["json"].value else _show_table
    try:
        show(target, fit, reports)
    except ConfigError as error:
        print(f"jax-engine: {error}", file=sys.stderr)
        return 1
    return 0


def _prepare(target: str) -> None:
    """What the compilers want to find in the environment, set before jax is loaded."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    set_xla_flags()
    # Several compilations at once are several users of libtpu, which it takes for users of one chip.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Without these libtpu looks for a machine that is not there, and says so at length.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{target.partition(':')[0]}-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def _show_json(target: "Target", fit: "Fit", reports: Iterator["StepReport"]) -> None:
    document = {
        "target": target.name,
        "device": target.devices[0].device_kind,
        "num_devices": len(target.devices),
        "hbm_bytes": target.hbm_bytes,
        "fit": dataclasses.asdict(fit) | {"pool_bytes": fit.pool_bytes},
        "steps": [dataclasses.asdict(report) | {"bucket": report.bucket._asdict()} for report in reports],
    }
    print(json.dumps(document, indent=1))


def _show_table(target: "Target", fit: "Fit", reports: Iterator["StepReport"]) -> None:
    """The verdict first, then a line for each step as soon as it is compiled."""
    limits = fit.limits
    print(
        f"{target.name}: {len(target.devices)} x {target.devices[0].device_kind}, "
        f"{target.hbm_bytes / _GIB:.2f} GiB each\n"
        f"weights {fit.weight_bytes / _GIB:.2f} GiB, temporaries {fit.temp_bytes / _GIB:.2f} GiB, "
        f"a page of {limits.page_size} tokens {fit.page_bytes / 1024:.0f} KiB (each device)\n"
        f"largest pool that fits: {fit.largest_pages} pages = {limits.tokens_in(fit.largest_pages)} tokens\n"
        f"this pool: {limits.num_pages} pages = {limits.tokens_in(limits.num_pages)} tokens = "
        f"{limits.num_pages / limits.full_pages:.1f} sequences of {limits.max_model_len} = "
        f"{fit.pool_bytes / _GIB:.2f} GiB"
    )
    print("  ".join([_HEADINGS[0].ljust(14), *_HEADINGS[1:]]), flush=True)
    for report in reports:
        name, *cells = _row(fit, report)
        aligned = (cell.rjust(len(heading)) for cell, heading in zip(cells, _HEADINGS[1:], strict=True))
        print("  ".join([name.ljust(14), *aligned]), flush=True)


def _row(fit: "Fit", report: "StepReport") -> tuple[str, ...]:
    from jax_engine.compile_target import described

    in_place = "yes" if report.alias_bytes >= fit.pool_bytes else "NO"
    hbm = report.argument_bytes + report.temp_bytes + report.output_bytes + report.code_bytes
    return (
        described(report.kind, report.bucket),
        f"{report.lower_seconds:.1f}",
        f"{report.compile_seconds:.1f}",
        f"{hbm / _GIB:.2f}",
        f"{report.temp_bytes / _MIB:.0f}",
        in_place if report.kind == "model" else "-",  # the others are not given the pool
        f"{report.vmem_bytes / _MIB:.1f}",
        " ".join(f"{count} {name}" for name, count in report.collectives.items()) or "-",
    )
