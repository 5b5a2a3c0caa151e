"""Plain connections, which a compiled loop reads: what the tests of replays at large do not reach."""

import socket
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from fuzz import HEAD, SEEDS
from mock import Behaviour, Mock  # noqa: UP026 - the file beside this one
from test_engine import check, in_run, statuses, trace

from squall.replay import replay, sockets
from squall.replay.exchange import Exchange

pytestmark = pytest.mark.skipif(not sockets.compiled(), reason="this system has no epoll")
NOTHING = SimpleNamespace(add_reader=lambda *_: None, remove_reader=lambda *_: None, call_soon=lambda *_: None)
TOKEN = SEEDS[1]


@contextmanager
def answering():
    """A pool whose turns the test takes, an exchange that has been sent, and the server's end of its connection."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ours = socket.create_connection(listening.getsockname())
        theirs, _ = listening.accept()
    ours.setblocking(False)
    ours.setsockopt(socket.SOL_SOCKET, sockets.STAMPED, 1)
    time.sleep(0.05)  # the kernel begins to stamp in a moment
    pool, exchange = sockets.Sockets(NOTHING, ("127.0.0.1", 1)), Exchange(0, 1, b"POST", 0, lambda exchange: None)
    with theirs:
        pool.add(ours, exchange)
        yield pool, exchange, theirs
        pool.close()


def chunk(*events: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events)


def test_times_are_when_the_kernel_got_the_bytes():
    """However late we look."""
    with answering() as (pool, exchange, server):
        sent = []
        for data in (HEAD, chunk(TOKEN), chunk(TOKEN), chunk(SEEDS[-1]) + b"0\r\n\r\n"):
            sent.append(time.monotonic_ns())
            server.sendall(data)
            time.sleep(0.03)
            pool.turn(0)
        reply, outcome = exchange.outcome()
    assert outcome.status == "ok"
    seen = [exchange.first_byte, *reply.chunks, reply.done]
    assert exchange.ended == reply.done
    assert max(abs(at - by) for at, by in zip(seen, sent, strict=True)) < 10_000_000


def test_streams_that_are_quick_get_no_naps():
    with answering() as (pool, _, server):
        server.sendall(HEAD)
        pool.turn(0)
        for _ in range(sockets.READS_LOOKED_AT):
            server.sendall(chunk(TOKEN))
            pool.turn(0)
        assert pool.naps
        pool.call_soon(lambda: None)
        pool.run()
        assert not pool.naps


def test_slow_streams_get_naps():
    with answering() as (pool, exchange, server):
        for data in (HEAD, *[chunk(TOKEN)] * 30):
            server.sendall(data)
            time.sleep(0.003)
            pool.turn(time.monotonic_ns() + 1)
        assert pool.naps
        assert len(exchange.fold().chunks) == 30


def test_answers_larger_than_the_buffers():
    with Mock(in_run(Behaviour(usage=False))) as mock:
        run = replay(trace(3, response=[5000] * 3), url=mock.url)
    check(run, 3)
    assert statuses(run) == {"ok": 3}
    assert set(run.table["response_tokens"]) == {5000}


def test_a_document_larger_than_the_buffers():
    body = b'{"choices":[{"message":{"content":"%b"},"finish_reason":"stop"}]}' % (b"a" * 3_000_000)
    with Mock(in_run(Behaviour(body=body))) as mock:
        run = replay(trace(2), url=mock.url)
    assert statuses(run) == {"ok": 2}


def test_a_request_larger_than_the_sockets_buffer():
    with Mock() as mock:
        run = replay(trace(2, request=[1_000_000] * 2), url=mock.url)
        assert [len(seen.body["messages"][0]["content"]) > 3_000_000 for seen in mock.run] == [True, True]
    assert statuses(run) == {"ok": 2}


def test_headers_that_change_are_read_again():
    def behave(number, seen):
        odd = seen.body["max_tokens"] > 1 and number % 2
        return Behaviour(status=429 if odd else 200, headers={"x-number": str(number // 3)})

    with Mock(behave) as mock:
        run = replay(trace(12), url=mock.url)
    assert statuses(run)["http_error"] == 6
    assert set(run.table.filter(status="http_error")["http_status"]) == {429}
