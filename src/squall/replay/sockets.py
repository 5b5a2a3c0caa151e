"""Plain HTTP on Linux: connections that one compiled loop reads (`reading.py`), with Python for the rest.

A read of a streamed answer costs two calls of the system and a note of where it lies and when it came. Python sees the
notes when a header, an answer's end, a timer or a failure calls for it, many at a time. asyncio's loop waits meanwhile:
it opens the connections, and has its turn at each of the sender's beats.
"""

import asyncio
import os
import select
import socket
import ssl
import sys
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import cache
from time import monotonic_ns
from typing import Any

import httptools
import numpy as np

from squall import native
from squall.progress import note
from squall.replay import phases
from squall.replay.connection import Transports
from squall.replay.exchange import IDLE_LIMIT, Answering, Exchange, Part, watch_for_death
from squall.replay.pool import Pool

MACHINES = "x86_64", "aarch64"
"""Those whose layout of the system's structures `reading.py` knows."""
LONGEST_TURN = 20_000_000
"""Nanoseconds that the compiled loop waits at most, should nothing call it back."""
STAMPED = 35
"""SO_TIMESTAMPNS: the kernel says when it got the bytes that are read."""
NAP = 1
"""Milliseconds after a read in which only timers are served: an awakening costs as much as several reads, and the
kernel stamps what comes meanwhile. A stream's pieces that came within one have one time, so there are none where
more than `QUICK_SHARE` of `READS_LOOKED_AT` reads follow the same stream's last one within two and a half."""
QUICK_SHARE, READS_LOOKED_AT = 0.2, 1000
KNOWN_LIMIT = 1 << 12
"""Bytes of the longest header that is compared with the last one instead of read."""
ENDS = 8
"""Ends of answers that may wait for a timer, where nothing waits for them."""
_code: dict[str, Callable[..., int]] = {}


@cache
def compiled() -> bool:
    """Make the machine code ready, which takes seconds at the very first time; whether this system has it."""
    if sys.platform != "linux" or os.uname().machine not in MACHINES:
        return False
    said: list[None] = []

    def slow() -> None:
        if not said:
            note("replay: compiling what reads the answers; this is done once, and takes some seconds.")
        said.append(None)

    try:
        for name, arguments in (("turn", 1), ("frame", 5), ("read_events", 3)):
            _code[name] = native.load("squall.replay.reading", name, arguments, ("squall.replay.phases",), slow)
    except OSError:  # a system that runs nothing that it has not loaded itself
        return False
    return True


