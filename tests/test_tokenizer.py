"""The tokenizer against reference answers, and streams against decoding everything at once."""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer as LibraryTokenizer, decoders, models, normalizers

from checkpoints.formats import open_checkpoint
from jax_engine.errors import InvalidRequest
from jax_engine.testing.byte_tokenizer import ByteTokenizer
from jax_engine.tokenizer import TextTokenizer, Tokenizer, load_tokenizer

CASES = json.loads((Path(__file__).parent / "golden" / "smollm2.json").read_text())["cases"]
TINY = Path(__file__).parent / "golden" / "tiny" / "llama"


@functools.cache
def smollm2() -> TextTokenizer:
    """The default model's; fetched at first use."""
    tokenizer = load_tokenizer(open_checkpoint("smollm2-135m-instruct"))
    assert tokenizer is not None
    return tokenizer


@functools.cache
def pieces() -> TextTokenizer:
    """A vocabulary of the Llama 2 kind: pieces with U+2581 for a space, and byte tokens."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["\u2581", "\u2581\u2581", "a", "b", "\u2581a", "\u2581ab", "é", "\ufffd", "\u2581\ufffd", "."]
    library = LibraryTokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return TextTokenizer(library, eos_token_ids=(2,), bos_token_id=1)


def streamed(tokenizer: Tokenizer, token_ids: list[int], *args: Any) -> str:
    stream = tokenizer.stream(*args)
    return "".join([*map(stream.push, token_ids), stream.flush()])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["prompt"][:20])
def test_reference_answers(case: dict[str, Any]) -> None:
    tokenizer = smollm2()
    if case["kind"] == "chat":
        chat = tokenizer.chat_prompt([{"role": "user", "content": case["prompt"]}])
        assert chat.token_ids == case["prompt_ids"]
        assert tokenizer.decode(chat.token_ids, skip_special_tokens=False) == chat.text
    else:
        assert tokenizer.encode(case["prompt"]) == case["prompt_ids"]
    assert tokenizer.decode(case["output_ids"]) == case["text"]
    assert streamed(tokenizer, case["output_ids"]) == case["text"]


def test_facts_of_the_default_model() -> None:
    tokenizer = smollm2()
    assert (tokenizer.vocab_size, tokenizer.eos_token_ids, tokenizer.bos_token_id) == (49152, (2,), 1)


def test_a_checkpoint_without_a_tokenizer_gives_none() -> None:
    assert load_tokenizer(open_checkpoint(str(TINY))) is None


def test_special_texts_can_be_read_as_plain() -> None:
    tokenizer = smollm2()
    assert tokenizer.encode("a<|im_end|>")[-1] == 2
    plain = tokenizer.encode("a<|im_end|>", parse_special=False)
    assert 2 not in plain and tokenizer.decode(plain) == "a<|im_end|>"
    assert tokenizer.encode("a b", parse_special=False) == tokenizer.encode("a b")
    assert tokenizer.encode("<|im_end|>") == [2]


def test_text_that_is_not_unicode_is_refused() -> None:
    for parse_special in (True, False):
        with pytest.raises(InvalidRequest, match="cannot be encoded"):
            smollm2().encode("\ud800", parse_special=parse_special)


def test_skipping_special_tokens() -> None:
    tokenizer = smollm2()
    token_ids = [1, *tokenizer.encode("hi"), 2]
    assert tokenizer.decode(token_ids) == streamed(tokenizer, token_ids) == "hi"
    kept = tokenizer.decode(token_ids, skip_special_tokens=False)
    assert kept == streamed(tokenizer, token_ids, False) == "<|im_start|>hi<|im_end|>"


def test_a_character_never_comes_in_halves() -> None:
    tokenizer = smollm2()
    token_ids = tokenizer.encode("🙂é")
    stream = tokenizer.stream()
    shown = [stream.push(token_id) for token_id in token_ids]
    assert len(token_ids) > 2 and "".join(shown) == "🙂é" and stream.flush() == ""
    assert not any("\ufffd" in text for text in shown) and "" in shown
    stream = tokenizer.stream()
    assert [stream.push(token_ids[0]), stream.flush()] == ["", "\ufffd"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 49151) | st.integers(0, 400) | st.just(50_000), max_size=40), st.booleans())
def test_stream_equals_decode_byte_level(token_ids: list[int], skip: bool) -> None:
    # Ids below 400 are mostly single bytes, so that broken characters of every kind occur.
    assert streamed(smollm2(), token_ids, skip) == smollm2().decode(token_ids, skip)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cc", "Cs"], max_codepoint=0x3FFFF), max_size=30))
def test_text_survives_byte_level(text: str) -> None:
    # The rest needs bytes that this vocabulary has no token for.
    token_ids = smollm2().encode(text, parse_special=False)
    assert smollm2().decode(token_ids) == streamed(smollm2(), token_ids) == text


PIECE_IDS = st.integers(0, 2) | st.integers(0xC0, 0xFF) | st.integers(3, 258) | st.integers(259, 268) | st.just(999)


@settings(max_examples=400, deadline=None)
@given(st.lists(PIECE_IDS, max_size=20), st.booleans())
def test_stream_equals_decode_of_pieces(token_ids: list[int], skip: bool) -> None:
    assert streamed(pieces(), token_ids, skip) == pieces().decode(token_ids, skip)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(259, 268), max_size=9), st.lists(PIECE_IDS, max_size=20))
def test_stream_goes_on_from_the_prompt(prompt: list[int], token_ids: list[int]) -> None:
    prompt = [*prompt, 261]
    whole = pieces().decode(prompt + token_ids)
    assert whole == pieces().decode(prompt) + streamed(pieces(), token_ids, True, prompt)


def test_text_of_single_tokens() -> None:
    tokenizer = smollm2()
    text = "Hello wörld\n"
    assert "".join(map(tokenizer.token_text, tokenizer.encode("Hello world\n"))) == "Hello world\n"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()
    assert set(tokenizer.token_text(tokenizer.encode("🙂")[-1])) == {"\ufffd"}
    assert (tokenizer.token_text(2), tokenizer.token_text(49_152), tokenizer.token_bytes(10**6)) == (
        "<|im_end|>",
        "",
        b"",
    )
    assert [pieces().token_text(i) for i in (263, 3 + 0x41, 1)] == [" a", "A", "<s>"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 257), max_size=20), st.booleans())
def test_byte_tokenizer_stream(token_ids: list[int], skip: bool) -> None:
    assert streamed(ByteTokenizer(), token_ids, skip) == ByteTokenizer().decode(token_ids, skip)


def test_byte_tokenizer() -> None:
    tokenizer: Tokenizer = ByteTokenizer()
    assert tokenizer.encode("é") == [256, 0xC3, 0xA9] and tokenizer.decode([256, 0xC3, 0xA9, 257]) == "é"
    assert tokenizer.encode("é", add_special_tokens=False) == [0xC3, 0xA9]
    chat = tokenizer.chat_prompt([{"role": "user", "content": "hi"}])
    assert chat.text == "user: hi\nassistant: " and chat.token_ids == tokenizer.encode(chat.text)
    open_ended = tokenizer.chat_prompt(
        [{"role": "user", "content": "hi"}], add_generation_prompt=False, continue_final_message=True
    )
    assert open_ended.text == "user: hi"


def test_tokenizers_need_no_jax() -> None:
    code = "import sys, jax_engine.tokenizer as t, jax_engine.testing.byte_tokenizer; sys.exit('jax' in sys.modules)"
    # The package's own __init__ offers the engine, which does need it; so it is left out here.
    root = Path(__file__).parent.parent
    stub = f"import sys, types; p = types.ModuleType('jax_engine'); p.__path__ = [r'{root / 'jax_engine'}']; "
    stub += "sys.modules['jax_engine'] = p; " + code
    subprocess.run([sys.executable, "-c", stub], check=True, cwd=root, timeout=60)
