"""Conversations: how requests group into sessions, how long people pause, and how prompts grow from turn to turn.

The arrivals of all requests are drawn first, so that rate and burstiness are those of the class. Each arrival is then
the next turn of the session that is due around it, or, if none is due, the first turn of a new session: as every
session brings its turns, new sessions start at request rate / mean turns on their own.

Prompt lengths follow a normal score z that starts low and rises with the turn: at turn k, z = m_k + s_k x, where x
remembers the previous turn (correlation phi). A request's rank among all of its class is then
u = sum_k w_k Phi((z - m_k)/s_k) with the turns' shares w_k, which is uniform whatever m and s are: conversations order
the lengths and leave their marginal law as it is.
"""

from functools import cached_property

import msgspec
import numpy as np

from squall.workload.inversion import interpolate
from squall.workload.lengths import Quantiles, ranks

_TURNS = (1, 2, 3, 4, 6, 10, 20)  # first turns of the groups that share m_k and s_k
_GROUP_ROWS = 30  # a group with fewer rows joins the one before


class Growth(msgspec.Struct, frozen=True, dict=True):
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

    def rank(self, turn: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Ranks (0 to 1) among all requests of the class of those with the given turns and scores `x`."""
        from squall.workload.compiled.sessions import ranked

        return ranked(turn, x, *self._law)

    @cached_property
    def _law(self) -> tuple[np.ndarray, np.ndarray, float, float, np.ndarray]:
        """Mean and sd by turn (from 0 on), and u as a function of z: at `low`, `step` further, and so on."""
        from scipy.special import ndtr

        group = np.searchsorted(self.turn, np.arange(self.turn[-1] + 1), side="right") - 1
        # u is smooth in z: linear between so many points it is right to 1e-8.
        points = np.linspace(min(self.mean) - 9 * max(self.sd), max(self.mean) + 9 * max(self.sd), 40_001)
        parts = zip(self.weight, self.mean, self.sd, strict=True)
        table = sum(w * ndtr((points - m) / s) for w, m, s in parts) / sum(self.weight)
        step = float(points[-1] - points[0]) / (points.size - 1)
        return np.array(self.mean)[group], np.array(self.sd)[group], float(points[0]), step, table


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


class Seating:
    """Gives arrivals to the sessions of one class; each call of `seat` goes on where the one before ended."""

    def __init__(self, law: Conversations, rng: np.random.Generator) -> None:
        self._law = law
        self._random, self._noise = rng, rng.spawn(1)[0]
        self._pause = np.empty(0)
        self._sessions = Sessions()

    def seat(self, arrivals: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Session (0, 1, … in order of their start), turn (1, 2, …) and length rank (0 to 1) of sorted `arrivals`."""
        # For each arrival: the turns of its session if it begins one, whether it must, and the pause that follows.
        chance = self._random.random((arrivals.size, 3))
        noise = self._noise.standard_normal(arrivals.size)
        if self._pause.size == 0:
            self._pause = self._intended(arrivals[:_PILOT], chance[:_PILOT])
        session, turn, x = self._sessions.take(self._law, arrivals, chance, noise, self._pause)
        return session, turn, self._law.growth.rank(turn, x)

    def _intended(self, arrivals: np.ndarray, chance: np.ndarray) -> np.ndarray:
        """Quantiles of the pauses to draw so that, after the wait for a free arrival, they come out as `gap`.

        A turn that is due waits for a free arrival, longer where requests are rare; pilots measure by how much.
        """
        levels, goal = np.array(self._law.gap.levels), np.array(self._law.gap.values)
        intended = goal.copy()
        for _ in range(_PILOTS):
            session, *_rest = Sessions().take(self._law, arrivals, chance, np.zeros(arrivals.size), intended)
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


class Sessions:
    """The sessions under way: which are due when, which wait for an arrival. Ended ones leave no trace."""

    def __init__(self) -> None:
        self._number = np.zeros(4, np.int64)  # sessions begun, due, waiting, free places
        self._due = np.empty(0)  # a heap of times, and whose they are
        self._whose = np.empty(0, np.int64)
        self._waiting = np.empty(0, np.int64)
        self._free = np.empty(0, np.int64)
        self._state = np.empty((0, 3), np.int64)  # of a place: session, turns taken, turns wanted
        self._last = np.empty(0)  # normal score of the turn before

    def take(
        self, law: Conversations, arrivals: np.ndarray, chance: np.ndarray, noise: np.ndarray, pause: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Session, turn and normal score of each arrival; `pause` are the quantiles of the pauses at gap.levels."""
        from squall.workload.compiled.sessions import seat

        self._room(arrivals.size)
        memory = law.growth.memory
        return seat(
            arrivals,
            chance,
            noise,
            np.array(law.survival[1:]),
            _NEWCOMERS / law.mean_turns,
            interpolate(chance[:, 2], np.array(law.gap.levels), pause),
            memory,
            float(np.sqrt(1 - memory**2)),
            self._number,
            self._due,
            self._whose,
            self._waiting,
            self._free,
            self._state,
            self._last,
        )

    def _room(self, more: int) -> None:
        """Places for `more` sessions beyond those under way."""
        held = self._last.size
        wanted = held - int(self._number[3]) + more
        if wanted <= held:
            return
        added = max(wanted - held, held // 2)
        self._due, self._whose = np.resize(self._due, held + added), np.resize(self._whose, held + added)
        self._waiting, self._last = np.resize(self._waiting, held + added), np.resize(self._last, held + added)
        self._state = np.concatenate([self._state, np.zeros((added, 3), np.int64)])
        free = int(self._number[3])
        self._free = np.concatenate([self._free[:free], np.arange(held, held + added), np.zeros(held - free, np.int64)])
        self._number[3] = free + added


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
