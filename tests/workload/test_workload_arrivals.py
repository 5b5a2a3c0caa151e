"""Renewal arrivals along a path, against closed forms of renewal theory."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squall.workload.concurrency import DAY, HOUR, WEEK, Daily, Floods, Path, Renewal, fit_renewal, renewal
from squall.workload.lengths import Quantiles


def flat(rate: float, alpha: float, span: float, windows: int = 1) -> Path:
    return Path(np.linspace(0, span, windows + 1), np.full(windows, rate), np.full(windows, alpha))


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 4.0])
def test_gaps_have_the_cv_of_their_shape(alpha):
    gaps = np.diff(renewal(flat(5.0, alpha, 60_000, windows=50), np.random.default_rng(1)))
    # n = 300,000; the CV's standard error is below 1 % for these shapes.
    assert gaps.std() / gaps.mean() == pytest.approx(alpha**-0.5, rel=0.03)
    assert gaps.mean() == pytest.approx(1 / 5.0, rel=4 * alpha**-0.5 / np.sqrt(gaps.size))


def test_a_shape_of_one_is_a_poisson_process_whatever_the_rate_does():
    rng = np.random.default_rng(2)
    rates = rng.choice([0.0, 0.3, 2.0, 9.0], 2000)
    path = Path(np.arange(2001) * 10.0, rates, np.ones(2000))
    draws = np.array(
        [np.bincount((renewal(path, rng) // 10).astype(int), minlength=2000) for _ in range(100)], dtype=float
    )
    mean = rates * 10
    assert np.all(draws[:, rates == 0] == 0)
    # Standardised counts have variance 1: 150,000 of them from busy windows, so within 4 sqrt(2/150,000) = 1.5 %.
    z = (draws - mean)[:, mean > 0] / np.sqrt(mean[mean > 0])
    assert z.var() == pytest.approx(1.0, abs=0.03)
    # No artefact at the borders: neighbouring counts are uncorrelated.
    both = (mean[1:] > 0) & (mean[:-1] > 0)
    left = ((draws - mean) / np.sqrt(np.maximum(mean, 1e-9)))[:, :-1][:, both]
    right = ((draws - mean) / np.sqrt(np.maximum(mean, 1e-9)))[:, 1:][:, both]
    assert abs((left * right).mean()) < 4 / np.sqrt(left.size)


def test_dispersion_of_a_renewal_process_levels_off_at_the_squared_cv():
    arrivals = renewal(flat(2.0, 0.25, 2_000_000), np.random.default_rng(3))
    counts = np.bincount((arrivals // 1000).astype(int), minlength=2000)
    # Relative standard error of a variance of 2,000 counts: sqrt(2/2000) = 3 %.
    assert counts.var() / counts.mean() == pytest.approx(4.0, rel=0.13)


@pytest.mark.parametrize("length", [2.0, 60.0])
def test_windows_expect_rate_times_length_even_where_the_shape_changes(length):
    alpha, rate = np.array([0.05, 4.0, 1.0, 0.2] * 25), np.array([1.0, 0.5, 2.0, 1.0] * 25)
    path = Path(np.arange(101) * length, rate, alpha)
    rng = np.random.default_rng(4)
    draws = np.array([np.bincount((renewal(path, rng) // length).astype(int), minlength=100) for _ in range(600)])
    for kind in range(4):
        means = draws[:, kind::4].mean(1)
        # Whole draws are independent, windows inside one are not.
        assert means.mean() == pytest.approx(rate[kind] * length, abs=4 * means.std() / np.sqrt(600))
    totals = draws.sum(1)
    assert totals.mean() == pytest.approx(25 * 4.5 * length, abs=4 * totals.std() / np.sqrt(600))


def test_the_load_factor_scales_the_rate_and_keeps_the_cv():
    path = flat(1.0, 0.5, 50_000, windows=10)
    slow, fast = (np.diff(renewal(p, np.random.default_rng(5))) for p in (path, path.scaled(4.0)))
    assert fast.size == pytest.approx(4 * slow.size, rel=0.05)
    assert fast.std() / fast.mean() == pytest.approx(slow.std() / slow.mean(), rel=0.05)


@given(
    rates=st.lists(st.sampled_from([0.0, 1e-3, 0.5, 20.0]), min_size=1, max_size=30),
    alphas=st.lists(st.sampled_from([1e-3, 0.3, 1.0, 50.0, 1e6]), min_size=30, max_size=30),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_arrivals_are_sorted_inside_the_span_and_never_in_an_empty_window(rates, alphas, seed):
    rate = np.array(rates)
    path = Path(np.arange(rate.size + 1) * 7.0, rate, np.array(alphas[: rate.size]))
    arrivals = renewal(path, np.random.default_rng(seed))
    assert np.all(np.diff(arrivals) >= 0)
    if arrivals.size:
        assert arrivals[0] >= 0
        assert arrivals[-1] <= path.edges[-1]
        at = np.minimum((arrivals // 7.0).astype(int), rate.size - 1)
        on_border = np.isclose(arrivals % 7.0, 0, atol=1e-6) | np.isclose(arrivals % 7.0, 7, atol=1e-6)
        assert np.all((rate[at] > 0) | on_border)


@given(alpha=st.floats(0.2, 4.0), rate=st.floats(0.5, 20.0), seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_a_fit_to_drawn_arrivals_finds_rate_and_shape_again(alpha, rate, seed):
    span = 6000 / rate
    arrivals = renewal(flat(rate, alpha, span), np.random.default_rng(seed))
    model, quality = fit_renewal(arrivals, span, span / 6, tick=None, method="mle", seed=0)
    # Counts of about 6,000 vary by sqrt(6000)/sqrt(alpha); the shapes of six windows of 1,000 gaps by some 5 % each.
    assert model.mean_rate == pytest.approx(rate, rel=5 / np.sqrt(6000 * alpha))
    assert np.median(model.alpha) == pytest.approx(alpha, rel=0.15)
    assert quality.fitted == 6
    assert quality.ks < 0.06


def test_beyond_its_span_a_model_repeats_by_week_by_day_or_by_span():
    week = Renewal(HOUR, 9 * DAY, WEEK, [float(i) for i in range(216)], [1.0] * 216)
    assert week.path(8 * DAY, 8 * DAY + HOUR, 0).rate.tolist() == [192.0]  # its own, inside the span
    assert week.path(9 * DAY, 9 * DAY + HOUR, 0).rate.tolist() == [48.0]  # the third day of the next week
    over = week.path(9 * DAY - HOUR, 9 * DAY + HOUR, 0)
    assert over.rate.tolist() == [215.0, 48.0]
    assert over.edges.tolist() == [0.0, HOUR, 2 * HOUR]
    assert week.path(0, 9 * DAY, 0).expected == pytest.approx(week.mean_rate * 9 * DAY)
    short = Renewal(10.0, 25.0, 25.0, [1.0, 2.0, 3.0], [1.0] * 3)
    path = short.path(20.0, 50.0, 0)
    assert path.rate.tolist() == [3.0, 1.0, 2.0, 3.0]
    assert path.edges.tolist() == [0.0, 5.0, 15.0, 25.0, 30.0]
    arrivals = np.linspace(0, 0.995 * DAY, 500)  # the last request of a day comes before midnight
    fitted, _ = fit_renewal(arrivals, float(arrivals[-1]) + 100, HOUR, tick=None, method="moments", seed=0)
    assert fitted.period == pytest.approx(DAY, rel=0.01)


def test_a_daily_path_repeats_for_a_seed_and_any_start():
    hours = [1.0] * 8 + [10.0] * 16
    model = Daily("x", 4, hours, [0.5] * 24, [(0.3, 12.0)], 0.1, 1.0)
    whole, part = model.path(0, 4 * DAY, 5), model.path(DAY, DAY + 2 * HOUR, 5)
    assert part.rate.tolist() == whole.rate[288 : 288 + 24].tolist()
    assert model.path(0, DAY, 6).rate.tolist() != whole.rate[:288].tolist()
    means = np.mean([model.path(0, WEEK, seed).rate.reshape(7, 288).mean(1) for seed in range(200)], axis=0)
    # Day 0 is a Friday: days 1 and 2 are the weekend. A day's level has a standard deviation of about 0.25.
    assert means[[1, 2]] == pytest.approx([0.5, 0.5], rel=0.08)
    assert means[[0, 3, 4, 5, 6]] == pytest.approx([7.0] * 5, rel=0.08)
    assert model.mean_rate == pytest.approx((5 * 7.0 + 2 * 0.5) / 7)


def test_floods_keep_silence_load_and_plateau():
    load = Quantiles([0.0, 1.0], [100.0, 300.0])
    cv = Quantiles([0.0, 1.0], [1.0, 1.0])
    model = Floods("x", [0.6] * 24, load, [(1.0, 6.0)], 0.0, cv)
    path = model.path(0, 2000 * DAY, 1)
    hourly = path.rate.reshape(-1, 12).mean(1) * HOUR
    # 48,000 hours with a memory of 6 hours are about 4,000 independent ones.
    assert (hourly == 0).mean() == pytest.approx(0.6, abs=0.035)
    assert hourly[hourly > 0].mean() == pytest.approx(200, rel=0.04)
    assert model.mean_rate == pytest.approx(0.4 * 200 / HOUR)
    assert hourly.max() <= 300 + 1e-9
    # An edge hour is active only in part, at its neighbour's rate.
    opening = np.flatnonzero((hourly[1:-1] > 0) & (hourly[:-2] == 0) & (hourly[2:] > 1.2 * hourly[1:-1])) + 1
    assert opening.size > 50
    fine = path.rate.reshape(-1, 12)
    for hour in opening[:50]:
        on = fine[hour][fine[hour] > 0]
        assert 0 < on.size < 12
        assert fine[hour][-on.size :].min() > 0
        assert on[0] <= fine[hour + 1][0] * 1.0001
