"""Baselines at the same rate, and what the scale methods tell about themselves."""

import numpy as np
import polars as pl
import pytest

from squall.characterize.concurrency import dispersion
from squall.errors import InputError
from squall.trace import Trace, TraceMeta, open_trace, write_trace
from squall.trace.scaling import shape_of, table_of
from squall.workload import rearranged


@pytest.fixture(scope="module")
def bursty():
    """Gamma gaps of CV 2 at 2 requests/s, in sessions of two."""
    rng = np.random.default_rng(0)
    size = 20_000
    frame = pl.DataFrame(
        {
            "arrival": np.cumsum(rng.gamma(0.25, 2.0, size)),
            "request_tokens": rng.integers(1, 999, size),
            "response_tokens": rng.integers(1, 99, size),
            "session": np.arange(size) // 2,
        }
    )
    return Trace.of(frame, TraceMeta(source="t", format="squall"))


@pytest.mark.parametrize(
    ("arrivals", "cv"), [("uniform", 0.0), ("poisson", 1.0), ("gamma:3", 3.0), ("weibull:2", 2.0), ("weibull:0.5", 0.5)]
)
def test_baselines_keep_the_rate_and_the_rows(bursty, arrivals, cv):
    other = open_trace(bursty, arrivals=arrivals, seed=3)
    gaps = np.diff(other.table["arrival"].to_numpy())
    assert gaps.std() / gaps.mean() == pytest.approx(cv, abs=0.15 * cv + 1e-6)
    assert (len(other), other.span) == (len(bursty), pytest.approx(bursty.span))
    assert other.table.drop("arrival").equals(bursty.table.drop("arrival"))
    assert arrivals.partition(":")[0] in other.meta.steps[-1]


def test_functions_are_few_and_some_are_timers(bursty):
    other = rearranged(bursty, "maf", seed=1)
    times = other.table["arrival"].to_numpy()
    assert other.rate == pytest.approx(bursty.rate)
    assert (np.diff(times) >= 0).all()
    # Few functions make most of the load, and their minutes differ: overdispersed at a minute, much less at a second.
    index = dict(dispersion(times))
    assert index[60.0] > 3
    assert index[1.0] < index[60.0]


@pytest.mark.parametrize(
    "arrivals", ["cox", "gamma", "gamma:much", "poisson:2", "bootstrap", "weibull:1e9", "gamma:-1"]
)
def test_arrivals_that_cannot_be_are_named(bursty, arrivals):
    with pytest.raises(InputError):
        open_trace(bursty, arrivals=arrivals)


@pytest.mark.parametrize("method", ["compress", "thin", "superpose", "model"])
def test_a_scaling_tells_what_it_distorts(bursty, method, capsys, tmp_path):
    from squall.progress import notes

    write_trace(bursty, tmp_path / "t.parquet")
    notes.shown = True
    try:
        scaled = open_trace(tmp_path / "t.parquet", rate=1.0, scale_method=method, seed=2)
    finally:
        notes.shown = False
    scaling = scaled.meta.scaling
    assert scaling.method == method
    assert scaling.before == shape_of(open_trace(bursty))
    assert scaling.after.rate == pytest.approx(1.0, rel=0.05)
    lines = table_of(scaling)
    assert capsys.readouterr().err.splitlines() == lines
    assert {"gap cv", "dispersion, 60 s", "peak 60s", "turns"} <= {line[:24].strip() for line in lines}
    if method == "compress":
        assert scaling.after.gap_cv == pytest.approx(scaling.before.gap_cv)
        assert scaling.after.turns == 2
    if method == "thin":
        # Half of the requests at random: index 1 + (I - 1)/2, and sessions lose turns.
        wanted = 1 + (scaling.before.dispersion["60"] - 1) / 2
        assert scaling.after.dispersion["60"] == pytest.approx(wanted, rel=0.15)
        assert scaling.after.turns < 1.6


def test_the_shape_is_what_characterize_says(bursty):
    shape = shape_of(bursty)
    arrival = bursty.table["arrival"].to_numpy()
    known = {f"{scale:g}": index for scale, index in dispersion(arrival, (1.0, 10.0, 60.0, 300.0))}
    assert shape.dispersion == pytest.approx(known)
    slow = max(int(((arrival >= t) & (arrival < t + 60)).sum()) for t in arrival)
    assert shape.peak_60s == slow
