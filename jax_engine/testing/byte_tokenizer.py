"""Tokenizers for tests, whose tokens are the 256 bytes, BOS and EOS: one without any library, and a real one."""

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from jax_engine.chat_template import ChatTemplateError, normalize_messages
from jax_engine.tokenizer import BYTE_OF_CHARACTER, ByteStream, ChatPrompt, TextStream, TextTokenizer

BOS, EOS = 256, 257
_SPECIAL = {BOS: "<bos>", EOS: "<eos>"}


class ByteTokenizer:
    """Token b is the byte b; 256 is BOS, 257 EOS. Every text is its UTF-8 bytes. Special tokens have no text form."""

    vocab_size = 258
    eos_token_ids = (EOS,)
    bos_token_id = BOS
    special_token_ids = frozenset(_SPECIAL)
    chat_template = None

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """BOS, then the bytes; nothing in a text is ever parsed as special."""
        return ([BOS] if add_special_tokens else []) + list(text.encode())

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """See Tokenizer.decode."""
        kept = (i for i in token_ids if not (skip_special_tokens and i in _SPECIAL))
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        """See Tokenizer.token_text."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """See Tokenizer.token_bytes."""
        return bytes([token_id]) if 0 <= token_id < 256 else _SPECIAL.get(token_id, "").encode()

    def stream(self, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = ()) -> TextStream:
        """See Tokenizer.stream."""
        return ByteStream(self.token_bytes, frozenset(_SPECIAL) if skip_special_tokens else frozenset())

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> ChatPrompt:
        """BOS, then one line per message, `role: content`; tools are left out."""
        if continue_final_message and add_generation_prompt:
            raise ChatTemplateError("continue_final_message needs add_generation_prompt=False: no new turn begins")
        lines = [f"{message['role']}: {message['content']}" for message in normalize_messages(messages)]
        text = "\n".join(lines) + ("" if continue_final_message else "\n")
        text += "assistant: " if add_generation_prompt else ""
        return ChatPrompt(text, self.encode(text))


def byte_text_tokenizer() -> TextTokenizer:
    """The same tokens in the tokenizers library, so that it can be sent to another process. Has a chat template."""
    model = tokenizers.models.BPE(vocab=dict(BYTE_OF_CHARACTER), merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL.values()))
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "
    return TextTokenizer(tokenizer, eos_token_ids=[EOS], bos_token_id=BOS, chat_template=template)
