"""The loops that are compiled (numba): renewal arrivals, looking up in a table with a guide, seating in sessions.

Kept apart because importing numba takes longer than drawing a short trace.
"""

import math

import numpy as np

from squall.jit import njit


@njit(cache=True)
def interpolate(x: np.ndarray, points: np.ndarray, values: np.ndarray, guide: np.ndarray) -> np.ndarray:
    """See inversion.interpolate."""
    result = np.empty(x.size)
    last = points.size - 1
    cells = guide.size
    scale = cells / (points[last] - points[0]) if points[last] > points[0] else 0.0
    for i in range(x.size):
        u = x[i]
        if u >= points[last]:
            result[i] = values[last]
        elif u < points[0]:
            result[i] = values[0]
        else:
            at = _place(u, points, guide, scale) - 1
            slope = (values[at + 1] - values[at]) / (points[at + 1] - points[at])
            result[i] = slope * (u - points[at]) + values[at]
    return result


@njit(cache=True)
def place(x: np.ndarray, points: np.ndarray, guide: np.ndarray) -> np.ndarray:
    """See inversion.place."""
    result = np.empty(x.size, np.int64)
    last = points.size - 1
    scale = guide.size / (points[last] - points[0]) if points[last] > points[0] else 0.0
    for i in range(x.size):
        u = x[i]
        if u >= points[last]:
            result[i] = last + 1
        elif u < points[0]:
            result[i] = 0
        else:
            result[i] = _place(u, points, guide, scale)
    return result


@njit(cache=True)
def _place(u: float, points: np.ndarray, guide: np.ndarray, scale: float) -> int:
    """How many points are at most u, which lies inside of them; steps both ways, so that rounding does no harm."""
    cell = min(int((u - points[0]) * scale), guide.size - 1)
    at = guide[cell]
    while at < points.size and points[at] <= u:
        at += 1
    while at > 0 and points[at - 1] > u:
        at -= 1
    return at


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
    at = number[1]
    number[1] += 1
    while at > 0:
        parent = (at - 1) // 2
        if due[parent] <= time:
            break
        due[at], whose[at] = due[parent], whose[parent]
        at = parent
    due[at], whose[at] = time, one


@njit(cache=True)
def _pop(due: np.ndarray, whose: np.ndarray, number: np.ndarray) -> int:
    """Take the earliest time off the heap; whose it is."""
    earliest = whose[0]
    number[1] -= 1
    size = number[1]
    time, one = due[size], whose[size]
    at = 0
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and due[child + 1] < due[child]:
            child += 1
        if due[child] >= time:
            break
        due[at], whose[at] = due[child], whose[child]
        at = child
    if size > 0:
        due[at], whose[at] = time, one
    return earliest


GAMMA, WEIBULL = 0, 1


@njit(cache=True)
def renew(
    begins: np.ndarray,
    ends: np.ndarray,
    shapes: np.ndarray,
    laws: np.ndarray,
    state: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Arrivals of process.RenewalProcess in operational time; `state` is (to the next arrival, gap, shape, law).

    Run k from begins[k] to ends[k] has gaps of the law laws[k] with shapes[k].
    """
    times = np.empty(int(1.02 * (ends[-1] - begins[0])) + 64)
    count = 0
    due = begins[0] + state[0]
    for k in range(begins.size):
        begin, end, shape, law = begins[k], ends[k], shapes[k], laws[k]
        unit = shape if law == GAMMA else math.exp(math.lgamma(1 + 1 / shape))
        power = 1 / shape
        if law != state[3] or shape != state[2]:
            due = begin + _enter(law, shape, unit, due - begin, state, rng)
        length = state[1]
        while due < end:
            if count == times.size:
                times = np.append(times, np.empty(count // 4 + 64))
            times[count] = due
            count += 1
            if law == WEIBULL:
                length = rng.standard_exponential() ** power / unit
            elif shape == 1.0:
                length = rng.standard_exponential()
            else:
                length = rng.standard_gamma(shape) / unit
            due += length
        state[1] = length
    state[0] = due - ends[-1]
    return times[:count]


@njit(cache=True)
def _enter(law: int, shape: float, unit: float, due: float, state: np.ndarray, rng: np.random.Generator) -> float:
    """Time to the next arrival under this law, where `due` was left under the one before; the state becomes new."""
    order = shape + 1 if law == GAMMA else 1 + 1 / shape
    if math.isnan(state[2]):
        score = rng.standard_gamma(order)
        place = rng.random()
    else:
        old = state[2]
        gap = state[1]
        if state[3] == GAMMA:
            before, score = old + 1, old * gap
        else:
            before, score = 1 + 1 / old, (math.exp(math.lgamma(1 + 1 / old)) * gap) ** old
        score = same_rank(before, score, order)
        place = due / gap if gap > 0 else 0.0
    length = score / unit if law == GAMMA else score ** (1 / shape) / unit
    state[1], state[2], state[3] = length, shape, law
    return place * length


@njit(cache=True)
def same_rank(before: float, x: float, order: float) -> float:
    """The value that has the rank among Gamma(order) variables which `x` has among Gamma(before) ones; both >= 1.

    Newton's method for the logarithm of the smaller tail, which is concave in log x, from the value by Wilson and
    Hilferty's cube root (1931).
    """
    low, high = _tails(before, x)
    if low < 1e-290 or high < 1e-14:
        low, high = (1e-290, 1.0) if low < 0.5 else (1.0, 1e-14)
    cube = (x / before) ** (1 / 3)
    normal = (cube - 1 + 1 / (9 * before)) * 3 * math.sqrt(before)
    start = 1 - 1 / (9 * order) + normal / (3 * math.sqrt(order))
    y = math.log(order) + 3 * math.log(max(start, 1e-3))
    for _ in range(60):
        value = math.exp(y)
        below, above = _tails(order, value)
        density = math.exp(order * y - value - math.lgamma(order))
        if low < high:
            step = (math.log(max(below, 1e-300)) - math.log(low)) * max(below, 1e-300) / max(density, 1e-300)
        else:
            step = (math.log(high) - math.log(max(above, 1e-300))) * max(above, 1e-300) / max(density, 1e-300)
        y -= min(max(step, -1.0), 1.0)
        if abs(step) < 1e-11:
            break
    return math.exp(y)


@njit(cache=True)
def _tails(a: float, x: float) -> tuple[float, float]:
    """Probabilities that a Gamma(a) variable is below and above x: a series below a + 1, else a continued fraction."""
    if x <= 0:
        return 0.0, 1.0
    scale = math.exp(a * math.log(x) - x - math.lgamma(a))
    if x < a + 1:
        term = total = 1 / a
        n = a
        while term > total * 1e-16:
            n += 1
            term *= x / n
            total += term
        below = min(scale * total, 1.0)
        return below, 1 - below
    # The fraction x + 1 - a - 1 (1 - a) / (x + 3 - a - 2 (2 - a) / (x + 5 - a - ...)), by modified Lentz.
    b = x + 1 - a
    c, d = 1e300, 1 / b
    fraction = d
    for i in range(1, 100_000):
        step = -i * (i - a)
        b += 2
        d = 1 / (step * d + b)
        c = b + step / c
        fraction *= d * c
        if abs(d * c - 1) < 1e-16:
            break
    above = min(scale * fraction, 1.0)
    return 1 - above, above
