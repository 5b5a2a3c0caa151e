"""The event loop of a sending process: files that are ready, times that have come, and work for afterwards.

A sender has thousands of sockets and hardly anything else: a loop over what the system says is ready is all that it
needs, without tasks, transports or buffers between the socket and the time stamp, for TLS as well.
It has those methods of an asyncio loop that an `Alarm` calls.
"""

import select
import socket
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from math import ceil
from time import monotonic_ns
from typing import Any

READ, WRITE = select.POLLIN, select.POLLOUT
AT_ONCE = 64
"""Ready files that are served before the times are looked at again."""


class Timer:
    """A call at a time."""

    __slots__ = ("args", "at", "call", "number")

    def __init__(self, at: int, number: int, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.at, self.number, self.args = at, number, args
        self.call: Callable[..., Any] | None = call

    def __lt__(self, other: "Timer") -> bool:
        return (self.at, self.number) < (other.at, other.number)

    def cancel(self) -> None:
        """Do not call."""
        self.call, self.args = None, ()


class Loop:
    """Calls back from `run` alone, one call at a time; an exception of a call ends `run`."""

    def __init__(self) -> None:
        self._files: dict[int, Callable[[], Any]] = {}
        self._soon: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self._timers: list[Timer] = []  # a heap
        self._numbers = count()
        self._closing: list[socket.socket] = []
        self._running = False
        self._poll: Any
        if hasattr(select, "epoll"):
            self._poll = select.epoll()
            self._ready = self._poll.poll
        else:
            self._poll = select.poll()
            self._ready = lambda seconds, most: self._poll.poll(None if seconds is None else ceil(seconds * 1e3))

    def watch(self, file: int, events: int, call: Callable[[], Any]) -> None:
        """Call when the file is ready for `events` (READ, WRITE) or broken, instead of what was to be called before."""
        if file in self._files:
            self._poll.modify(file, events)
        else:
            self._poll.register(file, events)
        self._files[file] = call

    def add_reader(self, file: int, call: Callable[[], Any]) -> None:
        """Call when the file can be read."""
        self.watch(file, READ, call)

    def remove_reader(self, file: int) -> None:
        """Do not look at the file any more."""
        if self._files.pop(file, None) is not None:
            self._poll.unregister(file)

    def discard(self, sock: socket.socket) -> None:
        """Do not look at the socket any more, and close it when nothing that was ready with it is left: another socket
        may get its number."""
        self.remove_reader(sock.fileno())
        self._closing.append(sock)

    def call_soon(self, call: Callable[..., Any], *args: Any) -> None:
        """Call when what is ready now has been served."""
        self._soon.append((call, args))

    def call_later(self, seconds: float, call: Callable[..., Any], *args: Any) -> Timer:
        """Call after so many seconds, up to a millisecond later."""
        timer = Timer(monotonic_ns() + round(seconds * 1e9), next(self._numbers), call, args)
        heappush(self._timers, timer)
        return timer

    def stop(self) -> None:
        """Let `run` return when what is ready has been served."""
        self._running = False

    def run(self, within: float | None = None) -> None:
        """Until `stop` is called, or for at most so many seconds."""
        limit = None if within is None else self.call_later(within, self.stop)
        ready, files, soon, timers = self._ready, self._files, self._soon, self._timers
        self._running = True
        now = monotonic_ns()
        while self._running:
            wait: float | None = None
            if soon:
                wait = 0
            elif timers:
                left = timers[0].at - now
                wait = left / 1e9 if left > 0 else 0
            for file, _ in ready(wait, AT_ONCE):
                call = files.get(file)
                if call is not None:
                    call()
            now = monotonic_ns()
            if timers and timers[0].at <= now:
                self._ring()
            for _ in range(len(soon)):
                later, args = soon.popleft()
                later(*args)
            if self._closing:
                self._close()
        if limit is not None:
            limit.cancel()

    def _ring(self) -> None:
        now = monotonic_ns()
        while self._timers and self._timers[0].at <= now:
            timer = heappop(self._timers)
            if timer.call is not None:
                timer.call(*timer.args)

    def _close(self) -> None:
        for sock in self._closing:
            sock.close()
        self._closing.clear()

    def close(self) -> None:
        """Close what was discarded; nothing is called any more."""
        self._close()
        if hasattr(self._poll, "close"):
            self._poll.close()
