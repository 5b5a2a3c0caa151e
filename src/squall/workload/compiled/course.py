"""Loosening a course, and lengths along it (episodes.py)."""

import math

import numpy as np

from squall.jit import njit
from squall.workload.compiled.lookup import normal, normal_quantile, quantile
from squall.workload.compiled.order import arranged

_HALF = np.uint32(0x3F000000)  # the bits of 0.5 as a float of 32


@njit(cache=True)
def perturbed(
    gaps: np.ndarray, freedom: float, course: int, fewest: int, most: int, rng: np.random.Generator
) -> np.ndarray:
    """Gaps with the same sum whose halves, quarters, eighths, … share their time by a step away from how they do.

    See episodes.py: `course` parts have half the `freedom`; a kind of alike dense parts has `fewest` or more, and there
    are `most` kinds.
    """
    count = gaps.size
    total = np.empty(count + 1)
    total[0] = 0.0
    for i in range(count):
        total[i + 1] = total[i] + gaps[i]
    depth = 0
    while 2 << depth <= count:
        depth += 1
    size = 1 << depth
    # Of each part: its time, and what it gets instead.
    length, parts, now, new = np.empty(size), np.empty(size), np.empty(size), np.empty(size)
    length[0] = now[0] = total[count]
    share, laws, score = np.empty(size // 2), np.empty(size // 2), np.empty(size // 2)
    smaller, density = np.empty(size // 2, np.float32), np.empty(size // 2, np.float32)
    kind = np.zeros(size // 2, np.uint32)
    keys = np.empty(size // 2, np.uint32)
    for level in range(depth):
        nodes = 1 << level
        end = 0
        for i in range(nodes):
            begin, middle, end = end, (2 * i + 1) * count // (2 * nodes), (i + 1) * count // nodes
            parts[2 * i], parts[2 * i + 1] = total[middle] - total[begin], total[end] - total[middle]
            share[i] = parts[2 * i] / length[i] if length[i] > 0 else 0.5
            smaller[i] = min(share[i], max(1 - share[i], 0.0))
            density[i] = length[i] / (end - begin)
        # Nodes alike in density have a law of their own: a dense burst is even, a lull is not.
        kinds = min(max(nodes // fewest, 1), most)
        if kinds > 1:
            order = arranged(density[:nodes].view(np.uint32), 2)
            for i in range(nodes):
                kind[order[i]] = i * kinds // nodes
        # By kind, and in each by share: near 0 as near 1 as finely as 32 bits tell numbers apart.
        bits = smaller.view(np.uint32)
        for i in range(nodes):
            place = bits[i] if share[i] <= 0.5 else 2 * _HALF - bits[i]
            keys[i] = np.uint32(place >> 2) | np.uint32(kind[i] << 29)
        order = arranged(keys[:nodes], 3)
        _shuffle_ties(order, share, kind, rng)
        for i in range(nodes):
            laws[i] = share[order[i]]
        # The few parts of the first cuts are the course of the trace, and hardly a law to draw from.
        free = freedom * nodes / (nodes + course)
        keep, noise = math.sqrt(1 - free), math.sqrt(free)
        first = known = 0
        for k in range(kinds):
            held = -(-(k + 1) * nodes // kinds) - first
            if held != known:
                for i in range(held):
                    score[i] = keep * normal_quantile((i + 0.5) / held)
                known = held
            for i in range(held):
                place = normal(score[i] + noise * rng.standard_normal()) * held - 0.5
                place = min(max(place, 0.0), held - 1.0)
                low = int(place)
                high = min(low + 1, held - 1)
                share[order[first + i]] = laws[first + low] * (1 - (place - low)) + laws[first + high] * (place - low)
            first += held
        for i in range(nodes):
            new[2 * i], new[2 * i + 1] = now[i] * share[i], now[i] * (1 - share[i])
        now, new, length, parts = new, now, parts, length
    # The last cut leaves one gap or two; two share as they did.
    result = np.zeros(count)
    end = 0
    for i in range(size):
        begin, end = end, (i + 1) * count // size
        if length[i] > 0:
            for gap in range(begin, end):
                result[gap] = gaps[gap] * (now[i] / length[i])
        else:
            result[begin] = now[i]
    return result


@njit(cache=True)
def _shuffle_ties(order: np.ndarray, share: np.ndarray, kind: np.ndarray, rng: np.random.Generator) -> None:
    """Put runs of equal shares of one kind into random order."""
    begin = 0
    for i in range(1, order.size + 1):
        ends = i == order.size or share[order[i]] != share[order[begin]] or kind[order[i]] != kind[order[begin]]
        if ends:
            for last in range(i - 1, begin, -1):
                other = begin + int(rng.random() * (last - begin + 1))
                order[last], order[other] = order[other], order[last]
            begin = i


@njit(cache=True)
def classes_near(row: np.ndarray, code: np.ndarray, share: float, near: float, rng: np.random.Generator) -> np.ndarray:
    """`code` of the requests `row`; the `share` of them takes that of a neighbour about `near` requests away."""
    result = np.empty(row.size, code.dtype)
    for i in range(row.size):
        one = row[i]
        if rng.random() < share:
            one = abs(one + round(rng.laplace(0.0, near))) % code.size
        result[i] = code[one]
    return result


@njit(cache=True)
def exchanged(code: np.ndarray, order: np.ndarray, window: int) -> None:
    """Put the codes that are not negative in each `window` of such into the order of `order`, in place."""
    place, rank, held = np.empty(window, np.int64), np.empty(window), np.empty(window, code.dtype)
    size = 0
    for i in range(code.size + 1):
        if i == code.size or size == window:
            for k in range(1, size):  # both sorted by insertion: windows are small
                at, one, high = k, place[k], rank[k]
                while at > 0 and rank[at - 1] > high:
                    place[at], rank[at] = place[at - 1], rank[at - 1]
                    at -= 1
                place[at], rank[at] = one, high
                at, value = k, held[k]
                while at > 0 and held[at - 1] > value:
                    held[at] = held[at - 1]
                    at -= 1
                held[at] = value
            for k in range(size):
                code[place[k]] = held[k]
            size = 0
        if i < code.size and code[i] >= 0:
            place[size], rank[size], held[size] = i, order[i], code[i]
            size += 1


@njit(cache=True)
def inside_classes(
    code: np.ndarray, asked: np.ndarray, answered: np.ndarray, tables: tuple, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Request and response tokens (int32), even in rank inside the classes `code`; `asked` and `answered` divide them.

    `tables` are lookup.Tables. What failed (a negative code) is drawn from the first class.
    """
    request, response = np.empty(code.size, np.int32), np.empty(code.size, np.int32)
    columns = answered.size - 1
    first, first_guide, second, second_guide = tables[:4]
    for i in range(code.size):
        one = max(code[i], 0)
        row = one // columns
        column = one - row * columns
        u = asked[row] + rng.random() * (asked[row + 1] - asked[row])
        v = answered[column] + rng.random() * (answered[column + 1] - answered[column])
        request[i] = round(quantile(u, 0, first, first_guide))
        response[i] = max(round(quantile(v, 0, second, second_guide)), 1)
    return request, response
