"""A trace's own course: when each 32 requests came and how long they were, with chance only inside such a stretch.

A tail latency of an hour hangs on one or two episodes of it, so a draw that is to lead to the same conclusions must
have them: the same requests of the same kind in the same stretch of time. An *episode* is a stretch that held EPISODE
requests. A draw puts as many there, at new times, and draws their lengths from those that the episode held, each first
put into one of 64 x 64 length classes and drawn anew inside its class. `freedom` loosens this: that share of the
requests is left to chance, in number (Poisson) and in kind (any of the episode's).

Inside, arrivals follow a multiplicative cascade. The span is halved again and again; the left half of a part gets the
share theta of the part's load, a priori Beta(c/2, c/2) with a concentration c per level of halving, which says how
uneven load is at that time scale. c maximises the likelihood of the trace's counts, which are beta-binomial in it. A
draw takes each theta from its posterior Beta(n_left + c/2, n_right + c/2): a rate path that could have produced the
trace (the multiscale model of Kolaczyk, JASA 94, 1999, and of Timmermann and Nowak, IEEE Trans. Inf. Theory 45, 1999).
Its law has the trace's dispersion at every scale, and counts carry no Poisson noise twice, as they would if the
trace's own rate per window were drawn from again.

What such a model holds is the trace at a coarser grain: counts and length classes, not rows, but little less. Beyond
its span it goes on with randomly chosen eighths of it, or by the clock if it spans a day, with a new course for each.
"""

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from squall.seeds import stream
from squall.workload.concurrency import DAY, Path, cut, join, whole_period

if TYPE_CHECKING:
    from squall.workload.lengths import Lengths

EPISODE = 32
"""Requests of an episode."""
FREEDOM = 0.015
"""Share of the requests that is left to chance: little, so that a server near saturation sees the same course."""
MOST_REQUESTS = 1_000_000
"""A class with more requests than this is not kept at so fine a grain."""
_CLASSES = 64  # length classes of the requests, and as many of the responses
_BLOCKS = 8
_DEEPEST = 20  # halvings: 2^20 leaves
_CONCENTRATIONS = 2.0 ** np.arange(-6, 15, 0.5)


