"""Choose: which kind of arrivals a class gets, and how much freedom, by held-out likelihood and by a simulated queue.

The queue is one server, first come first served: request i, with the service time S_i = its work / the server's speed,
is done at

    D_i = max(A_i, D_{i-1}) + S_i      (Lindley, 1952),

all of them at once with a running maximum. Work is the prompt, as for time to first token, or prompt and response in
equal parts, as for memory and end to end time, at several loads. It is no model of an engine, but what it cannot tell
apart rarely differs in one. A model is judged by several draws: mean, P90 and P99 of the time in the queue must come
out right in the middle, and not differ more from draw to draw than a percentile may that one is to compare with.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import polars as pl

from squall.seeds import stream
from squall.workload.episodes import Episodes

if TYPE_CHECKING:
    from squall.workload.model import ClassModel

LOADS = ((0.03, 0.2, 0.5, 0.8, 1.1), (0.5, 0.8, 1.1))
"""Utilisations at which prompts are queued, and prompts with responses."""
OFF = np.log([1.03, 1.03, 1.08])
"""How far the middle of the draws may be from the trace: mean, P90, P99 of the time in the queue."""
SPREAD = np.log([1.10, 1.10, 1.30])
"""How far a draw may be from the middle (one standard deviation)."""
COVERED = 1.5
"""The middle of the draws is at most so many standard deviations of a draw from the trace, or ALMOST equal."""
ALMOST = 0.003
FREEDOMS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
DRAWS = 8
SAMPLE = 30_000
"""Requests of a class that are queued; the middle of it where there are more."""
BLOCK = 8
"""Requests of the known half that make one stretch of equal rate in `held_out`."""


@dataclass(frozen=True)
class Check:
    """How a model's draws differ from the trace in the queue: logarithms, shape (loads, 3)."""

    off: np.ndarray
    spread: np.ndarray

    @property
    def worst(self) -> float:
        """The largest difference of the middle of the draws from the trace, in units of what is allowed."""
        return float((np.abs(self.off) / OFF).max())

    @property
    def passed(self) -> bool:
        """Near the trace, spread no wider than allowed, and wide enough for the trace to be one of the draws."""
        covered = np.abs(self.off) <= COVERED * self.spread + ALMOST
        return self.worst <= 1 and bool((self.spread <= SPREAD).all()) and bool(covered.all())

    @property
    def distance(self) -> float:
        """Root mean square of bias and spread together, in units of what is allowed."""
        return float(np.sqrt(((self.off / OFF) ** 2 + (self.spread / SPREAD) ** 2).mean()))

    @property
    def words(self) -> str:
        """The largest difference of mean or P90, and of P99, as factors."""
        largest = np.exp(np.abs(self.off[:, :2]).max()), np.exp(np.abs(self.off[:, 2]).max())
        return f"{largest[0] - 1:.1%} in mean or P90 and {largest[1] - 1:.1%} in P99"


