"""HTTP/1.1 for thousands of streams: a raw asyncio protocol that takes requests and writes prepared bytes.

Every token of a stream is one write of bytes made before, without a task or a queue of its own. Everything that a
client can make large or slow has a limit: heads, bodies, the time a request takes to come in, what it leaves unread.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from time import monotonic_ns
from typing import Any, cast

import httptools
import msgspec

HEAD_LIMIT = 1 << 16
"""Bytes of a request's line and headers."""
READ_LIMIT = 20.0
"""Seconds in which a request must have come in, once it has begun."""
IDLE_LIMIT = 75.0
UNREAD_LIMIT = 1 << 20
"""Bytes of an answer that a client may leave unread before it is cut off."""
PIPELINE_LIMIT = 8

_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    411: "Length Required",
    413: "Content Too Large",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}
_STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
_STREAM_CLOSE = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"connection: close\r\n\r\n"
)


class Request:
    """One request, whole, and the way to answer it."""

    __slots__ = ("_begun", "_chunked", "_connection", "arrived", "body", "keep", "method", "on_gone", "over", "path")

    def __init__(
        self, connection: "Connection", method: str, path: str, body: bytes, keep: bool, chunked: bool
    ) -> None:
        self._connection = connection
        self.method, self.path, self.body = method, path, body
        self.keep, self._chunked = keep, chunked
        self.arrived = monotonic_ns()
        """When its last byte was read."""
        self.over = False
        self._begun = False
        self.on_gone: Callable[[], None] | None = None
        """Called if the client goes away before the answer is complete."""

    def answer(self, status: int, body: bytes, content_type: str = "application/json", **headers: str) -> None:
        """The whole answer."""
        if self.over:
            return
        extra = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        keep = "" if self.keep else "connection: close\r\n"
        head = (
            f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: {content_type}\r\n"
            f"content-length: {len(body)}\r\n{extra}{keep}\r\n"
        )
        self._connection.write(head.encode() + (b"" if self.method == "HEAD" else body))
        self._end()

    def write(self, data: bytes) -> None:
        """A further piece of a stream that has begun, framed by `frame`: the way of every single token."""
        self._connection.transport.write(data)

    def events(self, data: bytes, last: bool = False) -> None:
        """Server-sent events, framed by `frame`; the first call sends the head."""
        if self.over:
            return
        if not self._begun:
            self._begun = True
            data = (_STREAM if self._chunked and self.keep else _STREAM_CLOSE) + data
            self.keep = self.keep and self._chunked
        self._connection.write(data + (b"0\r\n\r\n" if last and self.keep else b""))
        if last:
            self._end()

    def frame(self, data: bytes) -> bytes:
        """`data` as it goes over the wire within `events`."""
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunked and self.keep else data

    @property
    def flushed(self) -> bool:
        """Whether the system has taken all that was written: `fileno` may then be written to directly."""
        transport = self._connection.transport
        return not self.over and not transport.is_closing() and transport.get_write_buffer_size() == 0

    @property
    def fileno(self) -> int:
        """Its connection's descriptor; it is open until `on_gone` is called."""
        return int(self._connection.transport.get_extra_info("socket").fileno())

    @property
    def begun(self) -> bool:
        """Whether the head of a stream was sent."""
        return self._begun

    def cut(self) -> None:
        """Close without another byte, as a server that fails in mid-stream."""
        if not self.over:
            self.over = True
            self._connection.abort()

    def _end(self) -> None:
        self.over = True
        self.on_gone = None
        self._connection.answered(self.keep)


