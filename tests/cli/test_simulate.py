"""The simulate and calibrate commands: what they print, write, refuse, and the files that pass between them."""

import json

import numpy as np
import polars as pl
import pytest

from squall.cli import main
from squall.run.files import read_run


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
