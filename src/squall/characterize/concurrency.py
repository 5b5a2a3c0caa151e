"""When requests arrive: rate, gaps, burstiness over all time scales, and the daily and weekly cycle.

Gaps tau inside one window of time follow Gamma(shape alpha, rate beta),

    f(tau) = beta^alpha tau^(alpha - 1) e^(-beta tau) / Gamma(alpha),   mean alpha/beta,   CV 1/sqrt(alpha),

so that alpha = 1 is a Poisson process, alpha < 1 is bursty and alpha > 1 regular (Wang et al., BurstGPT, KDD 2025,
who take windows of 20 minutes). One CV cannot say over which time scales bursts cluster; the index of dispersion of
counts, IDC(s) = Var N(s) / E N(s) of the counts in bins of s seconds, can: it is 1 at every scale for a Poisson
process, levels off at CV^2 for a renewal process, and keeps growing for a rate that itself varies
(Cox and Lewis, The Statistical Analysis of Series of Events, 1966).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from squall.errors import InputError
from squall.seeds import DEFAULT_SEED, stream
from squall.units import in_words

SCALES = (1.0, 10.0, 60.0, 300.0, 1200.0, 3600.0, 86400.0)
"""Scales of the index of dispersion, in seconds."""
MINIMUM_BINS = 5
"""A scale needs this many whole bins in the span; fewer say nothing about a variance."""
MAXIMUM_WINDOWS = 10_000_000
"""More windows than this are a slip in the flag, not a question."""

FitMethod = Literal["moments", "mle"]


@dataclass(frozen=True)
class GammaWindows:
    """The Gamma fit of the gaps in each window; arrays have one value per window, nan where a window was skipped."""

    window: float
    """Length of a window, s."""
    start: np.ndarray
    """Start of each window, s on the clock of the arrivals; multiples of `window`, without a hole."""
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
) -> GammaWindows:
    """Fit a Gamma distribution to the gaps in each window of time.

    `arrivals` are sorted seconds; windows of `window` seconds start at its multiples, from the first arrival's to the
    last's. With `tick` (resolution of the recorded times, s) the arrivals are first spread by `despread`. "moments"
    takes alpha = m^2/v and beta = m/v (population variance); "mle" is maximum likelihood over the positive gaps.
    Windows with fewer than `minimum` gaps, or whose gaps are all equal, are skipped.
    """
    if tick:
        arrivals = despread(arrivals, tick, seed)
    arrivals = np.asarray(arrivals, dtype=float)
    first = int(arrivals[0] // window)
    windows = int(arrivals[-1] // window) - first + 1
    if windows > MAXIMUM_WINDOWS:
        raise InputError(
            f"window: {in_words(window)} cuts {in_words(arrivals[-1] - arrivals[0])} into {windows:,} windows; "
            f"take one that gives at most {MAXIMUM_WINDOWS:,}."
        )
    slot = np.floor(arrivals / window).astype(np.int64) - first
    count = np.bincount(slot, minlength=windows)
    gap, owner = np.diff(arrivals), slot[1:]
    if method == "mle":
        gap, owner = gap[gap > 0], owner[gap > 0]
    gaps = np.bincount(owner, minlength=windows)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.bincount(owner, gap, windows) / gaps
        variance = np.bincount(owner, (gap - mean[owner]) ** 2, windows) / gaps
        # Below this the spread is the rounding of the clock, not a property of the traffic.
        usable = (gaps >= max(minimum, 2)) & (variance > 1e-12 * mean**2)
        cv = np.where(usable, np.sqrt(variance) / mean, np.nan)
        if method == "moments":
            alpha = cv**-2.0
        else:
            log_mean = np.bincount(owner, np.log(gap), windows) / gaps
            alpha = _gamma_shape(np.where(usable, np.log(mean) - log_mean, np.nan))
        beta = alpha / mean
    return GammaWindows(
        window=window,
        start=(first + np.arange(windows)) * window,
        count=count,
        gaps=gaps,
        rate=count / window,
        alpha=alpha,
        beta=beta,
        cv=cv,
        ks=_gamma_distance(gap, owner, alpha, beta),
        method=method,
        tick=tick,
    )


def despread(arrivals: np.ndarray, tick: float, seed: int = DEFAULT_SEED) -> np.ndarray:
    """Arrivals recorded in ticks, put at sorted uniform times inside their tick ("sorted-uniform"); sorted seconds.

    A clock that counts whole ticks records t for everything in [t, t + tick), so each arrival is drawn from there (or
    up to the next recorded time, where that is nearer). The order of the requests stays; `seed` fixes the draw.
    """
    arrivals = np.asarray(arrivals, dtype=float)
    last_of_tick = np.append(np.flatnonzero(np.diff(arrivals)), arrivals.size - 1)
    recorded = arrivals[last_of_tick]
    width = np.minimum(np.diff(recorded, append=np.inf), tick)
    sizes = np.diff(last_of_tick, prepend=-1)
    spread = arrivals + np.repeat(width, sizes) * stream(seed, "despread").random(arrivals.size)
    spread.sort()
    return spread


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
    for scale in scales:
        bins = int((end - start) // scale)
        inside = int(np.searchsorted(arrivals, start + bins * scale))
        if bins < MINIMUM_BINS or inside == 0:
            continue
        # Sorted arrivals: equal bins stand side by side, so the empty ones need no memory, however long the span is.
        bin_of = np.floor((arrivals[:inside] - start) / scale)
        counts = np.diff(np.flatnonzero(np.diff(bin_of, prepend=-1.0, append=np.inf)))
        mean = inside / bins
        result.append((scale, float((counts.astype(float) ** 2).sum() / bins / mean - mean)))
    return result


def bin_counts(arrivals: np.ndarray, width: float, start: float, end: float) -> np.ndarray:
    """Arrivals (int) in each bin of `width` seconds that covers [start, end]; the last bin may reach beyond `end`."""
    bins = max(1, int(np.floor((end - start) / width)) + 1)
    inside = arrivals[(arrivals >= start) & (arrivals <= end)]
    return np.bincount(np.floor((inside - start) / width).astype(np.int64), minlength=bins)


def _gamma_shape(spread: np.ndarray) -> np.ndarray:
    """The shape of largest likelihood: log(alpha) - digamma(alpha) = spread, where spread = log(mean) - mean(log) > 0.

    Newton's method in 1/alpha from Minka's start (Estimating a Gamma distribution, 2002); four steps reach 1e-12.
    """
    from scipy.special import digamma, polygamma

    alpha = (3 - spread + np.sqrt((spread - 3) ** 2 + 24 * spread)) / (12 * spread)
    for _ in range(4):
        error = np.log(alpha) - digamma(alpha) - spread
        alpha = 1 / (1 / alpha + error / (alpha**2 * (1 / alpha - polygamma(1, alpha))))
    return alpha


def _gamma_distance(gap: np.ndarray, owner: np.ndarray, alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """Kolmogorov-Smirnov distance of each window's gaps to its own Gamma(alpha, rate beta); nan without a fit."""
    from scipy.special import gammainc

    distance = np.full(alpha.size, np.nan)
    fitted = np.isfinite(alpha)[owner]
    gap, owner = gap[fitted], owner[fitted]
    if gap.size == 0:
        return distance
    order = np.lexsort((gap, owner))
    gap, owner = gap[order], owner[order]
    first = np.flatnonzero(np.diff(owner, prepend=-1))
    size = np.diff(first, append=gap.size)
    rank = np.arange(gap.size) - np.repeat(first, size)
    number = np.repeat(size, size)
    fitted_cdf = gammainc(alpha[owner], beta[owner] * gap)
    off = np.maximum((rank + 1) / number - fitted_cdf, fitted_cdf - rank / number)
    distance[owner[first]] = np.maximum.reduceat(off, first)
    return distance
