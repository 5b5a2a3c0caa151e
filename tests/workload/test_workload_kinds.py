"""The other kinds: the cascade, saved blocks, Weibull windows, theta(t), the working day, playback, warm-up, ramps."""

import msgspec
import numpy as np
import polars as pl
import pytest
from scipy import stats

from squall.characterize.concurrency import dispersion
from squall.characterize.lengths import zipf_exponent
from squall.errors import InputError
from squall.trace import Trace, TraceMeta
from squall.workload import burst_ramp, fit, generate, read_workload, save_workload
from squall.workload.cascade import Cascade
from squall.workload.concurrency import DAY, HOUR, Path, Renewal, renewal
from squall.workload.lengths import GaussianCopula, GridCopula, fit_lengths
from squall.workload.resampling import Bootstrap
from squall.workload.slots import Slots, played, warmed

SCALES = (1.0, 10.0, 60.0, 300.0)


def modulated(seed: int = 1, rows: int = 12_000) -> Trace:
    """A rate that changes at several scales; the busy stretches have the long requests."""
    rng = np.random.default_rng(seed)
    level = sum(0.6 * np.repeat(rng.standard_normal(-(-rows // n)), n)[:rows] for n in (40, 400, 2000))
    arrival = np.cumsum(rng.exponential(0.3, rows) * np.exp(-level))
    burst = np.repeat(rng.standard_normal(rows // 40), 40)
    columns = {
        "arrival": arrival,
        "request_tokens": np.rint(500 * np.exp(0.5 * burst + 0.5 * rng.standard_normal(rows))).astype(int) + 1,
        "response_tokens": np.rint(100 * rng.lognormal(0, 1, rows)).astype(int) + 1,
    }
    return Trace.of(columns, TraceMeta(source="modulated", format="test"))


@pytest.fixture(scope="module")
def trace() -> Trace:
    return modulated()


def median_dispersion(traces, span):
    found = [dict(dispersion(one.table["arrival"].to_numpy(), SCALES, 0.0, span)) for one in traces]
    return {scale: np.median([one[scale] for one in found]) for scale in SCALES}


# -------------------------------------------------------------------------------------------------------------- cascade


def test_the_cascade_has_the_dispersion_of_the_trace_without_its_course(trace):
    model = fit(trace, kind="cascade")
    assert isinstance(model.classes[0].arrivals, Cascade)
    drawn = [generate(model, seed=seed) for seed in range(15)]
    real, found = median_dispersion([trace], trace.span), median_dispersion(drawn, trace.span)
    for scale in SCALES:
        assert found[scale] == pytest.approx(real[scale], rel=0.35), scale
    counts = [np.histogram(one.table["arrival"], 60, (0, trace.span))[0] for one in (trace, *drawn)]
    assert abs(np.mean([np.corrcoef(counts[0], other)[0, 1] for other in counts[1:]])) < 0.15


def test_a_poisson_process_stays_one():
    rng = np.random.default_rng(2)
    steady = Trace.of(
        {"arrival": np.sort(rng.random(8000)) * 8000, "request_tokens": [9] * 8000, "response_tokens": [9] * 8000},
        TraceMeta(source="steady", format="test"),
    )
    model = fit(steady, kind="cascade")
    found = median_dispersion([generate(model, seed=seed) for seed in range(10)], 8000)
    assert [found[scale] for scale in SCALES] == pytest.approx([1.0] * 4, abs=0.35)


def test_more_clients_keep_the_dispersion_and_a_longer_draw_the_rate(trace):
    model = fit(trace, kind="cascade")
    once = median_dispersion([generate(model, seed=s) for s in range(8)], trace.span)
    twice = [generate(model, rate=2 * model.mean_rate, seed=s) for s in range(8)]
    assert np.mean([len(one) for one in twice]) == pytest.approx(2 * len(trace), rel=0.01)
    found = median_dispersion(twice, trace.span)
    assert found[10.0] == pytest.approx(once[10.0], rel=0.3)
    long = generate(model, duration=3 * model.span, seed=1)
    assert len(long) == pytest.approx(3 * len(trace), rel=0.01)
    few = generate(model, rate=0.3 * model.mean_rate, seed=1)
    assert len(few) == pytest.approx(0.3 * len(trace), rel=0.1)


def test_bursts_have_lengths_of_their_own_and_the_marginal_law_stays(trace):
    model = fit(trace, kind="cascade")
    shared = []
    for one in (trace, *(generate(model, seed=seed) for seed in range(5))):
        z = stats.norm.ppf((stats.rankdata(one.table["request_tokens"].to_numpy()) - 0.5) / len(one))
        shared.append(np.corrcoef(z[:-1], z[1:])[0, 1])
    assert shared[0] > 0.4
    assert np.median(shared[1:]) == pytest.approx(shared[0], abs=0.15)
    drawn = generate(model, seed=1)
    for name in ("request_tokens", "response_tokens"):
        assert stats.ks_2samp(trace.table[name], drawn.table[name]).statistic < 0.01
    assert generate(model, seed=1).table.equals(drawn.table)


def test_the_cascade_knows_day_from_night(tmp_path):
    rng = np.random.default_rng(3)
    times = rng.random(40_000) * 4 * DAY
    kept = np.sort(times[rng.random(times.size) < np.where((times / HOUR) % 24 < 12, 1.0, 0.2)])
    days = Trace.of(
        {"arrival": kept, "request_tokens": [9] * kept.size, "response_tokens": [9] * kept.size},
        TraceMeta(source="days", format="test"),
    )
    model = fit(days, kind="cascade")
    assert model.classes[0].arrivals.period == DAY
    drawn = generate(model, duration="8d", seed=1).table["arrival"].to_numpy()
    by_hour = np.bincount((drawn / HOUR % 24).astype(int), minlength=24)
    assert by_hour[:12].sum() / by_hour[12:].sum() == pytest.approx(5, rel=0.1)
    started = generate(model, start="12h", duration="12h", seed=1)
    assert len(started) == pytest.approx(kept.size / 4 / 6, rel=0.15)
    save_workload(model, tmp_path / "model.json")
    assert read_workload(tmp_path / "model.json") == model
    assert (tmp_path / "model.json").stat().st_size < 60_000


def test_few_requests_make_no_cascade():
    small = Trace.of(
        {"arrival": np.arange(20.0) ** 1.5, "request_tokens": [9] * 20, "response_tokens": [9] * 20},
        TraceMeta(source="small", format="test"),
    )
    one = fit(small, kind="cascade").classes[0]
    assert isinstance(one.arrivals, Renewal)
    assert "needs 64" in one.fit.reason


@pytest.mark.parametrize("copula", [GaussianCopula(0.6), GridCopula([[0.9, 0.1], [0.3, 0.7]])])
def test_a_copula_and_its_quantile_are_inverse(copula):
    u, w = np.random.default_rng(1).random((2, 2000))
    v = copula.at(u, w)
    assert copula.quantile(u, v) == pytest.approx(w, abs=1e-6)
    assert (
        stats.kstest(copula.quantile(u, copula.at(u, np.random.default_rng(2).random(u.size))), "uniform").pvalue > 1e-4
    )


def test_lengths_the_other_way_about_are_the_same_law():
    rng = np.random.default_rng(5)
    x = rng.standard_normal(5000)
    request = np.rint(np.exp(5 + x)).astype(int) + 1
    response = np.rint(np.exp(4 - 0.8 * x + 0.5 * rng.standard_normal(5000))).astype(int) + 1
    law = fit_lengths(request, response, rng)
    back, forth = law.reversed.at(*rng.random((2, 5000)))
    assert stats.ks_2samp(back, response).statistic < 0.03
    assert stats.ks_2samp(forth, request).statistic < 0.03
    assert stats.spearmanr(forth, back).statistic == pytest.approx(
        stats.spearmanr(request, response).statistic, abs=0.04
    )


# ------------------------------------------------------------------------------------------------------------ bootstrap


def test_a_saved_bootstrap_holds_rows_and_says_so(trace, tmp_path):
    model = fit(trace, kind="bootstrap", block="60s", out=tmp_path / "model.json")
    assert isinstance(model.classes[0].arrivals, Bootstrap)
    assert "holds the rows" in model.notes[-1]
    again = read_workload(tmp_path / "model.json")
    drawn = generate(again, seed=4)
    assert drawn.table.equals(generate(model, seed=4).table)
    pairs = set(trace.table.select("request_tokens", "response_tokens").iter_rows())
    assert set(drawn.table.select("request_tokens", "response_tokens").iter_rows()) <= pairs
    assert len(generate(model, rate=2.5 * model.mean_rate, seed=1)) == pytest.approx(2.5 * len(trace), rel=0.25)
    assert "with which a queue is off by" in fit(trace, kind="bootstrap").classes[0].fit.reason


def test_blocks_of_a_coarse_clock_stay_on_it():
    rng = np.random.default_rng(6)
    ticks = Trace.of(
        {"arrival": np.sort(rng.integers(0, 500, 3000)) * 2.0, "request_tokens": [9] * 3000,
         "response_tokens": [0, 5, 5] * 1000},
        TraceMeta(source="ticks", format="test", tick=2.0),
    )  # fmt: skip
    drawn = generate(fit(ticks, kind="bootstrap", block="21s"), seed=1).table
    assert (drawn["arrival"] % 2.0).max() == 0
    assert drawn["failed"].mean() == pytest.approx(1 / 3, abs=0.05)


# ---------------------------------------------------------------------------------------------------------------- slots


@pytest.mark.parametrize("shape", [0.4, 0.8, 2.0])
def test_weibull_gaps_have_their_law_and_rate(shape):
    path = Path(np.array([0.0, 40_000.0]), np.array([0.5]), np.array([shape]), gaps="weibull")
    gaps = np.diff(renewal(path, np.random.default_rng(1)))
    law = stats.weibull_min(shape)
    assert gaps.mean() == pytest.approx(2.0, rel=4 * law.std() / law.mean() / np.sqrt(20_000))
    assert stats.kstest(gaps / 2.0 * law.mean(), law.cdf).pvalue > 1e-3
    changing = Path(np.arange(401) * 5.0, np.full(400, 2.0), np.tile([0.4, 2.0], 200), gaps="weibull")
    counts = [
        np.histogram(renewal(changing, np.random.default_rng(seed)), changing.edges)[0].reshape(-1, 2)
        for seed in range(40)
    ]
    # 8,000 windows of each shape, 10 expected in each; their counts have a standard deviation below 10.
    assert np.mean(counts, axis=(0, 1)) == pytest.approx([10, 10], abs=4 * 10 / np.sqrt(8000))


@pytest.mark.parametrize("method", ["moments", "mle"])
def test_weibull_windows_are_found_again_and_preferred(method):
    rng = np.random.default_rng(2)
    gaps = rng.weibull(0.6, 20_000)
    known = Trace.of(
        {"arrival": np.cumsum(gaps), "request_tokens": [9] * 20_000, "response_tokens": [9] * 20_000},
        TraceMeta(source="weibull", format="test"),
    )
    one = fit(known, kind="renewal", gaps="auto", method=method).classes[0]
    assert one.arrivals.gaps == "weibull"
    assert np.median(one.arrivals.shape) == pytest.approx(0.6, abs=0.06)
    assert "likelier than Gamma" in one.fit.reason
    regular = known.replace(known.table.with_columns(arrival=pl.Series(np.cumsum(rng.gamma(0.3, 1, 20_000)))))
    assert fit(regular, kind="renewal", gaps="auto", method="mle").classes[0].arrivals.gaps == "gamma"
    assert fit(regular, kind="renewal", gaps="weibull", method=method).classes[0].arrivals.gaps == "weibull"


def test_theta_follows_the_time():
    rng = np.random.default_rng(3)
    below = [np.cumsum(np.arange(1.0, 1001) ** -theta) for theta in (0.8, 1.6)]
    request = np.concatenate([1 + np.searchsorted(b / b[-1], rng.random(6000)) for b in below])
    assert zipf_exponent(request[:6000], 1000) == pytest.approx(0.8, abs=0.03)
    known = Trace.of(
        {
            "arrival": np.sort(rng.random((2, 6000))).ravel() * 3600 + np.repeat([0, 3600], 6000),
            "request_tokens": request,
            "response_tokens": [9] * 12_000,
        },
        TraceMeta(source="zipf", format="test"),
    )
    model = fit(known, kind="renewal", zipf=True)
    slots = model.classes[0].arrivals
    assert slots.theta == pytest.approx([0.8] * 6 + [1.6] * 6, abs=0.1)  # windows of 10 minutes
    drawn = generate(model, seed=1).table
    for half, theta in ((drawn.filter(pl.col("arrival") < 3600), 0.8), (drawn.filter(pl.col("arrival") >= 3600), 1.6)):
        assert zipf_exponent(half["request_tokens"].to_numpy(), 1000) == pytest.approx(theta, abs=0.05)


def days_of_work() -> Trace:
    """Two weeks from a Monday's midnight: 6 requests a minute on working days from 8 to 18 h, else 1."""
    rng = np.random.default_rng(4)
    times = np.sort(rng.random(120_000)) * 14 * DAY
    busy = ((times // DAY) % 7 < 5) & ((times % DAY) // HOUR >= 8) & ((times % DAY) // HOUR < 18)
    kept = times[busy | (rng.random(times.size) < 1 / 6)]
    return Trace.of(
        {"arrival": kept, "request_tokens": [9] * kept.size, "response_tokens": [9] * kept.size},
        TraceMeta(source="work", format="test", midnight=0.0, weekday=0),
    )


@pytest.mark.parametrize("average", ["pooled", "parameters"])
def test_the_working_day_is_played_slot_by_slot(average):
    days = days_of_work()
    model = fit(days, kind="renewal", day="8h:25h", average=average, playback="60s")
    slots = model.classes[0].arrivals
    assert len(slots.rate) == 51  # 17 hours of 20 minutes, as published
    assert slots.edges == pytest.approx(np.arange(52) * 60.0)
    rate = 120_000 / (14 * DAY)
    assert np.mean(slots.rate[:30]) == pytest.approx(rate, rel=0.05)
    assert np.mean(slots.rate[30:]) == pytest.approx(rate / 6, rel=0.1)
    # The mean of shapes by moments, from 20 gaps each, lies above the shape of all gaps together.
    assert np.mean(slots.shape) == pytest.approx(1, abs=0.15 if average == "pooled" else 0.25)
    assert model.span == 51 * 60
    assert model.midnight is None
    assert "51 slots of the working day" in model.classes[0].fit.reason


def test_a_warm_up_comes_first():
    slots = warmed(played(Slots("gamma", [0.0, 1200.0], [5.0], [1.0]), 60.0), 1000, 1.0)
    assert slots.edges == [0.0, 1000.0, 1060.0]
    assert slots.rate == [1.0, 5.0]
    assert slots.shape == [0.5, 1.0]
    assert slots.path(0.0, 2120.0, 0).expected == pytest.approx(2 * 1300)
    assert slots.path(1000.0, 1060.0, 0).expected == pytest.approx(300)


def test_the_burst_ramp_is_the_published_one():
    ramp = burst_ramp()
    slots = ramp.classes[0].arrivals
    assert max(slots.rate) == pytest.approx(64**2 / 2)  # 2,048 requests/s at CV 64
    assert min(slots.shape) == pytest.approx(64.0**-2, rel=1e-4)
    assert slots.path(0.0, slots.edges[-1], 0).expected == pytest.approx(1000 + 5 * 1000)
    kept = burst_ramp(keep_rate=True, peaks=(8.0,))
    assert set(kept.classes[0].arrivals.rate) == {1.0}
    request = generate(kept, duration="1h", seed=1).table["request_tokens"].to_numpy()
    # Zipf(1.1) up to 1,023: median 12, P(1) = 0.179, mean 101.7.
    assert np.mean(request == 1) == pytest.approx(0.179, abs=0.03)
    assert 8 <= np.median(request) <= 17
    assert request.max() <= 1023
    with pytest.raises(InputError, match="at least 2"):
        burst_ramp(peaks=(1.0,))


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"gaps": "weibull"}, "--gaps"), ({"zipf": True}, "--zipf"), ({"playback": "60s"}, "--playback"),
        ({"warm_up": 10}, "--warm-up"), ({"block": "3s"}, "--block"),
        ({"kind": "renewal", "average": "pooled"}, "--average"),
        ({"kind": "renewal", "warm_up_rate": 2.0}, "--warm-up-rate"), ({"kind": "renewal", "gaps": "cauchy"}, "cauchy"),
        ({"kind": "renewal", "day": "8h"}, "--day"), ({"kind": "renewal", "day": "9h:8h"}, "--day"),
        ({"kind": "renewal", "day": "8h:25h"}, "weekday"), ({"kind": "renewal", "playback": "0s"}, "--playback"),
        ({"kind": "bootstrap", "block": "0s"}, "--block"),
    ],
)  # fmt: skip
def test_options_without_effect_are_refused(trace, asked, named):
    with pytest.raises(InputError, match=named):
        fit(trace, **asked)


def test_degenerate_traces_say_what_can_be_done():
    def of(arrival, response=5, tick=None):
        size = len(arrival)
        return Trace.of(
            {"arrival": np.array(arrival, float), "request_tokens": [9] * size, "response_tokens": [response] * size},
            TraceMeta(source="odd", format="test", tick=tick),
        )

    with pytest.raises(InputError, match="replay or simulate it as it is"):
        fit(of([3.0]))
    with pytest.raises(InputError, match="--ties spread"):
        fit(of([3.0] * 20, tick=1.0))
    assert fit(of([3.0] * 20, tick=1.0), ties="spread").mean_rate > 0
    for kind in ("auto", "cascade", "renewal", "bootstrap"):
        failed = fit(of(np.arange(100.0) ** 1.1, response=0), kind=kind)
        assert any("All requests failed" in note for note in failed.notes)
        assert generate(failed, seed=1).table["failed"].all()
        even = fit(of(np.arange(100.0)), kind=kind)
        assert any("All gaps are equal" in note for note in even.notes)
        assert len(generate(even, seed=1)) > 50
        assert any("uncertain" in note for note in fit(of([0, 1.0]), kind=kind).notes)
        fit(of([0.0] * 50 + [1.0] * 50), kind=kind)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "slots", "gaps": "x", "edges": [0, 1], "rate": [1], "shape": [1]},
        {"kind": "slots", "gaps": "gamma", "edges": [0, 0], "rate": [1], "shape": [1]},
        {"kind": "bootstrap", "span": 1, "block": 2, "tick": None, "time": [0], "request": [1], "response": [1]},
        {"kind": "cascade", "span": 1, "mean_rate": 1, "tick": None, "period": None, "profile": [], "lead": "x",
         "scales": []},
    ],
)  # fmt: skip
def test_a_broken_kind_is_named(trace, tmp_path, change):
    plain = msgspec.to_builtins(fit(trace, kind="renewal"))
    plain["classes"][0]["arrivals"] = change
    (tmp_path / "model.json").write_bytes(msgspec.json.encode(plain))
    with pytest.raises(InputError, match="arrivals"):
        read_workload(tmp_path / "model.json")
