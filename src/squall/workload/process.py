"""Stationary renewal processes along a path of rate and shape, drawn piece by piece.

The gaps follow a law with mean 1 in operational time u = integral of lambda dt, Gamma or Weibull, of the path's shape.
A fixed point in time finds itself in a length-biased gap, at a place that is uniform in it (Cox, Renewal Theory, 1962).
Where the law changes, the gap under way keeps its place and its rank among such gaps, so that the process is
stationary in every window, and where the law does not change nothing happens (see concurrency.py).

    law             gap of mean 1              length-biased gap L
    Gamma(a)        G(a) / a                   a L ~ Gamma(a + 1)
    Weibull(k)      E^(1/k) / c                (c L)^k ~ Gamma(1 + 1/k),    c = Gamma(1 + 1/k)
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from squall.workload.concurrency import Path

GAMMA, WEIBULL = 0, 1


class RenewalProcess:
    """The arrivals of one process; each call of `along` goes on where the one before ended."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._state = np.array([0.0, 0.0, math.nan, GAMMA])

    def along(self, path: "Path", law: np.ndarray | None = None) -> np.ndarray:
        """Arrival times (sorted, on the path's clock) along `path`, which follows the path of the last call.

        `law` says for each piece of the path whether it is GAMMA or WEIBULL; by default all are `path.gaps`.
        """
        from squall.workload.compiled.renewal import on_the_clock, renew

        load = path.rate * np.diff(path.edges)
        operational = np.concatenate([[0.0], np.cumsum(load)])
        loaded = load > 0
        # A path of one law is one process: nothing happens at the borders between its pieces.
        change = np.diff(np.where(loaded, path.alpha, np.nan), prepend=np.nan) != 0
        if law is not None:
            change |= np.diff(law, prepend=-1) != 0
        begins = np.flatnonzero(change & loaded)
        if begins.size == 0:
            return np.empty(0)
        usual = WEIBULL if path.gaps == "weibull" else GAMMA
        laws = np.full(begins.size, usual, np.int64) if law is None else law[begins].astype(np.int64)
        ends = np.append(operational[begins[1:]], operational[-1])
        times = renew(operational[begins], ends, path.alpha[begins], laws, self._state, self._rng)
        on_the_clock(times, operational, path.rate, path.edges)
        return times


def variation(law: int, shape: float) -> float:
    """CV of the gaps."""
    if law == GAMMA:
        return 1 / math.sqrt(shape)
    return math.sqrt(max(math.expm1(math.lgamma(1 + 2 / shape) - 2 * math.lgamma(1 + 1 / shape)), 0.0))


def parts(path: "Path", most: float) -> Iterator["Path"]:
    """`path` in pieces of at most `most` expected arrivals, on its own clock; what has no load goes with what follows.

    The same piece ends wherever the path ends, so that a longer path begins with the same arrivals.
    """
    from squall.workload.concurrency import Path

    operational = np.concatenate([[0.0], np.cumsum(path.rate * np.diff(path.edges))])
    marks = np.arange(1, math.ceil(operational[-1] / most)) * most
    at = np.searchsorted(operational, marks, side="left") - 1  # the window in which each mark lies
    times = np.minimum(path.edges[at] + (marks - operational[at]) / path.rate[at], path.edges[at + 1])
    begin, first = float(path.edges[0]), 0
    for time, window in zip(times.tolist(), at.tolist(), strict=True):
        edges = np.concatenate([[begin], path.edges[first + 1 : window + 1], [time]])
        yield Path(edges, path.rate[first : window + 1], path.alpha[first : window + 1], gaps=path.gaps)
        begin, first = time, window
    last = np.concatenate([[begin], path.edges[first + 1 :]])
    yield Path(last, path.rate[first:], path.alpha[first:], gaps=path.gaps)
