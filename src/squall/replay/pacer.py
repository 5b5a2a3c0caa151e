"""When the next row goes out: absolute deadlines on the monotonic clock, and an alarm that rings at them.

A late alarm sends everything that is due, in order, at once: no row is skipped and nothing is moved to "now", so one
late send never delays the next. Loop timers are no use here: uvloop's count in milliseconds.
"""

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic_ns
from typing import Any

import numpy as np


class Pacer:
    """Walks through ascending times (ns); knows what is due and when the next one is. Pure: `now` is given."""

    __slots__ = ("_at", "_count", "next")

    def __init__(self, at: np.ndarray, start: int) -> None:
        self._at = (at + start).data
        self._count = len(at)
        self.next = 0
        """Index of the first row that is not yet released."""

    def __len__(self) -> int:
        return self._count

    def due(self, now: int) -> range:
        """The rows due at `now` that were not given out before."""
        first = self.next
        while self.next < self._count and self._at[self.next] <= now:
            self.next += 1
        return range(first, self.next)

    def deadline(self) -> int | None:
        """When the next row is due; None after the last."""
        return self._at[self.next] if self.next < self._count else None

    def soon(self, until: int, most: int) -> int:
        """How many rows are due by `until`, counted up to `most`."""
        rows = range(self.next, min(self.next + most, self._count))
        return sum(self._at[row] <= until for row in rows)

    def when(self, row: int) -> int:
        """When `row` is due."""
        return self._at[row]


class _Spec(ctypes.Structure):
    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    )


class Alarm:
    """Calls `ring` on the loop at an absolute monotonic time: by timerfd on Linux, elsewhere (if `exact`) by a spin."""

    def __init__(self, loop: Any, ring: Callable[[], Any], *, exact: bool = True) -> None:
        """`loop` is asyncio's, or a `Sockets`, which has what is needed of one."""
        self._loop, self._ring, self._spin = loop, ring, 1_500_000 if exact else 0
        self._fd = -1
        self._handle: Any = None
        if sys.platform == "linux":
            self._libc = ctypes.CDLL(None, use_errno=True)
            monotonic, nonblocking_and_cloexec = 1, os.O_NONBLOCK | os.O_CLOEXEC
            self._fd = self._libc.timerfd_create(monotonic, nonblocking_and_cloexec)
        if self._fd >= 0:
            self._spec = _Spec(0, 0, 0, 0)
            self._settime = self._libc.timerfd_settime
            absolute = 1
            # Converted once: this is called for every request.
            self._arguments = (ctypes.c_int(self._fd), ctypes.c_int(absolute), ctypes.byref(self._spec), None)
            loop.add_reader(self._fd, self._fired)

    def set(self, at: int) -> None:
        """Ring at `at` (ns of the monotonic clock) instead of any earlier request; at once if that is past."""
        if self._fd >= 0:
            self._spec.value_s, self._spec.value_ns = divmod(max(at, 1), 1_000_000_000)
            self._settime(*self._arguments)
            return
        self.clear()
        wait = at - monotonic_ns()
        if wait > self._spin + 500_000:
            self._handle = self._loop.call_later((wait - self._spin) / 1e9, self.set, at)
        elif wait > 0 and self._spin:
            self._handle = self._loop.call_soon(self.set, at)
        else:
            self._handle = self._loop.call_soon(self._ring)

    def clear(self) -> None:
        """Do not ring."""
        if self._fd >= 0:
            self._spec.value_s = self._spec.value_ns = 0
            self._settime(*self._arguments)
        elif self._handle is not None:
            self._handle.cancel()

    def close(self) -> None:
        """Give back the timer."""
        self.clear()
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _fired(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:  # it was set anew between the wake-up and this read
            return
        self._ring()


@contextmanager
def rare_collections(more: int = 50_000) -> Iterator[None]:
    """What is there is never collected, and the rest when there are so many `more` objects: it holds every stream up.

    A collection takes half a microsecond for each object that is not older than the last one.
    """
    gc.collect()
    gc.freeze()
    before = gc.get_threshold()
    gc.set_threshold(more, 100, 1000)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
