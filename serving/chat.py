"""Chat: a checked chat request, ready for the engine: its prompt, its sampling settings, the form of its answer.

Called by the routes of all chat protocols, which differ in what they read and write, not in what they run.
"""

import json
from dataclasses import dataclass
from typing import Any

from jax_engine import SamplingParams, StructuredOutputsParams
from serving.chat_output import ChatOutput
from serving.chat_schema import ChatRequest, NamedTool
from serving.errors import bad_request
from serving.generation import Job, Prompt, off_loop
from serving.state import ServerState
from serving.tools import formats


@dataclass(frozen=True)
class Chat:
    """One conversation to be continued. `prompt_text`: as the template made it."""

    body: ChatRequest
    prompt_text: str
    job: Job

    @property
    def prompt(self) -> Prompt:
        """The conversation as the model reads it."""
        return self.job.prompts[0]

    @property
    def forced(self) -> bool:
        """Whether the client has named the tool to be called."""
        return isinstance(self.body.tool_choice, NamedTool)

    def new_output(self) -> ChatOutput:
        """For one choice."""
        body = self.body
        last = body.messages[-1].content
        return ChatOutput(
            self.job.state.output_format.parser(with_tools=bool(body.offered_tools()), prompt=self.prompt_text),
            prefix=last if body.echo and isinstance(last, str) else "",
            several_calls=body.parallel_tool_calls is not False,
            reasoning=body.include_reasoning is not False,
        )


async def prepare(state: ServerState, body: ChatRequest, request_id: str, num_bytes: int) -> Chat:
    """Renders and checks; `num_bytes` is the size of the HTTP request.

    Raises:
        ApiError: 400, the model cannot chat or call tools.
        InvalidRequest: the chat template refuses the conversation, or a setting is out of range.
    """
    output_format = state.output_format
    if body.offered_tools() and output_format.tools is None:
        raise bad_request(
            "This model's chat template has no format of tool calls that the server knows; the operator may name one "
            "with --tool_call_parser.",
            "tools",
        )
    prompt = await _render(state, body, num_bytes)
    params = await off_loop(lambda: _sampling_params(state, body, prompt), num_bytes)
    return Chat(body, prompt.text or "", Job(state, request_id, [prompt], params, **body.scheduling()))


async def _render(state: ServerState, body: ChatRequest, num_bytes: int) -> Prompt:
    tokenizer = state.engine.tokenizer
    if tokenizer is None:
        raise bad_request(
            "This model has no tokenizer, so it cannot chat: use /v1/completions with token ids.", "model"
        )
    messages = await off_loop(lambda: [message.to_template() for message in body.messages], num_bytes)
    options = body.template_options()
    rendered = await off_loop(lambda: tokenizer.chat_prompt(messages, **options), num_bytes)
    return Prompt(rendered.token_ids, rendered.text)


def _sampling_params(state: ServerState, body: ChatRequest, prompt: Prompt) -> SamplingParams:
    overrides: dict[str, Any] = {}
    if state.output_format.reads_special_tokens(with_tools=bool(body.offered_tools())):
        overrides["skip_special_tokens"] = False
    grammar = _grammar(state, body, prompt)
    if grammar is not None:
        overrides["structured_outputs"] = StructuredOutputsParams(grammar=grammar)
    return body.to_sampling_params(detokenize=True, defaults=state.engine.sampling_defaults, **overrides)


def _grammar(state: ServerState, body: ChatRequest, prompt: Prompt) -> str | None:
    """The grammar of answers with tool calls, or with reasoning before JSON; None where neither is constrained."""
    output_format, tools = state.output_format, body.offered_tools()
    thinks = bool(output_format.reasoning) and (prompt.text or "").rstrip().endswith(
        formats.REASONING_MARKS[output_format.reasoning or "think"][0]
    )
    form = body.output_form()
    schema = None if form is None or form.json is None else json.loads(str(form.json))
    if form is not None and form.json_object:
        schema = {"type": "object"}
    required = body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool)
    if not tools or (form is not None and schema is None):
        return None if schema is None else formats.json_grammar(output_format, schema, _special(state), thinks=thinks)
    if isinstance(body.tool_choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == body.tool_choice.function.name]
    if not required and schema is None and not any(tool.function.strict for tool in tools):
        return None
    return formats.answer_grammar(
        output_format,
        [{"name": tool.function.name, "parameters": tool.function.parameters} for tool in tools],
        _special(state),
        required=required,
        several=body.parallel_tool_calls is not False,
        schema=schema,
        thinks=thinks,
    )


def _special(state: ServerState) -> formats.SpecialToken:
    tokenizer: Any = state.engine.tokenizer

    def token_of(text: str) -> int | None:
        ids = tokenizer.encode(text, add_special_tokens=False)
        return ids[0] if len(ids) == 1 and ids[0] in tokenizer.special_token_ids else None

    return token_of
