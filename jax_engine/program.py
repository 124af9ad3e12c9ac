"""ModelProgram: what is compiled of a model, for devices that need not be here and before it has weights.

model_runner.py makes one for its own device, then loads the weights that it names; compile_target.py makes one for a
device on paper. Both so compile the same steps. It puts nothing on a device.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import nnx

from checkpoints.formats import Checkpoint
from checkpoints.quantized_weight import shapes, stored_format
from checkpoints.weight_map import Quantization, Wanted
from jax_engine.batch import Adjustments, BatchLayout, no_adjustments
from jax_engine.buckets import Bucket, buckets
from jax_engine.compilation import Program
from jax_engine.config import Limits
from jax_engine.constraints import unconstrained
from jax_engine.errors import ConfigError
from jax_engine.kv_cache import KVCache, cache_shapes, page_bytes, slot_bytes
from jax_engine.layers.linear import FP8_ROWS
from jax_engine.layers.recurrent import RecurrentCache
from jax_engine.model_config import ModelConfig
from jax_engine.models import model_class
from jax_engine.peer_memory import peers_shape
from jax_engine.sampler import SamplerOutput
from jax_engine.sharding import (
    copy_kv_heads,
    make_mesh,
    replicated,
    sharding_of,
    share_of,
    side_by_side,
    with_kv_copies,
)
from jax_engine.step import StepOutput, choose, choose_likeliest, compute, pick, score
from jax_engine.xla_flags import GPU_COMPILER_OPTIONS
from pallas_kernels.ragged_paged_attention import api as attention_op

# jax.export keeps a program's results by the names of their types.
for _result in (KVCache, StepOutput):
    jax.export.register_pytree_node_serialization(
        _result,
        serialized_name=f"jax_engine.{_result.__name__}",
        serialize_auxdata=lambda _: b"",
        deserialize_auxdata=lambda _: (),
    )
for _result in (RecurrentCache, SamplerOutput):
    jax.export.register_namedtuple_serialization(_result, serialized_name=f"jax_engine.{_result.__name__}")

#: Prompt tokens whose log-probabilities are computed at a time: so many rows of logits are held.
PROMPT_BLOCK = 64


class Part(NamedTuple):
    """One of the programs that steps are made of.

    Attributes:
        kind: `model`, `likeliest`, `sample`, `pick` or `score`; see step.py.
        bucket: of the model. For the others 0 where they do not depend on the tokens, or sequences, of a step.
    """

    kind: str
    bucket: Bucket


class ModelProgram:
    """A model's steps over some devices of one kind.

    Args:
        dtype: of weights, activations and KV; `auto` for the device's own.
        kv_cache_dtype: `auto`: keys and values are of dtype too. `fp8`: float8_e4m3fn. `int8`. Both have scales, which
            kv_scales.py finds, except for latent keys (MLA), which fp8 holds as they are and int8 cannot.
        by_expert: experts lie whole on one of the devices each, rather than in parts on all.
        quantization: `int8` or `fp8`: factors of products are kept in so many bits. None: they are of `dtype`.

    Attributes:
        device: what the devices are, as the kernels' packages name it.
        mesh: the devices. replicated: whole on each of them.
        wanted: the weights that the steps take, by dotted path.
        ignored_tensors: patterns of checkpoint tensors that no weight is made of.

    Raises:
        ConfigError: nobody has written the model's architecture yet.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        dtype: str,
        devices: list[Any],
        *,
        by_expert: bool = False,
        kv_cache_dtype: str = "auto",
        quantization: str | None = None,
    ):
        self.model_config = model_config
        self._placed_config = with_kv_copies(model_config, len(devices))
        self.device = attention_op.Device(devices[0].platform, devices[0].device_kind)
        self.dtype = jnp.dtype(_dtype(dtype, self.device.platform))
        self.kv_dtype = jnp.dtype(_KV_DTYPES.get(kv_cache_dtype, self.dtype))
        if self.kv_dtype == jnp.int8 and model_config.mla is not None:
            raise ConfigError(
                f"kv_cache_dtype int8 needs keys and values in pages; {model_config.architecture} keeps latent keys "
                "only; take auto or fp8"
            )
        self._quantization = quantization
        self.mesh = make_mesh(devices)
        self.replicated = replicated(self.mesh)
        model = model_class(model_config)
        self._graph, state = self._abstract(model, self._placed_config)
        place = functools.partial(sharding_of, mesh=self.mesh, by_expert=by_expert)
        self.wanted = _wanted(state, model.weight_map(model_config), place, quantization)
        if self._placed_config != model_config:
            _, stored = self._abstract(model, model_config)
            self.wanted = _with_kv_copies(self.wanted, stored, model_config, self._placed_config)
        self.ignored_tensors = model.IGNORED_TENSORS
        self._tensor_name = model.tensor_name

    def compiler_options(self, bucket: Bucket | None = None) -> dict[str, Any] | None:
        """For compiling what `lower` gives for the bucket, or another part."""
        if self.device.platform != "gpu":
            return None
        if bucket is None or self._quantization != "fp8" or bucket.num_tokens < FP8_ROWS:
            return GPU_COMPILER_OPTIONS
        # Products of fp8 with fp8 are fastest in cuBLAS. XLA may put a Triton kernel of its own in their place, chosen
        # by timing it; with one such choice a layer took 68 ms (benchmarks/results/h100_quantized_products.json).
        return GPU_COMPILER_OPTIONS | {"xla_gpu_enable_triton_gemm": False}

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, over all devices."""
        arrays = jax.tree.leaves(self._abstract_weights())
        return sum(int(np.prod(array.shape)) * array.dtype.itemsize for array in arrays)

    def renamed(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with its tensors under the names that `wanted` has for them."""
        if checkpoint.format == "orbax":
            return checkpoint
        tensors = {self._tensor_name(name): info for name, info in checkpoint.tensors.items()}
        return dataclasses.replace(checkpoint, tensors=tensors)

    def page_bytes(self, page_size: int) -> int:
        """Bytes of one page of the KV cache, on each device."""
        return page_bytes(share_of(self._placed_config, self.mesh), page_size, self.kv_dtype, self.device)

    def slot_bytes(self, limits: Limits) -> int:
        """Bytes of the cache that do not depend on the number of pages, on each device."""
        return slot_bytes(share_of(self._placed_config, self.mesh), limits, self.dtype)

    def cache_shapes(self, limits: Limits) -> KVCache:
        """The cache's arrays, with their places, as jax.ShapeDtypeStructs.

        Each device has a cache for its share of the kv heads; those of several devices lie side by side along the first
        axis of each array, whatever its layout.
        """
        model = share_of(self._placed_config, self.mesh)
        own = cache_shapes(model, limits, self.dtype, self.kv_dtype, self.device)
        return side_by_side(dataclasses.replace(own, peers=peers_shape(self.mesh)), self.mesh)

    def lower(self, bucket: Bucket, limits: Limits) -> tuple[BatchLayout, jax.stages.Lowered]:
        """The model's program of a bucket, ready to be compiled; it takes step.compute's arguments from weights on."""
        return BatchLayout.of(bucket, limits), self.part(Part("model", bucket), limits).lower()

    def parts(self, limits: Limits) -> dict[Part, Program]:
        """All programs that steps within the limits are made of, for the compiler."""
        sizes = buckets(limits)
        num_seqs = sorted({bucket.num_seqs for bucket in sizes})
        found = [Part("model", bucket) for bucket in sizes]
        found += [Part(kind, Bucket(0, size, False)) for size in num_seqs for kind in ("likeliest", "sample")]
        found += [Part("pick", Bucket(size, 0, False)) for size in sorted({bucket.num_tokens for bucket in sizes})]
        found.append(Part("score", Bucket(PROMPT_BLOCK, 0, False)))
        return {part: self.part(part, limits) for part in found}

    def part(self, part: Part, limits: Limits) -> Program:
        """One of them. `model`, `sample`, `likeliest`, `pick` and `score` take the arguments of step.compute,
        step.choose, step.choose_likeliest, step.pick and step.score, from the first that is not static on."""
        assert self.model_config.page_groups == limits.page_groups, "limits of another model, or it is not `served`"
        if part.kind == "model":
            return self._model(part, limits)
        return self._sampler(part, limits) if part.kind in ("likeliest", "sample") else self._scorer(part)

    def _model(self, part: Part, limits: Limits) -> Program:
        layout = BatchLayout.of(part.bucket, limits)
        function = functools.partial(compute, self._graph, layout, limits.page_size, self.device, limits.one_way)
        cache = self.cache_shapes(limits)
        arguments = (nested(self._abstract_weights()), cache, self._placed(_ints(layout.size)))
        return self._program(
            function,
            arguments,
            (_places(cache), self.replicated),
            donate=1,
            options=self.compiler_options(part.bucket),
        )

    def _sampler(self, part: Part, limits: Limits) -> Program:
        num_seqs, vocab_size = part.bucket.num_seqs, self.model_config.vocab_size
        layout = BatchLayout.of(part.bucket, limits)
        cache = self.cache_shapes(limits)
        logits = jax.ShapeDtypeStruct((num_seqs, vocab_size), jnp.float32)
        arguments = (cache.last_tokens, *self._placed((_ints(layout.size), logits)))
        results = (_places(cache.last_tokens), self.replicated)
        if part.kind == "likeliest":
            function = functools.partial(choose_likeliest, layout)
            return self._program(function, arguments, results, donate=0)
        changes = (Adjustments(*no_adjustments(num_seqs)), unconstrained(num_seqs, vocab_size))
        arguments = (*arguments, cache.token_ids, *self._placed(changes))
        function = functools.partial(choose, layout, limits.page_size)
        return self._program(function, arguments, results, donate=0)

    def _scorer(self, part: Part) -> Program:
        block = self._placed(_ints(PROMPT_BLOCK))
        hidden = jax.ShapeDtypeStruct((part.bucket.num_tokens, self.model_config.hidden_size), self.dtype)
        if part.kind == "pick":
            return self._program(pick, (self._placed(hidden), block), self.replicated)
        arguments = (nested(self._abstract_weights()), self._placed(hidden), block)
        return self._program(functools.partial(score, self._graph), arguments, self.replicated)

    def _program(
        self,
        function: Callable,
        arguments: tuple,
        results: Any,
        *,
        donate: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> Program:
        """A program for its arguments' shapes and places.

        Args:
            results: where they lie, as a prefix of their tree. options: of the compiler; None: those of all parts.
        """
        name = getattr(function, "func", function).__name__
        # A graph is known by what it was made of, and the weights by the arguments.
        statics = [static for static in getattr(function, "args", ()) if static is not self._graph]
        if self.mesh.size > 1:
            # Each device runs it on its own parts of what is split, and on all of what is whole. What is whole is
            # computed alike on every device, which tracing cannot prove.
            function = jax.shard_map(
                function,
                mesh=self.mesh,
                in_specs=_specs(_places(arguments)),
                out_specs=_specs(results),
                check_vma=False,
            )
        return Program(
            name,
            made_of=repr((self._placed_config, self.dtype, self.device, *statics)),
            function=function,
            arguments=arguments,
            results=results,
            mesh=self.mesh,
            # Who asks for float32 means it: accelerators would else multiply in a shorter format.
            precision="highest" if self.dtype == jnp.float32 else "default",
            donate=donate,
            options=options or self.compiler_options(),
        )

    def _abstract(self, model: Callable[..., nnx.Module], config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
        return nnx.split(nnx.eval_shape(lambda: model(config, self.dtype, self.device.platform != "cpu")))

    def _abstract_weights(self) -> dict[str, Any]:
        return {name: shapes(want) for name, want in self.wanted.items()}

    def _placed(self, arrays: Any) -> Any:
        def place(array: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=self.replicated)

        return jax.tree.map(place, arrays)


_KV_DTYPES = {"fp8": jnp.float8_e4m3fn, "int8": jnp.int8}


def largest_parts(limits: Limits) -> tuple[Part, Part]:
    """The model's program and the sampler of the step that needs the most memory."""
    bucket = max(buckets(limits), key=lambda bucket: bucket.num_tokens)
    return Part("model", bucket), Part("sample", Bucket(0, bucket.num_seqs, False))


def chosen_quantization(asked: str, checkpoint: Checkpoint) -> str | None:
    """The format of the weights' values: the checkpoint's own, or what the operator asks for.

    Raises:
        ConfigError: the checkpoint is quantised already, to another format.
    """
    stored = stored_format(checkpoint.tensors) if checkpoint.format == "orbax" else None
    if asked == "auto":
        return stored
    if stored not in (None, asked):
        raise ConfigError(
            f"quantization {asked}: {checkpoint.path} holds {stored} weights, from which no others can be made; "
            f"leave it at auto, or convert the original with --quantization={asked}"
        )
    return asked


def nested(arrays: dict[str, Any]) -> dict:
    """Dotted paths -> nested dicts, list positions as int keys, as nnx.merge takes them."""
    tree: dict = {}
    for path, array in arrays.items():
        *parents, leaf = (int(part) if part.isdecimal() else part for part in path.split("."))
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = array
    return tree


def _ints(size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size,), jnp.int32)


def _places(arrays: Any) -> Any:
    return jax.tree.map(lambda array: array.sharding, arrays)


def _specs(shardings: Any) -> Any:
    return jax.tree.map(lambda sharding: sharding.spec, shardings)


def _dtype(name: str, platform: str) -> str:
    if name == "auto":
        return "float32" if platform == "cpu" else "bfloat16"
    return name


def _wanted(state: nnx.State, sources: dict, place: Callable[..., Any], quantization: str | None) -> dict[str, Wanted]:
    wanted = {}
    for path, variable in nnx.to_flat_state(state):
        metadata = variable.get_metadata()
        name, axes, inputs = ".".join(map(str, path)), metadata["axes"], metadata["inputs"]
        quantized = None
        if quantization and inputs:
            quantized = Quantization(quantization, inputs, place(axes[:-inputs], variable.shape[:-inputs]))
        wanted[name] = Wanted(
            shape=variable.shape,
            dtype=variable.dtype,
            sharding=place(axes, variable.shape),
            source=sources[name],
            init=metadata["init"],
            quantization=quantized,
        )
    return wanted


def _with_kv_copies(
    wanted: dict[str, Wanted], stored_state: nnx.State, stored: ModelConfig, placed: ModelConfig
) -> dict[str, Wanted]:
    """The same, where kv heads are laid out several times; see sharding.with_kv_copies."""
    arranged = {}
    for path, variable in nnx.to_flat_state(stored_state):
        name, axes = ".".join(map(str, path)), variable.get_metadata()["axes"]
        arrange = functools.partial(copy_kv_heads, axes=axes, stored=stored, placed=placed)
        arranged[name] = dataclasses.replace(wanted[name], stored_shape=variable.shape, arrange=arrange)
    return arranged
