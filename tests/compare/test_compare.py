"""Comparison: real differences are found, chance is not taken for one, and intervals hold the truth."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
import pytest
from numba import njit
from scipy.signal import lfilter

import squall
from squall.cli.app import build
from squall.compare import METRICS, Difference, _difference, _holm, _requests, _View, _with_level, compare
from squall.errors import InputError
from squall.run import Run, RunMeta, resampling, write_run
from squall.run.metrics import metrics
from squall.trace import TraceMeta

ARRIVALS = TraceMeta(source="made.csv", format="test", sha256="ab" * 32)


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "DRAWS", 400)  # coarser ends of the intervals, and five times as fast


def run(latency: np.ndarray, schedule: np.ndarray | None = None, failed: np.ndarray | None = None, **meta: Any) -> Run:
    """Requests whose first token takes half of `latency`; lengths differ from row to row, alike in all runs."""
    n = latency.size
    at = np.arange(n, dtype=float) if schedule is None else schedule
    failed = np.zeros(n, bool) if failed is None else failed
    lengths = np.random.default_rng(0).integers(10, 1000, n)

    def answered(values: np.ndarray) -> list[float | None]:
        return [None if bad else float(value) for value, bad in zip(values, failed, strict=True)]

    columns = {
        "request": np.arange(n),
        "attempt": np.ones(n, int),
        "scheduled": at,
        "sent": at,
        "first_token": answered(at + latency / 2),
        "last_token": answered(at + latency),
        "ended": at + latency,
        "status": np.where(failed, "timeout", "ok"),
        "request_tokens": lengths,
        "response_tokens": np.full(n, 11),
        "asked_response_tokens": np.full(n, 11),
    }
    return Run.of(columns, RunMeta(**{"kind": "replay", "offered": n, "trace": ARRIVALS} | meta))


def alike(n: int, phi: float, seed: int) -> np.ndarray:
    """Latencies around 1 s whose logarithms are AR(1)."""
    noise = np.random.default_rng(seed).standard_normal(n)
    return np.exp(0.5 * lfilter([np.sqrt(1 - phi**2)], [1, -phi], noise))


def of(found: squall.compare.Comparison, metric: str) -> Difference:  # type: ignore[name-defined]
    return next(one for one in found.differences if one.metric == metric)


def test_a_run_is_equal_to_itself() -> None:
    one = run(alike(1500, 0.8, 1))
    found = compare(one, one, slo="e2e=1s")
    assert {difference.verdict for difference in found.differences} == {"equal"}
    assert found.regressions == []
    assert {difference.metric for difference in found.differences} == set(METRICS)


def test_the_numbers_are_those_of_metrics() -> None:
    a, b = run(alike(1500, 0.8, 1)), run(1.1 * alike(1500, 0.8, 2), failed=np.arange(1500) % 30 == 0)
    found = compare(a, b, slo="e2e=1s")
    for side, name in ((a, "a"), (b, "b")):
        told = metrics(side, slo="e2e=1s")
        for metric in METRICS:
            latency, _, level = metric.rpartition("_")
            expected = (
                told.failed / told.requests
                if metric == "failed_share"
                else getattr(getattr(told, latency), level)
                if latency in ("ttft", "e2e", "tpot")
                else getattr(told, metric)
            )
            assert getattr(of(found, metric), name) == pytest.approx(expected), metric


def test_pairs_show_what_two_samples_cannot() -> None:
    common = alike(2000, 0.95, 3)
    noise = np.random.default_rng(4).normal(1, 0.05, 2000)
    a, b = run(common), run(1.08 * common * noise)
    together = compare(a, b, metric="e2e_p90")
    assert together.paired
    assert together.pairs == 2000
    one = together.differences[0]
    assert (one.verdict, together.regressions) == ("worse", ["e2e_p90"])
    assert one.low is not None
    assert 0.03 < one.low < 0.08 < (one.high or 0) < 0.13
    assert one.sentence.startswith("B's P90 E2E is ")
    assert "% higher" in one.sentence
    assert "95 % interval" in one.sentence
    foreign = msgspec.structs.replace(b.meta, trace=msgspec.structs.replace(ARRIVALS, sha256="cd" * 32))
    apart = compare(a, Run(b.table, foreign), metric="e2e_p90")
    assert not apart.paired
    assert "different traces" in apart.pairing
    assert apart.differences[0].verdict == "cannot tell"
    assert "cannot tell; B's is" in apart.differences[0].sentence
    assert compare(a, b, metric="e2e_p90", tolerance=0.2).regressions == []


def test_rows_that_ask_for_other_lengths_are_no_pairs() -> None:
    a = run(alike(500, 0.5, 5))
    shifted = a.table.with_columns(request_tokens=a.table["request_tokens"].shift(1, fill_value=1))
    assert "other lengths" in compare(a, Run(shifted, a.meta)).pairing
    few = compare(a, Run(a.table.head(100), a.meta))
    assert "few requests in common" in few.pairing
    nameless = msgspec.structs.replace(a.meta, trace=None)
    later = a.table.with_columns(scheduled=a.table["scheduled"] * 1.5 - 0.1 * (a.table["request"] % 7))
    assert "schedules differ" in compare(Run(a.table, nameless), Run(later, nameless)).pairing


def test_a_faster_run_at_another_speed_is_paired_but_its_rates_are_not() -> None:
    latency = alike(1200, 0.8, 6)
    found = compare(run(latency), run(latency * 1.2, schedule=np.arange(1200) / 2))
    assert found.paired
    assert "at different times" in found.pairing
    assert of(found, "throughput").change == pytest.approx(1.0, abs=0.02)


def test_failures_are_compared_and_said() -> None:
    rng = np.random.default_rng(7)
    latency = alike(2000, 0.5, 7)
    found = compare(run(latency), run(latency, failed=rng.random(2000) < 0.05))
    share = of(found, "failed_share")
    assert share.verdict == "worse"
    assert not share.relative
    assert share.low is not None
    assert 0.02 < share.low < 0.05 < (share.high or 0) < 0.08
    assert any("a server that refuses looks faster" in text for text in found.notes)


def test_too_little_is_no_verdict() -> None:
    found = compare(run(alike(300, 0.5, 8)), run(2 * alike(300, 0.5, 9)))
    assert of(found, "e2e_p99").verdict == "cannot tell"
    assert "1,000 are needed" in of(found, "e2e_p99").sentence
    assert of(found, "e2e_mean").verdict == "worse"
    slow = 0.5 * np.exp(np.random.default_rng(1).standard_normal(160).cumsum() / 10)  # a walk: hardly 160 witnesses
    drift = compare(run(slow), run(slow[::-1]), metric="e2e_mean").differences[0]
    assert drift.verdict == "cannot tell"
    assert "times between fast and slow, and 8 times are needed, about" in drift.sentence
    assert drift.needed is not None
    assert 160 < drift.needed <= 1300
    burst = np.where(np.arange(3000) // 60 == 7, 9.0, 1.0) * alike(3000, 0.0, 11)  # all slow ones in one episode
    tail = compare(run(burst), run(burst * alike(3000, 0.0, 12)), metric="e2e_p99").differences[0]
    assert tail.verdict == "cannot tell"
    crowded = run(50 * alike(3000, 0.0, 13))  # in flight at once: 50 and more
    brief = compare(crowded, run(60 * alike(3000, 0.0, 14)), metric="ttft_mean,ttft_p99")
    assert {one.verdict for one in brief.differences} == {"cannot tell"}
    assert "lasts only" in brief.differences[0].sentence
    assert "Too short to tell, and what would do: mean TTFT, P99 TTFT (about" in brief.summary[-1]


def test_runs_that_always_answer_alike_are_told_apart() -> None:
    found = compare(run(np.full(200, 1.0)), run(np.full(200, 1.5)), metric=["e2e_mean", "ttft_p50"])
    assert [one.verdict for one in found.differences] == ["worse", "worse"]
    assert found.differences[0].low == pytest.approx(0.5)


def test_holm_steps_down() -> None:
    def one(p: float | None) -> Difference:
        columns = dict.fromkeys(Difference.__struct_fields__, None) | {"p_value": p}
        return Difference(**columns)

    assert _holm([one(0.04), one(0.01), one(None), one(0.03)]) == pytest.approx([0.06, 0.03, None, 0.06])
    assert _holm([one(0.5), one(0.9)]) == [1.0, 1.0]


@njit(cache=True)
def waits(arrival: np.ndarray, service: float) -> np.ndarray:
    result = np.empty(arrival.size)
    free = 0.0
    for k in range(arrival.size):
        free = max(free, arrival[k]) + service
        result[k] = free - arrival[k]
    return result


def queue(rng: np.random.Generator) -> np.ndarray:
    """6,000 waits in an M/D/1 queue at 70 % load, after its start."""
    return waits(np.cumsum(rng.exponential(1 / 0.7, 8000)), 1.0)[2000:]


def autoregressive(rng: np.random.Generator) -> np.ndarray:
    return np.exp(lfilter([0.436], [1, -0.9], rng.standard_normal(3500)))[500:]


@pytest.mark.parametrize("draw", [queue, autoregressive], ids=["M/D/1", "AR(1) 0.9"])
def test_intervals_hold_the_truth(draw: Callable[[np.random.Generator], np.ndarray]) -> None:
    """Two runs of one law differ by 0, which 95 % of the intervals hold: fewer than 34 of 40 come in 0.1 %."""
    held = {"e2e_mean": 0, "e2e_p90": 0}
    for trial in range(40):
        views = [_View(_requests(run(draw(np.random.default_rng([k, trial]))), ""), None) for k in range(2)]
        for metric in held:
            one = _difference(metric, views, False, 0.05, trial, 0)
            assert one is not None
            assert one.low is not None
            held[metric] += one.low <= 0 <= (one.high or 0)
    assert min(held.values()) >= 34, held


def waiting(load: float, seed: int, n: int) -> tuple[_View, _View]:
    """A and B, which serves 3 % faster, on the same `n` arrivals of an M/D/1 queue after its start."""
    arrival = np.cumsum(np.random.default_rng(seed).exponential(1 / load, n + 3000))
    views = []
    for service in (1.0, 1 / 1.03):
        e2e = waits(arrival, service)[3000:]
        schedule, nothing = arrival[3000:] - arrival[3000], np.full(n, np.nan)
        columns = {"scheduled": schedule, "ended": schedule + e2e, "end": schedule + e2e, "e2e": e2e, "ttft": e2e}
        columns |= {"tpot": nothing, "tokens": nothing, "ok": np.ones(n, bool)}
        views.append(_View(pl.DataFrame(columns), None))
    return views[0], views[1]


def sojourn(load: float, service: float) -> float:
    """Mean time in an M/D/1 queue (Pollaczek and Khinchine)."""
    busy = load * service
    return service * (1 + busy / 2 / (1 - busy))


@pytest.mark.parametrize("paired", [True, False])
def test_intervals_of_a_queue_hold_its_closed_form(paired: bool) -> None:
    """Of 40 intervals at 80 % load fewer than 34 hold the truth once in a thousand times, if 95 % should."""
    true = sojourn(0.8, 1 / 1.03) / sojourn(0.8, 1.0) - 1
    held = given = 0
    for trial in range(40):
        a, b = waiting(0.8, trial, 2500)
        one = _difference("e2e_mean", [a, b if paired else waiting(0.8, 1000 + trial, 2500)[1]], paired, 0.05, trial, 0)
        assert one is not None
        if one.low is not None:
            given += 1
            held += one.low <= true <= (one.high or 0)
    assert given >= 38
    assert held >= given - 6


def test_near_saturation_a_short_run_is_told_so() -> None:
    """1,000 requests at 95 % load are less than one queue: benchmarks/compare.py gives 8 % of them an interval."""
    given = 0
    for trial in range(40):
        one = _difference("e2e_mean", waiting(0.95, trial, 1000), True, 0.05, trial, 0)
        assert one is not None
        given += one.low is not None
        if one.low is None:
            assert one.needed is not None
            assert 1000 < one.needed <= 100_000
            assert "a run of 1,000 requests is too short" in one.sentence
            assert one.p_value is None
    assert given <= 10  # of 3 expected, once in a thousand times


def test_what_is_far_worse_all_along_is_told_of_short_pairs_too() -> None:
    """A server that falls behind makes its own run too short; CI must hear of it all the same."""
    latency = 20 * alike(300, 0.5, 21)
    found = compare(run(latency), run(6 * latency * alike(300, 0.9, 22)), metric="ttft_mean,e2e_p90,throughput")
    assert found.regressions == ["ttft_mean", "e2e_p90"]
    one = found.differences[0]
    assert one.low is None
    assert one.least is not None
    assert 1 < one.least < 5
    assert "by a factor of 2 or more in each eighth of the runs, which are too short" in one.sentence
    assert compare(run(latency), run(6 * latency), metric="ttft_mean", tolerance=6.0).regressions == []
    assert compare(run(latency), run(1.5 * latency * alike(300, 0.9, 22)), metric="ttft_mean").regressions == []


def test_what_pairs_do_not_know_of_their_load_widens_the_far_side() -> None:
    """As in Fieller's theorem: the far end runs away, the near one stays on its side of 0."""
    assert _with_level(0.1, -0.02, 0.03, 0.0, 0.05, 7) == pytest.approx((-0.02, 0.03))
    down, up = _with_level(0.1, -0.02, 0.03, 0.25, 0.05, 7)
    assert -0.1 < down < -0.02
    assert up > 3 * -down
    assert _with_level(-0.1, -0.03, 0.02, 0.25, 0.05, 7) == pytest.approx((-up, -down))
    assert _with_level(0.1, -0.1, 0.1, 0.25, 0.05, 7)[0] == pytest.approx(-0.1)  # 0 at the edge stays there
    assert _with_level(0.1, -0.11, 0.1, 0.25, 0.05, 7)[0] < -0.1
    assert np.isfinite(_with_level(0.1, -0.02, 0.03, 5.0, 0.05, 7)).all()


