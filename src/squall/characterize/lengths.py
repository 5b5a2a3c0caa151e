"""How long requests and responses are, how the two hang together, and how lengths hang together with time.

Four families are fitted by maximum likelihood to the distinct lengths and their counts: Zipf, P(L = k) proportional to
k^-theta for 1 <= k <= longest (Wang et al., BurstGPT, KDD 2025), and lognormal, Gamma and Weibull, whose probability of
the integer k is the mass between k - 1/2 and k + 1/2 (from 0 for k = 1), so that all four compare by AIC = 4 - 2 log L
(two parameters each) and by KS distance. Of thousands of rows every such family is rejected by a test; the distances
say how far off it is.
"""

from itertools import pairwise
from typing import Any

import numpy as np
from msgspec import Struct

from squall.characterize.concurrency import bin_counts, gamma_shape
from squall.characterize.summary import Summary, correlation, describe, known, position

TIME_SCALES = (60.0, 300.0, 1200.0, 3600.0)
"""Windows for the dependence of lengths on time, s."""
MINIMUM_IN_BAND = 20
"""A bin of request lengths with fewer requests has no quantiles to speak of, and is left out."""
ZIPF_HEAD = 1000
"""Up to here the harmonic sums are exact; beyond, Euler-Maclaurin adds the tail to better than 1e-8."""


class Zipf(Struct, frozen=True, kw_only=True):
    """P(L = k) proportional to k^-theta, 1 <= k <= max."""

    theta: float
    max: int
    ks: float
    aic: float


class Fit(Struct, frozen=True, kw_only=True):
    """A fitted family: lognormal (mu, sigma), gamma (shape, rate), weibull (shape, scale) or zipf (theta, max)."""

    family: str
    parameters: dict[str, float]
    ks: float
    """Kolmogorov-Smirnov distance."""
    aic: float


class Mode(Struct, frozen=True, kw_only=True):
    """A peak in the density of the log length."""

    tokens: float
    share: float
    """Share of the sample between the valleys beside it."""


class Histogram(Struct, frozen=True, kw_only=True):
    """Counts in [edges[i], edges[i + 1]), on one grid of about 4 bins per factor of 2 for all traces."""

    edges: list[int]
    counts: list[int]


class Lengths(Summary, frozen=True, kw_only=True):
    """Lengths in tokens. Fits need at least two distinct lengths > 0; they are null otherwise."""

    zipf: Zipf | None = None
    best_fit: Fit | None = None
    """The family of lowest AIC."""
    fits: tuple[Fit, ...] = ()
    """All families, best first."""
    modes: tuple[Mode, ...] = ()
    histogram: Histogram | None = None


class Correlation(Struct, frozen=True, kw_only=True):
    """Of request and response length, over successful requests of known length; null where undefined."""

    n: int
    pearson: float | None
    spearman: float | None
    slope: float | None
    """Response tokens per request token, least squares over requests of 400 to 2,000 tokens."""


class Band(Struct, frozen=True, kw_only=True):
    """Responses to the requests of [low, high) tokens; p5 to p95 hold the middle 90 %."""

    low: int
    high: int
    n: int
    mean: float
    p5: int
    p50: int
    p95: int


class LengthTime(Struct, frozen=True, kw_only=True):
    """Do request lengths hang together with time? Tokens per window against the same requests in shuffled order."""

    scale: float
    """Window, s."""
    correlation: float | None
    """Of a window's count with its mean request length, over non-empty windows."""
    cv: float | None
    """CV of the request tokens per window."""
    shuffled_cv: float | None
    """The same if lengths were dealt out at random: root of the exact mean variance over all permutations."""


def lengths(tokens: np.ndarray) -> Lengths:
    """Quantiles, fits, modes and histogram of `tokens` (int, >= 0, any order)."""
    ordered = np.sort(tokens)
    if ordered.size == 0:
        return Lengths()
    first = np.flatnonzero(np.diff(ordered, prepend=-1))
    values, counts = ordered[first].astype(np.int64), np.diff(first, append=ordered.size)
    positive = values > 0
    zipf, fits = _fits(values[positive], counts[positive])
    return Lengths(
        **describe(ordered),
        zipf=zipf,
        fits=fits,
        best_fit=fits[0] if fits else None,
        modes=_modes(values[positive], counts[positive]),
        histogram=_histogram(values, counts),
    )


def request_response(request: np.ndarray, response: np.ndarray) -> Correlation:
    """Correlation of request and response lengths (pairs, tokens) of the same requests."""
    x, y = request.astype(float), response.astype(float)
    middle = (request >= 400) & (request < 2000)
    pearson, spread = correlation(x[middle], y[middle]), x[middle].std() if middle.any() else 0.0
    return Correlation(
        n=x.size,
        pearson=correlation(x, y),
        spearman=correlation(_ranks(request), _ranks(response)),
        slope=None if pearson is None else pearson * float(y[middle].std() / spread),
    )


