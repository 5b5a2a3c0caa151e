"""The demo: it runs the main job on any trace, compares like with like, and says what is missing."""

import numpy as np
import pytest

import squall
from squall.errors import InputError
from squall.study.demo import SIMULATED_LOAD, TIMEOUT, demo
from squall.trace import Trace, TraceMeta


def _bursty(requests=600):
    random = np.random.default_rng(3)
    gaps = random.gamma(0.05, 20.0, requests)  # CV 4.5, mean 1 s
    columns = {
        "arrival": np.cumsum(gaps) - gaps[0],
        "request_tokens": random.integers(50, 1500, requests),
        "response_tokens": random.integers(20, 500, requests),
    }
    return Trace.of(columns, TraceMeta(source="bursts.csv", format="generated"))


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, demo(_bursty(), out=folder / "out", local=False)


def test_it_leaves_the_page_and_everything_it_is_made_from(shown):
    folder, result = shown
    page = (folder / "out" / "report.html").read_text()
    assert result.report.endswith("report.html")
    assert "Poisson" in page
    assert "bursts.csv" in page
    names = {path.name for path in (folder / "out").iterdir()}
    assert {"trace.parquet", "model.json", "simulated-own.parquet", "simulated-poisson.parquet"} <= names
    assert squall.read_trace(folder / "out" / "trace.parquet").table.equals(_bursty().table)


def test_only_the_arrivals_differ_between_the_arms(shown):
    folder, _ = shown
    runs = {
        name: squall.read_run(folder / "out" / f"simulated-{name}.parquet") for name in ("own", "poisson", "uniform")
    }
    own = runs.pop("own").table
    for run in runs.values():
        for column in ("asked_request_tokens", "asked_response_tokens"):
            assert run.table.sort("request")[column].equals(own.sort("request")[column])
        spans = [table["scheduled"].max() - table["scheduled"].min() for table in (own, run.table)]
        # 600 Poisson gaps: the span has a standard error of 1/sqrt(600), about 4 %.
        assert spans[1] == pytest.approx(spans[0], rel=0.17)


def test_it_shows_what_smooth_load_hides(shown):
    _, result = shown
    arms = {arm.arrivals: arm for arm in result.arms}
    own, poisson = arms["the trace's own"], arms["Poisson"]
    assert own.ttft_tail > 1.5 * poisson.ttft_tail_range[1]
    assert own.ttft_tail <= TIMEOUT
    assert poisson.runs == 5
    assert any("Poisson" in finding for finding in result.findings)
    assert result.local is None
    assert f"{SIMULATED_LOAD:.0%}" in " ".join(result.findings)


def test_a_short_trace_is_compared_by_a_percentile_that_it_supports(tmp_path):
    result = demo(_bursty(60), out=tmp_path, local=False)
    assert result.percentile == "p90"
    assert all(arm.ttft_tail < TIMEOUT for arm in result.arms)
    assert "P90 TTFT" in " ".join(result.findings)


def test_what_cannot_be_shown_is_said(tmp_path):
    with pytest.raises(InputError, match="the demo needs"):
        demo(_bursty(5), out=tmp_path, local=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="it is a file"):
        demo(_bursty(), out=tmp_path / "file", local=False)
