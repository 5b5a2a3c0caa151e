"""Metrics against hand-made runs with known answers, and against a slow, obvious version on drawn runs."""

import math
import time
from collections import Counter, defaultdict
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squall.errors import InputError
from squall.run import Metrics, Run, RunMeta, metrics
from squall.run.metrics import Statistic, statistic, upper_bound

# What scripts of other people rely on (docs/metrics.md).
KEYS = (
    "requests succeeded failed errors duration offered_rate throughput output_token_throughput goodput goodput_share "
    "verdict ttft tpot itl e2e from_send lateness jitter windows kv_cache preemptions"
)


def run_of(rows: list[dict[str, Any]], series: dict[str, Any] | None = None, **meta: Any) -> Run:
    """A run of rows that name only what they are about."""
    names = sorted({name for row in rows for name in row})
    columns = {name: [row.get(name) for row in rows] for name in names}
    meta = {"kind": "replay", "offered": len({row["request"] for row in rows})} | meta
    return Run.of(columns, RunMeta(**meta), series)


def answer(request: int, scheduled: float, first: float, last: float, tokens: int, **more: Any) -> dict[str, Any]:
    times = {"scheduled": scheduled, "sent": scheduled, "first_token": first, "last_token": last, "ended": last}
    return {"request": request, "attempt": 1, "status": "ok", "response_tokens": tokens, **times, **more}


def failure(request: int, scheduled: float, status: str, ended: float, **more: Any) -> dict[str, Any]:
    return {"request": request, "attempt": 1, "scheduled": scheduled, "status": status, "ended": ended, **more}


def test_one_request_by_hand() -> None:
    row = answer(0, 10.0, 11.5, 13.5, 5, sent=10.5, request_tokens=100, done=13.6, ended=13.6)
    found = metrics(run_of([row]), slo="ttft=1s,e2e=4s")
    assert found.ttft == Statistic(n=1, mean=1.5, max=1.5)  # one value supports no percentile
    assert found.tpot.mean == pytest.approx(0.5)
    assert found.e2e.mean == pytest.approx(3.5)
    assert found.e2e.mean == pytest.approx(found.ttft.mean + 4 * found.tpot.mean)
    assert found.from_send.ttft.mean == pytest.approx(1.0)
    assert found.from_send.e2e.mean == pytest.approx(3.0)
    assert found.lateness.mean == pytest.approx(0.5)
    assert found.duration == pytest.approx(3.6)
    assert found.throughput == pytest.approx(1 / 3.6)
    assert found.output_token_throughput == pytest.approx(5 / 3.6)
    assert found.input_token_throughput == pytest.approx(100 / 3.6)
    assert found.goodput_share == 0.0  # too late from schedule …
    assert found.from_send.goodput_share == 1.0  # … but not from send
    assert found.offered_rate is None  # one arrival has no rate


def test_failures_stay_in_the_denominators() -> None:
    rows = [answer(k, float(k), k + 0.5, k + 1.0, 2) for k in range(6)]
    rows += [failure(6, 6.0, "timeout", 16.0, reason="first"), failure(7, 7.0, "timeout", 17.0, reason="first")]
    rows += [failure(8, 8.0, "http_error", 8.1, http_status=503, message="busy")]
    found = metrics(run_of(rows, offered=10), slo="ttft=1s")
    assert (found.requests, found.succeeded, found.failed) == (10, 6, 4)
    assert found.errors == {"timeout": 2, "http_error": 1, "unrecorded": 1}
    assert [(f.status, f.reason, f.http_status, f.requests, f.share, f.example) for f in found.failures] == [
        ("timeout", "first", None, 2, 0.2, 6),
        ("http_error", None, 503, 1, 0.1, 8),
    ]
    assert found.failures[1].message == "busy"
    assert found.goodput_share == pytest.approx(0.6)
    assert found.goodput == pytest.approx(6 / 17)
    assert found.ttft.n == 6
    assert found.of_offered.ttft.p50 == pytest.approx(0.5)
    assert found.of_offered.ttft.p90 is None  # the 90th of 100 was never answered
    assert found.offered_rate == pytest.approx(1.0)