class Socket(Answering):
    """One connection, one exchange at a time. Its body's framing is `reading.py`'s affair, its headers httptools'."""

    def __init__(self, pool: "Sockets", connected: socket.socket) -> None:
        super().__init__()
        self._pool = pool
        self._socket = connected
        self._number = connected.fileno()
        self._row = self._number * phases.COLUMNS
        room = np.empty(phases.BODY_ROOM + 16 * phases.PIECES_ROOM, dtype=np.uint8)  # pages exist when they are used
        self.body = room[: phases.BODY_ROOM].data
        self._marks = room[phases.BODY_ROOM :].view(np.int64).data
        self.body_at: int = room.ctypes.data
        self.marks_at: int = self.body_at + phases.BODY_ROOM
        self._waiting = select.poll()
        self._waiting.register(self._number, select.POLLIN)
        self._rest: memoryview | None = None
        """What is not yet written of the request."""
        self._busy = False
        self._chunked = False
        self._length: int | None = None

    @property
    def waits(self) -> bool:
        """Whether it has no answer to read."""
        return self._exchange is None

    def send(self, exchange: Exchange) -> None:
        """Write the request. `sent` is when the system was given its last byte; the answer may come within the call."""
        self._ask(exchange)
        self._pool.busy += not self._busy
        self._busy = True
        self._parser, self._chunked, self._length = None, False, None
        self._pool.expect(self._number, phases.HEAD)
        self._write(exchange, exchange.payload)

    def writable(self) -> None:
        """There is room for more of the request."""
        self.hand_over()
        if self._exchange is not None and self._rest is not None:
            self._write(self._exchange, self._rest)

    def fresh(self, now: int) -> bool:
        """Whether nothing is known against the connection, idle until now."""
        return self._number >= 0 and now - self.idle_since <= IDLE_LIMIT

    def usable(self, now: int) -> bool:
        """Whether the connection, idle until now, can be trusted with a request: it looks at the socket."""
        # Readable while idle: closed by the server, or talking out of turn.
        return self.fresh(now) and not self._waiting.poll(0)

    def abort(self) -> None:
        self.lost(None)

    def lost(self, error: Exception | None) -> None:
        """Close; if an answer is still awaited, it will not come."""
        if self._number < 0:
            return
        self.hand_over()
        self._pool.drop(self._number, self)
        self._pool.busy -= self._busy
        self._number = -1
        self._socket.close()
        self._gone(error)

    def hand_over(self) -> None:
        table, row, exchange = self._pool.table, self._row, self._exchange
        first, said = table[row + phases.FIRST], table[row + phases.SAID]
        if first and exchange is not None:
            table[row + phases.FIRST] = 0
            exchange.first_byte, exchange.payload = first, b""
            exchange.http_status, exchange.streamed = said >> 2, bool(said & 2)
            self._headers, self._keep = True, bool(said & 1)
        pieces = table[row + phases.PIECES]
        if pieces == 0 or exchange is None or self._number < 0:
            return
        used = table[row + phases.USED]
        plain = exchange.streamed and _code["read_events"](self.body_at, self.marks_at, pieces)
        exchange.parts.append(Part(self.body[:used].tobytes(), self._marks[: 2 * pieces].tolist(), bool(plain)))
        exchange.held += used
        table[row + phases.USED] = table[row + phases.PIECES] = 0

    @property
    def last_read(self) -> int | None:
        return self._pool.table[self._row + phases.LAST] or None

    def read_head(self, data: bytes, at: int) -> int:
        """Read bytes of a header; how many of them stand before the body, all of them where it has not begun."""
        exchange = self._exchange
        if exchange is None:
            self.abort()
            return len(data)
        if exchange.first_byte is None:
            exchange.first_byte = at
            exchange.payload = b""
        self._parser = self._parser or httptools.HttpResponseParser(self)
        taken = 0
        while taken < len(data):
            searched = max(0, len(self._begin) - 3)
            self._begin += data[taken:]
            end = self._begin.find(b"\r\n\r\n", searched)
            left = 0 if end < 0 else len(self._begin) - end - 4
            self._begin = self._begin[: len(self._begin) - left]
            piece, taken = data[taken : len(data) - left], len(data) - left
            if not self._feed(piece):
                return len(data)
            if self._complete:
                self.release(at, taken < len(data))
                return len(data)
            if self._headers:
                phase = phases.UNTIL_CLOSE if self._length is None else phases.LENGTH
                self._pool.expect(self._number, phases.SIZE if self._chunked else phase, self._length or 0)
                if self._chunked and not (exchange.compressed or exchange.location or exchange.retry_after):
                    said = (exchange.http_status or 0) << 2 | exchange.streamed << 1 | self._keep
                    self._pool.know(self._begin, said)
                return taken
        self._grown(exchange)
        return taken

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        key = name.lower()
        if key == b"transfer-encoding":
            self._chunked = value.lower().rstrip().endswith(b"chunked")
        elif key == b"content-length":
            self._length = int(value)

    def full(self) -> None:
        """There is no room for more of the answer."""
        self.hand_over()
        if self._exchange is not None:
            self._grown(self._exchange)

    def release(self, at: int, more: bool) -> None:
        """The answer is complete since `at`; `more` came behind it."""
        self.hand_over()
        exchange, self._exchange = self._exchange, None
        self._parser = None
        self.served += 1
        self._pool.busy -= self._busy
        self._busy = False
        if self._keep and not more and self._rest is None:
            self.idle_since = at
            self._pool.idle.append(self)
        else:
            self.abort()
        if exchange is not None:
            exchange.end("complete", at=at)

    def bad(self, begins: bytes) -> None:
        """The framing of the body is wrong."""
        self._give_up("bad_http", f"not HTTP: chunks of the body that are none (before {begins[:40]!r})")

    def _write(self, exchange: Exchange, payload: bytes | memoryview) -> None:
        at = monotonic_ns()
        try:
            written = self._socket.send(payload)
        except BlockingIOError:
            written = 0
        except OSError as error:
            failure = error  # told in a moment, not within the sender's own call: it will send again
            self._pool.loop.call_soon(lambda: self.lost(failure))
            return
        waiting, self._rest = self._rest is not None, None
        if written == len(payload):
            exchange.sent = at if exchange.first_byte is None else None
        else:
            self._rest = memoryview(payload)[written:]
        if waiting != (self._rest is not None):
            self._pool.watch_writing(self._number, not waiting)


