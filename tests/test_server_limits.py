"""What one client may take: slow bodies, connections, requests at a time, unread streams; keys, origins, TLS."""

import asyncio
import hashlib
import json
import shutil
import ssl
import subprocess

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from jax_engine import ConfigError
from jax_engine.testing.fake_engine import FakeAsyncEngine
from serving.app import create_app
from serving.limits import Connections
from serving.loading import loading_app
from serving.options import ServerOptions, read_keys
from tests.test_server_errors import client_of, error_of
from tests.test_server_life import serving, until

COMPLETIONS = "/v1/completions"
BODY = {"prompt": "x", "max_tokens": 3}


async def test_a_slow_body_is_timed_out():
    async def slow():
        yield b'{"prompt": '
        await asyncio.sleep(30)

    async with client_of(FakeAsyncEngine(), body_timeout_s=0.1) as client:
        response = await client.post(COMPLETIONS, data=slow(), headers={"Content-Type": "application/json"})
        assert (await error_of(response, 408))["code"] == "request_timeout"
        assert (await client.post(COMPLETIONS, json=BODY)).status == 200


async def test_requests_per_client():
    engine = FakeAsyncEngine(stall=True)
    one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
    async with client_of(engine, api_keys=["one", "two"], max_requests_per_client=2) as client:
        running = [asyncio.create_task(client.post(COMPLETIONS, json=BODY, headers=one)) for _ in range(2)]
        await until(lambda: engine.num_requests == 2)
        response = await client.post(COMPLETIONS, json=BODY, headers=one)
        assert (await error_of(response, 429))["code"] == "too_many_requests" and response.headers["Retry-After"]
        other = asyncio.create_task(client.post(COMPLETIONS, json=BODY, headers=two))
        await until(lambda: engine.num_requests == 3)
        for task in (*running, other):
            task.cancel()
        await until(lambda: engine.num_requests == 0)
        engine.stall = False
        assert (await client.post(COMPLETIONS, json=BODY, headers=one)).status == 200


async def test_a_stream_that_is_not_read_is_dropped():
    engine = FakeAsyncEngine(max_model_len=10_000_000, tokenizer=None)
    body = {"prompt": [1], "stream": True, "max_tokens": 9_000_000, "logprobs": 20, "return_token_ids": True}
    async with serving(engine, write_timeout_s=0.3) as (session, _):
        response = await session.post(COMPLETIONS, json=body)
        await until(lambda: engine.num_requests == 0)
        with pytest.raises(aiohttp.ClientError):
            await response.read()
        async with session.get("/metrics") as metrics:
            assert "jax_engine_slow_readers_aborted_total 1.0" in await metrics.text()


async def test_connections_over_the_limit_are_told_so_and_closed():
    runner = web.AppRunner(create_app(FakeAsyncEngine()))
    await runner.setup()
    connections = Connections(3, runner.server)
    server = await asyncio.get_running_loop().create_server(connections, "127.0.0.1", 0)
    address = server.sockets[0].getsockname()
    try:
        held = [await asyncio.open_connection(*address) for _ in range(3)]
        await until(lambda: len(runner.server.connections) == 3)
        for _ in range(20):
            reader, writer = await asyncio.open_connection(*address)
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503 ") and b"Retry-After: " in head
            assert json.loads(body)["error"]["code"] == "too_many_connections"
            writer.close()
        held.pop()[1].close()
        await until(lambda: len(runner.server.connections) == 2)
        async with aiohttp.ClientSession("http://{}:{}".format(*address)) as session:
            assert (await session.get("/health")).status == 200
        for _, writer in held:
            writer.close()
    finally:
        server.close()
        await runner.cleanup()


async def test_hashed_keys_and_both_headers():
    keys = ["sha256:" + hashlib.sha256(b"one").hexdigest(), "two"]
    async with client_of(FakeAsyncEngine(), api_keys=keys) as client:
        for headers in ({"Authorization": "Bearer one"}, {"x-api-key": "two"}, {"authorization": "bearer two"}):
            assert (await client.get("/v1/models", headers=headers)).status == 200
        for headers in ({"x-api-key": keys[0]}, {"Authorization": f"Bearer {keys[0]}"}, {"x-api-key": ""}):
            await error_of(await client.get("/v1/models", headers=headers), 401)
        for path in ("/metrics", "/load"):
            await error_of(await client.get(path), 401)
        for path in ("/health", "/ready", "/version"):
            assert (await client.get(path)).status == 200