def test_a_percentile_beyond_the_answers_is_at_least_what_was_waited() -> None:
    rows = [answer(k, float(k), k + 0.5, k + 1.0, 2) for k in range(80)]
    rows += [failure(k, float(k), "timeout", k + 60.0, sent=float(k), reason="total") for k in range(80, 100)]
    found = metrics(run_of(rows)).of_offered
    assert (found.ttft.p50, found.ttft.p90, found.ttft.p99) == (0.5, None, None)
    assert found.ttft.at_least == {"p90": 60.0, "p95": 60.0, "p99": 60.0}
    rows[-3:] = [failure(k, float(k), "http_error", k + 0.1, sent=float(k)) for k in range(97, 100)]
    assert metrics(run_of(rows)).of_offered.e2e.at_least == {"p90": 60.0, "p95": 60.0, "p99": None}  # refused: never
    rows[80] = failure(80, 80.0, "timeout", 140.0, sent=80.0, first_token=110.0, response_tokens=3)
    assert metrics(run_of(rows)).of_offered.ttft.at_least["p90"] == 60.0  # its first token had come after 30 s


def test_what_came_in_one_read_has_no_tpot() -> None:
    rows = [answer(0, 0.0, 1.0, 1.0, 8), answer(1, 1.0, 2.0, 3.0, 11), answer(2, 2.0, 3.0, 3.0001, 11)]
    found = metrics(run_of(rows), slo="tpot=200ms")
    assert (found.at_once, found.too_fast) == (1, 1)
    assert found.tpot.n == 2
    assert found.goodput_share == 1.0
    assert "one read" in found.notes[0]
    assert "below 50" in found.notes[1]


def test_a_server_that_fell_behind_is_told() -> None:
    rows = [answer(k, float(k), 1.4 * k + 1, 1.4 * k + 2, 2) for k in range(200)]
    found = metrics(run_of(rows))
    assert found.backlog is not None
    assert found.backlog.grows
    assert "fell behind" in found.notes[-1]
    assert metrics(run_of(rows, open_loop=False)).backlog is None


def test_latency_spans_attempts() -> None:
    """REPLAY: retries are left out of arrival statistics, and a user waits from the first schedule to the last end."""
    first = failure(0, 1.0, "reset", 1.2, sent=1.1)
    second = answer(0, 2.0, 3.0, 4.0, 3, sent=2.5, attempt=2)
    other = answer(1, 2.0, 2.5, 3.0, 2)
    for rows in ([first, second, other], [other, second, first]):
        found = metrics(run_of(rows))
        assert (found.requests, found.succeeded, found.failed, found.attempts) == (2, 2, 0, 3)
        assert found.errors == {}
        assert found.ttft.max == pytest.approx(2.0)
        assert found.e2e.max == pytest.approx(3.0)
        assert found.from_send.ttft.mean == pytest.approx(0.5)
        assert found.lateness.max == pytest.approx(0.1)
        assert found.offered_rate == pytest.approx(1.0)


def test_a_request_whose_last_attempt_failed_has_failed() -> None:
    rows = [failure(0, 0.0, "reset", 1.0), failure(0, 1.0, "http_error", 2.0, attempt=2, http_status=500)]
    found = metrics(run_of(rows), slo="ttft=1s")
    assert found.errors == {"http_error": 1}
    assert found.goodput_share == 0.0


def test_an_empty_answer_is_shown_apart_and_is_no_goodput() -> None:
    empty = {"request": 0, "attempt": 1, "scheduled": 0.0, "sent": 0.0, "status": "ok", "done": 1.0, "ended": 1.0}
    found = metrics(run_of([empty | {"response_tokens": 0}, answer(1, 0.0, 0.5, 0.5, 1)]), slo="e2e=10s,tpot=1ms")
    assert (found.succeeded, found.empty) == (2, 1)
    assert found.ttft.n == 1
    assert found.e2e.n == 2
    assert found.tpot.n == 0  # a single token has no gap, and meets any limit on gaps
    assert found.goodput_share == 0.5


