"""Arrivals and lengths from some numbers per time scale: a cascade that has never seen the hour it draws.

Cut n gaps in halves, quarters, eighths, … by their number. The share of the time that the first half of a part takes
has a law for every size m of a half (for independent Gamma(alpha) gaps it would be Beta(m alpha, m alpha), so this is
the paper's renewal process with a burstiness of its own at every scale). The law is kept as quantiles of the |log odds|
of the share, apart for parts that are dense and sparse for their size, because a burst is smoother inside than a lull.
The cuts are taken as independent: a conservative multiplicative cascade (Mandelbrot, J. Fluid Mech. 62, 1974), in the
number of requests instead of time, so that the finest cut says how single gaps divide.

Lengths have effects in the same tree: a part of m neighbours shares a normal score with the variance that the trace's
Haar differences show at m, so that one client's burst has its own lengths; and the denser half of a part has longer or
shorter requests, by a slope per scale. A slow rate by hour of day is taken out first where the span is two days or more
(the cascade then runs in operational time). Nothing of the trace is kept but these numbers.

Beyond a third of the trace, the laws go on as at the last scale. A higher rate means more clients: `scaled(f)`
superposes independent draws, the last one thinned, so that dispersion stays about as it is and rates add up.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import msgspec
import numpy as np

from squall.workload.concurrency import DAY, HOUR, WEEK

if TYPE_CHECKING:
    from squall.workload.lengths import Lengths

FEWEST = 64
"""A cascade is not fitted to fewer requests."""
_DENSITIES = 5  # kinds of parts, from dense to sparse
_FEW_PARTS = 12  # fewer say nothing about a scale
_OVERLAP = 8
LEVELS = np.array([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97, 1.0])


@dataclass(frozen=True)
class Stretch:
    """`span` s of the model's time from `begin`, at `factor` times the fitted rate: `expected` requests."""

    begin: float
    span: float
    rate: float
    factor: float = 1.0

    @property
    def expected(self) -> float:
        """Expected number of arrivals."""
        return self.rate * self.span * self.factor

    def scaled(self, factor: float) -> Self:
        """The same stretch of time at `factor` times the rate."""
        return replace(self, factor=self.factor * factor)


class Scale(msgspec.Struct, frozen=True):
    """How parts of 2 x `size` requests divide."""

    size: float
    """Requests of a half."""
    density: list[float]
    """Borders between sparse, middling and dense parts: log(mean gap of the part / mean gap of all), rising."""
    odds: list[list[float]]
    """Of parts from dense to sparse, the quantiles of |log odds| of the first half's share of the time, at LEVELS."""
    effect: tuple[float, float]
    """Variances of what `size` neighbours share of the two lengths' normal scores."""
    tilt: tuple[float, float]
    """Slopes of the scores' differences between the halves on the rank of the first half's share of the time."""

    def __post_init__(self) -> None:
        if self.size <= 0 or len(self.odds) != len(self.density) + 1 or np.any(np.diff(self.density) < 0):
            raise ValueError("a scale needs a size, and one odds more than borders of density, which rise")
        if min(self.effect) < 0:
            raise ValueError("oddss must be above 0 and variances not negative")