class LengthsByEpisode(msgspec.Struct, frozen=True):
    """Which classes of (request, response) length the answered requests of each episode were in."""

    request: list[float]
    """Ranks (0 … 1, of all requests of the class) that divide the classes of request lengths."""
    response: list[float]
    size: list[int]
    """Answered requests of each episode."""
    code: list[int]
    """Their length classes, request class x number of response classes + response class, sorted inside an episode."""

    def __post_init__(self) -> None:
        classes = (len(self.request) - 1) * (len(self.response) - 1)
        for border in (self.request, self.response):
            if len(border) < 2 or border[0] != 0 or border[-1] != 1 or np.any(np.diff(border) <= 0):
                raise ValueError("the borders of the length classes must rise from 0 to 1")
        if sum(self.size) != len(self.code) or not self.code or min(self.size) < 0:
            raise ValueError("size must say how many entries of code belong to each episode")
        if min(self.code) < 0 or max(self.code) >= classes:
            raise ValueError("code names a length class that is not there")

    def draw(
        self, episode: np.ndarray, number: np.ndarray, law: "Lengths", freedom: float, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Request and response tokens for stretches with `number[i]` requests in `episode[i]`, in their order."""
        size = np.array(self.size)
        filled = np.flatnonzero(size)
        # An episode in which every request failed has the lengths of the next one that has any.
        episode = filled[np.minimum(np.searchsorted(filled, episode), filled.size - 1)]
        begin = (np.cumsum(size) - size)[episode]
        total = int(number.sum())
        run = np.repeat(np.arange(number.size), number)
        place = np.empty(total, np.int64)
        place[np.argsort(run + rng.random(total))] = np.arange(total)
        place -= (np.cumsum(number) - number)[run]
        # Each of the episode's lengths once, in random order; evenly spaced ones of them if fewer are needed, or again.
        share = (place + rng.random(number.size)[run]) / number[run]
        free = rng.random(total) < freedom
        share[free] = rng.random(int(free.sum()))
        held = size[episode][run]
        code = np.array(self.code)[begin[run] + np.minimum((share * held).astype(np.int64), held - 1)]
        classes = len(self.response) - 1
        ranks = []
        for border, inside in ((self.request, code // classes), (self.response, code % classes)):
            edges = np.array(border)
            ranks.append(edges[inside] + rng.random(total) * np.diff(edges)[inside])
        request, response = np.rint(law.request.at(ranks[0])), np.rint(law.response.at(ranks[1]))
        return request.astype(np.int32), np.maximum(response, 1).astype(np.int32)


class Episodes(msgspec.Struct, frozen=True, tag="episodes", tag_field="kind"):
    """The course of one class: its episodes, and the cascade inside them."""

    span: float
    """Fitted seconds."""
    period: float
    """Beyond a span of a day or more, t takes the course of t mod `period`."""
    freedom: float
    """Share of the requests whose number and lengths are left to chance."""
    tick: float | None
    """Arrivals are recorded at multiples of so many seconds, as those of the trace were; null: they are not."""
    border: list[float]
    """Episode e is the time from border[e] to border[e + 1] (s)."""
    count: list[int]
    """Requests of each episode."""
    leaf: list[int]
    """Requests in each of the equal parts into which the halving divides the span."""
    concentration: list[float]
    """c of the halves, quarters, eighths, …"""
    lengths: LengthsByEpisode | None
    """null: lengths do not depend on the time."""

    def __post_init__(self) -> None:
        if not self.count or len(self.border) != len(self.count) + 1 or np.any(np.diff(self.border) <= 0):
            raise ValueError("border must rise, and have one entry more than count")
        if self.border[0] != 0 or not np.isclose(self.border[-1], self.span) or not 0 < self.period <= self.span:
            raise ValueError("border must run from 0 to span, and period must lie in it")
        if len(self.leaf) != 2 ** len(self.concentration) or min(self.leaf) < 0 or min(self.count) < 0:
            raise ValueError("leaf must have 2 to the power of the number of concentrations entries, none negative")
        if min(self.concentration, default=1.0) <= 0 or not 0 <= self.freedom <= 1:
            raise ValueError("concentration must be above 0, and freedom between 0 and 1")
        if self.tick is not None and self.tick <= 0:
            raise ValueError("tick must be above 0")
        if self.lengths is not None and len(self.lengths.size) != len(self.count):
            raise ValueError("lengths must have a size for each episode")

    @property
    def window(self) -> float:
        return self.span / len(self.leaf)

    @property
    def mean_rate(self) -> float:
        """Requests/s over the fitted span."""
        return sum(self.count) / self.span

    def path(self, begin: float, end: float, seed: int) -> Path:
        """A rate path from `begin` to `end` (s from the fitted trace's start) with the episodes' expected counts."""
        parts, reached, turn = [], 0.0, -1
        course = Path(np.zeros(1), np.zeros(0), np.zeros(0))
        for number, (first, last) in enumerate(self._schedule(end, seed)):
            length = last - first
            if reached + length > begin:
                if turn != (turn := 0 if number == 0 else 1 + (number - 1) // _BLOCKS):
                    course = self._course(stream(seed, "course", turn))
                parts.append(cut(course, first + max(0.0, begin - reached), first + min(length, end - reached)))
            reached += length
        return join(parts)

    def _schedule(self, end: float, seed: int) -> list[tuple[float, float]]:
        """Stretches of the fitted time, one after another until `end`: the whole span, and what follows it."""
        schedule = [(0.0, self.span)]
        missing = end - self.span
        if missing <= 0:
            return schedule
        if self.span >= DAY:
            if self.period < self.span:
                schedule.append((self.span % self.period, self.period))
            return schedule + [(0.0, self.period)] * (int(missing // self.period) + 1)
        block = self.span / _BLOCKS
        chosen = stream(seed, "blocks").integers(_BLOCKS, size=int(missing // block) + 1)
        return schedule + [(k * block, (k + 1) * block) for k in chosen.tolist()]

    def _course(self, rng: np.random.Generator) -> Path:
        """One path over the fitted span, drawn from the cascade's posterior and fixed to the episodes' counts."""
        levels = halvings(np.array(self.leaf))
        load = np.ones(1)
        for counts, c in zip(levels[1:], self.concentration, strict=True):
            left = rng.beta(counts[::2] + c / 2, counts[1::2] + c / 2)
            load = np.stack([load * left, load * (1 - left)], axis=1).ravel()
        border = np.array(self.border)
        edges = np.union1d(np.linspace(0, self.span, load.size + 1), border)
        edges = edges[np.append(True, np.diff(edges) > 1e-9 * self.window)]
        leaf = np.minimum((edges[:-1] / self.window + 1e-6).astype(np.int64), load.size - 1)
        episode = np.minimum(np.searchsorted(border, edges[:-1], side="right") - 1, len(self.count) - 1)
        rate = load[leaf] + 1e-12 / load.size  # so that no episode is without any
        rate *= (np.array(self.count) / np.bincount(episode, rate * np.diff(edges), minlength=len(self.count)))[episode]
        return Path(edges, rate, np.ones(rate.size), episode)

    def arrive(self, path: Path, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Arrival times (sorted seconds) along `path`; the episodes it passes, and the number of arrivals in each."""
        load = path.rate * np.diff(path.edges)
        episode = np.zeros(load.size, np.int64) if path.episode is None else path.episode
        begins = np.flatnonzero(np.diff(episode, prepend=-1))
        expected = np.add.reduceat(load, begins)
        number = np.floor((1 - self.freedom) * expected + rng.random(begins.size)).astype(np.int64)
        number += rng.poisson(self.freedom * expected)
        run = np.repeat(np.arange(begins.size), number)
        # Sums of exponential steps over one more of them are sorted uniform numbers.
        steps = np.cumsum(rng.standard_exponential(run.size + begins.size))
        ends = np.cumsum(number + 1) - 1
        start = np.concatenate([[0.0], steps[ends[:-1]]])
        inside = (steps[np.arange(run.size) + run] - start[run]) / (steps[ends] - start)[run]
        operational = np.concatenate([[0.0], np.cumsum(load)])
        times = np.interp(operational[begins][run] + inside * expected[run], operational, path.edges)
        if self.tick:
            times = np.floor(times / self.tick) * self.tick
        return np.maximum.accumulate(times), episode[begins], number


def fit_episodes(
    arrivals: np.ndarray,
    answered: np.ndarray,
    request: np.ndarray,
    response: np.ndarray,
    span: float,
    *,
    tick: float | None,
    rng: np.random.Generator,
    seed: int,
) -> Episodes:
    """The course of a class: sorted `arrivals` (s from 0, below `span`), which are `answered`, and lengths in tokens.

    Arrivals recorded in ticks are first spread inside them.
    """
    from squall.characterize.concurrency import despread

    times = np.minimum(despread(arrivals, tick, seed), np.nextafter(span, 0)) if tick else arrivals
    leaf = leaves(times, span, _depth(times.size, span, tick))
    number = max(1, round(times.size / EPISODE))
    owner = np.arange(times.size) * number // times.size
    first = np.searchsorted(owner, np.arange(1, number))
    border = np.concatenate([[0.0], (times[first - 1] + times[first]) / 2, [span]])
    # Requests at one time cannot be parted: episodes without length join the one before.
    border = border[np.append(np.diff(border) > 1e-9 * span, True)]
    border[0] = 0.0
    owner = np.searchsorted(border[1:-1], times, side="right")
    return Episodes(
        span=span,
        period=whole_period(span),
        freedom=FREEDOM,
        tick=tick,
        border=border.tolist(),
        count=np.bincount(owner, minlength=border.size - 1).tolist(),
        leaf=leaf.tolist(),
        concentration=[concentration(counts[::2], counts[1::2]) for counts in halvings(leaf)[1:]],
        lengths=_classes(owner[answered], border.size - 1, request[answered], response[answered], rng)
        if answered.any()
        else None,
    )


def held_out(arrivals: np.ndarray, span: float, window: float, *, tick: float | None, seed: int) -> tuple[float, float]:
    """How well a random half of the arrivals predicts the other: as a cascade, and at one rate per window.

    Log-likelihood per request of a Poisson process with the rate that the first half gives, up to a constant.
    """
    from squall.characterize.concurrency import despread

    times = np.minimum(despread(arrivals, tick, seed), np.nextafter(span, 0)) if tick else arrivals
    known = stream(seed, "held out").random(times.size) < 0.5
    depth = _depth(times.size, span, tick)
    leaf, unseen = leaves(times[known], span, depth), leaves(times[~known], span, depth)
    load = np.ones(1)
    for counts in halvings(leaf)[1:]:
        left, right = counts[::2], counts[1::2]
        c = concentration(left, right)
        theta = (left + c / 2) / (left + right + c)
        load = np.stack([load * theta, load * (1 - theta)], axis=1).ravel()
    cascade = float(unseen @ np.log(np.maximum(load * leaf.size, 1e-300)))
    edges = np.append(np.arange(0, span, window), span)
    seen, later = (np.histogram(part, edges)[0] for part in (times[known], times[~known]))
    # Half a request in every window: one that was empty by chance is not impossible.
    share = (seen + 0.5) / (seen + 0.5).sum() * span / np.diff(edges)
    return cascade / max(unseen.sum(), 1), float(later @ np.log(share)) / max(later.sum(), 1)


def leaves(times: np.ndarray, span: float, depth: int) -> np.ndarray:
    """How many of `times` (s from 0, below `span`) lie in each of the 2^depth equal parts of the span."""
    return np.bincount((times / span * 2**depth).astype(np.int64), minlength=2**depth)


def _depth(requests: int, span: float, tick: float | None) -> int:
    """Halvings: to a quarter of the mean gap, but no finer than the clock."""
    depth = min(_DEEPEST, int(np.ceil(np.log2(max(requests, 2)))) + 2)
    return min(depth, max(0, int(np.log2(span / tick)))) if tick else depth


def halvings(leaf: np.ndarray) -> list[np.ndarray]:
    """Counts of the whole, its halves, quarters, … down to `leaf`."""
    levels = [leaf]
    while levels[-1].size > 1:
        levels.append(levels[-1].reshape(-1, 2).sum(1))
    return levels[::-1]


def concentration(left: np.ndarray, right: np.ndarray) -> float:
    """The c for which shares from Beta(c/2, c/2) make the counts of left and right halves likeliest; large is even."""
    from scipy.special import betaln

    split = left + right > 1  # a single request says nothing
    if not split.any():
        return float(_CONCENTRATIONS[-1])
    pairs, often = np.unique(np.stack([left[split], right[split]]), axis=1, return_counts=True)
    half = _CONCENTRATIONS[:, None] / 2
    likelihood = (betaln(pairs[0] + half, pairs[1] + half) - betaln(half, half)) @ often
    return float(_CONCENTRATIONS[int(np.argmax(likelihood))])


def _classes(
    owner: np.ndarray, episodes: int, request: np.ndarray, response: np.ndarray, rng: np.random.Generator
) -> LengthsByEpisode:
    from squall.workload.lengths import ranks

    borders, codes = [], np.zeros(owner.size, np.int64)
    for tokens in (request, response):
        border = _borders(tokens)
        codes = codes * (border.size - 1) + np.searchsorted(border[1:-1], ranks(tokens, rng), side="right")
        borders.append(border.round(9).tolist())
    return LengthsByEpisode(
        request=borders[0],
        response=borders[1],
        size=np.bincount(owner, minlength=episodes).tolist(),
        code=codes[np.lexsort((codes, owner))].tolist(),
    )


def _borders(tokens: np.ndarray) -> np.ndarray:
    """Ranks that divide a sample into classes which hold equally much, counting half by requests and half by tokens.

    Few long requests make much of the load, so they are told apart more finely than many short ones.
    """
    classes = min(_CLASSES, max(1, tokens.size // 8))
    rank = np.arange(1, tokens.size + 1) / tokens.size
    volume = np.cumsum(np.sort(tokens), dtype=float)
    held = (rank + volume / volume[-1]) / 2 if volume[-1] > 0 else rank
    inner = np.interp(np.arange(1, classes) / classes, held, rank)
    return np.unique(np.concatenate([[0.0], inner, [1.0]]))