# ------------------------------------------------------------------------------------------------------ command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("compare")
    latency = alike(1500, 0.8, 10)
    write_run(run(latency, title="before"), made / "a.parquet")
    write_run(run(latency * 1.3, title="\x1b[31mafter"), made / "b.parquet")
    limited = {"verdict": "CLIENT-LIMITED", "verdict_reasons": ["requests were sent late"]}
    write_run(run(latency * 1.3, **limited), made / "limited.parquet")
    return made


def call(*words: object) -> int:
    arguments = ["compare", *map(str, words)]
    code: int = build()(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    return code


def test_exit_codes_for_ci(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = folder / "a.parquet", folder / "b.parquet"
    assert call(a, b, "--metric", "e2e_p99,ttft_mean", "--json") == 4
    found = json.loads(capsys.readouterr().out)
    assert found["regressions"] == ["e2e_p99", "ttft_mean"]
    assert found["differences"][0]["change"] == pytest.approx(0.3)
    assert call(b, a, "--metric", "e2e_p99") == 0
    assert "B's P99 E2E is 23 % lower" in capsys.readouterr().out
    assert call(a, b, "--metric", "e2e_p99", "--fail-on", "never") == 0
    assert call(a, b, "--metric", "e2e_p99", "--tolerance", "0.5") == 0
    capsys.readouterr()
    assert call(a, b) == 4
    shown = capsys.readouterr().out
    assert "REGRESSION" in shown
    assert "Paired: the same 1,500 requests" in shown
    assert "\x1b" not in shown
    assert call(a, folder / "limited.parquet") == 3
    assert "B is CLIENT-LIMITED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--metric", "latency"], "there is no such metric"),
        (["--metric", "goodput"], "give one with --slo"),
        (["--alpha", "95"], "--alpha 95"),
        (["--tolerance=-1"], "--tolerance -1"),
    ],
)
def test_what_is_wrong_is_said(folder: Path, words: list[str], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        call(folder / "a.parquet", folder / "b.parquet", *words)
    with pytest.raises(InputError, match="no such run"):
        call(folder / "a.parquet", folder / "absent.parquet")
