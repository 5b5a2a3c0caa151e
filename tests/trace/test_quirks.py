"""The quirks of BurstGPT's files, one by one: how each is read, and what `validate` says about it."""

import numpy as np
import pytest

import squall
from squall.errors import InputError
from squall.trace import open_trace, read_trace

SIX = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
EIGHT = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type"
UUID = "1722ac82-0a46-4bf0-aa08-89794e7a2b3f"
PLAIN = "40,ChatGPT,472,18,490,Conversation log"

# (quirk, file name, header, rows, line end, code of the finding, its rows, column that must be read, its values)
QUIRKS = [
    (
        "1 columns by name, whatever their order",
        "t.csv",
        "Log Type,Response tokens,Model,Timestamp,Request tokens",
        ["API log,7,GPT-4,3,9"],
        "\n",
        "without-failures",
        [],
        "response_tokens",
        [7],
    ),
    ("2 CRLF", "t.csv", SIX, [PLAIN], "\r\n", "crlf", [], "request_tokens", [472]),
    ("2 byte-order mark", "t.csv", "\ufeff" + SIX, [PLAIN], "\n", "byte-order-mark", [], "request_tokens", [472]),
    (
        "2 whole and .0 times, blank and UUID sessions",
        "t.csv",
        EIGHT,
        [f"100.0,{UUID},4,GPT-4,9,4,13,Conversation log", "101,,0,ChatGPT,3,2,5,API log"],
        "\n",
        "uuid-sessions",
        [],
        "session",
        [0, None],
    ),
    (
        "2 numbers as sessions",
        "t.csv",
        EIGHT,
        ["100.0,77,4,GPT-4,9,4,13,Conversation log"],
        "\n",
        "number-sessions",
        [],
        "session",
        [0],
    ),
    (
        "3 ties keep the file's order",
        "t.csv",
        SIX,
        [PLAIN, PLAIN.replace("472", "5").replace("490", "23")],
        "\n",
        "tie",
        [2],
        "request_tokens",
        [472, 5],
    ),
    (
        "4 failures are 0 responses",
        "t.csv",
        SIX,
        [PLAIN, "41,GPT-4,30,0,30,API log"],
        "\n",
        "failed",
        [2],
        "failed",
        [False, True],
    ),
    (
        "4 failures without a length",
        "t.csv",
        SIX,
        [PLAIN, "41,GPT-4,0,0,0,API log"],
        "\n",
        "failed-without-length",
        [2],
        "failed",
        [False, True],
    ),
    (
        "4 a prompt of no token",
        "t.csv",
        SIX,
        [PLAIN, "41,GPT-4,0,8,8,API log"],
        "\n",
        "no-prompt",
        [2],
        "request_tokens",
        [472, 0],
    ),
    (
        "5 duplicates are data",
        "t.csv",
        SIX,
        [PLAIN, PLAIN, PLAIN],
        "\n",
        "duplicate",
        [2, 3],
        "request_tokens",
        [472] * 3,
    ),
    (
        "6 rows out of order are sorted, stably",
        "t.csv",
        SIX,
        ["50,GPT-4,1,1,2,API log", PLAIN],
        "\n",
        "out-of-order",
        [2],
        "request_tokens",
        [472, 1],
    ),
    (
        "7 the raw form says so",
        "t.csv",
        SIX,
        [PLAIN, "41,GPT-4,0,0,0,API log"],
        "\n",
        "raw",
        [],
        "failed",
        [False, True],
    ),
    ("7 the form without failures says so", "t.csv", SIX, [PLAIN], "\n", "without-failures", [], "failed", [False]),
    (
        "8 nothing is clipped",
        "t.csv",
        SIX,
        ["41,GPT-4,125591,9,125600,API log"],
        "\n",
        "long-context",
        [1],
        "request_tokens",
        [125_591],
    ),
    (
        "9 0 s elapsed is less than 1 s",
        "t.csv",
        EIGHT,
        ["100.0,,0,ChatGPT,3,2,5,API log"],
        "\n",
        "elapsed-zero",
        [1],
        "elapsed",
        [0.0],
    ),
    (
        "9 no elapsed time",
        "t.csv",
        EIGHT,
        ["100.0,,,ChatGPT,3,2,5,API log"],
        "\n",
        "elapsed-missing",
        [1],
        "elapsed",
        [None],
    ),
    (
        "10 long silences",
        "t.csv",
        SIX,
        [PLAIN, "15280,GPT-4,1,1,2,API log"],
        "\n",
        "silence",
        [2],
        "arrival",
        [0, 15_240],
    ),
    (
        "11 prompts shrink inside a session",
        "t.csv",
        EIGHT,
        [f"{t}.0,{UUID},4,GPT-4,{n},4,{n + 4},Conversation log" for t, n in ((100, 90), (130, 40), (160, 95))],
        "\n",
        "shrinking-session",
        [2],
        "turn",
        [1, 2, 3],
    ),
    (
        "11 sessions may be cut by the file's edge",
        "t.csv",
        EIGHT,
        [f"{t}.0,{UUID},4,GPT-4,9,4,13,Conversation log" for t in (100, 130, 160)],
        "\n",
        "cut-session",
        [],
        "turn",
        [1, 2, 3],
    ),
    ("12 no block hashes", "t.csv", SIX, [PLAIN], "\n", "no-prefixes", [], "prefix", [None]),
    (
        "13 the head of a part is no sample",
        "t.csv",
        SIX,
        ["5,ChatGPT,472,18,490,Conversation log"],
        "\n",
        "head-only",
        [],
        "arrival",
        [0],
    ),
    ("14 look-alikes", "BurstGPT_1.csv", SIX, [PLAIN], "\n", "not-the-published-file", [], "request_tokens", [472]),
    (
        "totals that are no sum",
        "t.csv",
        SIX,
        ["5,GPT-4,1,2,9,API log"],
        "\n",
        "wrong-total",
        [1],
        "response_tokens",
        [2],
    ),
]