class Sockets(Pool):
    """Connections of plain HTTP, and the turns of the compiled loop; to its sender's timers it is the loop."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, address: tuple[str, int], *, connect_timeout: float = 10.0
    ) -> None:
        super().__init__(loop, connect_timeout)
        compiled()
        self.loop = self
        self.at_once = 8
        self._address = address
        self._epoll = select.epoll()
        self._sockets: dict[int, Socket] = {}
        self._readers: dict[int, Callable[[], Any]] = {}
        self._soon: deque[Callable[[], Any]] = deque()
        self.busy = 0
        """Connections that await an answer."""
        self._going_on = False
        self._closed = False
        self._rows = np.zeros(phases.SOCKETS * phases.COLUMNS, dtype=np.int64)
        self.table = self._rows.data
        """Of numbers by socket, which the compiled half reads and writes."""
        notes = np.zeros(phases.NOTES * phases.FIELDS, dtype=np.int64)
        self._notes = notes.data
        self._timers = select.epoll()
        # Room for the clock, a message's header, vector and control data, and events.
        self._room = np.zeros(2 + 8 + 2 + 8 + phases.READY_AT_ONCE * 2, dtype=np.int64)
        clock, message, vector, control, events = (self._room.ctypes.data + 8 * place for place in (0, 2, 10, 12, 20))
        self._room[2 + 2], self._room[2 + 3], self._room[2 + 4] = vector, 1, control
        desk = np.zeros(phases.DESK, dtype=np.int64)
        self._desk, self._desk_at = desk.data, desk.ctypes.data
        known = np.zeros(KNOWN_LIMIT, dtype=np.uint8)
        self._known = known.data
        for place, what in (
            (phases.KNOWN, known.ctypes.data),
            (phases.ENDS, ENDS),
            (phases.EPOLL, self._epoll.fileno()),
            (phases.TIMERS, self._timers.fileno()),
            (phases.NAP, NAP),
            (phases.EVENTS, events),
            (phases.ROWS, self._rows.ctypes.data),
            (phases.LOG, notes.ctypes.data),
            (phases.CLOCK, clock),
            (phases.MESSAGE, message),
            (phases.VECTOR, vector),
            (phases.CONTROL, control),
        ):
            self._desk[place] = what
        loop.add_reader(self._epoll.fileno(), self.run)

    def hurry(self) -> None:
        self._desk[phases.ENDS] = 0

    @property
    def naps(self) -> bool:
        """Whether reads wait for others; see NAP."""
        return self._desk[phases.NAP] > 0

    # --- what the sender's timers need of a loop -----------------------------------------------------------------

    def call_soon(self, callback: Callable[[], Any]) -> None:
        """Call it after what is being done now."""
        self._soon.append(callback)
        self._go_on()

    def add_reader(self, number: int, callback: Callable[[], Any]) -> None:
        """Call it whenever this file is readable."""
        self._readers[number] = callback
        self.expect(number, phases.OTHERS)
        self._epoll.register(number, select.EPOLLIN)
        self._timers.register(number, select.EPOLLIN)

    def remove_reader(self, number: int) -> None:
        """Do not call it any more."""
        if self._readers.pop(number, None):
            self._epoll.unregister(number)
            self._timers.unregister(number)

    # --- connections ---------------------------------------------------------------------------------------------

    async def _connect(self, exchange: Exchange | None) -> None:
        """Resolve, connect, and go on with the first address that answers."""
        loop, (host, port) = self._loop, self._address
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        except socket.gaierror:  # a name, for which another thread asks
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for place, (family, kind, protocol, _, address) in enumerate(found):
            try:
                with ExitStack() as undo:
                    opening = undo.enter_context(socket.socket(family, kind, protocol))
                    opening.setblocking(False)
                    await loop.sock_connect(opening, address)
                    opening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    watch_for_death(opening)
                    with suppress(OSError):
                        opening.setsockopt(socket.SOL_SOCKET, STAMPED, 1)
                    undo.pop_all()  # it is open, and stays so
            except OSError:
                if place == len(found) - 1:
                    raise
            else:
                self.add(opening, exchange)
                return

    def add(self, connected: socket.socket, exchange: Exchange | None) -> None:
        """Take up an open connection: send the exchange on it; without one, put it among the idle ones."""
        number = connected.fileno()
        if self._closed or number >= phases.SOCKETS or (exchange is not None and exchange.ended is not None):
            connected.close()
            if exchange is not None:
                exchange.end("client_fault/files", f"more than {phases.SOCKETS} files are open")
            return
        made = self._sockets[number] = Socket(self, connected)
        self.connections.add(made)
        row = number * phases.COLUMNS
        self.table[row + phases.BODY], self.table[row + phases.MARKS] = made.body_at, made.marks_at
        self.expect(number, phases.OTHERS)
        self._epoll.register(number, select.EPOLLIN)
        if exchange is not None:
            made.send(exchange)
        else:
            made.idle_since = monotonic_ns()
            self.idle.append(made)

    def expect(self, number: int, phase: int, left: int = 0) -> None:
        """Say what comes next on this file."""
        table, row = self.table, number * phases.COLUMNS
        table[row + phases.PHASE] = phase
        table[row + phases.LEFT] = left
        table[row + phases.LINE] = table[row + phases.DIGITS] = 0
        for column in (phases.USED, phases.PIECES, phases.LAST, phases.FIRST):
            table[row + column] = 0

    def know(self, header: bytes, said: int) -> None:
        """Have the compiled half take this header for read wherever it comes: servers change but the date in it."""
        size = len(header) if len(header) <= KNOWN_LIMIT else 0
        self._known[:size] = header[:size]
        self._desk[phases.KNOWN_SIZE], self._desk[phases.KNOWN_SAID] = size, said

    def watch_writing(self, number: int, on: bool) -> None:
        """Whether to call `writable` when there is room for more of a request."""
        self._epoll.modify(number, select.EPOLLIN | (select.EPOLLOUT if on else 0))

    def drop(self, number: int, connection: Socket) -> None:
        """The connection is about to be closed."""
        self._epoll.unregister(number)
        del self._sockets[number]
        self.forget(connection)

    def close(self) -> None:
        """Close everything."""
        super().close()
        self._closed = True
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        self._timers.close()

    # --- turns ---------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        if not (self._going_on or self._closed):
            self._going_on = True
            self._loop.call_soon(self.run)

    def run(self) -> None:
        """Take turns until asyncio's loop has something to do, at the latest at one of the sender's beats."""
        self._going_on = False
        while not self._closed:
            waits = not (self._soon or self._opening)
            notes, timer = self.turn(monotonic_ns() + LONGEST_TURN if waits else 0)
            for _ in range(len(self._soon)):
                self._soon.popleft()()
            if timer or self._opening or (waits and not notes):
                break
        if self.naps and self._desk[phases.READS] >= READS_LOOKED_AT:
            if self._desk[phases.QUICK] > QUICK_SHARE * self._desk[phases.READS]:
                self._desk[phases.NAP] = 0
            self._desk[phases.READS] = self._desk[phases.QUICK] = 0
        if self._soon or (self.busy and not self._opening):
            self._go_on()

    def turn(self, until: int) -> tuple[int, bool]:
        """One turn of the compiled loop, which waits until then (monotonic ns) at most, and what it calls for.

        Returns how much that was, and whether a timer was among it.
        """
        self._desk[phases.UNTIL] = until
        notes = _code["turn"](self._desk_at)
        if notes < 0:
            raise OSError(-notes, os.strerror(-notes))
        return notes, self._take(notes)

    def _take(self, count: int) -> bool:
        """Do what so many notes call for; whether a timer was among them."""
        timer = False
        notes = iter(self._notes[: count * phases.FIELDS].tolist())
        for number, kind, at, begin, end in zip(notes, notes, notes, notes, notes, strict=True):
            connection = self._sockets.get(number)
            if connection is None:
                if number in self._readers:
                    timer = True
                    self._readers[number]()
            elif kind == phases.RAW:
                begin += connection.read_head(connection.body[begin:end].tobytes(), at)
                if begin < end:
                    self._take(_code["frame"](self._desk_at, number, begin, end, at))
            elif kind == phases.END:
                connection.release(at, begin < end)
            elif kind == phases.FULL:
                connection.full()
            elif kind == phases.READY and begin & select.EPOLLOUT:
                connection.writable()
            elif kind == phases.READY:
                if connection.waits:  # closed by the server, or talking out of turn
                    connection.abort()
            elif kind == phases.BAD:
                connection.bad(connection.body[begin:end].tobytes())
            else:
                connection.lost(None if kind == phases.EOF else OSError(begin, os.strerror(begin)))
        return timer


def pool_for(
    loop: asyncio.AbstractEventLoop,
    address: tuple[str, int],
    *,
    tls: ssl.SSLContext | None = None,
    hostname: str | None = None,
    connect_timeout: float = 10.0,
) -> Pool:
    """The cheapest kind of connections for this system and this server."""
    if tls is None and compiled():
        return Sockets(loop, address, connect_timeout=connect_timeout)
    return Transports(loop, address, tls=tls, hostname=hostname, connect_timeout=connect_timeout)
