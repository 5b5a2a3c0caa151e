"""Drawing piece by piece: the rows do not depend on the portions, memory does not grow, and the numbers are right."""

import heapq
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squall import read_trace
from squall.characterize.concurrency import dispersion
from squall.errors import InputError
from squall.trace import SCHEMA
from squall.workload import generate, generate_file
from squall.workload.compiled.lookup import normal, normal_quantile
from squall.workload.compiled.order import in_order, places
from squall.workload.compiled.renewal import same_rank
from squall.workload.concurrency import Path
from squall.workload.conversations import Seating, Sessions
from squall.workload.drawing import asked, rows
from squall.workload.failures import Failures, Striking
from squall.workload.inversion import interpolate
from squall.workload.lengths import Quantiles
from squall.workload.process import GAMMA, WEIBULL, RenewalProcess, parts, variation
from squall.workload.profiles import named_workload
from squall.workload.tally import Tally, as_json, tally_of


def test_the_rows_do_not_depend_on_the_portions():
    draw = asked("burstgpt://all", duration="12h", requests=None, rate=3.0, start="8h", seed=2)
    whole = pl.concat(rows(draw))
    assert whole["arrival"].is_sorted()
    for portion in (977, 20_000):
        frames = list(rows(draw, portion))
        assert max(map(len, frames)) == portion
        assert pl.concat(frames).equals(whole)


def test_a_file_holds_what_memory_holds(tmp_path):
    out = tmp_path / "t.parquet"
    tally = generate_file("burstgpt://all", out, requests=3_000, rate=2.0, seed=5)
    trace = generate("burstgpt://all", requests=3_000, rate=2.0, seed=5)
    assert read_trace(out).table.equals(trace.table)
    assert read_trace(out).meta == trace.meta == tally.meta
    assert trace.meta.rows == tally.requests == 3_000
    first = out.read_bytes()
    generate_file("burstgpt://all", out, requests=3_000, rate=2.0, seed=5)
    assert out.read_bytes() == first
    for name in ("t.csv", "t.jsonl"):
        generate_file("burstgpt://all", tmp_path / name, requests=3_000, rate=2.0, seed=5)
        read = read_trace(tmp_path / name).table
        assert read["request_tokens"].equals(trace.table["request_tokens"])


def test_a_draw_that_fails_leaves_no_file(tmp_path):
    with pytest.raises(InputError, match="no request arrives"):
        generate_file("burstgpt://gpt4-conversation", tmp_path / "t.parquet", duration=1e-3)
    assert not list(tmp_path.iterdir())


def test_sessions_of_several_classes_differ_and_cross_portions():
    draw = asked("burstgpt://all", duration="2d", requests=None, rate=None, start=None, seed=1)
    frames = list(rows(draw, 1_000))
    known = pl.concat(frames).filter(pl.col("session").is_not_null())
    assert known.select("session", "model").unique()["session"].is_unique().all()
    seen: set[int] = set()
    crossing = 0
    for frame in frames:
        now = set(frame["session"].drop_nulls())
        crossing += len(now & seen)
        seen |= now
    assert crossing > 100
    turns = known.sort("session", "turn").select(first=pl.col("turn").first().over("session"))["first"]
    assert (turns == 1).all()


