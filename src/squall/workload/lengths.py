"""How long requests and responses are: two quantile tables, joined by a copula that keeps their rank correlation.

By Sklar's theorem a joint law splits into its marginals and a copula, the law of the two ranks. The marginals are
tables of quantiles, exact at both ends. The copula is a grid of cell masses in rank space (checkerboard copula) where
there are rows enough to fill one, because real length pairs need not be monotone: in the Azure 2023 conversation trace
Pearson is -0.11 and Spearman +0.07, which no Gaussian copula reproduces together with the conditional means. With few
rows, or with only a published correlation, it is the Gaussian copula, whose Spearman rho_s and correlation r are linked
by r = 2 sin(pi rho_s / 6) (Kruskal, 1958).
"""

from functools import cached_property
from typing import TYPE_CHECKING, Self

import msgspec
import numpy as np

from squall.workload.inversion import interpolate

if TYPE_CHECKING:
    from squall.workload.compiled.lookup import Tables

GRID_ROWS = 500
"""Fewer rows than this cannot fill a grid; the Gaussian copula is fitted instead."""
GRID_MAXIMUM = 32


class Quantiles(msgspec.Struct, frozen=True):
    """A marginal distribution: `values` at cumulative probabilities `levels` (0 … 1), linear between them."""

    levels: list[float]
    values: list[float]

    def __post_init__(self) -> None:
        if len(self.levels) != len(self.values) or len(self.levels) < 2:
            raise ValueError("levels and values must have the same length, at least 2")
        if self.levels[0] != 0 or self.levels[-1] != 1 or np.any(np.diff(self.levels) <= 0):
            raise ValueError("levels must rise from 0 to 1")
        if self.values[0] < 0 or np.any(np.diff(self.values) < 0):
            raise ValueError("values must not be negative and must not fall")

    @classmethod
    def of(cls, sample: np.ndarray) -> Self:
        """The table of a sample: 1,001 even levels, and ten a decade in both tails, to the least and largest value."""
        tail = 10.0 ** -np.arange(3.0, max(3.1, np.log10(max(sample.size, 2))), 0.1)
        levels = np.unique(np.concatenate([np.linspace(0, 1, 1001), tail, 1 - tail]))
        values = np.quantile(sample, levels, method="hazen")  # the i-th of n lies at (i - 1/2)/n, as ranks() puts it
        # Inside a run of equal values the inner points say nothing.
        kept = np.ones(levels.size, dtype=bool)
        kept[1:-1] = (values[1:-1] != values[:-2]) | (values[1:-1] != values[2:])
        return cls(levels[kept].tolist(), np.round(values[kept], 6).tolist())

    def at(self, u: np.ndarray) -> np.ndarray:
        """Values at the probabilities `u`."""
        return interpolate(u, np.array(self.levels), np.array(self.values))

    def cdf(self, x: np.ndarray) -> np.ndarray:
        """Probability of at most `x`, for `x` that are not themselves among the values (there it may jump)."""
        return np.interp(x, self.values, self.levels, left=0.0, right=1.0)

    @property
    def mean(self) -> float:
        return float(np.trapezoid(self.values, self.levels))


