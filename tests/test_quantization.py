"""Engines with weights and cache in 8 bits: what is loaded, stored and restored, and the same tokens in every mode."""

import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints.errors import CheckpointError
from checkpoints.formats import open_checkpoint
from checkpoints.loader import dummy, load
from checkpoints.quantized_weight import SCALE, QuantizedWeight, quantize, stored_format
from jax_engine import model_runner
from jax_engine.config import EngineConfig, resolve
from jax_engine.errors import ConfigError
from jax_engine.models import read_config
from jax_engine.models.shapes import NAMED_SHAPES
from jax_engine.program import ModelProgram, chosen_quantization
from jax_engine.sampling_params import SamplingParams
from serving.cli import main
from tests.test_engine import content, random_requests, serve
from tests.test_preemption import RECOMPUTE, SWAP, random_requests as long_requests, serve as serve_preempting

TINY = Path(__file__).parent / "golden" / "tiny"
SCORED = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)


def program(model: Path, quantization: str | None, **options) -> ModelProgram:
    return ModelProgram(
        read_config(open_checkpoint(str(model)).config),
        "float32",
        jax.devices()[:1],
        quantization=quantization,
        **options,
    )


def parameters(model: Path, quantization: str | None) -> dict[str, np.ndarray]:
    """As loaded, values and scales by their stored names."""
    checkpoint, made = open_checkpoint(str(model)), program(model, quantization)
    loaded = load(made.renamed(checkpoint), made.wanted, ignore=made.ignored_tensors, progress=False)
    host = jax.device_get({name: vars(w) if isinstance(w, QuantizedWeight) else {"": w} for name, w in loaded.items()})
    names = {"values": "", "scale": SCALE, "": ""}
    return {name + names[part]: array for name, both in host.items() for part, array in both.items()}


