"""`squall fit` and `squall generate` as a user calls them."""

import json

import pytest

from squall.cli import main


def call(capsys, *argv: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from squall import fit

    path = tmp_path_factory.mktemp("model") / "model.json"
    fit("burstgpt://all?duration=6h&start=8h", out=path, seed=1)
    return path


def test_fit_prints_how_well_it_fits(tmp_path, capsys):
    path = tmp_path / "m.json"
    code, out, _ = call(capsys, "fit", "burstgpt://chatgpt-conversation?duration=6h&start=8h", "-o", str(path))
    assert code == 0
    assert path.is_file()
    for word in ("alpha", "KS", "Spearman", "ChatGPT conversation", "requests/s"):
        assert word in out


def test_fit_speaks_json(tmp_path, capsys):
    path = str(tmp_path / "m.json")
    code, out, _ = call(
        capsys,
        "fit",
        "burstgpt://gpt4-conversation",
        "-o",
        path,
        "--json",
        "--window",
        "1h",
        "--seed",
        "3",
        "--kind",
        "renewal",
    )
    result = json.loads(out)
    assert code == 0
    assert result["kind"] == "renewal"
    assert result["classes"][0]["share"] == 1.0
    assert len(result["classes"][0]["fit"]["alpha"]) == 3


def test_generate_says_what_was_asked_for_and_what_came_out(model, tmp_path, capsys):
    out_file = tmp_path / "t.parquet"
    code, out, _ = call(capsys, "generate", str(model), "-o", str(out_file), "--duration", "1h", "--rate", "2")
    assert code == 0
    assert "requested" in out
    assert "achieved" in out
    code, out, _ = call(
        capsys, "generate", str(model), "-o", str(out_file), "--requests", "100", "--seed", "4", "--json"
    )
    result = json.loads(out)
    assert code == 0
    assert result["requests"] == 100
    assert result["requested"]["requests"] == 100
    assert {"p50", "p90", "p99"} <= result["request_tokens"].keys()
    from squall import read_trace

    assert len(read_trace(out_file)) == 100


def test_a_profile_is_a_model(tmp_path, capsys):
    path = tmp_path / "t.csv"
    code, _, _ = call(
        capsys, "generate", "burstgpt://gpt4-conversation", "-o", str(path), "--duration", "2h", "--start", "10h"
    )
    assert code == 0
    assert path.read_text().startswith("Timestamp")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (("fit", "nowhere.csv", "-o", "m.json"), "nowhere.csv"),
        (("fit", "burstgpt://nope", "-o", "m.json"), "burstgpt://all"),
        (("fit", "burstgpt://all", "-o", "m.json", "--kind", "cox"), "--kind"),
        (("fit", "burstgpt://all", "-o", "m.json", "--window", "soon"), "--window"),
        (("fit", "burstgpt://all?duration=1h", "-o", "m.json", "--gaps", "weibull"), "--kind renewal"),
        (("fit", "burstgpt://all?duration=1h", "-o", "m.json", "--block", "30s"), "--kind bootstrap"),
        (("fit", "burstgpt://all"), "out"),
        (("generate", "nowhere.json", "-o", "t.csv"), "nowhere.json"),
        (("generate", "burstgpt://nope", "-o", "t.csv"), "burstgpt://all"),
        (("generate", "burstgpt://all", "-o", "t.csv", "--rate", "-1"), "--rate"),
        (("generate", "burstgpt://all", "-o", "t.xyz", "--duration", "1h"), "t.xyz"),
    ],
)
def test_what_is_wrong_is_named_in_one_sentence(tmp_path, monkeypatch, capsys, argv, named):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *argv)
    assert code == 2
    assert out == ""
    assert named in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())
