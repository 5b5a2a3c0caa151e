"""When requests arrive: a renewal process with Gamma gaps, whose rate and burstiness follow a path in time.

Every kind of arrivals gives a path, rate lambda(t) and shape alpha(t) piecewise constant in windows; `renewal` draws
arrivals along it. Gaps tau inside a window follow Gamma(alpha, rate beta) with beta = alpha lambda: mean gap 1/lambda,
CV 1/sqrt(alpha) (Wang et al., BurstGPT, KDD 2025). Scaling the load by S replaces beta by S beta: the CV stays.

The gap that crosses a window's end is carried in operational time u = integral of lambda dt, in which gaps have the
mean 1. A fixed point in time finds itself in a gap of length L with L alpha ~ Gamma(alpha + 1) (longer gaps cover more
time), at a place that is uniform in it (Cox, Renewal Theory, 1962). Where alpha changes, the gap under way keeps its
place and its rank among such gaps, so that the process is stationary in every window: the expected count of each
is exactly lambda times its length, however short the window is, and where alpha does not change nothing happens.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import msgspec
import numpy as np

from squall.seeds import stream
from squall.workload.lengths import Quantiles

HOUR = 3600.0
DAY = 86400.0
WEEK = 7 * DAY
_PER_HOUR = 12  # windows of an hour in the kinds whose path is random
ALPHA_RANGE = (1e-3, 1e6)
"""Shapes beyond this (CV 32 and CV 0.001) are clipped; constant gaps have alpha = infinity."""


@dataclass(frozen=True)
class Path:
    """Rate and shape over time: `rate[k]` (requests/s) and `alpha[k]` hold from `edges[k]` to `edges[k + 1]` (s)."""

    edges: np.ndarray
    rate: np.ndarray
    alpha: np.ndarray
    episode: np.ndarray | None = None
    """Which slot of the model each piece belongs to, in models that have such (slots.py)."""
    gaps: str = "gamma"
    """The law whose shape `alpha` is: gamma or weibull."""

    @property
    def expected(self) -> float:
        """Expected number of arrivals."""
        return float(self.rate @ np.diff(self.edges))

    def scaled(self, factor: float) -> "Path":
        """The same path at `factor` times the rate."""
        return Path(self.edges, self.rate * factor, self.alpha, self.episode, self.gaps)


def renewal(path: Path, rng: np.random.Generator) -> np.ndarray:
    """Arrival times (sorted seconds) of the stationary renewal process along `path`."""
    from squall.workload.process import RenewalProcess

    return RenewalProcess(rng).along(path)


class Renewal(msgspec.Struct, frozen=True, tag="renewal", tag_field="kind"):
    """The paper's model: rate(t) and alpha(t) per window as fitted, repeated by `period` beyond the fitted span."""

    window: float
    """Length of a window, s; the last one ends with the fitted span."""
    span: float
    """Fitted seconds."""
    period: float
    """Beyond the span, t takes the parameters of t mod `period`: the span's whole weeks, or days, or else the span."""
    rate: list[float]
    """Requests/s in each window."""
    alpha: list[float]
    """Shape of the gaps in each window; beta = alpha x rate."""

    def __post_init__(self) -> None:
        if not self.rate or len(self.rate) != len(self.alpha):
            raise ValueError("rate and alpha must have the same length, at least 1")
        if min(self.rate) < 0 or min(self.alpha) <= 0:
            raise ValueError("rate must not be negative and alpha must be above 0")
        unused = len(self.rate) * self.window - self.span
        slack = 1e-6 * self.window
        if not 0 < self.period <= self.span or not -slack <= unused < self.window + slack:
            raise ValueError("window, span and period do not fit the number of windows")

    @property
    def beta(self) -> list[float]:
        """Rate parameter of the gaps in each window, 1/s."""
        return [rate * alpha for rate, alpha in zip(self.rate, self.alpha, strict=True)]

    @property
    def mean_rate(self) -> float:
        """Requests/s over the fitted span."""
        return float(np.array(self.rate) @ np.diff(self._edges)) / self.span

    @property
    def _edges(self) -> np.ndarray:
        return np.append(np.arange(len(self.rate)) * self.window, self.span)

    def path(self, begin: float, end: float, seed: int) -> Path:
        """Rate and shape from `begin` to `end` (s from the fitted trace's start); nothing in it is random."""
        rate, alpha = np.array(self.rate), np.array(self.alpha)
        if end <= self.span:
            return cut(Path(self._edges, rate, alpha), begin, end)
        # What lies beyond the span follows it, from the period in which the span ends.
        inside = self._edges[:-1] < self.period
        periods = np.arange(int(max(begin, self.span) // self.period), int(np.ceil(end / self.period)))
        starts = (periods[:, None] * self.period + self._edges[:-1][inside]).ravel()
        beyond = Path(
            np.append(starts, (periods[-1] + 1) * self.period),
            np.tile(rate[inside], periods.size),
            np.tile(alpha[inside], periods.size),
        )
        later = cut(beyond, max(begin, self.span), end)
        if begin >= self.span:
            return later
        own = cut(Path(self._edges, rate, alpha), begin, self.span)
        return join([own, later])


class Daily(msgspec.Struct, frozen=True, tag="daily", tag_field="kind"):
    """A periodic service: a working day and a weekend day, a level that drifts, and ripple inside the hour.

    lambda(t) = profile(hour, kind of day) exp(sum_i s_i g_i(t) - s^2/2) with Ornstein-Uhlenbeck processes g_i.
    """

    window: ClassVar[float] = HOUR / _PER_HOUR

    regime: str
    """Classes with the same regime follow the same random path."""
    weekday: int
    """Weekday (Monday = 0) of day 0."""
    working_day: list[float]
    """Requests/s in each hour from midnight, Monday to Friday."""
    weekend: list[float]
    """Requests/s in each hour from midnight, Saturday and Sunday."""
    drift: list[tuple[float, float]]
    """(standard deviation of the log rate, correlation time in hours) of each component of the level, hour by hour."""
    ripple: float
    """Standard deviation of the log rate between the 5-minute windows of an hour."""
    alpha: float
    """Shape of the gaps inside a window."""

    def __post_init__(self) -> None:
        if len(self.working_day) != 24 or len(self.weekend) != 24 or min(self.working_day + self.weekend) < 0:
            raise ValueError("working_day and weekend must have 24 rates each")
        if self.alpha <= 0 or any(hours <= 0 for _, hours in self.drift):
            raise ValueError("alpha and the correlation times must be above 0")

    @property
    def mean_rate(self) -> float:
        """Expected requests/s over a week."""
        return (5 * sum(self.working_day) + 2 * sum(self.weekend)) / (7 * 24)

    def path(self, begin: float, end: float, seed: int) -> Path:
        """A random path from `begin` to `end` (s from the midnight of day 0); the same seed gives the same weather."""
        hours = int(np.ceil(end / HOUR))
        day = np.arange(hours) // 24
        working = (self.weekday + day) % 7 < 5
        hour = np.arange(hours) % 24
        rate = np.where(working, np.array(self.working_day)[hour], np.array(self.weekend)[hour])
        for component, (sd, memory) in enumerate(self.drift):
            level = _wander(hours, memory, stream(seed, f"path {self.regime}", component))
            rate = rate * np.exp(sd * level - sd**2 / 2)
        ripple = stream(seed, f"path {self.regime} ripple").standard_normal((hours, _PER_HOUR))
        fine = rate[:, None] * np.exp(self.ripple * ripple - self.ripple**2 / 2)
        return cut(_five_minutes(fine, np.full(fine.size, self.alpha)), begin, end)


class Floods(msgspec.Struct, frozen=True, tag="floods", tag_field="kind"):
    """An aperiodic service: hours of silence, and floods of hours that hold a plateau.

    A latent Gaussian process g (hour by hour) decides: the hour is empty where Phi(g) < silence[hour of day]; elsewhere
    its load is the quantile of `load` at the rest of Phi(g), (Phi(g) - silence) / (1 - silence) (a translation
    process: Grigoriu, 1984). A flood's first and last hour hold the neighbour's plateau while their load lasts.
    """

    window: ClassVar[float] = HOUR / _PER_HOUR

    regime: str
    """Classes with the same regime follow the same random path."""
    silence: list[float]
    """Probability that an hour is empty, by hour of day."""
    load: Quantiles
    """Requests in an hour that is not empty."""
    memory: list[tuple[float, float]]
    """(weight, correlation time in hours) of the components of g; the weights' sum is 1."""
    ripple: float
    """Standard deviation of the log rate between the 5-minute windows of an hour."""
    cv: Quantiles
    """CV of the gaps inside a 5-minute window; alpha = 1/CV^2."""
    scale: float = 1.0
    """This class's part of the load."""

    def __post_init__(self) -> None:
        if len(self.silence) != 24 or not all(0 <= p < 1 for p in self.silence):
            raise ValueError("silence must have 24 probabilities below 1")
        if (
            any(weight < 0 or hours <= 0 for weight, hours in self.memory)
            or abs(sum(w for w, _ in self.memory) - 1) > 1e-6
        ):
            raise ValueError("memory must have weights with the sum 1 and correlation times above 0")
        if self.cv.values[0] <= 0:
            raise ValueError("cv must be above 0")

    @property
    def mean_rate(self) -> float:
        """Expected requests/s."""
        return self.scale * (1 - sum(self.silence) / 24) * self.load.mean / HOUR

    def path(self, begin: float, end: float, seed: int) -> Path:
        """A random path from `begin` to `end` (s from the midnight of day 0); the same seed gives the same weather."""
        from scipy.special import ndtr

        hours = int(np.ceil(end / HOUR))
        latent = np.zeros(hours)
        for component, (weight, memory) in enumerate(self.memory):
            latent += np.sqrt(weight) * _wander(hours, memory, stream(seed, f"path {self.regime}", component))
        silence = np.array(self.silence)[np.arange(hours) % 24]
        place = (ndtr(latent) - silence) / (1 - silence)
        load = np.where(place > 0, self.load.at(place), 0.0) * self.scale
        ripple = stream(seed, f"path {self.regime} ripple").standard_normal((hours, _PER_HOUR))
        fine = _plateaus(load) / HOUR * np.exp(self.ripple * ripple - self.ripple**2 / 2)
        alpha = self.cv.at(stream(seed, f"path {self.regime} cv").random(fine.size)) ** -2.0
        return cut(_five_minutes(fine, alpha), begin, end)


def _wander(steps: int, memory: float, rng: np.random.Generator) -> np.ndarray:
    """A stationary Gaussian process with variance 1 and correlation e^(-lag/memory), one value a step."""
    from scipy.signal import lfilter

    keep = np.exp(-1 / memory)
    noise = rng.standard_normal(steps)
    noise[1:] *= np.sqrt(1 - keep**2)
    return lfilter([1.0], [1.0, -keep], noise)


def _plateaus(load: np.ndarray) -> np.ndarray:
    """Hourly loads as rates (per hour) in 5-minute windows: an hour at a flood's edge is filled from the flood's side.

    The edge hour is active for the share load / neighbour's load of its time, so that it runs at the neighbour's rate.
    """
    before, after = np.concatenate([[0.0], load[:-1]]), np.concatenate([load[1:], [0.0]])
    position = np.arange(_PER_HOUR) / _PER_HOUR
    opening = (load > 0) & (before == 0) & (after > load)
    closing = (load > 0) & (after == 0) & (before > load)
    active = np.ones(load.size)
    active[opening] = load[opening] / after[opening]
    active[closing] = load[closing] / before[closing]
    active = np.ceil(active * _PER_HOUR) / _PER_HOUR
    on = np.where(opening[:, None], position >= 1 - active[:, None] - 1e-9, position < active[:, None] - 1e-9)
    return np.where(on, (load / active)[:, None], 0.0)


def _five_minutes(rate: np.ndarray, alpha: np.ndarray) -> Path:
    return Path(np.arange(rate.size + 1) * (HOUR / _PER_HOUR), rate.ravel(), alpha)


def cut(path: Path, begin: float, end: float) -> Path:
    """The part of a path between `begin` and `end`, on a clock that starts at `begin`."""
    first = max(0, int(np.searchsorted(path.edges, begin, side="right")) - 1)
    last = int(np.searchsorted(path.edges, end, side="left"))
    edges = np.clip(path.edges[first : last + 1], begin, end) - begin
    episode = None if path.episode is None else path.episode[first:last]
    return Path(edges, path.rate[first:last], path.alpha[first:last], episode, path.gaps)


def join(paths: list[Path]) -> Path:
    """Paths one after another; each one's clock starts at 0."""
    begins = np.cumsum([0.0] + [path.edges[-1] for path in paths])
    episodes = [path.episode for path in paths if path.episode is not None]
    return Path(
        np.concatenate([[0.0], *(begin + path.edges[1:] for begin, path in zip(begins, paths, strict=False))]),
        np.concatenate([path.rate for path in paths]),
        np.concatenate([path.alpha for path in paths]),
        np.concatenate(episodes) if episodes else None,
        paths[0].gaps,
    )


def fit_renewal(
    arrivals: np.ndarray,
    span: float,
    window: float,
    *,
    tick: float | None,
    method: Literal["moments", "mle"],
    seed: int,
) -> "tuple[Renewal, RenewalFit]":
    """Rate and shape per window of sorted `arrivals` (s from 0, at most `span`), and how well the Gamma law fits.

    Windows with too few gaps take the shape of all fitted windows' median, or of the whole class where none is fitted.
    """
    from squall.characterize.concurrency import despread, gamma_windows

    if tick:
        arrivals = np.minimum(despread(arrivals, tick, seed), np.nextafter(span, 0))
    windows = max(1, int(np.ceil(span / window - 1e-9)))
    edges = np.append(np.arange(windows) * window, span)
    slot = np.minimum((arrivals // window).astype(np.int64), windows - 1)
    rate = np.bincount(slot, minlength=windows) / np.diff(edges)
    alpha, distance = np.full(windows, np.nan), np.full(windows, np.nan)
    if arrivals.size > 2:  # fewer make no two gaps
        # At an exact multiple of the window two ways of rounding down need not agree.
        fitted = gamma_windows(arrivals * (1 - 1e-12), window, method=method, seed=seed)
        place = np.minimum(np.rint(fitted.start / window).astype(np.int64), windows - 1)
        alpha[place], distance[place] = fitted.alpha, fitted.ks
    known = alpha[np.isfinite(alpha)]
    pooled = float(np.median(known)) if known.size else _shape(np.diff(arrivals))
    quality = RenewalFit(
        windows=int(np.count_nonzero(rate)),
        fitted=int(known.size),
        alpha=[float(a) for a in np.quantile(known if known.size else [pooled], (0.1, 0.5, 0.9))],
        ks=float(np.nanmedian(distance)) if np.isfinite(distance).any() else None,
    )
    shape = np.clip(np.where(np.isfinite(alpha), alpha, pooled), *ALPHA_RANGE)
    return Renewal(
        window, span, whole_period(span), [float(f"{r:.9g}") for r in rate], [float(f"{a:.6g}") for a in shape]
    ), quality


class RenewalFit(msgspec.Struct, frozen=True):
    """How well windows of Gamma gaps describe the arrivals of a class."""

    windows: int
    """Windows with arrivals."""
    fitted: int
    """Windows with a shape of their own; the others took the pooled one."""
    alpha: list[float]
    """p10, p50, p90 of the fitted shapes."""
    ks: float | None
    """Median Kolmogorov-Smirnov distance of the windows' gaps to their Gamma law."""


def _shape(gaps: np.ndarray) -> float:
    """alpha = mean^2/variance of all gaps; 1 (Poisson) for fewer than three gaps, which say nothing."""
    if gaps.size < 3 or gaps.mean() == 0:
        return 1.0
    return float(np.clip(gaps.mean() ** 2 / max(float(gaps.var()), 1e-300), *ALPHA_RANGE))


def whole_period(span: float) -> float:
    """Whole weeks or whole days of a span that holds such, else the span: what comes after repeats by the clock."""
    for unit in (WEEK, DAY):
        # A trace of "a day" ends with its last request, a little before midnight.
        whole = int((span + 0.01 * unit) // unit) * unit
        if whole:
            return float(min(whole, span))
    return span
