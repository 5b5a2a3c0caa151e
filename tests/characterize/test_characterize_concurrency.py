"""Arrivals against slow obvious versions and closed forms."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from squall.characterize.concurrency import (
    bin_counts,
    despread,
    dispersion,
    gamma_fits,
    gamma_windows,
    gap_statistics,
    rate_series,
)
from squall.errors import InputError

ARRIVALS = st.lists(st.floats(0, 5000, allow_subnormal=False), min_size=2, max_size=200).map(
    lambda values: np.sort(np.array(values))
)
TICKED = st.lists(st.integers(0, 300), min_size=1, max_size=200).map(lambda values: 3.0 * np.sort(np.array(values)))


def renewal(shape: float, rate: float, n: int, seed: int = 0) -> np.ndarray:
    return np.cumsum(np.random.default_rng(seed).gamma(shape, 1 / rate, n))


@given(ARRIVALS, st.sampled_from([60.0, 333.0, 1200.0]))
def test_windows_agree_with_a_loop_over_them(arrivals: np.ndarray, window: float) -> None:
    result = gamma_windows(arrivals, window, minimum=3)
    for index, start in enumerate(result.start):
        inside = [(b - a) for a, b in pairwise(arrivals) if b // window == start // window]
        assert result.count[index] == sum(a // window == start // window for a in arrivals)
        assert result.gaps[index] == len(inside)
        if len(inside) >= 3 and np.var(inside) > 1e-9 * np.mean(inside) ** 2:
            assert result.alpha[index] == pytest.approx(np.mean(inside) ** 2 / np.var(inside), rel=1e-6)
            assert result.beta[index] == pytest.approx(np.mean(inside) / np.var(inside), rel=1e-6)
        elif len(inside) < 3:
            assert np.isnan(result.alpha[index])
    assert result.count.sum() == arrivals.size


def test_a_gap_belongs_to_the_window_of_its_later_request() -> None:
    result = gamma_windows(np.array([1.0, 2.0, 11.0, 12.0, 14.0]), 10.0, minimum=3)
    assert result.count.tolist() == [2, 3]
    assert result.gaps.tolist() == [1, 3]
    assert result.skipped == 1
    assert result.cv[1] == pytest.approx(np.std([9, 1, 2]) / 4)


@pytest.mark.parametrize("method", ["moments", "mle"])
@pytest.mark.parametrize("shape", [0.3, 1.0, 4.0])
def test_the_fit_recovers_the_gamma_that_the_gaps_were_drawn_from(method: str, shape: float) -> None:
    arrivals = renewal(shape, 2.0, 50_000)
    result = gamma_windows(arrivals, 1e9, method=method)  # type: ignore[arg-type]
    assert result.alpha[0] == pytest.approx(shape, rel=0.04)
    assert result.beta[0] == pytest.approx(2.0, rel=0.04)
    assert result.ks[0] < 1.358 / np.sqrt(50_000)


def test_maximum_likelihood_and_distance_agree_with_scipy() -> None:
    arrivals = renewal(0.5, 3.0, 4000)
    gaps = np.diff(arrivals)
    result = gamma_windows(arrivals, 1e9, method="mle")
    shape, _, scale = stats.gamma.fit(gaps, floc=0)
    assert result.alpha[0] == pytest.approx(shape, rel=1e-4)
    assert result.beta[0] == pytest.approx(1 / scale, rel=1e-4)
    distance = stats.kstest(gaps, "gamma", args=(result.alpha[0], 0, 1 / result.beta[0])).statistic
    assert result.ks[0] == pytest.approx(distance, abs=1e-7)


def test_windows_without_enough_or_with_equal_gaps_are_skipped_and_counted() -> None:
    regular, few = np.arange(0, 100.0), np.array([250.0, 251.5, 254.0])
    result = gamma_windows(np.concatenate([regular, few]), 100.0)
    assert np.isnan(result.alpha).all()
    assert result.count.tolist() == [100, 0, 3]
    assert result.skipped == 2
    small = gamma_fits(result)
    assert (small.windows, small.empty, small.fitted, small.skipped) == (3, 1, 0, 2)
    assert small.alpha.p50 is None
    assert small.series.start == []


def test_a_window_of_milliseconds_over_days_is_refused() -> None:
    with pytest.raises(InputError, match="windows"):
        gamma_windows(np.array([0.0, 1e6]), 0.001)


def test_long_series_of_windows_are_thinned_for_charts() -> None:
    small = gamma_fits(gamma_windows(renewal(1.0, 1.0, 60_000), 50.0))
    assert small.fitted > 1000
    assert len(small.series.alpha) == 500
    assert small.series.start == sorted(small.series.start)


@given(TICKED)
def test_spreading_keeps_order_and_tick_and_is_seeded(arrivals: np.ndarray) -> None:
    spread = despread(arrivals, 3.0, seed=1)
    assert (np.diff(spread) >= 0).all()
    assert ((spread >= arrivals) & (spread < arrivals + 3)).all()
    assert (spread == despread(arrivals, 3.0, seed=1)).all()


def test_spreading_undoes_the_clock_of_a_poisson_process() -> None:
    arrivals = renewal(1.0, 4.0, 20_000)
    ticked = np.floor(arrivals / 3) * 3
    assert gamma_windows(ticked, 1e9).cv[0] > 3
    result = gamma_windows(ticked, 1e9, tick=3.0)
    assert result.cv[0] == pytest.approx(1, abs=0.03)
    gaps = gap_statistics(ticked, despread(ticked, 3.0))
    assert gaps.cv is not None
    assert gaps.cv > 3
    assert gaps.spread_cv == pytest.approx(1, abs=0.03)


@given(ARRIVALS, st.sampled_from([1.0, 7.0, 60.0]))
def test_dispersion_agrees_with_a_dense_histogram(arrivals: np.ndarray, scale: float) -> None:
    start, end = arrivals[0], arrivals[-1]
    bins = int((end - start) // scale)
    found = dispersion(arrivals, (scale,))
    if bins < 5:
        assert found == []
        return
    counts = np.bincount(np.floor((arrivals - start) / scale).astype(int), minlength=bins)[:bins]
    assert found[0][1] == pytest.approx(counts.var() / counts.mean(), abs=1e-9)


def test_dispersion_of_poisson_arrivals_is_one_and_of_a_renewal_process_levels_off_at_cv_squared() -> None:
    for shape, limit in ((1.0, 1.0), (0.25, 4.0)):
        curve = dict(dispersion(renewal(shape, shape, 200_000), (1.0, 60.0, 300.0)))
        # 666 bins of 300 s: the standard error of a variance is about sqrt(2 / 666) = 5.5 %.
        assert curve[300.0] == pytest.approx(limit, rel=0.2)
        assert curve[1.0] <= curve[60.0] * 1.05


def test_dispersion_of_a_span_of_years_needs_no_memory() -> None:
    assert dispersion(np.array([0.0, 1.0, 3e9]), (1.0,))[0][1] == pytest.approx(1.0, abs=1e-6)


@given(ARRIVALS, st.sampled_from([0.5, 10.0, 1e6]))
def test_bins_lose_nothing(arrivals: np.ndarray, width: float) -> None:
    assert bin_counts(arrivals, width, arrivals[0], arrivals[-1]).sum() == arrivals.size
    series = rate_series(arrivals, arrivals[0], arrivals[-1])
    assert sum(series.counts) == arrivals.size
    assert len(series.counts) <= 500


@given(st.sampled_from([0.1, 0.3, 0.7, 1.1, 60.1]), st.integers(3, 400))
def test_an_arrival_on_the_border_of_a_window_is_in_a_window(window, windows):
    arrivals = np.linspace(0, windows * window, 50)
    result = gamma_windows(arrivals, window)
    assert result.count.sum() == 50
