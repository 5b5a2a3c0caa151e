"""One HTTP/1.1 connection as a raw asyncio Protocol: with TLS, and wherever `sockets.py` has no place.

A read of a streamed answer is stamped, freed of its framing by httptools and appended, and nothing else: what its
events say is read when the answer is complete (`stream.Reply.take`).
"""

import asyncio
import select
import ssl
from time import monotonic_ns
from typing import cast

import httptools

from squall.replay.exchange import IDLE_LIMIT, Answering, Exchange, watch_for_death
from squall.replay.pool import Pool


class Connection(Answering, asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self, pool: Pool, first: Exchange | None) -> None:
        super().__init__()
        self._pool = pool
        self._first = first
        self._spare = first is None
        self._transport: asyncio.Transport
        self._waiting: select.poll
        self._parser = httptools.HttpResponseParser(self)
        self._paused = False
        self._lost = False
        self._at = 0

    def send(self, exchange: Exchange) -> None:
        """Write the request. `sent` is the moment at which its last byte left user space."""
        self._ask(exchange)
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
        watch_for_death(handle)
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
        if not self._feed(data):
            return
        if self._complete:
            self._release(exchange)
        else:
            self._grown(exchange)

    def on_body(self, body: bytes) -> None:
        exchange = self._exchange
        if exchange is not None and not self._complete:
            exchange.times.append(self._at)
            exchange.pieces.append(body)
            exchange.held += len(body)

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.forget(self)
        self._lost = True
        self._gone(exc)

    def _release(self, exchange: Exchange) -> None:
        self._exchange = None
        self.served += 1
        if self._keep and not self._paused:
            self.idle_since = self._at
            self._pool.idle.append(self)
        else:
            self._transport.close()
        exchange.end("complete")


class Transports(Pool):
    """Connections of the event loop's own, with or without TLS."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        address: tuple[str, int],
        *,
        tls: ssl.SSLContext | None = None,
        hostname: str | None = None,
        connect_timeout: float = 10.0,
    ) -> None:
        super().__init__(loop, connect_timeout)
        self._address, self._tls, self._hostname = address, tls, hostname

    async def _connect(self, exchange: Exchange | None) -> None:
        await self._loop.create_connection(
            lambda: Connection(self, exchange),
            *self._address,
            ssl=self._tls,
            server_hostname=self._hostname if self._tls else None,
        )
