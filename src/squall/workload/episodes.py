"""A trace's own course, loosened: what came when and how long it was, with as much left to chance as it bears.

A tail latency of an hour hangs on one or two episodes of it, so a draw that is to lead to the same conclusions must
have them, down to the milliseconds between the requests of one burst. A draw takes the recorded course and loosens it:

* **When.** Times are cut in halves, quarters, eighths, … by their number. The share theta of its time that the first
  half of a part takes has a law, which the trace shows: the shares of all parts of that size, apart for dense and
  sparse ones, because a burst is even inside and a lull is not. As normal scores z of that law, the shares move by
  z' = sqrt(1 - f) z + sqrt(f) noise: a step of an Ornstein-Uhlenbeck process, which leaves the law as it is, and with
  it the law of the gaps and the dispersion of counts at every scale. The few parts of the first cuts move less, so
  that the course itself stays. Requests at one time stay together, and a coarse clock stays.
* **How long.** A request keeps its class of (request, response) length and is drawn afresh inside it; the share sqrt(f)
  of them becomes one of its neighbours instead. Failures are a class, so that they stay in their runs.

f is the `freedom`. The more of it, the wider the draws spread, and the more they differ from the trace on average;
choosing.py takes the largest with which the trace still looks like one of the draws to a queue. Beyond its span the
model goes on with randomly chosen eighths of it, or by the clock if it spans a day. What it holds is the trace at a
coarser grain: times, and classes of lengths.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Self

import msgspec
import numpy as np

from squall.seeds import stream
from squall.workload.concurrency import DAY, whole_period

if TYPE_CHECKING:
    from squall.workload.lengths import Lengths

NEAR = 8
"""A request that becomes one of its neighbours takes one that is about so many requests away."""
MOST_CELLS = 600_000
"""A class with more requests than this is held in cells of several: one time for each cell."""
WIDTH = 0.1
"""Lengths of one class differ by at most about this factor, if they are not short."""
_SHORT = 32  # tokens
_CLASSES = 64  # length classes of the requests, and as many of the responses
_CLASS_ROWS = 3  # requests that a length class needs
_BLOCKS = 8
_EXCHANGED = 32  # neighbours among which sessions put the long requests
_KINDS = 8  # of a cut's parts, by their density
_NODES = 32  # parts that a kind needs
_SAME_TICK = 1e-4
_COURSE = 64  # parts at which a cut has half the freedom


@dataclass(frozen=True)
class Course:
    """Requests of the fitted trace in the order of the draw: indices, times (s from the draw's start), and a factor."""

    row: np.ndarray
    time: np.ndarray
    span: float
    factor: float = 1.0

    @property
    def expected(self) -> float:
        """Expected number of arrivals."""
        return float(self.row.size * self.factor)

    def scaled(self, factor: float) -> Self:
        """The same course at `factor` times the rate."""
        return replace(self, factor=self.factor * factor)


@dataclass(frozen=True)
class _Blocks:
    """Requests first[k] to last[k] of the fitted trace, whose times become later by shift[k] (s)."""

    first: np.ndarray
    last: np.ndarray
    shift: np.ndarray


class LengthClasses(msgspec.Struct, frozen=True, dict=True):
    """Which class of (request, response) length each request was in."""

    request: list[float]
    """Ranks (0 … 1, of all answered requests of the class) that divide the classes of request lengths."""
    response: list[float]
    code: list[int]
    """Request class x number of response classes + response class, in their order; -1: the request failed."""

    def __post_init__(self) -> None:
        classes = (len(self.request) - 1) * (len(self.response) - 1)
        for border in (self.request, self.response):
            if len(border) < 2 or border[0] != 0 or border[-1] != 1 or np.any(np.diff(border) <= 0):
                raise ValueError("the borders of the length classes must rise from 0 to 1")
        if not self.code or min(self.code) < -1 or max(self.code) >= classes:
            raise ValueError("code names a length class that is not there")

    def draw(
        self, row: np.ndarray, law: "Lengths", freedom: float, rng: np.random.Generator, order: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Request and response tokens, and which fail, for draws of the fitted requests `row`.

        With `order` (0 to 1), neighbours change places so that where it is high, long requests are.
        """
        from squall.workload.compiled.course import classes_near, exchanged, inside_classes

        # A request now and then is one of its neighbours instead.
        code = classes_near(row, self.codes, freedom**0.5, NEAR, rng)
        failed = code < 0
        if order is not None:
            exchanged(code, order, _EXCHANGED)
        return *inside_classes(code, np.array(self.request), np.array(self.response), law.tables, rng), failed

    @cached_property
    def codes(self) -> np.ndarray:
        return np.array(self.code, np.int32)


class Episodes(msgspec.Struct, frozen=True, dict=True, tag="episodes", tag_field="kind"):
    """The course of one class: its requests' times and length classes, and how far a draw may leave it."""

    span: float
    """Fitted seconds."""
    period: float
    """Beyond a span of a day or more, t takes the course of t mod `period`."""
    freedom: float
    """f, from 0 (the times as they were) to 1 (times that are new but for the law of the shares)."""
    tick: float | None
    """Arrivals are recorded at multiples of so many seconds, as those of the trace were; null: they are not."""
    requests: int
    cell: int
    """Requests of a cell; the last one may hold fewer."""
    time: list[float]
    """When each cell begins (s): its first request."""
    last: list[float]
    """When each cell's last request came; empty if a cell is one request."""
    lengths: LengthClasses | None
    """null: no request of the class was answered."""

    def __post_init__(self) -> None:
        cells = -(-self.requests // self.cell) if self.cell > 0 and self.requests > 0 else 0
        if not cells or len(self.time) != cells or len(self.last) != (cells if self.cell > 1 else 0):
            raise ValueError("time and last must have an entry for each cell of requests")
        time = np.array(self.time)
        if np.any(np.diff(time) < 0) or time[0] < 0 or not time[-1] < self.span or not 0 < self.period <= self.span:
            raise ValueError("time must rise inside the span, and period must lie in it")
        if self.last and (np.any(np.array(self.last) < time) or np.any(np.array(self.last)[:-1] > time[1:])):
            raise ValueError("last must lie between its cell's time and the next one's")
        if not 0 <= self.freedom <= 1:
            raise ValueError("freedom must lie between 0 and 1, and noise must not be negative")
        if self.tick is not None and self.tick <= 0:
            raise ValueError("tick must be above 0")
        if self.lengths is not None and len(self.lengths.code) != self.requests:
            raise ValueError("lengths must have a code for each request")

    @property
    def window(self) -> float:
        return self.span / len(self.time)

    @property
    def mean_rate(self) -> float:
        """Requests/s over the fitted span."""
        return self.requests / self.span

    def path(self, begin: float, end: float, seed: int) -> Course:
        """The course from `begin` to `end` (s from the fitted trace's start)."""
        times, blocks = self._times, self._schedule(begin, end, seed)
        size = blocks.last - blocks.first
        row = np.arange(int(size.sum())) + np.repeat(blocks.first - (np.cumsum(size) - size), size)
        return Course(row, times[row] + np.repeat(blocks.shift - begin, size), end - begin)

    def expected(self, begin: float, end: float, seed: int) -> int:
        """How many requests `path` has."""
        blocks = self._schedule(begin, end, seed)
        return int((blocks.last - blocks.first).sum())

    def part(self, rows: slice, begin: float, end: float) -> Self:
        """The course of the fitted requests `rows` alone, which came from `begin` to `end`."""
        lengths = self.lengths
        if lengths is not None:
            lengths = msgspec.structs.replace(lengths, code=lengths.code[rows])
        # The model's times are rounded, or at ticks: they may lie a little before `begin`.
        times = np.clip(self._times[rows] - begin, 0.0, np.nextafter(end - begin, 0))
        return msgspec.structs.replace(
            self, span=end - begin, period=end - begin, requests=times.size, cell=1, time=times.tolist(), last=[],
            lengths=lengths,
        )  # fmt: skip

    @cached_property
    def _times(self) -> np.ndarray:
        """A time for each request of the fitted trace: its own, or evenly between the ends of its cell."""
        first = np.array(self.time)
        if self.cell == 1:
            return first
        begin = np.arange(first.size) * self.cell
        size = np.minimum(self.requests - begin, self.cell)
        part = (np.arange(self.requests) - np.repeat(begin, size)) / np.maximum(np.repeat(size, size) - 1, 1)
        times = np.repeat(first, size) + part * np.repeat(np.array(self.last) - first, size)
        return np.floor(times / self.tick + 1e-6) * self.tick if self.tick else times

    def _schedule(self, begin: float, end: float, seed: int) -> "_Blocks":
        """What comes from `begin` to `end`: stretches of the fitted time, the whole span and what follows it."""
        if self.span >= DAY:
            opens, length = (
                np.array([0.0, self.span % self.period]),
                np.array([self.span, self.period - self.span % self.period]),
            )
            cycles = max(0, int((end - length.sum()) // self.period) + 1)
            opens, length = np.append(opens, np.zeros(cycles)), np.append(length, np.full(cycles, self.period))
        else:
            block = self.span / _BLOCKS
            number = max(0, int((end - self.span) // block) + 1)
            chosen = stream(seed, "blocks").integers(_BLOCKS, size=number)
            opens, length = np.append(0.0, chosen * block), np.append(self.span, np.full(number, block))
        at = np.append(0.0, np.cumsum(length))
        seen = slice(np.searchsorted(at, begin, side="right") - 1, np.searchsorted(at, end))
        at, opens, length = at[:-1][seen], opens[seen], length[seen]
        closes = opens + np.minimum(length, end - at)
        first, last = np.searchsorted(self._times, (opens + np.maximum(begin - at, 0.0), closes))
        return _Blocks(first, last, at - opens)

    def arrive(self, course: Course, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Arrival times (sorted seconds) along `course`, and the request of the fitted trace that each stands for."""
        if course.row.size == 0:
            return np.empty(0), course.row
        rises = course.time[1:] > course.time[:-1]
        if course.factor == 1 and rises.all():
            return loosened(course.time, course.span, self.tick, self.freedom, rng), course.row
        first = np.flatnonzero(np.append(True, rises))
        size = np.diff(first, append=course.time.size)
        at = loosened(course.time[first], course.span, self.tick, self.freedom, rng)
        times = np.repeat(at, size)
        if course.factor == 1:
            return times, course.row
        # Every request comes `factor` times, give or take one: one random start decides for all.
        number = np.diff(np.floor(np.arange(times.size + 1) * course.factor + rng.random())).astype(np.int64)
        drawn = np.repeat(np.arange(times.size), number)
        again = np.append(False, drawn[1:] == drawn[:-1])[: drawn.size]
        # A copy comes near the first, inside the gaps that are there; where requests come at one time, with them.
        gap = np.diff(at)
        room = np.minimum(np.append(gap[:1], gap), np.append(gap, gap[-1:])) if gap.size else np.zeros(1)
        arrival, room = times[drawn], np.repeat(np.where(size > 1, 0.0, room), size)[drawn[again]]
        shift = (rng.random(room.size) - 0.5) * room
        arrival[again] += np.rint(shift / self.tick) * self.tick if self.tick else shift
        return np.sort(np.maximum(arrival, 0.0)), course.row[drawn]


def loosened(
    times: np.ndarray, span: float, tick: float | None, freedom: float, rng: np.random.Generator
) -> np.ndarray:
    """Other times like the distinct, sorted `times` (s, from 0 below `span`); on a clock of ticks, multiples of it."""
    from squall.workload.compiled.course import perturbed

    gaps = np.empty(times.size + 1)
    np.subtract(times[1:], times[:-1], out=gaps[1:-1])
    # No gap is below the least that there is (on a coarse clock, a tick): what is above it can change.
    least = float(gaps[1:-1].min(initial=np.inf)) if tick and times.size > 1 else 0.0
    gaps[1:-1] -= least
    gaps[0], gaps[-1] = times[0], max(span - float(times[-1]), 0.0)
    moved = np.cumsum(perturbed(gaps, freedom, _COURSE, _NODES, _KINDS, rng)[:-1])
    if tick and np.abs(times / tick - np.rint(times / tick)).max() < _SAME_TICK:
        return np.floor(moved / tick + _SAME_TICK) * tick + least * np.arange(times.size)
    if least:
        moved += least * np.arange(times.size)
    return np.minimum(moved, span, out=moved)


def fit_episodes(
    arrivals: np.ndarray,
    answered: np.ndarray,
    request: np.ndarray,
    response: np.ndarray,
    span: float,
    *,
    tick: float | None,
    rng: np.random.Generator,
    freedom: float = 0.1,
) -> Episodes:
    """The course of a class: sorted `arrivals` (s from 0, below `span`), which were `answered`, lengths in tokens."""
    size = arrivals.size
    cell = -(-size // MOST_CELLS)
    gaps = np.diff(arrivals)
    fine = float(np.quantile(gaps[gaps > 0], 0.02)) if (gaps > 0).any() else 1.0
    digits = int(np.clip(3 - np.floor(np.log10(fine)), 3, 9))
    times = np.minimum(arrivals.round(digits), np.nextafter(span, 0))
    ends = np.minimum(np.arange(cell - 1, size + cell - 1, cell), size - 1)
    return Episodes(
        span=span,
        period=whole_period(span),
        freedom=freedom,
        tick=tick,
        requests=size,
        cell=cell,
        time=times[::cell].tolist(),
        last=times[ends].tolist() if cell > 1 else [],
        lengths=_classes(answered, request, response, rng) if answered.any() else None,
    )


def _classes(
    answered: np.ndarray, request: np.ndarray, response: np.ndarray, rng: np.random.Generator
) -> LengthClasses:
    from squall.workload.lengths import ranks

    borders, codes = [], np.zeros(int(answered.sum()), np.int64)
    for tokens in (request[answered], response[answered]):
        border = _borders(tokens)
        codes = codes * (border.size - 1) + np.searchsorted(border[1:-1], ranks(tokens, rng), side="right")
        borders.append(border.round(9).tolist())
    code = np.full(answered.size, -1)
    code[answered] = codes
    return LengthClasses(request=borders[0], response=borders[1], code=code.tolist())


def _borders(tokens: np.ndarray) -> np.ndarray:
    """Ranks that divide a sample into classes which hold equally much, counting half by requests and half by tokens.

    Few long requests make much of the load, so they are told apart more finely than many short ones, and no class of
    long ones is much wider than WIDTH of their length.
    """
    classes = min(_CLASSES, max(1, tokens.size // _CLASS_ROWS))
    rank = np.arange(1, tokens.size + 1) / tokens.size
    volume = np.cumsum(np.sort(tokens), dtype=float)
    held = (rank + volume / volume[-1]) / 2 if volume[-1] > 0 else rank
    inner = np.interp(np.arange(1, classes) / classes, held, rank)
    value = np.sort(tokens)
    step = np.floor(np.log(np.maximum(value, _SHORT)) / WIDTH)
    wide = np.flatnonzero(np.diff(step) > 0)
    return np.unique(np.concatenate([[0.0], inner, rank[wide], [1.0]]))
