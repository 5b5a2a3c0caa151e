"""The relay: a client's connection, the upstream's, and between them bytes that are passed on as they come.

A request is read whole, because its limits are checked and its head is written anew (what httptools did not
understand goes no further: no smuggling); an answer is passed on read by read, and only looked at. Two things are
changed: `Accept-Encoding` becomes `identity`, since compressed streams tell nothing, and the usage that the proxy
asked for is taken out of the stream again.
"""

import asyncio
import re
import ssl
from collections import deque
from collections.abc import Callable
from time import monotonic, monotonic_ns
from typing import cast
from urllib.parse import urlsplit

import httptools
import msgspec

from squall.capture.asked import Asked, Hasher, answer_number, asked, recorded_path
from squall.capture.conversations import Conversations
from squall.capture.gauges import Gauges
from squall.capture.record import Captured, Recorder
from squall.replay.stream import Reply, judge

IDLE_LIMIT = 4.0
"""Seconds after which an idle upstream connection is not used again: uvicorn, and so vLLM, closes after 5 s."""
CLIENT_IDLE = 75.0
"""Seconds that a client's connection may lie idle."""
SLOWEST_HEAD = 20.0
"""Seconds that a client has to send a request's head, and then for each megabyte of its body."""
CONNECT_TIMEOUT = 10.0
PIPELINE = 16
"""Requests that a client may send ahead of their answers before it is no longer read."""
DOCUMENT_LIMIT = 1 << 24
"""Bytes of an answer in one document that are looked at; a longer one is passed on unread."""
EVENT_LIMIT = 1 << 20
HEADER_LIMIT = 1 << 18
OWN = "/squall/"
"""Paths that the proxy answers itself."""

_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"expect")
)
_REWRITTEN = frozenset((b"host", b"content-length", b"accept-encoding"))
_EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_NULL_USAGE = re.compile(rb',\s*"usage"\s*:\s*null')
_RESPONSE_ID = re.compile(rb'"id"\s*:\s*"(resp_[\w-]{1,128})"')
_HEAD_END = b"\r\n\r\n"
_REASONS = {
    400: "Bad Request",
    404: "Not Found",
    413: "Content Too Large",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    408: "Request Timeout",
    501: "Not Implemented",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}


class _Identity(msgspec.Struct):
    id: str | None = None


class Settings(msgspec.Struct, kw_only=True, frozen=True):
    """Limits and choices of a capture."""

    upstream: str
    ask_usage: bool = True
    prefix: bool = True
    service: str | None = None
    timeout: float = 600.0
    max_body: int = 64 << 20
    max_connections: int = 10_000
    rate_limit: float | None = None


class Relay:
    """What all connections of a capture share."""

    def __init__(
        self, settings: Settings, recorder: Recorder, hasher: Hasher, zero: int, tls: ssl.SSLContext | None
    ) -> None:
        self.settings, self.recorder, self.hasher, self.zero, self.tls = settings, recorder, hasher, zero, tls
        parts = urlsplit(settings.upstream)
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.base = parts.path.rstrip("/")
        self.authority = parts.netloc.rpartition("@")[2].encode("latin-1")
        self.conversations = Conversations()
        self.gauges = Gauges(recorder)
        self.clients: set[Client] = set()
        self.idle: list[Upstream] = []  # youngest last
        self.opening: set[asyncio.Task[None]] = set()
        self.draining = False
        self._tokens, self._refilled = settings.rate_limit or 0.0, monotonic()

    def admitted(self) -> bool:
        """Whether the rate limit lets one more request through: a token bucket that holds one second's worth."""
        limit = self.settings.rate_limit
        if limit is None:
            return True
        now = monotonic()
        self._tokens = min(max(limit, 1.0), self._tokens + (now - self._refilled) * limit)
        self._refilled = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def forward(self, exchange: "Exchange", *, fresh: bool = False) -> None:
        """Send it on an idle connection of the upstream, else (or if `fresh`) on a new one."""
        now = monotonic()
        while self.idle and not fresh:
            upstream = self.idle.pop()
            if upstream.usable and now - upstream.idle_since < IDLE_LIMIT:
                upstream.send(exchange)
                return
            upstream.abort()
        task = asyncio.get_running_loop().create_task(self._open(exchange))
        self.opening.add(task)
        task.add_done_callback(self.opening.discard)

    async def _open(self, exchange: "Exchange") -> None:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await asyncio.get_running_loop().create_connection(
                    lambda: Upstream(self, exchange),
                    self.host,
                    self.port,
                    ssl=self.tls,
                    server_hostname=self.host if self.tls else None,
                )
        except TimeoutError:
            exchange.fail(504, "timeout", "connect", "the upstream did not accept the connection in time")
        except OSError as error:
            kind = "tls" if isinstance(error, ssl.SSLError) else "refused"
            exchange.fail(502, "refused", kind, "the upstream cannot be reached")

    def sweep(self) -> None:
        """Once a second: end what took too long, and let go of idle connections."""
        now = monotonic()
        for client in list(self.clients):
            client.check(now, self.settings.timeout)
        while self.idle and now - self.idle[0].idle_since >= IDLE_LIMIT:
            self.idle.pop(0).abort()

    def close(self) -> None:
        """Close every connection."""
        for client in list(self.clients):
            client.abort()
        for upstream in self.idle:
            upstream.abort()
        for task in self.opening:
            task.cancel()


