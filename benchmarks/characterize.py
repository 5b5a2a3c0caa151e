"""What characterising five million requests costs, and how that compares with a plain pandas and scipy script.

    python benchmarks/characterize.py                          # draws a BurstGPT-like CSV of 5.3 million rows first
    python benchmarks/characterize.py --rows 500000 --keep burst.csv
    python benchmarks/characterize.py --csv BurstGPT_3.csv --window 1200

The plain script does a part of the work as one writes it at first: for each class the Gamma fit of the gaps in every
window by scipy.stats.gamma.fit, with its KS distance, and the percentiles of the lengths; once as gamma.fit is called
by default (it fits a location too) and once with the location fixed at 0, as squall fits. Fits of a sample of windows
are timed and scaled to all of them; --all runs them all. squall is timed for everything that characterize does, with
the reading of the file, and for that part alone. Nothing is compiled on a first call. pandas is needed for the plain
script only: pip install pandas.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import squall
from squall.characterize.concurrency import despread
from squall.progress import notes
from squall.trace import write_trace

PART_3_ROWS = 5_344_021
MEASURED = """
import json, resource, sys, time
import squall
from squall.characterize.concurrency import despread, gamma_windows
from squall.characterize.summary import Tally

def cpu():
    now = resource.getrusage(resource.RUSAGE_SELF)
    return now.ru_utime + now.ru_stime

started, begin = cpu(), time.perf_counter()
trace = squall.read_trace(sys.argv[1])
read = time.perf_counter()
result = squall.characterize(trace, window=float(sys.argv[2]), fit="mle")
done, after = time.perf_counter(), cpu()
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _, rows in trace.table.group_by("service", "model"):
    gamma_windows(despread(rows["arrival"].to_numpy(), 1.0), float(sys.argv[2]), method="mle")
    for name in ("request_tokens", "response_tokens"):
        Tally.of_array(rows[name].to_numpy()).describe()
part = cpu() - after
print(json.dumps({
    "requests": result.requests, "reading_s": read - begin, "characterize_s": done - read, "whole_s": done - begin,
    "whole_cpu_s": after - started, "part_cpu_s": part, "memory_gb": memory / 1e6,
}))
"""


def draw(rows: int, path: Path) -> None:
    """A CSV with the eight columns of BurstGPT part 3, in whole seconds."""
    trace = squall.generate("burstgpt://all", requests=rows)
    write_trace(trace.replace(trace.table.with_columns(pl.col("arrival").floor())), path)


def squall_alone(path: Path, window: float) -> dict[str, Any]:
    """In a process of its own, so that its memory is its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(path), str(window)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def plain_script(path: Path, window: float, most_fits: int | None) -> dict[str, Any]:
    """Seconds of CPU that pandas and scipy.stats take for the windowed fits and the percentiles."""
    try:
        import pandas as pd
    except ImportError:
        sys.exit("benchmarks/characterize.py: the comparison needs pandas, which squall does not: pip install pandas")
    from scipy import stats

    def used() -> float:
        now = resource.getrusage(resource.RUSAGE_SELF)
        return now.ru_utime + now.ru_stime

    begin = used()
    table = pd.read_csv(path)
    reading = used() - begin
    begin = used()
    windows: list[np.ndarray] = []
    for _, rows in table.groupby(["Model", "Log Type"]):
        rows[["Request tokens", "Response tokens"]].describe(percentiles=[0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
    percentiles = used() - begin
    for _, rows in table.groupby(["Model", "Log Type"]):
        times = pd.Series(despread(rows["Timestamp"].to_numpy(float), 1.0))
        gaps = times.diff()
        groups = [one for _, one in gaps.groupby((times // window).astype(int))]
        groups = [one[one > 0].to_numpy() for one in groups]
        groups = [one for one in groups if one.size >= 10]
        windows += groups
    order = np.random.default_rng(0).permutation(len(windows))[:most_fits]
    fitting = {}
    for name, fixed in (("location fixed", {"floc": 0}), ("as called by default", {})):
        begin = used()
        for k in order:
            stats.kstest(windows[k], "gamma", args=stats.gamma.fit(windows[k], **fixed))
        fitting[name] = (used() - begin) * len(windows) / len(order)
    return {"reading_s": reading, "percentiles_s": percentiles, "windows": len(windows), "fitting_s": fitting}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=PART_3_ROWS)
    parser.add_argument("--csv", type=Path, help="a BurstGPT file instead of a drawn one")
    parser.add_argument("--keep", type=Path, help="keep the drawn file here")
    parser.add_argument("--window", type=float, default=1200.0)
    parser.add_argument("--all", action="store_true", help="let the plain script fit every window")
    parser.add_argument("--alone", action="store_true", help="measure squall only")
    given = parser.parse_args()
    notes.shown = False
    with tempfile.TemporaryDirectory() as folder:
        path = given.csv or given.keep or Path(folder) / "burstgpt-like.csv"
        if not given.csv and not path.exists():
            draw(given.rows, path)
        ours = squall_alone(path, given.window)
        print(
            f"squall: {ours['requests']:,} requests, read in {ours['reading_s']:.2f} s, characterised in "
            f"{ours['characterize_s']:.2f} s: {ours['whole_s']:.2f} s in all ({ours['whole_cpu_s']:.2f} s of CPU), "
            f"{ours['memory_gb']:.2f} GB"
        )
        if given.alone:
            return
        plain = plain_script(path, given.window, None if given.all else 200)
    print(
        f"pandas + scipy: read in {plain['reading_s']:.2f} s of CPU, percentiles {plain['percentiles_s']:.2f} s, "
        f"{plain['windows']:,} Gamma fits:"
    )
    for name, seconds in plain["fitting_s"].items():
        part = plain["percentiles_s"] + seconds
        whole = plain["reading_s"] + part
        print(
            f"    {name}: {seconds:,.0f} s; with the percentiles {part / ours['part_cpu_s']:.0f} times the CPU of "
            f"squall for this part ({ours['part_cpu_s']:.2f} s); with the reading {whole / ours['whole_cpu_s']:.1f} "
            f"times the CPU of squall for everything, {whole / ours['whole_s']:.1f} times its wall time"
        )


if __name__ == "__main__":
    main()
