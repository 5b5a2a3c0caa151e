"""The non-parametric yardstick as a model: the trace's rows, drawn again in blocks of time.

A draw puts stretches of `block` seconds, which begin at random times of the trace, one behind another (circular block
bootstrap, Politis and Romano, 1992). What is shorter than a block is the trace's, in arrivals, lengths and failures
alike; what lasts longer is lost. At a higher rate several draws are superposed, the last one thinned. It holds every
row (time and lengths), and has no parameter but the block.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import msgspec
import numpy as np

BLOCKS = (5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
"""Seconds, of the blocks that `auto` tries."""
MOST_REQUESTS = 2_000_000
"""A class with more rows is not kept whole."""


@dataclass(frozen=True)
class Blocks:
    """`span` s of blocks at `factor` times the rate: `expected` requests."""

    span: float
    rate: float
    factor: float = 1.0

    @property
    def expected(self) -> float:
        """Expected number of arrivals."""
        return self.span * self.rate * self.factor

    def scaled(self, factor: float) -> Self:
        """The same time at `factor` times the rate."""
        return replace(self, factor=self.factor * factor)


class Bootstrap(msgspec.Struct, frozen=True, dict=True, tag="bootstrap", tag_field="kind"):
    """The rows of one class, and the length of a block."""

    span: float
    """Fitted seconds."""
    block: float
    """Seconds."""
    tick: float | None
    """Arrivals are recorded at multiples of so many seconds; null: they are not."""
    time: list[float]
    request: list[int]
    response: list[int]
    """0: the request failed."""

    def __post_init__(self) -> None:
        if not len(self.time) == len(self.request) == len(self.response) or not self.time:
            raise ValueError("time, request and response must have the same length, at least 1")
        if self.time[0] < 0 or np.any(np.diff(self.time) < 0) or not self.time[-1] < self.span:
            raise ValueError("time must rise inside the span")
        if not 0 < self.block <= self.span or (self.tick is not None and self.tick <= 0):
            raise ValueError("block must lie inside the span, and tick must be above 0")

    @cached_property
    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Request and response tokens (int32) of the rows."""
        return np.array(self.request, np.int32), np.array(self.response, np.int32)

    @property
    def window(self) -> float:
        return self.block

    @property
    def mean_rate(self) -> float:
        """Requests/s over the fitted span."""
        return len(self.time) / self.span

    def path(self, begin: float, end: float, seed: int) -> Blocks:
        """As much time as there is from `begin` to `end`; where it lies does not matter."""
        return Blocks(end - begin, self.mean_rate)

    def arrive(self, path: Blocks, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Arrival times (sorted seconds), and the row that each one repeats."""
        times, rows = [np.empty(0)], [np.empty(0, np.int64)]
        left = path.factor
        while left > 1e-9:
            time, row = self._once(path.span, rng)
            kept = rng.random(time.size) < left if left < 1 else slice(None)
            times.append(time[kept])
            rows.append(row[kept])
            left -= 1
        time, row = np.concatenate(times), np.concatenate(rows)
        order = np.argsort(time, kind="stable")
        return time[order], row[order]

    def _once(self, span: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        time = np.array(self.time)
        # On a coarse clock blocks begin and end with a tick.
        block = max(np.rint(self.block / self.tick), 1.0) * self.tick if self.tick else self.block
        number = int(np.ceil(span / block))
        begin = rng.random(number) * self.span
        if self.tick:
            begin = np.floor(begin / self.tick) * self.tick
        twice = np.concatenate([time, time + self.span])  # a block that runs over the end goes on at the beginning
        first, last = np.searchsorted(twice, begin), np.searchsorted(twice, begin + block)
        size = last - first
        place = np.arange(int(size.sum())) - np.repeat(np.cumsum(size) - size, size) + np.repeat(first, size)
        at = twice[place] - np.repeat(begin, size) + np.repeat(np.arange(number) * block, size)
        if self.tick:
            at = np.rint(at / self.tick) * self.tick
        inside = at < span
        return at[inside], (place % time.size)[inside]


def fit_bootstrap(
    arrivals: np.ndarray, failed: np.ndarray, request: np.ndarray, response: np.ndarray, span: float, block: float,
    *, tick: float | None,
) -> Bootstrap:  # fmt: skip
    """The rows of a class: sorted `arrivals` (s from 0, below `span`), which `failed`, and lengths in tokens."""
    return Bootstrap(
        span=span,
        block=min(block, span),
        tick=tick,
        time=np.minimum(arrivals.round(9), np.nextafter(span, 0)).tolist(),
        request=request.tolist(),
        response=np.where(failed, 0, np.maximum(response, 1)).tolist(),
    )
