"""Logs as the Trace and the Run that a capture would have made."""

import json
import sys
from pathlib import Path

import pytest

import squall
from squall.capture import import_log
from squall.cli.app import main
from squall.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[1] / "trace"))
from test_logs import CANARY, MAPPING, NGINX, VLLM, access, answer, as_lines, export, new, old, payload, span


def test_litellm_as_a_run(tmp_path):
    records = [payload(1000.0 + k, took=2.0, first=0.5) for k in range(5)]
    records.append(payload(1010.0, status="failure", error_information={"error_code": "429"}))
    records.append(payload(1011.0, status="failure"))
    (tmp_path / "a.jsonl").write_text(as_lines(reversed(records)))
    trace, run = import_log(tmp_path / "a.jsonl", out=tmp_path / "out")
    assert run.table["status"].to_list() == ["ok"] * 5 + ["http_error"] * 2
    assert run.table["http_status"].to_list() == [200] * 5 + [429, None]
    assert run.table["reason"].to_list() == [None] * 6 + ["recorded"]
    assert (run.table["first_token"] - run.table["sent"]).to_list()[:5] == [0.5] * 5
    found = squall.metrics(squall.read_run(tmp_path / "out" / "run.parquet"))
    assert (found.requests, found.failed, found.verdict) == (7, 2, "UNCHECKED")
    assert found.ttft.mean == pytest.approx(0.5)
    assert found.e2e.mean == pytest.approx(2)
    assert found.tpot.mean == pytest.approx(1.5 / 9)
    assert squall.read_trace(tmp_path / "out" / "trace.parquet").table.equals(trace.table)
    for file in (tmp_path / "out").iterdir():
        assert CANARY.encode() not in file.read_bytes()


def test_spans_and_access_logs_as_runs(tmp_path):
    spans = export(span("llm_request", start=1, **VLLM), span("llm_request", "b", start=0, took=3, **VLLM))
    (tmp_path / "spans.json").write_text(json.dumps(spans))
    _, run = import_log(tmp_path / "spans.json", out=tmp_path / "spans")
    assert run.table["ended"].to_list() == [3, 3]
    assert run.table["first_token"].to_list() == [0.25, 1.25]
    (tmp_path / "access.log").write_text(f"{access()}\n{access(status=499, tokens='- -')}\n{access(status=503)}\n")
    _, run = import_log(tmp_path / "access.log", out=tmp_path / "access", format=NGINX, columns=MAPPING)
    assert run.table["status"].to_list() == ["ok", "cancelled", "http_error"]
    assert (run.table["first_token"] - run.table["sent"]).to_list() == pytest.approx([0.5] * 3)


def command(*words) -> int:
    with pytest.raises(SystemExit) as over:
        main(["capture", *map(str, words)])
    return over.value.code


def test_the_command_imports(tmp_path, capsys):
    log = tmp_path / "vllm.log"
    log.write_text("\n".join([new("a", 20), new("b", 30), answer("a", 5), answer("b", 6)]))
    assert command("--import", log, "-o", tmp_path / "out", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["requests"], said["request_tokens"], said["response_tokens"]) == (2, 50, 11)
    assert command("--import", log, "-o", tmp_path / "out") == 2
    assert "give a new or an empty folder" in capsys.readouterr().err
    assert command("--import", log) == 2
    assert command("--upstream", "http://x", "-o", tmp_path / "c", "--format", "vllm") == 2


def test_a_log_that_does_not_tell_when_answers_ended(tmp_path):
    (tmp_path / "a.log").write_text(old("a", 9, eos="True"))
    with pytest.raises(InputError, match="does not say when its answers ended"):
        import_log(tmp_path / "a.log", out=tmp_path / "out")