def test_token_gaps_and_jitter_by_hand() -> None:
    one_by_one = answer(0, 0.0, 1.0, 1.7, 4, chunks=[0.0, 0.1, 0.4, 0.7])
    in_pairs = answer(1, 0.0, 1.0, 2.2, 7, chunks=[0.0, 0.2, 0.6, 1.2])  # 6 tokens in 3 reads: gaps 0.1, 0.2, 0.3
    found = metrics(run_of([one_by_one, in_pairs]))
    assert found.itl.n == 6
    assert found.itl.mean == pytest.approx((0.1 + 0.3 + 0.3 + 2 * (0.1 + 0.2 + 0.3)) / 9)
    assert found.itl.max == pytest.approx(0.3)
    assert found.tokens_per_read == pytest.approx(1.5)
    assert found.jitter.n == 2
    assert found.jitter.mean == pytest.approx(((0.2 + 0.0) / 2 + (0.1 + 0.1) / 2) / 2)


def test_without_reads_there_is_no_itl_and_no_jitter() -> None:
    found = metrics(run_of([answer(0, 0.0, 1.0, 2.0, 10), answer(1, 0.0, 1.0, 1.0, 1, chunks=[0.0])]))
    assert found.itl == found.jitter == Statistic()
    assert found.tokens_per_read is None
    assert found.tpot.n == 1


def test_windows_and_their_drift() -> None:
    rows = [answer(0, 0.0, 1.0, 2.0, 4), answer(1, 5.0, 8.0, 12.0, 6), failure(2, 25.0, "timeout", 29.0)]
    found = metrics(run_of(rows), window="10s")
    assert [w.start for w in found.windows] == [0.0, 10.0, 20.0]
    assert [(w.offered, w.succeeded, w.failed) for w in found.windows] == [(2, 2, 0), (0, 0, 0), (1, 0, 1)]
    assert [w.rate for w in found.windows] == [0.2, 0.0, 0.1]
    assert [w.throughput for w in found.windows] == [0.1, 0.1, 0.0]
    assert [w.output_token_throughput for w in found.windows] == [0.4, 0.6, 0.0]
    assert [w.ttft_mean for w in found.windows] == [2.0, None, None]
    assert [w.ttft_p50 for w in found.windows] == [2.0, None, None]
    assert [w.ttft_p99 for w in found.windows] == [None, None, None]
    assert found.window_jitter == {"ttft": None, "e2e": None}
    steady = metrics(run_of([answer(k, 10.0 * k, 10.0 * k + k, 10.0 * k + k, 1) for k in range(3)]), window="10s")
    assert steady.window_jitter == {"ttft": pytest.approx(1.0), "e2e": pytest.approx(1.0)}


def test_the_kv_cache_is_weighted_by_time() -> None:
    series = {"time": [1.0, 2.0, 5.0], "kv_used": [0.2, 0.4, 0.8], "preemptions": [0, 1, 2]}
    found = metrics(run_of([answer(0, 0.0, 1.0, 2.0, 4)], series))
    assert found.kv_cache.peak == 0.8
    assert found.kv_cache.mean == pytest.approx((2.0 * 0.2 + 1 * 0.4 + 3 * 0.8) / 6)  # the first sample: a usual one
    assert found.preemptions == 3
    assert metrics(run_of([answer(0, 0.0, 1.0, 2.0, 4, preemptions=7)], series)).preemptions == 7
    assert metrics(run_of([answer(0, 0.0, 1.0, 2.0, 4)])).preemptions is None


def test_a_percentile_needs_a_value_above_it() -> None:
    supported = {n: statistic(np.arange(n, dtype=float)) for n in (0, 1, 2, 9, 10, 19, 20, 99, 100)}
    assert [n for n, s in supported.items() if s.p50 is not None] == [2, 9, 10, 19, 20, 99, 100]
    assert [n for n, s in supported.items() if s.p90 is not None] == [10, 19, 20, 99, 100]
    assert [n for n, s in supported.items() if s.p95 is not None] == [20, 99, 100]
    assert [n for n, s in supported.items() if s.p99 is not None] == [100]
    assert supported[100].p99 == pytest.approx(98.01)
    assert supported[0] == Statistic()
    assert supported[1].std is None


def test_weights_are_repetitions() -> None:
    values, weights = np.array([3.0, 1.0, 2.0]), np.array([1.0, 5.0, 2.0])
    weighted, repeated = statistic(values, weights), np.repeat(values, weights.astype(int))
    assert weighted.n == 3
    assert weighted.mean == pytest.approx(repeated.mean())
    assert weighted.p50 == 1.0
    assert weighted.max == 3.0


