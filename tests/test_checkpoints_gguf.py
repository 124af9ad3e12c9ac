"""GGUF files: names, row order, values, config and tokenizer; and that no damaged file gets past the header walk."""

import functools
import struct
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from checkpoints import gguf_io, gguf_tokenizer
from checkpoints.errors import CheckpointError
from checkpoints.formats import Checkpoint, open_checkpoint
from checkpoints.gguf_model import unpermute

HEADS, KV_HEADS, HEAD_DIM, EMBED, VOCAB = 4, 2, 8, 32, 10
QUERY = np.arange(HEADS * HEAD_DIM * EMBED, dtype=np.float32).reshape(HEADS * HEAD_DIM, EMBED)
KEY = -QUERY[: KV_HEADS * HEAD_DIM]
TOKENS = ["<pad>", "<s>", "</s>", "<eot>", "a", "b", "ab", "Ġ", "1", "c"]


def permute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Rotate-half order to interleaved order, written out row by row: pair (i, i + half) becomes (2 i, 2 i + 1)."""
    size = len(rows) // num_heads
    out = np.empty_like(rows)
    for head in range(num_heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = rows[head * size + i]
            out[head * size + 2 * i + 1] = rows[head * size + size // 2 + i]
    return out


def write(path: Path, change: Callable[[gguf.GGUFWriter], None] = lambda writer: None, arch: str = "llama") -> Path:
    """A one-layer model; `change` may add to it."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(EMBED)
    writer.add_feed_forward_length(16)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(50000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, 3, 1, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(3)
    writer.add_tensor("token_embd.weight", np.ones((VOCAB, EMBED), np.float16))
    writer.add_tensor("blk.0.attn_q.weight", permute(QUERY, HEADS) if arch == "llama" else QUERY)
    writer.add_tensor("blk.0.attn_k.weight", permute(KEY, KV_HEADS) if arch == "llama" else KEY)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(EMBED, np.float32))
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def opened(path: Path, *args: Any, **kwargs: Any) -> Checkpoint:
    return open_checkpoint(str(write(path / "model.gguf", *args, **kwargs)))


@pytest.fixture(scope="module")
def smollm2() -> Checkpoint:
    """The default model; fetched at first use."""
    return open_checkpoint("smollm2-135m-instruct")


def test_the_default_model_is_sampled_as_its_makers_recommend(smollm2: Checkpoint) -> None:
    assert smollm2.generation_config["temperature"] == 0.2 and smollm2.generation_config["top_p"] == 0.9
    assert smollm2.eos_token_ids


def test_smollm2_is_read_as_gguf_reads_it(smollm2: Checkpoint) -> None:
    reader = gguf.GGUFReader(smollm2.path)
    assert len(smollm2.tensors) == len(reader.tensors)
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    for ours, name in {"mlp.down_proj": "ffn_down", "self_attn.v_proj": "attn_v"}.items():
        tensor = theirs[f"blk.7.{name}.weight"]
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        values = smollm2.tensors[f"model.layers.7.{ours}.weight"].read()
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, expected)
    tensor = theirs["blk.7.attn_k.weight"]
    stored = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    ours = smollm2.tensors["model.layers.7.self_attn.k_proj.weight"].read()
    np.testing.assert_array_equal(permute(ours, 3), stored)


def test_smollm2_config(smollm2: Checkpoint) -> None:
    config = smollm2.config
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]) == (576, 1536, 30)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (9, 3, 64)
    assert (config["vocab_size"], config["max_position_embeddings"], config["rope_theta"]) == (49152, 8192, 100000.0)
    assert config["tie_word_embeddings"] is True and config["rms_norm_eps"] == pytest.approx(1e-5)
    assert (smollm2.eos_token_ids, smollm2.bos_token_id) == ((2,), 1)
    assert smollm2.special_tokens["eos_token"] == "<|im_end|>"


def test_unpermute_inverts_a_permutation_written_out_by_hand() -> None:
    np.testing.assert_array_equal(unpermute(permute(QUERY, HEADS), HEADS), QUERY)
    assert not np.array_equal(permute(QUERY, HEADS), QUERY)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_query_and_key_rows_come_in_rotate_half_order(tmp_path: Path, arch: str) -> None:
    tensors = opened(tmp_path, arch=arch).tensors
    np.testing.assert_array_equal(tensors["model.layers.0.self_attn.q_proj.weight"].read(), QUERY)
    np.testing.assert_array_equal(tensors["model.layers.0.self_attn.k_proj.weight"].read(), KEY)
    assert tensors["model.embed_tokens.weight"].shape == (VOCAB, EMBED)