class Cascade(msgspec.Struct, frozen=True, tag="cascade", tag_field="kind"):
    """A class's arrivals and length effects by scale."""

    span: float
    """Fitted seconds."""
    mean_rate: float
    """Requests/s over the fitted span."""
    tick: float | None
    """Arrivals are recorded at multiples of so many seconds; null: they are not."""
    period: float | None
    """Seconds after which the slow rate repeats; null: there is none."""
    profile: list[float]
    """Rate in equal parts of the period, as a multiple of the mean."""
    lead: str
    """Which length the first score is of, "request" or "response"; the second is of the other one given the first."""
    scales: list[Scale]
    """From single gaps to half of the trace."""

    def __post_init__(self) -> None:
        if not self.span > 0 or not self.mean_rate > 0 or not self.scales:
            raise ValueError("span and mean_rate must be above 0, and there must be scales")
        if self.lead not in ("request", "response"):
            raise ValueError("lead must be request or response")
        if (self.period is None) != (not self.profile) or min(self.profile, default=1.0) < 0:
            raise ValueError("profile must have rates where there is a period, none negative")
        if self.tick is not None and self.tick <= 0:
            raise ValueError("tick must be above 0")

    @property
    def window(self) -> float:
        return 1 / self.mean_rate

    def path(self, begin: float, end: float, seed: int) -> Stretch:
        """The stretch from `begin` to `end` s of the model's time; its course is drawn with the requests."""
        warp = self._warped(np.array([begin, end]))
        return Stretch(begin, end - begin, self.mean_rate * float(warp[1] - warp[0]) / (end - begin))

    def arrive(self, path: Stretch, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Arrival times (sorted seconds from the stretch's begin), and the normal scores of request and response."""
        parts = []
        left = path.factor
        while left > 1e-9:
            times, scores = self._tree(path.rate * path.span, rng)
            if left < 1:  # fewer clients: the rest of one draw
                kept = rng.random(times.size) < left
                times, scores = times[kept], scores[:, kept]
            parts.append((times, scores))
            left -= 1
        if not parts:
            return np.empty(0), np.empty(0), np.empty(0)
        times = np.concatenate([part[0] for part in parts])
        scores = np.concatenate([part[1] for part in parts], axis=1)
        if len(parts) > 1:
            order = np.argsort(times, kind="stable")
            times, scores = times[order], scores[:, order]
        times = self._unwarped(times, path)
        if self.tick:
            times = np.floor(times / self.tick) * self.tick
        return times, scores[0], scores[1]

    def _tree(self, expected: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Times as parts of 1, and normal scores (2, n), of one draw with `expected` requests, give or take one."""
        from squall.workload.compiled.cascade import tree

        size = int(np.floor(expected + rng.random()))
        if size == 0:
            return np.empty(0), np.empty((2, 0))
        depth = int(np.ceil(np.log2(size))) if size > 1 else 0
        scales = [self._scale(size / 2 ** (level + 1)) for level in range(depth)]
        density = np.full((depth, _DENSITIES - 1), np.inf)
        odds = np.zeros((depth, _DENSITIES, LEVELS.size))
        for level, scale in enumerate(scales):
            density[level, : len(scale.density)] = np.exp(scale.density)
            odds[level, : len(scale.odds)] = scale.odds
        pairs = [(np.sqrt(scale.effect), scale.tilt) for scale in scales]
        spread, tilt = (
            np.array(found, float).reshape(depth, 2) for found in (zip(*pairs, strict=True) if pairs else ((), ()))
        )
        share, effect = tree(size, LEVELS, density, odds, spread, tilt, rng)
        # A stretch of time begins anywhere, not at the border of a half.
        turn = int(rng.integers(size))
        times = np.cumsum(np.roll(share, turn))
        return np.minimum(times / times[-1] - share[-turn - 1] * rng.random(), 1.0).clip(0.0), np.roll(effect, turn, 1)

    def _scale(self, size: float) -> Scale:
        """The fitted scale nearest to `size`; beyond the largest, one that goes on as the last two do."""
        known = np.log2([scale.size for scale in self.scales])
        at = np.log2(size)
        if at <= known[-1] + 0.5 or len(self.scales) < 3:
            return self.scales[int(np.argmin(np.abs(known - at)))]
        return self.scales[-1]

    def _warped(self, time: np.ndarray) -> np.ndarray:
        """Operational time: the integral of the profile from 0."""
        if self.period is None:
            return time
        edges = np.linspace(0, self.period, len(self.profile) + 1)
        total = np.concatenate([[0.0], np.cumsum(self.profile)]) * self.period / len(self.profile)
        return time // self.period * total[-1] + np.interp(time % self.period, edges, total)

    def _unwarped(self, part: np.ndarray, path: Stretch) -> np.ndarray:
        """Seconds from the stretch's begin, of times as parts of its operational time."""
        if self.period is None:
            return part * path.span
        step = self.period / len(self.profile)
        edges = np.concatenate(
            [[path.begin], np.arange(path.begin // step + 1, (path.begin + path.span) / step) * step]
        )
        edges = np.append(edges[edges < path.begin + path.span], path.begin + path.span)
        total = self._warped(edges)
        return np.interp(total[0] + part * (total[-1] - total[0]), total, edges) - path.begin


def fit_cascade(
    arrivals: np.ndarray,
    answered: np.ndarray,
    request: np.ndarray,
    response: np.ndarray,
    law: "Lengths | None",
    span: float,
    *,
    tick: float | None,
    sessions: bool,
    rng: np.random.Generator,
    seed: int,
) -> Cascade:
    """The cascade of a class: sorted `arrivals` (s from 0, below `span`), which are `answered`, lengths in tokens and
    their joint law. Arrivals recorded in ticks are first spread inside them."""
    from squall.characterize.concurrency import despread

    times = np.minimum(despread(arrivals, tick, seed), np.nextafter(span, 0)) if tick else arrivals
    period, profile = slow_rate(times, span)
    empty = Cascade(
        span,
        times.size / span,
        tick,
        period,
        profile,
        "request",
        [Scale(1.0, [], [[0.0] * LEVELS.size], (0.0, 0.0), (0.0, 0.0))],
    )
    warped = empty._warped(np.append(times, span))
    gaps = np.diff(warped)
    gaps = np.maximum(gaps, 1e-7 * gaps.mean())
    scores = np.zeros((2, times.size))
    if law is None or answered.sum() < 3:
        return msgspec.structs.replace(empty, scales=_scales(gaps, scores))
    scores[:, answered] = law.scores(request[answered], response[answered], rng)
    found = _scales(gaps, scores)
    if sessions:  # where in its session a request is says how long it is
        return msgspec.structs.replace(empty, scales=found)
    scores[:, answered] = law.reversed.scores(response[answered], request[answered], rng)
    other = _scales(gaps, scores)
    # That order which shows more of how lengths move with time: one length often follows the other.
    moved = [
        sum(sum(scale.effect) + (scale.tilt[0] ** 2 + scale.tilt[1] ** 2) / 6 for scale in some[2:])
        for some in (found, other)
    ]
    lead, scales = ("request", found) if moved[0] >= moved[1] else ("response", other)
    return msgspec.structs.replace(empty, lead=lead, scales=scales)


def slow_rate(times: np.ndarray, span: float) -> tuple[float | None, list[float]]:
    """The period (a week from two weeks on, a day from two days on) and the rate in its hours over the mean rate."""
    period = WEEK if span >= 2 * WEEK else DAY if span >= 1.9 * DAY else None
    if period is None:
        return None, []
    parts = round(period / HOUR)
    cycles = span / period
    counts = np.bincount((times % period / HOUR).astype(int).clip(0, parts - 1), minlength=parts)
    edges = np.arange(parts + 1) * HOUR
    # How often each hour of the period lies in the span: the last cycle may be cut.
    seen = np.floor(cycles) + np.clip((span - np.floor(cycles) * period - edges[:-1]) / HOUR, 0, 1)
    rate = (counts + 0.5) / np.maximum(seen, 1e-3)
    # An hour is known no better than its counts differ from cycle to cycle: it is drawn towards the mean.
    whole = int(cycles)
    by_cycle = np.bincount((times // HOUR).astype(int), minlength=whole * parts)[: whole * parts].reshape(whole, parts)
    # A single whole cycle says nothing about that; half of what one saw is kept.
    differs = by_cycle.var(axis=0, ddof=1).mean() / max(by_cycle.mean(), 1e-9) if whole > 1 else counts.mean()
    dispersion = max(1.0, float(differs))
    weight = counts / (counts + dispersion)
    rate = weight * rate + (1 - weight) * rate.mean()
    return period, [float(f"{r:.5g}") for r in rate / rate.mean()]


def _scales(gaps: np.ndarray, scores: np.ndarray) -> list[Scale]:
    """The laws of the shares and the length effects, from single gaps up to a third of the trace."""
    mean = gaps.mean()
    time = np.concatenate([[0.0], np.cumsum(gaps)])
    known = np.concatenate([np.zeros((2, 1)), np.cumsum(scores, axis=1)], axis=1)
    scales: list[Scale] = []
    before, size = np.zeros(2), 1
    while 3 * size <= gaps.size or not scales:
        # Parts that overlap: few large ones say more that way.
        begin = np.arange(0, gaps.size - 2 * size + 1, max(1, size // _OVERLAP))
        cut, end = begin + size, begin + 2 * size
        left, whole = time[cut] - time[begin], time[end] - time[begin]
        share = np.clip(left / whole, 1e-9, 1 - 1e-9)
        thin = np.log(whole / (2 * size) / mean)
        parts = gaps.size / (2 * size)  # that do not overlap
        kinds = int(np.clip(parts // _FEW_PARTS, 1, _DENSITIES))
        border = np.quantile(thin, np.arange(1, kinds) / kinds)
        kind = np.searchsorted(border, thin)
        laws = [_law(share[kind == k] if (kind == k).any() else share) for k in range(kinds)]
        g = _score(laws, kind, share)
        apart = (2 * known[:, cut] - known[:, begin] - known[:, end]) / size
        tilt = (apart * g).mean(axis=1) / max(float((g**2).mean()), 1e-9)
        # Two standard errors: less is chance.
        tilt = np.where(np.abs(tilt) * np.sqrt(parts) > 2 * apart.std(axis=1), tilt, 0.0)
        differs = ((apart - tilt[:, None] * g) ** 2).mean(axis=1) / 2
        effect = np.maximum(differs - before / 2, 0.0)
        before = (apart**2).mean(axis=1) / 2
        scales.append(
            Scale(
                float(size),
                [float(f"{b:.4g}") for b in border],
                laws,
                _pair(effect),
                _pair(tilt),
            )
        )
        size *= 2
    return scales


def _law(share: np.ndarray) -> list[float]:
    """How uneven the halves are: quantiles of |log odds| of the share."""
    odds = np.abs(np.log(share / (1 - share)))
    return [float(f"{x:.4g}") for x in np.quantile(odds, LEVELS)]


def _score(laws: list[list[float]], kind: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Between -1 and 1: at which quantile of its law the share lies, and on which side of a half."""
    odds = np.log(share / (1 - share))
    rank = np.zeros(share.size)
    for number, law in enumerate(laws):
        some = kind == number
        rank[some] = np.interp(np.abs(odds[some]), law, LEVELS)
    return np.sign(odds) * rank


def _pair(values: np.ndarray) -> tuple[float, float]:
    return float(f"{values[0]:.4g}"), float(f"{values[1]:.4g}")