class Exchange:
    """One request and its answer on their way."""

    __slots__ = (
        "arrival",
        "asked",
        "client",
        "close_after",
        "done",
        "first_byte",
        "head",
        "http_status",
        "kind",
        "last_heard",
        "passed",
        "place",
        "relay",
        "reply",
        "sent",
        "upstream",
        "version",
    )

    def __init__(self, relay: Relay, client: "Client", arrival: int) -> None:
        self.relay, self.client, self.arrival = relay, client, arrival
        self.kind: str | None = None
        self.asked = Asked()
        self.place: tuple[int | None, int | None] = (None, None)
        self.head = b""
        self.version = "1.1"
        self.close_after = False
        self.upstream: Upstream | None = None
        self.sent: int | None = None
        self.first_byte: int | None = None
        self.http_status: int | None = None
        self.passed = False
        """Bytes of the answer have gone to the client: nothing else can be said to it any more."""
        self.reply: Reply | None = None
        self.last_heard = monotonic()
        self.done = False

    def fail(self, code: int, status: str, reason: str, text: str) -> None:
        """End it for a reason of the proxy's: an error of our own if none of the answer has gone out, else a cut."""
        if self.done:
            return
        self.finish(status, reason, code)
        if self.passed:
            self.client.abort()
        else:
            self.client.answer(code, text)

    def finish(self, status: str, reason: str | None, code: int | None = None) -> None:
        """Decide the outcome, once, and record it."""
        if self.done:
            return
        self.done = True
        ended = monotonic_ns()
        upstream, self.upstream = self.upstream, None
        if upstream is not None:
            upstream.drop()
            if self.reply is not None:
                self.reply.close(ended)
        gauges = self.relay.gauges
        gauges.in_flight -= 1
        if self.kind is None:
            gauges.passed += 1
            return
        record = self._record(status, reason, code, ended)
        gauges.count(record)
        self.relay.recorder.take(record)

    def _record(self, status: str, reason: str | None, code: int | None, ended: int) -> Captured:
        zero, reply, said = self.relay.zero, self.reply, self.asked

        def at(moment: int | None) -> float | None:
            return None if moment is None else (moment - zero) / 1e9

        chunks = reply.chunks if reply is not None else []
        tokens = reply.response_tokens if reply is not None else None
        source = "server" if tokens is not None else None
        if tokens is None and chunks and reply is not None:
            tokens, source = reply.pieces, "chunks"
        session, turn = self.place
        return Captured(
            arrival=(self.arrival - zero) / 1e9,
            sent=at(self.sent),
            first_byte=at(self.first_byte),
            first_token=at(chunks[0] if chunks else None),
            last_token=at(chunks[-1] if chunks else None),
            done=at(reply.done if reply is not None else None),
            ended=(ended - zero) / 1e9,
            status=status,
            reason=reason,
            http_status=self.http_status if self.http_status is not None else code,
            model=said.model,
            service=self.relay.settings.service,
            request_tokens=reply.prompt_tokens if reply is not None else None,
            response_tokens=tokens,
            token_source=source,
            cached_tokens=reply.cached_tokens if reply is not None else None,
            prompt_bytes=said.prompt_bytes,
            client=said.client,
            session=session,
            turn=turn,
            prefix=said.blocks,
        )


