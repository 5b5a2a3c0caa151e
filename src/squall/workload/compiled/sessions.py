"""Seating arrivals in sessions."""

import numpy as np

from squall.jit import njit


@njit(cache=True)
def seat(
    arrivals: np.ndarray,
    chance: np.ndarray,
    noise: np.ndarray,
    survival: np.ndarray,
    newcomers: float,
    pause: np.ndarray,
    memory: float,
    fresh: float,
    number: np.ndarray,
    due: np.ndarray,
    whose: np.ndarray,
    waiting: np.ndarray,
    free: np.ndarray,
    state: np.ndarray,
    last: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Session, turn and normal score of each of the sorted arrivals; the rest is conversations.Sessions' own.

    Each arrival goes to the session whose turn is due, or begins one. `chance[i]` are uniform numbers: the turns of the
    session that arrival i begins, and whether it begins one although others wait; `pause[i]` s follow after it.
    """
    count = arrivals.size
    session, turn, score = np.empty(count, np.int64), np.empty(count, np.int32), np.empty(count)
    begun, held, waits, places = number
    vacant = False  # whether the first of the times held on the heap was taken, which mostly a new one replaces
    for i in range(count):
        # A turn goes to the arrival nearest to its time, so that pauses are as often rounded down as up.
        reach = (arrivals[i] + arrivals[i + 1]) / 2 if i + 1 < count else arrivals[i]
        while _earliest(due, held, vacant) <= reach:
            if vacant:
                held -= 1
                _lower(due, whose, held, due[held], whose[held])
            waiting[waits] = whose[0]
            waits += 1
            vacant = True
        if waits > 0 and chance[i, 1] >= newcomers:
            waits -= 1  # the one that became due last: most pauses stay as drawn, few become long
            one = waiting[waits]
            last[one] = memory * last[one] + fresh * noise[i]
        else:
            places -= 1
            one = free[places]
            # More than k turns with probability survival[k - 1], which does not rise; few turns are the rule.
            turns = 1
            while turns <= survival.size and survival[turns - 1] > chance[i, 0]:
                turns += 1
            state[one, 0], state[one, 1], state[one, 2] = begun, 0, turns
            begun += 1
            last[one] = noise[i]
        state[one, 1] += 1
        session[i], turn[i], score[i] = state[one, 0], state[one, 1], last[one]
        if state[one, 1] < state[one, 2]:
            if vacant:
                _lower(due, whose, held, arrivals[i] + pause[i], one)
                vacant = False
            else:
                _raise(due, whose, held, arrivals[i] + pause[i], one)
                held += 1
        else:
            free[places] = one
            places += 1
    if vacant:
        held -= 1
        _lower(due, whose, held, due[held], whose[held])
    number[0], number[1], number[2], number[3] = begun, held, waits, places
    return session, turn, score


@njit(cache=True)
def _raise(due: np.ndarray, whose: np.ndarray, at: int, time: float, one: int) -> None:
    """Put a time in the place of the hole `at` of the heap, or above it."""
    while at > 0 and due[(at - 1) // 2] > time:
        parent = (at - 1) // 2
        due[at], whose[at] = due[parent], whose[parent]
        at = parent
    due[at], whose[at] = time, one


@njit(cache=True)
def _lower(due: np.ndarray, whose: np.ndarray, size: int, time: float, one: int) -> None:
    """Put a time in the place of the first of the `size` times of the heap, or below it."""
    at, child = 0, 1
    while child < size:
        child += int(child + 1 < size and due[child + 1] < due[child])
        if due[child] >= time:
            break
        due[at], whose[at] = due[child], whose[child]
        at, child = child, 2 * child + 1
    due[at], whose[at] = time, one


@njit(cache=True)
def _earliest(due: np.ndarray, size: int, vacant: bool) -> float:
    """The earliest time on the heap, without its first one if that is `vacant`."""
    if not vacant:
        return due[0] if size > 0 else np.inf
    if size < 3:
        return due[1] if size == 2 else np.inf
    return min(due[1], due[2])


@njit(cache=True)
def ranked(
    turn: np.ndarray, x: np.ndarray, mean: np.ndarray, sd: np.ndarray, low: float, step: float, table: np.ndarray
) -> np.ndarray:
    """See conversations.Growth.rank: `table` at low, low + step, … of mean + sd x."""
    result = np.empty(x.size)
    for i in range(x.size):
        k = min(turn[i], mean.size - 1)
        at = min(max((mean[k] + sd[k] * x[i] - low) / step, 0.0), table.size - 1.000001)
        cell = int(at)
        result[i] = table[cell] + (at - cell) * (table[cell + 1] - table[cell])
    return result
