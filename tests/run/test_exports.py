"""Exports hold the fields and units that the other tools document, with the numbers of the run, and nothing made up."""

import json
import math
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from squall.cli.app import build
from squall.errors import InputError
from squall.run import Run, RunMeta, metrics, write_run
from squall.run.exports import FORMATS, export
from squall.trace import TraceMeta

N = 200
SLO = "ttft=150ms"


@pytest.fixture(scope="module")
def run() -> Run:
    """200 requests, Poisson at 10/s; TTFT 100 or 200 ms from send, 5 reads 20 ms apart, sent 2 ms late; 20 fail."""
    rng = np.random.default_rng(1)
    at = np.cumsum(rng.exponential(0.1, N))
    ok = np.arange(N) % 10 != 3
    first = at + 0.002 + np.where(np.arange(N) % 2, 0.1, 0.2)

    def answered(values: np.ndarray) -> list[float | None]:
        return [float(value) if good else None for value, good in zip(values, ok, strict=True)]

    columns = {
        "request": np.arange(N),
        "attempt": np.ones(N, int),
        "scheduled": at,
        "sent": at + 0.002,
        "first_byte": answered(first - 0.01),
        "first_token": answered(first),
        "last_token": answered(first + 0.08),
        "ended": np.where(ok, first + 0.08, at + 1),
        "status": np.where(ok, "ok", "http_error"),
        "http_status": np.where(ok, 200, 503),
        "message": [None if good else "busy" for good in ok],
        "request_tokens": np.full(N, 50),
        "response_tokens": [5 if good else None for good in ok],
        "chunks": [[0.0, 0.02, 0.04, 0.06, 0.08] if good else None for good in ok],
    }
    meta = RunMeta(
        kind="replay",
        title="made",
        offered=N,
        started="2026-11-23T12:00:00+00:00",
        target={"url": "http://127.0.0.1:1", "api": "chat", "model": "tiny", "max_concurrency": None},
        trace=TraceMeta(source="made.csv", format="test", sha256="ab" * 32),
        seed=3,
    )
    return Run.of(columns, meta)


def words(text: str) -> set[str]:
    return set(text.split())


def read(path: Path) -> Any:
    text = path.read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    return json.loads(text)


def test_vllm_bench(run: Run, tmp_path: Path) -> None:
    found = read(export(run, "vllm", tmp_path / "bench.json", slo=SLO)[0])
    set_up = (
        "date endpoint_type backend label model_id tokenizer_id num_prompts request_rate burstiness max_concurrency"
    )
    totals = (
        "duration completed failed total_input_tokens total_output_tokens request_throughput request_goodput "
        "output_throughput total_token_throughput max_output_tokens_per_s max_concurrent_requests rtfx"
    )
    arrays = "input_lens output_lens ttfts itls latencies start_times queue_times generated_texts errors"
    statistics = {
        f"{level}_{name}_ms"
        for name in ("ttft", "tpot", "itl", "e2el")
        for level in ("mean", "median", "std", "p50", "p90", "p95", "p99")
    }
    assert set(found) == {*set_up.split(), *totals.split(), *arrays.split(), *statistics, "squall"}
    assert all(len(found[name]) == N for name in arrays.split())
    told = metrics(run, slo=SLO)
    assert (found["num_prompts"], found["completed"], found["failed"]) == (N, 180, 20)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (180 * 50, 180 * 5)
    assert found["request_rate"] == pytest.approx(told.offered_rate)
    assert 0.7 < found["burstiness"] < 1.4  # Poisson
    assert found["median_ttft_ms"] == pytest.approx(1e3 * told.from_send.ttft.p50)
    assert found["p99_e2el_ms"] == pytest.approx(1e3 * told.from_send.e2e.p99)
    assert found["mean_tpot_ms"] == pytest.approx(20)
    assert found["mean_itl_ms"] == pytest.approx(20)
    assert found["request_goodput"] == pytest.approx(told.from_send.goodput)
    assert (found["ttfts"][3], found["output_lens"][3], found["errors"][3]) == (0, 0, "busy")
    assert found["ttfts"][1] == pytest.approx(0.1)
    assert found["queue_times"] == pytest.approx([0.002] * N)
    assert found["errors"][1] == ""
    assert found["squall"]["ttft"]["p50"] == pytest.approx(told.ttft.p50)  # from schedule
    assert found["squall"]["verdict"] == "VALID"
    begun, over = run.table["sent"].to_numpy(), run.table["ended"].to_numpy()
    assert found["max_concurrent_requests"] == max(int(((begun <= at) & (over > at)).sum()) for at in begun)
    assert found["max_output_tokens_per_s"] >= 45


