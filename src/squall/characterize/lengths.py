"""How long requests and responses are, how the two hang together, and how lengths hang together with time.

Five families are fitted by maximum likelihood to the distinct lengths and their counts: Zipf, P(L = k) proportional to
k^-theta for 1 <= k <= longest (Wang et al., BurstGPT, KDD 2025), and lognormal, Gamma, Weibull and a mixture of two
lognormals (by expectation-maximisation; Dempster, Laird and Rubin, 1977), whose probability of the integer k is the
mass between k - 1/2 and k + 1/2 (from 0 for k = 1). So all five compare by BIC = p log n - 2 log L (p parameters) and
by KS distance. Of thousands of rows every such family is rejected by a test; the distances say how far off it is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from msgspec import Struct

from squall.characterize.concurrency import gamma_shape
from squall.characterize.summary import LONGEST_TABLE, Summary, Tally, correlation, dot, known, pieces, sums_of_runs

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
    """A fitted family: lognormal (mu, sigma), gamma (shape, rate), weibull (shape, scale), zipf (theta, max) or
    lognormal-mixture (weight of the first, mu1, sigma1, mu2, sigma2; mu1 < mu2)."""

    family: str
    parameters: dict[str, float]
    ks: float
    """Kolmogorov-Smirnov distance."""
    aic: float
    bic: float


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
    """The family of lowest BIC."""
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


def length_statistics(tokens: np.ndarray, where: np.ndarray | None = None) -> Lengths:
    """Quantiles, fits, modes and histogram of `tokens` (int, >= 0, any order), or of those `where` this is true."""
    tally = Tally.of_array(tokens, where)
    if tally.values.size == 0:
        return Lengths()
    positive = tally.values > 0
    values, counts = tally.values[positive], tally.counts[positive]
    zipf, fits = _fits(values, counts)
    return Lengths(
        **tally.describe(),
        zipf=zipf,
        fits=fits,
        best_fit=fits[0] if fits else None,
        modes=_modes(values, counts),
        histogram=_histogram(tally.values, tally.counts),
    )


def request_response(request: np.ndarray, response: np.ndarray) -> Correlation:
    """Correlation of request and response lengths (pairs, tokens) of the same requests."""
    whole, middle = _Moments(), _Moments()
    for x, y in pieces(request, response):
        whole.add(x, y)
        inside = (x >= 400) & (x < 2000)
        middle.add(x[inside], y[inside])
    return Correlation(n=whole.n, pearson=whole.correlation, spearman=_spearman(request, response), slope=middle.slope)


@dataclass
class _Moments:
    """Sums over pairs of integers, added up without rounding, so that means need not be known beforehand."""

    n: int = 0
    x: int = 0
    y: int = 0
    xx: int = 0
    yy: int = 0
    xy: int = 0

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        # Products of numbers below 2^18 add up exactly in a piece; absurd lengths lose the 16th digit.
        x, y = x.astype(float), y.astype(float)
        self.n += x.size
        self.x, self.y = self.x + int(x.sum()), self.y + int(y.sum())
        self.xx, self.yy, self.xy = self.xx + int(dot(x, x)), self.yy + int(dot(y, y)), self.xy + int(dot(x, y))

    @property
    def _centred(self) -> tuple[int, int, int]:
        """n^2 times the variances of x and of y and their covariance."""
        n = self.n
        return n * self.xx - self.x**2, n * self.yy - self.y**2, n * self.xy - self.x * self.y

    @property
    def correlation(self) -> float | None:
        """Pearson's; None for fewer than 3 pairs, or if one side is constant."""
        xx, yy, xy = self._centred
        return xy / (math.sqrt(xx) * math.sqrt(yy)) if self.n >= 3 and xx > 0 and yy > 0 else None

    @property
    def slope(self) -> float | None:
        """Of the least-squares line; None as above."""
        return None if self.correlation is None else self._centred[2] / self._centred[0]


