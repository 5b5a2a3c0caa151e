"""When requests arrive: rate, gaps, and burstiness over all time scales.

Gaps tau inside one window of time follow Gamma(shape alpha, rate beta),

    f(tau) = beta^alpha tau^(alpha - 1) e^(-beta tau) / Gamma(alpha),   mean alpha/beta,   CV 1/sqrt(alpha),

so that alpha = 1 is a Poisson process, alpha < 1 is bursty and alpha > 1 regular (Wang et al., BurstGPT, KDD 2025,
who take windows of 20 minutes). One CV cannot say over which time scales bursts cluster; the index of dispersion of
counts, IDC(s) = Var N(s) / E N(s) of the counts in bins of s seconds, can: it is 1 at every scale for a Poisson
process, levels off at CV^2 for a renewal process, and keeps growing for a rate that itself varies
(Cox and Lewis, The Statistical Analysis of Series of Events, 1966).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from msgspec import Struct

from squall.characterize.summary import (
    LONGEST_TABLE,
    PIECE,
    Summary,
    Tally,
    bin_width,
    describe,
    dot,
    known,
    pieces,
    summary,
    sums_of_runs,
)
from squall.errors import InputError
from squall.seeds import DEFAULT_SEED
from squall.trace.ties import despread as despread
from squall.units import in_words

SCALES = (1.0, 10.0, 60.0, 300.0, 1200.0, 3600.0, 86400.0)
"""Scales of the index of dispersion, in seconds."""
MINIMUM_BINS = 5
"""A scale needs this many whole bins in the span; fewer say nothing about a variance."""
MAXIMUM_WINDOWS = 10_000_000
"""More windows than this are a slip in the flag, not a question."""

STRIDES = (64, 8, 1)
"""The distance between gaps and fit is looked for at every so many gaps first, and closer where it may be larger."""
MAXIMUM_POINTS = 500
"""A series that is kept for a chart has at most this many points."""
_FEW_BINS = 8
"""Bins are few if there are so many arrivals to one of them."""

FitMethod = Literal["moments", "mle"]


class Gaps(Summary, frozen=True, kw_only=True):
    """Gaps between arrivals in seconds, as recorded."""

    tied: float | None = None
    """Share of gaps that are 0: requests with one recorded time."""
    lag1: float | None = None
    """Correlation of a gap with the next one; 0 for a renewal process."""
    spread_cv: float | None = None
    """CV after the arrivals were spread inside the clock's ticks (`despread`); null where the clock has none."""


class GammaSeries(Struct, frozen=True, kw_only=True):
    """The fitted windows in order; where there are more than 500, medians over as many neighbours as needed."""

    start: list[float]
    rate: list[float]
    alpha: list[float]
    beta: list[float]
    cv: list[float]


REJECTED = 1.358
"""The 5 % point of sqrt(n) times the KS distance, for parameters known beforehand."""


class Goodness(Struct, frozen=True, kw_only=True):
    """Fitted windows by sqrt(n) times the KS distance of their n gaps, in [edges[i], edges[i + 1]) and beyond."""

    edges: list[float]
    windows: list[int]


class GammaFits(Struct, frozen=True, kw_only=True):
    """The windows' Gamma fits in a few numbers: quantiles over the windows that have a fit."""

    window: float
    """Length of a window, s."""
    method: FitMethod
    tick: float | None
    """Arrivals were spread inside ticks of this many seconds first; null: fitted as recorded."""
    windows: int
    """Windows from the first arrival to the last."""
    empty: int
    fitted: int
    skipped: int
    """Windows with requests but too few gaps, or gaps without variance."""
    bursty: int
    """Fitted windows with alpha < 1."""
    rejected: int
    """Fitted windows whose KS distance exceeds 1.358 / sqrt(n). That is the 5 % point for parameters known beforehand;
    for fitted ones it is strict, so at least these windows are not Gamma."""
    alpha: Summary
    """Shape."""
    beta: Summary
    """Rate parameter, 1/s."""
    cv: Summary
    ks: Summary
    goodness: Goodness
    series: GammaSeries


class Dispersion(Struct, frozen=True, kw_only=True):
    """Index of dispersion of counts at one scale: 1 for Poisson arrivals."""

    scale: float
    """Bin, s."""
    index: float
    """Of the arrivals as recorded."""
    spread_index: float | None = None
    """Of the arrivals spread inside the clock's ticks, at scales below 10 ticks, where ticks colour `index`."""


class RateSeries(Struct, frozen=True, kw_only=True):
    """Requests per bin over the whole trace, at most 500 bins of a round width."""

    start: float
    """Start of the first bin, s on the trace's clock."""
    width: float
    """s"""
    counts: list[int]