def test_aiperf(run: Run, tmp_path: Path) -> None:
    summary, records = export(run, "aiperf", tmp_path / "artifacts", slo=SLO)
    assert (summary.name, records.name) == ("profile_export_aiperf.json", "profile_export.jsonl")
    found = read(summary)
    assert found["schema_version"] == "1.5"
    top = "aiperf_version benchmark_id start_time end_time was_cancelled input_config run_info"
    assert words(f"{top} telemetry_data error_summary") <= set(found)
    assert {"benchmark_id", "sweep_id", "random_seed", "trial", "run_label", "cli_command"} <= set(found["run_info"])
    assert found["error_summary"] == [
        {"error_details": {"code": 503, "type": "http_error", "message": "busy"}, "count": 20}
    ]
    for name, unit in (
        ("time_to_first_token", "ms"),
        ("inter_token_latency", "ms"),
        ("request_latency", "ms"),
        ("input_sequence_length", "tokens"),
        ("output_sequence_length", "tokens"),
    ):
        block = found[name]
        levels = "unit avg min max p1 p5 p10 p25 p50 p75 p90 p95 p99 std count sum"
        assert set(block) == set(levels.split())
        assert block["unit"] == unit
    assert found["time_to_first_token"]["avg"] == pytest.approx(1e3 * (metrics(run).from_send.ttft.mean or 0))
    assert found["request_count"] == {"unit": "requests", "avg": 180}
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    assert len(lines) == N
    keys = (
        "session_num x_request_id conversation_id turn_index request_start_ns request_ack_ns request_end_ns worker_id "
        "benchmark_phase was_cancelled"
    )
    assert all(set(line["metadata"]) == set(keys.split()) for line in lines)
    assert lines[1]["metrics"]["time_to_first_token"] == {"value": pytest.approx(100), "unit": "ms"}
    assert lines[1]["error"] is None
    assert (lines[3]["metrics"], lines[3]["error"]["code"]) == ({}, 503)
    start = datetime.fromisoformat("2026-11-23T12:00:00+00:00").timestamp()
    assert lines[0]["metadata"]["request_start_ns"] / 1e9 - start == pytest.approx(run.table["sent"][0], abs=1e-3)


UNITS = {
    "input_length": "count",
    "output_length": "count",
    "time_to_first_token": "s",
    "request_latency": "s",
    "normalized_time_per_output_token": "s/token",
    "time_per_output_token": "s/token",
    "input_token_rate": "tokens/s",
    "output_token_rate": "tokens/s",
    "total_token_rate": "tokens/s",
    "request_rate": "queries/s",
}
LEVELS = words("units mean mode stddev min p0p1 p1 p5 p10 p25 p50 p75 p90 p95 p99 p99p9 max")
STANDARDIZED = words(
    "tool tool_version parallelism source stage input_seq_len output_seq_len prefix multi_turn rate_qps concurrency"
)