class Connection(asyncio.Protocol):
    """A client's connection; its requests are answered one after the other."""

    def __init__(self, handle: Callable[[Request], None], connections: "set[Connection]", body_limit: int) -> None:
        self._handle, self._connections, self._body_limit = handle, connections, body_limit
        self.transport: asyncio.Transport
        self._parser = httptools.HttpRequestParser(self)
        self._waiting: deque[Request] = deque()
        self._current: Request | None = None
        self._closing = False
        self.since = monotonic_ns()
        """When the request that comes in began, or the connection became idle."""
        self._unheaded = 0
        self._clear()

    def _clear(self) -> None:
        self._path, self._head, self._body = b"", 0, bytearray()
        self._incoming = self._headed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=UNREAD_LIMIT)
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        self._closing = True
        self._waiting.clear()
        del self._parser  # a circle
        current, self._current = self._current, None
        if current is not None:
            current.over = True
            if current.on_gone is not None:
                current.on_gone()

    def pause_writing(self) -> None:
        """The client does not read: a server would hold its answer in memory for ever."""
        self.abort()

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        self._unheaded += len(data)  # the parser itself keeps an unfinished header, however long
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse(400, "no other protocol is spoken here")
        except httptools.HttpParserError as error:
            self._refuse(400, f"this is not an HTTP request ({error})")
        if self._headed:
            self._unheaded = 0
        elif self._unheaded > HEAD_LIMIT:
            self._refuse(431, f"the head of a request may have {HEAD_LIMIT:,} bytes")

    def on_headers_complete(self) -> None:
        self._headed = True

    def on_message_begin(self) -> None:
        self._clear()
        self._incoming, self.since = True, monotonic_ns()

    def on_url(self, url: bytes) -> None:
        self._path += url
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        if name.lower() == b"expect" and value.lower() == b"100-continue" and not self._closing:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if name.lower() == b"content-length" and value.isdigit() and int(value[:12]) > self._body_limit:
            self._refuse(413, f"a body may have {self._body_limit:,} bytes")

    def on_body(self, body: bytes) -> None:
        if self._closing:
            return
        if len(self._body) + len(body) > self._body_limit:
            self._refuse(413, f"a body may have {self._body_limit:,} bytes")
        else:
            self._body += body

    def on_message_complete(self) -> None:
        if self._closing:
            return
        path = self._path.decode("latin-1").partition("?")[0]
        parser = self._parser
        new = parser.get_http_version() == "1.1"
        request = Request(
            self, parser.get_method().decode("latin-1"), path, bytes(self._body), parser.should_keep_alive(), new
        )
        self._clear()
        if len(self._waiting) >= PIPELINE_LIMIT:
            self.abort()
            return
        self._waiting.append(request)
        self._go_on()

    def write(self, data: bytes) -> None:
        """Hand bytes to the transport."""
        if not self._closing:
            self.transport.write(data)

    def answered(self, keep: bool) -> None:
        """The current request has its answer."""
        self._current = None
        self.since = monotonic_ns()
        if not keep:
            self._closing = True
            self._waiting.clear()
            self.transport.close()
        else:
            self._go_on()

    def abort(self) -> None:
        """Close at once."""
        self._closing = True
        self.transport.abort()

    def close_if_slow(self, now: int) -> None:
        """Give up a request that does not come in, and an idle connection."""
        age = (now - self.since) / 1e9
        if self._incoming and age > READ_LIMIT:
            self._refuse(408, "the request took too long to come in")
        elif not self._incoming and self._current is None and age > IDLE_LIMIT:
            self.abort()

    def _go_on(self) -> None:
        if self._current is None and self._waiting:
            self._current = self._waiting.popleft()
            self._handle(self._current)

    def _count(self, size: int) -> None:
        self._head += size
        if self._head > HEAD_LIMIT:
            self._refuse(431, f"the head of a request may have {HEAD_LIMIT:,} bytes")

    def _refuse(self, status: int, message: str) -> None:
        if self._closing:
            return
        if self._current is None:
            Request(self, "GET", "", b"", False, True).answer(status, error_body(status, message))
        else:  # an answer is under way: nothing else can be said
            self.abort()


_KINDS = {400: "BadRequestError", 404: "NotFoundError", 429: "RateLimitError", 503: "ServiceUnavailableError"}


def error_body(status: int, message: str, param: str | None = None) -> bytes:
    """An error as the OpenAI API has it."""
    kind = _KINDS.get(status, "InternalServerError" if status >= 500 else "BadRequestError")
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": status}})


async def listen(
    handle: Callable[[Request], None], host: str, port: int, *, body_limit: int, connection_limit: int
) -> tuple[asyncio.Server, "set[Connection]", int]:
    """Serve at `host`:`port` (0: any free one); returns the server, its open connections and its port."""
    connections: set[Connection] = set()

    def make() -> asyncio.Protocol:
        if len(connections) >= connection_limit:
            return _TooMany()
        return Connection(handle, connections, body_limit)

    server = await asyncio.get_running_loop().create_server(make, host, port, backlog=4096)
    return server, connections, server.sockets[0].getsockname()[1]


class _TooMany(asyncio.Protocol):
    """One connection more than there may be."""

    def connection_made(self, transport: Any) -> None:
        body = error_body(503, "too many connections")
        head = f"HTTP/1.1 503 Service Unavailable\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        with contextlib.suppress(OSError):
            transport.write(head.encode() + body)
        transport.close()
