"""Making programs ready to run: from the store where it has them, else lowered and compiled, several at a time.

model_runner.py calls `build` with the steps of all buckets. Nothing here knows what a program does.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
from tqdm import tqdm

from jax_engine.step_store import StepStore

#: Programs compiled at the same time, on other platforms than CPU.
_THREADS = 8
#: XLA:CPU uses most of the cores for one program as it is: there two at a time gain a tenth, and more nothing.
_CPU_THREADS = 2


@dataclass(frozen=True)
class Program:
    """Something to compile.

    Attributes:
        name: tells it apart from others with the same arguments.
        arguments: what it takes, as jax.ShapeDtypeStructs. results: any pytree of the form of what it gives.
        lower: traces and lowers it. options: of the compiler, beside XLA_FLAGS.
    """

    name: str
    arguments: tuple
    results: Any
    lower: Callable[[], jax.stages.Lowered]
    options: dict[str, Any] | None = None


def build[Key](
    programs: Mapping[Key, Program], store: StepStore | None, platform: str, unit: str
) -> dict[Key, jax.stages.Compiled]:
    """Every program, compiled. `unit` is what the progress bar counts."""
    threads = min(_CPU_THREADS if platform == "cpu" else _THREADS, os.cpu_count() or 1)
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=len(programs), desc=f"compiling {unit}s", unit=unit, leave=False) as bar,
    ):
        # Lowering holds the interpreter, so it is done here, one after the other; compiling and loading do not.
        loads = {key: pool.submit(_load, store, program) for key, program in programs.items()}
        futures: dict[Key, Future] = {}
        for key, program in programs.items():
            missing = loads[key].result() is None
            futures[key] = pool.submit(_compile, store, program, program.lower()) if missing else loads[key]
            futures[key].add_done_callback(lambda _: bar.update())
        return {key: future.result() for key, future in futures.items()}


def _load(store: StepStore | None, program: Program) -> jax.stages.Compiled | None:
    return store.load(program.name, program.arguments, program.results) if store else None


def _compile(store: StepStore | None, program: Program, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    compiled = lowered.compile(compiler_options=program.options)
    if store:
        store.save(program.name, program.arguments, program.results, compiled)
    return compiled
