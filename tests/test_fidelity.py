"""Fidelity: a trace is like itself, unlike what is not like it, and the numbers are those of their definitions."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import msgspec
import numpy as np
import polars as pl
import pytest

import squall
from squall.cli.app import build
from squall.errors import InputError
from squall.fidelity import Fidelity, _in_time, fidelity
from squall.report.fidelity_sections import write_fidelity
from squall.trace import Trace, TraceMeta
from squall.workload import fit, save_workload, smooth

SMALL = {"gpu": "rtx4090", "model": "llama-3.1-8b"}


def bursty(seed: int = 3, rows: int = 1200) -> Trace:
    """Bursts of some twenty requests with silences between them; lengths drift."""
    rng = np.random.default_rng(seed)
    gaps = np.where(rng.random(rows) < 0.05, rng.exponential(20.0, rows), rng.exponential(0.05, rows))
    level = 1 + np.sin(np.linspace(0, 12, rows))
    request = np.rint(rng.lognormal(5, 0.7, rows) * (0.3 + level)).astype(int) + 1
    response = np.rint(rng.lognormal(4, 0.6, rows)).astype(int) + 1
    columns = {"arrival": np.cumsum(gaps) - gaps[0], "request_tokens": request, "response_tokens": response}
    return Trace.of(columns, TraceMeta(source="bursty", format="test"))


def test_a_trace_is_like_itself() -> None:
    trace = bursty()
    found = fidelity(trace, trace, loads=(0.5,), **SMALL)
    assert set(found.ks.values()) == {0.0}
    assert set(found.wasserstein.values()) == {0.0}
    assert found.spearman_difference == 0.0
    assert all(one.real == one.generated and one.ratio == 1.0 for one in found.dispersion)
    assert [one.metric for one in found.downstream] == ["ttft_p90", "ttft_p99", "e2e_mean", "peak_kv", "preemptions"]
    assert all(one.real == one.generated and one.inside is None for one in found.downstream)


def test_smooth_arrivals_are_unmasked_downstream_and_by_dispersion() -> None:
    trace = bursty()
    found = fidelity(trace, smooth(trace, "poisson"), loads=(0.5,), **SMALL)
    p99 = next(one for one in found.downstream if one.metric == "ttft_p99")
    assert p99.ratio is not None
    assert p99.ratio < 0.7
    assert found.ks["request_tokens"] == 0.0
    assert (found.ks["gaps"] or 0) > 0.2
    ten = next(one for one in found.dispersion if one.scale == 10.0)
    assert ten.ratio is not None
    assert ten.ratio < 0.3


def test_a_model_is_drawn_with_several_seeds(tmp_path: Path) -> None:
    trace = bursty()
    model = fit(trace, kind="renewal")
    file = tmp_path / "model.json"
    save_workload(model, file)
    found = fidelity(trace, str(file), loads=(0.5,), seeds=3, seed=7, **SMALL)
    assert found.seeds == [7, 8, 9]
    requests = found.numbers["requests"]
    assert requests.real == len(trace)
    assert requests.low < requests.high
    again = fidelity(trace, model, loads=(0.5,), seeds=3, seed=7, **SMALL)
    assert msgspec.structs.replace(again, generated="") == msgspec.structs.replace(found, generated="")


def test_lengths_without_memory_have_the_index_one() -> None:
    rng = np.random.default_rng(1)
    at = np.sort(rng.random(50_000)) * 3600
    tokens = rng.lognormal(5, 1, at.size)
    assert _in_time(at, tokens, 30.0) == pytest.approx(1.0, abs=4 * np.sqrt(2 / 120))
    # A mean that steps every 30 s by delta adds count x delta^2 / variance.
    stepped = tokens + 100 * (np.floor(at / 30) % 2)
    expected = 1 + (at.size / 120) * 50**2 / stepped.var()
    assert _in_time(at, stepped, 30.0) == pytest.approx(expected, rel=0.1)


def test_clocks_of_different_resolution_are_made_equal() -> None:
    trace = bursty()
    coarse = trace.replace(trace.table.with_columns(pl.col("arrival").floor()), tick=1.0)
    found = fidelity(coarse, trace, loads=(0.5,), **SMALL)
    assert "ticks of 1 s" in found.notes[0]
    assert (found.ks["gaps"] or 0) < 0.35
    assert fidelity(coarse, coarse, loads=(0.5,), **SMALL).notes == []


def test_failures_and_sessions_are_compared_where_they_are() -> None:
    trace = bursty()
    rows = np.arange(len(trace))
    table = trace.table.with_columns(
        failed=pl.Series(rows % 100 < 4), session=pl.Series(rows // 3), turn=pl.Series((rows % 3 + 1).astype(np.int32))
    )
    found = fidelity(trace.replace(table), trace.replace(table), loads=(0.5,), **SMALL)
    assert found.failures["share"].real == pytest.approx(0.04)
    assert found.failures["after_failure"].real == pytest.approx(0.75)
    assert found.conversations["turns"].real == 3.0
    assert found.conversations["single"].real == 0.0


@pytest.mark.parametrize(
    ("words", "message"), [({"seeds": 0}, "--seeds 0"), ({"loads": (0.0,)}, "--loads"), ({"head": 3}, "too few")]
)
def test_what_cannot_be_compared_is_said(words: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        squall.fidelity(bursty(), bursty(), **words)


def test_the_command_prints_the_contract(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = bursty(rows=300)
    file = tmp_path / "real.parquet"
    squall.convert(trace, file)
    app = build()
    assert app(["fidelity", str(file), str(file), "--json", "--loads", "0.7"], result_action="return_value") == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["ks"]) == {"request_tokens", "response_tokens", "gaps"}
    assert set(found["dispersion"][0]) >= {"scale", "real", "generated"}
    assert set(found["downstream"][0]) >= {"load", "metric", "real", "generated", "ratio"}
    page = tmp_path / "page.html"
    words = ["--loads", "0.7", "--baselines", "--seeds", "2", "--html", str(page)]
    assert app(["fidelity", str(file), str(file), *words], result_action="return_value") == 0
    shown = capsys.readouterr().out
    assert "0.7 ttft_p99" in shown
    assert "ALIKE" in shown
    assert "blocks of 5 s" in shown
    assert page.stat().st_size > 100_000
    with pytest.raises(InputError, match="--loads half"):
        app(
            ["fidelity", str(file), str(file), "--loads", "half"],
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )


def test_the_verdict_says_what_agrees_and_what_does_not() -> None:
    trace = bursty()
    same = fidelity(trace, trace, loads=(0.5,), **SMALL)
    assert same.verdict == "alike"
    assert "makes of both the same: all 3 latencies" in same.summary[0]
    assert "one generated trace is one draw" in same.summary[-1]
    other = fidelity(trace, smooth(trace, "poisson"), loads=(0.5,), **SMALL)
    assert other.verdict == "not alike"
    assert "tells them apart in" in other.summary[0]
    assert "burstiness at" in other.summary[1]
    drawn = fidelity(trace, fit(trace, kind="renewal"), loads=(0.5,), seeds=3, **SMALL)
    assert "3 draws; the real value lies inside their range in" in drawn.summary[-1]


def test_baselines_stand_beside_it() -> None:
    trace = bursty()
    found = fidelity(trace, trace, loads=(0.5,), seeds=3, baselines=True, **SMALL)
    names = [one.name for one in found.baselines]
    assert names[0] == "Poisson arrivals"
    assert names[1].startswith("Gamma arrivals, CV ")
    assert names[2:] == ["lengths shuffled", "blocks of 5 s", "blocks of 30 s", "blocks of 2 min"]
    by_name = {one.name: {row.metric: row for row in one.downstream} for one in found.baselines}
    poisson = by_name["Poisson arrivals"]["ttft_p99"]
    assert (poisson.ratio or 1) < 0.7
    assert poisson.inside is False
    assert poisson.real == found.downstream[1].real  # the same real run beside all of them
    assert fidelity(trace, trace, loads=(0.5,), **SMALL).baselines == []


def test_distributions_are_quantiles() -> None:
    trace = bursty()
    found = fidelity(trace, fit(trace, kind="renewal"), loads=(0.5,), seeds=3, **SMALL)
    lengths = found.distributions["request_tokens"]
    expected = np.quantile(trace.table["request_tokens"].to_numpy(), lengths.share)
    assert lengths.real == pytest.approx(expected)
    assert all(
        low <= middle <= high for low, middle, high in zip(lengths.low, lengths.generated, lengths.high, strict=True)
    )


def test_the_page_holds_everything_and_obeys_nothing(tmp_path: Path) -> None:
    evil = "</script><script>document.title='owned'</script>.csv"
    trace = bursty(rows=400)
    table = trace.table.with_columns(failed=pl.Series(np.arange(len(trace)) % 50 == 0))
    trace = trace.replace(table, source=evil)
    found = fidelity(trace, fit(trace, kind="renewal"), loads=(0.5, 0.8), seeds=3, baselines=True, **SMALL)
    page = write_fidelity(found, tmp_path / "page.html")
    text = page.read_text(encoding="utf-8")
    assert "<script>document.title" not in text
    for words in ("What a server would feel", "Beside simpler ways", "Conversations and failures", "P99 TTFT at 80 %"):
        assert words in text
    assert "https://" not in text.partition("<!-- Below: Vega")[0]
    assert write_fidelity(msgspec.json.decode(msgspec.json.encode(found), type=Fidelity), tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()
    with pytest.raises(InputError, match=r"ends in \.html"):
        write_fidelity(found, tmp_path / "page.pdf")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if chromium is None:
        return
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert 'data-errors="[]"' in shown
    drawn = set(re.findall(r'<div class="chart[^"]*" id="([^"]*)"', shown))
    assert drawn >= {"ratio-ttft_p99", "ratio-peak_kv", "fidelity-gaps", "fidelity-dispersion", "fidelity-request"}
    assert f'data-charts="{len(drawn)}"' in shown
