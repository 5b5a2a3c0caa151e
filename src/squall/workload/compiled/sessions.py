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
    for i in range(count):
        # A turn goes to the arrival nearest to its time, so that pauses are as often rounded down as up.
        reach = (arrivals[i] + arrivals[i + 1]) / 2 if i + 1 < count else arrivals[i]
        while number[1] > 0 and due[0] <= reach:
            waiting[number[2]] = _pop(due, whose, number)
            number[2] += 1
        if number[2] > 0 and chance[i, 1] >= newcomers:
            number[2] -= 1  # the one that became due last: most pauses stay as drawn, few become long
            one = waiting[number[2]]
            last[one] = memory * last[one] + fresh * noise[i]
        else:
            number[3] -= 1
            one = free[number[3]]
            # More than k turns with probability survival[k - 1], which does not rise.
            low, high = 0, survival.size
            while low < high:
                middle = (low + high) // 2
                if survival[middle] > chance[i, 0]:
                    low = middle + 1
                else:
                    high = middle
            state[one, 0], state[one, 1], state[one, 2] = number[0], 0, low + 1
            number[0] += 1
            last[one] = noise[i]
        state[one, 1] += 1
        session[i], turn[i], score[i] = state[one, 0], state[one, 1], last[one]
        if state[one, 1] < state[one, 2]:
            _push(due, whose, number, arrivals[i] + pause[i], one)
        else:
            free[number[3]] = one
            number[3] += 1
    return session, turn, score


@njit(cache=True)
def _push(due: np.ndarray, whose: np.ndarray, number: np.ndarray, time: float, one: int) -> None:
    """Put a time on the heap `due[: number[1]]`."""
    number[1] += 1
    _raise(due, whose, number[1] - 1, time, one)


@njit(cache=True)
def _raise(due: np.ndarray, whose: np.ndarray, at: int, time: float, one: int) -> None:
    """Put a time in the place of the hole `at`, or above it."""
    while at > 0 and due[(at - 1) // 2] > time:
        parent = (at - 1) // 2
        due[at], whose[at] = due[parent], whose[parent]
        at = parent
    due[at], whose[at] = time, one


@njit(cache=True)
def _pop(due: np.ndarray, whose: np.ndarray, number: np.ndarray) -> int:
    """Take the earliest time off the heap; whose it is."""
    earliest = whose[0]
    number[1] -= 1
    size = number[1]
    # The hole goes down to a leaf along the earlier children, which needs no guess, and then what was last goes up.
    at = 0
    while 2 * at + 2 < size:
        child = 2 * at + 1
        child += int(due[child + 1] < due[child])
        due[at], whose[at] = due[child], whose[child]
        at = child
    if 2 * at + 1 < size:
        due[at], whose[at] = due[2 * at + 1], whose[2 * at + 1]
        at = 2 * at + 1
    if at < size:
        _raise(due, whose, at, due[size], whose[size])
    return earliest


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