class GaussianCopula(msgspec.Struct, frozen=True, tag="gaussian", tag_field="kind"):
    """Dependence by one number: `correlation` of the normal scores."""

    correlation: float

    def __post_init__(self) -> None:
        if not -1 <= self.correlation <= 1:
            raise ValueError("correlation must lie between -1 and 1")

    def at(self, u: np.ndarray, w: np.ndarray) -> np.ndarray:
        """The second rank at the quantile `w` of its law given the first, `u`; all 0 to 1."""
        from scipy.special import ndtr, ndtri

        inner, noise = (ndtri(np.clip(x, 1e-12, 1 - 1e-12)) for x in (u, w))
        return ndtr(self.correlation * inner + np.sqrt(1 - self.correlation**2) * noise)

    def quantile(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """At which quantile of its law given `u` the second rank is `v`: the inverse of `at`."""
        from scipy.special import ndtr, ndtri

        first, second = (ndtri(np.clip(x, 1e-12, 1 - 1e-12)) for x in (u, v))
        return ndtr((second - self.correlation * first) / max(np.sqrt(1 - self.correlation**2), 1e-6))


class GridCopula(msgspec.Struct, frozen=True, tag="grid", tag_field="kind"):
    """Dependence by cells: `mass[i][j]` is the probability of the second rank's cell j, given the first's cell i."""

    mass: list[list[float]]

    def __post_init__(self) -> None:
        grid = np.array(self.mass, dtype=float)
        if grid.ndim != 2 or grid.size == 0 or (grid < 0).any() or not np.allclose(grid.sum(1), 1, atol=1e-3):
            raise ValueError("mass must be rows of probabilities, each with the sum 1")

    def at(self, u: np.ndarray, w: np.ndarray) -> np.ndarray:
        """The second rank at the quantile `w` of its law given the first, `u`: a cell of the row, then even inside."""
        row, ends, columns = self._rows(u)
        # All rows lie behind one another on a line, row i between i and i + 1, so that one search serves every request.
        line = (ends[:, 1:] + np.arange(len(ends))[:, None]).ravel()
        cell = np.searchsorted(line, row + np.minimum(w, 1 - 1e-12), side="right") % columns
        low, high = ends[row, cell], ends[row, cell + 1]
        return (cell + np.clip((w - low) / np.maximum(high - low, 1e-12), 0, 1)) / columns

    def quantile(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """At which quantile of its law given `u` the second rank is `v`: the inverse of `at`."""
        row, ends, columns = self._rows(u)
        cell = np.minimum((v * columns).astype(np.int64), columns - 1)
        return ends[row, cell] + (v * columns - cell) * (ends[row, cell + 1] - ends[row, cell])

    def _rows(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """The row of each `u`, every row's cumulative mass from 0 to 1, and the number of columns."""
        rows = len(self.mass)
        return np.minimum((u * rows).astype(np.int64), rows - 1), self.ends, self.ends.shape[1] - 1

    @property
    def ends(self) -> np.ndarray:
        """Every row's cumulative mass from 0 to 1."""
        grid = np.array(self.mass)
        ends = np.concatenate([np.zeros((len(grid), 1)), np.cumsum(grid, axis=1)], axis=1)
        return ends / ends[:, -1:]


class Lengths(msgspec.Struct, frozen=True, dict=True):
    """The joint law of the answered requests' lengths, in tokens."""

    request: Quantiles
    response: Quantiles
    copula: GaussianCopula | GridCopula

    def draw(self, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Request and response tokens (int32) of `size` requests."""
        from squall.workload.compiled.lookup import drawn

        return drawn(size, np.empty(0), self.tables, rng)

    def draw_at(self, u: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Request and response tokens (int32) for request ranks `u` (0 to 1)."""
        from squall.workload.compiled.lookup import drawn

        return drawn(u.size, np.ascontiguousarray(u, dtype=float), self.tables, rng)

    def at(self, u: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Request and response tokens (int32) at the request rank `u` and the response's rank `w` given the request."""
        return tokens_at(self.tables, np.empty(0, np.int64), u, w)

    @cached_property
    def tables(self) -> "Tables":
        """This law as compiled code wants it."""
        return tables_of([self])

    @cached_property
    def reversed(self) -> "Lengths":
        """The same law with the parts of request and response exchanged."""
        copula = self.copula
        if isinstance(copula, GridCopula):
            mass = np.array(copula.mass).T
            mass = mass / np.maximum(mass.sum(1, keepdims=True), 1e-12)
            mass[mass.sum(1) == 0] = 1 / mass.shape[1]
            copula = GridCopula(mass.tolist())
        return Lengths(self.response, self.request, copula)

    def scores(self, request: np.ndarray, response: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Normal scores (2, n) of requests and of responses given the requests; `at` of their ranks is the inverse."""
        from scipy.special import ndtri

        u, v = ranks(request, rng), ranks(response, rng)
        return ndtri(np.clip([u, self.copula.quantile(u, v)], 1e-6, 1 - 1e-6))


def tokens_at(tables: "Tables", law: np.ndarray, u: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Request and response tokens (int32) of laws with the numbers `law` (none: the first), as by `Lengths.at`."""
    from squall.workload.compiled.lookup import pairs

    return pairs(law, *(np.ascontiguousarray(ranks, dtype=float) for ranks in (u, w)), tables)


def tables_of(laws: list[Lengths]) -> "Tables":
    """Laws one behind another. Guides (Chen and Asau, 1974) say where in a table a search begins."""
    from squall.workload.compiled.lookup import ROW, Tables

    cells = 4096 if len(laws) == 1 else 512
    sides = []
    for side in ([law.request for law in laws], [law.response for law in laws]):
        first = np.cumsum([0, *(len(table.levels) for table in side)])
        guide = [np.searchsorted(table.levels, np.arange(cells) / cells, side="right") for table in side]
        both = np.array([[x for table in side for x in table.levels], [x for table in side for x in table.values]])
        sides += [both, (np.array(guide) + first[:-1, None]).astype(np.int32)]
    copulas = [law.copula for law in laws]
    grids = [copula.ends if isinstance(copula, GridCopula) else np.empty((0, 0)) for copula in copulas]
    columns = np.array([grid.shape[1] - 1 for grid in grids])
    ends = np.ones((sum(map(len, grids)), max(columns.max() + 1, 2)))
    first = np.cumsum([0, *map(len, grids)])
    for grid, begin, end in zip(grids, first[:-1], first[1:], strict=True):
        ends[begin:end, : grid.shape[1]] = grid
    guide = [np.searchsorted(row[1:], np.arange(ROW) / ROW, side="right") for row in ends]
    correlation = [copula.correlation if isinstance(copula, GaussianCopula) else np.nan for copula in copulas]
    return Tables(
        *sides,  # type: ignore[call-arg]
        np.array(correlation),
        ends,
        first,
        columns,
        np.array(guide, np.int32).reshape(-1, ROW),
    )


def fit_lengths(request: np.ndarray, response: np.ndarray, rng: np.random.Generator) -> Lengths:
    """The joint law of length pairs in tokens; ties are ranked at random, which leaves the joint law as it is."""
    u, v = ranks(request, rng), ranks(response, rng)
    if request.size < GRID_ROWS:
        r = float(2 * np.sin(np.pi * spearman(request, response) / 6))
        return Lengths(Quantiles.of(request), Quantiles.of(response), GaussianCopula(round(r, 6)))
    # About 20 rows a cell: finer grids store noise.
    size = min(GRID_MAXIMUM, int(np.sqrt(request.size / 20)))
    cells = np.bincount((u * size).astype(np.int64) * size + (v * size).astype(np.int64), minlength=size * size)
    grid = cells.reshape(size, size) / cells.reshape(size, size).sum(1, keepdims=True)
    return Lengths(Quantiles.of(request), Quantiles.of(response), GridCopula(np.round(grid, 6).tolist()))


def ranks(sample: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ranks of `sample` as numbers inside (0, 1); ties in random order."""
    tie = rng.random(sample.size)
    whole = np.issubdtype(sample.dtype, np.integer)
    order = np.argsort(sample + tie) if whole else np.lexsort((tie, sample))
    result = np.empty(sample.size)
    result[order] = (np.arange(sample.size) + 0.5) / sample.size
    return result


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation with mean ranks for ties; 0 if one of the two does not vary."""
    from scipy.stats import rankdata

    if a.size < 2 or a.min() == a.max() or b.min() == b.max():
        return 0.0
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def ks_distance(sample: np.ndarray, law: Quantiles) -> float:
    """Kolmogorov-Smirnov distance of a sample of whole tokens to `law` rounded to whole tokens."""
    values, counts = np.unique(sample, return_counts=True)
    below = np.cumsum(counts) / sample.size
    return float(np.abs(below - law.cdf(values + 0.5)).max())
