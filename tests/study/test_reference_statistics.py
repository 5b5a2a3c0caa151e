"""The published statistics agree on the public files that are small enough, and a file that is not theirs fails."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

import squall
from squall.errors import InputError
from squall.study.reference_statistics import reference_statistics

HEADER = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
EXCERPTS = (
    "burstgpt/burstgpt_1_hourly.csv",
    "burstgpt/burstgpt_3_conversation_head418.csv",
    "azure-2023/AzureLLMInferenceTrace_conv.csv",
    "mooncake/conversation_trace.jsonl",
)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "BurstGPT_1.csv"
    rows = (
        f"{5 + 900 * k},{'GPT-4' if k % 5 == 0 else 'ChatGPT'},{(k % 7) * 10},{k % 3},{(k % 7) * 10 + k % 3},"
        f"{'API' if k % 2 else 'Conversation'} log\n"
        for k in range(600)
    )
    path.write_text(HEADER + "".join(rows))
    return path


@pytest.mark.parametrize("excerpt", EXCERPTS)
def test_the_excerpts_agree_with_what_is_published(traces: Path, excerpt: str) -> None:
    found = reference_statistics(traces / excerpt)
    assert [check for check in found.checks if not check.passed] == []
    assert found.passed > 12


def test_a_small_file_is_compared_by_name_and_differs(small: Path, tmp_path: Path) -> None:
    found = squall.study("reference-statistics", small, out=tmp_path / "out")
    ours = {check.quantity: check for check in found.checks}
    assert found.failed + found.passed == len(found.checks) > 80
    assert (ours["rows"].ours, ours["rows"].passed) == (600.0, False)
    assert ours["rows"].difference == 600 - 1_429_737
    assert ours["all, failed"].ours == pytest.approx(1 / 3)
    assert ours["gap, s, p50"].ours == 900.0
    assert ours["of these without request length"].ours == sum(k % 3 == 0 and k % 7 == 0 for k in range(600))
    assert ours["all, empty hours"].ours == 1464 - 150  # four requests an hour for 150 hours
    with (tmp_path / "out" / "reference-statistics.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(found.checks)


def test_part_3_is_told_by_its_clock(tmp_path: Path) -> None:
    header = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    rows = [
        f"{19440110.0 + 100 * k},{f's{k // 4}' if k % 2 else ''},2,ChatGPT,{20 + k},10,{30 + k},"
        f"{'Conversation' if k % 2 else 'API'} log\n"
        for k in range(400)
    ]
    path = tmp_path / "part.csv"
    path.write_text(header + "".join(rows))
    ours = {check.quantity: check.ours for check in reference_statistics(path).checks}
    assert ours["sessions"] == 100
    assert ours["turns, mean"] == 2.0
    assert ours["api rows"] == 200


def test_calls_that_make_no_sense(tmp_path: Path, small: Path) -> None:
    with pytest.raises(InputError, match="name the files"):
        reference_statistics()
    with pytest.raises(InputError, match="no such file"):
        reference_statistics(tmp_path / "absent.csv")
    with pytest.raises(InputError, match="there is no such study"):
        squall.study("guess")
    other = tmp_path / "other.csv"
    other.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n")
    with pytest.raises(InputError, match="no published statistics"):
        reference_statistics(other)
    with pytest.raises(InputError, match="name a directory"):
        reference_statistics(small, out=small)


def run(*args: object) -> "subprocess.CompletedProcess[str]":
    call = [sys.executable, "-m", "squall", "study", *map(str, args)]
    return subprocess.run(call, capture_output=True, text=True, timeout=60, check=False)


def test_the_command_prints_a_table_and_exits_with_4_if_figures_differ(small: Path) -> None:
    done = run("reference-statistics", small)
    assert done.returncode == 4, done.stderr
    assert "1,429,737" in done.stdout
    assert "FAIL" in done.stdout
    plain = json.loads(run("reference-statistics", small, "--json").stdout)
    assert plain["failed"] + plain["passed"] == len(plain["checks"])
    listed = run("--list")
    assert (listed.returncode, "reference-statistics" in listed.stdout) == (0, True)
    for wrong in ((), ("guess",), ("reference-statistics",)):
        refused = run(*wrong)
        assert refused.returncode == 2
        assert len(refused.stderr.splitlines()) == 1