@pytest.mark.parametrize("rows", [[], [failure(0, 0.0, "refused", 0.1), failure(1, 1.0, "refused", 1.1)]])
def test_runs_without_an_answer_give_nulls(rows: list[dict[str, Any]]) -> None:
    run = run_of(rows) if rows else Run.of({}, RunMeta(kind="replay"))
    found = metrics(run, slo="ttft=1s,tpot=1s,e2e=1s")
    assert found.ttft == found.tpot == found.itl == found.e2e == found.jitter == Statistic()
    assert found.of_offered.ttft.p50 is None
    assert found.succeeded == 0
    assert found.failed == len(rows)
    assert found.goodput_share == (0.0 if rows else None)
    assert found.output_token_throughput is None or found.output_token_throughput == 0
    msgspec.json.encode(found)


def test_never_sent_is_not_lateness_zero() -> None:
    found = metrics(run_of([failure(0, 0.0, "cancelled", 0.0, reason="no_prompt"), answer(1, 0.0, 1.0, 1.0, 1)]))
    assert found.lateness.n == 1


def test_without_an_slo_there_is_no_goodput() -> None:
    found = metrics(run_of([answer(0, 0.0, 1.0, 2.0, 4)]))
    assert found.slo is found.goodput is found.goodput_share is found.from_send.goodput_share is None


@pytest.mark.parametrize("window", ["0s", "1ms"])
def test_windows_that_make_no_sense(window: str) -> None:
    with pytest.raises(InputError, match="--window"):
        metrics(run_of([answer(0, 0.0, 1.0, 20000.0, 4)]), window=window)


def test_json_has_the_promised_keys() -> None:
    document = msgspec.json.decode(msgspec.json.encode(metrics(run_of([answer(0, 0.0, 1.0, 2.0, 4)]), slo="ttft=2s")))
    assert set(KEYS.split()) <= set(document)
    assert set(document["ttft"]) == {"n", "mean", "std", "p50", "p90", "p95", "p99", "max"}
    assert {"ttft", "e2e"} <= set(document["from_send"])
    assert document["slo"] == {"ttft": 2.0}


# --- the slow, obvious version ------------------------------------------------------------------------------------


def plain_percentile(values: list[float], p: int) -> float | None:
    if len(values) * (100 - p) < 100:
        return None
    ordered = sorted(values)
    place = p / 100 * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def plain_statistic(values: list[float]) -> dict[str, float | None]:
    n = len(values)
    mean = sum(values) / n if n else None
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else None
    found = {"n": n, "mean": mean, "std": std, "max": max(values) if n else None}
    return found | {f"p{p}": plain_percentile(values, p) for p in (50, 90, 95, 99)}


def plain_metrics(rows: list[dict[str, Any]], ttft_limit: float, tpot_limit: float) -> dict[str, Any]:
    by_request: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_request[row["request"]].append(row)
    ttft, tpot, e2e, late, jitter, itl = [], [], [], [], [], []
    errors: Counter[str] = Counter()
    met = tokens = 0
    for attempts in by_request.values():
        attempts.sort(key=lambda row: row["attempt"])
        first, last = attempts[0], attempts[-1]
        if first.get("sent") is not None:
            late.append(first["sent"] - first["scheduled"])
        if last["status"] != "ok":
            errors[last["status"]] += 1
            continue
        tokens += last["response_tokens"]
        ttft.append(last["first_token"] - first["scheduled"])
        e2e.append(last["last_token"] - first["scheduled"])
        gap = None
        if last["response_tokens"] > 1 and last["last_token"] > last["first_token"]:
            gap = (last["last_token"] - last["first_token"]) / (last["response_tokens"] - 1)
            tpot.append(gap)
        met += ttft[-1] <= ttft_limit and (gap is None or gap <= tpot_limit)
    for row in rows:
        reads = row.get("chunks") or []
        if row["status"] == "ok" and len(reads) > 1:
            spread = (row["response_tokens"] - 1) / (len(reads) - 1) if row["response_tokens"] > 1 else 1.0
            gaps = [(b - a) / spread for a, b in pairwise(reads)]
            itl += [(gap, spread) for gap in gaps]
            steps = [abs(b - a) for a, b in pairwise(gaps)]
            if steps:
                jitter.append(sum(steps) / len(steps))
    return {
        "requests": len(by_request),
        "errors": dict(errors),
        "tokens": tokens,
        "met": met,
        "ttft": plain_statistic(ttft),
        "tpot": plain_statistic(tpot),
        "e2e": plain_statistic(e2e),
        "lateness": plain_statistic(late),
        "jitter": plain_statistic(jitter),
        "itl_mean": sum(g * w for g, w in itl) / sum(w for _, w in itl) if itl else None,
        "itl_n": len(itl),
    }