def test_a_half_written_hash_is_refused(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("sha256:abc\n")
    with pytest.raises(ConfigError, match="key 1 of api_key_file: after sha256: come 64 digits"):
        read_keys(str(keys), "api_key_file", "NO_SUCH_VARIABLE")


async def test_other_origins_are_let_in_by_name_only():
    preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    async with client_of(FakeAsyncEngine()) as client:
        response = await client.options(COMPLETIONS, headers=preflight)
        assert response.status == 405 and "Access-Control-Allow-Origin" not in response.headers
    async with client_of(FakeAsyncEngine(), cors_origins=["https://a.example"], api_keys=["k"]) as client:
        response = await client.options(COMPLETIONS, headers=preflight)
        assert response.status == 204 and response.headers["Access-Control-Allow-Origin"] == "https://a.example"
        response = await client.post(COMPLETIONS, json=BODY, headers={"Origin": "https://a.example"})
        assert response.status == 401 and response.headers["Access-Control-Allow-Origin"] == "https://a.example"
        response = await client.options(COMPLETIONS, headers=preflight | {"Origin": "https://b.example"})
        assert response.status != 204 and "Access-Control-Allow-Origin" not in response.headers


async def test_nothing_is_guessed_from_content_and_no_versions_are_told():
    async with client_of(FakeAsyncEngine()) as client, TestClient(TestServer(loading_app())) as early:
        for response in (await client.get("/health"), await client.get("/nothing"), await early.get("/health")):
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert response.headers["Server"] == "jax-engine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 70_000}, "port must be in"),
        ({"max_connections": 0}, "max_connections must be at least 1"),
        ({"body_timeout_s": -1.0}, "body_timeout_s must be finite"),
        ({"step_timeout_s": float("nan")}, "step_timeout_s must be finite"),
        ({"tls_cert_file": "x"}, "both tls_cert_file and tls_key_file"),
        ({"cors_origins": ("*",)}, "cors_origins are of the form"),
        ({"cors_origins": ("https://a.example/path",)}, "cors_origins are of the form"),
        ({"max_requests_per_client": -1}, "max_requests_per_client must be at least 0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        ServerOptions(**options)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes the certificate")
async def test_tls(tmp_path):
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    words += " -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(["openssl", *words.split(), "-keyout", key, "-out", cert], check=True, capture_output=True)
    context = ServerOptions(tls_cert_file=cert, tls_key_file=key).ssl_context()
    runner = web.AppRunner(create_app(FakeAsyncEngine()))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    try:
        trusted = ssl.create_default_context(cafile=cert)
        async with aiohttp.ClientSession(f"https://127.0.0.1:{runner.addresses[0][1]}") as session:
            assert (await session.get("/health", ssl=trusted)).status == 200
    finally:
        await runner.cleanup()
    with pytest.raises(ConfigError, match="cannot be used"):
        ServerOptions(tls_cert_file=cert, tls_key_file=cert).ssl_context()
    with pytest.raises(ConfigError, match="No such file"):
        ServerOptions(tls_cert_file=cert, tls_key_file=str(tmp_path / "none")).ssl_context()


async def test_admin_addresses_need_a_key_of_their_own(tmp_path):
    path = "/admin/start_profile"
    key = {"Authorization": "Bearer boss"}
    async with client_of(FakeAsyncEngine(), api_keys=["user"]) as client:
        for headers in ({}, {"Authorization": "Bearer user"}, key):
            await error_of(await client.post(path, headers=headers), 404)
    async with client_of(FakeAsyncEngine(), api_keys=["user"], admin_keys=["boss"]) as client:
        for headers in ({}, {"Authorization": "Bearer user"}):
            await error_of(await client.post(path, headers=headers), 401)
        assert "--profile_dir" in (await error_of(await client.post(path, headers=key), 400))["message"]
        await error_of(await client.get("/v1/models", headers=key), 401)
