"""Bursts counted by hand, found again where they were put, and absent from Poisson arrivals."""

import numpy as np
import pytest
from scipy import stats

from squall.characterize.bursts import burst_table, bursts


def test_bursts_by_hand() -> None:
    # Two requests a minute for 100 minutes; 20 more in minutes 10 and 11, and 30 more in minute 50.
    base = np.arange(100)[:, None] * 60.0 + np.array([5.0, 35.0])
    extra = np.concatenate([600 + np.linspace(1, 119, 40), 3000 + np.linspace(1, 59, 30)])
    arrivals = np.sort(np.concatenate([base.ravel(), extra]))
    minute = next(one for one in bursts(arrivals, 0.0, 6000.0) if one.scale == 60)
    assert minute.threshold == stats.poisson.ppf(0.999, 2.7) > 2 * 2.7
    assert (minute.bursts, minute.time_share) == (2, 0.03)
    assert minute.series.start == [600.0, 3000.0]
    assert minute.series.length == [120.0, 60.0]
    assert minute.series.requests == [44, 32]
    assert minute.request_share == pytest.approx(76 / 270)
    assert (minute.pause.n, minute.pause.p50) == (1, 3000 - 720)
    table = burst_table(arrivals, 60.0, 0.0, 6000.0)[0]
    assert table["peak"].to_list() == [22, 32]


def test_poisson_arrivals_have_hardly_any_burst() -> None:
    arrivals = np.cumsum(np.random.default_rng(0).exponential(0.5, 200_000))
    for one in bursts(arrivals, 0.0, arrivals[-1]):
        assert one.time_share < 0.002


def test_episodes_are_found_at_their_length() -> None:
    # ON for 2 h at ten times the OFF rate, three times in two days.
    rng = np.random.default_rng(1)
    floods = [3e4, 7e4, 1.5e5]
    parts = [rng.uniform(0, 172800, 17280)] + [rng.uniform(t, t + 7200, 7200) for t in floods]
    found = {one.scale: one for one in bursts(np.sort(np.concatenate(parts)), 0.0, 172800.0)}
    ten_minutes = found[600.0]
    assert ten_minutes.bursts == 3
    assert ten_minutes.length.p50 == pytest.approx(7200, abs=1200)
    assert ten_minutes.series.start == pytest.approx(floods, abs=1200)
    assert ten_minutes.pause.mean == pytest.approx(60_000 - 7200, abs=1200)


def test_few_requests_and_short_traces_have_no_scale() -> None:
    assert bursts(np.array([0.0, 1.0, 1e9]), 0.0, 1e9) == []
    assert bursts(np.array([0.0]), 0.0, 0.0) == []
    assert bursts(np.full(1000, 400.0), 0.0, 400.0) == []  # all in the last, broken bin: of no whole one