moment = st.floats(0, 50, allow_nan=False).map(lambda x: round(x, 3))


@st.composite
def attempts_of_a_request(draw: st.DrawFn, request: int) -> list[dict[str, Any]]:
    rows = []
    at = draw(moment)
    for attempt in range(1, draw(st.integers(1, 3)) + 1):
        rows.append(
            failure(request, at, draw(st.sampled_from(["reset", "timeout", "http_error"])), at + 1, attempt=attempt)
        )
        if draw(st.booleans()):
            rows[-1]["sent"] = at + draw(moment) / 100
        at += 1
    if draw(st.booleans()):
        sent = at + draw(moment) / 100
        first = sent + draw(moment)
        steps = draw(st.lists(st.floats(0, 2, allow_nan=False), max_size=6))
        reads = [0.0, *np.cumsum(steps).tolist()]
        tokens = draw(st.integers(1, 20)) if steps else 1
        attempt = rows[-1]["attempt"]
        chunks = reads if draw(st.booleans()) else None
        rows[-1] = answer(request, at - 1, first, first + reads[-1], tokens, sent=sent, attempt=attempt, chunks=chunks)
    return rows


@st.composite
def drawn_rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    requests = draw(st.integers(1, 25))
    rows = [row for request in range(requests) for row in draw(attempts_of_a_request(request))]
    return draw(st.permutations(rows))


def agree(found: Statistic, expected: dict[str, float | None]) -> None:
    for name, value in expected.items():
        assert getattr(found, name) == (value if value is None else pytest.approx(value, abs=1e-9)), name


@settings(max_examples=150, deadline=None)
@given(drawn_rows())
def test_agrees_with_the_obvious_version(rows: list[dict[str, Any]]) -> None:
    found, expected = metrics(run_of(rows), slo="ttft=20s,tpot=300ms"), plain_metrics(rows, 20.0, 0.3)
    assert found.requests == expected["requests"]
    assert found.errors == expected["errors"]
    assert found.succeeded + sum(found.errors.values()) == found.requests
    for name in ("ttft", "tpot", "e2e", "lateness", "jitter"):
        agree(getattr(found, name), expected[name])
    assert found.itl.n == expected["itl_n"]
    if expected["itl_n"]:
        assert found.itl.mean == pytest.approx(expected["itl_mean"])
    assert found.goodput_share == pytest.approx(expected["met"] / expected["requests"])
    if found.duration:
        assert (found.output_token_throughput or 0) * found.duration == pytest.approx(expected["tokens"])
    assert sum(w.offered for w in found.windows) == found.requests
    assert sum(w.failed for w in found.windows) == found.failed


@settings(max_examples=50, deadline=None)
@given(drawn_rows())
def test_the_order_of_the_rows_does_not_matter(rows: list[dict[str, Any]]) -> None:
    assert plain(metrics(run_of(rows))) == roughly(plain(metrics(run_of(rows[::-1]))))


def plain(found: Metrics) -> dict[str, Any]:
    """The metrics without what names an example."""
    return {key: value for key, value in msgspec.to_builtins(found).items() if key != "failures"}


def roughly(value: Any) -> Any:
    """`value` for comparison up to the order of summation."""
    if isinstance(value, dict):
        return {key: roughly(part) for key, part in value.items()}
    if isinstance(value, list):
        return [roughly(part) for part in value]
    return pytest.approx(value, rel=1e-9, abs=1e-9) if isinstance(value, float) else value


