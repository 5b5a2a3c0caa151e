"""The stream parser: whatever the cuts, the same tokens; and what each ending means."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from squall.replay.stream import Reply, judge


def _event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def _delta(**delta: object) -> bytes:
    return _event(choices=[{"delta": delta, "finish_reason": None}])


USAGE = {"prompt_tokens": 31, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 16}}
CHAT = b"".join(
    (
        b": a comment\n\n",
        _delta(role="assistant", content=""),
        _delta(content="Gr"),
        _delta(content="üße 👋"),
        b"event: message\nid: 7\n" + _delta(content=" x"),
        _event(choices=[{"delta": {}, "finish_reason": "length"}]),
        _event(choices=[], usage=USAGE),
        b"data: [DONE]\n\n",
    )
)


def _parse(stream: bytes, cuts: list[int]) -> Reply:
    """The reply to `stream` cut at `cuts`; the time of a read is the offset of its end."""
    reply = Reply(streamed=True)
    edges = [0, *sorted(cuts), len(stream)]
    for start, end in itertools.pairwise(edges):
        reply.feed(end, stream[start:end])
    reply.close()
    return reply


def _facts(reply: Reply) -> tuple:
    return (
        reply.error,
        reply.bad,
        reply.prompt_tokens,
        reply.response_tokens,
        reply.cached_tokens,
        reply.done is not None,
        bool(reply.chunks),
    )


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_every_single_cut_gives_the_same_answer(end):
    stream = CHAT.replace(b"\n", end)
    whole = _facts(_parse(stream, []))
    assert whole == (None, None, 31, 3, 16, True, True)
    for cut in range(1, len(stream)):
        assert _facts(_parse(stream, [cut])) == whole, cut


@given(st.lists(st.integers(1, len(CHAT) - 1), unique=True, max_size=60), st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_many_cuts_give_the_same_answer(cuts, end):
    stream = CHAT.replace(b"\n", end)
    assert _facts(_parse(stream, cuts)) == (None, None, 31, 3, 16, True, True)


def test_cut_at_every_byte():
    for end in (b"\n", b"\r\n", b"\r"):
        stream = CHAT.replace(b"\n", end)
        reply = _parse(stream, list(range(1, len(stream))))
        assert _facts(reply) == (None, None, 31, 3, 16, True, True)
        assert len(reply.chunks) == 3


@given(st.binary(max_size=300), st.lists(st.integers(1, 299), unique=True, max_size=10))
def test_garbage_never_raises(garbage, cuts):
    reply = _parse(garbage, [cut for cut in cuts if cut < len(garbage)])
    assert judge("complete", 200, reply).status in ("truncated", "ok", "http_error")
    document = Reply(streamed=False)
    document.feed(1, garbage)
    document.close()
    assert judge("complete", 200, document).status in ("truncated", "ok", "http_error")


def test_a_token_has_the_time_of_the_read_that_completes_its_line():
    first, second = _delta(content="a"), _delta(content="b")
    reply = Reply(streamed=True)
    reply.feed(10, first[:-20])
    reply.feed(20, first[-20:] + second)
    reply.feed(30, b"data: [DONE]")
    reply.close(40)
    assert reply.chunks == [20]  # two tokens in one read share its time
    assert reply.done == 40


@pytest.mark.parametrize("channel", ["content", "reasoning", "reasoning_content", "tool_calls"])
def test_every_channel_counts(channel):
    value = [{"index": 0, "function": {"name": "f"}}] if channel == "tool_calls" else "x"
    reply = _parse(_delta(role="assistant") + _delta(**{channel: value}) + b"data: [DONE]\n\n", [])
    assert len(reply.chunks) == 1


def test_completions_text_and_nulls():
    stream = b"".join(
        (
            _event(choices=None, usage=None),
            _event(choices=[{"text": "", "finish_reason": None}]),
            _event(
                choices=[{"text": "a", "finish_reason": "length"}], usage={"prompt_tokens": 4, "completion_tokens": 1}
            ),
        )
    )
    reply = _parse(stream, [])
    assert len(reply.chunks) == 1
    assert reply.response_tokens == 1
    assert reply.done is not None  # the finish reason is a terminal event


def test_tokens_without_text_are_dated_by_the_finish():
    stream = _event(choices=[{"delta": {"content": ""}, "finish_reason": "length"}], usage={"completion_tokens": 1})
    assert len(_parse(stream, []).chunks) == 1


def test_several_data_lines_are_one_event():
    reply = _parse(b'data: {"choices": [{"text":\ndata: "a"}]}\n\ndata: [DONE]\n\n', [])
    assert reply.bad is None
    assert len(reply.chunks) == 1


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (b'data: {"error": {"message": "no room", "code": 503}}\n\n', "503: no room"),
        (b'data: {"error": "no room"}\n\n', "no room"),
        (b'data: {"object": "error", "message": "no room", "code": 400}\n\n', "400: no room"),
        (b'error: {"code": 500, "message": "no room"}\n\n', "500: no room"),
        (b"error: no room\n\n", "no room"),
    ],
)
def test_an_error_in_the_stream_is_a_failure(stream, message):
    outcome = judge("complete", 200, _parse(_delta(content="a") + stream + b"data: [DONE]\n\n", []))
    assert outcome == ("http_error", "in_band", message)


@pytest.mark.parametrize(
    ("ending", "status", "stream", "outcome"),
    [
        ("complete", 200, _delta(content="a") + b"data: [DONE]\n\n", ("ok", None)),
        ("eof", 200, _delta(content="a") + b"data: [DONE]\n\n", ("ok", None)),
        ("reset", 200, _delta(content="a") + b"data: [DONE]\n\n", ("ok", None)),
        ("complete", 200, b"data: [DONE]\n\n", ("ok", "empty")),
        ("complete", 200, _delta(content="a"), ("truncated", "eof")),
        ("eof", 200, _delta(content="a"), ("truncated", "eof")),
        ("reset", 200, _delta(content="a"), ("reset", "reset")),
        ("complete", 200, b"data: {half\n\ndata: [DONE]\n\n", ("truncated", "bad_stream")),
        ("bad_http", 200, b"", ("truncated", "bad_http")),
        ("eof_headers", None, b"", ("reset", "eof_headers")),
        ("stale_reuse", None, b"", ("reset", "stale_reuse")),
        ("reset", None, b"", ("reset", "reset")),
        ("complete", 500, b"", ("http_error", None)),
    ],
)
def test_endings(ending, status, stream, outcome):
    assert judge(ending, status, _parse(stream, []))[:2] == outcome


@pytest.mark.parametrize(
    ("status", "body", "outcome"),
    [
        (200, b'{"choices": [{"message": {"content": "a"}}], "usage": {"completion_tokens": 1}}', ("ok", None, None)),
        (200, b"<html><body>Welcome</body></html>", ("truncated", "bad_stream", "<html><body>Welcome</body></html>")),
        (200, b"", ("truncated", "bad_stream", "")),
        (200, b"{}", ("truncated", "bad_stream", "{}")),
        (400, b'{"error": {"message": "too long", "code": 400}}', ("http_error", None, "400: too long")),
        (404, b'{"detail": "Not Found"}', ("http_error", None, '{"detail": "Not Found"}')),
        (502, b"<h1>Bad Gateway</h1>", ("http_error", None, "<h1>Bad Gateway</h1>")),
        (429, b'{"error": {"message": "busy"}}', ("http_error", None, "busy")),
    ],
)
def test_documents(status, body, outcome):
    reply = Reply(streamed=False)
    reply.feed(5, body)
    reply.close()
    assert judge("complete", status, reply) == outcome


def test_odd_usage_is_not_believed():
    reply = _parse(_event(usage={"prompt_tokens": -4, "completion_tokens": "many", "prompt_tokens_details": None}), [])
    assert (reply.prompt_tokens, reply.response_tokens, reply.cached_tokens) == (None, None, None)
