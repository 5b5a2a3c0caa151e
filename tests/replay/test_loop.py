"""The sender's event loop, and what a connection makes of chunks: order, times, closed sockets, odd framing."""

import select
import socket
import time

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from squall.replay.connection import whole_chunks
from squall.replay.loop import READ, WRITE, Loop


@pytest.fixture(params=["epoll", "poll"])
def loop(request, monkeypatch):
    if request.param == "poll":
        monkeypatch.delattr(select, "epoll", raising=False)
    loop = Loop()
    yield loop
    loop.close()


def test_calls_come_in_order_and_never_early(loop):
    seen = []
    began = time.monotonic()
    for after in (0.03, 0.01, 0.02):
        loop.call_later(after, lambda after=after: seen.append((after, time.monotonic() - began)))
    loop.call_later(0.015, seen.append, None).cancel()
    loop.call_soon(seen.append, (0.0, 0.0))
    loop.run(within=0.05)
    assert [after for after, _ in seen] == [0.0, 0.01, 0.02, 0.03]
    assert all(took >= after for after, took in seen)


def test_what_is_ready_is_called_and_what_was_discarded_is_not(loop):
    pairs = [socket.socketpair() for _ in range(3)]
    seen = []

    def read(number: int) -> None:
        seen.append(number)
        pairs[number][0].recv(10)
        if number < 2:  # the other one is ready too, in the same look
            loop.discard(pairs[1 - number][0])
            assert pairs[1 - number][0].fileno() >= 0  # its number is not given away yet
        if len(seen) == 2:
            loop.stop()

    for number, (here, there) in enumerate(pairs):
        loop.watch(here.fileno(), READ, lambda number=number: read(number))
        there.send(b"x")
    loop.run(within=5)
    assert sorted(seen) in ([0, 2], [1, 2])
    assert sum(here.fileno() >= 0 for here, _ in pairs) == 2
    for pair in pairs:
        for end in pair:
            end.close()


def test_an_error_of_a_call_ends_it(loop):
    here, there = socket.socketpair()
    with here, there:
        loop.watch(here.fileno(), READ | WRITE, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loop.run(within=5)


class Parsed:
    """What httptools makes of a chunked body that comes in these reads."""

    def __init__(self, reads: list[bytes]) -> None:
        self.pieces: list[tuple[int, bytes]] = []
        self.over = False
        parser = httptools.HttpResponseParser(self)
        parser.feed_data(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for self.number, data in enumerate(reads):
            parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self.pieces.append((self.number, body))

    def on_message_complete(self) -> None:
        self.over = True


@given(
    st.lists(st.binary(min_size=1, max_size=40) | st.sampled_from([b"data: x\n\n", b"\r\n0\r\n\r\n"]), max_size=8),
    st.sets(st.integers(0, 9)),
    st.integers(0, 300),
)
def test_whole_chunks_are_what_the_parser_finds(pieces, joined, cut):
    """Chunks a read, several a read, and (where `cut` lies inside) broken ones, which are left to the parser."""
    chunks = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""]]
    reads: list[bytes] = []
    for number, chunk in enumerate(chunks):
        if reads and number in joined:
            reads[-1] += chunk
        else:
            reads.append(chunk)
    place = cut % len(reads[-1])
    if cut > 150 and place:
        reads[-1:] = [reads[-1][:place], reads[-1][place:]]
    found = whole_chunks(list(range(len(reads))), reads)
    if found is None:
        whole = {sum(map(len, chunks[: number + 1])) for number in range(len(chunks))}
        edges = {sum(map(len, reads[: number + 1])) for number in range(len(reads))}
        assert any(b"\r" in piece for piece in pieces) or not edges <= whole
    else:
        parsed = Parsed(reads)
        assert parsed.over
        assert list(zip(*found, strict=True)) == parsed.pieces


@pytest.mark.parametrize(
    "odd",
    [
        b"5\r\nhello\r\n",
        b"5\r\nhello\r\n0\r\n\r\n5\r\nhello\r\n",
        b"5\r\nhello\r\n0\r\nX: y\r\n\r\n",
        b"5;a=b\r\nhello\r\n0\r\n\r\n",
        b"6\r\nhello\r\n0\r\n\r\n",
        b"-5\r\nhello\r\n0\r\n\r\n",
        b"0x5\r\nhello\r\n0\r\n\r\n",
        b"5\nhello\r\n0\r\n\r\n",
        b"0\r\n\r\n0\r\n\r\n",
        b"",
    ],
)
def test_odd_framing_is_left_to_the_parser(odd):
    assert whole_chunks([1], [odd]) is None
