"""An engine that says a given text, for tests of chats: its template is of the Hermes kind, with reasoning."""

from jax_engine.testing.byte_tokenizer import EOS, ByteTokenizer
from jax_engine.testing.fake_engine import FakeAsyncEngine

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


class TemplateTokenizer(ByteTokenizer):
    """Bytes, with a chat template of the Hermes kind as far as the server can tell."""

    chat_template = "<tool_call> <think></think>"

    def chat_prompt(self, messages, **options):
        self.options = options
        options = {key: options[key] for key in ("add_generation_prompt", "continue_final_message")}
        return super().chat_prompt(messages, **options)


def says(text: str) -> FakeAsyncEngine:
    data = text.encode()
    return FakeAsyncEngine(
        tokenizer=TemplateTokenizer(),
        next_token=lambda prompt, index, position: data[position] if position < len(data) else EOS,
        max_model_len=2000,
    )