class Client(asyncio.Protocol):
    """One connection of a client: requests in order, each answered before the next is sent on."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._transport: asyncio.Transport
        self._parser = httptools.HttpRequestParser(self)
        self._exchange: Exchange | None = None
        self._queue: deque[Exchange] = deque()
        self._reading: Exchange | None = None  # the request that is being read
        self._since = monotonic()
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []
        self._read = 0
        self._at = 0
        self._refused = False
        self._lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if len(self._relay.clients) >= self._relay.settings.max_connections:
            self.answer(503, "the proxy has as many connections as it may have", close=True)
            return
        self._relay.clients.add(self)

    def data_received(self, data: bytes) -> None:
        if self._refused or self._lost:
            return
        self._at = monotonic_ns()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._refuse(400, "this is not an HTTP/1.1 request")
        if len(self._queue) >= PIPELINE:
            self._transport.pause_reading()

    # What the parser says, in this order.

    def on_message_begin(self) -> None:
        self._reading = Exchange(self._relay, self, self._at)
        self._since = monotonic()
        self._url = b""
        self._headers, self._body, self._read = [], [], 0

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._weigh(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))
        self._weigh(len(name) + len(value) + 4)

    def on_headers_complete(self) -> None:
        self._read = 0
        if self._parser.should_upgrade():
            self._refuse(501, "protocol upgrades are not relayed")
            return
        for name, value in self._headers:
            if name.lower() == b"expect" and value.lower() == b"100-continue":
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._read += len(body)
        if self._read > self._relay.settings.max_body:
            self._refuse(413, f"the body is larger than {self._relay.settings.max_body} bytes")
        elif not self._refused:
            self._body.append(body)

    def on_message_complete(self) -> None:
        exchange, self._reading = self._reading, None
        if exchange is None or self._refused:
            return
        exchange.version = self._parser.get_http_version()
        exchange.close_after = not self._parser.should_keep_alive()
        self._prepare(exchange, self._parser.get_method())
        self._queue.append(exchange)
        self._next()

    def _weigh(self, size: int) -> None:
        self._read += size
        if self._read > HEADER_LIMIT:
            self._refuse(431, "the request's head is too large")

    def _prepare(self, exchange: Exchange, method: bytes) -> None:
        """Read off the request what is recorded, and write its head for the upstream."""
        relay, settings = self._relay, self._relay.settings
        path = self._url.decode("latin-1")
        if path.startswith(("http://", "https://")):  # absolute form: the authority is ours to name
            parts = urlsplit(path)
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        body = b"".join(self._body)
        kind = recorded_path(path) if method == b"POST" else None
        names = {name.decode("latin-1").lower(): value for name, value in self._headers}
        if kind is not None:
            exchange.kind = kind
            exchange.asked = said = asked(
                kind, body, names, relay.hasher, ask_usage=settings.ask_usage, prefix=settings.prefix
            )
            exchange.place = relay.conversations.place(said)
            body = said.body
        lines = [b"%s %s HTTP/%s" % (method, (relay.base + path).encode("latin-1"), exchange.version.encode())]
        named = [word.strip().lower() for word in names.get("connection", b"").split(b",")]  # of this hop too
        for name, value in self._headers:
            low = name.lower()
            if low not in _HOP_BY_HOP and low not in _REWRITTEN and low not in named:
                lines.append(b"%s: %s" % (name, value))
        lines += [b"Host: " + relay.authority, b"Accept-Encoding: identity"]
        if exchange.version == "1.0":
            lines.append(b"Connection: close")
        if body or method not in (b"GET", b"HEAD", b"DELETE", b"OPTIONS"):
            lines.append(b"Content-Length: %d" % len(body))
        exchange.head = b"\r\n".join(lines) + _HEAD_END + body
        self._body = []

    def _next(self) -> None:
        if self._exchange is not None or not self._queue or self._lost:
            return
        exchange = self._exchange = self._queue.popleft()
        if len(self._queue) < PIPELINE:
            self._transport.resume_reading()
        relay = self._relay
        exchange.last_heard = monotonic()
        path = exchange.head.split(b" ", 2)[1]
        own = (relay.base + OWN).encode("latin-1")
        if path.startswith(own):
            self._answer_own(path[len(own) :])
            return
        relay.gauges.arrived(exchange.arrival if exchange.kind else None)
        if relay.draining:
            exchange.close_after = True
        if not relay.admitted():
            exchange.fail(429, "http_error", "rate_limit", "more requests a second than --rate-limit allows")
            return
        relay.forward(exchange)

    def _answer_own(self, what: bytes) -> None:
        exchange = self._exchange
        if exchange is not None:
            exchange.done = True
        name = what.partition(b"?")[0]
        if name == b"metrics":
            self._reply(200, self._relay.gauges.text().encode(), b"text/plain; version=0.0.4")
        elif name == b"health":
            draining = self._relay.draining
            self._reply(503 if draining else 200, b'{"status":"%s"}' % (b"draining" if draining else b"ok"))
        else:
            self._reply(404, b'{"error":{"message":"the proxy has /squall/metrics and /squall/health"}}')

    def answer(self, code: int, text: str, *, close: bool = False) -> None:
        """An answer of the proxy's own, as OpenAI clients read errors."""
        error = {"error": {"message": text, "type": "squall_capture", "param": None, "code": code}}
        self._reply(code, msgspec.json.encode(error), close=close)

    def _reply(self, code: int, body: bytes, kind: bytes = b"application/json", *, close: bool = False) -> None:
        if self._lost:
            return
        close = close or self._exchange is None or self._exchange.close_after
        self._transport.write(
            b"HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n%s\r\n"
            % (code, _REASONS.get(code, "OK").encode(), kind, len(body), b"Connection: close\r\n" if close else b"")
            + body
        )
        self.answered(close)

    def _refuse(self, code: int, text: str) -> None:
        """Answer a request that cannot be read, and close: what follows on this connection cannot be trusted."""
        if self._refused:
            return
        self._refused = True
        if self._exchange is None:
            self.answer(code, text, close=True)
        else:
            self.abort()

    # The answer's side.

    def write(self, data: bytes) -> None:
        """Pass on bytes of the answer."""
        self._transport.write(data)

    def answered(self, close: bool) -> None:
        """The answer has been passed on whole."""
        self._exchange = None
        self._since = monotonic()
        if close or self._relay.draining:
            self._lost = True
            self._transport.close()
        else:
            self._next()

    def pause_writing(self) -> None:
        if self._exchange is not None and self._exchange.upstream is not None:
            self._exchange.upstream.pause()

    def resume_writing(self) -> None:
        if self._exchange is not None and self._exchange.upstream is not None:
            self._exchange.upstream.resume()

    def eof_received(self) -> bool:
        return False  # a client that closes its side has gone: its request is cancelled upstream too

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._relay.clients.discard(self)
        exchange, self._exchange = self._exchange, None
        if exchange is not None and exchange.reply is not None and exchange.reply.done is not None:
            # It has all of its answer and did not wait for the end of the HTTP message, as the official client.
            outcome = judge("complete", exchange.http_status, exchange.reply)
            exchange.finish(outcome.status, outcome.reason)
        elif exchange is not None:
            exchange.finish("cancelled", "client")
        self._queue.clear()
        del self._parser

    def abort(self) -> None:
        """Close at once."""
        if not self._lost:
            self._transport.abort()

    def check(self, now: float, timeout: float) -> None:
        """End what took too long."""
        exchange = self._exchange
        if exchange is not None:
            if now - exchange.last_heard > timeout:
                exchange.fail(504, "timeout", "idle", "the upstream did not answer in time")
        elif self._reading is not None:
            if now - self._since > SLOWEST_HEAD * (1 + (self._read >> 20)):
                self._refuse(408, "the request did not come in time")
        elif now - self._since > CLIENT_IDLE or self._relay.draining:
            self._transport.close()


