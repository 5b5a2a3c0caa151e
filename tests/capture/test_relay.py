"""The relay's parts by themselves: answers cut anywhere, hashes, conversations."""

import json
from itertools import pairwise
from time import monotonic_ns

import pytest
from hypothesis import given
from hypothesis import strategies as st

from squall.capture.asked import Asked, Hasher, asked, recorded_path
from squall.capture.conversations import Conversations
from squall.capture.record import Captured
from squall.capture.relay import Client, Exchange, Relay, Settings, Upstream

EVENTS = [
    b'data: {"choices":[{"delta":{"content":"a"}}],"usage":null}\r\n\r\n',
    b': comment "usage"\n\n',
    'data: {"choices":[{"delta":{"content":"ü \\",\\"usage\\":null"}}]}\n\n'.encode(),
    b'data: {"choices": [ ], "usage":{"prompt_tokens":5,"completion_tokens":2}}\n\n',
    b"data: [DONE]\n\n",
]
KEPT = b"".join(EVENTS).replace(EVENTS[3], b"").replace(b'}],"usage":null}\r', b"}]}\r")
ANSWER = (
    b"HTTP/1.1 100 Continue\r\n\r\n"
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    + b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in EVENTS)
    + b"0\r\n\r\n"
)


class Wire:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.data, self.closed = b"", False

    def write(self, data: bytes) -> None:
        self.data += data

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None: ...

    resume_reading = pause_reading


class Kept:
    written = dropped = 0

    def __init__(self) -> None:
        self.records: list[Captured] = []

    def take(self, record: Captured) -> None:
        self.records.append(record)


def pair(said: Asked) -> tuple[Upstream, Wire, Kept]:
    kept = Kept()
    relay = Relay(Settings(upstream="http://u:1"), kept, Hasher(b"s" * 16), 0, None)  # type: ignore[arg-type]
    client, wire = Client(relay), Wire()
    client.connection_made(wire)  # type: ignore[arg-type]
    exchange = Exchange(relay, client, monotonic_ns())
    exchange.kind, exchange.asked, exchange.head = "/chat/completions", said, b"POST / HTTP/1.1\r\n\r\n"
    client._exchange = exchange
    upstream = Upstream(relay, exchange)
    upstream.connection_made(Wire())  # type: ignore[arg-type]
    return upstream, wire, kept


def unchunked(data: bytes) -> bytes:
    body = b""
    rest = data.split(b"\r\n\r\n", 2)[2]
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return body


@given(st.sets(st.integers(1, len(ANSWER) - 1), max_size=40), st.booleans())
def test_relay_wherever_an_answer_is_cut(cuts: set[int], hide: bool) -> None:
    upstream, wire, kept = pair(Asked(streamed=True, hide_usage=hide))
    edges = [0, *sorted(cuts), len(ANSWER)]
    for start, end in pairwise(edges):
        upstream.data_received(ANSWER[start:end])
    if hide:
        assert wire.data.startswith(ANSWER[: ANSWER.index(b"\r\n\r\n", 30) + 4])
        assert unchunked(wire.data) == KEPT
    else:
        assert wire.data == ANSWER
    (record,) = kept.records
    assert (record.status, record.request_tokens, record.response_tokens) == ("ok", 5, 2)
    assert upstream._relay.idle == [upstream]
    assert not wire.closed


@pytest.mark.parametrize(("missing", "status"), [(5, "ok"), (7, "ok"), (30, "cancelled")])
def test_relay_to_a_client_that_leaves_before_the_end_of_the_message(missing: int, status: str) -> None:
    """The official client closes at [DONE]: it has its whole answer."""
    upstream, _, kept = pair(Asked(streamed=True))
    client = upstream._exchange.client
    upstream.data_received(ANSWER[:-missing])
    client.connection_lost(None)
    (record,) = kept.records
    assert (record.status, record.response_tokens) == (status, 2)
    assert upstream._transport.closed
    assert upstream._relay.idle == []
    assert upstream._relay.gauges.in_flight == -1  # it was never counted as arrived here