def response_bands(request: np.ndarray, response: np.ndarray) -> list[Band]:
    """Responses by request length (both tokens, requests >= 1), in bins of a factor of about sqrt(2)."""
    if request.size == 0:
        return []
    edges = _edges(int(request.max()), 2)
    # One sort of (bin, response) packed into an integer puts every bin in a run and its responses in order.
    packed = np.sort((np.digitize(request, edges) << 32) + response)
    bin_of, response = packed >> 32, packed & 0xFFFFFFFF
    bands = []
    for start, stop in pairwise(np.flatnonzero(np.diff(bin_of, prepend=-1, append=-1)).tolist()):
        inside = response[start:stop]
        if inside.size < MINIMUM_IN_BAND:
            continue
        p5, p50, p95 = (int(inside[position(share, inside.size)]) for share in (0.05, 0.5, 0.95))
        low, high = edges[bin_of[start] - 1 : bin_of[start] + 1]
        bands.append(Band(low=low, high=high, n=inside.size, mean=float(inside.mean()), p5=p5, p50=p50, p95=p95))
    return bands


def length_time(
    arrivals: np.ndarray, tokens: np.ndarray, start: float, end: float, scales: tuple[float, ...] = TIME_SCALES
) -> list[LengthTime]:
    """Dependence of request lengths on time, in the whole windows of [start, end] s; at least 5 windows are needed."""
    result = []
    for scale in scales:
        windows = int((end - start) // scale)
        inside = arrivals < start + windows * scale
        if not 5 <= windows <= 10_000_000 or not inside.any():
            continue
        length = tokens[inside].astype(float)
        window_of = np.floor((arrivals[inside] - start) / scale).astype(np.int64)
        count = bin_counts(arrivals[inside], scale, start, end)[:windows]
        load = np.bincount(window_of, length, windows)
        busy = count > 0
        # Drawn without replacement, a window of c of n lengths has mean c m and variance c s^2 (n - c) / (n - 1).
        n, mean, variance = length.size, length.mean(), length.var()
        drawn = (count * variance * (n - count) / max(n - 1, 1)).mean() + mean**2 * count.var()
        result.append(
            LengthTime(
                scale=scale,
                correlation=correlation(count[busy].astype(float), load[busy] / count[busy]),
                cv=known(load.std() / load.mean()) if load.any() else None,
                shuffled_cv=known(np.sqrt(drawn) / load.mean()) if load.any() else None,
            )
        )
    return result


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks of integers, equal ones sharing their mean rank."""
    import polars as pl

    return pl.Series(values).rank("average").to_numpy()


def _edges(longest: int, per_octave: int) -> list[int]:
    """Integer bin edges from 1 to beyond `longest`, `per_octave` to each factor of 2 as far as integers allow."""
    steps = np.arange(int(per_octave * (np.log2(max(longest, 1)) + 1)) + 2)
    return np.unique(np.round(2.0 ** (steps / per_octave)).astype(np.int64)).tolist()


def _histogram(values: np.ndarray, counts: np.ndarray) -> Histogram:
    edges = [0, *_edges(int(values[-1]), 4)]
    bin_of = np.digitize(values, edges) - 1
    low, high = int(bin_of[0]), int(bin_of[-1]) + 1
    return Histogram(
        edges=edges[low : high + 1],
        counts=np.bincount(bin_of - low, counts, high - low).astype(np.int64).tolist(),
    )


def _fits(values: np.ndarray, counts: np.ndarray) -> tuple[Zipf | None, tuple[Fit, ...]]:
    """All families fitted to distinct lengths (>= 1, sorted) and their counts, best first; nothing for a constant."""
    if values.size < 2:
        return None, ()
    from scipy import stats

    total = counts.sum()
    logs = np.log(values)
    mean, log_mean = counts @ values / total, counts @ logs / total
    sigma = np.sqrt(counts @ (logs - log_mean) ** 2 / total)
    shape = float(gamma_shape(np.array([np.log(mean) - log_mean]))[0])
    fits = [
        _continuous(
            "lognormal", {"mu": log_mean, "sigma": sigma}, stats.lognorm(sigma, scale=np.exp(log_mean)), values, counts
        ),
        _continuous(
            "gamma", {"shape": shape, "rate": shape / mean}, stats.gamma(shape, scale=mean / shape), values, counts
        ),
    ]
    slope = _weibull_shape(values, counts)
    if slope is not None:
        scale = values[-1] * float(counts @ (values / values[-1]) ** slope / total) ** (1 / slope)
        model = stats.weibull_min(slope, scale=scale)
        fits.append(_continuous("weibull", {"shape": slope, "scale": scale}, model, values, counts))
    zipf = _zipf(values, counts)
    fits.append(Fit(family="zipf", parameters={"theta": zipf.theta, "max": float(zipf.max)}, ks=zipf.ks, aic=zipf.aic))
    return zipf, tuple(sorted(fits, key=lambda fit: fit.aic))


def _continuous(family: str, parameters: dict[str, float], model: Any, values: np.ndarray, counts: np.ndarray) -> Fit:
    """A continuous family as a distribution on the integers: k has the mass from k - 1/2 to k + 1/2."""
    below, above = np.where(values > 1, values - 0.5, 0.0), values + 0.5
    low, high = model.cdf(below), model.cdf(above)
    # In the upper tail the survival function keeps the digits that the cdf has lost.
    mass = np.where(low < 0.5, high - low, model.sf(below) - model.sf(above))
    return Fit(
        family=family,
        parameters={name: float(value) for name, value in parameters.items()},
        ks=_distance(low, high, counts),
        aic=float(4 - 2 * counts @ np.log(np.maximum(mass, 1e-300))),
    )


def _zipf(values: np.ndarray, counts: np.ndarray) -> Zipf:
    """Maximum likelihood of theta: the minimum of theta mean(log k) + log sum_{k <= max} k^-theta, which is convex."""
    from scipy.optimize import minimize_scalar

    longest, total = int(values[-1]), counts.sum()
    log_mean = counts @ np.log(values) / total
    ends = np.array([longest])

    def loss(theta: float) -> float:
        return theta * log_mean + float(np.log(harmonic(theta, ends)[0]))

    theta = float(minimize_scalar(loss, bounds=(-10, 50), method="bounded", options={"xatol": 1e-7}).x)
    whole = harmonic(theta, ends)[0]
    ks = _distance(harmonic(theta, values - 1) / whole, harmonic(theta, values) / whole, counts)
    return Zipf(theta=theta, max=longest, ks=ks, aic=float(4 + 2 * total * loss(theta)))


def harmonic(theta: float, upto: np.ndarray) -> np.ndarray:
    """Generalised harmonic numbers sum_{k=1}^{n} k^-theta for each n >= 0 of `upto`."""
    head = np.concatenate(([0.0], np.cumsum(np.arange(1.0, ZIPF_HEAD + 1) ** -theta)))
    n = np.maximum(upto, ZIPF_HEAD).astype(float)
    m, power = float(ZIPF_HEAD), 1 - theta
    log = np.log(n / m)
    integral = m**power * (log if abs(power) < 1e-12 else np.expm1(power * log) / power)
    ends = (n**-theta - m**-theta) / 2 - theta * (n ** (-theta - 1) - m ** (-theta - 1)) / 12
    return head[np.minimum(upto, ZIPF_HEAD)] + integral + ends


def _weibull_shape(values: np.ndarray, counts: np.ndarray) -> float | None:
    """The shape of largest likelihood, a root of an increasing function; None if nearly all lengths are the longest."""
    from scipy.optimize import brentq

    scaled = values / values[-1]
    logs = np.log(scaled)
    log_mean = counts @ logs / counts.sum()

    def slope(shape: float) -> float:
        weight = counts * scaled**shape
        return float(weight @ logs / weight.sum() - 1 / shape - log_mean)

    low, high = 1e-3, 1e4
    return float(brentq(slope, low, high)) if slope(low) < 0 < slope(high) else None


def _distance(below: np.ndarray, above: np.ndarray, counts: np.ndarray) -> float:
    """KS distance on the integers: model cdf just below and at each distinct length against the observed steps."""
    steps = np.concatenate(([0], np.cumsum(counts))) / counts.sum()
    return float(max(np.abs(steps[:-1] - below).max(), np.abs(steps[1:] - above).max()))


def _modes(values: np.ndarray, counts: np.ndarray) -> tuple[Mode, ...]:
    """Peaks of a Gaussian kernel density of the log length that stand out.

    Each integer k is spread over [k - 1/2, k + 1/2], so that short lengths make no comb. The bandwidth is Silverman's,
    0.9 min(sd, IQR / 1.34) n^(-1/5), at least 0.1 (10 % of a length). A peak counts with 5 % of the highest density
    and a prominence of 20 % of its own.
    """
    if values.size < 2 or counts.sum() < 20:
        return ()
    from scipy.ndimage import gaussian_filter1d
    from scipy.signal import find_peaks

    total = counts.sum()
    cumulative = np.cumsum(counts) / total
    edges = np.column_stack((values - 0.5, values + 0.5)).ravel()
    steps = np.column_stack((cumulative - counts / total, cumulative)).ravel()
    logs = np.log(values)
    spread = np.sqrt(counts @ (logs - counts @ logs / total) ** 2 / total)
    quartiles = np.diff(logs[np.searchsorted(cumulative, (0.25, 0.75))])[0] / 1.34
    bandwidth = max(0.1, 0.9 * min(spread, quartiles or spread) * float(total) ** -0.2)
    step = bandwidth / 10
    grid = np.arange(np.log(edges[0]) - 5 * bandwidth, np.log(edges[-1]) + 5 * bandwidth, step)
    mass = np.diff(np.interp(np.exp(grid), edges, steps, left=0.0, right=1.0))
    density = gaussian_filter1d(mass, bandwidth / step, mode="constant")
    peaks, found = find_peaks(density, height=0.05 * density.max(), prominence=0)
    peaks = peaks[found["prominences"] >= 0.2 * density[peaks]]
    valleys = [0, *(a + int(np.argmin(density[a:b])) for a, b in pairwise(peaks)), mass.size]
    shares = [mass[a:b].sum() for a, b in pairwise(valleys)]
    centre = np.exp(grid[:-1] + step / 2)
    return tuple(Mode(tokens=float(centre[p]), share=float(s)) for p, s in zip(peaks, shares, strict=True))