def test_query_bias_is_put_in_order_too(tmp_path: Path) -> None:
    bias = QUERY[:, 0].copy()
    tensors = opened(tmp_path, lambda w: w.add_tensor("blk.0.attn_q.bias", permute(bias, HEADS))).tensors
    np.testing.assert_array_equal(tensors["model.layers.0.self_attn.q_proj.bias"].read(), bias)


def test_untied_head_and_llama3_rope(tmp_path: Path) -> None:
    # Llama 3.1's rule: https://github.com/meta-llama/llama-models/blob/main/models/llama3/model.py (apply_scaling)
    frequencies = 1 / 50000.0 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    divisors = []
    for frequency in frequencies:
        wavelength = 2 * np.pi / frequency
        smooth = (8192 / wavelength - 1) / 3
        divisors.append(1 if wavelength < 2048 else 8 if wavelength > 8192 else 1 / ((1 - smooth) / 8 + smooth))

    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.array(divisors, np.float32))
        writer.add_tensor("output.weight", np.ones((VOCAB, EMBED), np.float32))

    assert max(divisors) == 8 and min(divisors) == 1
    checkpoint = opened(tmp_path, change)
    assert checkpoint.config["rope_scaling"]["rope_type"] == "llama3"
    assert checkpoint.config["rope_scaling"]["factor"] == 8
    assert checkpoint.config["tie_word_embeddings"] is False
    assert "lm_head.weight" in checkpoint.tensors and "rope_freqs.weight" not in checkpoint.tensors


def test_other_rope_divisors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensor rope_freqs.weight: not the frequency scaling"):
        opened(tmp_path, lambda w: w.add_tensor("rope_freqs.weight", np.array([1, 2, 3, 4], np.float32)))


