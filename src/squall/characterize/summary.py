"""One sample in a few numbers, by one rule for all: the p-quantile of n values is the sorted value at floor(p n).

That is a value which was really observed, and never one below the share p of the sample.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec import Struct

LONGEST_TABLE = 10_000_000
"""A table with an entry per integer is not made for integers beyond this."""
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


def summary(sample: np.ndarray) -> Summary:
    """The Summary of the finite values of `sample`, in any order."""
    return Summary(**describe(np.sort(sample[np.isfinite(sample)])))


def describe(ordered: np.ndarray) -> dict[str, Any]:
    """The fields of a Summary for a sample that is sorted already."""
    if ordered.size == 0:
        return {"n": 0}
    fields = {name: ordered[position(share, ordered.size)].item() for name, share in QUANTILES.items()}
    mean = float(ordered.mean())
    if mean > 0:
        fields["cv"] = float(ordered.std()) / mean
    return {"n": ordered.size, "mean": mean, "min": ordered[0].item(), "max": ordered[-1].item(), **fields}


def position(share: float, size: int) -> int:
    """Where the quantile of `share` stands in a sorted sample of `size` values."""
    # The nudge keeps 0.9 * 10 at 9 where the product falls short of it by rounding.
    return min(int(share * size + 1e-9), size - 1)


def known(value: float) -> float | None:
    """`value`, or None if it is not a finite number: what is not known is null in every result."""
    return float(value) if np.isfinite(value) else None


def correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson's correlation of two samples of equal length; None if there are fewer than 3 pairs or one is constant."""
    if x.size < 3:
        return None
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else None


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
