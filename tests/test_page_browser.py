"""The page in headless Chromium, against a real server process with a fake device: send, stream, stop, look.

    python -m pytest -m long tests/test_page_browser.py

Needs the package `playwright` (extra `browser`) and a Chromium on the machine; it downloads none.
"""

import json
import shutil

import pytest

from tests.test_server_faults import server_process

playwright = pytest.importorskip("playwright.async_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.long, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
ANSWERS = "[...document.querySelectorAll('.message.assistant')]"


@pytest.fixture
async def page():
    """The page, once the engine's view is there; at the end nothing may have gone wrong in it. What is waited for is
    written as a function: the page's policy lets nobody evaluate a text, not even the test."""
    with server_process("--slow-steps") as (_, url, _):
        async with playwright.async_playwright() as tool:
            browser = await tool.chromium.launch(executable_path=CHROMIUM, args=ARGS)
            page = await browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="dark")
            page.set_default_timeout(60_000)
            problems = []
            page.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("request", lambda r: None if r.url.startswith((url, "blob:")) else problems.append(r.url))
            await page.goto(url)
            await page.wait_for_function("() => document.getElementById('status').textContent === 'ready'")
            yield page
            await browser.close()
            assert [text for text in problems if "status of 400" not in text] == []


async def ask(page, text, max_tokens):
    """By keyboard alone; the input has the focus."""
    await page.evaluate(f"document.getElementById('max_tokens').value = {max_tokens}")
    await page.keyboard.type(text)
    await page.keyboard.press("Enter")


async def test_a_message_is_answered_and_measured(page):
    await ask(page, "hello", 20)
    await page.wait_for_function(f"() => {ANSWERS}.length === 1 && document.getElementById('stop').disabled")
    assert "tokens/s" in await page.text_content("#rate") and "20 tokens" in await page.text_content("#rate")
    assert await page.text_content(".message.user") == "hello"
    await ask(page, "again", 5)
    await page.wait_for_function(f"() => {ANSWERS}.length === 2 && document.getElementById('stop').disabled")


async def test_a_stream_shows_as_it_comes_and_escape_stops_it(page):
    await ask(page, "go on", 400)
    await page.wait_for_function(f"() => {ANSWERS}[0]?.textContent.length > 20")
    await page.keyboard.press("Escape")
    await page.wait_for_function("() => document.getElementById('stop').disabled")
    assert "(stopped)" in await page.text_content("#rate")
    await page.wait_for_function("() => document.querySelector('#tiles b').textContent === '0'")  # nothing runs on


async def test_the_timeline_moves_and_its_trace_can_be_saved(page, tmp_path):
    await page.evaluate("document.getElementById('streams').value = 4")
    await ask(page, "work", 400)
    await page.wait_for_function(
        f"() => {ANSWERS}.length === 4 && {ANSWERS}.every((node) => node.textContent.length > 5)"
    )
    await page.wait_for_function("() => /^[1-9][0-9]* steps/.test(document.getElementById('timeline').ariaLabel)")
    pictures = [await page.evaluate("document.getElementById('timeline').toDataURL()")]
    await page.wait_for_timeout(1200)
    pictures.append(await page.evaluate("document.getElementById('timeline').toDataURL()"))
    assert pictures[0] != pictures[1]
    await page.click("#pause")
    async with page.expect_download() as waiting:
        await page.click("#trace")
    await (await waiting.value).save_as(tmp_path / "trace.json")
    assert any(event["name"] == "step 0" for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"])


async def test_a_refusal_is_shown_in_words(page):
    await page.evaluate("document.getElementById('top_p').value = 7")
    await ask(page, "hello", 5)
    assert "top_p" in await page.text_content(".message.error")


async def test_dark_and_light(page):
    colours = []
    for _ in range(2):
        colours.append(await page.evaluate("getComputedStyle(document.body).backgroundColor"))
        await page.click("#theme")
    assert colours == ["rgb(18, 22, 29)", "rgb(246, 247, 249)"]
