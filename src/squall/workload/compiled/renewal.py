"""Renewal arrivals, window by window."""

import math

import numpy as np

from squall.jit import njit

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
        order = (shape + 1 if shape < 1 else shape) - 1 / 3
        slope = 1 / math.sqrt(9 * order)
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
                # Marsaglia and Tsang (2000): the cube of a normal variable, mostly taken without logarithms;
                # below 1, Gamma(shape + 1) times a uniform number to the power of 1/shape.
                while True:
                    x = rng.standard_normal()
                    cube = 1 + slope * x
                    cube *= cube * cube
                    u = 1 - rng.random()
                    if u < 1 - 0.0331 * (x * x) ** 2:
                        break
                    if cube > 0 and math.log(u) < x * x / 2 + order * (1 - cube + math.log(cube)):
                        break
                length = order * cube / unit
                if shape < 1:
                    length *= math.exp(-power * rng.standard_exponential())
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
        if abs(step) < 1e-7:  # what is left is its square
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
        while term > total * 1e-13:
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
        if abs(d * c - 1) < 1e-13:
            break
    above = min(scale * fraction, 1.0)
    return 1 - above, above


@njit(cache=True)
def on_the_clock(times: np.ndarray, operational: np.ndarray, rate: np.ndarray, edges: np.ndarray) -> None:
    """Turn operational times (sorted) into seconds on the path's clock, in place.

    Windows without load have no length in operational time: the last of equal borders is the one that moves.
    """
    window = 0
    for i in range(times.size):
        while window + 1 < rate.size and operational[window + 1] <= times[i]:
            window += 1
        times[i] = (times[i] - operational[window]) / rate[window] + edges[window]
