"""Runs survive their files; tables made elsewhere are read or refused with a sentence that names what is wrong."""

from pathlib import Path

import msgspec
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from squall.errors import InputError
from squall.run import Run, RunMeta, check_run_path, holds_run, metrics, read_run, write_run
from squall.run.attempt import lines_path
from squall.run.journal import SCHEDULE, write_header
from squall.trace.table import TraceMeta

FOREIGN = {
    "sent": [100.0, 101.0, 102.0],
    "first_token": [100.5, 101.25, None],
    "last_token": [101.5, 101.25, None],
    "request_tokens": [10, 20, 30],
    "response_tokens": [5, 1, 0],
}


def example() -> Run:
    """Two requests, one of them tried twice; text that a file format could trip over; lists; nulls."""
    columns = {
        "request": [0, 1, 1],
        "attempt": [1, 1, 2],
        "scheduled": [0.0, 1.0, 1.5],
        "sent": [0.1 + 0.2, 1.0, 1.5],
        "first_token": [0.5, None, 1e-7 + 2],
        "last_token": [1.5, None, 2.5],
        "status": ["ok", "reset", "ok"],
        "reason": [None, "stale_reuse", None],
        "http_status": [200, None, 200],
        "message": [None, 'a "quoted", torn\nline \x1b[31m', "ä"],
        "response_tokens": [3, None, 2],
        "chunks": [[0.0, 0.5, 1.0], None, []],
        "failed": [False, True, True],
        "service": ["api", None, "conversation"],
    }
    series = {"time": [1.0, 2.0], "kv_used": [0.25, 0.5], "preemptions": [0, 3]}
    trace = TraceMeta(source="trace.csv", format="burstgpt", steps=["--head 2"])
    meta = RunMeta(kind="replay", title="an example", trace=trace, target={"url": "http://x", "tp": 2}, offered=2)
    return Run.of(columns, meta, series)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_run_reads_as_it_was_written(tmp_path: Path, suffix: str) -> None:
    run, path = example(), tmp_path / "new folder" / f"run{suffix}"
    write_run(run, path)
    again = read_run(path)
    assert_frame_equal(again.table, run.table, check_exact=True)
    assert_frame_equal(again.series, run.series, check_exact=True)
    assert again.meta == run.meta
    assert holds_run(path)
    assert not [name for name in path.parent.iterdir() if name.name.startswith(".")]


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_the_same_run_gives_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    for name in ("a", "b"):
        write_run(example(), tmp_path / f"{name}{suffix}")
    for beside in (suffix, f".series{suffix}"):
        assert (tmp_path / f"a{beside}").read_bytes() == (tmp_path / f"b{beside}").read_bytes()


def test_a_run_without_series_does_not_inherit_an_older_ones(tmp_path: Path) -> None:
    run, path = example(), tmp_path / "run.parquet"
    write_run(run, path)
    write_run(Run(run.table, run.meta), path)
    assert read_run(path).series.is_empty()


def test_an_interrupted_write_leaves_the_old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, path = example(), tmp_path / "run.parquet"
    write_run(run, path)
    before = path.read_bytes()

    def torn(self: pl.DataFrame, file: Path, **_: object) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(pl.DataFrame, "write_parquet", torn)
    with pytest.raises(OSError, match="disk full"):
        write_run(run, path)
    assert path.read_bytes() == before
    assert sorted(name.name for name in tmp_path.iterdir()) == ["run.parquet", "run.series.parquet"]


def test_a_run_passes_through() -> None:
    run = example()
    assert read_run(run) is run


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_minimal_table_made_elsewhere_is_a_recorded_run(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"theirs{suffix}"
    frame = pl.DataFrame({**FOREIGN, "gpu": ["a", "b", "c"]})
    {".parquet": frame.write_parquet, ".csv": frame.write_csv, ".jsonl": frame.write_ndjson}[suffix](path)
    run = read_run(path)
    assert run.meta.kind == "recorded"
    assert run.meta.verdict == "UNCHECKED"
    assert run.meta.offered == 3
    assert run.table["status"].to_list() == ["ok", "ok", "truncated"]
    assert run.table["sent"].to_list() == run.table["scheduled"].to_list() == [0.0, 1.0, 2.0]  # from zero
    assert run.table["request"].to_list() == [0, 1, 2]
    assert run.table["attempt"].to_list() == [1, 1, 1]
    measured = metrics(run)
    assert measured.ttft.mean == pytest.approx((0.5 + 0.25) / 2)
    assert measured.tpot.max == pytest.approx(0.25)
    assert measured.lateness.n == 0  # unknown, not 0


@pytest.mark.parametrize("column", ["sent", "first_token", "last_token", "request_tokens", "response_tokens"])
def test_a_missing_column_is_named(tmp_path: Path, column: str) -> None:
    path = tmp_path / "theirs.csv"
    pl.DataFrame(FOREIGN).drop(column).write_csv(path)
    with pytest.raises(InputError, match=rf"theirs\.csv: the column {column} is missing"):
        read_run(path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"first_token": ["100.5", "soon", ""]}, "row 2: first_token is 'soon', not a finite number"),
        ({"first_token": ["100.5", "inf", ""]}, "row 2: first_token is 'inf', not a finite number"),
        ({"request_tokens": ["10", "1.5", "3"]}, "row 2: request_tokens is '1.5', not a whole number"),
        ({"request_tokens": ["10", "3", "9e12"]}, "row 3: request_tokens is '9e12'"),
        ({"status": ["ok", "ok", "meh"]}, "row 3: status is 'meh', not one of ok, http_error"),
        ({"first_token": ["100.5", "99", ""]}, r"row 2: first_token \(99.0\) is before sent \(101.0\)"),
        ({"sent": ["100", "", "3"]}, "row 2: sent is missing"),
        ({"chunks": ["[0, 1]", "no", ""]}, "the column chunks holds something else than JSON lists"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, change: dict[str, list[str]], complaint: str) -> None:
    path = tmp_path / "theirs.csv"
    pl.DataFrame({**FOREIGN, **change}).write_csv(path)
    with pytest.raises(InputError, match=complaint):
        read_run(path)


