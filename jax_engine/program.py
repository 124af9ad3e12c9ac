"""ModelProgram: what is compiled of a model, for devices that need not be here and before it has weights.

model_runner.py makes one for its own device, then loads the weights that it names; compile_target.py makes one for a
device on paper. Both so compile the same steps. It puts nothing on a device.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from checkpoints.formats import Checkpoint
from checkpoints.quantized_weight import shapes, stored_format
from checkpoints.weight_map import Quantization, Wanted
from jax_engine.batch import Adjustments, BatchLayout, no_adjustments
from jax_engine.buckets import Bucket
from jax_engine.compilation import Program
from jax_engine.config import Limits
from jax_engine.constraints import unconstrained
from jax_engine.errors import ConfigError
from jax_engine.kv_cache import KVCache, cache_shapes, page_bytes, slot_bytes
from jax_engine.layers.linear import FP8_ROWS
from jax_engine.model_config import ModelConfig
from jax_engine.models import model_class
from jax_engine.sharding import (
    TENSOR,
    copy_kv_heads,
    make_mesh,
    replicated,
    sharding_of,
    share_of,
    side_by_side,
    with_kv_copies,
)
from jax_engine.step import sample_step, step
from jax_engine.xla_flags import GPU_COMPILER_OPTIONS
from pallas_kernels.ragged_paged_attention import api as attention_op


class ModelProgram:
    """A model's steps over some devices of one kind.

    Args:
        dtype: of weights, activations and KV; `auto` for the device's own.
        kv_cache_dtype: `auto`: keys and values are of dtype too. `fp8`: float8_e4m3fn.
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
        self.kv_dtype = jnp.dtype(jnp.float8_e4m3fn) if kv_cache_dtype == "fp8" else self.dtype
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
        """For compiling what `lower` gives for the bucket, or a sampler."""
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
        """Bytes of one page of the KV cache over all layers, on each device."""
        return page_bytes(share_of(self._placed_config, self.mesh), page_size, self.kv_dtype, self.device)

    def slot_bytes(self, limits: Limits) -> int:
        """Bytes of the cache that do not depend on the number of pages, on each device."""
        model = share_of(self._placed_config, self.mesh)
        return slot_bytes(model, limits, self.dtype, self.kv_dtype, self.device)

    def cache_shapes(self, limits: Limits) -> KVCache:
        """The cache's arrays, with their places, as jax.ShapeDtypeStructs.

        Each device has a cache for its share of the kv heads; those of several devices lie side by side along the first
        axis of each array, whatever its layout.
        """
        model = share_of(self._placed_config, self.mesh)
        own = cache_shapes(model, limits, self.dtype, self.kv_dtype, self.device)
        return side_by_side(own, self.mesh)

    def lower(self, bucket: Bucket, limits: Limits) -> tuple[BatchLayout, jax.stages.Lowered]:
        """The step of a bucket, ready to be compiled; it takes what step.step takes, from the weights on."""
        layout = BatchLayout(bucket, limits.max_pages_per_seq)
        function = functools.partial(step, self._graph, layout, limits.page_size, limits.ring_pages, self.device)
        if self.mesh.size > 1:
            whole = jax.sharding.PartitionSpec()
            arrays = (nested(self._abstract_weights()), self.cache_shapes(limits))
            weights, cache = jax.tree.map(lambda array: array.sharding.spec, arrays)
            function = self._on_every_device(function, (weights, cache, whole, whole, whole, whole), (cache, whole))
        # Who asks for float32 means it: accelerators would else multiply in a shorter format.
        precision = jax.default_matmul_precision("highest" if self.dtype == jnp.float32 else "default")
        # Pallas asks the mesh which chip a kernel is for.
        with precision, jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            lowered = jax.jit(function, donate_argnums=1).lower(*self._step_arguments(layout, limits))
        return layout, lowered

    def step(self, bucket: Bucket, limits: Limits) -> tuple[BatchLayout, Program]:
        """The step of a bucket, for the compiler."""
        program = Program(lambda: self.lower(bucket, limits)[1], self.compiler_options(bucket))
        return BatchLayout(bucket, limits.max_pages_per_seq), program

    def sampler(self, num_seqs: int, limits: Limits, logits_sharding: Any) -> tuple[BatchLayout, Program]:
        """The sampling of deferred steps of so many sequences; it takes what step.sample_step takes."""
        layout = BatchLayout(Bucket(0, num_seqs, False), limits.max_pages_per_seq)
        cache, vocab_size = self.cache_shapes(limits), self.model_config.vocab_size
        arguments = (
            cache.token_ids,
            cache.last_tokens,
            self._placed(jax.ShapeDtypeStruct((layout.size,), jnp.int32)),
            jax.ShapeDtypeStruct((num_seqs, vocab_size), jnp.float32, sharding=logits_sharding),
            *self._placed((Adjustments(*no_adjustments(num_seqs)), unconstrained(num_seqs, vocab_size))),
        )
        lower = functools.partial(self._lower_sampler, layout, limits, arguments)
        return layout, Program(lower, self.compiler_options())

    def _step_arguments(self, layout: BatchLayout, limits: Limits) -> tuple:
        bucket = layout.bucket
        return (
            nested(self._abstract_weights()),
            self.cache_shapes(limits),
            *self._placed(
                (
                    jax.ShapeDtypeStruct((layout.size,), jnp.int32),
                    Adjustments(*no_adjustments(bucket.num_seqs)),
                    jax.ShapeDtypeStruct((bucket.num_tokens,), jnp.int32),
                    unconstrained(bucket.num_seqs, self.model_config.vocab_size),
                )
            ),
        )

    def _lower_sampler(self, layout: BatchLayout, limits: Limits, arguments: tuple) -> jax.stages.Lowered:
        function = functools.partial(sample_step, layout, limits.page_size)
        if self.mesh.size > 1:
            whole, own = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(TENSOR)
            specs = (own, own, whole, whole, whole, whole)
            function = self._on_every_device(function, specs, (own, whole))
        return jax.jit(function, donate_argnums=1).lower(*arguments)

    def _on_every_device(self, function: Callable, in_specs: tuple, out_specs: tuple) -> Callable:
        """A program as each device runs it: on its own parts of what is split, and on all of what is whole."""
        # What is whole is computed alike on every device, which tracing cannot prove.
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def _abstract(self, model: Callable[..., nnx.Module], config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
        return nnx.split(nnx.eval_shape(lambda: model(config, self.dtype, self.device.platform != "cpu")))

    def _abstract_weights(self) -> dict[str, Any]:
        return {name: shapes(want) for name, want in self.wanted.items()}

    def _placed(self, arrays: Any) -> Any:
        def place(array: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=self.replicated)

        return jax.tree.map(place, arrays)


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
