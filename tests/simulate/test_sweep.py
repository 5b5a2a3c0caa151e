"""A sweep is the simulations it stands for, and its verdict is what they say."""

import numpy as np
import polars as pl
import pytest

import squall
from squall.errors import InputError
from squall.run import metrics
from squall.simulate import sweep as sweeping
from squall.simulate.step_time import StepTable, StepTime
from squall.simulate.sweep import _coefficients, _stability, _variant
from squall.trace.table import Trace, TraceMeta


@pytest.fixture(scope="module")
def trace():
    rng = np.random.default_rng(1)
    columns = {
        "arrival": np.cumsum(rng.exponential(0.1, 150)),
        "request_tokens": rng.integers(50, 900, 150),
        "response_tokens": rng.integers(10, 200, 150),
    }
    return Trace.of(columns, TraceMeta(source="made for a test", format="generated"))


def test_each_row_is_the_simulation_of_its_settings(trace, tmp_path):
    out = tmp_path / "sweep.parquet"
    result = squall.sweep(
        trace, sweep=["kv-blocks=600,2000", "max-num-seqs=4,64"], gpu="a100", slo="ttft=1s", out=out, by="e2e_mean"
    )
    assert result.settings == ["kv_blocks", "max_num_seqs"]
    assert result.table.select("kv_blocks", "max_num_seqs").rows() == [(600, 4), (600, 64), (2000, 4), (2000, 64)]
    for row in result.table.iter_rows(named=True):
        run = squall.simulate(trace, gpu="a100", kv_blocks=row["kv_blocks"], max_num_seqs=row["max_num_seqs"])
        alone = metrics(run, slo="ttft=1s")
        assert row["e2e_mean"] == alone.e2e.mean
        assert row["ttft_p99"] == alone.ttft.p99
        assert row["goodput_share"] == alone.goodput_share
    assert pl.read_parquet(out).equals(result.table)
    best = result.table.row(int(result.table["e2e_mean"].arg_min()), named=True)
    assert result.stability.best == {name: best[name] for name in result.settings}
    assert result.stability.worlds > 10
    assert result.stability.stays_best + len(result.stability.lost_to) == result.stability.worlds


def test_settings_of_the_trace_can_be_swept(trace):
    result = squall.sweep(trace, sweep={"rate": [2.0, 20.0]}, gpu="a100", stability=False)
    assert result.table["ttft_p99"][0] < result.table["ttft_p99"][1]
    assert (result.stability.worlds, result.stability.stays_best) == (1, 1)


def test_processes_change_nothing(trace):
    words = {"sweep": ["max-num-seqs=4,64"], "gpu": "a100", "stability": False}
    assert squall.sweep(trace, jobs=2, **words).table.equals(squall.sweep(trace, jobs=1, **words).table)


def test_an_interrupt_leaves_the_combinations_that_were_done(trace, tmp_path, monkeypatch):
    out, real = tmp_path / "sweep.csv", sweeping._one

    def interrupted(work):
        if work[0] == 2:
            raise KeyboardInterrupt
        return real(work)

    monkeypatch.setattr(sweeping, "_one", interrupted)
    with pytest.raises(KeyboardInterrupt):
        squall.sweep(trace, sweep=["kv-blocks=600,1000,2000"], gpu="a100", out=out)
    assert pl.read_csv(out)["kv_blocks"].to_list() == [600, 1000]


def test_a_coefficient_moves_by_a_fifth_and_a_share_never_beyond_the_peak():
    step = StepTime(e_bw=0.9, o1=0.0)
    assert "o1" not in _coefficients(step)
    assert _variant(step, "e_bw -20%").e_bw == pytest.approx(0.72)
    assert _variant(step, "e_bw +20%").e_bw == 1.0
    assert _variant(step, "o0 +20%").o0 == pytest.approx(1.2e-3)
    table = StepTime(table=StepTable(points=[(1, 0.01), (9, 0.02)], per_kv_token=1e-6))
    assert _variant(table, "points -20%").table.points == [(1, 0.008), (9, 0.016)]
    assert _variant(table, "per_kv_token +20%").table.per_kv_token == pytest.approx(1.2e-6)


def test_a_winner_that_loses_elsewhere_is_called_out():
    rows = {(0, "nominal"): 1.0, (1, "nominal"): 2.0, (0, "e_bw -20%"): 3.0, (1, "e_bw -20%"): 2.5}
    named = {key: {"ttft_p99": value} for key, value in rows.items()}
    verdict = _stability([{"x": 1}, {"x": 2}], named, ["nominal", "e_bw -20%"], "ttft_p99")
    assert (verdict.best, verdict.worlds, verdict.stays_best) == ({"x": 1}, 2, 1)
    assert verdict.lost_to == ["e_bw -20%: x=2"]
    assert verdict.least_rank_correlation == -1.0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"sweep": []}, "--sweep is missing"),
        ({"sweep": ["colour=red"]}, "no such setting"),
        ({"sweep": ["kv-blocks"]}, "write it as"),
        ({"sweep": ["kv-blocks=many"]}, "a number"),
        ({"sweep": ["gpu=a100"], "gpu": "h100"}, "also given"),
        ({"sweep": ["gpu=a100"], "by": "beauty"}, "--by beauty"),
        ({"sweep": ["gpu=a100"], "jobs": 0}, "--jobs 0"),
        ({"sweep": ["gpu=a100"], "out": "x.xlsx"}, "x.xlsx"),
        ({"sweep": ["gpu=abacus"]}, "built in are"),
        ({"sweep": ["gpu=a100,a100"]}, "stands there twice"),
        ({"sweep": ["gpu=a100"], "by": "goodput_share"}, "--by goodput_share needs --slo"),
        ({"sweep": ["prefix-caching=maybe"]}, "true or false"),
        ({"sweep": ["gpu=a100"], "out": "/proc/x.csv"}, "nothing can be written in /proc"),
    ],
)
def test_impossible_sweeps(trace, words, says):
    with pytest.raises(InputError, match=says):
        squall.sweep(trace, **words)