class Upstream(asyncio.Protocol):
    """One connection to the upstream, one exchange at a time."""

    def __init__(self, relay: Relay, first: Exchange) -> None:
        self._relay = relay
        self._first: Exchange | None = first
        self._transport: asyncio.Transport
        self._parser = httptools.HttpResponseParser(self)
        self._exchange: Exchange | None = None
        self._paused = False
        self._lost = False
        self._served = 0
        self.idle_since = 0.0
        self._reset()

    def _reset(self) -> None:
        self._at = 0
        self._head = b""  # held until it is complete, where the body may have to be written anew
        self._interim = 0  # answers such as 100 Continue before the real one
        self._headers = False
        self._sized = False
        self._streamed = False
        self._chunked = False
        self._complete = False
        self._keep = False
        self._rewrite = False
        self._out: list[bytes] = []
        self._tail = b""
        self._document: list[bytes] = []
        self._held = 0

    @property
    def usable(self) -> bool:
        """Whether nothing is known against it."""
        return not (self._lost or self._transport.is_closing())

    def send(self, exchange: Exchange) -> None:
        """Write the request."""
        if exchange.done:  # the client has gone meanwhile
            self.abort()
            return
        self._reset()
        self._exchange = exchange
        exchange.upstream = self
        exchange.sent = monotonic_ns()
        self._transport.write(exchange.head)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        first, self._first = self._first, None
        if first is not None:
            self.send(first)

    def pause(self) -> None:
        """The client reads too slowly: read no more until it has caught up."""
        if not self._lost:
            self._transport.pause_reading()

    def resume(self) -> None:
        """The client has caught up."""
        if not self._lost:
            self._transport.resume_reading()

    def drop(self) -> None:
        """Its exchange is over before its answer: only closing tells the server."""
        self._exchange = None
        self.abort()

    def abort(self) -> None:
        """Close at once."""
        if not self._lost:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange is None:  # talking out of turn
            self.abort()
            return
        self._at = at = monotonic_ns()
        if exchange.first_byte is None:
            exchange.first_byte = at
        exchange.last_heard = at / 1e9
        held = exchange.asked.hide_usage and not self._headers
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            exchange.fail(502, "truncated", "bad_http", "the upstream did not answer in HTTP/1.1")
            return
        if held:
            self._head += data
            if not self._headers:
                if len(self._head) > HEADER_LIMIT:
                    exchange.fail(502, "truncated", "bad_http", "the upstream's head is too large")
                return
            data, self._head = self._head[: self._end_of_head()] if self._rewrite else self._head, b""
        elif self._rewrite:
            data = b""
        if self._out:
            data += b"".join(self._out)
            self._out.clear()
        if data:
            exchange.client.write(data)
            exchange.passed = True
        if self._complete:
            self._release(exchange)

    def _end_of_head(self) -> int:
        at = 0
        for _ in range(self._interim + 1):
            at = self._head.find(_HEAD_END, at) + len(_HEAD_END)
        return at

    # What the parser says, in this order.

    def on_header(self, name: bytes, value: bytes) -> None:
        low = name.lower()
        if low == b"content-type":
            self._streamed = value.strip().lower().startswith(b"text/event-stream")
        elif low == b"transfer-encoding":
            self._chunked = b"chunked" in value.lower()
        elif low == b"content-length":
            self._sized = True

    def on_headers_complete(self) -> None:
        exchange, status = self._exchange, self._parser.get_status_code()
        if status < 200 or exchange is None:
            return
        self._headers = True
        exchange.http_status = status
        if exchange.kind is not None:
            exchange.reply = Reply(self._streamed)
            self._rewrite = exchange.asked.hide_usage and self._streamed and self._chunked
        if exchange.head[:5] == b"HEAD ":
            self._complete = True  # what a length is given for does not come

    def on_body(self, body: bytes) -> None:
        exchange = self._exchange
        if exchange is None or exchange.reply is None:
            return
        if self._streamed:
            exchange.reply.feed(self._at, body)
            if exchange.kind == "/responses" and not self._document:
                self._document += [b'{"id":"%s"}' % found[1] for found in _RESPONSE_ID.finditer(body)][:1]
            if self._rewrite:
                self._filter(body)
        elif self._held < DOCUMENT_LIMIT:
            self._held += len(body)
            exchange.reply.feed(self._at, body)
            if exchange.kind == "/responses":
                self._document.append(body)

    def on_message_complete(self) -> None:
        if not self._headers:  # 100 Continue and its like
            self._interim += 1
            return
        self._complete = True
        self._keep = self._parser.should_keep_alive() and (self._chunked or self._sized)
        if self._rewrite:
            if self._tail:
                self._chunk(self._tail)
                self._tail = b""
            self._out.append(b"0\r\n\r\n")

    def _filter(self, body: bytes) -> None:
        """Pass on whole events, without the usage that the client did not ask for."""
        text = self._tail + body if self._tail else body
        at, kept = 0, []
        for end in _EVENT_END.finditer(text):
            event = text[at : end.end()]
            at = end.end()
            if b'"usage"' in event:
                if _NO_CHOICES.search(event):
                    continue
                event = _NULL_USAGE.sub(b"", event)
            kept.append(event)
        self._tail = text[at:]
        if len(self._tail) > EVENT_LIMIT:
            kept.append(self._tail)
            self._tail = b""
        if kept:
            self._chunk(b"".join(kept))

    def _chunk(self, data: bytes) -> None:
        self._out.append(b"%x\r\n%s\r\n" % (len(data), data))

    def _release(self, exchange: Exchange) -> None:
        self._exchange = None
        exchange.upstream = None
        self._served += 1
        close = exchange.close_after or not self._keep
        if self._keep and exchange.version != "1.0":
            self._transport.resume_reading()
            self.idle_since = monotonic()
            self._relay.idle.append(self)
        else:
            self._transport.close()
        self._conclude(exchange, "complete")
        exchange.client.answered(close)

    def _conclude(self, exchange: Exchange, ending: str) -> None:
        reply = exchange.reply
        if reply is None:
            exchange.finish("ok" if ending == "complete" else "reset", None if ending == "complete" else ending)
            return
        reply.close(self._at)
        if self._held >= DOCUMENT_LIMIT:
            exchange.finish("ok", "unread")
            return
        if self._document:
            self._note_identity(exchange)
        outcome = judge(ending, exchange.http_status, reply)
        exchange.finish(outcome.status, outcome.reason)

    def _note_identity(self, exchange: Exchange) -> None:
        """A later request of the responses API may name this answer as the one that it goes on from."""
        try:
            identity = msgspec.json.decode(b"".join(self._document), type=_Identity).id
        except (msgspec.DecodeError, UnicodeDecodeError):
            return
        if identity:
            relay = self._relay
            exchange.place = relay.conversations.answered(answer_number(relay.hasher, identity), exchange.place)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        exchange, self._exchange = self._exchange, None
        del self._parser
        if exchange is None or exchange.done:
            return
        exchange.upstream = None
        if self._headers and not (self._chunked or self._sized) and exc is None:
            # HTTP/1.0 and its like: the end of the connection is the end of the answer.
            self._conclude(exchange, "complete")
            exchange.client.answered(True)
        elif exchange.first_byte is None and self._served:
            self._relay.forward(exchange, fresh=True)  # it had been closed while it lay idle: nothing was done yet
        elif exchange.first_byte is None:
            exchange.fail(502, "reset", "eof_headers", "the upstream closed the connection without an answer")
        else:
            exchange.fail(502, "reset" if exc else "truncated", "eof", "the upstream broke off its answer")


def make_client(relay: Relay) -> Callable[[], Client]:
    """What the listening socket makes of each connection."""
    return lambda: Client(relay)
