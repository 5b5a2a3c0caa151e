"""`squall metrics` and `squall report` as a user or a CI job calls them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from squall.run import Run, RunMeta, write_run


def squall(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "squall", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run.parquet: 100 requests 1 s apart, of which 80 have a TTFT of 0.5 s, 10 one of 2 s, and 10 fail."""
    n = 100
    ttft = np.where(np.arange(n) < 80, 0.5, 2.0)
    failed = np.arange(n) >= 90
    columns: dict[str, Any] = {
        "request": np.arange(n),
        "attempt": np.ones(n, int),
        "scheduled": np.arange(n, dtype=float),
        "sent": np.arange(n, dtype=float),
        "first_token": [None if bad else k + t for k, (t, bad) in enumerate(zip(ttft, failed, strict=True))],
        "last_token": [None if bad else k + t + 0.9 for k, (t, bad) in enumerate(zip(ttft, failed, strict=True))],
        "ended": np.arange(n) + 3.0,
        "status": ["timeout" if bad else "ok" for bad in failed],
        "message": ["\x1b[31m[bold]busy[/bold]" if bad else None for bad in failed],
        "response_tokens": np.full(n, 10),
    }
    made = tmp_path_factory.mktemp("runs")
    write_run(Run.of(columns, RunMeta(kind="replay", title="made", offered=n)), made / "run.parquet")
    limited = RunMeta(kind="replay", offered=n, verdict="CLIENT-LIMITED", verdict_reasons=["p99 lateness 8 ms"])
    write_run(Run.of(columns, limited), made / "limited.csv")
    return made


def test_json_is_the_whole_of_standard_output(folder: Path) -> None:
    done = squall("metrics", folder / "run.parquet", "--slo", "ttft=1s", "--window", "30s", "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["requests"], found["succeeded"], found["failed"]) == (100, 90, 10)
    assert found["errors"] == {"timeout": 10}
    assert found["goodput_share"] == pytest.approx(0.8)
    assert found["ttft"]["p50"] == pytest.approx(0.5)
    assert found["ttft"]["p99"] is None  # 90 answers do not support it
    assert found["tpot"]["mean"] == pytest.approx(0.1)
    assert found["itl"]["n"] == 0
    assert len(found["windows"]) == 4
    assert done.stderr == ""


def test_people_get_tables(folder: Path) -> None:
    done = squall("metrics", folder / "run.parquet", "--slo", "ttft=1s")
    assert done.returncode == 0, done.stderr
    for text in (
        "made: replay, complete, VALID",
        "10 failed (10 %)",
        "80 %",
        "TTFT ≤ 1 s",
        "TTFT",
        "timeout",
        "Windows of 60 s",
    ):
        assert text in done.stdout, text
    assert "\x1b" not in done.stdout
    assert "[bold]busy" in done.stdout  # shown, not obeyed


def test_many_windows_become_lines(folder: Path) -> None:
    done = squall("metrics", folder / "run.parquet", "--window", "1s")
    assert "over time, from 0" in done.stdout
    assert "█" in done.stdout


@pytest.mark.parametrize(
    ("name", "flags", "code"),
    [
        ("run.parquet", ["--slo", "ttft=1s", "--min-goodput", "0.8"], 0),
        ("run.parquet", ["--slo", "ttft=1s", "--min-goodput", "0.81"], 4),
        ("limited.csv", [], 3),
        ("limited.csv", ["--slo", "ttft=1s", "--min-goodput", "0.81"], 3),
    ],
)
def test_exit_codes_for_ci(folder: Path, name: str, flags: list[str], code: int) -> None:
    done = squall("metrics", folder / name, *flags, "--json")
    assert done.returncode == code, done.stderr
    json.loads(done.stdout)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["metrics", "absent.parquet"], "there is no such run"),
        (["metrics", "."], "this is a directory"),
        (["metrics", "{run}", "--slo", "ttft=1000"], "lacks a unit"),
        (["metrics", "{run}", "--slo", "latency=1s"], "known are ttft, tpot, e2e"),
        (["metrics", "{run}", "--min-goodput", "0.9"], "give one with --slo"),
        (["metrics", "{run}", "--slo", "ttft=1s", "--min-goodput", "99"], "from 0 to 1"),
        (["metrics", "{run}", "--window", "0"], "longer than 0"),
        (["report", "absent.csv", "-o", "x.html"], "absent.csv"),
        (["report", "{run}", "-o", "x.pdf"], "ends in .html"),
        (["report", "{run}"], "--out"),
        (["report", "-o", "x.html"], "--paths requires"),
    ],
)
def test_what_is_wrong_is_one_sentence(folder: Path, args: list[str], sentence: str) -> None:
    done = squall(*(folder / "run.parquet" if arg == "{run}" else arg for arg in args))
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_report_writes_a_page(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "page.html"
    done = squall("report", folder / "run.parquet", folder / "limited.csv", "-o", out, "--title", "A & B", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"out": str(out), "bytes": out.stat().st_size}
    assert "<title>A &amp; B</title>" in out.read_text(encoding="utf-8")


def test_report_names_a_run_by_its_file_if_it_has_no_title(folder: Path, tmp_path: Path) -> None:
    done = squall("report", folder / "limited.csv", "-o", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "page.html" in done.stderr
    assert "limited is CLIENT-LIMITED" in (tmp_path / "page.html").read_text(encoding="utf-8")