def check_equal(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype and got[name].tobytes() == value.tobytes(), name


@pytest.fixture(scope="module")
def int8(make_modes):
    return make_modes(quantization="int8", deterministic=True, token_buckets=(24,))


@pytest.fixture(scope="module")
def all_fp8(make_modes):
    return make_modes(
        quantization="fp8", kv_cache_dtype="fp8", deterministic=True, token_buckets=(24,), swap_space_gib=0.01
    )


@pytest.fixture(scope="module")
def all_int8(make_modes):
    return make_modes(
        quantization="int8", kv_cache_dtype="int8", deterministic=True, token_buckets=(24,), swap_space_gib=0.01
    )


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_factors_of_products_are_quantised_and_nothing_else(format):
    want, got = parameters(TINY / "gpt_oss", None), parameters(TINY / "gpt_oss", format)
    quantised = {name.removesuffix(SCALE) for name in got if name.endswith(SCALE)}
    assert {name.split(".", 2)[-1] if name.startswith("layers") else name for name in quantised} == {
        "attention.qkv", "attention.output", "mlp.gate_up", "mlp.down", "embed.weight", "lm_head.weight"
    }  # fmt: skip
    for name in want.keys() - quantised:
        assert got[name].tobytes() == want[name].tobytes()
    assert got["layers.0.mlp.gate_up" + SCALE].shape == want["layers.0.mlp.gate_up"].shape[:-1]
    assert got["layers.0.attention.output" + SCALE].shape == want["layers.0.attention.output"].shape[:1]
    with jax.transfer_guard("allow"):
        expected = quantize(jnp.asarray(want["layers.0.mlp.down"]), format, 1)
        np.testing.assert_allclose(got["layers.0.mlp.down" + SCALE], expected.scale, rtol=1e-6)


def test_dummy_weights_are_drawn_and_quantised_on_the_device():
    plain, made = program(TINY / "llama", None), program(TINY / "llama", "int8")
    whole, got = dummy(plain.wanted, 3), dummy(made.wanted, 3)
    name = "layers.0.mlp.down"
    with jax.transfer_guard("allow"):
        want = quantize(whole[name], "int8", 1)
        np.testing.assert_array_equal(got[name].values, want.values)
        np.testing.assert_allclose(got[name].scale, want.scale, rtol=1e-6)
    assert made.weight_bytes == sum(array.nbytes for array in jax.tree.leaves(got)) < 0.3 * plain.weight_bytes


@pytest.mark.parametrize("stored", [None, "int8", "fp8"])
def test_a_converted_checkpoint_has_the_bits_that_loading_makes(tmp_path, capsys, stored):
    out = tmp_path / "out"
    flags = [f"--quantization={stored}"] if stored else []
    assert main(["convert", str(TINY / "llama"), f"--out={out}", "--dtype=float32", *flags]) == 0
    checkpoint = open_checkpoint(str(out))
    assert stored_format(checkpoint.tensors) == chosen_quantization("auto", checkpoint) == stored
    format = stored or "int8"
    check_equal(parameters(out, format), parameters(TINY / "llama", format))
    if stored == "int8":
        with pytest.raises(ConfigError, match=r"holds int8 weights.*--quantization=fp8"):
            chosen_quantization("fp8", checkpoint)
        with pytest.raises(CheckpointError, match=r"\.scale: unexpected"):
            parameters(out, None)
    assert main(["convert", str(TINY / "llama"), f"--out={tmp_path / 'no'}", "--quantization=int4"]) == 2
    assert "int8|fp8" in capsys.readouterr().err


def test_the_engine_computes_what_its_weights_stand_for(int8, one_bucket, monkeypatch):
    """The same steps without quantisation, over the numbers that values times scales are."""

    def whole(weight, like):
        if not isinstance(weight, QuantizedWeight):
            return weight
        scale = np.asarray(weight.scale)
        array = np.asarray(weight.values).astype(np.float32) * scale.reshape(
            scale.shape + (1,) * (like.ndim - scale.ndim)
        )
        return jax.device_put(array, like.sharding)

    is_weight = {"is_leaf": lambda leaf: isinstance(leaf, QuantizedWeight)}
    with jax.transfer_guard("allow"):
        plain = jax.tree.map(whole, int8.runner.weights, one_bucket.runner.weights, **is_weight)
    monkeypatch.setattr(one_bucket.runner, "weights", plain)
    chance = random.Random(0)
    requests = [([chance.randrange(256) for _ in range(60)], SCORED) for _ in range(4)]
    for got, want in zip(serve(int8.engine(), requests), serve(one_bucket.engine(), requests), strict=True):
        pairs = zip(got.prompt_logprobs[1:], want.prompt_logprobs[1:], got.prompt_token_ids[1:], strict=True)
        errors = [abs(ours[token].logprob - theirs[token].logprob) for ours, theirs, token in pairs]
        assert max(errors) < 1e-3
    monkeypatch.undo()
    unquantised = serve(one_bucket.engine(), requests)[0]
    assert unquantised.prompt_logprobs != want.prompt_logprobs  # else nothing was shown


@pytest.mark.parametrize("modes", ["int8", "all_fp8", "all_int8"])
def test_async_is_sync_bit_for_bit(modes, request):
    modes = request.getfixturevalue(modes)
    requests = random_requests(31, 24)
    want = serve(modes.engine("sync"), requests)
    got = serve(modes.engine("async", 3), requests, chance=random.Random(32))
    assert list(map(content, got)) == list(map(content, want))


@pytest.mark.parametrize("costs", [SWAP, RECOMPUTE], ids=["swap", "recompute"])
@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_a_cache_of_8_bits_comes_back_bit_for_bit(format, costs, request):
    """Swapped, computed again, or found by a shared beginning."""
    modes = request.getfixturevalue(f"all_{format}")
    assert modes.runner._cache.pool.dtype == {"fp8": jnp.float8_e4m3fn, "int8": jnp.int8}[format]
    requests = long_requests(33, 12)
    want, none = serve_preempting(modes.engine("sync", enable_prefix_caching=False), requests)
    assert not none
    got, preemptions = serve_preempting(modes.engine("async", 2, num_pages=20, **costs), requests, random.Random(34))
    assert {preemption.way for preemption in preemptions} == {"swap" if costs is SWAP else "recompute"}
    assert got == want


def test_a_cache_of_8_bits_has_twice_the_pages():
    model = read_config(NAMED_SHAPES["llama-3.1-8b"])
    config = EngineConfig(dtype="bfloat16", kv_cache_dtype="fp8", max_num_seqs=256)
    limits = resolve(config, model, platform="gpu", num_pages=1)
    sizes = [
        ModelProgram(model, "bfloat16", jax.devices()[:1], kv_cache_dtype=dtype).page_bytes(limits.page_size)
        for dtype in ("auto", "fp8")
    ]
    ids = 4 * limits.page_size  # the tokens of a page, kept beside the keys and values
    assert (sizes[0] - ids, sizes[1] - ids) == (131072 * limits.page_size, 65536 * limits.page_size)
    free = 40 << 30
    assert free // sizes[1] > 1.99 * (free // sizes[0])


def logprobs(engine) -> np.ndarray:
    """Of the same random prompts' tokens."""
    chance = random.Random(0)
    requests = [([chance.randrange(256) for _ in range(60)], SCORED) for _ in range(4)]
    return np.array(
        [
            [
                entries[token].logprob
                for entries, token in zip(o.prompt_logprobs[1:], o.prompt_token_ids[1:], strict=True)
            ]
            for o in serve(engine, requests)
        ]
    )


#: Mean error of the tiny models' log-probabilities, whose random weights make steep softmaxes.
CACHE_ERROR = {"int8": 0.05, "fp8": 0.15}


@pytest.mark.parametrize(("format", "least", "largest"), [("int8", 32, 127), ("fp8", 28, 448)])
def test_the_scales_of_a_cache_leave_room_and_waste_little(make_modes, format, least, largest):
    """Heads differ in size; each has its own scale, and the cache answers almost as an unquantised one."""
    modes, plain = make_modes(kv_cache_dtype=format), make_modes()
    scales = np.asarray(jax.device_get(modes.runner._cache.kv_scales))
    assert len(np.unique(scales)) == scales.size and (scales > 1e-6).all()
    again = make_modes(kv_cache_dtype=format)
    np.testing.assert_array_equal(jax.device_get(again.runner._cache.kv_scales), scales)
    errors = np.abs(logprobs(modes.engine()) - logprobs(plain.engine()))
    assert 0 < errors.mean() < CACHE_ERROR[format]
    written = np.abs(np.asarray(jax.device_get(modes.runner._cache.pool)).astype(float))
    assert least < written.max() <= largest and (written == largest).mean() < 1e-3


def with_larger_keys_and_values(model: Path, out: Path, factor: float) -> None:
    """A copy of a Llama checkpoint that computes the same from keys and values so many times as large."""
    factors = {"q_proj": 1 / factor, "k_proj": factor, "v_proj": factor, "o_proj": 1 / factor}
    shutil.copytree(model, out)
    [path] = out.glob("*.safetensors")
    tensors = load_file(path)
    for name in tensors:
        tensors[name] = tensors[name] * np.float32(factors.get(name.split(".")[-2], 1))
    save_file(tensors, path)


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("factor", [2.0**14, 2.0**-14])
def test_keys_and_values_that_8_bits_do_not_hold_as_they_are(make_modes, monkeypatch, tmp_path, format, factor):
    """Scales follow the model: its answers are those from keys and values of an ordinary size, bit for bit."""
    with_larger_keys_and_values(TINY / "llama", tmp_path / "model", factor)
    options = {"kv_cache_dtype": format, "deterministic": True, "token_buckets": (64,)}
    want = logprobs(make_modes(**options).engine())
    got = logprobs(make_modes(**options, model=str(tmp_path / "model")).engine())
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    monkeypatch.setattr(model_runner, "find_scales", lambda *_: jnp.ones((3, 2, 2)))
    with jax.transfer_guard("allow"):
        without = logprobs(make_modes(**options, model=str(tmp_path / "model")).engine())
    assert np.abs(without - want).mean() > 0.1


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_a_cache_of_8_bits_whose_layers_are_in_groups(make_modes, format):
    """Layers in one place of their groups share scales, which the largest of them sets."""
    options = {"model": str(TINY / "gemma3"), "num_pages": 152, "deterministic": True, "token_buckets": (32,)}
    modes, plain = make_modes(**options, kv_cache_dtype=format), make_modes(**options)
    groups, layers = modes.limits.page_groups, modes.runner.model_config.layers_per_page
    scales = np.asarray(jax.device_get(modes.runner._cache.kv_scales))
    assert groups.num > 1 and layers * groups.num >= 7 and scales.shape == (layers, 2, 2) and (scales > 1e-6).all()
    errors = np.abs(logprobs(modes.engine("sync")) - logprobs(plain.engine("sync")))
    assert 0 < errors.mean() < CACHE_ERROR[format]
    requests = random_requests(35, 16)
    want = serve(modes.engine("sync", enable_prefix_caching=False), requests)
    got = serve(modes.engine("async", 3), requests, chance=random.Random(36))
    assert list(map(content, got)) == list(map(content, want))


def test_latent_keys_are_kept_in_fp8_without_scales(make_modes):
    assert make_modes(model=str(TINY / "deepseek_v3"), kv_cache_dtype="fp8").runner._cache.kv_scales is None


def test_a_cache_of_int8_needs_keys_and_values_in_pages(make_modes):
    with pytest.raises(ConfigError, match=r"kv_cache_dtype int8.*latent keys only.*take auto or fp8"):
        _ = make_modes(model=str(TINY / "deepseek_v3"), kv_cache_dtype="int8").runner


@pytest.mark.parametrize("name", ["quantization", "kv_cache_dtype"])
def test_an_unknown_format_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name} must be one of auto,.*fp8.*; got 'int3'"):
        EngineConfig(**{name: "int3"})


