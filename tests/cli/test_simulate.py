"""The simulate and calibrate commands: what they print, write, refuse, and the files that pass between them."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from squall.cli import main
from squall.run.files import read_run
from squall.simulate import simulate
from squall.trace.files import write_trace
from squall.trace.table import Trace, TraceMeta


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    rng = np.random.default_rng(0)
    n = 120
    path = tmp_path_factory.mktemp("trace") / "trace.csv"
    pl.DataFrame(
        {
            "Timestamp": np.sort(rng.integers(0, 60, n)),
            "Model": ["ChatGPT"] * n,
            "Request tokens": rng.integers(10, 900, n),
            "Response tokens": rng.integers(10, 300, n),
            "Total tokens": [0] * n,
            "Log Type": ["Conversation log"] * n,
        }
    ).write_csv(path)
    return str(path)


def call(*words):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return stop.value.code


def test_simulate_prints_a_headline_and_writes_a_run(trace, tmp_path, capsys):
    out = tmp_path / "run.parquet"
    assert call("simulate", trace, "-o", out, "--replicas", 2, "--router", "random", "--quiet") == 0
    said = capsys.readouterr()
    assert "uncalibrated" in said.out
    assert "2 x llama-3.1-8b" in said.out
    for word in ("TTFT", "TPOT", "E2E", "p99", "throughput", "peak KV use", "preemptions", "failures"):
        assert word in said.out
    assert said.err == ""
    run = read_run(out)
    assert len(run) == 120
    assert run.meta.kind == "simulation"


CALLED = """
import sys
from squall.cli import main
try:
    main(sys.argv[1:])
except SystemExit as done:
    assert not done.code
