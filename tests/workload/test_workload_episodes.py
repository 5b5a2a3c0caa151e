"""The trace's own course: counts and length classes in place, a cascade that has the trace's law, chance inside."""

import msgspec
import numpy as np
import polars as pl
import pytest
from scipy.special import betaln

from squall.errors import InputError
from squall.trace import Trace, TraceMeta, read_trace, write_trace
from squall.workload import bootstrap, fit, generate, read_workload, save_workload
from squall.workload.concurrency import Renewal
from squall.workload.episodes import EPISODE, Episodes, concentration, fit_episodes, held_out, leaves
from squall.workload.lengths import fit_lengths


def episodes_trace(seed: int = 1, rows: int = 6000, tick: float | None = None) -> Trace:
    """ON/OFF arrivals; every burst has its own lengths."""
    rng = np.random.default_rng(seed)
    burst = np.repeat(np.arange(rows // 60), 60)
    gaps = rng.exponential(0.02, rows)
    gaps[::60] = rng.lognormal(2, 1, rows // 60)
    level = np.exp(rng.standard_normal(rows // 60))[burst]
    arrival = np.cumsum(gaps) - gaps[0]
    if tick:
        arrival = np.floor(arrival / tick) * tick
    columns = {
        "arrival": arrival,
        "request_tokens": np.rint(400 * level * rng.lognormal(0, 0.5, rows)).astype(int) + 1,
        "response_tokens": np.rint(100 / level * rng.lognormal(0, 0.5, rows)).astype(int) + 1,
    }
    return Trace.of(columns, TraceMeta(source="bursts", format="test", tick=tick))


@pytest.fixture(scope="module")
def trace() -> Trace:
    return episodes_trace()


@pytest.fixture(scope="module")
def model(trace):
    return fit(trace)


def test_auto_takes_what_predicts_better_and_says_why(trace, model):
    one = model.classes[0]
    assert isinstance(one.arrivals, Episodes)
    assert one.fit.reason.startswith("episodes: log-likelihood of a held-out half")
    assert "coarser grain" in model.notes[-1]
    rng = np.random.default_rng(2)
    regular = trace.replace(trace.table.with_columns(arrival=pl.Series(np.cumsum(rng.gamma(9, 1 / 9, len(trace))))))
    even = fit(regular).classes[0]
    assert isinstance(even.arrivals, Renewal)
    assert "regular" in even.fit.reason
    small = fit(trace.replace(trace.table.head(EPISODE))).classes[0]
    assert isinstance(small.arrivals, Renewal)
    assert isinstance(fit(trace, kind="renewal").classes[0].arrivals, Renewal)


def test_held_out_likelihood_prefers_one_rate_where_there_is_one():
    rng = np.random.default_rng(4)
    steady = np.sort(rng.random(5000)) * 1000
    cascade, windows = held_out(steady, 1000.0, 100.0, tick=None, seed=0)
    # Both know that there is nothing to know: a few hundredths of a nat for what they fitted in vain.
    assert cascade == pytest.approx(0, abs=0.05)
    assert windows == pytest.approx(0, abs=0.05)
    bursts = np.sort(np.repeat(rng.random(100) * 1000, 50) + rng.exponential(0.5, 5000))
    cascade, windows = held_out(bursts, float(bursts[-1]) + 0.1, 100.0, tick=None, seed=0)
    assert cascade > windows + 1


def test_concentration_is_the_likeliest_and_finds_the_truth():
    rng = np.random.default_rng(5)
    n = rng.integers(2, 60, 4000)
    for true in (0.5, 4.0, 32.0):
        left = rng.binomial(n, rng.beta(true / 2, true / 2, n.size))
        found = concentration(left, n - left)
        assert true / 1.5 <= found <= true * 1.5

        def likelihood(c, left=left):
            return sum(betaln(a + c / 2, b + c / 2) - betaln(c / 2, c / 2) for a, b in zip(left, n - left, strict=True))

        assert likelihood(found) >= max(likelihood(found * 2), likelihood(found / 2))
    even = rng.binomial(n, 0.5)
    assert concentration(even, n - even) > 500
    assert concentration(np.array([1]), np.array([0])) == 2.0**14.5


def test_every_episode_has_its_requests_in_place(trace, model):
    own = model.classes[0].arrivals
    tied = msgspec.structs.replace(own, freedom=0.0)
    path = tied.path(0.0, tied.span, seed=3)
    assert path.expected == pytest.approx(len(trace))
    times, episode, number = tied.arrive(path, np.random.default_rng(1))
    assert number.tolist() == own.count
    assert episode.tolist() == list(range(len(own.count)))
    border = np.array(own.border)
    assert np.histogram(times, border)[0].tolist() == own.count
    free = msgspec.structs.replace(own, freedom=1.0)
    totals = [free.arrive(path, np.random.default_rng(seed))[2] for seed in range(200)]
    # Poisson: the variance of each episode's number is its mean.
    assert np.var(totals, axis=0).mean() == pytest.approx(EPISODE, rel=0.1)


def test_lengths_of_an_episode_are_its_own(trace, model):
    own = model.classes[0].arrivals
    request, response = trace.table["request_tokens"].to_numpy(), trace.table["response_tokens"].to_numpy()
    number = np.array(own.count)
    drawn, answers = own.lengths.draw(
        np.arange(number.size), number, model.classes[0].lengths, 0.0, np.random.default_rng(8)
    )
    owner = np.repeat(np.arange(number.size), number)
    for real, new in ((request, drawn), (response, answers)):
        means = [np.bincount(owner, x) / number for x in (real, new)]
        assert np.corrcoef(*means)[0, 1] > 0.99
        assert new.mean() == pytest.approx(real.mean(), rel=0.02)
    again = own.lengths.draw(
        np.arange(3), np.array([100, 0, 7]), model.classes[0].lengths, 0.5, np.random.default_rng(9)
    )
    assert again[0].size == again[1].size == 107


def test_the_cascade_has_the_dispersion_of_the_trace_at_all_scales(trace):
    from squall.characterize.concurrency import dispersion

    arrival = trace.table["arrival"].to_numpy()
    span = float(arrival[-1]) * (1 + 1 / len(trace))
    model = fit(trace, kind="episodes")
    free = [generate(model, seed=seed).table["arrival"].to_numpy() for seed in range(10)]
    for position, (scale, index) in enumerate(dispersion(arrival, (0.1, 1.0, 10.0, 60.0), 0.0, span)):
        drawn = np.median([dispersion(times, (0.1, 1.0, 10.0, 60.0), 0.0, span)[position][1] for times in free])
        assert drawn == pytest.approx(index, rel=0.15), scale


def test_longer_draws_go_on_with_parts_of_the_course(trace, model):
    long = generate(model, duration=3 * model.span, seed=2)
    assert len(long) == pytest.approx(3 * len(trace), rel=0.25)
    assert long.table["arrival"].is_sorted()
    assert generate(model, duration=3 * model.span, seed=2).table.equals(long.table)
    ends = generate(model, start=2.5 * model.span, duration=model.span, seed=2)
    assert 0 <= ends.table["arrival"][0] <= ends.table["arrival"][-1] <= model.span
    scaled = generate(model, rate=10 * model.mean_rate, seed=2)
    assert len(scaled) == pytest.approx(10 * len(trace), rel=0.02)
    days = Trace.of(
        {"arrival": np.sort(np.random.default_rng(1).random(2000)) * 1.5 * 86400, "request_tokens": [5] * 2000,
         "response_tokens": [5] * 2000},
        TraceMeta(source="days", format="test"),
    )  # fmt: skip
    daily = fit(days, kind="episodes").classes[0].arrivals
    assert daily._schedule(4 * 86400, 0)[1] == pytest.approx((0.5 * 86400, 86400), rel=0.01)


def test_a_coarse_clock_is_kept(tmp_path):
    trace = episodes_trace(tick=1.0)
    model = fit(trace)
    drawn = generate(model, seed=1)
    assert drawn.meta.tick == 1.0
    assert (drawn.table["arrival"] % 1.0).max() == 0.0
    gaps = [(t.table["arrival"].diff().drop_nulls() == 0).mean() for t in (trace, drawn)]
    assert gaps[1] == pytest.approx(gaps[0], abs=0.05)
    write_trace(drawn, tmp_path / "drawn.parquet")
    assert read_trace(tmp_path / "drawn.parquet").meta.tick == 1.0


def test_the_bootstrap_keeps_what_is_shorter_than_a_block(trace):
    drawn = bootstrap(trace, "30s", seed=1)
    assert drawn.table.equals(bootstrap(trace, 30, seed=1).table)
    assert drawn.table["arrival"].is_sorted()
    assert 0.6 < len(drawn) / len(trace) < 1.4
    pairs = {(a, b) for a, b in trace.table.select("request_tokens", "response_tokens").iter_rows()}
    assert set(drawn.table.select("request_tokens", "response_tokens").iter_rows()) <= pairs
    whole = bootstrap(trace, trace.span * (1 + 1 / (len(trace) - 1)), seed=3)
    assert len(whole) == len(trace)  # one block is the trace itself, from another start
    with pytest.raises(InputError, match="--block 0"):
        bootstrap(trace, 0)


def test_requests_at_one_time_and_failed_episodes_are_no_obstacle():
    arrival = np.sort(np.concatenate([np.zeros(100), np.full(100, 5.0), np.linspace(1, 9, 50)]))
    failed = np.arange(250) < 150
    tokens = np.full(250, 7)
    found = fit_episodes(arrival, ~failed, tokens, tokens, 10.0, tick=None, rng=np.random.default_rng(0), seed=0)
    assert sum(found.count) == 250
    assert np.all(np.diff(found.border) > 0)
    assert found.lengths.size[0] == 0
    law = fit_lengths(tokens[~failed], tokens[~failed], np.random.default_rng(0))
    number = np.array(found.count)
    drawn = found.lengths.draw(np.arange(number.size), number, law, 0.0, np.random.default_rng(0))
    assert set(drawn[0].tolist()) == {7}
    assert leaves(np.array([0.0, 9.99]), 10.0, 2).tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize(
    "change",
    [
        {"count": [1]}, {"border": [0.0, 1.0]}, {"leaf": [1, 2, 3]}, {"freedom": 2.0}, {"tick": 0.0}, {"period": 0.0},
        {"concentration": []},
    ],
)  # fmt: skip
def test_a_broken_file_is_named(model, tmp_path, change):
    file = tmp_path / "model.json"
    save_workload(model, file)
    assert read_workload(file) == model
    plain = msgspec.to_builtins(model)
    plain["classes"][0]["arrivals"] |= change
    file.write_bytes(msgspec.json.encode(plain))
    with pytest.raises(InputError, match="arrivals"):
        read_workload(file)
    plain = msgspec.to_builtins(model)
    plain["classes"][0]["arrivals"]["lengths"]["code"][0] = 99_999
    file.write_bytes(msgspec.json.encode(plain))
    with pytest.raises(InputError, match="length class"):
        read_workload(file)
