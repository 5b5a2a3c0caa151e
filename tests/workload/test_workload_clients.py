"""Superpositions of clients: a ServeGen pool and a trace with clients become models that draw what was in them."""

import json

import numpy as np
import polars as pl
import pytest

from squall import fit, generate
from squall.errors import InputError
from squall.trace import Trace, TraceMeta, read_servegen
from squall.workload import read_workload
from squall.workload.clients import fit_clients, fit_pool


@pytest.fixture
def pool(tmp_path):
    """A steady client with short requests, and a bursty one with long ones, which begins after half the time."""
    steady = "".join(f"{600 * k},1.0,0.5,Gamma,4.0,1\n" for k in range(20))
    bursty = "".join(f"{600 * k},0,0,,0,0\n" if k < 10 else f"{600 * k},0.5,3,Weibull,0.4,9\n" for k in range(20))
    for number, text, tokens in ((0, steady, "{10: 0.25, 20: 0.75}"), (1, bursty, "{500: 1.0}")):
        (tmp_path / f"chunk-{number}-trace.csv").write_text(text)
        block = {"input_tokens": tokens, "output_tokens": tokens}
        (tmp_path / f"chunk-{number}-dataset.json").write_text(json.dumps({"0": block}))
    return tmp_path


def test_a_pool_becomes_a_model_that_draws_it(pool, tmp_path):
    model = fit(pool, out=tmp_path / "m.json")
    assert read_workload(tmp_path / "m.json") == model
    assert model.mean_rate == pytest.approx(1.25)
    drawn = generate(tmp_path / "m.json", seed=3).table
    long = drawn["request_tokens"] == 500
    # Clients differ in lengths, rate and shape: 12,000 and 3,000 requests with CVs of 0.5 and 3.1.
    assert int((~long).sum()) == pytest.approx(12_000, abs=4 * 0.5 * 110)
    assert int(long.sum()) == pytest.approx(3_000, abs=4 * 3.1 * 55)
    assert drawn.filter(long)["arrival"].min() >= 6_000
    assert drawn.filter(~long)["request_tokens"].mean() == pytest.approx(17.5, abs=0.3)
    for part, cv in ((~long, 0.5), (long, 3.14)):
        gaps = np.diff(drawn.filter(part)["arrival"].to_numpy())
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.12)


def test_more_clients_and_more_from_each_differ(pool):
    arrivals = fit(pool).classes[0].arrivals
    many = arrivals.resampled(20, seed=1)
    assert len(many.clients) == 20
    assert many.mean_rate == pytest.approx(10 * arrivals.mean_rate)
    odd = arrivals.resampled(5, seed=1)
    assert len(odd.clients) == 5

    def dispersion(model, factor):
        path = model.path(6_000.0, 12_000.0, 0).scaled(factor)
        times, _ = model.arrive(path, np.random.default_rng(5))
        counts = np.bincount((times // 10).astype(int), minlength=600)
        return counts.var() / counts.mean()

    # Ten copies keep the dispersion of one; one client that sends ten times as much is as bursty in a tenth of the
    # time, which at a scale of many gaps is the same index, at one of few gaps is a higher one.
    assert dispersion(many, 1.0) < 0.75 * dispersion(arrivals, 10.0)
    with pytest.raises(InputError, match="at least one"):
        arrivals.resampled(0, seed=1)


def test_a_trace_with_clients_becomes_a_superposition():
    rng = np.random.default_rng(0)
    chatty, rare = np.sort(rng.uniform(0, 7200, 4_000)), np.sort(rng.uniform(3600, 5400, 900))
    frame = pl.DataFrame(
        {
            "arrival": np.concatenate([chatty, rare, [10.0]]),
            "request_tokens": np.concatenate([np.full(4_000, 50), rng.integers(800, 900, 900), [7]]),
            "response_tokens": 5,
            "session": np.repeat([4, 9, 11], [4_000, 900, 1]),
        }
    ).sort("arrival")
    model = fit(Trace.of(frame, TraceMeta(source="t", format="squall")), kind="clients", window="20m")
    arrivals = model.classes[0].arrivals
    assert len(arrivals.clients) == 3
    drawn = generate(model, seed=2).table
    long = drawn.filter(pl.col("request_tokens") >= 790)
    assert len(long) == pytest.approx(900, abs=4 * 30)
    assert long["arrival"].is_between(2_990, 6_010).all()  # windows of 600 s
    assert drawn["session"].null_count() == len(drawn)


def test_what_has_no_clients_is_refused(tmp_path, pool):
    frame = pl.DataFrame({"arrival": [0.0, 1.0, 2.0], "request_tokens": 1, "response_tokens": 1})
    with pytest.raises(InputError, match="records no sessions to tell clients by"):
        fit(Trace.of(frame, TraceMeta(source="t", format="squall")), kind="clients")
    with pytest.raises(InputError, match="pool of clients"):
        fit(pool, kind="renewal")
    with pytest.raises(InputError, match=r"--service: .* is a pool"):
        fit(pool, service="api")
    with pytest.raises(InputError, match="there is no chunk"):
        fit(tmp_path.parent)


def test_the_pool_of_deepseek_r1_is_drawn_as_published(traces):
    pool = read_servegen(traces / "servegen" / "deepseek-r1")
    arrivals, _, _ = fit_pool(pool)
    active = [client for client in pool.clients if client.rate.any()]
    assert len(arrivals.clients) == len(active)
    assert arrivals.mean_rate == pytest.approx(pool.rate.mean(), rel=1e-6)
    model = fit(traces / "servegen" / "deepseek-r1")
    drawn = generate(model, duration="6h", start="6h", seed=1).table
    # Load window by window: 36 windows of 600 s with the counts' own dispersion (a few bursty clients make some 30).
    real = pool.rate[36:72] * 600
    counts = np.bincount((drawn["arrival"].to_numpy() // 600).astype(int), minlength=36)
    assert counts.sum() == pytest.approx(real.sum(), rel=0.03)
    assert np.corrcoef(counts, real)[0, 1] > 0.97
    # Lengths: the pool's mixture over these windows.
    weight = expected = 0.0
    for client in active:
        for time, rate in zip(client.start, client.rate, strict=True):
            block = client.block_at(time)
            if rate and 21_600 <= time < 43_200 and block and block.input_tokens.values.size:
                weight += rate
                expected += rate * block.input_tokens.mean
    assert drawn["request_tokens"].mean() == pytest.approx(expected / weight, rel=0.05)


def test_clients_of_a_class_need_answers():
    one = fit_clients(
        np.arange(50.0), np.repeat([1, 2], 25), np.repeat([True, False], 25), np.full(50, 9), np.full(50, 3), 50.0,
        10.0, tick=None, rng=np.random.default_rng(0), seed=0,
    )  # fmt: skip
    assert len(one.clients) == 1
