"""Arrivals and lengths from a few numbers per time scale: a cascade that has never seen the hour it draws.

Cut n gaps in halves, quarters, eighths, … by their number. The share of the time that the first half of a part takes is
Beta(c, c) distributed, with a concentration c for every size m of a half. If gaps were independent and Gamma(alpha),
c would be m alpha exactly (Lukacs, Ann. Math. Stat. 26, 1955): the cascade is the paper's renewal process with a burstiness
of its own at every scale, and where c grows more slowly than m, dispersion grows with the scale. c is fitted by
likelihood, apart for parts that are dense and sparse for their size, because a burst is smoother inside than a lull.

Lengths have effects in the same tree: a part of m neighbouring requests shares a normal score with the variance that the
trace's Haar differences show at m, so that one client's burst has its own lengths; and the denser half of a part has
longer or shorter requests, by a slope per scale. A slow rate by hour of day is taken out first where the span is two
days or more (the cascade then runs in operational time). Nothing of the trace is kept but these numbers.

Beyond the fitted size of the trace, c and the effects go on as over the last scales. A higher rate means more clients:
`scaled(f)` superposes independent draws, the last one thinned, so that dispersion stays as it is and rates add up.
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
_DENSITIES = 3  # sparse, middling and dense parts
_FEW_PARTS = 12  # fewer say nothing about a scale
_LEAST, _MOST = 1e-3, 1e7  # of a concentration
_GRID = np.geomspace(_LEAST, _MOST, 400)


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
    concentration: list[float]
    """c of dense, middling and sparse parts."""
    request: float
    """Variance of the effect on the request lengths' normal score that `size` neighbours share."""
    response: float
    """The same for the response's score given the request."""
    tilt: tuple[float, float]
    """Slope of both scores' difference between the halves on the normal score of the first half's share of the time."""

    def __post_init__(self) -> None:
        if self.size <= 0 or len(self.concentration) != len(self.density) + 1 or np.any(np.diff(self.density) < 0):
            raise ValueError("a scale needs a size, and one concentration more than borders of density, which rise")
        if min(self.concentration) <= 0 or self.request < 0 or self.response < 0:
            raise ValueError("concentrations must be above 0 and variances not negative")


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
    scales: list[Scale]
    """From single gaps to half of the trace."""

    def __post_init__(self) -> None:
        if not self.span > 0 or not self.mean_rate > 0 or not self.scales:
            raise ValueError("span and mean_rate must be above 0, and there must be scales")
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
        size = int(np.floor(expected + rng.random()))
        if size == 0:
            return np.empty(0), np.empty((2, 0))
        depth = int(np.ceil(np.log2(size))) if size > 1 else 0
        share, effect = np.ones(1), np.zeros((2, 1))
        border = np.array([0, size])
        for level in range(depth):
            new = np.arange(2 ** (level + 1) + 1) * size // 2 ** (level + 1)
            held = np.diff(border)
            scale = self._scale(size / 2 ** (level + 1))
            thin = np.log(np.maximum(share * size / np.maximum(held, 1), 1e-300))
            c = np.array(scale.concentration)[np.searchsorted(scale.density, thin)]
            first, second = np.diff(new)[::2], np.diff(new)[1::2]
            left = _beta(c, rng)
            left = np.where(first == 0, 0.0, np.where(second == 0, 1.0, left))
            g = np.sqrt(8 * c + 4) * (left - 0.5)  # a normal score where c is large, bounded where it is small
            share = np.stack([share * left, share * (1 - left)], axis=1).ravel()
            spread = np.sqrt([[scale.request], [scale.response]])
            tilt = np.array(scale.tilt)[:, None] / 2 * g
            both = np.stack([effect + tilt, effect - tilt], axis=2).reshape(2, -1)
            effect = both + spread * rng.standard_normal(both.shape)
            border = new
        held = np.diff(border) > 0
        share, effect = share[held], effect[:, held]
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
        last, before = self.scales[-1], self.scales[-3]
        slope = np.log2(np.array(last.concentration) / np.array(before.concentration)).mean() / (known[-1] - known[-3])
        growth = 2 ** (np.clip(slope, 0.0, 1.0) * (at - known[-1]))
        return msgspec.structs.replace(last, size=size, concentration=[c * growth for c in last.concentration])

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
    rng: np.random.Generator,
    seed: int,
) -> Cascade:
    """The cascade of a class: sorted `arrivals` (s from 0, below `span`), which are `answered`, lengths in tokens and
    their joint law. Arrivals recorded in ticks are first spread inside them."""
    from squall.characterize.concurrency import despread

    times = np.minimum(despread(arrivals, tick, seed), np.nextafter(span, 0)) if tick else arrivals
    period, profile = slow_rate(times, span)
    empty = Cascade(span, times.size / span, tick, period, profile, [Scale(1.0, [], [1.0], 0.0, 0.0, (0.0, 0.0))])
    warped = empty._warped(np.append(times, span))
    gaps = np.diff(warped)
    gaps = np.maximum(gaps, 1e-7 * gaps.mean())
    scores = np.zeros((2, times.size))
    if law is not None and answered.sum() > 2:
        scores[:, answered] = law.scores(request[answered], response[answered], rng)
    return msgspec.structs.replace(empty, scales=_scales(gaps, scores))


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
    # An hour that few cycles saw is known no better than its counts vary: it is drawn towards the mean.
    busy = np.bincount((times // HOUR).astype(int))
    dispersion = max(1.0, float(busy.var() / max(busy.mean(), 1e-9)))
    weight = counts / (counts + dispersion)
    rate = weight * rate + (1 - weight) * rate.mean()
    return period, [float(f"{r:.5g}") for r in rate / rate.mean()]


def _scales(gaps: np.ndarray, scores: np.ndarray) -> list[Scale]:
    """Concentrations and length effects from single gaps upwards, while there are parts enough to tell."""
    mean = gaps.mean()
    scales, before = [], (scores[:, 1:] - scores[:, :-1]).var(axis=1) / 2 if scores.shape[1] > 2 else np.zeros(2)
    before = np.zeros(2)
    part, score, size = gaps, scores, 1
    while part.size >= 2 * _FEW_PARTS or not scales:
        pairs = part.size // 2
        left, right = part[: 2 * pairs : 2], part[1 : 2 * pairs : 2]
        whole = left + right
        share = np.clip(left / whole, 1e-9, 1 - 1e-9)
        thin = np.log(whole / (2 * size) / mean)
        kinds = int(np.clip(pairs // (4 * _FEW_PARTS), 1, _DENSITIES))
        border = np.quantile(thin, np.arange(1, kinds) / kinds)
        kind = np.searchsorted(border, thin)
        c = [likeliest(share[kind == k]) if (kind == k).any() else likeliest(share) for k in range(kinds)]
        g = np.sqrt(8 * np.array(c)[kind] + 4) * (share - 0.5)
        apart = score[:, : 2 * pairs : 2] - score[:, 1 : 2 * pairs : 2]
        tilt = (apart * g).mean(axis=1) / max(float((g**2).mean()), 1e-9)
        # Three standard errors: less is chance.
        tilt = np.where(np.abs(tilt) * np.sqrt(pairs) > 3 * apart.std(axis=1), tilt, 0.0)
        differs = (apart - tilt[:, None] * g).var(axis=1) / 2
        effect = np.maximum(differs - before / 2, 0.0)
        before = (apart**2).mean(axis=1) / 2
        scales.append(
            Scale(
                float(size),
                [float(f"{b:.4g}") for b in border],
                [float(f"{x:.4g}") for x in c],
                float(f"{effect[0]:.4g}"),
                float(f"{effect[1]:.4g}"),
                (float(f"{tilt[0]:.4g}"), float(f"{tilt[1]:.4g}")),
            )
        )
        part, size = whole, 2 * size
        score = (score[:, : 2 * pairs : 2] + score[:, 1 : 2 * pairs : 2]) / 2
    return scales


def likeliest(share: np.ndarray) -> float:
    """The c of largest likelihood for shares from Beta(c, c): digamma(c) - digamma(2 c) = mean of log share, both ways."""
    from scipy.special import digamma

    goal = float(np.mean(np.log(share) + np.log1p(-share))) / 2
    law = digamma(_GRID) - digamma(2 * _GRID)  # rises to -log 2
    return float(np.exp(np.interp(goal, law, np.log(_GRID))))


def _beta(c: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Beta(c, c) numbers; for c so small that both Gammas vanish, 0 or 1."""
    a, b = rng.standard_gamma(c), rng.standard_gamma(c)
    total = a + b
    return np.where(total > 0, a / np.where(total > 0, total, 1.0), (rng.random(c.size) < 0.5).astype(float))
