"""Capacity: the answer is a load that meets the SLO, with one above it that does not, whatever disturbs the search."""

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import squall
from squall.capacity import Capacity, _Experiment, _Search, capacity
from squall.cli.app import build
from squall.errors import InputError
from squall.run import Run, RunMeta, metrics, parse_slo, resampling
from squall.trace import Trace, TraceMeta

sys.path.append(str(Path(__file__).parents[1] / "replay"))
from mock import Behaviour, Mock  # noqa: UP026 - the file in tests/replay


def trace(rows: int = 600, rate: float = 2.0, failed: int = 0) -> Trace:
    rng = np.random.default_rng(1)
    arrival = np.cumsum(rng.exponential(1 / rate, rows))
    response = rng.integers(20, 200, rows)
    response[:failed] = 0
    columns = {"arrival": arrival, "request_tokens": rng.integers(50, 800, rows), "response_tokens": response}
    return Trace.of(columns, TraceMeta(source="made", format="test"))


class Told(_Experiment):
    """An experiment whose share of good requests is told by a function of the rate and the number of the run."""

    def __init__(self, share: Callable[[float, int], float], n: int = 4000, **meta: Any) -> None:
        super().__init__(trace(20), "compress")
        self.share, self.n, self.runs, self.meta = share, n, 0, meta

    def run(self, rate: float, seed: int) -> Run:
        share = self.share(rate, self.runs)
        self.runs += 1
        met = np.random.default_rng(self.runs).permutation(self.n) < share * self.n
        at = np.arange(self.n) / rate
        columns = {
            "request": np.arange(self.n),
            "attempt": np.ones(self.n, int),
            "scheduled": at,
            "sent": at,
            "first_token": at + np.where(met, 0.1, 9.0),
            "last_token": at + np.where(met, 0.2, 9.5),
            "status": ["ok"] * self.n,
            "response_tokens": np.full(self.n, 5),
        }
        verdict = self.meta.get("verdict", lambda rate, number: "VALID")(rate, self.runs)
        return Run.of(columns, RunMeta(kind="replay", offered=self.n, verdict=verdict, verdict_reasons=["late"]))


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "DRAWS", 400)  # coarser ends of the intervals, and five times as fast


def search(experiment: _Experiment, first: float = 1.0, **words: Any) -> Capacity:
    settings: dict[str, Any] = {
        "goal": 0.99, "precision": 0.02, "budget": 60.0, "seed": 0, "out": None, "callback": None,
        "repeatable": False, "method": "compress", "notes": [],
    }  # fmt: skip
    return _Search(experiment, parse_slo("ttft=1s"), **settings | words).run(first)


@pytest.mark.parametrize("first", [0.3, 1.0, 70.0])
def test_the_answer_stands_between_a_pass_and_a_fail(first: float) -> None:
    found = search(Told(lambda rate, number: 1.0 if rate <= 10 else 0.5), first)
    assert found.state == "found"
    assert found.capacity is not None
    assert found.capacity <= 10 < (found.fail_rate or 0) <= found.capacity * 1.02
    assert found.sure_low == found.capacity
    assert found.sure_high == found.fail_rate
    assert {round(step.rate / found.capacity, 2) for step in found.steps} & {0.75, 0.9}


def test_a_rate_that_passes_above_one_that_fails_is_not_the_answer() -> None:
    found = search(Told(lambda rate, number: 0.5 if rate > 10 or 7 < rate < 9.5 else 1.0), first=1.2)
    assert found.capacity is not None
    assert found.capacity <= 7 < (found.fail_rate or 0) < 9.5
    assert any("although a lower rate failed" in text for text in found.notes)


def test_close_calls_are_repeated_where_a_repeat_may_tell() -> None:
    def noisy(rate: float, number: int) -> float:
        return float(np.clip(0.99 + 0.002 * (10 - rate) + (0.004 if number % 2 else -0.004), 0, 1))

    found = search(Told(noisy, n=1000), first=8.0, repeatable=True)
    rates = [step.rate for step in found.steps]
    assert max(rates.count(rate) for rate in rates) > 1
    assert any(step.close for step in found.steps)
    assert found.capacity is not None
    assert (found.sure_low or 0) <= found.capacity <= (found.sure_high or 99)
    assert found.sure_low is None or found.sure_low < found.capacity


def test_a_limited_sender_neither_passes_nor_fails() -> None:
    found = search(
        Told(lambda rate, number: 1.0, verdict=lambda rate, number: "CLIENT-LIMITED" if rate > 3 else "VALID")
    )
    assert (found.state, found.capacity, found.fail_rate) == ("client-limited", 2.0, None)
    assert [step.verdict for step in found.steps[-2:]] == ["client-limited"] * 2
    assert "lower bound" in found.summary
    once = search(
        Told(lambda rate, number: rate < 5, verdict=lambda rate, number: "CLIENT-LIMITED" if number == 2 else "VALID")
    )
    assert once.state == "found"  # a hiccup is run again


