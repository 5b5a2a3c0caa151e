"""The page holds everything, asks nobody for anything, and shows hostile input as text."""

import base64
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from reportable import EVIL, run, trace

import squall
from squall.errors import InputError
from squall.report.page import script_safe
from squall.run import Run, RunMeta, write_run


def declarations(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="declarations">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page on a trace and runs whose every string is hostile."""
    out = tmp_path_factory.mktemp("hostile") / "page.html"
    runs = [
        run(EVIL, message=EVIL, machine=EVIL, verdict_reasons=[EVIL], target={EVIL: EVIL}, notes=[EVIL]),
        run(EVIL, kind="replay", seed=1, verdict="CLIENT-LIMITED", verdict_reasons=[EVIL], state="interrupted"),
    ]
    squall.report(trace(source=EVIL, model=EVIL), *runs, out=out, title=EVIL, lead=[EVIL], slo="ttft=1s")
    return out.read_text(encoding="utf-8")


def test_hostile_text_stays_text(hostile: str) -> None:
    # Only the page's own three script elements end, and outside of them no hostile text is an element.
    assert hostile.count("</script>") == 3
    body = re.sub(r"<script\b.*?</script>", "", hostile, flags=re.DOTALL)
    assert "<img" not in body
    assert "{{ 7*7 }}" in body  # no template was evaluated either
    assert body.count("document.title=&#39;owned&#39;") == body.count("owned") > 10
    names = {row["name"] for data in declarations(hostile)["charts"]["cdf-ttft"]["datasets"].values() for row in data}
    assert names == {EVIL, f"{EVIL} (2)"}


def test_text_cannot_end_its_script_element() -> None:
    text = script_safe({"name": EVIL, "other": "<!-- \u2029"})
    assert not set(text) & set("<>&\u2028\u2029")
    assert json.loads(text) == {"name": EVIL, "other": "<!-- \u2029"}


def test_nothing_is_loaded_from_anywhere(hostile: str) -> None:
    body = re.sub(r"<script\b.*?</script>", "", hostile, flags=re.DOTALL)
    assert not re.findall(r"\b(?:src|href|srcset|action|data|poster)\s*=\s*[\"']?\s*(?:https?:)?//", body)
    assert not re.findall(r"@import|url\(", body)
    assert "http://" not in body.replace(html.escape(EVIL), "")
    assert "https://" not in body
    specs = json.dumps(declarations(hostile))
    assert '"url"' not in specs
    assert "http" not in specs.replace("http_error", "")


def test_the_policy_allows_these_scripts_and_no_host(hostile: str) -> None:
    found = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', hostile)
    assert found
    policy = html.unescape(found[1])
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    assert "script-src 'unsafe-inline'" not in policy
    assert "//" not in re.sub(r"'sha256-[^']*'", "", policy)
    for script in re.findall(r"<script>(.*?)</script>", hostile, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_the_page_names_what_must_not_be_trusted(hostile: str) -> None:
    assert "CLIENT-LIMITED" in hostile
    assert "is interrupted: it holds only what happened until then" in hostile
    assert "not calibrated on a real server" in hostile


def test_the_comparison_shows_the_runs_side_by_side(tmp_path: Path) -> None:
    out = squall.report(run("first"), run("second", seed=1), out=tmp_path / "page.html", slo="ttft=1s")
    page = out.read_text(encoding="utf-8")
    rows = dict(re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', page))
    for name in ("verdict", "TTFT P50", "TTFT P99", "E2E P99", "TPOT P50", "goodput", "peak KV cache use", "failed"):
        assert rows[name].count("<td>") == 2, name
    assert "preemptions" not in rows  # not recorded by any
    found = squall.metrics(run("first"), slo="ttft=1s")
    assert f"{100 * (found.goodput_share or 0):.3g} %" in rows["met the SLO"]
    assert f"{100 * found.failed / found.requests:.3g} %" in rows["failed"]


def test_paths_are_told_apart_by_their_content(tmp_path: Path) -> None:
    write_run(run("from a file"), tmp_path / "run.csv")
    asked = tmp_path / "trace.csv"
    lines = [f"{k},GPT-4,{100 + k},{k + 1},{101 + 2 * k},API log" for k in range(200)]
    header = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
    asked.write_text("\n".join([header, *lines]) + "\n")
    page = squall.report(tmp_path / "run.csv", str(asked), out=tmp_path / "p.html").read_text(encoding="utf-8")
    assert "from a file" in page
    assert "The trace: trace.csv" in page


def test_large_runs_stay_small_pages(tmp_path: Path) -> None:
    out = squall.report(*(run(f"run {k}", 100_000, seed=k) for k in range(8)), out=tmp_path / "page.html")
    assert out.stat().st_size < 5e6
    for chart in declarations(out.read_text(encoding="utf-8"))["charts"].values():
        assert all(len(rows) <= 8 * 500 for rows in chart.get("datasets", {}).values())


def test_the_same_input_gives_the_same_page(tmp_path: Path) -> None:
    pages = [squall.report(trace(), run(), out=tmp_path / f"{k}.html").read_bytes() for k in range(2)]
    assert pages[0] == pages[1]


@pytest.mark.parametrize(
    "made",
    [
        Run.of({}, RunMeta(kind="replay", title="nothing")),
        Run(run().table.filter(pl.col("status") != "ok"), RunMeta(kind="replay", title="all failed")),
        Run(run().table.head(1), RunMeta(kind="recorded", title="one")),
        Run(run().table.with_columns(scheduled=0.0), RunMeta(kind="recorded", title="at once")),
    ],
    ids=lambda made: made.meta.title,
)
def test_poor_runs_make_a_page(tmp_path: Path, made: Run) -> None:
    assert made.meta.title in squall.report(made, out=tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("requests", [1, 2, 3])
def test_poor_traces_make_a_page(tmp_path: Path, requests: int) -> None:
    assert squall.report(trace(requests), out=tmp_path / "page.html").exists()


def test_several_traces_and_an_unnamed_class(tmp_path: Path) -> None:
    out = squall.report(trace(), trace(seed=1, model=None), out=tmp_path / "page.html")
    page = out.read_text(encoding="utf-8")
    assert "The traces side by side" in page
    assert "made.csv (2)" in page


def test_calls_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give at least one trace or run"):
        squall.report(out=tmp_path / "page.html")
    with pytest.raises(InputError, match=r"ends in \.html"):
        squall.report(run(), out=tmp_path / "page.pdf")
    with pytest.raises(InputError, match="absent"):
        squall.report(tmp_path / "absent.csv", out=tmp_path / "page.html")
    with pytest.raises(InputError, match="lacks a unit"):
        squall.report(run(), out=tmp_path / "page.html", slo="ttft=1")
    assert not (tmp_path / "page.html").exists()


def test_a_real_trace(traces: Path, tmp_path: Path) -> None:
    path = traces / "azure-2023" / "AzureLLMInferenceTrace_conv.csv"
    page = squall.report(path, out=tmp_path / "page.html").read_text(encoding="utf-8")
    assert "19,366 requests" in page
    assert "1,155" in page
    assert {"rate", "dispersion", "alpha", "request-tokens", "response-tokens"} <= set(declarations(page)["charts"])
