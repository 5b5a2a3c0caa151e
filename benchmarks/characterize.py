"""What characterising five million requests costs, and how that compares with a plain pandas and scipy script.

    python benchmarks/characterize.py                          # draws a BurstGPT-like CSV of 5.3 million rows first
    python benchmarks/characterize.py --rows 500000 --keep burst.csv
    python benchmarks/characterize.py --csv BurstGPT_3.csv --window 1200

The plain script does a part of the work as one writes it at first: for each class the Gamma fit of the gaps in every
window by scipy.stats.gamma.fit (location fixed), with its KS distance, and the percentiles of the lengths. Fits of a
sample of windows are timed and scaled to all of them, since all would take the better part of an hour; --all runs them
all. pandas is needed for that half only: pip install pandas.
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
begin = time.perf_counter()
trace = squall.read_trace(sys.argv[1])
read, cpu = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
result = squall.characterize(trace, window=float(sys.argv[2]), fit="mle")
done, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({
    "requests": result.requests, "reading_s": read - begin, "characterize_s": done - read,
    "characterize_cpu_s": used.ru_utime + used.ru_stime - cpu.ru_utime - cpu.ru_stime,
    "memory_gb": used.ru_maxrss / 1e6, "windows_fitted": sum(one.gamma_windows.fitted for one in result.classes),
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
    begin, fits, fitting, windows = used(), 0, 0.0, 0
    for _, rows in table.groupby(["Model", "Log Type"]):
        rows[["Request tokens", "Response tokens"]].describe(percentiles=[0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
    percentiles = used() - begin
    for _, rows in table.groupby(["Model", "Log Type"]):
        times = pd.Series(despread(rows["Timestamp"].to_numpy(float), 1.0))
        gaps = times.diff()
        groups = [one for _, one in gaps.groupby((times // window).astype(int))]
        groups = [one[one > 0].to_numpy() for one in groups]
        groups = [one for one in groups if one.size >= 10]
        windows += len(groups)
        order = np.random.default_rng(0).permutation(len(groups))
        for k in order if most_fits is None else order[: max(1, most_fits * len(rows) // len(table))]:
            begin = used()
            shape, at, scale = stats.gamma.fit(groups[k], floc=0)
            stats.kstest(groups[k], "gamma", args=(shape, at, scale))
            fitting += used() - begin
            fits += 1
    return {"reading_s": reading, "percentiles_s": percentiles, "windows": windows, "fits": fits, "fitting_s": fitting}


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
            f"{ours['characterize_s']:.2f} s ({ours['characterize_cpu_s']:.2f} s of CPU), {ours['memory_gb']:.2f} GB"
        )
        if given.alone:
            return
        plain = plain_script(path, given.window, None if given.all else 300)
    fitting = plain["fitting_s"] * plain["windows"] / plain["fits"]
    total = plain["percentiles_s"] + fitting
    how = "" if plain["fits"] == plain["windows"] else f", scaled up from {plain['fits']:,}"
    print(
        f"pandas + scipy: read in {plain['reading_s']:.2f} s of CPU, percentiles {plain['percentiles_s']:.2f} s, "
        f"{plain['windows']:,} Gamma fits {fitting:.1f} s{how}"
    )
    print(
        f"the plain script takes {total / ours['characterize_s']:.1f} times as long for its part of the work as squall "
        f"for all of it ({total / ours['characterize_cpu_s']:.1f} times the CPU)"
    )


if __name__ == "__main__":
    main()