@pytest.mark.parametrize(
    ("name", "header", "rows", "end", "code", "at", "column", "values"),
    [quirk[1:] for quirk in QUIRKS],
    ids=[quirk[0] for quirk in QUIRKS],
)
def test_a_quirk_is_read_and_told(tmp_path, name, header, rows, end, code, at, column, values):
    path = tmp_path / name
    path.write_text(end.join([header, *rows]) + end, encoding="utf-8", newline="")
    result = squall.validate(path)
    finding = next((finding for finding in result.findings if finding.code == code), None)
    assert finding is not None, f"{code} is not among {[f.code for f in result.findings]}"
    assert finding.rows == at
    assert result.ok
    assert read_trace(path).table[column].to_list() == values


def test_duplicates_are_counted_with_their_groups(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("\n".join([SIX, PLAIN, PLAIN, PLAIN, "41,GPT-4,3,4,7,API log", "41,GPT-4,3,4,7,API log"]) + "\n")
    finding = next(finding for finding in squall.validate(path).findings if finding.code == "duplicate")
    assert (finding.count, finding.rows) == (3, [2, 3, 5])
    assert "2 different rows have copies" in finding.message


def test_ties_are_broken_only_on_request(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("\n".join([SIX, *[PLAIN] * 9, "45,GPT-4,3,4,7,API log"]) + "\n")
    assert open_trace(path).table["arrival"].to_list() == [0.0] * 9 + [5.0]
    spread = open_trace(path, ties="spread", seed=1)
    assert (np.diff(spread.table["arrival"]) > 0).all()
    assert "--ties spread --seed 1" in spread.meta.steps[0]


def test_a_missing_column_is_named(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("Timestamp,Model,Request tokens,Total tokens,Log Type\n5,GPT-4,1,2,API log\n")
    with pytest.raises(InputError, match="'Response tokens' is missing"):
        read_trace(path)


def test_raw_and_cleaned_of_one_part_are_not_joined(tmp_path):
    raw, clean = tmp_path / "raw.csv", tmp_path / "clean.csv"
    raw.write_text("\n".join([SIX, PLAIN, "41,GPT-4,0,0,0,API log"]) + "\n")
    clean.write_text("\n".join([SIX, PLAIN]) + "\n")
    with pytest.raises(InputError, match="count every successful request twice"):
        open_trace(raw, join=(str(clean),))
