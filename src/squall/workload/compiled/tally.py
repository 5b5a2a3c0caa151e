"""Counting what passes by (tally.py)."""

import numpy as np

from squall.jit import njit


@njit(cache=True)
def count_arrivals(
    arrival: np.ndarray,
    first: float,
    last: float,
    pivot: float,
    scale: float,
    ratio: np.ndarray,
    bins: np.ndarray,
    sums: np.ndarray,
) -> tuple[float, float]:
    """Sums of the gaps less `pivot`, and of their squares; counts in bins of every scale are added to `bins`, `sums`.

    The arrivals (sorted s) come after `last`, and `first` is the first of all. `bins[s]` is the open bin of scale s and
    what it holds so far, `sums[s]` are the sums of the closed bins' counts and of their squares. The finest bins are
    `scale` s wide, and those of scale s + 1 hold `ratio[s]` of scale s; each goes into the next when it is closed.
    """
    shifted = squares = 0.0
    for i in range(arrival.size):
        gap = arrival[i] - last - pivot
        last = arrival[i]
        shifted += gap
        squares += gap * gap
        at = int((last - first) / scale)
        if at != bins[0, 0]:
            close(at, ratio, bins, sums)
        bins[0, 1] += 1
    return shifted, squares


@njit(cache=True)
def close(at: int, ratio: np.ndarray, bins: np.ndarray, sums: np.ndarray) -> None:
    """Close the open bins that end before the finest bin `at` begins, each into that of the next scale, and open those
    that it is in."""
    held = 0
    for scale in range(bins.shape[0]):
        if scale > 0:
            whole = np.uint64(at) // np.uint64(ratio[scale - 1])  # without signs, which cost as much again
            at = np.int64(whole)  # type: ignore[assignment]
            bins[scale, 1] += held
        if at == bins[scale, 0]:
            break
        held = bins[scale, 1]
        sums[scale, 0] += held
        sums[scale, 1] += float(held) ** 2
        bins[scale, 0], bins[scale, 1] = at, 0


@njit(cache=True)
def count_tokens(tokens: np.ndarray, failed: np.ndarray, counts: np.ndarray) -> None:
    """Add the tokens (below the number of `counts`) of requests that did not fail to `counts`."""
    for i in range(tokens.size):
        if not failed[i]:
            counts[tokens[i]] += 1
