"""The page in a real browser: every chart is drawn under the page's own policy, light and dark, wide and narrow."""

import html
import json
import re
import shutil
import subprocess
import zlib
from pathlib import Path

import pytest
from reportable import EVIL, run, trace

import squall

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--virtual-time-budget=20000",
]

# Opens the page in a frame as narrow as a phone, and does to its first chart what a reader does: points, zooms, drags.
READER = """<!doctype html>
<iframe src="page.html" style="width: 390px; height: 900px; border: 0"></iframe>
<script>
const frame = document.querySelector("iframe");
const seen = {};
const pause = () => new Promise((resolve) => setTimeout(resolve, 150));
async function read() {
  const page = frame.contentDocument, view = frame.contentWindow, root = page.documentElement;
  while (!root.dataset.charts) await pause();
  seen.width = root.clientWidth;
  seen.content = root.scrollWidth;
  const chart = page.querySelector(".chart");
  chart.scrollIntoView();
  const curve = () => chart.querySelector(".mark-line path");
  const middle = curve().getPointAtLength(curve().getTotalLength() / 2).matrixTransform(curve().getScreenCTM());
  const at = (more) => ({ bubbles: true, cancelable: true, view, clientX: middle.x, clientY: middle.y, ...more });
  const point = page.elementFromPoint(middle.x, middle.y);
  for (const type of ["pointerover", "pointermove"]) point.dispatchEvent(new view.PointerEvent(type, at()));
  for (const type of ["mouseover", "mousemove"]) point.dispatchEvent(new view.MouseEvent(type, at()));
  await pause();
  const tooltip = page.getElementById("vg-tooltip-element");
  seen.tooltip = tooltip && tooltip.classList.contains("visible") ? tooltip.innerText : null;
  const changes = async (...events) => {
    const before = curve().getAttribute("d");
    events.forEach(([target, event]) => target.dispatchEvent(event));
    await pause();
    return before !== curve().getAttribute("d");
  };
  seen.scrolls = !(await changes([point, new view.WheelEvent("wheel", at({ deltaY: -300 }))]));
  seen.zooms = await changes([point, new view.WheelEvent("wheel", at({ deltaY: -300, ctrlKey: true }))]);
  seen.resets = await changes([point, new view.MouseEvent("dblclick", at())]);
  seen.pans = await changes(
    [point, new view.PointerEvent("pointerdown", at())],
    [view, new view.PointerEvent("pointermove", at({ clientX: middle.x + 40 }))],
    [view, new view.PointerEvent("pointerup", at({ clientX: middle.x + 40 }))],
  );
  seen.errors = root.dataset.errors;
}
frame.onload = () => read().catch((error) => { seen.failed = String(error); })
  .then(() => { document.documentElement.dataset.seen = JSON.stringify(seen); });
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every kind of chart, on input that is hostile and has failures."""
    out = tmp_path_factory.mktemp("browser") / "page.html"
    runs = [run("The trace's own arrivals", message=EVIL), run(EVIL, seed=1), run("live", 60, kind="replay", seed=2)]
    title, lead = "What smooth load hides", ["A finding."]
    return squall.report(trace(8000, days=15.0), *runs, out=out, title=title, slo="ttft=1s", lead=lead)


def browse(address: Path, profile: Path, *flags: str) -> str:
    command = [str(CHROMIUM), *QUIET, f"--user-data-dir={profile}", *flags, address.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def scheme(dark: bool) -> str:
    return f"--blink-settings=preferredColorScheme={0 if dark else 1}"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_chart_is_drawn(page: Path, tmp_path: Path, dark: bool) -> None:
    document = browse(page, tmp_path, "--window-size=1280,2000", scheme(dark), "--dump-dom")
    root = re.search(r"<html[^>]*>", document)
    assert root
    assert json.loads(html.unescape(re.search(r'data-errors="([^"]*)"', root[0])[1])) == []  # type: ignore[index]
    assert f'data-theme="{"dark" if dark else "light"}"' in root[0]
    assert "<title>What smooth load hides</title>" in document  # no hostile script ran
    charts = re.split(r'<div class="chart[^"]*" id="', document)[1:]
    assert f'data-charts="{len(charts)}"' in root[0]
    drawn = {chart.partition('"')[0]: chart.partition("<figcaption>")[0] for chart in charts}
    assert set(drawn) == {
        "ttft-time",
        "ttft-waiting",
        *("cdf-ttft", "cdf-e2e", "cdf-tpot", "run-arrivals", "run-dispersion", "in-flight", "waiting", "running"),
        *("kv-used", "failures", "rate", "dispersion", "alpha", "request-tokens", "response-tokens", "hours"),
        *("boxes-requests", "boxes-request-tokens", "boxes-response-tokens", "bursts", "failed-share", "failed-alpha"),
        *("week-days-0", "week-days-1", "week-days-2", "week-hours-0", "week-hours-1", "week-hours-2"),
        *("failed-length", "working-day", "prefixes", "shared", "goodness", "families", "response-band"),
        *("autocorrelation", "spectrum", "burst-runs", "failed-runs"),
    }
    for name, chart in drawn.items():
        lines = re.findall(r'class="mark-line[^>]*>(?:<path[^>]*? d="([^"]*)")', chart)
        shapes = re.findall(r'class="mark-(?:rect|symbol)[^>]*>((?:<path[^>]*>(?:</path>)?)*)', chart)
        if name.startswith(("boxes", "week", "bursts", "families", "ttft-waiting")):
            assert sum(shape.count("<path") for shape in shapes) >= 2, name
            assert "NaN" not in "".join(shapes), name
            continue
        assert sum(line.count("L") for line in lines) >= 2, name
        assert "NaN" not in "".join(lines), name


def test_a_reader_can_point_zoom_and_pan_on_a_phone(page: Path, tmp_path: Path) -> None:
    reader = page.with_name("reader.html")
    reader.write_text(READER)
    document = browse(reader, tmp_path, "--allow-file-access-from-files", "--window-size=800,1000", "--dump-dom")
    found = re.search(r'data-seen="([^"]*)"', document)
    assert found
    seen = json.loads(html.unescape(found[1]))
    assert "failed" not in seen
    assert seen["errors"] == "[]"
    assert seen["content"] <= seen["width"], "the page is wider than the screen"
    assert seen["tooltip"].startswith(("The trace's own arrivals", "live", EVIL[:9]))
    assert "share of requests offered" in seen["tooltip"]
    assert seen["scrolls"], "a plain wheel over a chart must scroll the page"
    assert seen["zooms"]
    assert seen["resets"]
    assert seen["pans"]


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_screenshot_has_the_colours_of_its_scheme(page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    picture = tmp_path / "page.png"
    browse(page, tmp_path / "profile", f"--window-size={width},3000", scheme(dark), f"--screenshot={picture}")
    content = picture.read_bytes()
    assert int.from_bytes(content[16:20], "big") == width
    # The first pixel of a PNG is stored as it is, behind the filter byte of its row.
    chunks = content[content.index(b"IDAT") + 4 :]
    corner = zlib.decompressobj().decompress(chunks, 4)[1:4]
    assert all(part < 40 for part in corner) if dark else all(part > 240 for part in corner)
    assert len(content) > 30_000  # something is drawn
