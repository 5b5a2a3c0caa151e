"""The verb as a whole: published statistics of real traces, classes, and inputs at the edge."""

import json
import math
from typing import Any

import msgspec
import numpy as np
import polars as pl
import pytest

import squall
from squall.characterize import Characterization
from squall.errors import InputError
from squall.trace import Trace, TraceMeta


def trace(meta: dict[str, Any] | None = None, **columns: Any) -> Trace:
    return Trace.of(columns, TraceMeta(source="test", format="generated", **(meta or {})))


def as_json(result: Characterization) -> dict[str, Any]:
    """The result as a script would read it; fails on anything that is not plain JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(msgspec.json.encode(result), parse_constant=refuse)


def numbers_in(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for part in value.values() for number in numbers_in(part)]
    if isinstance(value, list | tuple):
        return [number for part in value for number in numbers_in(part)]
    return [value] if isinstance(value, float) else []


def test_azure_conversation(traces) -> None:  # type: ignore[no-untyped-def]
    result = squall.characterize(traces / "azure-2023" / "AzureLLMInferenceTrace_conv.csv")
    assert (result.requests, result.failed_share) == (19366, 0.0)
    assert result.rate == pytest.approx(5.53, abs=0.005)
    assert result.meta.sha256 is not None
    assert result.meta.sha256.startswith("2f1e5b66")
    stream = result.classes[0]
    assert (stream.service, stream.model, stream.share) == (None, None, 1.0)
    ask, answer = stream.request_tokens, stream.response_tokens
    assert (round(ask.mean or 0), ask.p50, ask.p90, ask.p99, ask.max) == (1155, 1020, 2735, 4142, 14050)
    assert (round(answer.mean or 0), answer.p50, answer.p90, answer.p99, answer.max) == (211, 129, 424, 601, 1000)
    assert stream.correlation.pearson == pytest.approx(-0.11, abs=0.005)
    assert stream.correlation.spearman == pytest.approx(0.07, abs=0.005)
    assert stream.gaps.cv == pytest.approx(1.09, abs=0.005)
    index = {point.scale: point.index for point in stream.dispersion}
    assert index == pytest.approx({1.0: 1.39, 10.0: 3.86, 60.0: 16.1, 300.0: 56.1}, rel=0.005)
    minute = stream.length_time[0]
    assert minute.correlation == pytest.approx(0.48, abs=0.005)
    assert minute.cv == pytest.approx(0.348, abs=0.0005)
    # Published for one shuffle; over shuffles it varies by about 0.02.
    assert minute.shuffled_cv == pytest.approx(0.237, abs=0.03)
    assert len(answer.modes) == 2
    assert any("cluster from 10 s on" in sentence for sentence in result.findings)


def test_mooncake_conversation(traces) -> None:  # type: ignore[no-untyped-def]
    stream = squall.characterize(traces / "mooncake" / "conversation_trace.jsonl").total
    ask, answer = stream.request_tokens, stream.response_tokens
    assert (round(ask.mean or 0), ask.p50, ask.p90, ask.p99, ask.max) == (12035, 6909, 27367, 85401, 126195)
    assert (round(answer.mean or 0), answer.p50, answer.p90, answer.max) == (343, 350, 597, 2000)
    assert stream.gaps.cv == pytest.approx(3.03, abs=0.005)
    assert stream.gaps.spread_cv == pytest.approx(1.0, abs=0.05)
    five_minutes = next(point for point in stream.length_time if point.scale == 300)
    assert five_minutes.cv == pytest.approx(0.033, abs=0.0005)
    assert five_minutes.shuffled_cv == pytest.approx(0.098, abs=0.015)
    assert five_minutes.correlation == pytest.approx(-0.94, abs=0.005)


def test_burstgpt_sessions(traces) -> None:  # type: ignore[no-untyped-def]
    result = squall.characterize(traces / "burstgpt" / "burstgpt_3_conversation_head418.csv")
    assert result.span == pytest.approx(11.82 * 3600, rel=0.001)
    talk = result.total.conversations
    assert (talk.sessions, talk.requests, talk.turns.max) == (141, 418, 24)
    assert talk.turns.mean == pytest.approx(2.96, abs=0.005)
    assert talk.single_share == pytest.approx(0.43, abs=0.005)
    assert (talk.gaps.p50, talk.gaps.p90) == (123, 1447)
    assert talk.growth.p50 == 116
    assert talk.shrinking_share == pytest.approx(0.16, abs=0.005)
    assert result.total.gaps.cv == pytest.approx(3.14, abs=0.005)
    assert result.total.correlation.pearson == pytest.approx(0.18, abs=0.005)
    # The night makes that CV; inside windows of 20 minutes the gaps look Poisson.
    assert any("slow changes of the rate" in sentence for sentence in result.findings)


def test_classes_are_told_apart_and_add_up() -> None:
    n = 6000
    rng = np.random.default_rng(1)
    arrivals = np.sort(rng.uniform(0, 3 * 86400, n))
    api = rng.random(n) < 0.75
    result = squall.characterize(
        trace(
            {"midnight": 0.0, "weekday": 0},
            arrival=arrivals,
            request_tokens=np.where(api, 20, 500) + rng.integers(0, 10, n),
            response_tokens=np.where(rng.random(n) < np.where(api, 0.2, 0.0), 0, 50),
            service=np.where(api, "api", "conversation"),
            model="ChatGPT",
        )
    )
    assert [(stream.service, stream.model) for stream in result.classes] == [
        ("api", "ChatGPT"),
        ("conversation", "ChatGPT"),
    ]
    assert [stream.name for stream in result.classes] == ["ChatGPT api", "ChatGPT conversation"]
    assert sum(stream.requests for stream in result.classes) == result.requests == n
    assert sum(stream.share for stream in result.classes) == pytest.approx(1)
    assert sum(stream.rate or 0 for stream in result.classes) == pytest.approx(result.rate)
    assert result.classes[0].failed_share == pytest.approx(0.2, abs=0.02)
    assert result.classes[1].failures.failed == 0
    assert result.classes[1].request_tokens.min >= 500
    assert len(result.total.hour_of_day) == 24
    # All classes are seen over the whole trace, so that their series lie on one axis.
    counts = [stream.rate_series.counts for stream in result.classes]
    assert (np.sum(counts, axis=0) == result.total.rate_series.counts).all()
    assert any(sentence.startswith("ChatGPT api: ") for sentence in result.findings)


def test_compressed_time_has_no_hours() -> None:
    arrivals = np.arange(0, 4 * 86400, 600.0)
    plain = trace({"midnight": 0.0}, arrival=arrivals, request_tokens=np.full(576, 5), response_tokens=np.full(576, 5))
    assert len(squall.characterize(plain).total.hour_of_day) == 24
    assert squall.characterize(plain, speed=2).total.hour_of_day == []


def test_unknown_lengths_are_left_out_and_failures_have_no_response() -> None:
    result = squall.characterize(
        trace(
            arrival=[0.0, 1.0, 2.0, 3.0],
            request_tokens=[0, 10, 20, 30],
            response_tokens=[0, 0, 5, 6],
        )
    )
    assert (result.total.request_tokens.n, result.total.request_tokens.min) == (3, 10)
    assert (result.total.response_tokens.n, result.total.response_tokens.min) == (2, 5)
    assert result.total.correlation.n == 2


EDGES = {
    "one row": {"arrival": [0.0], "request_tokens": [5], "response_tokens": [7]},
    "one failed row": {"arrival": [0.0], "request_tokens": [0], "response_tokens": [0]},
    "two rows": {"arrival": [0.0, 3.0], "request_tokens": [5, 6], "response_tokens": [7, 8]},
    "all at once": {"arrival": [4.0] * 50, "request_tokens": [5] * 50, "response_tokens": [7] * 50},
    "all failed": {
        "arrival": list(np.arange(0, 9000.0, 30)),
        "request_tokens": [0] * 300,
        "response_tokens": [0] * 300,
        "service": ["api"] * 300,
    },
    "regular and constant": {
        "arrival": list(np.arange(0, 9000.0, 10)),
        "request_tokens": [100] * 900,
        "response_tokens": [100] * 900,
    },
    "longest and shortest": {
        "arrival": list(np.arange(0, 60.0)),
        "request_tokens": [1, 2**31 - 1] * 30,
        "response_tokens": [2**31 - 1, 1] * 30,
    },
    "centuries": {
        "arrival": [0.0, 1.0, 2.0, 1e10],
        "request_tokens": [1, 2, 3, 4],
        "response_tokens": [1, 2, 3, 4],
        "session": [1, 1, 2, 1],
    },
    "names that are null in part": {
        "arrival": [0.0, 1.0, 2.0, 3.0],
        "request_tokens": [1, 2, 3, 4],
        "response_tokens": [1, 2, 3, 0],
        "service": [None, "api", None, None],
        "model": [None, "a", "b", None],
        "session": [None, 1, 1, None],
        "elapsed": [None, 1.0, None, None],
    },
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("tick", [None, 1.0])
def test_edges_give_null_never_nan(edge: str, tick: float | None) -> None:
    window = "7d" if edge == "centuries" else "20m"
    result = squall.characterize(trace({"tick": tick, "midnight": 5.0, "weekday": 6}, **EDGES[edge]), window=window)
    plain = as_json(result)
    assert all(math.isfinite(number) for number in numbers_in(msgspec.to_builtins(result)))
    assert plain["requests"] == len(EDGES[edge]["arrival"])
    assert plain["classes"]


def test_the_json_has_the_keys_that_scripts_rely_on() -> None:
    plain = as_json(squall.characterize(trace(**EDGES["two rows"])))
    assert {"requests", "span", "rate", "failed_share", "classes", "total", "meta"} <= plain.keys()
    stream = plain["classes"][0]
    assert {
        *("service", "model", "requests", "share", "failed_share", "request_tokens", "response_tokens", "correlation"),
        *("gaps", "gamma_windows", "dispersion", "hour_of_day", "day_of_week", "peak_to_trough", "conversations"),
        "failures",
    } <= stream.keys()
    assert {"mean", "p50", "p90", "p99", "max", "zipf", "best_fit"} <= stream["request_tokens"].keys()
    assert {"pearson", "spearman"} <= stream["correlation"].keys()
    assert {"mean", "cv"} <= stream["gaps"].keys()
    assert {"window", "alpha", "beta", "cv"} <= stream["gamma_windows"].keys()
    assert {"sessions", "turns", "gaps"} <= stream["conversations"].keys()
    assert stream["gamma_windows"]["window"] == 1200.0


def test_the_same_input_gives_the_same_bytes() -> None:
    rng = np.random.default_rng(2)
    table = {
        "arrival": np.sort(rng.integers(0, 4000, 3000)).astype(float),
        "request_tokens": rng.integers(1, 900, 3000),
        "response_tokens": rng.integers(0, 900, 3000),
    }
    first, second = (squall.characterize(trace({"tick": 1.0}, **table), seed=4) for _ in range(2))
    assert msgspec.json.encode(first) == msgspec.json.encode(second)


@pytest.mark.parametrize("window", ["0", "1ms", "soon"])
def test_a_window_that_cannot_be_used_is_refused(window: str) -> None:
    with pytest.raises(InputError, match="window"):
        squall.characterize(trace(arrival=[0.0, 1e6], request_tokens=[1, 2], response_tokens=[1, 2]), window=window)


def test_the_trace_is_not_changed() -> None:
    given = trace(**EDGES["two rows"])
    before = given.table.clone()
    squall.characterize(given)
    assert given.table.equals(before)
    assert isinstance(given.table, pl.DataFrame)
