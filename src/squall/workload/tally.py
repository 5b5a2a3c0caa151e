"""What a drawn trace holds, counted while it passes by, in memory that does not grow with it."""

from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import polars as pl

from squall.characterize.concurrency import MINIMUM_BINS, SCALES
from squall.trace import TraceMeta

_LARGEST = 1 << 22  # tokens that have a counter of their own
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


class Tally:
    """Counts of the requests in frames sorted by arrival, each of which comes after the one before."""

    meta: TraceMeta

    def __init__(self) -> None:
        self.requests = 0
        self.failed = 0
        self._first = self._last = 0.0
        self._gaps = _Moments()
        self._bins = [_Bins(scale) for scale in SCALES]
        self.request_tokens, self.response_tokens = Histogram(), Histogram()
        """Of the answered requests."""

    def seeing(self, frames: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
        """The same frames, each one counted as it passes."""
        for frame in frames:
            self.see(frame)
            yield frame

    def see(self, frame: pl.DataFrame) -> None:
        arrival = frame["arrival"].to_numpy()
        if arrival.size == 0:
            return
        if self.requests == 0:
            self._first = self._last = float(arrival[0])
            self._gaps.see(np.diff(arrival))
        else:
            self._gaps.see(np.diff(arrival, prepend=self._last))
        finest = np.floor((arrival - self._first) / SCALES[0]).astype(np.int64)
        begins = np.flatnonzero(np.diff(finest, prepend=-1))
        occupied, held = finest[begins], np.diff(begins, append=arrival.size)
        for coarser, bins in zip((*SCALES[1:], None), self._bins, strict=True):
            bins.see(occupied, held)
            if coarser is not None:
                of = occupied // round(coarser / bins.scale)
                begins = np.flatnonzero(np.diff(of, prepend=-1))
                occupied, held = of[begins], np.add.reduceat(held, begins)
        self.requests += arrival.size
        self._last = float(arrival[-1])
        failed = int(frame["failed"].sum())
        self.failed += failed
        answered = frame.filter(~pl.col("failed")) if failed else frame
        self.request_tokens.see(answered["request_tokens"].to_numpy())
        self.response_tokens.see(answered["response_tokens"].to_numpy())

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
        pairs = [(bins.scale, bins.index(self.span)) for bins in self._bins]
        return [(scale, index) for scale, index in pairs if index is not None]


class Histogram:
    """Whole numbers from 0, counted."""

    def __init__(self) -> None:
        self._counts = np.zeros(0, np.int64)
        self._large = np.zeros(0, np.int64)

    def see(self, values: np.ndarray) -> None:
        if values.size == 0:
            return
        if values.max() >= _LARGEST:
            self._large = np.sort(np.append(self._large, values[values >= _LARGEST]))
            values = values[values < _LARGEST]
        counts = np.bincount(values, minlength=self._counts.size)
        counts[: self._counts.size] += self._counts
        self._counts = counts

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

    def see(self, values: np.ndarray) -> None:
        if values.size == 0:
            return
        mean, n = float(values.mean()), self.n + values.size
        shift = mean - self.mean
        self.squares += float(values.var()) * values.size + shift**2 * self.n * values.size / n
        self.mean += shift * values.size / n
        self.n = n

    @property
    def cv(self) -> float | None:
        return float(np.sqrt(self.squares / self.n) / self.mean) if self.n and self.mean > 0 else None


class _Bins:
    """Sums over the whole bins of one scale; the last bin that was seen is still open."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self._sum = self._squares = 0.0
        self._open, self._held = -1, 0

    def see(self, occupied: np.ndarray, held: np.ndarray) -> None:
        counts = held.astype(float)
        if occupied[0] == self._open:
            counts[0] += self._held
        else:
            self._sum += self._held
            self._squares += self._held**2
        self._sum += float(counts[:-1].sum())
        self._squares += float(counts[:-1] @ counts[:-1])
        self._open, self._held = int(occupied[-1]), int(counts[-1])

    def index(self, span: float) -> float | None:
        bins = int(span // self.scale)
        if bins < MINIMUM_BINS or self._sum == 0:
            return None
        mean = self._sum / bins
        return self._squares / bins / mean - mean


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
