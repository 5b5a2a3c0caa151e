"""Looking up in tables with a guide, the normal law, and pairs of lengths."""

import math
from typing import NamedTuple

import numpy as np

from squall.jit import njit

_BELOW_ONE = 1 - 2.0**-53
_REACH = 8.5  # beyond so many standard deviations nothing is told apart
_CELLS = 1 << 13
_POINTS = np.linspace(-_REACH, _REACH, _CELLS + 1)
NORMAL = np.array(
    [[math.erfc(-x / math.sqrt(2)) / 2 for x in _POINTS], np.exp(-(_POINTS**2) / 2) / math.sqrt(2 * math.pi)]
)
"""The normal law's cumulative probabilities and density at even points."""
ROW = 128
"""Cells of the guide to a row of a grid copula."""


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
def _place(u: float, points: np.ndarray, guide: np.ndarray, scale: float) -> int:
    """How many points are at most u, which lies inside of them; steps both ways, so that rounding does no harm."""
    cell = min(int((u - points[0]) * scale), guide.size - 1)
    at = guide[cell]
    while at < points.size and points[at] <= u:
        at += 1
    while at > 0 and points[at - 1] > u:
        at -= 1
    return at


class Tables(NamedTuple):
    """Joint laws of lengths (lengths.Lengths), one behind another; `quantile` and `_in_grid` read them."""

    request: np.ndarray
    """Shape (2, n): levels from 0 to 1, and the values there."""
    request_guide: np.ndarray
    """Shape (laws, cells): the first place whose level is above that of the cell's begin."""
    response: np.ndarray
    response_guide: np.ndarray
    correlation: np.ndarray
    """Of the Gaussian copula; nan where the law has a grid."""
    grid: np.ndarray
    """Rows of grids, each with the columns' cumulative mass from 0 to 1."""
    grid_first: np.ndarray
    grid_columns: np.ndarray
    grid_guide: np.ndarray
    """Shape (rows, ROW): the first column that ends above the cell's begin."""


@njit(cache=True)
def pairs(law: np.ndarray, u: np.ndarray, w: np.ndarray, tables: Tables) -> tuple[np.ndarray, np.ndarray]:
    """Request and response tokens (int32) at the ranks `u` and, given the request, `w`, by the laws numbered `law`.

    With an empty `law` all are of the first one.
    """
    request, response = np.empty(u.size, np.int32), np.empty(u.size, np.int32)
    asked, asked_guide, answered, answered_guide, correlation = tables[:5]
    grid, grid_first, grid_columns, grid_guide = tables[5:]
    for i in range(u.size):
        k = law[i] if law.size else 0
        request[i] = int(np.rint(quantile(u[i], k, asked, asked_guide)))
        r = correlation[k]
        if math.isnan(r):
            v = _in_grid(u[i], w[i], grid_first[k], grid_first[k + 1], grid, grid_guide) / grid_columns[k]
        elif r == 0:
            v = w[i]
        else:
            v = normal(r * normal_quantile(u[i]) + math.sqrt(1 - r * r) * normal_quantile(w[i]))
        tokens = int(np.rint(quantile(v, k, answered, answered_guide)))
        response[i] = max(tokens, 1)  # an answered request has a response; 0 would read as failed
    return request, response


@njit(cache=True)
def drawn(size: int, u: np.ndarray, tables: Tables, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Request and response tokens (int32) of `size` requests of the first law; `u`: their ranks, or empty."""
    request, response = np.empty(size, np.int32), np.empty(size, np.int32)
    asked, asked_guide, answered, answered_guide, correlation = tables[:5]
    grid, grid_first, grid_columns, grid_guide = tables[5:]
    r = correlation[0]
    for i in range(size):
        if math.isnan(r):
            rank = u[i] if u.size else rng.random()
            v = _in_grid(rank, rng.random(), grid_first[0], grid_first[1], grid, grid_guide) / grid_columns[0]
        elif r == 0:
            rank = u[i] if u.size else rng.random()
            v = rng.random()
        else:
            score = normal_quantile(u[i]) if u.size else rng.standard_normal()
            rank = u[i] if u.size else normal(score)
            v = normal(r * score + math.sqrt(1 - r * r) * rng.standard_normal())
        request[i] = int(np.rint(quantile(rank, 0, asked, asked_guide)))
        response[i] = max(int(np.rint(quantile(v, 0, answered, answered_guide))), 1)
    return request, response


@njit(cache=True)
def quantile(u: float, k: int, table: np.ndarray, guide: np.ndarray) -> float:
    # One way out only: with several, numba counts references to the arrays at every call.
    u = min(max(u, 0.0), _BELOW_ONE)
    at = guide[k, int(u * guide.shape[1])]
    while table[0, at] <= u:
        at += 1
    low, high = table[0, at - 1], table[0, at]
    return table[1, at - 1] + (table[1, at] - table[1, at - 1]) * ((u - low) / (high - low))


@njit(cache=True)
def _in_grid(u: float, w: float, first: int, last: int, grid: np.ndarray, guide: np.ndarray) -> float:
    """Cell, and place in it, as in lengths.GridCopula.at."""
    row = first + min(int(u * (last - first)), last - first - 1)
    w = min(w, 1 - 1e-12)
    at = guide[row, int(w * ROW)]
    while grid[row, at + 1] <= w:
        at += 1
    low, high = grid[row, at], grid[row, at + 1]
    return at + (w - low) / (high - low)


@njit(cache=True)
def normal(x: float) -> float:
    """Probability that a normal variable is at most x: by the nearest point of NORMAL, right to 2e-10."""
    x = min(max(x, -_REACH), _REACH)
    cell = int((x + _REACH) * (_CELLS / (2 * _REACH)) + 0.5)
    point = cell * (2 * _REACH / _CELLS) - _REACH
    step = x - point
    return NORMAL[0, cell] + NORMAL[1, cell] * step * (1 - point * step / 2)


@njit(cache=True)
def normal_quantile(p: float) -> float:
    """The normal law's quantile at `p`, right to about 1e-16 (Wichura, algorithm AS 241, 1988), inside +-8.2."""
    q = p - 0.5
    if abs(q) <= 0.425:
        return q * _rational(0.180625 - q * q, CENTRE)
    r = math.sqrt(-math.log(max(min(p, 1 - p), 1e-16)))
    x = _rational(r - 1.6, MIDDLE) if r <= 5 else _rational(r - 5, TAIL)
    return -x if q < 0 else x


@njit(cache=True)
def _rational(x: float, terms: np.ndarray) -> float:
    above, below = terms[0, 7], terms[1, 7]
    for k in range(6, -1, -1):
        above = above * x + terms[0, k]
        below = below * x + terms[1, k]
    return above / below


CENTRE = np.array(
    [
        [3.3871328727963666080, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
         4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3],
        [1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3, 2.1213794301586595867e4,
         3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3],
    ]
)  # fmt: skip
MIDDLE = np.array(
    [
        [1.42343711074968357734, 4.63033784615654529590, 5.76949722146069140550, 3.64784832476320460504,
         1.27045825245236838258, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4],
        [1.0, 2.05319162663775882187, 1.67638483018380384940, 6.89767334985100004550e-1, 1.48103976427480074590e-1,
         1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9],
    ]
)  # fmt: skip
TAIL = np.array(
    [
        [6.65790464350110377720, 5.46378491116411436990, 1.78482653991729133580, 2.96560571828504891230e-1,
         2.65321895265761230930e-2, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7],
        [1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2,
         7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15],
    ]
)  # fmt: skip
