"""How far could a statistic of a run have come out otherwise? Intervals that respect what hangs together in time.

Latencies of neighbouring requests wait in the same queue: a thousand of them are not a thousand witnesses. So runs are
resampled in blocks of neighbours (circular block bootstrap: Politis and Romano, 1992). The block length is chosen from
the data by the rule of Politis and White (2004) as corrected by Patton, Politis and White (2009), applied to the
statistic's influence series: for a mean x - mean, for a percentile 1[x > percentile] - (1 - p).

To take millions of requests in a second, neighbours are first added up in at most `CELLS` cells; a block is a number of
neighbouring cells. All statistics here are functions of sums over cells, which a resample weighs.

A block bootstrap of few blocks is too sure of itself, and a run in which no long queue came up knows nothing of long
queues. What is done about it, each as measured in docs/compare.md:

- The deviations are widened by the long-run variance that blocks cut off (the flat-top estimate of the same rule, or
  that between eighths of the run, whichever is more) and by the mean being estimated from the same cells
  (N / (N - block)).
- Student's t takes the place of the normal law, with the 1.5 N / block - 1 degrees of freedom of the Bartlett estimate
  that overlapping blocks amount to, or fewer if few blocks make the variance.
- Each end of the interval is the wider one of the percentile interval's and of the studentised block bootstrap's (Gotze
  and Kunsch, 1996), which knows that sums of rare long queues are skewed.
- How often a run swung between slow and fast (`swings`) tells whether it can speak for more than itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from squall.seeds import stream

CELLS = 2000
"""Neighbours are added up into at most so many cells."""
DRAWS = 2000
"""Resamples."""
FEWEST_BLOCKS = 10.0
"""With fewer blocks than this in a run no interval is given of a share or rate."""
PARTS = 8
"""Parts of a run between which the variance is looked at; their mean has PARTS - 1 degrees of freedom."""

Estimate = Callable[[np.ndarray], np.ndarray]
"""From weights of cells, (draws, cells) or (1, cells), to one value of the statistic per draw."""


@dataclass(frozen=True)
class Statistic:
    """A statistic of sums over cells."""

    estimate: Estimate
    influence: np.ndarray = field(repr=False)
    """(cells,): how much each cell moves the statistic; sums to about 0."""

    @property
    def value(self) -> float:
        """The statistic of the whole sample, as the cells see it."""
        return float(self.estimate(np.ones((1, self.influence.size), np.float32))[0])


@dataclass(frozen=True)
class Deviations:
    """What resampling says of a statistic's error."""

    values: np.ndarray = field(repr=False)
    """(draws,): resampled minus found, widened by the corrections except Student's."""
    sums: np.ndarray = field(repr=False)
    """(draws,): of the influence over each resample."""
    variances: np.ndarray = field(repr=False)
    """(draws,): of those sums, as each resample estimates it from its own blocks."""
    block: float
    """Cells."""
    blocks: float
    freedom: float

    def less(self, other: "Deviations") -> "Deviations":
        """The deviations of this statistic minus those of another one, resampled apart.

        The degrees of freedom are Welch and Satterthwaite's.
        """
        of = np.array([np.var(self.values), np.var(other.values)])
        total = of.sum()
        freedom = min(self.freedom, other.freedom)
        if total > 0 and np.isfinite(total):
            freedom = float(total**2 / (of**2 / [self.freedom, other.freedom]).sum())
        return Deviations(
            self.values - other.values,
            self.sums - other.sums,
            self.variances + other.variances,
            max(self.block, other.block),
            min(self.blocks, other.blocks),
            freedom,
        )

    def interval(self, alpha: float, most: float = float("inf"), *, studentised: bool = True) -> tuple[float, float]:
        """Lowest and highest deviation of the truth from what was found, at confidence 1 - alpha.

        `most` bounds the degrees of freedom. Without `studentised` it is the percentile interval alone: of a share near
        0 or 1, which a few rows decide, resamples without any of them have no spread to divide by.
        """
        from scipy.stats import norm, t

        ends = [alpha / 2, 1 - alpha / 2]
        wider = float(t.ppf(ends[1], min(self.freedom, most)) / norm.ppf(ends[1]))
        low, high = np.quantile(self.values, ends) * wider
        known = self.variances > 0
        if studentised and known.any():
            least, greatest = np.quantile(self.sums[known] / np.sqrt(self.variances[known]), ends) * self.values.std()
            low, high = min(low, -greatest), max(high, -least)
        return float(low), float(high)


def cells_of(size: int, most: int = CELLS) -> np.ndarray:
    """(size,): the cell of each of `size` neighbours; cells are equally long but for the last."""
    return np.arange(size) // max(1, -(-size // most))


