"""Other real clients against a server process: Anthropic's, litellm, langchain, instructor; schemathesis over the
document of the interface. Long: they bring many packages with them (extra `clients`, `make test-clients`)."""

import json
import subprocess
import sys
import urllib.request

import pytest

pytestmark = pytest.mark.long

SERVER = """
import asyncio, socket
from aiohttp import web
from serving.app import AppSettings, create_app
from tests.chatting import CALL, says

async def main():
    app = create_app(says({text!r}), AppSettings(served_model_names=["fake-model"]))
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    listener = socket.create_server(("127.0.0.1", 0))
    await web.SockSite(runner, listener).start()
    print(listener.getsockname()[1], flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
def serve():
    """Starts a server whose model always says one text; gives its address."""
    processes = []

    def start(text: str) -> str:
        process = subprocess.Popen([sys.executable, "-c", SERVER.format(text=text)], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        return f"http://127.0.0.1:{int(process.stdout.readline())}"

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_anthropic(serve):
    anthropic = pytest.importorskip("anthropic")
    client = anthropic.Anthropic(base_url=serve(f"<think>Hm.</think>Look.\n{CALL}"), api_key="any", max_retries=0)
    tools = [{"name": "weather", "input_schema": SCHEMA}]
    request = {"model": "fake-model", "max_tokens": 300, "messages": MESSAGES, "tools": tools}
    whole = client.messages.create(**request)
    with client.messages.stream(**request) as stream:
        text = "".join(stream.text_stream)
        streamed = stream.get_final_message()
    assert text == "Look."
    for message in (whole, streamed):
        assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
        assert message.content[2].input == {"city": "Köln"} and message.stop_reason == "tool_use"
        assert message.usage.output_tokens > 10
    assert client.messages.count_tokens(model="fake-model", messages=MESSAGES).input_tokens > 5
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(model="fake-model", max_tokens=0, messages=MESSAGES)
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="other", max_tokens=3, messages=MESSAGES)


def test_litellm(serve):
    litellm = pytest.importorskip("litellm")
    base = {"model": "openai/fake-model", "api_base": serve(f"Look.\n{CALL}") + "/v1", "api_key": "any"}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
    answer = litellm.completion(**base, messages=MESSAGES, tools=tools)
    assert json.loads(answer.choices[0].message.tool_calls[0].function.arguments) == {"city": "Köln"}
    chunks = list(litellm.completion(**base, messages=MESSAGES, tools=tools, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Look."


def test_langchain(serve):
    langchain = pytest.importorskip("langchain_openai")
    base = {"model": "fake-model", "api_key": "any", "max_retries": 0}
    model = langchain.ChatOpenAI(base_url=serve("Hello there.") + "/v1", **base)
    assert model.invoke("hello").content == "Hello there."
    assert "".join(chunk.content for chunk in model.stream("hello")) == "Hello there."
    caller = langchain.ChatOpenAI(base_url=serve(CALL) + "/v1", **base)
    tool = {"type": "function", "function": {"name": "weather", "description": "x", "parameters": SCHEMA}}
    (call,) = caller.bind_tools([tool]).invoke("hello").tool_calls
    assert call["name"] == "weather" and call["args"] == {"city": "Köln"}


def test_instructor(serve):
    instructor = pytest.importorskip("instructor")
    import openai
    import pydantic

    class Place(pydantic.BaseModel):
        city: str

    client = openai.OpenAI(base_url=serve('{"city": "Köln"}') + "/v1", api_key="any", max_retries=0)
    for mode in (instructor.Mode.JSON, instructor.Mode.JSON_SCHEMA):
        patched = instructor.from_openai(client, mode=mode)
        place = patched.chat.completions.create(model="fake-model", response_model=Place, messages=MESSAGES)
        assert place.city == "Köln"


def test_schemathesis(serve):
    """Bounded: a few examples per address. No answer is a 5xx, and every error has the body it is said to have."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings

    url = serve("Hello.")
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    seen = set()
    for operation in schema.get_all_operations():
        case_strategy = operation.ok().as_strategy()

        @settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=case_strategy)
        def check(case):
            response = case.call(base_url=url, timeout=20)
            seen.add(response.status_code)
            assert response.status_code < 500, (case.body, response.text)
            if response.status_code >= 400:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}

        check()
    assert {200, 400} <= seen
    with urllib.request.urlopen(f"{url}/health") as answer:
        assert answer.status == 200