def test_unknown_tensor_keeps_its_name(tmp_path: Path) -> None:
    assert "blk.0.odd.weight" in opened(tmp_path, lambda w: w.add_tensor("blk.0.odd.weight", np.ones(4, "f4"))).tensors


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K"])
def test_every_type_is_decoded_and_cast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Blocks of any bits, some rows at a time, against the gguf package's decoding of the whole."""
    kind = gguf.GGMLQuantizationType[name]
    size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    shape = (7, 512)
    raw = np.random.default_rng(1).integers(0, 256, (7, 512 // size * num_bytes), np.uint8)
    info = opened(tmp_path, lambda w: w.add_tensor("x", raw, raw_dtype=kind)).tensors["x"]
    assert (info.dtype, info.shape) == (name, shape)
    monkeypatch.setattr(gguf_io, "_VALUES_AT_ONCE", 3 * 512)
    with np.errstate(all="ignore"):
        want = gguf.quants.dequantize(raw, kind)
        np.testing.assert_array_equal(info.read(), want)
        for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
            got = info.read(dtype)
            assert got.dtype == dtype
            np.testing.assert_array_equal(got.astype("f4"), want.astype(dtype).astype("f4"))


def test_decoding_a_large_tensor_takes_little_beside_the_result(tmp_path: Path) -> None:
    raw = np.zeros((4096, 4096 // 32 * 18), np.uint8)
    kind = gguf.GGMLQuantizationType.Q4_0
    info = opened(tmp_path, lambda w: w.add_tensor("x", raw, raw_dtype=kind)).tensors["x"]
    tracemalloc.start()
    result = info.read(np.float16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.nbytes == 32 << 20 and peak < 1.2 * result.nbytes + (30 << 20), peak


def test_unsupported_architecture_names_the_supported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'bloom' is not supported in GGUF; supported: llama, qwen2, qwen3"):
        opened(tmp_path, arch="bloom")


def test_all_bad_keys_at_once(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_embedding_length(32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(tmp_path / "x.gguf"))
    for name in ("block_count", "attention.head_count", "feed_forward_length", "context_length", "token_embd.weight"):
        assert any(name in problem for problem in caught.value.problems), name


def metadata(tmp_path: Path) -> dict[str, Any]:
    return gguf_io.read_header(write(tmp_path / "model.gguf")).metadata


def test_tokenizer_merges_and_control_tokens(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path)
    tokenizer = checkpoint.load_tokenizer()
    assert tokenizer is not None
    assert tokenizer.encode("ab a<s>").ids == [6, 7, 4, 1]
    assert tokenizer.decode([6, 1, 4]) == "aba" and tokenizer.decode([6, 1], skip_special_tokens=False) == "ab<s>"
    assert checkpoint.eos_token_ids == (2, 3)


def test_bos_goes_before_a_text_where_the_file_says_so(tmp_path: Path) -> None:
    data = metadata(tmp_path)
    for extra, expected in [
        ({}, [4]),
        ({"tokenizer.ggml.add_bos_token": True}, [1, 4]),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}, [1, 4, 2]),
        ({"tokenizer.ggml.pre": "llama-bpe"}, [1, 4]),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, [4]),
    ]:
        tokenizer = gguf_tokenizer.build(data | extra, tmp_path)
        assert tokenizer is not None and tokenizer.encode("a").ids == expected, extra
        assert tokenizer.encode("a", add_special_tokens=False).ids == [4]


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt2", "ab 123's", ["ab", "Ġ123", "'s"]),
        ("smollm", "ab 123's", ["ab", "Ġ", "1", "2", "3", "'s"]),
        ("llama-bpe", "ab 1234'S", ["ab", "Ġ", "123", "4", "'S"]),
        ("qwen2", "ab 1234'S", ["ab", "Ġ", "1", "2", "3", "4", "'S"]),
    ],
)
def test_splitting(tmp_path: Path, pre: str, text: str, pieces: list[str]) -> None:
    tokenizer = gguf_tokenizer.build(metadata(tmp_path) | {"tokenizer.ggml.pre": pre}, tmp_path)
    assert tokenizer is not None and tokenizer.pre_tokenizer is not None
    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == pieces


@pytest.mark.parametrize(
    "extra",
    [
        {"tokenizer.ggml.model": "llama"},
        {"tokenizer.ggml.pre": "unheard-of"},
        {"tokenizer.ggml.token_type": [1]},
        {"tokenizer.ggml.tokens": ["a"] * 10},
        {"tokenizer.ggml.merges": ["a"]},
        {"tokenizer.ggml.merges": ["a zzz"]},
        {"tokenizer.ggml.merges": [3]},
    ],
)
def test_tokenizers_of_no_use_are_refused(tmp_path: Path, extra: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path}: {next(iter(extra)).rsplit('.', 1)[0]}"):
        gguf_tokenizer.build(metadata(tmp_path) | extra, tmp_path)


def header(num_tensors: int = 0, num_keys: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_keys) + rest


def string(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"GG", "2 are left"),
        (b"ABCD" + bytes(40), "not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 0x03000000) + bytes(16), "version must be one of"),
        (header(2**63, 0), "do not fit"),
        (header(0, 2**63), "do not fit"),
        (header(0, 1, string(b"k", 2**62) + bytes(20)), "a metadata key takes"),
        (header(0, 1, string(b"k") + struct.pack("<IIQ", 9, 4, 2**61) + bytes(20)), "metadata 'k' takes"),
        (header(0, 1, string(b"k") + struct.pack("<IIQ", 9, 8, 2**61) + bytes(20)), "metadata 'k' claims"),
        (header(0, 1, string(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(20)), "array of type 9"),
        (header(0, 1, string(b"k") + struct.pack("<I", 99) + bytes(20)), "unknown type 99"),
        (header(0, 1, string(b"\xff\xff") + bytes(20)), "not UTF-8"),
        (header(1, 0, string(b"t") + struct.pack("<I", 2**31) + bytes(40)), "tensor t: 2147483648 dimensions"),
        (header(1, 0, string(b"t") + struct.pack("<IQIQ", 1, 2**62, 0, 0)), "tensor t: F32 of shape"),
        (header(1, 0, string(b"t") + struct.pack("<IQIQ", 1, 4, 77, 0)), "tensor t: its type, number 77"),
        (header(1, 0, string(b"t") + struct.pack("<IQIQ", 1, 5, 3, 0)), "tensor t: rows of 5 values"),
        (header(1, 0, string(b"t") + struct.pack("<IQIQ", 1, 4, 0, 2**63)), "tensor t: F32 of shape"),
        (header(1, 0, string(b"t") + struct.pack("<IQIQ", 1, 0, 0, 1)), "cut or damaged|alignment"),
    ],
)
def test_lying_headers_take_no_memory(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(str(path))
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    assert str(path) in str(caught.value)


def test_all_cut_tensors_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf")
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(CheckpointError) as caught:
        gguf_io.read_header(path)
    assert len(caught.value.problems) == 3
    assert all(": tensor blk.0." in problem and "cut or damaged" in problem for problem in caught.value.problems)


@functools.cache
def sample() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return write(Path(folder) / "x.gguf").read_bytes()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_is_an_error_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    damaged = bytearray(sample())
    for _ in range(data.draw(st.integers(0, 4))):
        damaged[data.draw(st.integers(0, 1500))] = data.draw(st.integers(0, 255))
    path = tmp_path / "y.gguf"
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))])
    try:
        checkpoint = open_checkpoint(str(path))
        for info in checkpoint.tensors.values():
            assert info.read().shape == info.shape
        checkpoint.load_tokenizer()
        _ = (checkpoint.eos_token_ids, checkpoint.bos_token_id, checkpoint.chat_template)
    except CheckpointError:
        return
