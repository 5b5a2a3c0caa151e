"""Did the server keep up? In an open loop nothing slows the load down, so a server that cannot take it falls behind.

Its queue then grows as long as the run lasts, and every percentile of latency says as much about the length of the run
as about the server. A straight line through the number in flight does not tell that from chance, nor from a trace whose
rate rises; here both must hold, of the four quarters of the time in which requests arrive:

    the fewest in flight in the last quarter, once it has begun, are more than the most in the first;
    the median E2E of the requests of the last quarter is more than twice that of the first.

Under a load that the server can take, the number in flight comes down between bursts, and latency does not follow the
clock: `tests/run/test_backlog.py` holds false alarms below 1 % over many queues.
"""

import msgspec
import numpy as np

LEAST = 40
"""Requests below which nothing is said."""
SLOWER = 2.0


class Backlog(msgspec.Struct, frozen=True, kw_only=True):
    """Requests in flight (scheduled, and neither answered nor given up) while requests arrive."""

    first: float
    """Time average over the first quarter."""
    last: float
    """Over the last quarter."""
    peak: int
    grows: bool
    """The server fell behind: what is measured depends on how long the run lasted."""


def backlog(scheduled: np.ndarray, ended: np.ndarray) -> Backlog | None:
    """The backlog of requests with these times (seconds); None where there are too few.

    An end that is not finite is one that never came. Requests without a scheduled time are left out.
    """
    known = np.isfinite(scheduled)
    begins, ends = scheduled[known], np.where(np.isfinite(ended[known]), ended[known], np.inf)
    if len(begins) < LEAST or begins.max() <= begins.min():
        return None
    edges = np.linspace(begins.min(), begins.max(), 5)
    times = np.concatenate((begins, ends))
    steps = np.concatenate((np.ones(len(begins), int), -np.ones(len(ends), int)))
    order = np.lexsort((-steps, times))  # who comes at the moment at which another goes is counted with it
    times, flying = times[order], np.cumsum(steps[order])
    first, last = (_levels(times, flying, edges[i], edges[i + 1]) for i in (0, 3))
    early, late = (np.median((ends - begins)[(begins >= edges[i]) & (begins <= edges[i + 1])]) for i in (0, 3))
    return Backlog(
        first=first[1],
        last=last[1],
        peak=int(flying[: np.searchsorted(times, edges[4], side="right")].max()),
        grows=bool(last[0] > first[2] and late > SLOWER * early),
    )


def _levels(times: np.ndarray, flying: np.ndarray, start: float, end: float) -> tuple[int, float, int]:
    """Fewest, mean over time, and most in flight in [start, end]."""
    inside = (times > start) & (times < end)
    before = np.searchsorted(times, start, side="right") - 1
    levels = np.concatenate((flying[before : before + 1], flying[inside]))
    spans = np.diff(np.concatenate(([start], times[inside], [end])))
    return int(levels.min()), float(np.average(levels, weights=spans)), int(levels.max())