def _spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson's correlation of the ranks; None as there."""
    tallies = Tally.of_array(x), Tally.of_array(y)
    n = tallies[0].size
    if n < 3:
        return None
    ranks = [tally.ranks() - (n + 1) / 2 for tally in tallies]
    scale = float(np.prod([np.sqrt(dot(tally.counts, rank**2)) for tally, rank in zip(tallies, ranks, strict=True)]))
    look_up = [_lookup(tally.values, rank) for tally, rank in zip(tallies, ranks, strict=True)]
    both = sum(dot(look_up[0](a), look_up[1](b)) for a, b in pieces(x, y))
    return both / scale if scale > 0 else None


def _lookup(keys: np.ndarray, values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The function from each of the `keys` (integers >= 0, ascending) to its value."""
    if keys[-1] >= LONGEST_TABLE:
        return lambda wanted: values[np.searchsorted(keys, wanted)]
    table = np.zeros(int(keys[-1]) + 1)
    table[keys] = values
    return lambda wanted: table[wanted]


def response_bands(request: np.ndarray, response: np.ndarray) -> list[Band]:
    """Responses by request length (both tokens, requests >= 1), in bins of a factor of about sqrt(2)."""
    if request.size == 0:
        return []
    longest = int(request.max())
    edges = _edges(longest, 2)
    if longest < LONGEST_TABLE:
        table = np.digitize(np.arange(longest + 1), edges)
        binned = (table[x] for (x,) in pieces(request))
    else:
        binned = (np.digitize(x, edges) for (x,) in pieces(request))
    # Bin and response in one number: counting these puts every bin in a run and its responses in order.
    width = int(response.max()) + 1
    packed = (bins * width + y for bins, (y,) in zip(binned, pieces(response), strict=True))
    pairs = Tally.of(packed, (len(edges) + 1) * width)
    bin_of, answer = np.divmod(pairs.values, width)
    bands = []
    for start, stop in pairwise(np.flatnonzero(np.diff(bin_of, prepend=-1, append=-1)).tolist()):
        inside = Tally(answer[start:stop], pairs.counts[start:stop])
        if inside.size < MINIMUM_IN_BAND:
            continue
        low, high = edges[bin_of[start] - 1 : bin_of[start] + 1]
        p5, p50, p95 = inside.quantiles((0.05, 0.5, 0.95))
        bands.append(Band(low=low, high=high, n=inside.size, mean=inside.mean, p5=p5, p50=p50, p95=p95))
    return bands


def length_time(
    arrivals: np.ndarray, tokens: np.ndarray, start: float, end: float, scales: tuple[float, ...] = TIME_SCALES
) -> list[LengthTime]:
    """Dependence of request lengths on time, in the whole windows of [start, end] s; at least 5 windows are needed.

    `tokens` are integers; 0 is an unknown length and left out.
    """
    result: list[LengthTime] = []
    unknown = np.flatnonzero(tokens == 0)
    squares = _squares(tokens)
    places, tokens_in, of = np.zeros(0, np.int64), np.zeros(0), 0.0
    for scale in scales:
        windows = int((end - start) // scale)
        if not 5 <= windows <= 10_000_000:
            continue
        if of and scale % of == 0:  # windows of a multiple of the scale before are made of its windows
            ratio = int(scale / of)
            places, tokens_in = places[: windows * ratio + 1 : ratio], tokens_in[: windows * ratio]
            tokens_in = tokens_in.reshape(-1, ratio).sum(1)
        else:  # sorted arrivals are cut at the edges of the windows
            places = np.searchsorted(arrivals, start + scale * np.arange(windows + 1))
            tokens_in = sums_of_runs(tokens[places[0] : places[-1]], np.diff(places))
        of = scale
        count, load = np.diff(places) - np.diff(np.searchsorted(unknown, places)), tokens_in.astype(np.int64)
        n, total = int(count.sum()), int(load.sum())
        if n == 0:
            continue
        busy = count > 0
        square = squares - _squares(tokens[places[-1] :])
        # Drawn without replacement, a window of c of n lengths has mean c m and variance c s^2 (n - c) / (n - 1).
        mean, variance = total / n, (n * square - total**2) / n**2
        drawn = (count * variance * (n - count) / max(n - 1, 1)).mean() + mean**2 * count.var()
        result.append(
            LengthTime(
                scale=scale,
                correlation=correlation(count[busy].astype(float), load[busy] / count[busy]),
                cv=known(load.std() / load.mean()) if total else None,
                shuffled_cv=known(np.sqrt(drawn) / load.mean()) if total else None,
            )
        )
    return result


def _squares(tokens: np.ndarray) -> int:
    """The sum of the squares of integers."""
    return sum(int(dot(part, part)) for part in (x.astype(float) for (x,) in pieces(tokens)))


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
    zipf = _zipf(values, counts)
    parameters = {"theta": zipf.theta, "max": float(zipf.max)}
    bic = zipf.aic + _penalty(2, counts)
    fits = (
        _lognormal(values, counts),
        _gamma(values, counts),
        _weibull(values, counts),
        _mixture(values, counts),
        Fit(family="zipf", parameters=parameters, ks=zipf.ks, aic=zipf.aic, bic=bic),
    )
    return zipf, tuple(sorted((fit for fit in fits if fit), key=lambda fit: fit.bic))


def _lognormal(values: np.ndarray, counts: np.ndarray) -> Fit:
    from scipy.special import ndtr

    logs, total = np.log(values), counts.sum()
    mu = float(dot(counts, logs) / total)
    sigma = float(np.sqrt(dot(counts, (logs - mu) ** 2) / total))
    below, above = ((np.log(limit) - mu) / sigma for limit in _cells(values))
    parameters = {"mu": mu, "sigma": sigma}
    return _fit("lognormal", parameters, (ndtr(below), ndtr(above)), (ndtr(-below), ndtr(-above)), counts)


def _mixture(values: np.ndarray, counts: np.ndarray) -> Fit | None:
    """Two lognormals, the likeliest of three starts; None for fewer than 8 distinct lengths.

    The steps work on the logs in at most 512 bins, with each bin's mean log; a sigma is at least 0.05, so that neither
    component can shrink onto a single length.
    """
    from scipy.special import ndtr

    if values.size < 8:
        return None
    logs = np.log(values)
    bin_of = np.minimum((512 * (logs - logs[0]) / (logs[-1] - logs[0])).astype(np.int64), 511)
    weight = np.bincount(bin_of, counts)
    point = np.bincount(bin_of, counts * logs) / np.maximum(weight, 1)
    point, weight = point[weight > 0], weight[weight > 0] / counts.sum()
    below = np.cumsum(weight)
    share, mu, sigma = _maximise(point, weight, below <= np.array([[0.25], [0.5], [0.75]]))
    if mu[0] > mu[1]:
        share, mu, sigma = share[::-1], mu[::-1], sigma[::-1]
    limits = [(np.log(limit)[:, None] - mu) / sigma for limit in _cells(values)]
    cdf, survival = (tuple(np.einsum("ij,j->i", ndtr(sign * limit), share) for limit in limits) for sign in (1, -1))
    parameters = {"weight": share[0], "mu1": mu[0], "sigma1": sigma[0], "mu2": mu[1], "sigma2": sigma[1]}
    return _fit("lognormal-mixture", {name: float(one) for name, one in parameters.items()}, cdf, survival, counts)


def _maximise(point: np.ndarray, weight: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Expectation-maximisation of two normals: shares, means and deviations of the likeliest of several starts.

    Each row of `first` is a start: which points belong to the first normal. All starts are worked on at once.
    """
    belongs = np.stack((first, ~first)).astype(float)
    likelihood, found = np.full(first.shape[0], -np.inf), np.zeros((3, 2, first.shape[0]))
    active = np.arange(first.shape[0])
    for _ in range(500):
        part = weight * belongs
        share = np.maximum(part.sum(2), 1e-9)
        mu = (part * point).sum(2) / share
        sigma = np.sqrt(np.maximum((part * (point - mu[..., None]) ** 2).sum(2) / share, 0.05**2))
        density = (share / sigma)[..., None] * np.exp(-0.5 * ((point - mu[..., None]) / sigma[..., None]) ** 2) + 1e-300
        total = density.sum(0)
        now = (weight * np.log(total)).sum(1)
        found[:, :, active] = share / share.sum(0), mu, sigma
        going = now - likelihood[active] >= 1e-9
        likelihood[active] = now
        if not going.any():
            break
        active, belongs = active[going], (density / total)[:, going]
    share, mu, sigma = found[:, :, int(np.argmax(likelihood))]
    return share, mu, sigma


def _gamma(values: np.ndarray, counts: np.ndarray) -> Fit:
    from scipy.special import gammainc, gammaincc

    total = counts.sum()
    mean = float(counts @ values / total)
    shape = float(gamma_shape(np.array([np.log(mean) - dot(counts, np.log(values)) / total]))[0])
    below, above = (shape / mean * limit for limit in _cells(values))
    cdf, survival = (gammainc(shape, below), gammainc(shape, above)), (gammaincc(shape, below), gammaincc(shape, above))
    return _fit("gamma", {"shape": shape, "rate": shape / mean}, cdf, survival, counts)


def _weibull(values: np.ndarray, counts: np.ndarray) -> Fit | None:
    """Maximum likelihood: the shape is a root of an increasing function; None if nearly all lengths are the longest."""
    longest, total = float(values[-1]), counts.sum()
    scaled = values / longest
    logs = np.log(scaled)
    log_mean = dot(counts, logs) / total

    def slope(shape: float) -> float:
        weight = counts * scaled**shape
        return float(dot(weight, logs) / weight.sum() - 1 / shape - log_mean)

    low, high = 1e-3, 1e4
    if not slope(low) < 0 < slope(high):
        return None
    shape = _root(slope, low, high)
    scale = longest * float(dot(counts, scaled**shape) / total) ** (1 / shape)
    below, above = ((limit / scale) ** shape for limit in _cells(values))
    cdf, survival = (-np.expm1(-below), -np.expm1(-above)), (np.exp(-below), np.exp(-above))
    return _fit("weibull", {"shape": shape, "scale": scale}, cdf, survival, counts)


def _cells(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Limits of the integers' cells on the line; that of 1 begins just above 0."""
    return np.where(values > 1, values - 0.5, 1e-9), values + 0.5


def _fit(
    family: str,
    parameters: dict[str, float],
    cdf: tuple[np.ndarray, np.ndarray],
    survival: tuple[np.ndarray, np.ndarray],
    counts: np.ndarray,
) -> Fit:
    """A continuous family as a distribution on the integers, given its cdf and survival at both limits of each cell."""
    # In the upper tail the survival function keeps the digits that the cdf has lost.
    mass = np.where(cdf[0] < 0.5, cdf[1] - cdf[0], survival[0] - survival[1])
    number = len(parameters)
    aic = 2 * number - 2 * dot(counts, np.log(np.maximum(mass, 1e-300)))
    bic = aic + _penalty(number, counts)
    return Fit(family=family, parameters=parameters, ks=_distance(*cdf, counts), aic=aic, bic=bic)


def _penalty(parameters: int, counts: np.ndarray) -> float:
    """What BIC asks for the parameters beyond what AIC asks."""
    return parameters * (float(np.log(counts.sum())) - 2)


def _zipf(values: np.ndarray, counts: np.ndarray) -> Zipf:
    """Maximum likelihood: where the mean log length of the model, -d log(sum k^-theta) / d theta, is the sample's."""
    longest, total = int(values[-1]), counts.sum()
    log_mean = float(dot(counts, np.log(values)) / total)
    step, ends = 1e-5, np.array([longest])

    def log_sum(theta: float) -> float:
        return float(np.log(harmonic(theta, ends)[0]))

    def excess(theta: float) -> float:
        return log_mean + (log_sum(theta + step) - log_sum(theta - step)) / (2 * step)

    theta = _root(excess, -10, 50)
    whole = harmonic(theta, ends)[0]
    ks = _distance(harmonic(theta, values - 1) / whole, harmonic(theta, values) / whole, counts)
    return Zipf(theta=theta, max=longest, ks=ks, aic=4 + 2 * float(total) * (theta * log_mean + log_sum(theta)))


def zipf_exponent(lengths: np.ndarray, longest: int) -> float:
    """The likeliest theta of P(L = k) proportional to k^-theta, 1 <= k <= `longest`, for lengths above 0."""
    goal, step, ends = float(np.log(lengths).mean()), 1e-5, np.array([longest])

    def excess(theta: float) -> float:
        above, below = (float(np.log(harmonic(at, ends)[0])) for at in (theta + step, theta - step))
        return goal + (above - below) / (2 * step)

    return _root(excess, -10, 50)


def _root(increasing: Callable[[float], float], low: float, high: float) -> float:
    """Where `increasing` crosses 0, by bisection; the nearer end if it does so outside [low, high]."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if increasing(middle) < 0 else (low, middle)
    return (low + high) / 2


def harmonic(theta: float, upto: np.ndarray) -> np.ndarray:
    """Generalised harmonic numbers sum_{k=1}^{n} k^-theta for each n >= 0 of `upto`."""
    head = np.concatenate(([0.0], np.cumsum(np.arange(1.0, ZIPF_HEAD + 1) ** -theta)))
    n = np.maximum(upto, ZIPF_HEAD).astype(float)
    m, power = float(ZIPF_HEAD), 1 - theta
    log = np.log(n / m)
    integral = m**power * (log if abs(power) < 1e-12 else np.expm1(power * log) / power)
    ends = (n**-theta - m**-theta) / 2 - theta * (n ** (-theta - 1) - m ** (-theta - 1)) / 12
    return head[np.minimum(upto, ZIPF_HEAD)] + integral + ends


def _distance(below: np.ndarray, above: np.ndarray, counts: np.ndarray) -> float:
    """KS distance on the integers: model cdf just below and at each distinct length against the observed steps."""
    steps = np.concatenate(([0], np.cumsum(counts))) / counts.sum()
    return float(max(np.abs(steps[:-1] - below).max(), np.abs(steps[1:] - above).max()))


def _modes(values: np.ndarray, counts: np.ndarray) -> tuple[Mode, ...]:
    """Peaks of a Gaussian kernel density of the log length that stand out.

    Each integer k is spread over [k - 1/2, k + 1/2], so that short lengths make no comb. The bandwidth is Silverman's,
    0.9 min(sd, IQR / 1.34) n^(-1/5), at least 0.1 (10 % of a length). A peak counts from 5 % of the highest density
    on, if the density falls by at least 20 % of it on the way to a higher one.
    """
    total = counts.sum()
    if values.size < 2 or total < MINIMUM_IN_BAND:
        return ()
    cumulative, logs = np.cumsum(counts) / total, np.log(values)
    spread = np.sqrt(dot(counts, (logs - dot(counts, logs) / total) ** 2) / total)
    low, high = logs[np.searchsorted(cumulative, (0.25, 0.75))]
    bandwidth = max(0.1, 0.9 * min(spread, (high - low) / 1.34 or spread) * float(total) ** -0.2)

    step = bandwidth / 10
    grid = np.arange(np.log(values[0] - 0.5) - 5 * bandwidth, np.log(values[-1] + 0.5) + 5 * bandwidth, step)
    edges = np.column_stack((values - 0.5, values + 0.5)).ravel()
    steps = np.column_stack((cumulative - counts / total, cumulative)).ravel()
    mass = np.diff(np.interp(np.exp(grid), edges, steps, left=0.0, right=1.0))
    density = np.convolve(mass, np.exp(-0.5 * (np.arange(-50, 51) / 10) ** 2), mode="same")

    peaks = _peaks(density)
    valleys = [0, *(a + int(np.argmin(density[a:b])) for a, b in pairwise(peaks)), mass.size]
    shares = [float(mass[a:b].sum()) for a, b in pairwise(valleys)]
    centres = np.exp(grid[peaks] + step / 2)
    return tuple(Mode(tokens=float(at), share=share) for at, share in zip(centres, shares, strict=True))


def _peaks(density: np.ndarray) -> list[int]:
    """Local maxima from 5 % of the highest on, less those that a dip of under 20 % parts from a higher neighbour."""
    inner = density[1:-1]
    top = (inner > density[:-2]) & (inner >= density[2:]) & (inner >= 0.05 * inner.max())
    peaks: list[int] = (np.flatnonzero(top) + 1).tolist()
    while len(peaks) > 1:
        lower = [min(pair, key=lambda peak: density[peak]) for pair in pairwise(peaks)]
        dips = [1 - density[a:b].min() / density[low] for (a, b), low in zip(pairwise(peaks), lower, strict=True)]
        shallowest = int(np.argmin(dips))
        if dips[shallowest] >= 0.2:
            break
        peaks.remove(lower[shallowest])
    return peaks