@dataclass(frozen=True)
class GammaWindows:
    """The Gamma fit of the gaps in each window; arrays have one value per window, nan where a window was skipped."""

    window: float
    """Length of a window, s."""
    start: np.ndarray
    """Start of each window, s on the clock of the arrivals, without a hole."""
    count: np.ndarray
    """Arrivals in each window."""
    gaps: np.ndarray
    """Gaps that the fit used; a gap belongs to the window of its later request."""
    rate: np.ndarray
    """Arrivals/s: count / window, also in a first or last window that the trace covers only in part."""
    alpha: np.ndarray
    """Shape."""
    beta: np.ndarray
    """Rate parameter, 1/s (not a scale): the mean gap is alpha / beta."""
    cv: np.ndarray
    """Coefficient of variation of the gaps, population standard deviation / mean."""
    ks: np.ndarray
    """Kolmogorov-Smirnov distance between the gaps and the fitted Gamma."""
    mean: np.ndarray
    variance: np.ndarray
    log_mean: np.ndarray
    """Mean and population variance of the gaps, and mean of their logarithms (nan for the method of moments); also of
    skipped windows, nan only without a gap."""
    method: FitMethod
    tick: float | None
    """The arrivals were spread inside ticks of this many seconds before the fit; None: fitted as recorded."""

    @property
    def fitted(self) -> np.ndarray:
        """Which windows have a fit."""
        return np.isfinite(self.alpha)

    @property
    def skipped(self) -> int:
        """Windows with arrivals but without a fit: too few gaps, or gaps without variance."""
        return int(np.count_nonzero((self.count > 0) & ~self.fitted))


def gamma_windows(
    arrivals: np.ndarray,
    window: float,
    *,
    tick: float | None = None,
    method: FitMethod = "moments",
    minimum: int = 10,
    seed: int = DEFAULT_SEED,
    phase: float = 0.0,
) -> GammaWindows:
    """Fit a Gamma distribution to the gaps in each window of time.

    `arrivals` are sorted seconds; windows of `window` seconds start at its multiples less `phase` (the time of day at
    arrival 0, for windows that begin on the hour), from the first arrival's to the last's. With `tick` (resolution of
    the recorded times, s) the arrivals are first spread by `despread`. "moments" takes alpha = m^2/v and beta = m/v
    (population variance); "mle" is maximum likelihood over the positive gaps.
    Windows with fewer than `minimum` gaps, or whose gaps are all equal, are skipped.
    """
    if tick:
        arrivals = despread(arrivals, tick, seed)
    arrivals = np.asarray(arrivals, dtype=float)
    # Divided as in _whole_windows: `//` may round the other way where an arrival lies on a border.
    first, last = (int(np.floor((arrivals[end] + phase) / window)) for end in (0, -1))
    windows = last - first + 1
    if windows > MAXIMUM_WINDOWS:
        raise InputError(
            f"window: {in_words(window)} cuts {in_words(arrivals[-1] - arrivals[0])} into {windows:,} windows; "
            f"take one that gives at most {MAXIMUM_WINDOWS:,}."
        )
    count, gaps = np.zeros(windows, np.int64), np.zeros(windows, np.int64)
    fit = {name: np.full(windows, np.nan) for name in ("alpha", "beta", "cv", "ks", "mean", "variance", "log_mean")}
    for begin, slot in _whole_windows(arrivals, window, phase):
        at = slot - first
        run = np.flatnonzero(np.diff(at, prepend=-1))
        occupied = at[run]
        sizes = np.diff(run, append=at.size)
        count[occupied] = sizes
        # The first gap of a piece comes from the arrival before it; the very first arrival has none.
        gap = np.diff(arrivals[max(begin - 1, 0) : begin + at.size])
        sizes[0] -= at.size - gap.size
        gaps[occupied], found = _fit(gap, sizes, method, minimum)
        for name, values in found.items():
            fit[name][occupied] = values
    return GammaWindows(
        window=window,
        start=(first + np.arange(windows)) * window - phase,
        count=count,
        gaps=gaps,
        rate=count / window,
        **fit,
        method=method,
        tick=tick,
    )


def _whole_windows(arrivals: np.ndarray, window: float, phase: float) -> Iterator[tuple[int, np.ndarray]]:
    """The arrivals in pieces of whole windows: place of the first, and the window of each, counted from -phase."""
    begin, size = 0, PIECE
    while begin < arrivals.size:
        slot = np.floor((arrivals[begin : begin + size] + phase) / window).astype(np.int64)
        if begin + slot.size < arrivals.size:
            slot = slot[: np.searchsorted(slot, slot[-1])]  # the last window may go on behind the piece
            if slot.size == 0:
                size *= 2
                continue
        yield begin, slot
        begin, size = begin + slot.size, PIECE


