"""Client and server agree where they saw the same, and not where one of them lies."""

import numpy as np
import polars as pl
import pytest

from squall.run import Run, RunMeta, metrics, read_run, write_run
from squall.run.server import Histogram, ServerMetrics, agreements

EDGES = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0]


def server(ttft: np.ndarray) -> ServerMetrics:
    counts = np.histogram(ttft, [-1.0, *EDGES, np.inf])[0].tolist()
    return ServerMetrics(
        name="vLLM",
        url="http://127.0.0.1/metrics",
        interval=1.0,
        histograms={"ttft": Histogram(edges=EDGES, counts=counts, sum=float(ttft.sum()))},
    )


def table(ttft: np.ndarray) -> pl.DataFrame:
    sent = np.arange(len(ttft)) * 0.1
    return Run.of(
        {
            "request": np.arange(len(ttft)),
            "attempt": np.ones(len(ttft), int),
            "scheduled": sent,
            "sent": sent,
            "first_token": sent + ttft,
            "last_token": sent + ttft,
            "status": ["ok"] * len(ttft),
        },
        RunMeta(kind="replay"),
    ).table


@pytest.mark.parametrize("seed", range(5))
def test_the_same_latencies_agree(seed):
    draw = np.random.default_rng(seed)
    ttft = draw.lognormal(-2, 1, 400)
    (found,) = agreements(server(ttft), table(ttft + draw.uniform(0.0002, 0.004, 400)))
    assert found.agree
    assert found.server_n == found.client_n == 400
    assert found.client_mean == pytest.approx(found.server_mean, abs=0.004)
    assert [level.level for level in found.levels] == [50, 90, 99]
    assert found.largest_gap < 0.05


def test_a_client_that_is_late_disagrees():
    ttft = np.random.default_rng(1).lognormal(-2, 1, 400)
    (found,) = agreements(server(ttft), table(ttft + 0.3))
    assert not found.agree
    assert found.largest_gap > 0.3
    assert not found.levels[0].within


def test_different_requests_are_not_compared():
    ttft = np.random.default_rng(1).lognormal(-2, 1, 400)
    (found,) = agreements(server(ttft), table(ttft[:200]))
    assert found.agree is None


def test_too_few_for_a_level():
    (found,) = agreements(server(np.full(20, 0.03)), table(np.full(20, 0.03)))
    assert [level.level for level in found.levels] == [50, 90]
    assert (found.levels[0].low, found.levels[0].high) == (0.02, 0.04)


def test_nothing_to_compare():
    ttft = np.full(5, 0.1)
    assert agreements(None, table(ttft)) == []
    assert agreements(server(np.empty(0)), table(ttft)) == []
    assert agreements(server(ttft), table(np.empty(0))) == []


def test_it_is_kept_in_the_file(tmp_path):
    ttft = np.random.default_rng(2).lognormal(-2, 1, 100)
    run = Run(table(ttft), RunMeta(kind="replay", offered=100, server=server(ttft)))
    write_run(run, tmp_path / "run.parquet")
    assert read_run(tmp_path / "run.parquet").meta == run.meta
    assert metrics(tmp_path / "run.parquet").agreement == agreements(run.meta.server, run.table)
