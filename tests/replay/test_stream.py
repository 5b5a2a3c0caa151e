"""The stream parser: whatever the cuts, the same tokens; and what each ending means."""

import itertools
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from squall.replay.stream import LINE_LIMIT, Reply, judge


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


@pytest.mark.parametrize("usage", ["none", 7, [1], True, {"prompt_tokens": {}, "prompt_tokens_details": "none"}])
@pytest.mark.parametrize("streamed", [True, False])
def test_a_usage_that_is_none_makes_no_answer_wrong(usage, streamed):
    said = {"delta" if streamed else "message": {"content": "a"}, "finish_reason": "stop"}
    reply, document = Reply(streamed), json.dumps({"choices": [said], "usage": usage}).encode()
    reply.take([1], [b"data: " + document + b"\n\n" if streamed else document])
    reply.close(2)
    assert (reply.bad, reply.error, reply.done, reply.pieces) == (None, None, 1, 1)
    assert (reply.prompt_tokens, reply.response_tokens, reply.cached_tokens) == (None, None, None)


def test_a_usage_in_the_responses_api_that_is_none_makes_no_answer_wrong():
    ends = [{"type": "response.completed", "response": {"usage": usage}} for usage in ("none", {"input_tokens": 5})]
    for end, prompt in zip(ends, (None, 5), strict=True):
        reply = _parse(_event(type="response.output_text.delta", delta="a") + _event(**end), [])
        assert (reply.bad, reply.done is not None, reply.prompt_tokens) == (None, True, prompt)


def test_odd_usage_is_not_believed():
    reply = _parse(_event(usage={"prompt_tokens": -4, "completion_tokens": "many", "prompt_tokens_details": None}), [])
    assert (reply.prompt_tokens, reply.response_tokens, reply.cached_tokens) == (None, None, None)


# --- the plain form, taken at once ------------------------------------------------------------------------------------


def _slow(payloads: list[bytes], times: list[int]) -> Reply:
    reply = Reply(streamed=True)
    for at, payload in zip(times, payloads, strict=True):
        reply.feed(at, payload)
    reply.close()
    return reply


def _all(reply: Reply) -> tuple:
    return (*_facts(reply), reply.chunks, reply.pieces, reply.answer, reply.done, reply.text)


EVENTS = [
    _delta(role="assistant", content=""),
    _delta(content="a"),
    _delta(reasoning_content="hm"),
    _delta(tool_calls=[{"index": 0}]),
    _event(choices=[{"text": "b", "finish_reason": None}]),
    _event(choices=[{"delta": {}, "finish_reason": "stop"}]),
    _event(choices=[], usage=USAGE),
    _event(error={"message": "no", "code": 503}),
    _event(type="response.output_text.delta", delta="c"),
    _event(type="response.completed", response={"usage": {"input_tokens": 5, "output_tokens": 2}}),
    b"data: {half\n\n",
    b"data: [DONE]\n\n",
    _delta(content="x") + _delta(content="y"),
]


ODD = [
    b": comment\n\n",
    b"data:{}\n\n",
    b"data: {}\r\n\r\n",
    b"data: {}\n",
    b"\n",
    b"event: x\ndata: {}\n\n",
    b"data: {}, {}\n\n",
    b"data: \n\n",
    b'data: {"choices": [\n\n',
]


def _at_once(pieces: list[bytes], times: list[int]) -> Reply:
    reply = Reply(streamed=True)
    reply.take(times, pieces)
    reply.close()
    return reply


@given(st.lists(st.sampled_from(EVENTS), max_size=12), st.lists(st.sampled_from(EVENTS + ODD), max_size=4), st.data())
def test_a_body_taken_at_once_says_the_same_as_piece_by_piece(events, odd, data):
    pieces = data.draw(st.permutations(events + odd))
    times = [10 * number for number in range(1, len(pieces) + 1)]
    assert _all(_at_once(pieces, times)) == _all(_slow(pieces, times))