print([name for name in ("numba", "llvmlite", "scipy") if name in sys.modules])
"""


def test_a_second_call_needs_neither_numba_nor_llvm(trace, tmp_path):
    """Half of what it took to start was to import them."""
    call = [sys.executable, "-c", CALLED, "simulate", trace, "-o", str(tmp_path / "run.parquet"), "--quiet"]
    for _ in range(2):
        said = subprocess.run(call, capture_output=True, text=True, timeout=300, check=True).stdout
    assert said.splitlines()[-1] == "[]"


def test_the_slowest_requests_are_told_whole(trace, tmp_path, capsys):
    """However long the reasons are, no number of them is cut."""
    assert call("simulate", trace, "-o", tmp_path / "run.csv", "--explain", 5, "--quiet") == 0
    said = capsys.readouterr().out
    rows = said[said.index("The slowest requests") : said.index("throughput")]
    assert "…" not in rows
    slowest = read_run(tmp_path / "run.csv").meta.target["slowest"]
    assert len(slowest) == 5
    words = " ".join(rows.split())
    assert all(f" {it['request']} " in words and it["reason"].split(",")[0] in words for it in slowest)


def test_json_is_alone_on_standard_output(trace, tmp_path, capsys):
    assert (
        call("simulate", trace, "--out", tmp_path / "run.csv", "--json", "--kv-blocks", 3000, "--timeout", "30s") == 0
    )
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert result["requests"] == 120
    assert result["ttft"]["n"] == 120
    assert result["step_time"] == "uncalibrated roofline"
    assert result["target"]["kv_blocks"] == 3000
    assert result["target"]["timeout"] == 30
    assert "Prefix caching is off" in said.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--engine", "tgi"], "--engine tgi"),
        (["--scheduler", "lifo"], "--scheduler lifo"),
        (["--model", "missing.json"], "--model missing.json"),
        (["--gpu", "missing.json"], "--gpu missing.json"),
        (["--calibration", "missing.json"], "--calibration missing.json"),
        (["--prefill-replicas", "2"], "prefill-replicas"),
        (["--prefix-caching"], "--shared-prefix"),
        (["--retries", "2"], "--retries 2"),
        (["--kv-blocks", "three"], "kv-blocks"),
        (["--model", ""], "--model : neither a built-in name nor a file"),
        (["--timeline", "/proc/t.json"], "nothing can be written in /proc"),
    ],
)
def test_wrong_calls_are_one_sentence(trace, tmp_path, capsys, words, says):
    assert call("simulate", trace, "-o", tmp_path / "run.parquet", *words) == 2
    said = capsys.readouterr()
    assert says in said.err
    assert "Traceback" not in said.err
    assert said.out == ""
    assert not (tmp_path / "run.parquet").exists()


def test_a_bad_destination_is_told_before_the_work(trace, tmp_path, capsys):
    assert call("simulate", trace, "-o", tmp_path / "run.xyz") == 2
    assert "run.xyz" in capsys.readouterr().err


def test_nothing_is_written_over_the_trace_or_where_nothing_can_be(trace, tmp_path, capsys):
    before = Path(trace).read_text()
    assert call("simulate", trace, "-o", trace) == 2
    assert "this is the file that is read" in capsys.readouterr().err
    assert Path(trace).read_text() == before
    assert call("simulate", trace, "-o", "/proc/run.csv") == 2
    assert "nothing can be written in /proc" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("x: No space (os error 28)")])
def test_a_full_disk_leaves_what_was_told(trace, tmp_path, capsys, monkeypatch, error):
    out = tmp_path / "run.csv"
    out.write_text("before")

    def full(*_):
        raise error

    monkeypatch.setattr("squall.run.files._write_table", full)
    assert call("simulate", trace, "-o", out) == 1
    said = capsys.readouterr()
    assert "TTFT" in said.out
    assert "cannot be written (No space" in said.err
    assert "Traceback" not in said.err
    assert out.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["run.csv"]


def test_a_reader_that_goes_away_loses_nothing(trace, tmp_path):
    """`squall simulate … | head -1`, and one that reads nothing at all."""
    command = [sys.executable, "-m", "squall", "simulate", trace, "-o", str(tmp_path / "run.parquet"), "--quiet"]
    for more in ([], ["--json"]):
        process = subprocess.Popen([*command, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 0
        assert len(read_run(tmp_path / "run.parquet")) == 120
        (tmp_path / "run.parquet").unlink()


def test_names_from_files_cannot_steer_a_terminal(trace, tmp_path, capsys):
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 99}
    config = shape | {"vocab_size": 9, "_name_or_path": "\x1b[31mred"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert call("simulate", trace, "-o", tmp_path / "run.csv", "--model", tmp_path, "--head", 5) == 0
    said = capsys.readouterr()
    assert "\\x1b[31mred" in said.out
    assert "\x1b" not in said.out + said.err
    assert "None" not in said.out  # a percentile of too few


@pytest.fixture(scope="module")
def overload(tmp_path_factory):
    rng = np.random.default_rng(1)
    n = 400_000
    columns = {
        "arrival": np.cumsum(rng.exponential(0.001, n)),
        "request_tokens": rng.integers(10, 900, n),
        "response_tokens": rng.integers(10, 300, n),
    }
    trace = Trace.of(columns, TraceMeta(source="test", format="generated"))
    path = tmp_path_factory.mktemp("overload") / "trace.parquet"
    write_trace(trace, path)
    return path, simulate(trace, token_times=False).table


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_what_had_happened(overload, tmp_path, capsys, monkeypatch, number):
    """What had ended by then is as in the whole run, what was under way is cancelled, and the exit code says so."""

    @contextmanager
    def interrupting(title, total):
        yield lambda done: done > 1000 and os.kill(os.getpid(), number)

    monkeypatch.setattr("squall.simulate.progress", interrupting)
    monkeypatch.setattr("squall.simulate.kernel.GLANCE", 2e-3)  # a fast machine is done in less than a usual one
    path, whole = overload
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs in the background ignores it
    try:
        assert call("simulate", path, "-o", tmp_path / "part.parquet") == 130
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    said = capsys.readouterr()
    assert "Interrupted after" in said.err
    assert "written" in said.out
    part = read_run(tmp_path / "part.parquet")
    assert part.meta.state == "interrupted"
    assert part.meta.offered == len(whole) > len(part)
    ended = part.table.filter(pl.col("status") == "ok")
    assert len(ended) > 0
    rest = part.table.filter(pl.col("status") != "ok")
    assert set(rest.select("status", "reason").rows()) == {("cancelled", "stop")}
    told = ["request", "sent", "first_token", "last_token", "response_tokens", "preemptions"]
    assert ended.select(told).equals(whole[ended["request"]].select(told))


def test_calibrate_then_simulate(trace, tmp_path, capsys):
    server = ["--model", "llama-3.2-3b", "--gpu", "l40s", "--engine", "vllm-0.11", "--kv-blocks", 4000]
    assert call("simulate", trace, "-o", tmp_path / "run.csv", *server, "--quiet") == 0
    assert (
        call("calibrate", "--run", tmp_path / "run.csv", "-o", tmp_path / "c.json", "--first", 60, *server, "--quiet")
        == 0
    )
    said = capsys.readouterr()
    for word in ("e_bw", "e_fl", "o0", "held out", "95 % interval"):
        assert word in said.out
    assert call("simulate", trace, "-o", tmp_path / "again.csv", "--calibration", tmp_path / "c.json") == 0
    said = capsys.readouterr()
    assert "calibrated on run.csv" in said.out
    assert "l40s" in said.out
    assert call("simulate", trace, "-o", tmp_path / "x.csv", "--calibration", tmp_path / "c.json", "--gpu", "h100") == 2


def test_calibrate_needs_to_know_what_ran(tmp_path, capsys):
    assert call("calibrate", "--run", "run.csv", "-o", tmp_path / "c.json", "--gpu", "h100") == 2
    assert "--model is missing" in capsys.readouterr().err