@pytest.mark.long
@pytest.mark.parametrize("architecture", sorted(path.name for path in TINY.iterdir()))
def test_every_architecture_runs_in_8_bits(make_modes, architecture):
    """With either format: finite, the same in company as alone, and no further off than its weights are."""
    options = {"max_num_seqs": 3, "token_buckets": (64,), "decode_buckets": (), "num_pages": 40}
    expected = np.load(TINY / architecture / "expected.npz")
    prompts = expected["tokens"].tolist()
    errors = {}
    for form in ({"quantization": "int8"}, {"kv_cache_dtype": "fp8"}, {"quantization": "fp8", "kv_cache_dtype": "fp8"}):
        modes = make_modes(model=str(TINY / architecture), **options, **form)
        outputs = serve(modes.engine(), [(prompt, SCORED) for prompt in prompts])
        alone = serve(modes.engine("sync"), [(prompts[0], SCORED)])
        assert alone[0].prompt_logprobs == outputs[0].prompt_logprobs
        got = np.array(
            [
                [e[t].logprob for e, t in zip(o.prompt_logprobs[1:], p[1:], strict=True)]
                for o, p in zip(outputs, prompts, strict=True)
            ]
        )
        want = np.stack(
            [
                logprobs[np.arange(47), tokens[1:]]
                for logprobs, tokens in zip(expected["logprobs"], prompts, strict=True)
            ]
        )
        errors[str(form)] = float(np.abs(got - want).mean())
    print(architecture, errors)
    # Random weights make steep softmaxes: of the trained default model's errors benchmarks/quantization.py tells.
    spread = float(np.abs(expected["logprobs"]).mean())
    assert max(errors.values()) < 0.1 * spread
