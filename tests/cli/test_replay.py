"""`squall replay` as it is typed: what it prints, and its exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "replay"))
from mock import Behaviour, Mock  # noqa: UP026 - the file in tests/replay


@pytest.fixture
def trace(tmp_path) -> Path:
    """Eight requests in BurstGPT's columns; the fourth was a failure."""
    rows = ["Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"]
    rows += [f"{i},ChatGPT,{30 + i},{0 if i == 3 else 5},{35 + i},API log" for i in range(8)]
    path = tmp_path / "trace.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def squall(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "squall", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_run_and_its_summary(trace, tmp_path):
    out = tmp_path / "run.parquet"
    with Mock() as mock:
        done = squall("replay", trace, "-o", out, "--url", mock.url, "--speed", 8)
    assert done.returncode in (0, 3), done.stderr
    assert done.stdout.split()[0] in ("VALID", "CLIENT-LIMITED")
    assert "8 ok, 0 failed" in done.stdout
    assert out.is_file()


def test_json_and_failures(trace, tmp_path):
    broken = Behaviour(status=500, body=b'{"error": {"message": "[red]broken\\u001b[31m"}}')
    with Mock(lambda number, seen: broken if seen.body["max_tokens"] > 1 else Behaviour()) as mock:
        done = squall(
            "replay", trace, "-o", tmp_path / "r.jsonl", "--url", mock.url, "--speed", 8, "--drop-failed", "--json"
        )
        assert done.returncode in (0, 3), done.stderr
        result = json.loads(done.stdout)
        assert (result["requests"], result["failed"]) == (7, 7)
        assert result["errors"] == {"http_error": 7}
        assert result["verdict"] in ("VALID", "CLIENT-LIMITED")
        shown = squall("replay", trace, "-o", tmp_path / "r.parquet", "--url", mock.url, "--speed", 8)
    assert "[red]broken" in shown.stdout
    assert "\x1b" not in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--url", "http://127.0.0.1:9"], "cannot be reached"),
        (["--url", "http://127.0.0.1:9", "--retries", "-1"], "--retries"),
        (["--url", "http://127.0.0.1:9", "--api", "smoke"], "api"),
        ([], "url"),
    ],
)
def test_a_wrong_call_is_one_sentence_and_2(trace, tmp_path, arguments, words):
    done = squall("replay", trace, "-o", tmp_path / "run.parquet", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_stalling_sender_is_named(trace, tmp_path):
    """A client that is stopped for a while must not call its numbers valid."""
    program = tmp_path / "stalled.py"
    out = tmp_path / "run.parquet"
    with Mock() as mock:
        program.write_text(
            "import sys, threading, time\n"
            "from squall.cli import main\n"
            "from squall.replay import sender\n"
            "ring = sender.Sender._ring\n"
            "sender.Sender._ring = lambda self: (time.sleep(0.05), ring(self))[1]\n"
            f"main(['replay', {str(trace)!r}, '-o', {str(out)!r}, '--url', {mock.url!r}, '--speed', '8'])\n"
        )
        done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3
    assert done.stdout.startswith("CLIENT-LIMITED")
    assert "sent late" in done.stdout


def test_repeated_runs_have_a_spread(trace, tmp_path):
    with Mock() as mock:
        arguments = ("replay", trace, "-o", tmp_path / "r.parquet", "--url", mock.url, "--speed", 8, "--repeat", 2)
        found = json.loads(squall(*arguments, "--json").stdout)
        shown = squall(*arguments).stdout
    assert [Path(run["run"]).name for run in found["runs"]] == ["r.1.parquet", "r.2.parquet"]
    assert (tmp_path / "r.2.parquet").exists()
    assert found["spread"]["ttft_mean"]["n"] == 2
    assert found["spread"]["failed_share"]["max"] == 0
    assert "2 runs" in shown
    assert "std between runs" in shown