def ratio(above: np.ndarray, below: np.ndarray) -> Statistic:
    """sum(above) / sum(below) of sums by cell: a mean (values over counts), a share, a rate (events over seconds)."""
    columns = np.stack([above, below], axis=1).astype(np.float32)
    total = float(below.sum(dtype=float))
    found = float(above.sum(dtype=float)) / total if total else float("nan")

    def estimate(weights: np.ndarray) -> np.ndarray:
        sums = (weights @ columns).astype(float)
        with np.errstate(divide="ignore", invalid="ignore"):
            return sums[:, 0] / sums[:, 1]

    return Statistic(estimate, (above - found * below) / (total or 1.0))


POINTS = 65
"""Thresholds at which the distribution around a percentile is kept."""


def quantile(
    values: np.ndarray, cell: np.ndarray, cells: int, share: float, ordered: np.ndarray | None = None
) -> Statistic:
    """The `share` quantile of `values` (each in its `cell`), from their counts below thresholds around it by cell.

    Between thresholds, which are values of the sample at ranks ever further from the quantile's, it is linear.
    `ordered` are the values sorted, if they are at hand.
    """
    ordered = np.sort(values) if ordered is None else ordered
    n = ordered.size
    reach = np.sqrt(share * (1 - share) / n)
    steps = np.linspace(0, 1, POINTS // 2 + 1)[1:] ** 2
    far = min(1.0, 60 * reach)  # enough for a sample whose neighbours are 100 times as alike as strangers
    ranks = share + far * np.concatenate([-steps[::-1], [0.0], steps])
    places = np.unique(np.rint(np.clip(ranks, 0.0, 1.0) * (n - 1)).astype(np.int64))
    thresholds = np.unique(ordered[np.union1d(places, [0, n - 1])])
    slot = np.searchsorted(thresholds, values)  # the first threshold that is not below the value
    flat = np.bincount(cell * thresholds.size + slot, minlength=cells * thresholds.size)
    below = np.cumsum(flat.reshape(cells, thresholds.size), axis=1).astype(np.float32)

    def estimate(weights: np.ndarray) -> np.ndarray:
        counts = (weights @ below).astype(float)
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = counts / counts[:, -1:]
        return _crossing(shares, thresholds, share)

    at = ordered[min(n - 1, int(share * n))]
    over = np.bincount(cell, values > at, cells)
    counts = np.bincount(cell, minlength=cells)
    low, high = np.searchsorted(ordered, at, "left"), np.searchsorted(ordered, at, "right")
    width = max(round(reach * n), 1)
    around = ordered[min(n - 1, high - 1 + width)] - ordered[max(0, low - width)]
    density = (high - low + 2 * width) / n / around if around > 0 else 1.0
    above = over.sum() / n
    return Statistic(estimate, (over - counts * above) / (n * density))


def _crossing(shares: np.ndarray, thresholds: np.ndarray, share: float) -> np.ndarray:
    """Where each row of `shares` (ascending along the thresholds) reaches `share`, linearly between thresholds."""
    right = np.clip((shares < share).sum(axis=1), 0, thresholds.size - 1)
    left = np.maximum(right - 1, 0)
    rows = np.arange(len(shares))
    start, end = shares[rows, left], shares[rows, right]
    with np.errstate(divide="ignore", invalid="ignore"):
        part = np.where(end > start, np.clip((share - start) / (end - start), 0.0, 1.0), 1.0)
    return thresholds[left] + part * (thresholds[right] - thresholds[left])


def block_length(series: np.ndarray) -> tuple[float, float]:
    """The circular block bootstrap's best block for `series`, and the series' long-run variance, flat-top estimate.

    Politis and White (2004), corrected 2009: the autocovariances count up to twice the lag after which five or more in
    a row are within 2 sqrt(log10 N / N) of 0; block = (2 g^2 / (4/3 G^2))^(1/3) N^(1/3), at most min(3 sqrt N, N / 3).
    """
    size = series.size
    centred = series - series.mean()
    variance = float(centred @ centred) / size
    if size < 8 or variance <= 0:
        return 1.0, variance
    beside = max(5, int(np.ceil(np.sqrt(np.log10(size)))))
    most = min(int(np.ceil(np.sqrt(size))) + beside, size - 1)
    spectrum = np.abs(np.fft.rfft(centred, 2 * size)) ** 2
    covariance = np.fft.irfft(spectrum)[: most + 1] / size
    small = np.abs(covariance[1:] / covariance[0]) < 2 * np.sqrt(np.log10(size) / size)
    quiet = np.convolve(small, np.ones(beside), "valid") == beside
    if quiet.any():
        last = int(quiet.argmax())
    else:
        significant = np.flatnonzero(~small)
        last = int(significant[-1]) + 1 if significant.size else 0
    lags = min(2 * max(last, 1), most)
    k = np.arange(1, lags + 1)
    weight = np.clip(2 * (1 - k / lags), 0.0, 1.0)
    g = 2 * float((weight * k * covariance[1 : lags + 1]).sum())
    long_run = variance + 2 * float((weight * covariance[1 : lags + 1]).sum())
    if long_run <= 0:
        return 1.0, variance
    best = (2 * g**2 / (4 / 3 * long_run**2)) ** (1 / 3) * size ** (1 / 3)
    limit = np.ceil(min(3 * np.sqrt(size), size / 3))
    return float(np.clip(best, 1.0, limit)), long_run


def swings(values: np.ndarray) -> float:
    """How often neighbouring `values` rose into their highest quarter after they had been in their lowest.

    What never was as far up as down has no swings; values that are all alike need none (infinity).
    """
    low, high = np.percentile(values, [25, 75])
    if values.min() == values.max():
        return float("inf")
    side = np.where(values >= high if high > low else values > high, 1, np.where(values <= low, -1, 0))
    side = side[side != 0]
    return float(np.count_nonzero(side[1:] > side[:-1]))


def deviations(statistic: Statistic, seed: int, *index: int, relative: bool = False) -> Deviations:
    """Resample `statistic`, or its logarithm if `relative`."""
    influence = statistic.influence / statistic.value if relative else statistic.influence
    length, widened = _spread(influence)
    weights, starts = _weights(influence.size, length, stream(seed, "resampling", *index))
    with np.errstate(divide="ignore", invalid="ignore"):
        shaped = np.log if relative else np.asarray
        values = shaped(statistic.estimate(weights)) - shaped(np.array([statistic.value]))
    sums = _block_sums(influence, length)
    drawn = sums[starts]
    blocks = influence.size / length
    variances = drawn.var(axis=1, ddof=1) * drawn.shape[1] if drawn.shape[1] > 1 else np.zeros(len(drawn))
    plain = float(np.sqrt(sums @ sums / length))
    return Deviations(
        values * (widened / plain if plain > 0 else 1.0),
        drawn.sum(axis=1),
        variances,
        length,
        blocks,
        _freedom(sums, blocks),
    )


def error(influence: np.ndarray) -> float:
    """The standard error of a statistic with this influence, corrected as the deviations are."""
    return _spread(influence)[1]


def _spread(influence: np.ndarray) -> tuple[int, float]:
    """The length of the blocks in cells, and the standard error of the influence's sum with all corrections."""
    size = influence.size
    block, long_run = block_length(influence)
    length = max(1, round(block))
    sums = _block_sums(influence, length)
    kept = float(sums @ sums) / size / length
    own_mean = size / (size - length) if size > length else 1.0
    part = size // PARTS
    parts = influence[: part * PARTS].reshape(PARTS, part).sum(axis=1) if part else np.zeros(PARTS)
    between = float(parts.var(ddof=1)) / max(part, 1)
    return length, float(np.sqrt(size * max(max(kept, long_run) * own_mean, between)))


def _block_sums(series: np.ndarray, length: int) -> np.ndarray:
    """Of every circular block of `length`, after the mean was taken off."""
    centred = series - series.mean()
    running = np.concatenate([[0.0], np.cumsum(np.concatenate([centred, centred[: length - 1]]))])
    return running[length:] - running[:-length]


def _freedom(sums: np.ndarray, blocks: float) -> float:
    """Of the estimate of the blocks' variance: 1.5 blocks times 2 / (kurtosis - 1), that factor being at most 1.

    A variance of m values has the relative variance (kurtosis - 1) / m, which a chi-square law has with 2 m /
    (kurtosis - 1) degrees of freedom (Satterthwaite, 1946): where a few episodes make the difference, there are few.
    """
    variance = float(sums @ sums) / sums.size
    if not variance > 0:
        return max(1.5 * blocks - 1, 1.0)
    kurtosis = float((sums**4).mean()) / variance**2
    return max(1.5 * blocks * min(1.0, 2 / max(kurtosis - 1, 1e-9)) - 1, 1.0)


def _weights(size: int, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(DRAWS, size) float32: how often each cell is in each resample of circular blocks of `length` cells.

    And where those blocks start: (DRAWS, blocks).
    """
    blocks = max(1, round(size / length))
    starts = rng.integers(size, size=(DRAWS, blocks), dtype=np.int64)
    places = starts + np.arange(DRAWS, dtype=np.int64)[:, None] * size
    begun = np.bincount(places.ravel(), minlength=DRAWS * size).reshape(DRAWS, size)
    if length == 1:
        return begun.astype(np.float32), starts
    running = np.cumsum(np.concatenate([begun[:, size - length + 1 :], begun], axis=1), axis=1, dtype=np.float32)
    running[:, length:] -= running[:, :-length].copy()
    return running[:, length - 1 :], starts
