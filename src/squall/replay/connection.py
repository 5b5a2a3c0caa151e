"""One HTTP/1.1 connection as a raw asyncio Protocol, and the pool of them.

A read of a streamed answer is stamped, freed of its framing by httptools and appended, and nothing else: what its
events say is read when the answer is complete (`stream.Reply.take`).

A server may close a connection that it promised to keep: the pool takes the youngest idle connection, retires the old
ones before servers do, and looks at the socket before it reuses one. What still fails so is `stale_reuse`.
"""

import asyncio
import errno
import select
import socket
import ssl
from collections.abc import Callable
from time import monotonic_ns
from typing import Any, cast

import httptools

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
DEAD_PEER = (
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
        self.times: list[int] = []
        """When the reads came whose bytes are in `pieces`."""
        self.pieces: list[bytes] = []
        """Pieces of the body that are not yet parsed."""
        self.folded: int | None = None
        self.held = 0
        self.received = 0
        self.reply: Reply | None = None

    def end(self, ending: str, message: str | None = None) -> None:
        """Decide that it is over; the first call counts."""
        if self.ended is not None:
            return
        self.ended = monotonic_ns()
        self.ending, self.message = ending, message
        self.connection = None
        self.on_end(self)

    @property
    def last_read(self) -> int | None:
        """When the last byte of the answer came, as far as it is known without parsing."""
        if self.times:
            return self.times[-1]
        return self.folded or self.first_byte

    def fold(self) -> Reply:
        """Parse what was read so far."""
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


class Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self, pool: "Pool", first: Exchange | None) -> None:
        self._pool = pool
        self._first = first
        self._spare = first is None
        self._transport: asyncio.Transport
        self._waiting: select.poll
        self._parser: Any = httptools.HttpResponseParser(self)
        self._exchange: Exchange | None = None
        self._begin = b""  # of a response's header, as far as it came
        self._paused = False
        self._lost = False
        self._at = 0
        self._headers = False  # the current response's headers are complete
        self._complete = False
        self._keep = False
        self.idle_since = 0
        self.served = 0

    def send(self, exchange: Exchange) -> None:
        """Write the request. `sent` is the moment at which its last byte left user space."""
        self._exchange = exchange
        exchange.connection = self
        exchange.connected = monotonic_ns()
        exchange.reused = self.idle_since > 0
        self._begin = b""
        self._headers = self._complete = False
        self._transport.write(exchange.payload)
        if not self._paused:
            exchange.sent = monotonic_ns()

    def fresh(self, now: int) -> bool:
        """Whether nothing is known against the connection, idle until now."""
        return not (self._lost or self._transport.is_closing() or now - self.idle_since > IDLE_LIMIT)

    def usable(self, now: int) -> bool:
        """Whether the connection, idle until now, can be trusted with a request: it looks at the socket."""
        # Readable while idle: closed by the server, or talking out of turn.
        return self.fresh(now) and not self._waiting.poll(0)

    def abort(self) -> None:
        """Close at once, without waiting for anything."""
        if not self._lost:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        handle = transport.get_extra_info("socket")
        self._waiting = select.poll()
        self._waiting.register(handle.fileno(), select.POLLIN)
        for level, name, value in DEAD_PEER:
            if hasattr(socket, name):
                handle.setsockopt(level, getattr(socket, name), value)
        if transport.get_extra_info("sslcontext") is None:
            # With a high-water mark of 0 the loop writes at once, and says (pause, resume) when a request did not fit.
            # A TLS transport would always pause; there `sent` is when the request was encrypted and handed on.
            self._transport.set_write_buffer_limits(high=0)
        self._pool.connections.add(self)
        first, self._first = self._first, None
        if first is not None and first.ended is None:
            self.send(first)
        elif self._spare:
            self.idle_since = monotonic_ns()
            self._pool.idle.append(self)
        else:
            self.abort()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        exchange = self._exchange
        if exchange is not None and exchange.sent is None and exchange.first_byte is None:
            exchange.sent = monotonic_ns()

    def data_received(self, data: bytes) -> None:
        self._at = at = monotonic_ns()
        exchange = self._exchange
        if exchange is None:
            self.abort()
            return
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

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.forget(self)
        self._lost = True
        exchange = self._exchange
        self._parser = None  # it holds this connection: without the circle no garbage collector is needed
        self._exchange = None
        if exchange is None or exchange.ended is not None:
            return
        exchange.connection = None
        message = None if exc is None else f"{type(exc).__name__}: {exc}"
        if exchange.first_byte is None:
            exchange.end("stale_reuse" if exchange.reused else "reset" if exc else "eof_headers", message)
        elif not self._headers:
            exchange.end("eof_headers", message)
        elif self._complete:
            exchange.end("complete")
        else:
            exchange.end("reset" if exc else "eof", message)

    def _release(self, exchange: Exchange) -> None:
        self._exchange = None
        self.served += 1
        if self._keep and not self._paused:
            self.idle_since = self._at
            self._pool.idle.append(self)
        else:
            self._transport.close()
        exchange.end("complete")

    def _give_up(self, ending: str, message: str) -> None:
        exchange, self._exchange = self._exchange, None
        self.abort()
        if exchange is not None:
            exchange.end(ending, message)


class Pool:
    """Connections to one server. Opening one never blocks: the exchange that needs it goes out when it is there."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        address: tuple[str, int],
        *,
        tls: ssl.SSLContext | None = None,
        hostname: str | None = None,
        connect_timeout: float = 10.0,
    ) -> None:
        self._loop, self._address, self._tls, self._hostname = loop, address, tls, hostname
        self._connect_timeout = connect_timeout
        self._opening: set[asyncio.Task[None]] = set()
        self._spares = 0  # among the opening ones
        self.idle: list[Connection] = []  # youngest last
        self.connections: set[Connection] = set()

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
        for _ in range(min(OPENED_AT_ONCE, wanted - ready - self._spares)):
            self._spares += 1
            self._start(None)

    def _start(self, exchange: Exchange | None) -> None:
        task = self._loop.create_task(self._open(exchange))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    def forget(self, connection: Connection) -> None:
        """The connection is gone. Where it lies among the idle ones, `send` finds it unusable."""
        self.connections.discard(connection)

    def close(self) -> None:
        """Close everything."""
        for task in self._opening:
            task.cancel()
        for connection in list(self.connections):
            connection.abort()

    async def _open(self, exchange: Exchange | None) -> None:
        try:
            async with asyncio.timeout(self._connect_timeout):
                await self._loop.create_connection(
                    lambda: Connection(self, exchange),
                    *self._address,
                    ssl=self._tls,
                    server_hostname=self._hostname if self._tls else None,
                )
        except (OSError, ValueError) as error:
            # A spare one has nobody to tell: the request that misses it will open its own, and fail or not.
            if exchange is not None:
                exchange.end(*connect_failure(error))
        finally:
            self._spares -= exchange is None


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