def test_nothing_has_many_names(tmp_path: Path) -> None:
    path = tmp_path / "theirs.csv"
    pl.DataFrame(
        {**FOREIGN, "first_token": ["100.5", " 101.25 ", "NaN"], "http_status": ["null", "", "None"]}
    ).write_csv(path)
    table = read_run(path).table
    assert table["first_token"].to_list() == [0.5, 1.25, None]
    assert table["http_status"].null_count() == 3


def test_whole_numbers_written_as_floats_are_read(tmp_path: Path) -> None:
    path = tmp_path / "theirs.csv"
    pl.DataFrame({**FOREIGN, "response_tokens": [5.0, 1.0, None]}).write_csv(path)
    assert read_run(path).table["response_tokens"].to_list() == [5, 1, None]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.parquet", b"not parquet", "not a readable parquet file"),
        ("a.csv", b"", "the file is empty"),
        ("a.csv", b"\x00\xff\xfe", "is missing|not a readable"),
        ("a.jsonl", b'{"sent": 1}\n{"sent": 2', "line 2 is not a JSON object"),
        ("a.jsonl", b"[1, 2]\n", "line 1 is not a JSON object"),
        ("a.txt", b"sent\n", r"a run is a \.parquet"),
    ],
)
def test_files_that_are_no_runs(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=complaint):
        read_run(path)


def test_paths_that_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such run"):
        read_run(tmp_path / "absent.parquet")
    with pytest.raises(InputError, match="this is a directory"):
        read_run(tmp_path)
    with pytest.raises(InputError, match="a run is written as"):
        check_run_path("run.txt")
    assert not holds_run(tmp_path)
    assert not holds_run(tmp_path / "absent.parquet")


def test_broken_metadata_is_an_input_error(tmp_path: Path) -> None:
    write_run(example(), tmp_path / "run.csv")
    (tmp_path / "run.meta.json").write_text("{")
    with pytest.raises(InputError, match="metadata cannot be read"):
        read_run(tmp_path / "run.csv")


def test_a_trace_is_not_a_run(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n1,GPT-4,2,3,5,API log\n")
    assert not holds_run(path)


def test_a_real_run_made_elsewhere(runs: Path, tmp_path: Path) -> None:
    """vLLM 0.19 on an RTX 4090: the published means, medians and P99 of TTFT, TPOT and E2E."""
    recorded = pl.read_ndjson(runs / "vllm-0.19-rtx4090-llama-3.1-8b" / "requests.jsonl")
    names = {"queued_ts": "sent", "first_token_ts": "first_token", "last_token_ts": "last_token"}
    names |= {"input_toks": "request_tokens", "output_toks": "response_tokens"}
    path = tmp_path / "vllm.jsonl"
    recorded.rename(names).drop("scheduled_ts", "arrival_time", "request_id").write_ndjson(path)
    found = metrics(path, slo="ttft=60s")
    assert found.requests == found.succeeded == 300
    for latency, published in (
        (found.ttft, (65.46, 60.11, 137.36)),
        (found.tpot, (0.0324, 0.0308, 0.0560)),
        (found.e2e, (86.58, 83.41, 153.63)),
    ):
        assert (latency.mean, latency.p50, latency.p99) == pytest.approx(published, rel=2e-3)
    assert found.output_token_throughput == pytest.approx(1066, rel=2e-3)
    assert found.duration == pytest.approx(183.57, abs=0.01)


def test_a_run_that_was_never_finished_is_read_from_its_journal(tmp_path: Path) -> None:
    out = tmp_path / "run.parquet"
    journal = tmp_path / "run.parquet.journal"
    journal.mkdir()
    write_header(journal, RunMeta(kind="replay", offered=2, state="running"))
    pl.DataFrame({"request": [0, 1], "scheduled": [0.0, 1.0]}).write_parquet(journal / SCHEDULE)
    line = {
        "request": 0,
        "attempt": 1,
        "status": "ok",
        "scheduled": 0.0,
        "sent": 0.0,
        "first_token": 0.5,
        "last_token": 1.0,
    }
    lines_path(journal, 0).write_bytes(
        msgspec.json.encode(line) + b"\n" + b'{"request": 1, "att'
    )  # killed while writing
    for path in (out, journal):
        assert holds_run(path)
        found = metrics(path, slo="ttft=1s")
        assert (found.requests, found.succeeded, found.failed) == (2, 1, 1)
        assert found.goodput_share == 0.5
    write_run(example(), out)
    assert read_run(out).meta.title == "an example"  # the finished run comes first
