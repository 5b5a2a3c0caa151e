"""Draws the README's pictures from a demo's folder: charts by the project itself, the page by headless Chromium.

usage: python benchmarks/readme_figures.py [squall-demo]      writes docs/images/*.png
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import squall
from squall.report import charts
from squall.report.sections import MeasuredRun

IMAGES = Path(__file__).parents[1] / "docs" / "images"
ARMS = {"the trace's own arrivals": "own", "Poisson": "poisson", "drawn from the fitted model": "model"}


def main() -> None:
    """The TTFT of three arms of the demo, and the top of its page."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "squall-demo")
    if not (folder / "report.html").is_file():
        sys.exit(f"{folder}: no demo has been run here; run `make demo` first")
    runs = {name: squall.read_run(folder / f"simulated-{file}.parquet") for name, file in ARMS.items()}
    measured = {name: MeasuredRun.of(run, squall.metrics(run)) for name, run in runs.items()}
    latency = {name: one.latency for name, one in measured.items()}
    offered = {name: one.metrics.requests for name, one in measured.items()}
    charts.save_png(charts.latency_cdf(latency, "ttft", "TTFT", offered), IMAGES / "ttft.png")
    if browser := shutil.which("chromium") or shutil.which("google-chrome"):
        _screenshot(browser, folder / "report.html", IMAGES / "report.png")


def _screenshot(browser: str, page: Path, out: Path) -> None:
    with tempfile.TemporaryDirectory() as profile:
        call = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        call += ["--disable-background-networking", "--virtual-time-budget=9000", "--window-size=1180,2350"]
        call += [f"--user-data-dir={profile}", f"--screenshot={out}", page.resolve().as_uri()]
        subprocess.run(call, check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    main()
