"""Text to tokens and back: the Tokenizer protocol, its implementation over the tokenizers library, and the streams.

The engine encodes prompts with it and feeds each sampled token to a TextStream. Nothing here touches a device.
"""

import codecs
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import tokenizers
from tokenizers import decoders

from jax_engine.chat_template import ChatTemplate, ChatTemplateError, Rendered
from jax_engine.errors import InvalidRequest

if TYPE_CHECKING:
    from checkpoints.formats import Checkpoint

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
#: How far back in the prompt a token is sought that an output's first word is decoded after.
_MAX_CONTEXT_TOKENS = 8


@dataclass(frozen=True)
class ChatPrompt:
    """A chat as the model reads it."""

    text: str
    token_ids: list[int]


class TextStream(Protocol):
    """Turns one sequence's tokens into text as they come."""

    def push(self, token_id: int) -> str:
        """The text this token makes final; never half a character."""
        ...

    def flush(self) -> str:
        """The rest, at the end: bytes that make no whole character become U+FFFD, as in decode."""
        ...


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer. Safe to call from several threads; a TextStream belongs to one."""

    @property
    def vocab_size(self) -> int:
        """One more than the greatest token id."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an output."""
        ...

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text."""
        ...

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Tokens that control the model and are no text."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The source of the model's chat template."""
        ...

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            add_special_tokens: put BOS or EOS around it, where the model wants that.
            parse_special: make a special token of its text; False reads such text as any other.

        Raises:
            InvalidRequest: the text is not valid Unicode.
        """
        ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text; bytes that make no character become U+FFFD, ids that are no token become nothing."""
        ...

    def token_text(self, token_id: int) -> str:
        """One token's text, special or not, as log-probabilities show it."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """One token's UTF-8 bytes, which may be part of a character only."""
        ...

    def stream(self, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = ()) -> TextStream:
        """A new stream. With the prompt's tokens it goes on from them, which decides about a first space."""
        ...

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> ChatPrompt:
        """Messages as the model was trained to read them. Special tokens come from the template alone.

        Args:
            messages: role and content each; content a string, or text parts.
            add_generation_prompt: end with the beginning of the assistant's turn.
            continue_final_message: leave the last message open, to be continued.
            tools: function descriptions, as in the OpenAI API.
            template_kwargs: further names for the template.

        Raises:
            ChatTemplateError: there is no template, or it cannot be applied.
        """
        ...


def load_tokenizer(checkpoint: "Checkpoint") -> "TextTokenizer | None":
    """The tokenizer of an opened checkpoint; None where it has none.

    Raises:
        CheckpointError: there is one that cannot be loaded.
    """
    tokenizer = checkpoint.load_tokenizer()
    if tokenizer is None:
        return None
    return TextTokenizer(
        tokenizer,
        eos_token_ids=checkpoint.eos_token_ids,
        bos_token_id=checkpoint.bos_token_id,
        chat_template=checkpoint.chat_template,
        special_tokens=checkpoint.special_tokens,
    )


@dataclass(frozen=True)
class PackedTokenizer:
    """A TextTokenizer as plain values, to be sent to another process; the fields are its arguments."""

    json: str
    eos_token_ids: list[int]
    bos_token_id: int | None
    chat_template: str | None
    special_tokens: dict[str, str]

    def unpack(self) -> "TextTokenizer":
        """The tokenizer."""
        return TextTokenizer(
            tokenizers.Tokenizer.from_str(self.json),
            eos_token_ids=self.eos_token_ids,
            bos_token_id=self.bos_token_id,
            chat_template=self.chat_template,
            special_tokens=self.special_tokens,
        )