class Bench:
    """A class's recorded requests (the middle SAMPLE of them) in the queue, to hold draws against."""

    def __init__(self, arrival: np.ndarray, rows: pl.DataFrame, span: float):
        """`arrival`: sorted seconds from 0, below `span`."""
        first = max(0, (arrival.size - SAMPLE) // 2)
        self.rows = slice(first, min(first + SAMPLE, arrival.size))
        self.begin = float(arrival[first]) if first else 0.0
        self.end = float(arrival[self.rows.stop]) if self.rows.stop < arrival.size else span
        self.end = max(self.end, self.begin + 1e-6 * span)
        some = rows[self.rows]
        tokens = [some[name].to_numpy() for name in ("request_tokens", "response_tokens")]
        answered = ~some["failed"].to_numpy()
        self.per = (max(float(tokens[0][answered].sum()), 1.0), max(float(tokens[1][answered].sum()), 1.0))
        self.per = (self.per[0] / (self.end - self.begin), self.per[1] / (self.end - self.begin))
        self.real = self._queued(arrival[self.rows] - self.begin, tokens[0], tokens[1], answered)

    def check(self, model: "ClassModel", seed: int) -> Check:
        """Draws of `model` beside the trace. Sessions are left out: they order the requests, and cost time."""
        of = (self.begin, self.end)
        if isinstance(model.arrivals, Episodes):
            part = model.arrivals.part(self.rows, *of)
            model, of = msgspec.structs.replace(model, arrivals=part), (0.0, part.span)
        alone = msgspec.structs.replace(model, conversations=None)
        found = []
        for number in range(DRAWS):
            path = model.arrivals.path(*of, seed + number)
            drawn = alone.draw(path, seed + number, 0)
            tokens = drawn["request_tokens"], drawn["response_tokens"]
            found.append(self._queued(drawn["arrival"], *tokens, ~drawn["failed"]) - self.real)
        return Check(np.median(found, axis=0), np.std(found, axis=0))

    def _queued(
        self, arrival: np.ndarray, request: np.ndarray, response: np.ndarray, answered: np.ndarray
    ) -> np.ndarray:
        """Logarithms of mean, P90 and P99 of the time in the queue at each load."""
        if not answered.any():
            return np.zeros((sum(map(len, LOADS)), 3))
        arrival, prompt = arrival[answered], request[answered] / self.per[0]
        both = (prompt + response[answered] / self.per[1]) / 2
        found = []
        for work, loads in zip((prompt, both), LOADS, strict=True):
            for load in loads:
                service = work * load
                total = np.cumsum(service)
                stay = total + np.maximum.accumulate(arrival - total + service) - arrival
                found.append([stay.mean(), *np.quantile(stay, (0.9, 0.99))])
        return np.log(np.maximum(np.array(found), 1e-12))


def freest(model: "ClassModel", bench: Bench, seed: int) -> "tuple[ClassModel, Check]":
    """`model` (of episodes) with the largest freedom whose draws pass, or else with that which is off the least."""
    low, high, found = 0, len(FREEDOMS) - 1, {}

    def tried(place: int) -> Check:
        if place not in found:
            found[place] = bench.check(_with_freedom(model, FREEDOMS[place]), seed)
        return found[place]

    while low < high:  # what fails with little freedom fails with more
        middle = (low + high + 1) // 2
        if tried(middle).passed:
            low = middle
        else:
            high = middle - 1
    if not tried(low).passed:
        low = min(found, key=lambda place: (found[place].worst, place))
    return _with_freedom(model, FREEDOMS[low]), found[low]


def held_out(arrivals: np.ndarray, span: float, window: float, *, tick: float | None, seed: int) -> tuple[float, float]:
    """How well a random half of the arrivals predicts the other: by its own course, and at one rate per window.

    Log-likelihood per request of a Poisson process with the rate that the first half gives, up to a constant: that of
    each BLOCK of its requests, or that of each window of `window` s.
    """
    from squall.characterize.concurrency import despread

    times = np.minimum(despread(arrivals, tick, seed), np.nextafter(span, 0)) if tick else arrivals
    known = stream(seed, "held out").random(times.size) < 0.5
    seen, later = times[known], times[~known]
    if not later.size or seen.size < BLOCK:
        return 0.0, 0.0
    middles = (seen[BLOCK - 1 : -1 : BLOCK] + seen[BLOCK::BLOCK]) / 2
    borders = np.concatenate([[0.0], middles, [span]])
    # Requests at one time make a stretch without length: it is as long as the clock can tell.
    borders = borders[np.append(np.diff(borders) > max(tick or 0.0, 1e-9 * span), True)]
    borders[0] = 0.0

    def likelihood(edges: np.ndarray) -> float:
        counts = [np.bincount(np.searchsorted(edges[1:-1], part, side="right"), minlength=edges.size - 1)
                  for part in (seen, later)]  # fmt: skip
        # Half a request everywhere: a stretch that was empty by chance is not impossible.
        share = (counts[0] + 0.5) / (counts[0] + 0.5).sum() * span / np.diff(edges)
        return float(counts[1] @ np.log(share)) / later.size

    return likelihood(borders), likelihood(np.append(np.arange(0, span, window), span))


def _with_freedom(model: "ClassModel", freedom: float) -> "ClassModel":
    return msgspec.structs.replace(model, arrivals=msgspec.structs.replace(model.arrivals, freedom=freedom))
