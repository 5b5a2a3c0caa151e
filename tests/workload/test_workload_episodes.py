"""The trace's own course, loosened: what stays and what is left to chance, and the queue that decides how much."""

import msgspec
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squall.characterize.concurrency import dispersion
from squall.errors import InputError
from squall.trace import Trace, TraceMeta, read_trace, write_trace
from squall.workload import bootstrap, fit, generate, read_workload, save_workload
from squall.workload.choosing import FREEDOMS, OFF, Bench, held_out
from squall.workload.concurrency import Renewal
from squall.workload.episodes import Episodes, fit_episodes, loosened


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


def with_freedom(model, freedom):
    return model.only(
        classes=[
            msgspec.structs.replace(one, arrivals=msgspec.structs.replace(one.arrivals, freedom=freedom))
            for one in model.classes
        ]
    )


def test_auto_takes_the_course_of_a_bursty_trace_and_says_why(model):
    one = model.classes[0]
    assert isinstance(one.arrivals, Episodes)
    assert one.fit.reason.startswith(f"episodes: freedom {one.arrivals.freedom:g}, with which a queue is off by")
    assert "log-likelihood of a held-out half" in one.fit.reason
    assert "coarser grain" in model.notes[-1]
    assert one.arrivals.freedom in FREEDOMS


def test_auto_takes_windows_where_the_course_is_chance():
    rng = np.random.default_rng(3)
    steady = Trace.of(
        {"arrival": np.sort(rng.random(6000)) * 3000, "request_tokens": [300] * 6000, "response_tokens": [50] * 6000},
        TraceMeta(source="steady", format="test"),
    )
    one = fit(steady).classes[0]
    assert isinstance(one.arrivals, Renewal) == one.fit.reason.startswith("renewal: predicts better")
    assert isinstance(fit(steady, kind="episodes").classes[0].arrivals, Episodes)


def test_held_out_likelihood_prefers_one_rate_where_there_is_one():
    rng = np.random.default_rng(4)
    steady = np.sort(rng.random(5000)) * 1000
    course, windows = held_out(steady, 1000.0, 100.0, tick=None, seed=0)
    # Blocks of eight know a rate to a third or so: what they fitted in vain costs 1/16 nat and more.
    assert -0.2 < course < -0.03
    assert windows == pytest.approx(0, abs=0.02)
    bursts = np.sort(np.repeat(rng.random(100) * 1000, 50) + rng.exponential(0.5, 5000))
    course, windows = held_out(bursts, float(bursts[-1]) + 0.1, 100.0, tick=None, seed=0)
    assert course > windows + 1


