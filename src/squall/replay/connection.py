"""One HTTP/1.1 connection on a bare socket, and the pool of them.

A read of a streamed answer is stamped and kept, and nothing else, once httptools has read the headers: its framing in
chunks is taken off when it looks as if the answer were over (`whole_chunks`, and httptools for whatever is not plain),
and what its events say is read later still (`stream.Reply.take`).

A server may close a connection that it promised to keep: the pool takes the youngest idle connection, retires the old
ones before servers do, and looks at the socket before it reuses one. What still fails so is `stale_reuse`.
"""

import errno
import os
import re
import select
import socket
import ssl
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate, pairwise
from time import monotonic_ns
from typing import Any

import httptools

from squall.replay.loop import READ, WRITE, Loop, Timer
from squall.replay.stream import Outcome, Reply, judge

IDLE_LIMIT = 4_000_000_000
"""Nanoseconds after which an idle connection is not used again: uvicorn, and so vLLM, closes after 5 s."""
OPENED_AT_ONCE = 4
"""Connections opened ahead at a time, a hundred times a second: each takes the loop a tenth of a millisecond."""
EARLY = 1 << 20
"""Bytes of an answer that are held before they are parsed while the answer still comes in."""
BODY_LIMIT = 1 << 28
"""Bytes of an answer after which it counts as endless."""
HEADER_LIMIT = 1 << 18
"""Bytes of response headers after which this is no HTTP server."""
AT_ONCE = 1 << 16
"""Bytes that a socket is read for at once."""
LOOK, QUIET = 0.1, 50_000_000
"""Every so many seconds a look at answers that have brought nothing for so many nanoseconds: are they over?"""
OPTIONS = (
    (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
    (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 30),
    (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 10),
    (socket.IPPROTO_TCP, "TCP_KEEPCNT", 3),
)
"""A peer that vanished without a word (half-open connection) is noticed after a minute, even with every timeout off."""


class Exchange:
    """One attempt: the request's bytes, and the moment (monotonic ns) of everything that happened to it."""

    __slots__ = (
        "attempt",
        "compressed",
        "connected",
        "connection",
        "ended",
        "ending",
        "first_byte",
        "folded",
        "held",
        "http_status",
        "keep_text",
        "location",
        "message",
        "on_end",
        "payload",
        "pieces",
        "read_at",
        "reads",
        "received",
        "released",
        "reply",
        "retries",
        "retry_after",
        "reused",
        "row",
        "scheduled",
        "sent",
        "streamed",
        "times",
    )

    def __init__(
        self, row: int, attempt: int, payload: bytes, scheduled: int, on_end: "Callable[[Exchange], None]"
    ) -> None:
        self.row = row
        self.attempt = attempt
        self.retries = 0
        self.payload = payload
        self.scheduled = scheduled
        self.on_end = on_end
        self.released = monotonic_ns()
        self.connected: int | None = None
        self.sent: int | None = None
        self.first_byte: int | None = None
        self.ended: int | None = None
        self.ending = ""
        """How it ended: what `stream.judge` takes, or `status/reason` where nothing of the server has a say."""
        self.message: str | None = None
        self.http_status: int | None = None
        self.streamed = False
        self.compressed: str | None = None
        self.location: str | None = None
        self.retry_after: str | None = None
        self.reused = False
        self.keep_text = False
        self.connection: Connection | None = None
        self.read_at: list[int] = []
        """When the reads came that are in `reads`."""
        self.reads: list[bytes] = []
        """What was read and is not yet freed of its framing."""
        self.times: list[int] = []
        """When the reads came whose bytes are in `pieces`."""
        self.pieces: list[bytes] = []
        """Pieces of the body that are not yet parsed."""
        self.folded: int | None = None
        self.held = 0
        self.received = 0
        self.reply: Reply | None = None

    def end(self, ending: str, message: str | None = None) -> None:
        """Decide that it is over; the first call counts, and what was read by then may say otherwise."""
        if self.reads and self.connection is not None:
            self.connection.unframe()
        if self.ended is not None:
            return
        self.ended = monotonic_ns()
        self.ending, self.message = ending, message
        self.connection = None
        self.on_end(self)

    @property
    def last_read(self) -> int | None:
        """When the last byte of the answer came, as far as it is known without parsing."""
        if self.read_at or self.times:
            return (self.read_at or self.times)[-1]
        return self.folded or self.first_byte

    def fold(self) -> Reply:
        """Parse what was read so far."""
        if self.reads and self.connection is not None:
            self.connection.unframe()
        reply = self.reply = self.reply or Reply(self.streamed, self.keep_text)
        if self.times:
            reply.take(self.times, self.pieces)
            self.folded = self.times[-1]
            self.received += self.held
            self.times, self.pieces, self.held = [], [], 0
        return reply

    def outcome(self) -> tuple[Reply, Outcome]:
        """The whole reply, and what became of this attempt."""
        reply = self.fold()
        reply.close()
        status, slash, reason = self.ending.partition("/")
        outcome = Outcome(status, reason) if slash else judge(self.ending, self.http_status, reply)
        if self.compressed and outcome.status not in ("timeout", "cancelled"):
            outcome = Outcome("truncated", "compressed", f"the answer is encoded as {self.compressed}, unasked")
        elif self.location and outcome.status == "http_error":
            outcome = outcome._replace(message=f"redirect to {self.location}")
        return reply, outcome._replace(message=outcome.message or self.message)


class Connection:
    """One connection, one exchange at a time."""

    def __init__(self, pool: "Pool", opened: socket.socket, first: Exchange | None) -> None:
        """`first` is sent when the connection stands; without one it is a spare."""
        self._pool, self._loop = pool, pool.loop
        self._first, self._spare = first, first is None
        self._socket = opened
        self._recv = opened.recv
        self._tls = False
        self._waiting: select.poll
        self._parser: Any = None
        self._exchange: Exchange | None = None
        self._begin = b""  # of a response's header, as far as it came
        self._unsent = memoryview(b"")
        self._not_yet: tuple[type[OSError], ...] = (BlockingIOError, InterruptedError)
        self._limit: Timer | None = None
        self._lost = False
        self._at = 0
        self._headers = False  # the current response's headers are complete
        self._complete = False
        self._keep = False
        self._chunked = False
        self._inside = False  # a chunk
        self._deferred = False  # reads are kept as they are until the answer seems to end
        self.idle_since = 0
        self.served = 0

    # --- opening and closing -------------------------------------------------------------------------------------

    def connect(self, address: tuple[str, int], within: float) -> None:
        """Begin to connect; give up after so many seconds."""
        self._limit = self._loop.call_later(within, self._too_late, within)
        self._socket.setblocking(False)
        for level, name, value in OPTIONS:
            if hasattr(socket, name):
                self._socket.setsockopt(level, getattr(socket, name), value)
        error = self._socket.connect_ex(address)
        if error in (0, errno.EINPROGRESS):
            self._loop.watch(self._socket.fileno(), WRITE, self._connected)
        else:  # its sender is about it just now
            self._loop.call_soon(self._fail, OSError(error, os.strerror(error)))

    def _too_late(self, within: float) -> None:
        self._fail(TimeoutError(f"no connection in {within:g} s"))

    def _connected(self) -> None:
        error = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            self._fail(OSError(error, os.strerror(error)))
        elif self._pool.tls is None:
            self.take_over()
        else:
            self._begin_tls(self._pool.tls)

    def _begin_tls(self, tls: ssl.SSLContext) -> None:
        try:
            self._socket = wrapped = tls.wrap_socket(
                self._socket, server_hostname=self._pool.hostname, do_handshake_on_connect=False
            )
        except (OSError, ValueError) as error:
            self._fail(error)
            return
        self._recv, self._tls = wrapped.recv, True
        self._not_yet = (*self._not_yet, ssl.SSLWantReadError, ssl.SSLWantWriteError)

        def shake_hands() -> None:
            try:
                wrapped.do_handshake()
            except ssl.SSLWantReadError:
                self._loop.watch(wrapped.fileno(), READ, shake_hands)
            except ssl.SSLWantWriteError:
                self._loop.watch(wrapped.fileno(), WRITE, shake_hands)
            except (OSError, ValueError) as error:
                self._fail(error)
            else:
                self.take_over()

        shake_hands()

    def _fail(self, error: Exception) -> None:
        """The connection could not be opened. A spare one has nobody to tell: who misses it will open its own."""
        self.abort()
        if self._first is not None:
            self._first.end(*connect_failure(error))

    def take_over(self) -> None:
        """The socket is connected: use it."""
        self._waiting = select.poll()
        self._waiting.register(self._socket.fileno(), select.POLLIN)
        self._loop.watch(self._socket.fileno(), READ, self.readable)
        self._opened()
        first, self._first = self._first, None
        if first is None:
            self.idle_since = monotonic_ns()
            self._pool.idle.append(self)
        elif first.ended is None:
            self.send(first)
        else:
            self.abort()

    def abort(self) -> None:
        """Close at once, without waiting for anything."""
        if self._lost:
            return
        self._lost = True
        self._opened()
        self._loop.discard(self._socket)
        self._pool.connections.discard(self)  # among the idle ones it is found unusable
        self._parser = None  # it holds this connection: without the circle no garbage collector is needed

    def _opened(self) -> None:
        """It is not being opened any more."""
        if self._limit is not None:
            self._limit.cancel()
        self._pool.spares -= self._spare
        self._spare = False

    def fresh(self, now: int) -> bool:
        """Whether nothing is known against the connection, idle until now."""
        return not (self._lost or now - self.idle_since > IDLE_LIMIT)

    def usable(self, now: int) -> bool:
        """Whether the connection, idle until now, can be trusted with a request: it looks at the socket."""
        # Readable while idle: closed by the server, or talking out of turn.
        return self.fresh(now) and not self._waiting.poll(0)

    # --- writing -------------------------------------------------------------------------------------------------

    def send(self, exchange: Exchange) -> None:
        """Write the request. `sent` is the moment at which its last byte left user space."""
        self._exchange = exchange
        exchange.connection = self
        exchange.connected = monotonic_ns()
        exchange.reused = self.idle_since > 0
        self._begin = b""
        self._headers = self._complete = self._chunked = self._inside = self._deferred = False
        self._parser = httptools.HttpResponseParser(self)
        self._write(exchange, exchange.payload)

    def _write(self, exchange: Exchange, data: "bytes | memoryview[int]") -> None:
        try:
            count = self._socket.send(data)
        except self._not_yet:
            count = 0
        except OSError as error:
            self._loop.call_soon(self._lose, error)  # not while its sender is about it
            return
        if count == len(data):
            if exchange.first_byte is None:
                exchange.sent = monotonic_ns()
            if self._unsent:
                self._unsent = memoryview(b"")
                self._loop.watch(self._socket.fileno(), READ, self.readable)
            return
        if not self._unsent:
            self._loop.watch(self._socket.fileno(), READ | WRITE, self._ready)
        self._unsent = memoryview(data)[count:]

    def _ready(self) -> None:
        """While a request does not fit: to be read or to be written."""
        if self._exchange is not None:
            self._write(self._exchange, self._unsent)
        if not self._lost:
            self.readable()

    # --- reading -------------------------------------------------------------------------------------------------

    def readable(self) -> None:
        """There is something to read, or the other side is gone."""
        try:
            data = self._recv(AT_ONCE)
        except self._not_yet:
            return
        except OSError as error:
            self._lose(error)
            return
        at = monotonic_ns()
        exchange = self._exchange
        if not data:
            self._lose(None)
        elif exchange is None:
            self.abort()
        elif self._deferred:
            exchange.reads.append(data)
            exchange.read_at.append(at)
            exchange.held += len(data)
            if data[-4:] == b"\r\n\r\n" or len(data) < 8 or exchange.held > EARLY:
                self.unframe()
        else:
            self._feed(exchange, data, at)
            self._defer(data)
        if self._tls and not self._lost and self._socket.pending():  # type: ignore[attr-defined]
            self.readable()  # bytes that were decrypted with these; the socket will not tell of them

    def look(self, since: int) -> None:
        """Let the parser see what was kept, if nothing has come since then."""
        exchange = self._exchange
        if exchange is not None and exchange.reads and exchange.read_at[-1] < since:
            self.unframe()

    def unframe(self) -> None:
        """Free what was kept of its chunks' framing: in a few calls where it is the rest of an answer, in whole chunks,
        and else by the parser, which decides whether the answer is over."""
        exchange = self._exchange
        if exchange is None or not exchange.reads:
            return
        reads, times = exchange.reads, exchange.read_at
        exchange.reads, exchange.read_at = [], []
        rest = whole_chunks(times, reads) if self._deferred else None
        if rest is not None:
            exchange.times += rest[0]
            exchange.pieces += rest[1]
            self._complete = True
            self._release(exchange)
            return
        exchange.held -= sum(map(len, reads))
        for at, data in zip(times, reads, strict=True):
            if exchange.ended is None:
                self._feed(exchange, data, at)
        self._defer(reads[-1])

    def _defer(self, data: bytes) -> None:
        """Keep the next reads as they are, if `data` has brought the parser to the end of a chunk."""
        self._deferred = self._chunked and not self._inside and data[-2:] == b"\r\n"

    def _feed(self, exchange: Exchange, data: bytes, at: int) -> None:
        """Let the parser have what was read."""
        self._at = at
        if not self._headers:
            if exchange.first_byte is None:
                exchange.first_byte = at
                exchange.payload = b""
            self._begin += data
        try:
            self._parser.feed_data(data)  # which calls the on_… methods
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._keep = False
            if not self._complete:  # else the answer is whole, and what follows it is not ours
                said = "" if self._headers else f" (it begins with {self._begin[:40]!r})"
                self._give_up("bad_http", f"not HTTP: {error}{said}")
                return
        if self._complete:
            self._release(exchange)
        elif not self._headers:
            if len(self._begin) > HEADER_LIMIT:
                self._give_up("bad_http", f"more than {HEADER_LIMIT >> 10} KB of headers")
        elif exchange.held > EARLY:
            exchange.fold()
            if exchange.received > BODY_LIMIT:
                self._give_up("bad_http", f"endless answer: more than {BODY_LIMIT >> 20} MB")

    def on_message_begin(self) -> None:
        if self._complete:  # a second answer to one question
            self._keep = False

    def on_header(self, name: bytes, value: bytes) -> None:
        exchange = self._exchange
        if exchange is None or self._complete:  # bytes after the end of a response
            return
        key = name.lower()
        if key == b"content-type":
            exchange.streamed = value.strip().lower().startswith(b"text/event-stream")
        elif key == b"content-encoding":
            encoding = value.strip().lower()
            exchange.compressed = None if encoding in (b"", b"identity") else encoding.decode("latin-1")
        elif key == b"location":
            exchange.location = value.decode("latin-1")
        elif key == b"retry-after":
            exchange.retry_after = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200 or self._exchange is None or self._complete:  # 100 Continue and its like; a second answer
            return
        self._exchange.http_status = status
        self._headers = True
        self._keep = self._parser.should_keep_alive()

    def on_chunk_header(self) -> None:
        self._chunked = self._inside = True

    def on_chunk_complete(self) -> None:
        self._inside = False

    def on_body(self, body: bytes) -> None:
        exchange = self._exchange
        if exchange is not None and not self._complete:
            exchange.times.append(self._at)
            exchange.pieces.append(body)
            exchange.held += len(body)

    def on_message_complete(self) -> None:
        if not self._complete:
            self._complete = self._headers
            self._keep = self._parser.should_keep_alive()  # after this callback the parser has forgotten

    # --- the end -------------------------------------------------------------------------------------------------

    def _lose(self, error: OSError | None) -> None:
        """The other side has closed the connection, or it broke."""
        self.unframe()
        self.abort()
        exchange, self._exchange = self._exchange, None
        if exchange is None or exchange.ended is not None:
            return
        message = None if error is None else f"{type(error).__name__}: {error}"
        if exchange.first_byte is None:
            exchange.end("stale_reuse" if exchange.reused else "reset" if error else "eof_headers", message)
        elif not self._headers:
            exchange.end("eof_headers", message)
        else:
            exchange.end("reset" if error else "eof", message)

    def _release(self, exchange: Exchange) -> None:
        self._exchange = None
        self.served += 1
        if self._keep and not self._unsent:
            self.idle_since = exchange.times[-1] if exchange.times else self._at
            self._pool.idle.append(self)
        else:
            self.abort()
        exchange.end("complete")

    def _give_up(self, ending: str, message: str) -> None:
        exchange, self._exchange = self._exchange, None
        self.abort()
        if exchange is not None:
            exchange.end(ending, message)


_HEX = re.compile(rb"[0-9a-fA-F]{1,7}")


@lru_cache(4096)  # the chunks of a stream are of few sizes
def _size(digits: bytes) -> int:
    return int(digits, 16) if _HEX.fullmatch(digits) else -1


def whole_chunks(times: list[int], reads: list[bytes]) -> tuple[list[int], list[bytes]] | None:
    """The times and contents of the chunks in `reads`, if each read holds whole chunks and the last one the end.

    None for everything else: chunks with CR LF inside, extensions, trailers, bytes after the end.
    """
    parts = b"".join(reads).split(b"\r\n")  # size, content, size, content, … "0", "", ""
    if len(parts) < 3 or parts.pop():
        return None
    sizes, pieces = parts[::2], parts[1::2]
    lengths = list(map(len, pieces))
    if list(map(_size, sizes)) != lengths or lengths[-1] != 0 or lengths.index(0) != len(lengths) - 1:
        return None
    ends = list(accumulate(len(size) + length + 4 for size, length in zip(sizes, lengths, strict=True)))
    edges = list(accumulate(map(len, reads)))
    pieces.pop()
    first = len(edges) - 1
    if ends[:first] == edges[:first]:  # a chunk a read, but for the last read, which brings the end as well
        return times[:first] + times[-1:] * (len(pieces) - first), pieces
    if not set(edges) <= set(ends):
        return None
    stamps = [at for at, count in zip(times, _steps(edges, ends), strict=True) for _ in range(count)]
    return stamps[:-1], pieces


def _steps(edges: list[int], ends: list[int]) -> list[int]:
    """How many of `ends` lie in each of the spans that end at `edges`, which are among them."""
    places = [ends.index(edge) + 1 for edge in edges]
    return [place - before for before, place in pairwise([0, *places])]


class Pool:
    """Connections to one server. Opening one never blocks: the exchange that needs it goes out when it is there."""

    def __init__(
        self,
        loop: Loop,
        address: tuple[str, int],
        *,
        tls: "ssl.SSLContext | None" = None,
        hostname: str | None = None,
        connect_timeout: float = 10.0,
    ) -> None:
        self.loop, self.tls, self.hostname = loop, tls, hostname
        self._address, self._connect_timeout = address, connect_timeout
        self.spares = 0
        """Connections that are being opened and that no exchange waits for."""
        self.idle: list[Connection] = []  # youngest last
        self.connections: set[Connection] = set()
        """Also those that are being opened."""
        loop.call_later(LOOK, self._look)

    def send(self, exchange: Exchange, *, fresh: bool = False) -> None:
        """Send on the youngest usable idle connection, else (or if `fresh`) on a new one."""
        if not fresh:
            now = monotonic_ns()
            while self.idle:
                connection = self.idle.pop()
                if connection.usable(now):
                    connection.send(exchange)
                    return
                connection.abort()
        self._start(exchange)

    def prepare(self, wanted: int) -> None:
        """See to it that `wanted` connections are idle or on their way: the next sends then need not wait for one."""
        now = monotonic_ns()
        ready = sum(connection.fresh(now) for connection in self.idle[-wanted:]) if wanted else 0
        for _ in range(min(OPENED_AT_ONCE, wanted - ready - self.spares)):
            self._start(None)

    def _start(self, exchange: Exchange | None) -> None:
        try:
            opened = socket.socket(socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET)
        except OSError as error:
            if exchange is not None:
                self.loop.call_soon(exchange.end, *connect_failure(error))  # its sender is about it just now
            return
        connection = Connection(self, opened, exchange)
        self.spares += exchange is None
        self.connections.add(connection)
        connection.connect(self._address, self._connect_timeout)

    def _look(self) -> None:
        """Look at answers that have brought nothing for a while, in case their end was an odd one."""
        since = monotonic_ns() - QUIET
        for connection in list(self.connections):
            connection.look(since)
        self.loop.call_later(LOOK, self._look)

    def close(self) -> None:
        """Close everything."""
        for connection in list(self.connections):
            connection.abort()


def connect_failure(error: Exception) -> tuple[str, str]:
    """`status/reason` and the message for what went wrong while a connection was opened."""
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, TimeoutError):
        return "timeout/connect", message
    if isinstance(error, ssl.SSLError | ssl.CertificateError):
        return "refused/tls", message
    if isinstance(error, socket.gaierror):
        return "refused/dns", message
    if isinstance(error, OSError):
        if error.errno == errno.EADDRNOTAVAIL:
            return "client_fault/ports", message
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return "client_fault/files", message
        if isinstance(error, ConnectionResetError):
            return "reset/reset", message
        return "refused/refused" if isinstance(error, ConnectionRefusedError) else "refused/unreachable", message
    return "client_fault/internal", message
