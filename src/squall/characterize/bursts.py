"""Bursts: when, how long and how large, at several scales.

At a scale of s seconds the trace is ON in a bin of s seconds that holds more than twice the trace's mean count and
more than Poisson arrivals of that mean have in one bin of a thousand; a burst is a run of such bins, and the runs
between are OFF. So Poisson traffic has hardly any burst, and a plateau of hours is one burst, not many.
"""

import numpy as np
import polars as pl
from msgspec import Struct

from squall.characterize.concurrency import MAXIMUM_WINDOWS, bin_counts
from squall.characterize.summary import Octaves, Summary, octaves, summary

SCALES = (10.0, 60.0, 600.0, 3600.0)
"""Bins, s."""
ABOVE_MEAN = 2.0
ABOVE_POISSON = 0.999
MINIMUM_BINS = 30
MOST_BURSTS = 100


class BurstSeries(Struct, frozen=True, kw_only=True):
    """Bursts in order of time: the 100 with most requests, if there are more."""

    start: list[float]
    length: list[float]
    """s"""
    requests: list[int]


class Bursts(Struct, frozen=True, kw_only=True):
    """The bursts at one scale."""

    scale: float
    """Bin, s."""
    threshold: float
    """A bin is ON above this many requests."""
    bursts: int
    time_share: float
    """Share of the bins that are ON."""
    request_share: float
    """Share of the requests in them."""
    empty_share: float
    """Share of the bins without a request."""
    peak_to_mean: float
    """Fullest bin over the mean bin."""
    length: Summary
    """s"""
    requests: Summary
    """Per burst."""
    pause: Summary
    """OFF between two bursts, s."""
    on_runs: Octaves
    """Bursts by their length in bins."""
    off_runs: Octaves
    """Pauses by their length in bins."""
    series: BurstSeries


def burst_table(arrivals: np.ndarray, scale: float, start: float, end: float) -> tuple[pl.DataFrame, np.ndarray, float]:
    """Every burst (columns start, length, requests, peak: requests of its fullest bin), the counts, the threshold."""
    counts = bin_counts(arrivals, scale, start, end)[: int((end - start) // scale)]
    return _table(counts, scale, start)


def _table(counts: np.ndarray, scale: float, start: float) -> tuple[pl.DataFrame, np.ndarray, float]:
    """The same from the counts in bins of `scale` s."""
    from scipy.special import pdtrik

    mean = float(counts.mean())
    threshold = max(ABOVE_MEAN * mean, float(np.ceil(pdtrik(ABOVE_POISSON, mean))))
    edges = np.flatnonzero(np.diff(counts > threshold, prepend=False, append=False))
    first, last = edges[::2], edges[1::2]
    total = np.concatenate(([0], np.cumsum(counts)))
    columns = {
        "start": start + first * scale,
        "length": (last - first) * scale,
        "requests": total[last] - total[first],
        # Every second run between two edges is a burst.
        "peak": np.maximum.reduceat(np.append(counts, 0), edges)[::2] if edges.size else first,
    }
    return pl.DataFrame(columns), counts, threshold


def bursts(arrivals: np.ndarray, start: float, end: float) -> list[Bursts]:
    """Bursts over [start, end] s at every scale with 30 bins and a request per bin; `arrivals` are sorted seconds."""
    found, counts, of = [], np.zeros(0, np.int64), 0.0
    for scale in SCALES:
        bins = (end - start) // scale
        if not MINIMUM_BINS <= bins <= MAXIMUM_WINDOWS or arrivals.size < bins:
            continue
        if arrivals[0] >= start + bins * scale:
            continue
        if of:  # each scale is a multiple of the one before
            ratio = int(scale / of)
            counts = counts[: int(bins) * ratio].reshape(-1, ratio).sum(1)
        else:
            counts = bin_counts(arrivals, scale, start, end)[: int(bins)]
        of = scale
        table, counts, threshold = _table(counts, scale, start)
        start_of, length, requests = (table[name].to_numpy() for name in ("start", "length", "requests"))
        shown = np.sort(np.argsort(-requests, kind="stable")[:MOST_BURSTS])
        pause = start_of[1:] - (start_of + length)[:-1]
        found.append(
            Bursts(
                scale=scale,
                threshold=threshold,
                bursts=len(table),
                time_share=float(length.sum() / scale / counts.size),
                request_share=float(requests.sum() / counts.sum()),
                empty_share=float(np.mean(counts == 0)),
                peak_to_mean=float(counts.max() / counts.mean()),
                length=summary(length),
                requests=summary(requests),
                pause=summary(pause),
                on_runs=octaves(np.rint(length / scale)),
                off_runs=octaves(np.rint(pause / scale)),
                series=BurstSeries(
                    start=start_of[shown].tolist(), length=length[shown].tolist(), requests=requests[shown].tolist()
                ),
            )
        )
    return found
