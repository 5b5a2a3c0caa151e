"""The spread between repeated runs: known numbers, and intervals that hold the truth as often as they say."""

import numpy as np
import pytest
from test_metrics import answer, run_of

from squall.run import metrics
from squall.run.spread import spread


def test_the_spread_of_known_runs():
    runs = [metrics(run_of([answer(k, float(k), k + after, k + 2.0, 5) for k in range(12)])) for after in (0.4, 0.6)]
    found = spread(runs)
    ttft = found["ttft_mean"]
    assert (ttft.n, ttft.mean, ttft.min, ttft.max) == pytest.approx((2, 0.5, 0.4, 0.6))
    assert ttft.std == pytest.approx(0.2 / 2**0.5)
    assert ttft.interval == pytest.approx((0.5 - 12.7062 * 0.1, 0.5 + 12.7062 * 0.1))  # t of 1 degree of freedom
    assert found["failed_share"].max == 0
    assert "ttft_p99" not in found  # 12 requests support none
    assert spread(runs[:1])["ttft_mean"].interval is None


def test_intervals_hold_the_mean_as_often_as_they_say():
    random = np.random.default_rng(2)
    held = 0
    for _ in range(400):
        firsts = random.normal(1.0, 0.1, 4)
        runs = [metrics(run_of([answer(0, 0.0, float(first), 9.0, 5)])) for first in firsts]
        low, high = spread(runs)["ttft_mean"].interval
        held += low <= 1.0 <= high
    assert 0.91 < held / 400 < 0.985  # 95 % and three times its own error
