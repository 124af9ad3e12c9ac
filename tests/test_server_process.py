"""A real server process with the default model, driven by the real `openai` client."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

ROOT = Path(__file__).resolve().parent.parent
MODEL = "smollm2-135m-instruct"
CASES = json.loads((ROOT / "tests/golden/smollm2.json").read_text())["cases"]
#: Where the two likeliest tokens are closer than this, another order of summation may pick the other one.
NEAR_TIE = 0.004
SMALL = ["--max_model_len=512", "--max_num_seqs=8", "--token_buckets=64", "--decode_buckets=1,8"]


class Server:
    """`jax-engine serve` on a free port of the loopback."""

    def __init__(self, log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "serving.cli", "serve", f"--port={self.port}", *SMALL]
        self.log = log
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        with log.open("w") as output:
            self.process = subprocess.Popen(command, stderr=output, stdout=output, env=environment, cwd=ROOT)
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)
        deadline = time.monotonic() + 240
        while "serving " + MODEL not in log.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    started = Server(tmp_path_factory.mktemp("server") / "log")
    yield started
    started.process.kill()
    started.process.wait()


def ask(client: openai.OpenAI, case, stream: bool):
    """The answer's text and finish reason, whole or put together from a stream."""
    common = {"model": MODEL, "temperature": 0, "max_tokens": len(case["output_ids"]), "stream": stream}
    if case["kind"] == "chat":
        answer = client.chat.completions.create(messages=[{"role": "user", "content": case["prompt"]}], **common)
    else:
        answer = client.completions.create(prompt=case["prompt"], **common)
    if not stream:
        choice = answer.choices[0]
        return choice.message.content if case["kind"] == "chat" else choice.text, choice.finish_reason
    text, reason = "", None
    for chunk in answer:
        for choice in chunk.choices:
            text += (choice.delta.content or "") if case["kind"] == "chat" else choice.text
            reason = choice.finish_reason or reason
    return text, reason


@pytest.mark.parametrize("stream", [False, True])
def test_golden_answers(server, stream):
    sure = [case for case in CASES if case["min_gap"] >= NEAR_TIE]
    assert len(sure) == len(CASES)
    with ThreadPoolExecutor(8) as clients:
        answers = clients.map(lambda case: ask(server.client, case, stream), sure)
    assert list(answers) == [(case["text"], case["finish_reason"]) for case in sure]


def test_models(server):
    assert [model.id for model in server.client.models.list()] == [MODEL]
    assert server.client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("org/other")


def test_bad_input_is_refused(server):
    with pytest.raises(openai.BadRequestError) as refused:
        server.client.completions.create(model=MODEL, prompt="x", temperature=-1)
    assert refused.value.body["param"] == "temperature" and refused.value.body["type"] == "invalid_request_error"


def test_a_client_that_leaves_frees_its_place(server):
    # As many requests as there are slots, each left in mid-stream: if any stayed, the next would have to wait for it.
    for _ in range(8):
        stream = server.client.completions.create(
            model=MODEL, prompt="Once", max_tokens=500, stream=True, temperature=0
        )
        next(iter(stream))
        stream.close()
    started = time.monotonic()
    case = min(CASES, key=lambda case: len(case["output_ids"]))
    assert ask(server.client, case, False)[0] == case["text"]
    with pytest.raises(openai.APITimeoutError):
        server.client.with_options(timeout=0.5).completions.create(model=MODEL, prompt="Once", max_tokens=500)
    assert ask(server.client, case, True)[0] == case["text"]
    assert time.monotonic() - started < 60


def test_sigterm_lets_a_stream_finish(server):
    """Last, for it ends the server."""
    stream = server.client.completions.create(
        model=MODEL, prompt="Once upon a time", max_tokens=60, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    server.process.send_signal(signal.SIGTERM)
    chunks = [chunk for chunk in stream if chunk.choices]
    assert chunks[-1].choices[0].finish_reason == "length"
    assert server.process.wait(timeout=30) == 0
    log = server.log.read_text()
    assert "ready in" in log and "KV pool" in log and "--max_num_seqs=8" in log


def test_the_command_line_gives_a_golden_answer():
    case = next(case for case in CASES if case["kind"] == "text")
    command = [sys.executable, "-m", "serving.cli", "generate", f"--prompt={case['prompt']}", "--temperature=0"]
    command += [f"--max_tokens={len(case['output_ids'])}", *SMALL]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr
    assert case["text"].strip() in done.stdout