@given(
    gaps=st.lists(st.floats(0.001, 1000), min_size=1, max_size=200),
    freedom=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_loosened_times_keep_their_number_order_and_span(gaps, freedom, seed):
    times = np.cumsum(gaps) - gaps[0]
    span = float(times[-1]) + 1.0
    moved = loosened(times, span, None, freedom, np.random.default_rng(seed))
    assert moved.size == times.size
    assert np.all(np.diff(moved) >= 0)
    assert moved[0] >= 0
    assert moved[-1] <= span * (1 + 1e-9)
    if freedom == 0:
        assert moved == pytest.approx(times, rel=1e-6, abs=1e-6)


@given(gaps=st.lists(st.integers(1, 50), min_size=1, max_size=200), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_on_a_clock_of_ticks_no_two_ticks_fall_together(gaps, seed):
    times = np.cumsum(gaps) * 2.0
    moved = loosened(times, float(times[-1]) + 2.0, 2.0, 0.2, np.random.default_rng(seed))
    assert np.all(np.diff(moved) >= 2.0)
    assert np.all(moved % 2.0 == 0)


def test_dispersion_stays_at_all_scales_and_freedom_widens_the_draws(trace, model):
    arrival = trace.table["arrival"].to_numpy()
    span = float(arrival[-1]) * (1 + 1 / len(trace))
    scales = (0.1, 1.0, 10.0, 60.0)
    drawn = [generate(with_freedom(model, 0.02), seed=seed).table["arrival"].to_numpy() for seed in range(8)]
    for position, (scale, index) in enumerate(dispersion(arrival, scales, 0.0, span)):
        found = np.median([dispersion(times, scales, 0.0, span)[position][1] for times in drawn])
        assert found == pytest.approx(index, rel=0.12), scale
    spread = [
        np.std([generate(with_freedom(model, freedom), seed=s).table["arrival"].to_numpy() for s in range(4)], 0).mean()
        for freedom in (0.001, 0.01, 0.1)
    ]
    assert spread == sorted(spread)
    assert spread[0] > 0


def test_lengths_and_failures_stay_where_they_were(trace):
    rng = np.random.default_rng(6)
    outage = (np.arange(len(trace)) // 100) % 10 == 4
    failed = outage & (rng.random(len(trace)) < 0.7)
    answer = pl.when(pl.Series(failed)).then(0).otherwise(pl.col("response_tokens"))
    broken = trace.replace(trace.table.with_columns(failed=pl.Series(failed), response_tokens=answer))
    drawn = generate(fit(broken, kind="episodes"), seed=2)
    assert len(drawn) == len(trace)
    owner = np.arange(len(trace)) // 60
    for name in ("request_tokens", "response_tokens", "failed"):
        means = [np.bincount(owner, one.table[name].cast(pl.Float64).to_numpy()) / 60 for one in (broken, drawn)]
        assert np.corrcoef(*means)[0, 1] > 0.9
    assert drawn.table["failed"].mean() == pytest.approx(failed.mean(), abs=0.01)
    assert drawn.table.filter("failed")["response_tokens"].max() == 0


def test_the_queue_tells_a_draw_with_the_wrong_lengths_from_the_trace(trace, model):
    rows = trace.table
    arrival = rows["arrival"].to_numpy()
    bench = Bench(arrival, rows, float(arrival[-1]) + 0.2)
    right = bench.check(model.classes[0], 0)
    assert right.passed
    assert right.worst <= 1
    shuffled = rows.with_columns(
        rows.select("request_tokens", "response_tokens").sample(fraction=1, shuffle=True, seed=1)
    )
    other = fit(Trace(shuffled, trace.meta), kind="episodes")
    wrong = bench.check(other.classes[0], 0)
    assert wrong.worst > 2 * right.worst


def test_lindley_by_hand():
    """Three requests of 1 s of work at 0, 0.5 and 5 s, served at the load 1 of the bench's speed."""
    rows = pl.DataFrame(
        {"request_tokens": [1, 1, 1], "response_tokens": [1, 1, 1], "failed": [False] * 3, "arrival": [0.0, 0.5, 5.0]}
    )
    bench = Bench(rows["arrival"].to_numpy(), rows, 10.0)
    # A second of prompt work is 0.3 tokens: at load 0.03 each takes 0.1 s, and nobody waits.
    assert np.exp(bench.real[0]) == pytest.approx([0.1, 0.1, 0.1])
    # At load 0.8 it takes 2.667 s: the second waits 2.167 s.
    stays = np.array([8 / 3, 8 / 3 * 2 - 0.5, 8 / 3 * 3 - 5])
    assert np.exp(bench.real[3, 0]) == pytest.approx(stays.mean())
    assert OFF.size == bench.real.shape[1]


def test_longer_draws_go_on_with_parts_of_the_course(trace, model):
    long = generate(model, duration=3 * model.span, seed=2)
    assert len(long) == pytest.approx(3 * len(trace), rel=0.25)
    assert long.table["arrival"].is_sorted()
    assert generate(model, duration=3 * model.span, seed=2).table.equals(long.table)
    ends = generate(model, start=2.5 * model.span, duration=model.span, seed=2)
    assert 0 <= ends.table["arrival"][0] <= ends.table["arrival"][-1] <= model.span
    for factor in (0.3, 10):
        scaled = generate(model, rate=factor * model.mean_rate, seed=2)
        assert len(scaled) == pytest.approx(factor * len(trace), rel=0.02)
    days = Trace.of(
        {"arrival": np.sort(np.random.default_rng(1).random(2000)) * 1.5 * 86400, "request_tokens": [5] * 2000,
         "response_tokens": [5] * 2000},
        TraceMeta(source="days", format="test"),
    )  # fmt: skip
    daily = fit(days, kind="episodes").classes[0].arrivals
    # After a day and a half comes the model's second half of a day, and then whole days.
    blocks = daily._schedule(0.0, 4 * 86400, 0)
    assert blocks.shift == pytest.approx([0.0, 86400, 2 * 86400, 3 * 86400], rel=0.01)
    assert (blocks.last - blocks.first)[0] == 2000


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


def test_large_classes_are_held_in_cells(trace, monkeypatch):
    monkeypatch.setattr("squall.workload.episodes.MOST_CELLS", 1000)
    arrival = trace.table["arrival"].to_numpy()
    lengths = (trace.table[name].to_numpy() for name in ("request_tokens", "response_tokens"))
    span = float(arrival[-1]) + 1
    known = np.ones(len(trace), bool)
    cells = fit_episodes(arrival, known, *lengths, span, tick=None, rng=np.random.default_rng(1))
    assert cells.cell == 6
    assert len(cells.time) == len(cells.last) == 1000
    times = cells._times
    assert times[::6] == pytest.approx(arrival[::6], abs=1e-3)
    for scale, index in dispersion(arrival, (1.0, 10.0, 60.0), 0.0, span):
        assert dispersion(times, (scale,), 0.0, span)[0][1] == pytest.approx(index, rel=0.05)


def test_lengths_move_with_time_in_classes_with_sessions(trace):
    sessions = trace.replace(trace.table.with_columns(session=pl.Series(np.arange(len(trace)) // 3, dtype=pl.Int64)))
    sessions = Trace.of(sessions.table.drop("turn"), trace.meta)
    drawn = generate(fit(sessions, kind="episodes"), seed=1)
    assert drawn.table["session"].null_count() == 0
    owner = np.arange(len(trace)) // 60
    means = [np.bincount(owner, one.table["request_tokens"].to_numpy()) / 60 for one in (trace, drawn)]
    assert np.corrcoef(*means)[0, 1] > 0.9


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


@pytest.mark.parametrize(
    "change",
    [
        {"requests": 7}, {"time": [1.0, 0.5]}, {"cell": 0}, {"freedom": 2.0}, {"tick": 0.0}, {"period": 0.0},
        {"last": [1.0]},
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


def test_a_part_may_begin_at_a_time_that_the_model_has_rounded_down():
    course = Episodes(
        span=20.0, period=20.0, freedom=0.5, tick=None, requests=3, cell=1, time=[1.0, 5.0, 9.0], last=[], lengths=None
    )
    part = course.part(slice(1, 3), 5.0 + 1e-7, 12.0)
    assert part.time == [0.0, pytest.approx(4.0, abs=1e-6)]
