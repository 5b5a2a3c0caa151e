"""The connections to one server, whatever they are made of."""

import asyncio
from abc import ABC, abstractmethod
from time import monotonic_ns
from typing import Any

from squall.replay.exchange import OPENED_AT_ONCE, Answering, Exchange, connect_failure


class Pool(ABC):
    """Opening a connection never blocks: the exchange that needs it goes out when it is there."""

    def __init__(self, loop: asyncio.AbstractEventLoop, connect_timeout: float = 10.0) -> None:
        self._loop = loop
        self._connect_timeout = connect_timeout
        self._opening: set[asyncio.Task[None]] = set()
        self._spares = 0  # among the opening ones
        self.loop: Any = loop
        """Where a callback is called soon and a file watched: `call_soon`, `add_reader` and `remove_reader`."""
        self.at_once = 1
        """Answers that may be parsed before the loop looks for what came in: one, where its looking makes the times."""
        self.idle: list[Any] = []  # youngest last
        self.connections: set[Any] = set()

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

    def hurry(self) -> None:  # noqa: B027 - most pools tell at once
        """Tell of an answer's end at once: something waits for it. Else it may take until a timer goes off."""

    def forget(self, connection: Answering) -> None:
        """The connection is gone. Where it lies among the idle ones, `send` finds it unusable."""
        self.connections.discard(connection)

    def close(self) -> None:
        """Close everything."""
        for task in self._opening:
            task.cancel()
        for connection in list(self.connections):
            connection.abort()

    def _start(self, exchange: Exchange | None) -> None:
        task = self._loop.create_task(self._open(exchange))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, exchange: Exchange | None) -> None:
        try:
            async with asyncio.timeout(self._connect_timeout):
                await self._connect(exchange)
        except (OSError, ValueError) as error:
            # A spare one has nobody to tell: the request that misses it will open its own, and fail or not.
            if exchange is not None:
                exchange.end(*connect_failure(error))
        finally:
            self._spares -= exchange is None

    @abstractmethod
    async def _connect(self, exchange: Exchange | None) -> None:
        """Open a connection and send the exchange on it; without one, put it among the idle ones."""