def test_benchmark_report(run: Run, tmp_path: Path) -> None:
    """llm-d's schema 0.2 rejects unknown fields and units; what it requires is there."""
    found = read(export(run, "br02", tmp_path / "report.json")[0])
    assert set(found) == {"version", "run", "scenario", "results"}
    assert found["version"] == "0.2"
    assert set(found["run"]) <= words("uid eid cid pid time user description keywords")
    uuid.UUID(found["run"]["uid"])
    assert found["run"]["time"]["duration"].startswith("PT")
    assert datetime.fromisoformat(found["run"]["time"]["start"]) < datetime.fromisoformat(found["run"]["time"]["end"])
    load = found["scenario"]["load"]
    assert set(load) == {"metadata", "standardized", "native"}
    assert set(load["standardized"]) <= STANDARDIZED
    assert load["standardized"]["source"] in ("random", "sampled", "unknown")
    assert load["standardized"]["tool"] == "squall"
    assert load["standardized"]["input_seq_len"]["distribution"] == "fixed"
    assert load["standardized"]["input_seq_len"]["value"] == 50
    assert set(found["results"]) <= words("request_performance observability component_health profiling")
    aggregate = found["results"]["request_performance"]["aggregate"]
    assert set(aggregate) == {"requests", "latency", "throughput"}
    assert (aggregate["requests"]["total"], aggregate["requests"]["failures"]) == (N, 20)
    for part in aggregate.values():
        for name, statistic in part.items():
            if name not in ("total", "failures", "incomplete"):
                assert statistic["units"] == UNITS[name]
                assert set(statistic) <= LEVELS
                assert all(isinstance(value, int | float) for key, value in statistic.items() if key != "units")
    assert aggregate["latency"]["request_latency"]["p50"] == pytest.approx(metrics(run).from_send.e2e.p50)
    assert aggregate["latency"]["time_per_output_token"]["mean"] == pytest.approx(0.02)
    assert found["results"]["profiling"]["squall"]["verdict"] == "VALID"
    assert export(run, "br02", tmp_path / "again.json")[0].read_bytes() == (tmp_path / "report.json").read_bytes()


def test_tables(run: Run, tmp_path: Path) -> None:
    told = metrics(run)
    flat = pl.read_csv(export(run, "csv", tmp_path / "run.csv")[0])
    parquet = pl.read_parquet(export(run, "parquet", tmp_path / "run.parquet")[0])
    for table in (flat, parquet):
        assert len(table) == N
        assert table["ttft"].mean() == pytest.approx(told.ttft.mean)
        assert table["e2e_from_send"].mean() == pytest.approx(told.from_send.e2e.mean)
        assert table["ttft"].null_count() == 20
        assert table["reads"].max() == 5
    facts = json.loads(pl.read_parquet_metadata(tmp_path / "run.parquet")["squall"])
    assert facts["failed"] == 20


def test_a_run_without_an_answer_has_no_numbers(tmp_path: Path) -> None:
    empty = Run.of(
        {
            "request": [0, 1],
            "attempt": [1, 1],
            "scheduled": [0.0, 1.0],
            "status": ["refused", "cancelled"],
            "reason": [None, "stop"],
        },
        RunMeta(kind="replay", offered=3),
    )
    for format in FORMATS:
        for path in export(empty, format, tmp_path / format):
            assert path.stat().st_size > 0
    found = read(tmp_path / "vllm")
    assert (found["mean_ttft_ms"], found["ttfts"], found["start_times"]) == (None, [0, 0], [None, None])
    assert found["errors"] == ["refused", "stop"]
    report = read(tmp_path / "br02")["results"]["request_performance"]["aggregate"]
    assert report["requests"]["total"] == 3
    assert report["latency"] == {}
    assert "time_to_first_token" not in read(tmp_path / "aiperf" / "profile_export_aiperf.json")
    assert not math.isnan(read(tmp_path / "aiperf" / "profile_export_aiperf.json")["request_count"]["avg"])


def test_the_command(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.parquet"
    write_run(run, file)

    def call(*words: object) -> int:
        arguments = ["metrics", str(file), *map(str, words)]
        code: int = build()(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        return code

    assert call("--export", "vllm", "-o", tmp_path / "new" / "bench.json", "--json") == 0
    assert json.loads(capsys.readouterr().out)["requests"] == N
    assert read(tmp_path / "new" / "bench.json")["completed"] == 180
    with pytest.raises(InputError, match="belong together"):
        call("--export", "vllm")
    with pytest.raises(InputError, match="this is a directory"):
        call("--export", "csv", "-o", tmp_path)
    with pytest.raises(InputError, match="is a directory of two files"):
        call("--export", "aiperf", "-o", file)
