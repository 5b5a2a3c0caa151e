"""Drawing a cascade (cascade.py)."""

import math

import numpy as np

from squall.jit import njit


@njit(cache=True)
def tree(
    size: int,
    levels: np.ndarray,
    density: np.ndarray,
    odds: np.ndarray,
    spread: np.ndarray,
    tilt: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the time (`size`, sum 1) and normal scores (2, size) of neighbours, by laws for each depth of the tree.

    A part of depth d whose mean gap over that of all is above k of density[d] has |log odds| with the quantiles
    odds[d, k] at `levels`; its children differ in the scores by tilt[d] and have effects of the deviation spread[d].
    """
    depth = density.shape[0]
    share, new = np.empty(1 << depth), np.empty(1 << depth)
    effect, moved = np.zeros((2, 1 << depth)), np.zeros((2, 1 << depth))
    share[0] = 1.0
    for level in range(depth):
        nodes = 1 << level
        end = 0
        for i in range(nodes):
            begin, middle, end = end, (2 * i + 1) * size // (2 * nodes), (i + 1) * size // nodes
            thin = share[i] * size / max(end - begin, 1)
            kind = 0
            while kind < density.shape[1] and density[level, kind] < thin:
                kind += 1
            u = rng.random()
            at = 0
            while levels[at + 1] < u:
                at += 1
            part = (u - levels[at]) / (levels[at + 1] - levels[at])
            uneven = odds[level, kind, at] * (1 - part) + odds[level, kind, at + 1] * part
            side = 1.0 if rng.random() < 0.5 else -1.0
            left = 1 / (1 + math.exp(-side * uneven))
            if middle == begin:
                left = 0.0
            elif middle == end:
                left = 1.0
            new[2 * i], new[2 * i + 1] = share[i] * left, share[i] * (1 - left)
            for length in range(2):
                apart = tilt[level, length] / 2 * side * u
                moved[length, 2 * i] = effect[length, i] + apart + spread[level, length] * rng.standard_normal()
                moved[length, 2 * i + 1] = effect[length, i] - apart + spread[level, length] * rng.standard_normal()
        share, new, effect, moved = new, share, moved, effect
    # Where there are more leaves than requests, some hold none.
    found, scores = np.empty(size), np.empty((2, size))
    for i in range(1 << depth):
        place = i * size >> depth
        if (i + 1) * size >> depth > place:
            found[place], scores[0, place], scores[1, place] = share[i], effect[0, i], effect[1, i]
    return found, scores