def test_a_million_attempts_take_seconds() -> None:
    n = 1_000_000
    rng = np.random.default_rng(0)
    scheduled = np.sort(rng.uniform(0, 36000, n))
    first = scheduled + rng.exponential(1.0, n)
    tokens = rng.integers(1, 500, n)
    last = first + (tokens - 1) * 0.02
    columns = {"request": np.arange(n), "attempt": np.ones(n, int), "scheduled": scheduled, "sent": scheduled}
    columns |= {"first_token": first, "last_token": last, "ended": last, "response_tokens": tokens}
    run = Run.of({**columns, "status": pl.repeat("ok", n, eager=True)}, RunMeta(kind="simulation", offered=n))
    begun = time.process_time()
    assert metrics(run, slo="ttft=1s").requests == n
    assert time.process_time() - begun < 6  # CPU seconds of all cores; measured 0.6 s of wall clock


def test_a_run_of_months_has_windows_of_minutes():
    def of(days: float) -> Metrics:
        due = [0.0, days * 86400.0]
        table = {"request": [0, 1], "attempt": [1, 1], "scheduled": due, "sent": due, "first_token": due}
        ends = {"last_token": due, "done": due, "ended": due, "status": ["ok", "ok"]}
        return metrics(Run.of({**table, **ends}, RunMeta(kind="simulation", offered=2)))

    assert of(5).window == 60
    assert of(500).window % 60 == 0
    assert 5000 < len(of(500).windows) <= 10_001


@pytest.mark.parametrize(("share", "fewest"), [(0.9, 64), (0.95, 130), (0.99, 662)])  # MLPerf's numbers
def test_an_upper_bound_needs_as_many_requests_as_mlperf_says(share, fewest):
    assert upper_bound(np.arange(fewest - 1.0), fewest - 1, share) is None
    assert upper_bound(np.arange(float(fewest)), fewest, share) == fewest - 2  # all but the highest lie below it


def test_an_upper_bound_holds_as_often_as_it_says():
    draws = np.sort(np.random.default_rng(0).exponential(size=(2000, 800)), axis=1)
    held = [upper_bound(values, 800, 0.95) >= -np.log(0.05) for values in draws]
    # 99 % at least; the discreteness of 800 draws gives 99.2 %, and the error of 2,000 trials is 0.2 %.
    assert 0.986 < np.mean(held) < 0.998


def test_failures_raise_an_upper_bound_and_take_it_away():
    values = np.arange(1000.0)
    bounds = [upper_bound(values[: 1000 - failed], 1000, 0.9) for failed in (0, 50, 200)]
    assert bounds[0] == bounds[1]  # the failed ones lie above all others: here they were the highest anyway
    assert bounds[0] > 900
    assert bounds[2] is None  # a fifth was never answered: P90 has no bound
    assert upper_bound(np.zeros(0), 0, 0.9) is None


def test_between_counts_what_was_scheduled_in_that_time():
    at = np.arange(100.0)
    columns = {"request": range(100), "attempt": [1] * 100, "status": ["ok"] * 100, "scheduled": at, "sent": at}
    run = Run.of(columns | {"first_token": at + np.where(at < 20, 5, 0.5)}, RunMeta(kind="replay", offered=100))
    whole, steady = metrics(run), metrics(run, between="20s:1m")
    assert (whole.requests, whole.ttft.max) == (100, 5)
    assert (steady.requests, steady.ttft.n, steady.ttft.max) == (40, 40, 0.5)
    assert any("--between 20s:1m" in note for note in steady.notes)
    for text, words in (("2h:", "no request"), ("5m", "START:END"), ("9s:3s", "after the start")):
        with pytest.raises(InputError, match=words):
            metrics(run, between=text)


def test_between_looks_at_a_requests_first_attempt():
    columns = {"request": [0, 1, 1], "attempt": [1, 1, 2], "status": ["ok", "http_error", "ok"]}
    run = Run.of(columns | {"scheduled": [0.0, 8.0, 12.0], "sent": [0.0, 8.0, 12.0]}, RunMeta(kind="replay", offered=2))
    assert metrics(run, between=":10").attempts == 3
    assert metrics(run, between="5:").attempts == 2
