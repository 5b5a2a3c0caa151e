"""One sample in a few numbers, by one rule for all: the p-quantile of n values is the sorted value at floor(p n).

That is a value which was really observed, and never one below the share p of the sample.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from msgspec import Struct

LONGEST_TABLE = 10_000_000
"""A table with an entry per integer is not made for integers beyond this."""
PIECE = 1 << 17
"""Long arrays are worked through in pieces of this many elements: what is made on the way then stays in the cache."""
QUANTILES = {"p10": 0.10, "p25": 0.25, "p50": 0.50, "p75": 0.75, "p90": 0.90, "p99": 0.99}


class Summary(Struct, frozen=True, kw_only=True):
    """Count, mean, coefficient of variation (population) and quantiles of a sample; null where there is no value."""

    n: int = 0
    mean: float | None = None
    cv: float | None = None
    min: float | None = None
    p10: float | None = None
    p25: float | None = None
    p50: float | None = None
    p75: float | None = None
    p90: float | None = None
    p99: float | None = None
    max: float | None = None


class Octaves(Struct, frozen=True, kw_only=True):
    """Counts in [edges[i], edges[i + 1]): below 1, and from there on by factors of 2."""

    edges: list[float] = []
    counts: list[int] = []


def octaves(sample: np.ndarray) -> Octaves:
    """Of the finite values >= 0 of `sample`; empty bins at both ends are left out."""
    sample = sample[np.isfinite(sample) & (sample >= 0)]
    if sample.size == 0:
        return Octaves()
    counts = np.bincount(np.frexp(np.floor(sample))[1])  # 0 is in bin 0, [1, 2) in bin 1, [2, 4) in bin 2
    low = int(np.flatnonzero(counts)[0])
    return Octaves(edges=[0.0, *(2.0 ** np.arange(counts.size)).tolist()][low:], counts=counts[low:].tolist())


def summary(sample: np.ndarray) -> Summary:
    """The Summary of the finite values of `sample`, in any order."""
    return Summary(**describe(sample[np.isfinite(sample)]))


def describe(sample: np.ndarray) -> dict[str, Any]:
    """The fields of a Summary for the numbers in `sample`, in any order."""
    if sample.size == 0:
        return {"n": 0}
    ordered = np.sort(sample)  # vectorised; np.partition is not, and takes twice as long for so many places
    fields = {name: ordered[position(share, sample.size)].item() for name, share in QUANTILES.items()}
    mean = float(sum(part.sum() for (part,) in pieces(sample))) / sample.size
    if mean > 0:
        off = (part - mean for (part,) in pieces(sample))
        fields["cv"] = float(np.sqrt(sum(dot(part, part) for part in off) / sample.size)) / mean
    return {"n": sample.size, "mean": mean, "min": ordered[0].item(), "max": ordered[-1].item(), **fields}


@dataclass(frozen=True)
class Tally:
    """Distinct integers >= 0 in ascending order and how often each occurs: all that quantiles, ranks and fits need."""

    values: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, parts: Iterable[np.ndarray], longest: int) -> "Tally":
        """Of the integers from 0 to `longest` in all `parts`."""
        if longest >= LONGEST_TABLE:
            values, counts = np.unique(np.concatenate([*parts, np.zeros(0, np.int64)]), return_counts=True)
            return cls(values, counts)
        table = np.zeros(longest + 1, np.int64)
        for part in parts:
            found = np.bincount(part)
            table[: found.size] += found
        values = np.flatnonzero(table)
        return cls(values, table[values])

    @classmethod
    def of_array(cls, numbers: np.ndarray, where: np.ndarray | None = None) -> "Tally":
        """Of the integers in `numbers`, those of them `where` this is true."""
        longest = int(numbers.max()) if numbers.size else 0
        if longest > max(PIECE, 8 * numbers.size):  # few numbers in a table that long: sorting them is faster
            return cls(*np.unique(numbers if where is None else numbers[where], return_counts=True))
        parts = (part for (part,) in pieces(numbers, where=where, size=longest))
        return cls.of((part.astype(np.int64) for part in parts), longest)

    @property
    def size(self) -> int:
        """How many integers were counted."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        return float(self.values @ self.counts) / self.size

    def quantiles(self, shares: Iterable[float]) -> list[int]:
        places = [position(share, self.size) for share in shares]
        found: list[int] = self.values[np.searchsorted(np.cumsum(self.counts), places, side="right")].tolist()
        return found

    def describe(self) -> dict[str, Any]:
        """The fields of a Summary."""
        size = self.size
        if size == 0:
            return {"n": 0}
        fields: dict[str, Any] = dict(zip(QUANTILES, self.quantiles(QUANTILES.values()), strict=True))
        mean = self.mean
        if mean > 0:
            fields["cv"] = float(np.sqrt(dot(self.counts, (self.values - mean) ** 2) / size)) / mean
        return {"n": size, "mean": mean, "min": self.values[0].item(), "max": self.values[-1].item(), **fields}

    def ranks(self) -> np.ndarray:
        """The rank of each distinct value among all, equal ones sharing their mean rank."""
        return np.cumsum(self.counts) - (self.counts - 1) / 2


def pieces(*arrays: np.ndarray, where: np.ndarray | None = None, size: int = 0) -> Iterator[tuple[np.ndarray, ...]]:
    """Arrays of one length in pieces of PIECE (or `size`, if that is more) rows, those of them `where` this is true."""
    step = max(PIECE, size)
    for begin in range(0, arrays[0].size, step):
        part = slice(begin, begin + step)
        kept = None if where is None else where[part]
        yield tuple(array[part] if kept is None else array[part][kept] for array in arrays)


def sums_of_runs(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The sums (float) of runs of `sizes` values each, one after another."""
    result, some = np.zeros(sizes.size), sizes > 0
    if some.any():
        result[some] = np.add.reduceat(values, (np.cumsum(sizes) - sizes)[some], dtype=float)
    return result


def position(share: float, size: int) -> int:
    """Where the quantile of `share` stands in a sorted sample of `size` values."""
    # The nudge keeps 0.9 * 10 at 9 where the product falls short of it by rounding.
    return min(int(share * size + 1e-9), size - 1)


def known(value: float) -> float | None:
    """`value`, or None if it is not a finite number: what is not known is null in every result."""
    return float(value) if np.isfinite(value) else None


def dot(x: np.ndarray, y: np.ndarray) -> float:
    """The sum of products. Unlike `x @ y` it takes no threads of its own, which would fight those of the classes."""
    return float(np.einsum("i,i->", x, y))


def correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson's correlation of two samples of equal length; None if there are fewer than 3 pairs or one is constant."""
    if x.size < 3:
        return None
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt(dot(x, x) * dot(y, y)))
    return dot(x, y) / scale if scale > 0 else None


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks of any numbers, equal ones sharing their mean rank."""
    if values.size and (values.dtype.kind != "i" or values.max() > LONGEST_TABLE):
        values = np.unique(values, return_inverse=True)[1]
    counts = np.bincount(values)
    return (np.cumsum(counts) - (counts - 1) / 2)[values]


def bin_width(span: float, bins: int = 500) -> float:
    """The shortest round width, s, that cuts `span` seconds into at most `bins` bins (one bin for an empty span)."""
    for width in _ROUND_WIDTHS:
        if span / width < bins:
            return width
    return 86400.0 * float(span // (bins * 86400.0) + 1)


_ROUND_WIDTHS: Sequence[float] = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 15.0, 30.0),
    *(60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0, 7200.0, 10800.0, 21600.0, 43200.0, 86400.0),
)