def test_what_ends_a_search_early_leaves_what_is_known(tmp_path: Path) -> None:
    def interrupted(rate: float, number: int) -> float:
        if number == 3:
            raise KeyboardInterrupt
        return 1.0 if rate < 3 else 0.0

    out = tmp_path / "found.json"
    found = search(Told(interrupted), out=out)
    assert (found.state, found.capacity, found.fail_rate) == ("interrupted", 2.0, 4.0)
    assert "interrupted" in found.summary
    kept = msgspec.json.decode(out.read_bytes(), type=Capacity)
    assert [step.rate for step in kept.steps] == [1.0, 2.0, 4.0]

    class Slow(Told):
        def expected(self, rate: float) -> float:
            return 20.0

    late = search(Slow(lambda rate, number: 1.0), budget=10.0)
    assert (late.state, len(late.steps)) == ("budget", 1)
    assert search(Told(lambda rate, number: 0.0)).state == "lowest misses"
    assert search(Told(lambda rate, number: 1.0)).state == "highest passes"


def test_on_a_modelled_cluster_the_answer_is_what_simulate_says() -> None:
    asked = trace()
    found = capacity(asked, slo="ttft=500ms,tpot=40ms", gpu="rtx4090", target={"model": "llama-3.1-8b"})
    assert found.state == "found"
    assert found.capacity is not None
    assert found.fail_rate is not None
    for rate, met in ((found.capacity, True), (found.fail_rate, False)):
        run = squall.simulate(asked, rate=rate, gpu="rtx4090", model="llama-3.1-8b")
        share = metrics(run, slo="ttft=500ms,tpot=40ms").goodput_share
        assert share is not None
        assert (share >= 0.99) == met
    assert found.steps == sorted(found.steps, key=lambda step: found.steps.index(step))
    again = capacity(asked, slo="ttft=500ms,tpot=40ms", gpu="rtx4090", target={"model": "llama-3.1-8b"})
    assert [step.met_share for step in again.steps] == [step.met_share for step in found.steps]


def test_requests_that_nobody_can_serve_are_left_out() -> None:
    found = capacity(trace(failed=60), slo="ttft=2s", gpu="rtx4090", precision=0.2)
    assert found.capacity is not None
    assert "60 of 600 requests" in found.notes[0]
    assert found.steps[0].requests == 540


def test_thinning_ends_at_the_rate_of_the_trace() -> None:
    found = capacity(trace(), slo="ttft=20s", gpu="h100", scale_method="thin", start=1.0)
    assert found.state == "highest passes"
    assert found.capacity == pytest.approx(trace().rate)


class Queue:
    """Answers one request after the other, each after 1/40 s: capacity is below 40/s."""

    def __init__(self) -> None:
        self.free, self.lock = 0.0, threading.Lock()

    def __call__(self, number: int, seen: Any) -> Behaviour:
        with self.lock:
            self.free = max(self.free, seen.at) + 1 / 40
            return Behaviour(first=self.free - seen.at)


@pytest.mark.alone
def test_on_a_live_server() -> None:
    asked = trace(rows=2000, rate=10.0)
    short = asked.replace(asked.table.with_columns(response_tokens=asked.table["response_tokens"] // 50 + 1))
    with Mock(Queue()) as mock:
        found = capacity(
            short, slo="ttft=300ms", url=mock.url, budget=14, step=1.5, precision=0.3, target={"drain_timeout": 2}
        )
    assert found.target["url"].startswith("http://127.0.0.1")
    assert found.state in ("found", "budget", "client-limited")
    if found.state != "client-limited":  # on a busy machine the sender may be the limit, and then says so
        assert found.capacity is not None
        assert 8 < found.capacity < 60
        assert found.spent < 20


# ------------------------------------------------------------------------------------------------------ command line


def call(*words: object) -> int:
    arguments = ["capacity", *map(str, words)]
    code: int = build()(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    return code


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("capacity") / "trace.parquet"
    squall.convert(trace(), path)
    return path


def test_the_command(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    assert call(file, "--slo", "ttft=1s", "--gpu", "rtx4090", "--precision", "0.1", "--json", "-o", out) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["capacity"] > 0
    assert found["slo"] == {"ttft": 1.0}
    assert {"rate", "met_share", "low", "high", "verdict", "close"} <= set(found["steps"][0])
    assert len(json.loads(out.read_bytes())["steps"]) == len(found["steps"])
    assert call(file, "--slo", "ttft=1ms", "--gpu", "rtx4090") == 4
    shown = capsys.readouterr().out
    assert "No load tried gives 99 % of the requests within TTFT ≤ 1 ms" in shown


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--slo", "ttft=1s"], "give --url for a live server, or --gpu"),
        (["--slo", "ttft=1s", "--gpu", "h100", "--step", "10s"], "--step has no effect with a modelled cluster"),
        (["--slo", "ttft=1s", "--url", "http://127.0.0.1:1", "--gpu", "h100"], "--gpu has no effect with --url"),
        (["--slo", "ttft=1s", "--gpu", "h100", "--rate", "3"], "--rate: capacity sets the load"),
        (["--slo", "ttft=1", "--gpu", "h100"], "lacks a unit"),
        (["--slo", "ttft=1s", "--gpu", "h100", "--min-goodput", "99"], "--min-goodput 99"),
        (["--slo", "ttft=1s", "--gpu", "h100", "--head", "3"], "no rate to scale"),
    ],
)
def test_what_is_wrong_is_said(file: Path, words: list[str], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        call(file, *words)
