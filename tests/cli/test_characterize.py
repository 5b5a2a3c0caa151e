"""`squall characterize` as a user runs it."""

import json
import subprocess
import sys

import polars as pl
import pytest

HEADER = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def squall(*args, stdin=None):
    return subprocess.run(
        [sys.executable, "-m", "squall", "characterize", *map(str, args)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def csv(tmp_path):
    path = tmp_path / "two.csv"
    rows = [
        f"{5 + 20 * i},{'GPT-4' if i % 3 else 'ChatGPT'},{100 + i},{10 + i % 7},{110 + i + i % 7},"
        f"{'API' if i % 2 else 'Conversation'} log\n"
        for i in range(300)
    ]
    path.write_text(HEADER + "".join(rows))
    return path


def test_people_get_tables_plots_and_sentences(csv):
    done = squall(csv)
    assert done.returncode == 0, done.stderr
    for text in (
        "300 requests over 99.7 min",
        "Arrivals, and the dispersion",
        "Lengths in tokens",
        "GPT-4 conversation",
        "│",
    ):
        assert text in done.stdout
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_scripts_get_json_and_nothing_else(csv):
    done = squall(csv, "--json", "--service", "api", "--window", "10m")
    plain = json.loads(done.stdout)
    assert plain["requests"] == 150
    assert [stream["service"] for stream in plain["classes"]] == ["api", "api"]
    assert plain["total"]["gamma_windows"]["window"] == 600.0
    assert any("--service api" in step for step in plain["meta"]["steps"])


def test_standard_input_is_read(csv):
    assert "300 requests" in squall("-", stdin=csv.read_text()).stdout


def test_the_report_is_written_beside_the_json(csv, tmp_path):
    page = tmp_path / "page.html"
    done = squall(csv, "--json", "--head", "100", "--html", page)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["requests"] == 100
    assert page.read_text().lstrip().lower().startswith("<!doctype html")


def test_the_series_are_written_to_a_directory(csv, tmp_path):
    folder = tmp_path / "new" / "series"
    done = squall(csv, "--json", "-o", folder)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "characterization.json").read_text()) == json.loads(done.stdout)
    windows = pl.read_parquet(folder / "windows.parquet")
    assert windows.filter(pl.col("service").is_null())["requests"].sum() == 300
    assert windows.filter(pl.col("service").is_not_null())["requests"].sum() == 300
    assert sorted(windows["model"].drop_nulls().unique()) == ["ChatGPT", "GPT-4"]
    assert pl.read_parquet(folder / "hours.parquet").filter(pl.col("model").is_null())["requests"].sum() == 300
    taken = squall(csv, "-o", csv)
    assert taken.returncode == 2
    assert "name a directory" in taken.stderr


def test_one_row_and_hostile_names(tmp_path):
    path = tmp_path / "one.csv"
    path.write_text(HEADER + "5,[red]\x1b[31mGPT,100,10,110,API log\n")
    done = squall(path)
    assert done.returncode == 0, done.stderr
    assert "1 request over 0 ms, all at once" in done.stdout
    assert "\x1b" not in done.stdout
    assert "[red]" in done.stdout


@pytest.mark.parametrize(("flags", "sentence"), [(("--window", "soon"), "--window"), (("--fit", "guess"), "guess")])
def test_a_wrong_flag_is_one_sentence(csv, flags, sentence):
    done = squall(csv, *flags)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("squall: ")
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1