def _fit(
    gap: np.ndarray, gaps: np.ndarray, method: FitMethod, minimum: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Gaps used and fitted values of windows that hold `gaps` of the `gap`s each, one after another."""
    if method == "mle":
        positive = gap > 0
        gap, gaps = gap[positive], sums_of_runs(positive, gaps).astype(np.int64)
    log_mean = np.full(gaps.size, np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = sums_of_runs(gap, gaps) / gaps
        variance = sums_of_runs((gap - np.repeat(mean, gaps)) ** 2, gaps) / gaps
        # Below this the spread is the rounding of the clock, not a property of the traffic.
        usable = (gaps >= max(minimum, 2)) & (variance > 1e-12 * mean**2)
        cv = np.where(usable, np.sqrt(variance) / mean, np.nan)
        if method == "moments":
            alpha = cv**-2.0
        else:
            log_mean = sums_of_runs(np.log(gap), gaps) / gaps
            alpha = gamma_shape(np.where(usable, np.log(mean) - log_mean, np.nan))
        beta = alpha / mean
    ks = np.full(gaps.size, np.nan)
    fitted = np.isfinite(alpha)
    if fitted.any():
        gap = gap if fitted.all() else gap[np.repeat(fitted, gaps)]
        ks[fitted] = _gamma_distance(gap, gaps[fitted], alpha[fitted], beta[fitted])
    return gaps, {
        "alpha": alpha,
        "beta": beta,
        "cv": cv,
        "ks": ks,
        "mean": mean,
        "variance": variance,
        "log_mean": log_mean,
    }


def gamma_shape(spread: np.ndarray) -> np.ndarray:
    """The shape of largest likelihood: log(alpha) - digamma(alpha) = spread, where spread = log(mean) - mean(log) > 0.

    Newton's method in 1/alpha from Minka's start (Estimating a Gamma distribution, 2002); four steps reach 1e-12.
    """
    from scipy.special import digamma, polygamma

    alpha = (3 - spread + np.sqrt((spread - 3) ** 2 + 24 * spread)) / (12 * spread)
    for _ in range(4):
        error = np.log(alpha) - digamma(alpha) - spread
        alpha = 1 / (1 / alpha + error / (alpha**2 * (1 / alpha - polygamma(1, alpha))))
    return alpha


def dispersion(
    arrivals: np.ndarray,
    scales: tuple[float, ...] = SCALES,
    start: float | None = None,
    end: float | None = None,
) -> list[tuple[float, float]]:
    """(scale, index) pairs: the index of dispersion of counts (population variance / mean) in bins of `scale` seconds.

    `arrivals` are sorted seconds. Bins run from `start` (default: the first arrival) and end with the last whole bin
    before `end` (default: the last arrival). Scales with fewer than 5 whole bins are left out.
    """
    start = float(arrivals[0]) if start is None else start
    end = float(arrivals[-1]) if end is None else end
    result = []
    occupied, held, of = np.zeros(0, np.int64), np.zeros(0, np.int64), 0.0
    for scale in scales:
        bins = int((end - start) // scale)
        if bins < MINIMUM_BINS or arrivals[0] >= start + bins * scale:
            continue
        # Sorted arrivals: equal bins stand side by side, so the empty ones need no memory, however long the span is.
        # Bins of a multiple of the scale before are made of its bins.
        if of and scale % of == 0:
            occupied, held = _merged(occupied // int(scale / of), held)
        else:
            occupied, held = _occupied(arrivals, scale, start)
        of = scale
        counts = held[: np.searchsorted(occupied, bins)]
        mean = float(counts.sum()) / bins
        result.append((scale, dot(counts, counts) / bins / mean - mean))
    return result


def _occupied(arrivals: np.ndarray, width: float, start: float) -> tuple[np.ndarray, np.ndarray]:
    """The bins of `width` s from `start` on that hold any of the sorted `arrivals`, and how many each holds."""
    bins, counts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for (part,) in pieces(arrivals):
        bin_of = np.floor((part - start) / width).astype(np.int64)
        last = _ends(bin_of)
        bins.append(bin_of[last])
        counts.append(np.diff(last, prepend=-1))
    return _merged(np.concatenate(bins), np.concatenate(counts))  # a bin may lie across two pieces


def _merged(bins: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ascending `bins` with equal ones made one."""
    last = _ends(bins)
    return bins[last], np.diff(np.cumsum(counts)[last], prepend=0)


def _ends(numbers: np.ndarray) -> np.ndarray:
    """Where the runs of equal numbers end."""
    return np.append(np.flatnonzero(numbers[1:] != numbers[:-1]), numbers.size - 1)


def bin_counts(arrivals: np.ndarray, width: float, start: float, end: float) -> np.ndarray:
    """Sorted arrivals (int) in each bin of `width` s that covers [start, end]; the last bin may reach beyond `end`."""
    bins = max(1, int(np.floor((end - start) / width)) + 1)
    if bins < arrivals.size / _FEW_BINS:  # sorted arrivals are cut at the edges of few bins
        places = np.searchsorted(arrivals, start + width * np.arange(bins))
        return np.diff(places, append=np.searchsorted(arrivals, end, side="right"))
    counts = np.zeros(bins, np.int64)
    inside = slice(np.searchsorted(arrivals, start), np.searchsorted(arrivals, end, side="right"))
    for (part,) in pieces(arrivals[inside]):
        bin_of = ((part - start) / width).astype(np.int64)
        low, high = int(bin_of[0]), int(bin_of[-1]) + 1
        counts[low:high] += np.bincount(bin_of - low)
    return counts


def gap_statistics(arrivals: np.ndarray, spread: np.ndarray | None = None) -> Gaps:
    """The gaps between sorted `arrivals` (s) as recorded, with the CV of `spread` (from `despread`) beside it."""
    gaps = arrivals.size - 1
    if gaps < 1:
        return Gaps()
    beside = None if spread is None else (spread[-1] - spread[0]) / gaps
    return Gaps(
        **_gap_sample(arrivals),
        tied=float(np.count_nonzero(arrivals[1:] == arrivals[:-1]) / gaps),
        lag1=_lag1(arrivals),
        spread_cv=None if spread is None or not beside else known(np.sqrt(_variance(spread, beside)) / beside),
    )


def _gap_sample(arrivals: np.ndarray) -> dict[str, Any]:
    """The fields of a Summary of the gaps; those of whole seconds are counted, which is faster than sorting them."""
    longest = max(float(np.diff(part).max()) for part in _neighbours(arrivals))
    if longest < LONGEST_TABLE and all((np.floor(part) == part).all() for (part,) in pieces(arrivals)):
        tally = Tally.of((np.diff(part).astype(np.int64) for part in _neighbours(arrivals)), int(longest))
        return {name: value if name == "n" else float(value) for name, value in tally.describe().items()}
    return describe(np.diff(arrivals))


def _neighbours(arrivals: np.ndarray, more: int = 1) -> Iterator[np.ndarray]:
    """`arrivals` in pieces, each with the first `more` elements of the next, so that every gap is in one piece."""
    for begin in range(0, arrivals.size - more, PIECE):
        yield arrivals[begin : begin + PIECE + more]


def _variance(arrivals: np.ndarray, mean: float) -> float:
    """Population variance of the gaps, whose mean is `mean`."""
    return float(sum(((np.diff(part) - mean) ** 2).sum() for part in _neighbours(arrivals)) / (arrivals.size - 1))


def _lag1(arrivals: np.ndarray) -> float | None:
    """Correlation of a gap with the next one; None for fewer than 3 pairs, or if one side is constant."""
    pairs = arrivals.size - 2
    if pairs < 3:
        return None
    middles = (arrivals[-2] - arrivals[0]) / pairs, (arrivals[-1] - arrivals[1]) / pairs
    xx = yy = xy = 0.0
    for part in _neighbours(arrivals, 2):
        gaps = np.diff(part)
        x, y = gaps[:-1] - middles[0], gaps[1:] - middles[1]
        xx, yy, xy = xx + dot(x, x), yy + dot(y, y), xy + dot(x, y)
    scale = float(np.sqrt(xx * yy))
    return float(xy) / scale if scale > 0 else None


def dispersion_curve(
    arrivals: np.ndarray, start: float, end: float, spread: np.ndarray | None = None, tick: float | None = None
) -> list[Dispersion]:
    """`dispersion` over [start, end] s, with that of the `spread` arrivals beside it at scales below 10 `tick`s."""
    fine = tuple(scale for scale in SCALES if tick is not None and scale < 10 * tick)
    beside = dict(dispersion(spread, fine, start, end)) if spread is not None else {}
    return [
        Dispersion(scale=scale, index=index, spread_index=beside.get(scale))
        for scale, index in dispersion(arrivals, SCALES, start, end)
    ]


def gamma_fits(windows: GammaWindows, tick: float | None = None) -> GammaFits:
    """The fits of all windows in a few numbers, with a series short enough for a chart.

    `tick` says that the arrivals had been spread inside such ticks before.
    """
    fitted = np.flatnonzero(windows.fitted)
    points = min(fitted.size, MAXIMUM_POINTS)
    size, longer = divmod(fitted.size, points) if points else (0, 0)

    def medians(values: np.ndarray) -> list[float]:
        # The first points stand for one window more than the others.
        found = np.split(values[fitted], [longer * (size + 1)])
        rows = (part.reshape(-1, width) for part, width in zip(found, (size + 1, size), strict=True) if part.size)
        return [median for row in rows for median in np.median(row, axis=1).tolist()]

    scaled = windows.ks[fitted] * np.sqrt(windows.gaps[fitted])
    edges = [0.2 * k for k in range(21)]
    return GammaFits(
        goodness=Goodness(edges=edges, windows=np.bincount(np.digitize(scaled, edges) - 1, minlength=21).tolist()),
        window=windows.window,
        method=windows.method,
        tick=windows.tick or tick,
        windows=windows.count.size,
        empty=int(np.count_nonzero(windows.count == 0)),
        fitted=fitted.size,
        skipped=windows.skipped,
        bursty=int(np.count_nonzero(windows.alpha[fitted] < 1)),
        rejected=int(np.count_nonzero(scaled > REJECTED)),
        alpha=summary(windows.alpha),
        beta=summary(windows.beta),
        cv=summary(windows.cv),
        ks=summary(windows.ks),
        series=GammaSeries(
            start=medians(windows.start),
            rate=medians(windows.rate),
            alpha=medians(windows.alpha),
            beta=medians(windows.beta),
            cv=medians(windows.cv),
        ),
    )


def rate_series(arrivals: np.ndarray, start: float, end: float) -> RateSeries:
    """Counts over [start, end] s in at most 500 bins of a round width."""
    width = bin_width(end - start, MAXIMUM_POINTS)
    return RateSeries(start=start, width=width, counts=bin_counts(arrivals, width, start, end).tolist())


def _gamma_distance(gap: np.ndarray, gaps: np.ndarray, alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """Kolmogorov-Smirnov distance of each window's `gaps` (of the `gap`s, in turn) to its Gamma(alpha, rate beta)."""
    from scipy.special import gammainc

    # The bits of positive 32-bit floats sort like the numbers, so one sort of integers sorts every window in its place.
    packed = np.repeat(np.arange(gaps.size) << 32, gaps)
    packed |= gap.astype(np.float32).view(np.uint32)
    packed.sort()
    first = np.cumsum(gaps) - gaps
    largest = np.zeros(gaps.size)

    def cdf_at(place: np.ndarray, window: np.ndarray) -> np.ndarray:
        sorted_gap = (packed[place] & 0xFFFFFFFF).astype(np.uint32).view(np.float32).astype(float)
        cdf: np.ndarray = gammainc(alpha[window], beta[window] * sorted_gap)
        rank, number = place - first[window], gaps[window]
        np.maximum.at(largest, window, np.maximum((rank + 1) / number - cdf, cdf - rank / number))
        return cdf

    # Both steps and cdf rise, so between two gaps the distance cannot exceed their cross differences: look at few gaps
    # first, and closer only where the distance could be larger than what was found.
    widest = STRIDES[0]
    points = -(-gaps // widest)
    window = np.repeat(np.arange(gaps.size), points)
    left = first[window] + widest * (np.arange(window.size) - np.repeat(np.cumsum(points) - points, points))
    last = first + gaps - 1
    right = np.minimum(left + widest, last[window])
    below = cdf_at(left, window)
    above = np.append(below[1:], 0.0)
    above[np.cumsum(points) - 1] = cdf_at(last, np.arange(gaps.size))
    for wide, stride in pairwise(STRIDES):
        number, begin = gaps[window], first[window]
        most = np.maximum((right - begin) / number - below, above - (left - begin + 1) / number)
        closer = (right > left + 1) & (most > largest[window])
        left, right, below, above, window = (x[closer, None] for x in (left, right, below, above, window))
        places = np.minimum(left + stride * np.arange(wide // stride + 1), right)
        window = np.repeat(window, places.shape[1], axis=1)
        cdf = np.repeat(above, places.shape[1], axis=1)
        cdf[:, :1] = below
        new = places < right
        new[:, 0] = False
        cdf[new] = cdf_at(places[new], window[new])
        left, right, below, above = (x.ravel() for x in (places[:, :-1], places[:, 1:], cdf[:, :-1], cdf[:, 1:]))
        window = window[:, :-1].ravel()
    return largest
