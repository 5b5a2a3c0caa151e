"""Conversations: how requests group into sessions, how long people pause, and how prompts grow from turn to turn.

The arrivals of all requests are drawn first, so that rate and burstiness are those of the class. Each arrival is then
the next turn of the session that is due around it, or, if none is due, the first turn of a new session: as every
session brings its turns, new sessions start at request rate / mean turns on their own.

Prompt lengths follow a normal score z that starts low and rises with the turn: at turn k, z = m_k + s_k x, where x
remembers the previous turn (correlation phi). A request's rank among all of its class is then
u = sum_k w_k Phi((z - m_k)/s_k) with the turns' shares w_k, which is uniform whatever m and s are: conversations order
the lengths and leave their marginal law as it is.
"""

from heapq import heappop, heappush

import msgspec
import numpy as np

from squall.workload.lengths import Quantiles, ranks

_TURNS = (1, 2, 3, 4, 6, 10, 20)  # first turns of the groups that share m_k and s_k
_GROUP_ROWS = 30  # a group with fewer rows joins the one before


class Growth(msgspec.Struct, frozen=True):
    """Normal score of the request length by turn; one value for each group of turns, which `turn` begins."""

    turn: list[int]
    weight: list[float]
    """Share of the requests."""
    mean: list[float]
    sd: list[float]
    memory: float
    """Correlation phi of consecutive turns of a session, after mean and sd of their turns are taken out."""

    def __post_init__(self) -> None:
        if not len(self.turn) == len(self.weight) == len(self.mean) == len(self.sd) or self.turn[:1] != [1]:
            raise ValueError("turn, weight, mean and sd must have the same length, and turn must start with 1")
        if min(self.sd) <= 0 or not -1 <= self.memory <= 1 or np.any(np.diff(self.turn) <= 0):
            raise ValueError("turn must rise, sd must be above 0 and memory between -1 and 1")

    def draw(self, session: np.ndarray, turn: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Ranks (0 to 1) of the request lengths of requests with the given sessions (0, 1, …) and turns (1, 2, …)."""
        from scipy.special import ndtr

        x = rng.standard_normal(session.size)
        order = np.argsort(turn, kind="stable")
        last = np.zeros(int(session.max(initial=-1)) + 1)
        fresh = np.sqrt(1 - self.memory**2)
        for rows in np.split(order, np.flatnonzero(np.diff(turn[order])) + 1):
            if rows.size and turn[rows[0]] > 1:
                x[rows] = self.memory * last[session[rows]] + fresh * x[rows]
            last[session[rows]] = x[rows]
        group = np.searchsorted(self.turn, turn, side="right") - 1
        z = np.array(self.mean)[group] + np.array(self.sd)[group] * x
        parts = zip(self.weight, self.mean, self.sd, strict=True)
        return sum(w * ndtr((z - m) / s) for w, m, s in parts) / sum(self.weight)


class Conversations(msgspec.Struct, frozen=True):
    """Sessions of one class."""

    survival: list[float]
    """Probability that a session has at least 1, 2, 3, … turns."""
    gap: Quantiles
    """Seconds from one request of a session to its next."""
    growth: Growth

    def __post_init__(self) -> None:
        if self.survival[:1] != [1.0] or np.any(np.diff(self.survival) > 0) or self.survival[-1] < 0:
            raise ValueError("survival must start with 1 and not rise")

    @property
    def mean_turns(self) -> float:
        return float(sum(self.survival))

    def assign(self, arrivals: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Session (0, 1, … in order of their start) and turn (1, 2, …) of each of the sorted `arrivals`."""
        count = arrivals.size
        # Turns by inversion: a session has more than k turns with probability survival[k].
        wanted = np.searchsorted(-np.array(self.survival[1:]), -rng.random(count), side="left") + 1
        # Even if sessions wait (the night holds fewer turns than are due), some arrivals are newcomers.
        newcomer = rng.random(count) < _NEWCOMERS / self.mean_turns
        u = rng.random(count)
        pause = np.interp(u, self.gap.levels, self._intended(arrivals[:_PILOT], wanted, newcomer, u))
        return _seat(arrivals, wanted, newcomer, pause)

    def _intended(self, arrivals: np.ndarray, wanted: np.ndarray, newcomer: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Quantiles of the pauses to draw so that, after the wait for a free arrival, they come out as `gap`.

        A turn that is due waits for a free arrival, longer where requests are rare; pilots measure by how much.
        """
        levels, goal = np.array(self.gap.levels), np.array(self.gap.values)
        intended = goal.copy()
        for _ in range(_PILOTS):
            pause = np.interp(u[: arrivals.size], levels, intended)
            session, _turn = _seat(arrivals, wanted, newcomer, pause)
            order = np.argsort(session, kind="stable")
            found = np.diff(arrivals[order])[np.diff(session[order]) == 0]
            if found.size < _FEWEST_PAUSES:
                return goal
            # Beyond p90 a pilot is too short to see what it asks for.
            off = np.where(levels <= 0.9, goal / np.maximum(np.quantile(found, levels), 1e-9), 1.0)
            intended = np.maximum.accumulate(intended * np.clip(off, 0.5, 2.0))
        return intended


_NEWCOMERS = 0.1  # of the newcomers that there are on average, at least this part
_PILOT = 20_000  # arrivals
_PILOTS = 4
_FEWEST_PAUSES = 200


def _seat(
    arrivals: np.ndarray, wanted: np.ndarray, newcomer: np.ndarray, pause: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Session and turn of each arrival: `pause[i]` s follow after arrival i, and session s has `wanted[s]` turns."""
    count = arrivals.size
    # A turn goes to the arrival nearest to its time, so that pauses are as often rounded down as up.
    reach = np.append((arrivals[:-1] + arrivals[1:]) / 2, arrivals[-1:]).tolist()
    ready, left, new = (arrivals + pause[:count]).tolist(), wanted.tolist(), newcomer.tolist()
    session, turn = [0] * count, [1] * count
    taken: list[int] = []
    due: list[tuple[float, int]] = []
    waiting: list[int] = []
    for i in range(count):
        while due and due[0][0] <= reach[i]:
            waiting.append(heappop(due)[1])
        if waiting and not new[i]:
            one = waiting.pop()  # the one that became due last: most pauses stay as drawn, few become long
        else:
            one = len(taken)
            taken.append(0)
        taken[one] += 1
        session[i], turn[i] = one, taken[one]
        if taken[one] < left[one]:
            heappush(due, (ready[i], one))
    return np.array(session, dtype=np.int64), np.array(turn, dtype=np.int32)


def fit_conversations(
    arrivals: np.ndarray, session: np.ndarray, request: np.ndarray, answered: np.ndarray, rng: np.random.Generator
) -> Conversations | None:
    """The sessions of one class, from sorted `arrivals` (s), session numbers, request tokens and which rows succeeded.

    None if no session has a second turn. Sessions that were still active near the end (within the p90 of the pauses)
    count as cut, not as ended: the turns' survival is the Kaplan-Meier estimate.
    """
    order = np.lexsort((np.arange(session.size), session))
    same = np.diff(session[order]) == 0
    if not same.any():
        return None
    first = np.concatenate([[True], ~same])
    start = np.flatnonzero(first)
    turns = np.diff(np.append(start, session.size))
    turn = np.empty(session.size, dtype=np.int64)
    turn[order] = np.arange(session.size) - np.repeat(start, turns) + 1
    gaps = np.diff(arrivals[order])[same]
    last_seen = arrivals[order][np.append(start[1:], session.size) - 1]
    cut = arrivals[-1] - last_seen < np.quantile(gaps, 0.9)
    rank = np.full(session.size, np.nan)
    rank[answered] = ranks(request[answered], rng)
    growth = _fit_growth(turn, rank, order, same)
    return Conversations(_survival(turns, cut), Quantiles.of(gaps), growth)


def _survival(turns: np.ndarray, cut: np.ndarray) -> list[float]:
    """P(at least k turns), k = 1, 2, …, with sessions that were cut leaving the count instead of ending it."""
    longest = int(turns.max())
    ended = np.bincount(turns[~cut], minlength=longest + 1)[1:]
    reached = np.cumsum(np.bincount(turns, minlength=longest + 1)[:0:-1])[::-1]
    at_risk = reached - np.bincount(turns[cut], minlength=longest + 1)[1:]
    going_on = 1 - ended / np.maximum(at_risk, 1)
    survival = np.concatenate([[1.0], np.cumprod(going_on)[:-1]])
    return [float(f"{s:.6g}") for s in survival]


def _fit_growth(turn: np.ndarray, rank: np.ndarray, order: np.ndarray, same: np.ndarray) -> Growth:
    """Mean, sd and memory of the request lengths' normal scores; `rank` (0 to 1) is nan for failed rows."""
    from scipy.special import ndtri

    known, z = np.isfinite(rank), ndtri(rank)
    starts = [t for t in _TURNS if t == 1 or np.count_nonzero(known & (turn >= t)) >= _GROUP_ROWS]
    group = np.searchsorted(starts, turn, side="right") - 1
    size = np.bincount(group[known], minlength=len(starts))
    mean = np.bincount(group[known], z[known], len(starts)) / np.maximum(size, 1)
    variance = np.bincount(group[known], (z[known] - mean[group[known]]) ** 2, len(starts)) / np.maximum(size, 1)
    sd = np.sqrt(np.maximum(variance, 1e-4))
    x = ((z - mean[group]) / sd[group])[order]
    before, after = x[:-1][same], x[1:][same]
    both = np.isfinite(before) & np.isfinite(after)
    varied = both.sum() > 2 and before[both].std() > 0 and after[both].std() > 0
    memory = float(np.clip(np.corrcoef(before[both], after[both])[0, 1], -0.99, 0.99)) if varied else 0.0
    weight = size / max(1, size.sum())
    return Growth(starts, _rounded(weight), _rounded(mean), _rounded(sd), round(memory, 4))


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in values]
