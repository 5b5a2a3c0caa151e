"""Failures of the recorded system: how many, when, and whether they come together.

If every request failed on its own with the overall share p, the failures f_b among the c_b requests of bin b would be
binomial. Pearson's dispersion, the sum over the B bins with requests of (f_b - p c_b)^2 / (c_b p (1 - p)), divided by
B - 1, compares their squared deviations with that: 1 for independent failures, far above for outages.
"""

import msgspec
import numpy as np
from msgspec import Struct

from squall.characterize.concurrency import MAXIMUM_POINTS, MAXIMUM_WINDOWS, MINIMUM_BINS, GammaWindows, bin_counts
from squall.characterize.summary import Octaves, Summary, Tally, bin_width, correlation, octaves, ranks, summary

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


class AlphaBucket(Struct, frozen=True, kw_only=True):
    """Failures in the windows whose gaps have a Gamma shape alpha in [low, high)."""

    low: float
    high: float | None
    """null: without limit."""
    windows: int
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
    by_alpha: tuple[AlphaBucket, ...] = ()
    """By burstiness of the window; empty if no window has a Gamma fit or nothing failed."""
    alpha_correlation: float | None = None
    """Rank correlation of a window's failed share with its alpha: below 0, bursty windows fail more."""
    runs: Summary = Summary()
    """Lengths of the runs of requests that failed one after the other; independent failures have a mean of
    1 / (1 - share)."""
    runs_octaves: Octaves = Octaves()
    """The runs by their length."""
    series: FailureSeries


BURSTINESS = (0.0, 0.25, 0.5, 1.0, 2.0)
"""Lower limits of the buckets of alpha."""


def failure_statistics(
    arrivals: np.ndarray,
    failed: np.ndarray,
    request_tokens: np.ndarray,
    start: float,
    end: float,
    windows: GammaWindows | None = None,
) -> Failures:
    """Failures over [start, end] s: sorted `arrivals` (s), `failed`, `request_tokens` (0 = unknown) per row.

    `windows` are the Gamma fits of the same arrivals.
    """
    width = bin_width(end - start, MAXIMUM_POINTS)
    series = FailureSeries(
        start=start,
        width=width,
        requests=bin_counts(arrivals, width, start, end).tolist(),
        failed=bin_counts(arrivals[failed], width, start, end).tolist(),
    )
    runs = _runs(failed)
    found = Failures(
        failed=int(failed.sum()),
        share=float(failed.mean()),
        bin=BIN,
        by_request_length=_by_length(failed, request_tokens),
        runs=summary(runs),
        runs_octaves=octaves(runs),
        series=series,
    )
    if windows is not None and found.failed:
        buckets, against_alpha = _by_alpha(arrivals, failed, windows)
        found = msgspec.structs.replace(found, by_alpha=buckets, alpha_correlation=against_alpha)
    if not MINIMUM_BINS <= (end - start) / BIN <= MAXIMUM_WINDOWS or not 0 < found.share < 1:
        return found
    count = bin_counts(arrivals, BIN, start, end).astype(float)
    lost = bin_counts(arrivals[failed], BIN, start, end).astype(float)
    return msgspec.structs.replace(found, **msgspec.structs.asdict(clustering(count, lost)))


class Clustering(Struct, frozen=True, kw_only=True):
    """Whether failures come together; the fields are those of Failures."""

    bins_with_failures: int
    dispersion: float | None
    lag1_count: float | None
    lag1_share: float | None
    load_correlation: float | None


def clustering(count: np.ndarray, lost: np.ndarray) -> Clustering:
    """Of requests and of failures per bin, in order of time."""
    busy = count > 0
    share = np.divide(lost, count, out=np.zeros(count.size), where=busy)
    overall = lost.sum() / max(count.sum(), 1)
    pair = busy[1:] & busy[:-1]
    expected = count[busy] * overall * (1 - overall)
    dispersed = expected.size > 1 and expected.all()
    return Clustering(
        bins_with_failures=int(np.count_nonzero(lost)),
        dispersion=float(((lost - overall * count)[busy] ** 2 / expected).sum() / (expected.size - 1))
        if dispersed
        else None,
        lag1_count=correlation(lost[1:], lost[:-1]),
        lag1_share=correlation(share[1:][pair], share[:-1][pair]),
        load_correlation=correlation(share[busy], count[busy]),
    )


def _by_length(failed: np.ndarray, tokens: np.ndarray) -> tuple[LengthBucket, ...]:
    """Failed share per factor of 2 of the request length, if failed requests have one."""
    lost_lengths = Tally.of_array(tokens, failed)
    if not lost_lengths.values.any():
        return ()
    octaves = int(tokens.max()).bit_length()
    requests, lost = (_by_octave(tally, octaves) for tally in (Tally.of_array(tokens), lost_lengths))
    return tuple(
        LengthBucket(low=2**i, high=2 ** (i + 1), requests=int(requests[i]), failed_share=float(lost[i] / requests[i]))
        for i in np.flatnonzero(requests).tolist()
    )


def _by_octave(tally: Tally, octaves: int) -> np.ndarray:
    """How many of the numbers from 1 on lie in each factor of 2."""
    known = tally.values > 0
    octave = np.floor(np.log2(tally.values[known])).astype(np.int64)
    return np.bincount(octave, tally.counts[known], octaves)


def _by_alpha(
    arrivals: np.ndarray, failed: np.ndarray, windows: GammaWindows
) -> tuple[tuple[AlphaBucket, ...], float | None]:
    """Failed share by the burstiness of the window, and its rank correlation with alpha over the fitted windows."""
    window_of = np.floor((arrivals[failed] - windows.start[0]) / windows.window).astype(np.int64)
    lost = np.bincount(np.minimum(window_of, windows.count.size - 1), minlength=windows.count.size)
    fitted = windows.fitted & (windows.count > 0)
    alpha, count, lost = windows.alpha[fitted], windows.count[fitted], lost[fitted]
    if alpha.size == 0:
        return (), None
    bucket = np.digitize(alpha, BURSTINESS) - 1
    number, requests, failures = (np.bincount(bucket, weight) for weight in (None, count, lost))
    buckets = tuple(
        AlphaBucket(
            low=BURSTINESS[k],
            high=BURSTINESS[k + 1] if k + 1 < len(BURSTINESS) else None,
            windows=int(number[k]),
            requests=int(requests[k]),
            failed_share=float(failures[k] / requests[k]),
        )
        for k in np.flatnonzero(number).tolist()
    )
    return buckets, correlation(ranks(alpha), ranks(lost / count))


def _runs(failed: np.ndarray) -> np.ndarray:
    """Lengths of the runs of failures."""
    edges = np.flatnonzero(np.diff(failed, prepend=False, append=False))
    return edges[1::2] - edges[::2]
