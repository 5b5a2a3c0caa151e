"""The published statistics agree on the public files that are small enough, and a file that is not theirs fails."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import squall
from squall.errors import InputError
from squall.study.reference_burstgpt import Figure, densest, duplicates
from squall.study.reference_statistics import judged, reference_statistics
from squall.trace import open_trace

HEADER = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
EXCERPTS = (
    "burstgpt/BurstGPT_1_first30_rows.csv",
    "burstgpt/burstgpt_1_conv_first500_request_tokens_capped1023.txt",
    "burstgpt/burstgpt_1_5min_excerpt.csv",
    "burstgpt/burstgpt_1_hourly.csv",
    "burstgpt/burstgpt_1_minutes_days_hours.json",
    "burstgpt/burstgpt_3_conversation_head418.csv",
    "azure-2023/AzureLLMInferenceTrace_conv.csv",
    "azure-2023/azure_2024_conv_hourly.csv",
    "mooncake/conversation_trace.jsonl",
    "servegen/deepseek-r1",
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
    assert [check for check in found.checks if check.passed is False] == []
    assert found.passed == len(found.checks)
    assert found.passed >= 4


def test_a_small_file_is_compared_by_name_and_differs(small: Path, tmp_path: Path) -> None:
    found = squall.study("reference-statistics", small, out=tmp_path / "out")
    ours = {check.quantity: check for check in found.checks}
    assert found.failed + found.passed + found.not_judged == len(found.checks) > 150
    assert (ours["rows"].ours, ours["rows"].passed) == (600.0, False)
    assert ours["rows"].difference == 600 - 1_429_737
    assert ours["all, failed"].ours == pytest.approx(1 / 3)
    assert ours["gap, s, p50"].ours == 900.0
    assert ours["of these without request length"].ours == sum(k % 3 == 0 and k % 7 == 0 for k in range(600))
    assert ours["all, empty hours"].ours == 1464 - 150  # four requests an hour for 150 hours
    with (tmp_path / "out" / "reference-statistics.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(found.checks)


PART_3 = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def test_part_3_is_told_by_its_clock(tmp_path: Path) -> None:
    """One API request every 10 s and one conversation request every 100 s, in sessions of two; the last one fails."""
    begin, hours = 19_440_110, 30
    rows = [
        (begin + 10 * k, "", 2 + k % 3, "ChatGPT", 20 + k % 50, 10, "API") for k in range(360 * hours)
    ] + [
        (begin + 100 * k, f"s{k // 2}", 7, "GPT-4", 100 + 40 * (k % 2), 40, "Conversation") for k in range(36 * hours)
    ]  # fmt: skip
    rows.sort(key=lambda row: row[0])
    rows.append((begin + 10 * 360 * hours, "", 0, "ChatGPT", 0, 0, "API"))
    path = tmp_path / "part.csv"
    path.write_text(PART_3 + "".join(
        f"{t}.0,{s},{e},{m},{i},{o},{i + o},{kind} log\n" for t, s, e, m, i, o, kind in rows
    ))  # fmt: skip
    ours = {check.quantity: check.ours for check in reference_statistics(path).checks}
    assert ours["sessions"] == 18 * hours
    assert ours["turns, mean"] == 2.0
    assert ours["sessions of 2 requests"] == 1.0
    assert ours["api rows"] == 360 * hours + 1
    assert ours["first second"] == begin
    assert ours["conversation, elapsed, s, p90"] == 7.0
    assert ours["api, elapsed, s, mean"] == pytest.approx(3.0)
    assert ours["GPT-4 conversation, request tokens, mean"] == 120.0
    assert (
        ours["api, gap CV in 5 minutes, p50"] == pytest.approx(0.0, abs=1e-9)
        or ours["api, such windows (20 gaps or more)"] == 0.0
    )  # equal gaps have no fit
    assert ours["growth, p50"] == 40.0
    assert ours["silence, mean of the logarithm"] == pytest.approx(math.log(100))
    assert ours["failed rows"] == 1.0


def test_gaps_of_one_law_have_its_cv_in_windows_of_five_minutes(tmp_path: Path) -> None:
    """Gaps of 1 s and 9 s in turns: mean 5, standard deviation 4."""
    times = [19_440_110 + 10 * (k // 2) + (k % 2) for k in range(5000)]
    path = tmp_path / "part.csv"
    path.write_text(
        PART_3 + "".join(f"{t}.0,,1,GPT-4,10,{int(k > 0)},{10 + int(k > 0)},API log\n" for k, t in enumerate(times))
    )
    found = {check.quantity: check for check in reference_statistics(path).checks}
    assert found["api, gap CV in 5 minutes, p50"].ours == pytest.approx(0.8, abs=0.02)
    assert found["api, gap CV in 5 minutes, p50"].passed is None
    assert found["api, 5-minute windows with a CV above 1"].ours == 0.0
    assert found["api, such windows (20 gaps or more)"].ours >= 25000 // 300 - 1


def test_charts_of_part_1_are_read_as_they_were_drawn(tmp_path: Path) -> None:
    """Conversations on working days alone, 60 an hour, whose responses are 30 tokens and 0.18 of the request."""
    lines = [
        f"{86400 * day + 3600 * hour + 60 * k},ChatGPT,{400 + 16 * k},{30 + round(0.18 * (400 + 16 * k))},"
        f"{430 + 16 * k + round(0.18 * (400 + 16 * k))},Conversation log\n"
        for day in range(61)
        if day % 7 not in (3, 4)
        for hour in range(24)
        for k in range(60)
    ]
    lines.append("5270100,ChatGPT,0,0,0,Conversation log\n")
    path = tmp_path / "BurstGPT_1.csv"
    path.write_text(HEADER + "".join(lines))
    found = {check.quantity: check for check in reference_statistics(path).checks}
    assert found["conversation, slope of the response at 400 to 2,000 tokens"].passed
    assert found["ChatGPT conversation, requests of a working day, median"].ours == 1440.0
    assert found["ChatGPT conversation, requests of a weekend day, median"].ours == 0.0
    assert found["ChatGPT conversation, requests at 12 h, median"].passed
    assert not found["ChatGPT conversation, requests at 15 h, median"].passed
    tokens = 24 * sum(400 + 16 * k for k in range(60)) / 24
    assert found["ChatGPT conversation, request tokens an hour at 15 to 16 h, median"].ours == tokens


def test_part_2_and_the_cleaned_forms_are_known(tmp_path: Path) -> None:
    rows = [
        f"{5_270_414 + 30 * k},ChatGPT,{100 + k % 3},{k % 4 + 1},{101 + k % 3 + k % 4},API log\n" for k in range(500)
    ]
    clean, raw = tmp_path / "clean.csv", tmp_path / "raw.csv"
    clean.write_text(HEADER + "".join(rows) + rows[-1])
    raw.write_text(HEADER + "".join(rows) + f"{5_270_414 + 30 * 500},GPT-4,0,0,0,API log\n")
    ours = {check.quantity: check.ours for check in reference_statistics(clean).checks}
    assert (ours["rows"], ours["different rows"], ours["request tokens, max"]) == (501, 500, 102)
    assert ours["gap, max"] == 30.0
    ours = {check.quantity: check.ours for check in reference_statistics(raw).checks}
    assert ours["all, failed"] == pytest.approx(1 / 501)


@given(st.lists(st.integers(0, 500), min_size=1, max_size=60), st.integers(1, 100))
def test_the_densest_stretch_is_that_of_a_slow_search(times: list[int], width: int) -> None:
    arrival = np.sort(np.array(times, float))
    slow = max(sum(begin <= time < begin + width for time in times) for begin in times)
    assert densest(arrival, width) == slow


def test_duplicates_are_groups_of_equal_rows(small: Path) -> None:
    small.write_text(HEADER + "5,GPT-4,1,1,2,API log\n" * 3 + "6,GPT-4,1,1,2,API log\n" + "7,GPT-4,1,1,2,API log\n" * 2)
    assert duplicates(open_trace(small).table) == (2, 5)


@pytest.mark.parametrize(
    ("published", "ours", "allowed", "difference", "passed"),
    [
        ("1,136", 1136.0, 0.0, 0.0, True),
        ("1,136", 1137.0, 0.0, 1.0, False),
        ("7.26 %", 0.07264, 0.0, 0.004, True),
        ("-0.11", -0.114, 0.0, -0.004, True),
        ("500 – 1,500", 700.0, 0.1, 0.0, True),
        ("500 – 1,500", 1600.0, 0.1, 100.0, True),
        ("500 – 1,500", 300.0, 0.1, -200.0, False),
        ("5", 7.0, None, 2.0, None),
        ("5", None, 0.0, None, False),
    ],
)
def test_a_figure_passes_within_its_rounding_or_range(published, ours, allowed, difference, passed) -> None:
    found = judged("t", Figure("s", "q", published, ours, allowed))
    assert found.passed is passed
    assert found.difference == (None if difference is None else pytest.approx(difference))


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
    assert plain["failed"] + plain["passed"] + plain["not_judged"] == len(plain["checks"])
    listed = run("--list")
    assert (listed.returncode, "reference-statistics" in listed.stdout) == (0, True)
    for wrong in ((), ("guess",), ("reference-statistics",)):
        refused = run(*wrong)
        assert refused.returncode == 2
        assert len(refused.stderr.splitlines()) == 1
