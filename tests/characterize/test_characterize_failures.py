"""Failures: independent ones have dispersion 1, outages do not; the published numbers of the real 5-minute series."""

import numpy as np
import polars as pl
import pytest

from squall.characterize.concurrency import gamma_windows
from squall.characterize.failures import Failures, failure_statistics


def measure(arrivals: np.ndarray, failed: np.ndarray, tokens: np.ndarray | None = None) -> Failures:
    lengths = np.zeros(arrivals.size, int) if tokens is None else tokens
    return failure_statistics(arrivals, failed, lengths, float(arrivals[0]), float(arrivals[-1]))


def test_independent_failures_have_dispersion_one() -> None:
    rng = np.random.default_rng(3)
    arrivals = np.sort(rng.uniform(0, 300 * 2000, 40_000))
    found = measure(arrivals, rng.random(40_000) < 0.1)
    # 2,000 bins: the standard error of the dispersion is about sqrt(2 / 2000) = 3 %.
    assert found.dispersion == pytest.approx(1, abs=0.1)
    assert found.lag1_count == pytest.approx(0, abs=0.07)
    assert found.share == pytest.approx(0.1, abs=0.005)


def test_an_outage_clusters_failures() -> None:
    rng = np.random.default_rng(3)
    arrivals = np.sort(rng.uniform(0, 86400, 40_000))
    found = measure(arrivals, (arrivals > 40_000) & (arrivals < 40_300))
    assert found.dispersion is not None
    assert found.dispersion > 50
    assert found.bins_with_failures == 2
    assert sum(found.series.failed) == found.failed
    assert sum(found.series.requests) == 40_000


def test_failures_by_request_length() -> None:
    tokens = np.array([0, 0, 3, 2, 100, 120, 127, 128])
    failed = np.array([True, False, True, False, False, True, False, False])
    buckets = measure(np.arange(8.0), failed, tokens).by_request_length
    assert [(bucket.low, bucket.high, bucket.requests) for bucket in buckets] == [
        (2, 4, 2),
        (64, 128, 3),
        (128, 256, 1),
    ]
    assert [bucket.failed_share for bucket in buckets] == pytest.approx([0.5, 1 / 3, 0])
    assert measure(np.arange(3.0), np.array([True, False, False]), np.array([0, 5, 6])).by_request_length == ()


@pytest.mark.parametrize("failed", [False, True])
def test_all_or_nothing_has_no_clustering(failed: bool) -> None:
    found = measure(np.arange(0, 6000.0, 10), np.full(600, failed))
    assert (found.share, found.dispersion, found.lag1_count, found.load_correlation) == (failed, None, None, None)


@pytest.mark.parametrize(
    ("first", "last", "failed", "bins", "dispersion", "lag1", "load"),
    [(0, 258, 247, 98, 2.0, 0.39, 0.09), (2888, 2956, 255, 5, 305, None, None)],
)
def test_the_five_minute_series_of_burstgpt(
    traces,  # type: ignore[no-untyped-def]
    first: int,
    last: int,
    failed: int,
    bins: int,
    dispersion: float,
    lag1: float | None,
    load: float | None,
) -> None:
    table = pl.read_csv(traces / "burstgpt" / "burstgpt_1_5min_excerpt.csv")
    table = table.filter(pl.col("interval").is_between(first, last))
    arrivals, lost = [], []
    for start, count, zero in table.select("start_second", "request_count", "zero_response_count").iter_rows():
        arrivals.append(start + np.arange(count) * (300 / max(count, 1)))
        lost.append(np.arange(count) < zero)
    start = float(table["start_second"][0])
    rows = np.concatenate(arrivals), np.concatenate(lost)
    found = failure_statistics(*rows, np.zeros(rows[0].size, int), start, start + 300.0 * len(table) - 1)
    assert (found.failed, found.bins_with_failures) == (failed, bins)
    assert found.dispersion == pytest.approx(dispersion, rel=0.02)
    if lag1 is not None:
        assert found.lag1_count == pytest.approx(lag1, abs=0.01)
        assert found.load_correlation == pytest.approx(load, abs=0.005)


def test_failures_by_the_burstiness_of_the_window_and_their_runs() -> None:
    # Ten-minute windows in turn bursty (CV 2, 30 % fail) and regular (1 % fail).
    rng = np.random.default_rng(4)
    parts, lost = [], []
    for window in range(60):
        bursty = window % 2 == 0
        gaps = rng.gamma(0.25, 8, 300) if bursty else rng.gamma(4, 0.5, 300)
        times = np.cumsum(gaps) / gaps.sum() * 599 + 600 * window
        parts.append(times)
        lost.append(rng.random(300) < (0.3 if bursty else 0.01))
    arrivals, failed = np.concatenate(parts), np.concatenate(lost)
    fits = gamma_windows(arrivals, 600.0)
    found = failure_statistics(arrivals, failed, np.zeros(arrivals.size, int), 0.0, 36000.0, fits)
    shares = {bucket.low: bucket.failed_share for bucket in found.by_alpha}
    assert sum(bucket.windows for bucket in found.by_alpha) == 60
    assert sum(bucket.requests for bucket in found.by_alpha) == arrivals.size
    assert max(shares) == 2.0
    assert shares[2.0] < 0.03
    assert min(shares[low] for low in shares if low < 1) > 0.2
    assert found.alpha_correlation is not None
    assert found.alpha_correlation < -0.5
    edges = np.flatnonzero(np.diff(np.concatenate(([0], failed.astype(int), [0]))))
    assert found.runs.n == len(edges) // 2
    assert found.runs.max == np.diff(edges)[::2].max()


def test_independent_failures_have_runs_of_the_length_of_chance() -> None:
    failed = np.random.default_rng(5).random(100_000) < 0.2
    found = failure_statistics(np.arange(100_000.0), failed, np.zeros(100_000, int), 0.0, 99_999.0)
    assert found.runs.mean == pytest.approx(1.25, abs=0.02)
    assert found.by_alpha == ()