def test_relay_recorded_paths() -> None:
    assert recorded_path("/v1/chat/completions?x=1") == "/chat/completions"
    assert recorded_path("/openai/v1/completions/") == "/completions"
    assert recorded_path("/v1/responses") == "/responses"
    assert recorded_path("/v1/embeddings") is None


@given(
    st.dictionaries(st.sampled_from(["temperature", "seed", "user"]), st.integers(), max_size=3),
    st.sampled_from([None, {}, {"include_usage": False}, {"include_usage": True}, {"other": 1}]),
)
def test_asking_for_usage_changes_nothing_else(more: dict, options: dict | None) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "é {"}], "stream": True, **more}
    if options is not None:
        body["stream_options"] = options
    said = asked("/chat/completions", json.dumps(body).encode(), {}, Hasher(b"s" * 16), ask_usage=True, prefix=True)
    assert json.loads(said.body) == {**body, "stream_options": {**(options or {}), "include_usage": True}}
    assert said.hide_usage == ((options or {}).get("include_usage") is not True)


@given(st.binary(max_size=200))
def test_any_body_passes_unchanged_if_it_is_not_understood(body: bytes) -> None:
    said = asked("/chat/completions", body, {}, Hasher(b"s" * 16), ask_usage=True, prefix=True)
    assert said.body == body


def test_blocks_share_prefixes_and_differ_by_salt() -> None:
    def blocks(text: str, salt: bytes = b"s" * 16) -> list[int]:
        body = json.dumps({"model": "m", "prompt": text}).encode()
        return asked("/completions", body, {}, Hasher(salt), ask_usage=False, prefix=True).blocks

    one, two = blocks("a" * 1000 + "b" * 300), blocks("a" * 1000 + "c" * 300)
    assert one[:3] == two[:3]
    assert one[3] != two[3]
    assert set(one).isdisjoint(blocks("a" * 1000 + "b" * 300, b"t" * 16))


def test_conversations_forget_the_oldest_and_use_response_ids() -> None:
    known = Conversations(most=2)
    first = known.place(Asked(chain=[1]))
    assert known.place(Asked(chain=[1, 2, 3])) == (first[0], 2)
    known.place(Asked(chain=[7]))
    known.place(Asked(chain=[8]))
    assert known.place(Asked(chain=[1, 2, 3, 4, 5]))[1] == 1  # forgotten
    assert known.place(Asked()) == (None, None)
    named = known.answered(99, (None, None))
    assert known.place(Asked(previous=99)) == (named[0], 2)


@pytest.mark.parametrize("size", [100, 200_000])
def test_hasher_is_keyed(size: int) -> None:
    assert Hasher(b"a" * 16).number(b"x" * size) != Hasher(b"b" * 16).number(b"x" * size)
    assert Hasher(b"a" * 16).number(b"x" * size) == Hasher(b"a" * 16).number(b"x" * size) < 2**63


def test_a_request_that_never_comes_in_is_given_up() -> None:
    """A head byte by byte, and a body that stops: 408, after the time that its size so far allows."""
    for data, patience in (
        (b"POST /v1/chat/completions HT", 20),
        (b"POST /a HTTP/1.1\r\nContent-Length: 9\r\n\r\nab", 20),
    ):
        relay = Relay(Settings(upstream="http://u:1"), Kept(), Hasher(b"s" * 16), 0, None)  # type: ignore[arg-type]
        client, wire = Client(relay), Wire()
        client.connection_made(wire)  # type: ignore[arg-type]
        client.data_received(data)
        client.check(client._since + patience - 1, 600.0)
        assert wire.data == b""
        client.check(client._since + patience + 1, 600.0)
        assert wire.data.startswith(b"HTTP/1.1 408")
        assert wire.closed
