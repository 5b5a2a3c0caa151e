"""Resampling: blocks, weights and statistics against slow and published ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import lfilter

from squall.run import resampling
from squall.run.resampling import block_length, cells_of, deviations, error, quantile, ratio, swings
from squall.seeds import stream


@pytest.mark.parametrize("phi", [0.0, 0.3, 0.5, 0.8])
def test_the_block_is_the_best_one_for_an_autoregression(phi: float) -> None:
    """For AR(1) the sums in the rule are known: g = 2 phi / (1 - phi)^2 and G = (1 + phi) / (1 - phi), in variances."""
    size = 8000
    found = []
    for seed in range(12):
        noise = np.random.default_rng(seed).standard_normal(size + 200)
        found.append(block_length(lfilter([1.0], [1, -phi], noise)[200:])[0])
    g, long_run = 2 * phi / (1 - phi) ** 2, (1 + phi) / (1 - phi)
    best = max(1.0, (2 * g**2 / (4 / 3 * long_run**2)) ** (1 / 3) * size ** (1 / 3))
    # The estimate itself scatters by some 15 % (Patton, Politis and White 2009, table 1): 4 errors of a mean of twelve.
    assert np.mean(found) == pytest.approx(best, rel=0.18, abs=2.5)


@settings(max_examples=20, deadline=None)
@given(st.integers(8, 40), st.integers(1, 8), st.integers(0, 1000))
def test_weights_are_those_of_circular_blocks(size: int, length: int, seed: int) -> None:
    weights, starts = (found[:5] for found in resampling._weights(size, length, stream(seed, "t")))
    for row, begun in zip(weights, starts, strict=True):
        expected = np.zeros(size)
        for start in begun:
            for step in range(length):
                expected[(start + step) % size] += 1
        np.testing.assert_array_equal(row, expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(200, 3000), st.sampled_from([0.5, 0.9, 0.99]), st.integers(0, 1000))
def test_a_resampled_quantile_is_that_of_the_resampled_values(n: int, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.round(rng.lognormal(0, 1, n), 2)
    cell = cells_of(n, 100)
    cells = int(cell[-1]) + 1
    statistic = quantile(values, cell, cells, share)
    weights = rng.multinomial(cells, np.full(cells, 1 / cells), size=4).astype(np.float32)
    for row, found in zip(weights, statistic.estimate(weights), strict=True):
        repeated = np.repeat(values, row[cell].astype(int))
        # Linear between thresholds: the value may lie a few ranks off, and tied values span several.
        reach = 0.02 + 3 / n
        assert (repeated < found - 1e-9).mean() - reach <= share <= (repeated <= found + 1e-9).mean() + reach


def test_the_error_of_a_mean_is_the_long_run_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variance of the mean of an AR(1) is (1 + phi) / (1 - phi) times that of independent values.

    The largest of three estimates is taken, that of eight parts among them: the root of max(1, chi2(7) / 7) is 1.10 in
    the mean, and scatters by 0.14.
    """
    monkeypatch.setattr(resampling, "DRAWS", 500)
    phi, n = 0.8, 20_000
    cell = cells_of(n)
    errors, widths = [], []
    for seed in range(16):
        noise = np.random.default_rng(seed).standard_normal(n + 500)
        series = lfilter([1.0], [1, -phi], noise)[500:]
        statistic = ratio(np.bincount(cell, series), np.bincount(cell).astype(float))
        found = deviations(statistic, 1)
        assert deviations(statistic, 1).values == pytest.approx(found.values)
        assert found.values.std() == pytest.approx(error(statistic.influence), rel=0.12)
        low, high = found.interval(0.05)
        assert low < 0 < high
        errors.append(found.values.std())
        widths.append(high - low)
    true = 1 / (1 - phi) / np.sqrt(n)
    assert np.mean(errors) / true == pytest.approx(1.1, abs=0.12)
    assert np.mean(widths) / (2 * 1.96 * true) == pytest.approx(1.15, abs=0.15)


def test_skewed_sums_widen_the_side_of_what_was_not_seen() -> None:
    """Of lognormal values the mean may be far higher than what 200 of them show, and hardly lower."""
    values = np.random.default_rng(5).lognormal(0, 1.5, 200)
    found = deviations(ratio(values, np.ones(200)), 1)
    low, high = found.interval(0.05)
    assert high > 1.3 * -low
    assert found.interval(0.05, most=5.0)[0] < low
    rare = np.zeros(1000)
    rare[[100, 500]] = 1.0
    few = deviations(ratio(rare, np.ones(1000)), 1).interval(0.05, studentised=False)
    assert -0.01 < few[0] < 0 < few[1] < 0.02
    one, other = (deviations(ratio(values, np.ones(200)), 1, k) for k in range(2))
    difference = one.less(other)
    assert difference.values.std() == pytest.approx(np.hypot(one.values.std(), other.values.std()), rel=0.1)
    assert 1 <= min(one.freedom, other.freedom) <= difference.freedom <= one.freedom + other.freedom


@pytest.mark.parametrize(
    ("values", "count"),
    [
        (np.tile(np.arange(8), 5), 5),  # a saw
        (np.sort(np.random.default_rng(1).random(100)), 1),
        (np.sort(np.random.default_rng(1).random(100))[::-1], 0),
        (np.tile([1.0, 1.0, 1.0, 1.0, 5.0], 6), 6),  # most are alike: whatever is slower is the upper quarter
        (np.ones(50), np.inf),
    ],
)
def test_swings_are_counted(values: np.ndarray, count: float) -> None:
    assert swings(values) == count


def test_cells_are_equal_and_few() -> None:
    assert cells_of(5).tolist() == [0, 1, 2, 3, 4]
    cell = cells_of(4_500_000)
    assert cell[-1] < resampling.CELLS
    assert set(np.bincount(cell)[:-1]) == {2250}