class TextTokenizer:
    """The Tokenizer of a real model.

    Args:
        tokenizer: not to be changed by anyone from here on.
        chat_template: jinja source, or None. special_tokens: names for it, bos_token and the like.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        eos_token_ids: Sequence[int] = (),
        bos_token_id: int | None = None,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ):
        self._tokenizer = tokenizer
        self._eos_token_ids = tuple(eos_token_ids)
        self._bos_token_id = bos_token_id
        self._chat_source = chat_template
        self._special_tokens = dict(special_tokens or {})
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._control_texts = tuple(added[token_id].content for token_id in self._special_ids)
        self._byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._bytes: dict[int, bytes] = {}
        self._vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1

    @property
    def vocab_size(self) -> int:
        """One more than the greatest token id."""
        return self._vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an output."""
        return self._eos_token_ids

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text."""
        return self._bos_token_id

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Tokens that control the model and are no text."""
        return self._special_ids

    @property
    def chat_template(self) -> str | None:
        """The source of the model's chat template."""
        return self._chat_source

    def packed(self) -> PackedTokenizer:
        """All of it, for another process."""
        eos, special = list(self._eos_token_ids), self._special_tokens
        return PackedTokenizer(self._tokenizer.to_str(), eos, self._bos_token_id, self._chat_source, special)

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """A second tokenizer: whether special tokens are parsed is a state of the library's, not an argument."""
        plain = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        plain.encode_special_tokens = True
        return plain

    @functools.cached_property
    def _chat(self) -> ChatTemplate:
        if self._chat_source is None:
            raise ChatTemplateError("the model has no chat template; send a plain prompt instead of messages")
        return ChatTemplate(self._chat_source, self._special_tokens, self._control_texts)

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """See Tokenizer.encode."""
        tokenizer = self._tokenizer if parse_special else self._plain
        return _encode(tokenizer, text, add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """See Tokenizer.decode."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """See Tokenizer.token_text."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """See Tokenizer.token_bytes."""
        found = self._bytes.get(token_id)
        if found is None:
            token = self._tokenizer.id_to_token(token_id)
            found = b"" if token is None else _byte_level(token) if self._byte_level else _pieces(token)
            self._bytes[token_id] = found
        return found

    def stream(self, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = ()) -> TextStream:
        """See Tokenizer.stream. In byte-level vocabularies no token's text depends on the one before it."""
        skipped = self._special_ids if skip_special_tokens else frozenset()
        if self._byte_level:
            return ByteStream(self.token_bytes, skipped)
        recent = (i for i in reversed(prompt_token_ids[-_MAX_CONTEXT_TOKENS:]) if i not in skipped)
        context = next((i for i in recent if not _is_byte(self._tokenizer.id_to_token(i))), None)
        return _WindowStream(self._tokenizer, skipped, [] if context is None else [context])

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> ChatPrompt:
        """See Tokenizer.chat_prompt."""
        rendered = self._chat.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            template_kwargs=template_kwargs,
        )
        return ChatPrompt(rendered.restore(rendered.text), self._encode_rendered(rendered))

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        **template_kwargs: Any,
    ) -> list[int] | str:
        """`chat_prompt` with the name and the defaults that it has in transformers.

        Args:
            tokenize: return token ids; else the text, in which nobody can tell any more whether a special token was
                the template's or a user's.
        """
        chat = self.chat_prompt(
            conversation,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            **template_kwargs,
        )
        return chat.token_ids if tokenize else chat.text

    def _encode_rendered(self, rendered: Rendered) -> list[int]:
        """The template's special tokens as such; between them, with what callers wrote put back, plain text."""
        encoding = _encode(self._tokenizer, rendered.text, add_special_tokens=False)
        if not any(character in rendered.text for character in rendered.placeholders):
            return encoding.ids
        token_ids: list[int] = []
        reached = 0
        for token_id, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id in self._special_ids:
                token_ids += self._encode_plain(rendered, reached, begin)
                token_ids.append(token_id)
                reached = end
        return token_ids + self._encode_plain(rendered, reached, len(rendered.text))

    def _encode_plain(self, rendered: Rendered, begin: int, end: int) -> list[int]:
        text = rendered.restore(rendered.text[begin:end])
        return self.encode(text, add_special_tokens=False, parse_special=False) if text else []


def _encode(tokenizer: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
    try:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    except (UnicodeEncodeError, TypeError) as error:  # the library says TypeError of a lone surrogate
        raise InvalidRequest(f"the text cannot be encoded: {error}", "prompt") from error


def _byte_characters() -> dict[str, int]:
    """The characters byte-level vocabularies write bytes as (GPT-2's bytes_to_unicode) -> the byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


BYTE_OF_CHARACTER = _byte_characters()


def _byte_level(token: str) -> bytes:
    """As the library's decoder has it: a token with any other character in it stands for itself."""
    try:
        return bytes([BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode()


def _is_byte(token: str | None) -> bool:
    return token is None or _BYTE_TOKEN.fullmatch(token) is not None


def _pieces(token: str) -> bytes:
    """Of a vocabulary of pieces, where U+2581 is a space and <0x0A> a byte."""
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()


class ByteStream:
    """The TextStream of vocabularies whose tokens are bytes: at most three bytes wait for the rest of a character.

    The library's DecodeStream would decode its window anew for every token, and hold text back for as long as it ends
    with U+FFFD.

    Args:
        token_bytes: token id -> bytes. skipped: ids that have no text.
    """

    def __init__(self, token_bytes: Any, skipped: frozenset[int]):
        self._token_bytes = token_bytes
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """See TextStream.push."""
        return "" if token_id in self._skipped else self._decoder.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        """See TextStream.flush."""
        return self._decoder.decode(b"", final=True)


class _WindowStream:
    """The TextStream of all other vocabularies: what a token adds to the decoded text of a few tokens before it.

    A run of byte tokens is held back until it ends, for the whole run decides whether any of it is text.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, skipped: frozenset[int], context: list[int]):
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._window = context
        self._done = self._decode(context)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def push(self, token_id: int) -> str:
        """See TextStream.push."""
        token = self._tokenizer.id_to_token(token_id)
        if token_id in self._skipped or token is None:
            return ""
        self._window.append(token_id)
        return "" if _is_byte(token) else self._advance()

    def flush(self) -> str:
        """See TextStream.flush."""
        return self._advance()

    def _advance(self) -> str:
        text = self._decode(self._window)
        new = text[len(self._done) :]
        # One token is context enough: decoders treat a first token in a way of their own, but look no further back.
        self._window = self._window[-1:]
        self._done = self._decode(self._window)
        return new
