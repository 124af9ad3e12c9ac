"""Making programs ready to run: lowered one after the other, compiled several at a time.

model_runner.py calls `build` with the steps of all buckets. Nothing here knows what a program does.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from tqdm import tqdm

#: Programs compiled at the same time, on other platforms than CPU.
_THREADS = 8
#: XLA:CPU uses most of the cores for one program as it is: there two at a time gain a tenth, and more nothing.
_CPU_THREADS = 2


@dataclass(frozen=True)
class Program:
    """Something to compile: a function, for arguments of these shapes in these places.

    Attributes:
        name: of the function, for traces. made_of: what its trace depends on besides the arguments, as text.
        mesh: the devices. precision: of products, as jax.default_matmul_precision takes it.
        arguments: jax.ShapeDtypeStructs with shardings, in any trees. results: places, as a prefix of their tree.
        donate: number of the argument that the results take the place of.
        options: of the compiler, beside XLA_FLAGS.
    """

    name: str
    made_of: str
    function: Callable
    arguments: tuple
    results: Any
    mesh: jax.sharding.Mesh
    precision: str
    donate: int | None = None
    options: dict[str, Any] | None = None

    def lower(self) -> jax.stages.Lowered:
        """Traces and lowers it."""
        donated = () if self.donate is None else (self.donate,)
        with self.context():
            return jax.jit(self.function, donate_argnums=donated, out_shardings=self.results).lower(*self.arguments)

    @contextmanager
    def context(self) -> Iterator[None]:
        """In which it is traced: Pallas asks the mesh which chip a kernel is for."""
        with (
            jax.default_matmul_precision(self.precision),
            jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh),
        ):
            yield


@dataclass(frozen=True)
class Memory:
    """What the compiler says of a program's memory on each device, in bytes.

    Attributes:
        arguments: what it is given. aliased: what of these is updated in place. outputs: results that are new arrays.
        temporaries: what it needs besides. code: the program itself.
    """

    arguments: int
    aliased: int
    outputs: int
    temporaries: int
    code: int


def memory(compiled: jax.stages.Compiled) -> Memory:
    """Of a compiled program."""
    found = compiled.memory_analysis()
    assert found is not None, "the compiler reports no memory use"
    return Memory(
        found.argument_size_in_bytes,
        found.alias_size_in_bytes,
        found.output_size_in_bytes - found.alias_size_in_bytes,
        found.temp_size_in_bytes,
        found.generated_code_size_in_bytes,
    )


def step_bytes(model: jax.stages.Compiled, sampler: jax.stages.Compiled) -> int:
    """Bytes that a step takes on each device beside weights and cache: what the model leaves for the sampler, and what
    the hungrier of the two needs besides."""
    first, second = memory(model), memory(sampler)
    return first.outputs + max(first.temporaries, second.temporaries + second.outputs)


def build[Key](
    programs: Mapping[Key, Program],
    unit: str,
    lower: Callable[[Program], jax.stages.Lowered] = Program.lower,
) -> dict[Key, jax.stages.Compiled]:
    """Every program, compiled, all for one platform.

    Args:
        unit: what the progress bar counts. lower: makes one ready to be compiled.
    """
    platform = next(iter(programs.values())).mesh.devices.flat[0].platform
    threads = min(_CPU_THREADS if platform == "cpu" else _THREADS, os.cpu_count() or 1)
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=len(programs), desc=f"compiling {unit}s", unit=unit, leave=False, disable=None) as bar,
    ):
        futures = {}
        for key, program in programs.items():
            # Lowering holds the interpreter, so it is done here, one after the other; compiling does not.
            futures[key] = pool.submit(lower(program).compile, compiler_options=program.options)
            futures[key].add_done_callback(lambda _: bar.update())
        return {key: future.result() for key, future in futures.items()}
