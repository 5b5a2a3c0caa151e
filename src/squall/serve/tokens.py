"""The tokens of a step, written in one compiled call: prepared bytes from memory to many sockets.

All tokens of a stream but the first and the last are the same bytes, so that nothing is left to do for one than the
system's `send`. What is not so simple is left to the caller: a stream's first and last token, and what a client's full
socket did not take.

A step's tokens have one moment and are written one after another. What a step brings is known when it begins, so they
are written around their moment and not behind it: the mean of the errors is nought, and the largest is half as large.
"""

import socket
import time
from collections.abc import Sequence
from time import monotonic_ns
from typing import Any

import numpy as np
from numba import types

from squall.jit import njit
from squall.simulate.live import REFUSED

BUSY, SILENT, GONE = -1, -2, -3
"""In place of a descriptor: the caller writes; nothing is written (the answer is not streamed); nobody reads."""
OUTLET = np.dtype(
    [
        ("address", np.uintp),  # of the event of one token
        ("last", np.int64),  # when the last token was written, ns
        ("size", np.int32),  # bytes of the event
        ("fd", np.int32),
        ("told", np.int32),  # index of the last token written
        ("output", np.int32),  # and of the last one that will be
        ("taken", np.int32),  # bytes of the next event that the socket took already
    ],
    align=True,
)
EDGES = (50e-6, 100e-6, 200e-6, 500e-6, 0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1)
"""Seconds: the buckets of timing errors."""
RECENT = 1 << 16
"""Timing errors that are remembered one by one."""
EACH = 6_000
"""Nanoseconds that the system needs for a token, before it has been measured."""
MOST_EACH = 50_000
"""Nanoseconds: what takes longer was held up by something else."""
CALLERS = 30_000
"""Nanoseconds that a first or a last token takes."""

_FLAGS = int(socket.MSG_DONTWAIT) | int(getattr(socket, "MSG_NOSIGNAL", 0))
_CLOCK = int(getattr(time, "CLOCK_UPTIME_RAW", time.CLOCK_MONOTONIC))  # that of monotonic_ns, on macOS too
_send = types.ExternalFunction("send", types.intp(types.int32, types.uintp, types.uintp, types.int32))
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.uintp))


@njit(cache=True)
def _now(clock: np.ndarray) -> int:
    _clock_gettime(_CLOCK, clock.ctypes.data)
    return clock[0] * 1_000_000_000 + clock[1]


@njit(cache=True)
def _count(value: int, edges: np.ndarray, counts: np.ndarray) -> None:
    """Into the bucket that ends with the first edge that is not less; the last of `counts` is the sum."""
    low, high = 0, edges.size
    while low < high:
        middle = (low + high) // 2
        if edges[middle] < value:
            low = middle + 1
        else:
            high = middle
    counts[low] += 1
    counts[counts.size - 1] += value


@njit(cache=True)
def _tell(
    it: Any, index: int, now: int, error: int, gap_edges: np.ndarray, gaps: np.ndarray, edges: np.ndarray, errors: Any
) -> None:
    """Token `index` was written at `now` (ns), so many ns off its moment; -1: it did not have to be."""
    if index > 1:
        _count(now - it.last, gap_edges, gaps)
    it.last = now
    it.told = index
    if error >= 0:
        counts, recent = errors
        recent[counts[: edges.size + 1].sum() % recent.size] = error
        _count(error, edges, counts)


@njit(cache=True, nogil=True)
def _write(
    rows: np.ndarray,
    begin: int,
    due: bool,
    outlets: np.ndarray,
    clock: np.ndarray,
    pace: np.ndarray,
    start: int,
    ns_per_tick: float,
    gap_edges: np.ndarray,
    gaps: np.ndarray,
    edges: np.ndarray,
    errors: Any,
) -> int:
    """Write rows from `begin` on; returns the first one that is the caller's, or how many rows there are."""
    now = 0
    for i in range(begin, rows.size):
        row = rows[i]
        it = outlets[row.slot]
        if row.index == REFUSED or (due and row.index == it.output):
            return i
        if row.index <= it.told or it.fd == GONE:
            continue
        if row.index == 1 or row.index == it.output or it.fd == BUSY:
            return i
        before, error = now, -1
        if it.fd >= 0:
            took = _send(it.fd, it.address, it.size, _FLAGS)
            if took != it.size:
                it.fd = BUSY
                it.taken = max(took, 0)
                return i
            now = _now(clock)
            error = abs(now - start - np.int64(row.time * ns_per_tick))
            if before > 0:
                pace[0] += (min(now - before, MOST_EACH) - pace[0]) / 256
        elif now == 0:
            now = _now(clock)
        _tell(it, row.index, now, error, gap_edges, gaps, edges, errors)
    return rows.size


