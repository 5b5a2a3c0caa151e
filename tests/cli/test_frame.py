"""The frame around every call: exit codes, one sentence, no traceback; and the commands of the trace room."""

import json
import subprocess
import sys
import time

import pytest

CSV = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
CSV += "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,1087,230,1317,API log\n"


def squall(*args, stdin=None):
    return subprocess.run(
        [sys.executable, "-m", "squall", *map(str, args)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def csv(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(CSV)
    return path


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["validate", "absent.csv"], "there is no such file"),
        (["convert", "absent.csv", "x.csv"], "there is no such file"),
        (["nonsense"], "nonsense"),
        (["validate"], "TRACE"),
        (["convert", "a.csv", "b.csv", "--head", "many"], "many"),
        (["convert", "a.csv", "b.csv", "--no-such-flag", "1"], "no-such-flag"),
        (["convert", "burstgpt://nobody", "b.csv"], "nobody"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence_and_exit_code_2(args, sentence):
    result = squall(*args)
    assert result.returncode == 2
    assert sentence.lower() in result.stderr.lower()
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not result.stdout


@pytest.mark.alone
def test_help_is_quick_and_names_every_verb():
    begin = time.perf_counter()
    result = squall("--help")
    took = time.perf_counter() - begin
    from squall.cli.app import VERBS

    assert result.returncode == 0
    assert all(verb in result.stdout for verb in VERBS)
    assert took < 0.6  # the target is 0.3 s on an idle machine


def test_help_imports_nothing_heavy():
    code = (
        "import sys, squall.cli.app as app\n"
        "try: app.main(['--help'])\n"
        "except SystemExit: print([m for m in ('polars', 'numpy', 'scipy', 'numba', 'altair') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip().endswith("[]")


def test_every_verb_explains_itself():
    from squall.cli.app import VERBS

    for verb in VERBS:
        result = squall(verb, "--help")
        assert result.returncode == 0, result.stderr
        assert "--json" in result.stdout


def test_json_stands_alone_on_standard_output(csv, tmp_path):
    result = squall("convert", csv, tmp_path / "o.jsonl", "--json", "--speed", "2")
    assert json.loads(result.stdout)["span"] == 20
    result = squall("validate", csv, "--json")
    assert json.loads(result.stdout)["ok"] is True


def test_a_pipe_reads_and_writes(csv):
    result = squall("convert", "-", "-", "--head", "1", "--quiet", stdin=csv.read_text())
    assert result.stdout.splitlines() == CSV.splitlines()[:2]
    assert result.stderr == ""


def test_validate_exits_2_on_a_wrong_row_and_shows_escape_sequences_as_text(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text(CSV + "60,x,\x1b[31mred,2,3,API log\n")
    result = squall("validate", path)
    assert result.returncode == 2
    assert "row 3" in result.stdout
    assert "\x1b[31mred" not in result.stdout


def test_parts_are_joined_and_ties_broken_on_the_way(csv, tmp_path):
    parts = []
    for day in (1, 2):
        path = tmp_path / f"part{day}.csv"
        path.write_text(CSV.splitlines()[0] + f"\n{day * 86400},ChatGPT,1,2,3,API log\n" * 1)
        parts.append(path)
    joined = squall(
        "convert", csv, "--join", parts[1], "--join", parts[0], tmp_path / "o.csv", "--ties", "even", "--json"
    )
    result = json.loads(joined.stdout)
    assert result["requests"] == 4
    assert result["span"] == 2 * 86400 - 5
    assert result["steps"][-1] == "--ties even (ticks of 1 s)"
    assert squall("convert", csv, tmp_path / "o.csv", "--join", csv).returncode == 2


def test_any_csv_is_read_by_its_columns(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("when,in,out\n2024-05-10T00:00:00Z,5,6\n2024-05-10T00:00:02Z,7,8\n")
    mapping = "arrival=when,request_tokens=in,response_tokens=out"
    assert json.loads(squall("validate", path, "--columns", mapping, "--json").stdout)["rows"] == 2
    result = squall("convert", path, "-", "--columns", mapping, "--to", "azure", "--quiet")
    assert result.stdout.splitlines()[2] == "2024-05-10 00:00:02.0000000,7,8"
    assert squall("validate", path).returncode == 2
