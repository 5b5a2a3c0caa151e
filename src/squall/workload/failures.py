"""Which requests fail: outages in time, during which a share of the requests fails.

The system is in an outage or calm, a two-state Markov process in time (Gilbert's channel): outages last `outage`
seconds on average, calm `calm`; in an outage each request fails with probability `severity`. With p the overall share,
the probability that a request fails which comes s seconds after a failed one is

    c(s) = p + (severity - p) e^(-s/T),   1/T = 1/outage + 1/calm,   outage / (outage + calm) = p / severity,

so the three parameters follow from the share, from c near 0 and from how fast c falls. `severity` = p means that
failures are independent. BurstGPT's failures do cluster like this: 0.35 % of a flood of 73,124 requests, all of them
in 5 of 69 five-minute bins.
"""

import msgspec
import numpy as np

from squall.workload.lengths import Quantiles

FEWEST = 20
"""With fewer failures than this no clustering can be told from chance."""
_PAIRS = 64  # how many of the following requests each failure is compared with


class Failures(msgspec.Struct, frozen=True):
    """Share of failed requests, and how they cluster in time."""

    share: float
    severity: float
    """Probability of failure in an outage; equal to `share` if failures are independent."""
    outage: float
    """Mean seconds of an outage; 0 if failures are independent."""
    request: Quantiles | None = None
    """Request tokens that failed rows carry (BurstGPT part 1 records 0); None if no row failed."""

    def __post_init__(self) -> None:
        if not 0 <= self.share <= self.severity <= 1:
            raise ValueError("share and severity must satisfy 0 <= share <= severity <= 1")
        if self.outage < 0 or (self.share > 0 and self.request is None):
            raise ValueError("outage must not be negative, and a share above 0 needs the failed rows' request lengths")

    def draw(self, arrivals: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Which of the requests at `arrivals` (sorted seconds) fail, as booleans."""
        return Striking(self, rng).strike(arrivals)


class Striking:
    """Which requests of one class fail; each call of `strike` goes on where the one before ended."""

    def __init__(self, law: Failures, rng: np.random.Generator) -> None:
        self._law = law
        self._random = rng
        clustered = law.share > 0 and law.severity > law.share and law.outage > 0
        self._outages = Outages(law.outage, law.share / law.severity, rng.spawn(1)[0]) if clustered else None

    def strike(self, arrivals: np.ndarray) -> np.ndarray:
        """Which of the requests at `arrivals` (sorted seconds, after those of the last call) fail, as booleans."""
        strike = self._random.random(arrivals.size)
        if self._outages is None:
            return strike < self._law.share
        return self._outages.hold(arrivals) & (strike < self._law.severity)


class Outages:
    """Times at which outages begin and end; they last `outage` seconds on average and fill `part` of the time."""

    def __init__(self, outage: float, part: float, rng: np.random.Generator) -> None:
        self._means = outage, outage * (1 - part) / part
        self._rng = rng
        self._first = bool(rng.random() < part)
        self._turns = np.empty(0)
        """When the state changes; even ones begin the state that the first one began."""

    def hold(self, arrivals: np.ndarray) -> np.ndarray:
        """Which of the sorted `arrivals` (s), which come after those of the last call, fall into an outage."""
        if arrivals.size == 0:
            return np.empty(0, dtype=bool)
        if self._turns.size == 0:
            self._turns = arrivals[:1].copy()
        outage, calm = self._means
        while (missing := float(arrivals[-1] - self._turns[-1])) >= 0:
            cycles = int(missing / (outage + calm) * 1.1) + 16
            # Exponential stays have no memory: the first one is as long as any other.
            stays = self._rng.exponential(1.0, (cycles, 2)) * ((outage, calm) if self._first else (calm, outage))
            self._turns = np.append(self._turns, self._turns[-1] + np.cumsum(stays))
        # Sorted arrivals are cut at the turns, which are far fewer.
        cuts = np.searchsorted(arrivals, self._turns)
        states = (np.arange(self._turns.size) % 2 == 0) == self._first
        held: np.ndarray = np.repeat(states, np.diff(cuts, append=arrivals.size))
        now = int(np.searchsorted(self._turns, arrivals[-1], side="right")) - 1
        self._turns = self._turns[now // 2 * 2 :]
        return held


def fit_failures(arrivals: np.ndarray, failed: np.ndarray, request: np.ndarray) -> Failures:
    """The failures of one class: `arrivals` sorted seconds, `failed` booleans, `request` tokens of the failed rows."""
    share = float(failed.mean())
    if not failed.any():
        return Failures(0.0, 0.0, 0.0)
    lengths = Quantiles.of(request)
    lag, fails = _after_failures(arrivals, failed)
    if failed.sum() < FEWEST or failed.all() or lag.size < FEWEST:
        return Failures(share, share, 0.0, lengths)
    # Least squares of the excess over p on e^(-s/T): for each T on a grid the best amplitude has a closed form.
    excess = fails - share
    gaps = np.diff(arrivals)
    grid = np.geomspace(max(float(np.median(gaps[gaps > 0])), 1e-3), max(float(lag.max()), 1e-2), 60)
    decay = np.exp(-lag[None, :] / grid[:, None])
    amplitude = np.clip((decay @ excess) / (decay**2).sum(1), 0, 1 - share)
    loss = amplitude**2 * (decay**2).sum(1) - 2 * amplitude * (decay @ excess)
    best = int(np.argmin(loss))
    severity = share + float(amplitude[best])
    if -loss[best] < 9 * share * (1 - share):  # less than three standard deviations of independent failures
        return Failures(share, share, 0.0, lengths)
    return Failures(share, severity, float(grid[best]) / (1 - share / severity), lengths)


def _after_failures(arrivals: np.ndarray, failed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(seconds after a failure, did that request fail), for pairs of a failed request and one of those that follow."""
    at = np.flatnonzero(failed)
    at = at[:: max(1, at.size // 2000)]  # 2,000 failures say enough
    pairs = at[:, None] + np.unique(np.geomspace(1, _PAIRS, 16).astype(np.int64))[None, :]
    inside = pairs < arrivals.size
    later = np.where(inside, pairs, 0)
    lag = arrivals[later] - arrivals[at][:, None]
    return lag[inside], failed[later][inside].astype(float)
