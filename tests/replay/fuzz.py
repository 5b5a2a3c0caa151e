"""Any bytes from a server, in any reads, on the true connection and parser: what must hold, and a fuzzer that tries.

    make fuzz                                   # five minutes of atheris, which is installed for it
    make fuzz ARGS=corpus                       # the same; what it learns is kept in this folder for the next time
    python tests/replay/fuzz.py -max_total_time=60      # with atheris installed; the other options are libFuzzer's

`test_fuzz.py` draws its own bytes by hypothesis and asks the same.
"""

import socket
import sys
import tempfile
from contextlib import ExitStack
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace

try:
    import atheris
except ImportError:  # the suite does without
    atheris = None

with atheris.instrument_imports(include=["squall.replay"]) if atheris and __name__ == "__main__" else ExitStack():
    from squall.replay.connection import Connection
    from squall.replay.exchange import Exchange
    from squall.replay.sockets import Sockets, compiled
    from squall.replay.stream import MESSAGE_LIMIT, Reply

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
STATUSES = {"ok", "http_error", "reset", "truncated"}
SEEDS = (
    b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n',
    b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":null}]}\n\n',
    b'data: {"choices":[{"delta":{"content":"\\"b\\\\"},"finish_reason":null}]}\n\n',
    b'data: {"choices":[{"delta":{"content":""},"finish_reason":null}]}\n\n',
    b'data: {"choices":[{"delta":{"content":"c","x":{"text":"d"}},"finish_reason":null}]}\n\n',
    b'data: {"choices":[{"delta":{"reasoning_content":"hm"}}]}\r\n\r\n',
    b'data: {"choices":[{"text":"b","finish_reason":"stop"}]}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":-2,"prompt_tokens_details":{}}}\n\n',
    b'data: {"type":"response.output_text.delta","delta":"c"}\n\n',
    b'data: {"type":"response.completed","response":{"usage":{"output_tokens":2}}}\n\n',
    b'data: {"error":{"message":"full","code":503}}\n\n',
    b": ping\n\n",
    b"event: x\rdata: {}\r\r",
    b"error: no\n\n",
    b"data: [DONE]\n\n",
)


class Transport:
    """What a connection uses of its transport; nothing is sent."""

    socket, _peer = socket.socketpair()

    def get_extra_info(self, name: str) -> object:
        return SimpleNamespace(setsockopt=lambda *_: None, fileno=self.socket.fileno) if name == "socket" else None

    def set_write_buffer_limits(self, high: int) -> None: ...
    def write(self, data: bytes) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...
    def is_closing(self) -> bool:
        return False


def by_transport(reads: list[bytes]) -> Exchange:
    """The exchange after these reads and the end of a connection of asyncio's."""
    pool = SimpleNamespace(connections=set(), idle=[], forget=lambda connection: None)
    exchange = Exchange(0, 1, b"POST", 0, lambda exchange: None)
    connection = Connection(pool, exchange)
    connection.connection_made(Transport())
    for data in reads:
        if exchange.ended is None:
            connection.data_received(data)
    connection.connection_lost(None)
    return exchange


@cache
def sockets() -> Sockets:
    """A pool of plain sockets whose turns we take ourselves."""
    nothing = SimpleNamespace(add_reader=lambda *_: None, call_soon=lambda *_: None)
    return Sockets(nothing, ("127.0.0.1", 1))


def by_socket(reads: list[bytes]) -> Exchange:
    """The same of a plain socket."""
    exchange = Exchange(0, 1, b"POST", 0, lambda exchange: None)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        sockets().add(ours, exchange)
        theirs.recv(16)
        for data in reads:
            if exchange.ended is None:
                theirs.sendall(data)
                sockets().turn(0)
        theirs.close()
        while exchange.ended is None:
            sockets().turn(0)
        for connection in list(sockets().connections):
            connection.abort()
    return exchange


KINDS = (by_transport, by_socket) if compiled() else (by_transport,)


def cut(stream: bytes, at: list[int]) -> list[bytes]:
    """`stream` cut at these places."""
    edges = [0, *sorted({place for place in at if 0 < place < len(stream)}), len(stream)]
    return [stream[start:end] for start, end in pairwise(edges) if end > start]


def check(stream: bytes, at: list[int]) -> None:
    """Every stream ends, in one of the classes, with sane numbers, and the cuts change neither class nor numbers."""
    said = []
    for kind, reads in product(KINDS, ([stream] if stream else [], cut(stream, at))):
        exchange = kind(reads)
        reply, outcome = exchange.outcome()
        assert exchange.ended is not None
        assert outcome.status in STATUSES, outcome
        assert outcome.message is None or len(outcome.message) <= max(2 * MESSAGE_LIMIT, 400), outcome
        assert (outcome.status == "ok") <= (reply.done is not None)
        assert reply.chunks == sorted(reply.chunks)
        counts = (reply.prompt_tokens, reply.response_tokens, reply.cached_tokens)
        assert all(count is None or 0 <= count < 2**31 for count in counts)
        said.append((outcome.status, outcome.reason, reply.pieces, counts, exchange.http_status))
    assert said[0] == said[1], (said, stream, at)
    # Of a broken framing the kinds may notice a byte sooner or later.
    assert said[2:] in ([], said[:2]) or "bad_http" in {reason for _, reason, *_ in said}, (said, stream, at)
    assert not said[2:] or said[2] == said[3], (said, stream, at)
    pieces, times = cut(stream, at), list(range(len(cut(stream, at))))
    at_once, one_by_one = Reply(streamed=True), Reply(streamed=True)
    at_once.take(times, pieces)
    for time, piece in zip(times, pieces, strict=True):
        one_by_one.feed(time, piece)
    for reply in (at_once, one_by_one):
        reply.close()
    facts = [
        [getattr(reply, name) for name in ("chunks", "answer", "pieces", "done", "error", "bad", "response_tokens")]
        for reply in (at_once, one_by_one)
    ]
    assert facts[0] == facts[1], (facts, pieces)


def framed(body: bytes, at: list[int]) -> bytes:
    """An answer with `body` in chunks that end at these places."""
    return HEAD + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in cut(body, at)) + b"0\r\n\r\n"


def one(data: bytes) -> None:
    """`check` on what the fuzzer made: a byte of flags and count, two for each cut, and the server's bytes."""
    if not data:
        return
    count = data[0] & 15
    places = [int.from_bytes(data[1 + 2 * i : 3 + 2 * i], "big") for i in range(count)]
    rest = data[1 + 2 * count :]
    half = count // 2
    check(framed(rest, places[:half]) if data[0] & 16 else HEAD + rest if data[0] & 32 else rest, places[half:])


def main() -> None:
    """Fuzz until libFuzzer's options say stop; a finding is an exception, and its bytes are in a file named crash-…"""
    for folder in sys.argv[1:]:
        if not folder.startswith("-"):
            Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as corpus:
        for number in range(len(SEEDS)):
            body = b"".join(SEEDS[: number + 1] + SEEDS[-1:])
            places = [len(SEEDS[0]), 30, 100, 200]
            cuts = b"".join(place.to_bytes(2, "big") for place in places)
            for flags, stream in ((16, body), (32, framed(body, [50])[len(HEAD) :]), (0, framed(body, [50, 90]))):
                (Path(corpus) / f"{number}-{flags}").write_bytes(bytes([flags | len(places)]) + cuts + stream)
        atheris.Setup([*sys.argv, "-max_len=4096", "-timeout=5", corpus], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
