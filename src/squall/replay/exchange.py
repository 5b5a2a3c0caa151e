"""One attempt at a request, and the reading of the header of its answer: what every kind of connection has in common.

A server may close a connection that it promised to keep: a pool takes the youngest idle connection, retires the old
ones before servers do, and looks at the socket before it reuses one. What still fails so is `stale_reuse`.
"""

import errno
import socket
import ssl
from abc import ABC, abstractmethod
from collections.abc import Callable
from time import monotonic_ns
from typing import Any, NamedTuple

import httptools

from squall.replay.stream import Outcome, Reply, judge

IDLE_LIMIT = 4_000_000_000
"""Nanoseconds after which an idle connection is not used again: uvicorn, and so vLLM, closes after 5 s."""
OPENED_AT_ONCE = 8
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


def watch_for_death(connected: socket.socket) -> None:
    """Have the system look after the peer of an open connection."""
    for level, name, value in DEAD_PEER:
        if hasattr(socket, name):
            connected.setsockopt(level, getattr(socket, name), value)


class Part(NamedTuple):
    """Pieces of a body as a socket's compiled half leaves them."""

    body: bytes
    """The pieces, one behind the other."""
    marks: list[int]
    """Of each piece its time and its end."""
    plain: bool
    """Each is one event, and the ends of tokens are negative: see `reading.read_events`."""


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
        "parts",
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
        self.connection: Answering | None = None
        self.times: list[int] = []
        """When the reads came whose bytes are in `pieces`."""
        self.pieces: list[bytes] = []
        """Pieces of the body that are not yet parsed."""
        self.parts: list[Part] = []
        """The same, from another kind of connection."""
        self.folded: int | None = None
        self.held = 0
        self.received = 0
        self.reply: Reply | None = None

    def end(self, ending: str, message: str | None = None, at: int | None = None) -> None:
        """Decide that it is over, since `at` or now; the first call counts."""
        if self.ended is not None:
            return
        self.ended = at or monotonic_ns()
        if self.connection is not None:
            self.connection.hand_over()
        self.ending, self.message = ending, message
        self.connection = None
        self.on_end(self)

    @property
    def last_read(self) -> int | None:
        """When the last byte of the answer came, as far as it is known without parsing."""
        if self.times:
            return self.times[-1]
        read = None if self.connection is None else self.connection.last_read
        return read or self.folded or self.first_byte

    def fold(self) -> Reply:
        """Parse what was read so far."""
        if self.connection is not None:
            self.connection.hand_over()
        reply = self.reply = self.reply or Reply(self.streamed, self.keep_text)
        if self.parts:
            for part in self.parts:
                reply.take_part(*part)
            self.folded = self.parts[-1].marks[-2]
            self.received += self.held
            self.parts, self.held = [], 0
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


class Answering(ABC):
    """A connection as far as it reads answers, one at a time: their header, by httptools, and how they end."""

    def __init__(self) -> None:
        self._exchange: Exchange | None = None
        self._parser: Any = None
        self._begin = b""  # of a response's header, as far as it came
        self._headers = False  # the current response's headers are complete
        self._complete = False
        self._keep = False
        self.idle_since = 0
        self.served = 0

    @abstractmethod
    def abort(self) -> None:
        """Close at once, without waiting for anything."""

    def hand_over(self) -> None:  # noqa: B027 - most connections keep nothing
        """Put what was read of the answer, and is kept here, into the exchange."""

    @property
    def last_read(self) -> int | None:
        """When bytes of the body were read last, where that is known here."""
        return None

    def _ask(self, exchange: Exchange) -> None:
        """What comes from now on answers this."""
        self._exchange = exchange
        exchange.connection = self
        exchange.connected = monotonic_ns()
        exchange.reused = self.idle_since > 0
        self._begin = b""
        self._headers = self._complete = False

    def _feed(self, data: bytes) -> bool:
        """Have the parser read, which calls the on_… methods; whether the exchange goes on."""
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._keep = False
            if not self._complete:  # else the answer is whole, and what follows it is not ours
                said = "" if self._headers else f" (it begins with {self._begin[:40]!r})"
                self._give_up("bad_http", f"not HTTP: {error}{said}")
                return False
        return True

    def _grown(self, exchange: Exchange) -> None:
        """See to it that no answer takes all memory."""
        if not self._headers:
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

    def on_message_complete(self) -> None:
        if not self._complete:
            self._complete = self._headers
            self._keep = self._parser.should_keep_alive()  # after this callback the parser has forgotten

    def _gone(self, error: Exception | None) -> None:
        """The connection is over: what that means for its exchange."""
        exchange = self._exchange
        self._parser = None  # it holds this connection: without the circle no garbage collector is needed
        self._exchange = None
        if exchange is None or exchange.ended is not None:
            return
        exchange.connection = None
        message = None if error is None else f"{type(error).__name__}: {error}"
        if exchange.first_byte is None:
            exchange.end("stale_reuse" if exchange.reused else "reset" if error else "eof_headers", message)
        elif not self._headers:
            exchange.end("eof_headers", message)
        elif self._complete:
            exchange.end("complete")
        else:
            exchange.end("reset" if error else "eof", message)

    def _give_up(self, ending: str, message: str) -> None:
        self.hand_over()
        exchange, self._exchange = self._exchange, None
        self.abort()
        if exchange is not None:
            exchange.end(ending, message)


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
