"""What clients see of an engine that is lost: nothing, a delay, or an error that says so; never a wrong answer."""

import json

import pytest

from serving.errors import ApiError
from serving.relay import EngineLost, Forwarded, Head, relay, whole_events

REQUEST = Forwarded("POST", "/v1/completions", [], b"{}")
STREAM = Head(200, [("Content-Type", "text/event-stream")], None)
WHOLE = Head(200, [], b'{"choices": []}')
COMMENT = b": keep-alive\n\n"
DRAINING = Head(503, [], b'{"error": {"code": "draining"}}')
LOST = EngineLost("killed")


class Engines:
    """Each try is one list of pieces; an exception among them is raised."""

    def __init__(self, *answers):
        self.answers, self.asked, self.closed = list(answers), 0, 0

    async def ask(self, request):
        self.asked += 1
        try:
            for piece in self.answers[min(self.asked, len(self.answers)) - 1]:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            self.closed += 1

    async def relayed(self, path="/v1/completions"):
        request = Forwarded("POST", path, [], b"{}")
        return [piece async for piece in relay(self.ask, request, first_pause_s=0.001)]


def event(text):
    return b"data: %b\n\n" % json.dumps({"text": text}).encode()


@pytest.mark.parametrize(
    ("first", "seen_of_it"),
    [
        ([LOST], []),
        ([DRAINING], []),
        ([Head(503, [], b'{"error": {"code": "engine_stopped"}}')], []),
        ([STREAM, LOST], [STREAM]),
        ([STREAM, COMMENT, COMMENT + COMMENT, LOST], [STREAM, COMMENT, COMMENT + COMMENT]),
    ],
)
async def test_an_answer_that_has_not_begun_is_asked_again(first, seen_of_it):
    answer = [STREAM, event("a"), event("b"), b"data: [DONE]\n\n"]
    engines = Engines(first, first, answer)
    seen = await engines.relayed()
    again = seen_of_it[1:] * 2
    assert seen == [STREAM, *again, *answer[1:]]
    assert engines.asked == engines.closed == 3


async def test_a_whole_answer_is_asked_again():
    assert await Engines([LOST], [WHOLE]).relayed() == [WHOLE]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses"])
async def test_a_stream_that_has_begun_ends_with_an_error(path):
    engines = Engines([STREAM, COMMENT, event("a"), LOST], [STREAM, event("other")])
    *begun, last = await engines.relayed(path)
    assert begun == [STREAM, COMMENT, event("a")] and engines.asked == 1
    lines = dict(line.split(b": ", 1) for line in reversed(last.strip().split(b"\n")) if line)
    body = json.loads(lines[b"data"])
    assert body.get("error", body)["code"] == "engine_lost"
    assert (b"event: error" in last) == (path in ("/v1/messages", "/v1/responses"))
    assert last.endswith(b"data: [DONE]\n\n") == (path != "/v1/messages")


async def test_when_no_engine_answers_that_is_told():
    engines = Engines([LOST])
    with pytest.raises(ApiError) as failure:
        await engines.relayed()
    assert failure.value.status == 503 and failure.value.code == "engine_lost" and engines.asked == 4
    *_, last = await Engines([STREAM, COMMENT, LOST]).relayed()
    assert b"engine_lost" in last, "the status has been sent: an event tells it"
    *_, last = await Engines([STREAM, COMMENT, LOST], [Head(400, [], b"{}")]).relayed()
    assert b"engine_lost" in last


async def test_refusals_pass_unchanged():
    for head in (Head(400, [], b"{}"), Head(429, [("Retry-After", "3")], b"{}"), Head(503, [], b'{"code": "loading"}')):
        engines = Engines([head])
        assert await engines.relayed() == [head] and engines.asked == 1


async def test_a_client_that_leaves_closes_the_engines_answer():
    engines = Engines([STREAM, event("a"), event("b")])
    pieces = relay(engines.ask, REQUEST)
    assert await anext(pieces) == STREAM and engines.closed == 0
    await pieces.aclose()
    assert engines.closed == 1


@pytest.mark.parametrize("size", [1, 2, 7, 100])
async def test_of_an_event_that_breaks_off_nothing_comes(size):
    text = event("a") + COMMENT + event("b")

    async def chunks():
        for start in range(0, len(text), size):
            yield text[start : start + size]
        yield b'data: {"text": "brok'

    pieces = [piece async for piece in whole_events(chunks())]
    assert b"".join(pieces) == text and all(piece.endswith(b"\n\n") for piece in pieces)