@njit(cache=True)
def _plan(rows: np.ndarray, outlets: np.ndarray, start: int, ns_per_tick: float, each: float) -> Any:
    """When (ns) to begin to write rows that ascend in time, and how many then without a pause.

    Least squares: tokens that stand in each other's way are one block around the mean of their moments, and the first
    block is the one with the smallest mean of (moment - time needed up to and with this token).
    """
    total, needed, count, best, taken = 0.0, 0.0, 0, np.inf, 0
    for i in range(rows.size):
        it, index = outlets[rows[i].slot], rows[i].index
        last = index == it.output
        if index > it.told and (it.fd >= BUSY or (it.fd == SILENT and last)):
            needed += CALLERS if index == 1 or last else each
            count += 1
            total += start + rows[i].time * ns_per_tick - needed
        if count > 0 and (i + 1 == rows.size or rows[i + 1].time != rows[i].time) and total / count < best:
            best, taken = total / count, i + 1
    return best, taken


class Outlets:
    """Where the tokens of each slot go, and how well their moments were met."""

    def __init__(self, capacity: int, start: int, ns_per_tick: float, gap_edges: Sequence[float]) -> None:
        """The tick t lies at `start` + t * `ns_per_tick` of the monotonic clock; `gap_edges` (s) are the buckets of
        the times between two tokens."""
        self._outlets = np.zeros(capacity, OUTLET)
        self._clock, self._pace = np.zeros(2, np.int64), np.full(1, float(EACH))
        self._start, self._ns_per_tick = start, ns_per_tick
        self._gap_edges, self._edges = (np.rint(np.array(e) * 1e9).astype(np.int64) for e in (gap_edges, EDGES))
        self.gaps, self.errors = (np.zeros(e.size + 2, np.int64) for e in (self._gap_edges, self._edges))
        """Counts of the buckets, of what lies beyond, and the sum (ns)."""
        self._recent = np.zeros(RECENT, np.int64)
        self._looked = 0
        self._measures = self._gap_edges, self.gaps, self._edges, (self.errors, self._recent)

    def take(self, slot: int, output: int, streamed: bool) -> None:
        """A request with so many tokens is in `slot`."""
        self._outlets[slot] = 0, 0, 0, BUSY if streamed else SILENT, 0, output, 0

    def open(self, slot: int, fd: int, event: bytes) -> None:
        """From now on its tokens are written to `fd`: `event`, which the caller keeps alive."""
        it = self._outlets[slot]
        it["address"], it["size"] = np.frombuffer(event, np.uint8).__array_interface__["data"][0], len(event)
        it["fd"] = fd

    def shut(self, slot: int) -> None:
        """Nobody reads any more; call it before the descriptor is closed."""
        self._outlets[slot]["fd"] = GONE

    def taken(self, slot: int) -> int:
        """How many bytes of its next event the socket took already."""
        it = self._outlets[slot]
        taken, it["taken"] = int(it["taken"]), 0
        return taken

    def write(self, rows: np.ndarray, begin: int, due: bool) -> int:
        """Write the tokens `rows` (TOKEN) from `begin` on; returns the first row that is the caller's, or their number.

        `due`: the cluster has come to them; before, they are what its steps will bring. The caller's are refusals,
        first and last tokens (the last ones once more when they are due), and those of clients that read too slowly.
        """
        return int(
            _write(
                rows,
                begin,
                due,
                self._outlets,
                self._clock,
                self._pace,
                self._start,
                self._ns_per_tick,
                *self._measures,
            )
        )

    def told(self, slot: int, index: int, tick: int | None) -> int:
        """The caller has written a token; returns the time (ns). `tick` is its moment, None if nothing had to leave."""
        now = monotonic_ns()
        error = -1 if tick is None else abs(now - self._start - int(tick * self._ns_per_tick))
        _tell(self._outlets[slot], index, now, error, *self._measures)
        return now

    def plan(self, rows: np.ndarray) -> tuple[float, int]:
        """When (ns) to begin with rows that ascend in time, and how many then in one go; infinity if there are none."""
        best, taken = _plan(rows, self._outlets, self._start, self._ns_per_tick, self._pace[0])
        return float(best), int(taken)

    def look(self) -> np.ndarray:
        """The timing errors (s) since the last look, at most the last `RECENT` of them."""
        seen = int(self.errors[:-1].sum())
        recent = self._recent[np.arange(max(self._looked, seen - RECENT), seen) % RECENT] / 1e9
        self._looked = seen
        return recent