MEMORY = """
import sys
from squall.workload import generate_file
for size in (2_000_000, 5_000_000):
    generate_file("burstgpt://chatgpt-api", sys.argv[1], requests=size)
    # Not ru_maxrss: a child begins with that of the process which forked it.
    print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


def test_memory_does_not_grow_with_the_draw(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "t.parquet")], check=True, capture_output=True, text=True
    )
    small, large = (int(line) for line in done.stdout.split())
    # Three million rows of 50 bytes would be 150 MB.
    assert large - small < 100_000
    assert large < 1_500_000


# ------------------------------------------------------------------------------------------------- each against oracles


def slow_seats(arrivals, wanted, newcomer, pause):
    """Session and turn of each arrival, with a heap of (time, session)."""
    session, turn, taken, due, waiting = [], [], [], [], []
    for i, time in enumerate(arrivals):
        reach = (time + arrivals[i + 1]) / 2 if i + 1 < len(arrivals) else time
        while due and due[0][0] <= reach:
            waiting.append(heapq.heappop(due)[1])
        one = waiting.pop() if waiting and not newcomer[i] else len(taken)
        if one == len(taken):
            taken.append(0)
            wanted_of = wanted[i]
            taken[one] = [0, wanted_of]
        taken[one][0] += 1
        session.append(one)
        turn.append(taken[one][0])
        if taken[one][0] < taken[one][1]:
            heapq.heappush(due, (time + pause[i], one))
    return session, turn


def conversations():
    return named_workload("chatgpt-conversation").classes[0].conversations


def test_seating_is_what_a_heap_of_sessions_does():
    law = conversations()
    rng = np.random.default_rng(3)
    arrivals = np.cumsum(rng.exponential(3.0, 6_000))
    chance = rng.random((arrivals.size, 3))
    goal = np.array(law.gap.values)
    session, turn, _ = Sessions().take(law, arrivals, chance, np.zeros(arrivals.size), goal)
    wanted = np.searchsorted(-np.array(law.survival[1:]), -chance[:, 0], side="left") + 1
    pause = np.interp(chance[:, 2], law.gap.levels, goal)
    theirs = slow_seats(arrivals.tolist(), wanted, chance[:, 1] < 0.1 / law.mean_turns, pause)
    assert (session.tolist(), turn.tolist()) == theirs


def test_sessions_go_on_in_the_next_piece():
    law = conversations()
    arrivals = np.cumsum(np.random.default_rng(4).exponential(3.0, 60_000))
    seating = Seating(law, np.random.default_rng(5))
    pieces = [seating.seat(part) for part in np.split(arrivals, [25_000, 25_000, 41_000])]
    session, turn = (np.concatenate(columns) for columns in list(zip(*pieces, strict=True))[:2])
    order = np.lexsort((np.arange(session.size), session))
    new = np.diff(session[order], prepend=-1) != 0
    assert (turn[order][new] == 1).all()
    assert (np.diff(turn[order])[~new[1:]] == 1).all()
    whole, *_ = Seating(law, np.random.default_rng(5)).seat(arrivals)
    # The last arrival of a piece does not see the next one: three of 60,000 requests may be seated differently.
    assert np.bincount(np.bincount(session))[1:8] == pytest.approx(np.bincount(np.bincount(whole))[1:8], rel=0.05)


def test_failures_go_on_in_the_next_piece():
    law = Failures(0.1, 0.5, 200.0, Quantiles([0, 1], [5, 9]))
    arrivals = np.sort(np.random.default_rng(6).uniform(0, 2e5, 50_000))
    striking = Striking(law, np.random.default_rng(7))
    failed = np.concatenate([striking.strike(part) for part in np.array_split(arrivals, 70)])
    assert failed.mean() == pytest.approx(0.1, rel=0.25)  # 200 outages: their number varies by 7 %, their sum by 10 %
    # A failure soon after a failure: severity, wherever the pieces are cut.
    assert failed[1:][failed[:-1]].mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("law", "shape"), [(GAMMA, 0.3), (GAMMA, 4.0), (WEIBULL, 0.5), (WEIBULL, 3.0)])
def test_gaps_have_the_cv_of_their_law(law, shape):
    path = Path(np.linspace(0, 50_000, 21), np.full(20, 4.0), np.full(20, shape))
    process = RenewalProcess(np.random.default_rng(1))
    pieces = [process.along(piece, np.full(piece.rate.size, law)) for piece in parts(path, 7_000)]
    assert len(pieces) > 20
    gaps = np.diff(np.concatenate(pieces))
    assert gaps.min() >= 0
    cv = variation(law, shape)
    assert gaps.mean() == pytest.approx(0.25, rel=4 * cv / np.sqrt(gaps.size))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03)


def test_windows_of_changing_laws_expect_their_rates():
    rates, shapes = np.array([0.5, 2.0, 1.0, 0.0] * 10), np.array([0.2, 0.5, 3.0, 1.0] * 10)
    laws = np.array([GAMMA, WEIBULL, WEIBULL, GAMMA] * 10)
    path = Path(np.arange(41) * 5.0, rates, shapes)
    rng = np.random.default_rng(2)
    draws = np.array(
        [np.bincount((RenewalProcess(rng).along(path, laws) // 5).astype(int), minlength=40) for _ in range(2_000)]
    )
    for kind in range(4):
        means = draws[:, kind::4].mean(1)
        assert means.mean() == pytest.approx(rates[kind] * 5, abs=4.5 * means.std() / np.sqrt(2_000))


@settings(max_examples=60, deadline=None)
@given(st.floats(1.001, 1e5), st.floats(1.001, 1e5), st.floats(1e-6, 1 - 1e-6))
def test_the_rank_is_kept_between_gamma_laws(before, after, rank):
    from scipy.special import gammainc, gammaincinv

    x = float(gammaincinv(before, rank))
    found = same_rank(before, x, after)
    assert gammainc(after, found) == pytest.approx(gammainc(before, x), rel=1e-6, abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3, allow_subnormal=False), min_size=2, max_size=60, unique=True), st.integers(0, 99))
def test_looking_up_is_what_numpy_does_bit_for_bit(points, seed):
    table = np.sort(points)
    rng = np.random.default_rng(seed)
    values = rng.random(table.size)
    x = np.concatenate([rng.uniform(table[0] - 1, table[-1] + 1, 20_000), table])
    assert (interpolate(x, table, values) == np.interp(x, table, values)).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.one_of(st.floats(0, 1e6), st.integers(0, 3).map(float))), min_size=1, max_size=12))
def test_merged_runs_are_in_stable_order(runs):
    together = np.concatenate([np.sort(np.array(run, float)) for run in runs])
    order = np.argsort(together, kind="stable")
    assert in_order(together).tolist() == order.tolist()
    place = places(together, np.cumsum([0, *map(len, runs)]))
    assert place[order].tolist() == list(range(order.size))


def test_the_normal_law_is_that_of_scipy():
    from scipy.special import ndtr, ndtri

    x = np.linspace(-8.4, 8.4, 2_001)
    assert [normal(one) for one in x] == pytest.approx(ndtr(x), abs=2e-10)
    p = np.concatenate([10.0 ** -np.arange(1, 15), np.linspace(0.01, 0.99, 99), 1 - 10.0 ** -np.arange(1, 9)])
    assert [normal_quantile(one) for one in p] == pytest.approx(ndtri(p), rel=1e-12)


def test_a_column_of_nothing_takes_no_room_and_is_read_back(tmp_path):
    out = tmp_path / "t.parquet"
    trace = generate("burstgpt://chatgpt-api", requests=2_000, rate=5.0, out=out)
    stored = pl.read_parquet_schema(out)
    assert [stored[name] for name in ("session", "turn", "elapsed", "prefix")] == [pl.Null] * 4
    assert read_trace(out).table.equals(trace.table)
    assert read_trace(out).table.schema == trace.table.schema == SCHEMA


def test_a_tally_is_what_the_whole_table_says():
    draw = asked("burstgpt://all", duration="1d", requests=None, rate=0.3, start=None, seed=4)
    tally = Tally()
    table = pl.concat(tally.seeing(rows(draw, 333)))
    arrival, answered = table["arrival"].to_numpy(), table.filter(~pl.col("failed"))
    gaps = np.diff(arrival)
    assert tally.gap_cv == pytest.approx(gaps.std() / gaps.mean())
    assert dict(tally.dispersion) == pytest.approx(dict(dispersion(arrival)), rel=1e-9)
    for name in ("request_tokens", "response_tokens"):
        found = as_json(tally)[name]
        assert [found[p] for p in ("p50", "p90", "p99", "max")] == pytest.approx(
            np.quantile(answered[name], [0.5, 0.9, 0.99, 1.0]).tolist()
        )
        assert found["mean"] == pytest.approx(answered[name].mean())
    assert dict(tally_of(table).dispersion) == pytest.approx(dict(tally.dispersion), rel=1e-9)