@given(st.lists(st.integers(1, len(CHAT) - 1), unique=True, max_size=60), st.integers(0, 60))
def test_a_body_folded_on_its_way_says_the_same(cuts, fold):
    edges = [0, *sorted(cuts), len(CHAT)]
    pieces = [CHAT[start:end] for start, end in itertools.pairwise(edges)]
    times = edges[1:]
    reply = Reply(streamed=True)
    reply.take(times[:fold], pieces[:fold])
    reply.take(times[fold:], pieces[fold:])
    reply.close()
    assert _all(reply) == _all(_slow(pieces, times))


@given(st.lists(st.binary(max_size=40), max_size=8), st.booleans())
def test_garbage_taken_at_once_says_the_same_as_piece_by_piece(garbage, dressed):
    pieces = [b"data: %b\n\n" % piece for piece in garbage] if dressed else garbage
    times = list(range(len(pieces)))
    assert _all(_at_once(pieces, times)) == _all(_slow(pieces, times))


def test_channels_are_told_apart():
    reply = Reply(streamed=True, keep_text=True)
    for at, event in enumerate(
        [_delta(reasoning_content="hm"), _delta(tool_calls=[{"index": 0}]), _delta(content="yes"), _delta(content="!")]
    ):
        reply.feed(at, event)
    assert (reply.chunks, reply.answer, reply.text) == ([0, 1, 2, 3], 2, ["yes", "!"])


RESPONSES = b"".join(
    b"event: " + event["type"].encode() + b"\ndata: " + json.dumps(event).encode() + b"\n\n"
    for event in [
        {"type": "response.created", "response": {"status": "in_progress", "usage": None, "error": None, "output": []}},
        {"type": "response.reasoning_text.delta", "delta": "hm"},
        {"type": "response.output_text.delta", "delta": "yes"},
        {"type": "response.output_text.done", "text": "yes"},
        {
            "type": "response.completed",
            "response": {
                "usage": {"input_tokens": 12, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 3}}
            },
        },
    ]
)


def test_the_responses_api():
    for cut in range(1, len(RESPONSES)):
        reply = _parse(RESPONSES, [cut])
        assert _facts(reply) == (None, None, 12, 2, 3, True, True), cut
        assert reply.pieces == 2
        assert judge("complete", 200, reply).status == "ok"


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({"type": "error", "code": "server_error", "message": "no room"}, "no room"),
        ({"type": "response.failed", "response": {"error": {"code": "x", "message": "no room"}}}, "no room"),
    ],
)
def test_the_responses_api_failing(event, message):
    assert judge("complete", 200, _parse(_event(**event), [])) == ("http_error", "in_band", message)


@pytest.mark.parametrize(
    "stream",
    [
        _delta(content="a") + b"data: [DONE]\n\ndata: [DONE]\n\n",
        _delta(content="a") + b"data: [DONE]\n\n: bye\n\n",
        b": ping\r\r" + _delta(content="a").replace(b"\n", b"\r") + b"data: [DONE]\r\r",
    ],
)
def test_odd_but_allowed_ends(stream):
    assert judge("complete", 200, _parse(stream, [])) == ("ok", None, None)


def test_invalid_utf_8_is_a_bad_stream():
    stream = b'data: {"choices":[{"delta":{"content":"\xff\xfe"}}]}\n\ndata: [DONE]\n\n'
    assert judge("complete", 200, _parse(stream, []))[:2] == ("truncated", "bad_stream")
    first, last = stream.split(b"\n\n", 1)
    at_once = _at_once([first + b"\n\n", last], [1, 2])
    assert judge("complete", 200, at_once)[:2] == ("truncated", "bad_stream")


def test_a_line_without_end_is_bad_and_takes_bounded_time_and_memory():
    reply = Reply(streamed=True)
    began = time.monotonic()
    for at in range(64):
        reply.take([at], [b"data: " + b"x" * (1 << 20)])
        assert len(reply._tail) <= LINE_LIMIT
    reply.close()
    assert judge("complete", 200, reply) == ("truncated", "bad_stream", "a line of more than 4 MB")
    assert time.monotonic() - began < 8
