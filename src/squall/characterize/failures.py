"""Failures of the recorded system: how many, when, and whether they come together.

If every request failed on its own with the overall share p, the failures f_b among the c_b requests of bin b would be
binomial. Pearson's dispersion, the sum over the B bins with requests of (f_b - p c_b)^2 / (c_b p (1 - p)), divided by
B - 1, compares their squared deviations with that: 1 for independent failures, far above for outages.
"""

import msgspec
import numpy as np
from msgspec import Struct

from squall.characterize.concurrency import MAXIMUM_POINTS, MAXIMUM_WINDOWS, MINIMUM_BINS, bin_counts
from squall.characterize.summary import bin_width, correlation

BIN = 300.0
"""Bins in which failures are looked at for clustering, s."""


class FailureSeries(Struct, frozen=True, kw_only=True):
    """Requests and failures per bin over the whole trace, at most 500 bins of a round width."""

    start: float
    width: float
    requests: list[int]
    failed: list[int]


class LengthBucket(Struct, frozen=True, kw_only=True):
    """Failures among the requests of [low, high) tokens."""

    low: int
    high: int
    requests: int
    failed_share: float


class Failures(Struct, frozen=True, kw_only=True):
    """Null where there is nothing to compare: no failure, no success, or a trace of fewer than 5 bins."""

    failed: int
    share: float
    bin: float
    """Width of the bins for the five numbers below, s."""
    bins_with_failures: int | None = None
    dispersion: float | None = None
    """1 for independent failures."""
    lag1_count: float | None = None
    """Correlation of a bin's failures with those of the next."""
    lag1_share: float | None = None
    """The same of the failed share, over neighbours that both have requests."""
    load_correlation: float | None = None
    """Of a bin's failed share with its requests."""
    by_request_length: tuple[LengthBucket, ...] = ()
    """Empty where the lengths of failed requests are not recorded."""
    series: FailureSeries


def failure_statistics(
    arrivals: np.ndarray, failed: np.ndarray, request_tokens: np.ndarray, start: float, end: float
) -> Failures:
    """Failures over [start, end] s: sorted `arrivals` (s), `failed`, `request_tokens` (0 = unknown) per row."""
    width = bin_width(end - start, MAXIMUM_POINTS)
    series = FailureSeries(
        start=start,
        width=width,
        requests=bin_counts(arrivals, width, start, end).tolist(),
        failed=bin_counts(arrivals[failed], width, start, end).tolist(),
    )
    found = Failures(
        failed=int(failed.sum()),
        share=float(failed.mean()),
        bin=BIN,
        by_request_length=_by_length(failed, request_tokens),
        series=series,
    )
    if not MINIMUM_BINS <= (end - start) / BIN <= MAXIMUM_WINDOWS or not 0 < found.share < 1:
        return found
    count = bin_counts(arrivals, BIN, start, end).astype(float)
    lost = bin_counts(arrivals[failed], BIN, start, end).astype(float)
    busy = count > 0
    share = np.divide(lost, count, out=np.zeros_like(count), where=busy)
    pair = busy[1:] & busy[:-1]
    off = (lost - found.share * count)[busy] ** 2 / (found.share * (1 - found.share) * count[busy])
    return msgspec.structs.replace(
        found,
        bins_with_failures=int(np.count_nonzero(lost)),
        dispersion=float(off.sum() / (off.size - 1)) if off.size > 1 else None,
        lag1_count=correlation(lost[1:], lost[:-1]),
        lag1_share=correlation(share[1:][pair], share[:-1][pair]),
        load_correlation=correlation(share[busy], count[busy]),
    )


def _by_length(failed: np.ndarray, tokens: np.ndarray) -> tuple[LengthBucket, ...]:
    """Failed share per factor of 2 of the request length, if failed requests have one."""
    length_known = tokens > 0
    if not (failed & length_known).any():
        return ()
    octave = np.floor(np.log2(tokens[length_known])).astype(np.int64)
    requests, lost = np.bincount(octave), np.bincount(octave, failed[length_known])
    return tuple(
        LengthBucket(low=2**i, high=2 ** (i + 1), requests=int(requests[i]), failed_share=float(lost[i] / requests[i]))
        for i in np.flatnonzero(requests).tolist()
    )
