"""What a drawn trace holds, counted while it passes by, in memory that does not grow with it."""

from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import polars as pl

from squall.characterize.concurrency import MINIMUM_BINS, SCALES
from squall.trace import TraceMeta

_LARGEST = 1 << 22  # tokens that have a counter of their own
_RATIOS = np.rint(np.array(SCALES[1:]) / SCALES[:-1]).astype(np.int64)
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


class Tally:
    """Counts of the requests in frames sorted by arrival, each of which comes after the one before."""

    meta: TraceMeta

    def __init__(self) -> None:
        self.requests = 0
        self.failed = 0
        self._first = self._last = 0.0
        self._gaps = _Moments()
        # Of each scale: the bin that is open, and what it holds; of those that are closed, the counts' two sums.
        self._bins, self._sums = np.zeros((len(SCALES), 2), np.int64), np.zeros((len(SCALES), 2))
        self.request_tokens, self.response_tokens = Histogram(), Histogram()
        """Of the answered requests."""

    def seeing(self, frames: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
        """The same frames, each one counted as it passes."""
        for frame in frames:
            self.see(frame)
            yield frame

    def see(self, frame: pl.DataFrame) -> None:
        from squall.workload.compiled.tally import count_arrivals

        arrival = frame["arrival"].to_numpy()
        if arrival.size == 0:
            return
        began = self.requests > 0
        if not began:
            self._first = self._last = float(arrival[0])
        pivot = (float(arrival[-1]) - self._last) / arrival.size
        total, squares = count_arrivals(
            arrival, self._first, self._last, pivot, SCALES[0], _RATIOS, self._bins, self._sums
        )
        if began:
            self._gaps.see(arrival.size, pivot, total, squares)
        else:  # the first of all ends no gap, but one of 0 s was counted
            self._gaps.see(arrival.size - 1, pivot, total + pivot, squares - pivot**2)
        self.requests += arrival.size
        self._last = float(arrival[-1])
        failed = frame["failed"].to_numpy()
        self.failed += int(np.count_nonzero(failed))
        self.request_tokens.see(frame["request_tokens"].to_numpy(), failed)
        self.response_tokens.see(frame["response_tokens"].to_numpy(), failed)

    def closed(self, meta: TraceMeta) -> Self:
        """This tally with the metadata of what it saw."""
        self.meta = meta
        return self

    @property
    def span(self) -> float:
        """Seconds from the first to the last arrival."""
        return self._last - self._first

    @property
    def rate(self) -> float:
        """Mean requests/s: (n - 1) gaps over the span; nan if all requests arrive at once."""
        return (self.requests - 1) / self.span if self.span > 0 else float("nan")

    @property
    def gap_cv(self) -> float | None:
        return self._gaps.cv

    @property
    def dispersion(self) -> list[tuple[float, float]]:
        """(scale, index) pairs, as characterize.concurrency.dispersion has them."""
        found = []
        for scale, (total, squares) in zip(SCALES, self._sums.tolist(), strict=True):
            bins = int(self.span // scale)
            if bins >= MINIMUM_BINS and total > 0:
                mean = total / bins
                found.append((scale, squares / bins / mean - mean))
        return found


class Histogram:
    """Whole numbers from 0, counted."""

    def __init__(self) -> None:
        self._counts = np.zeros(0, np.int64)
        self._large = np.zeros(0, np.int64)

    def see(self, values: np.ndarray, left_out: np.ndarray) -> None:
        """Count the values that are not `left_out`."""
        from squall.workload.compiled.tally import count_tokens

        largest = int(values.max(initial=0))
        if largest >= _LARGEST:
            large = values >= _LARGEST
            self._large = np.sort(np.append(self._large, values[large & ~left_out]))
            values, left_out = values[~large], left_out[~large]
            largest = _LARGEST - 1
        if largest >= self._counts.size:
            self._counts = np.append(self._counts, np.zeros(largest + 1 - self._counts.size, np.int64))
        count_tokens(values, left_out, self._counts)

    def summary(self) -> dict[str, float]:
        """Mean, p50, p90, p99 and max, as np.quantile has them; {} if nothing was seen."""
        values = np.append(np.flatnonzero(self._counts), self._large)
        if values.size == 0:
            return {}
        upto = np.cumsum(np.append(self._counts[self._counts > 0], np.ones(self._large.size, np.int64)))
        mean = float(values @ np.diff(upto, prepend=0)) / float(upto[-1])
        result = {"mean": mean}
        for name, level in QUANTILES.items():
            at = level * (int(upto[-1]) - 1)
            low, high = values[np.searchsorted(upto, [int(at), int(np.ceil(at))], side="right")]
            result[name] = float(low + (high - low) * (at - int(at)))
        return result


class _Moments:
    """Mean and variance in one pass (Chan, Golub and LeVeque, 1979)."""

    def __init__(self) -> None:
        self.n, self.mean, self.squares = 0, 0.0, 0.0

    def see(self, number: int, pivot: float, total: float, squares: float) -> None:
        """Add `number` values, by the sums of how they differ from `pivot` and of its squares."""
        if number == 0:
            return
        mean, n = pivot + total / number, self.n + number
        shift = mean - self.mean
        self.squares += squares - total**2 / number + shift**2 * self.n * number / n
        self.mean += shift * number / n
        self.n = n

    @property
    def cv(self) -> float | None:
        return float(np.sqrt(self.squares / self.n) / self.mean) if self.n and self.mean > 0 else None


def tally_of(frame: pl.DataFrame) -> Tally:
    """The tally of a table in memory."""
    tally = Tally()
    tally.see(frame)
    return tally


def as_json(tally: Tally) -> dict[str, Any]:
    """What a tally holds, as JSON data."""
    return {
        "requests": tally.requests,
        "failed_share": tally.failed / tally.requests if tally.requests else None,
        "duration": tally.span,
        "rate": tally.rate,
        "gap_cv": tally.gap_cv,
        "dispersion": [{"scale": scale, "index": index} for scale, index in tally.dispersion],
        "request_tokens": tally.request_tokens.summary(),
        "response_tokens": tally.response_tokens.summary(),
    }
