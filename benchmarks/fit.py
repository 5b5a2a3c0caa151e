"""What fitting five million requests costs.

    python benchmarks/fit.py                        # draws a BurstGPT-like CSV of 5.3 million rows first
    python benchmarks/fit.py --csv BurstGPT_3.csv

Prints seconds and seconds of CPU of `fit`, without reading the file, the size of the model and the peak memory; then
what fitting and drawing a million requests of it takes with each kind.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import squall
from characterize import PART_3_ROWS, draw
from squall.progress import notes
from squall.trace import open_trace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=PART_3_ROWS)
    parser.add_argument("--csv", type=Path, help="a BurstGPT file instead of a drawn one")
    given = parser.parse_args()
    notes.shown = False
    with tempfile.TemporaryDirectory() as folder:
        path = given.csv or Path(folder) / "burstgpt-like.csv"
        if given.csv is None:
            draw(given.rows, path)
        trace, out = squall.read_trace(path), Path(folder) / "model.json"
        begin, cpu = time.perf_counter(), time.process_time()
        squall.fit(trace, out=out)
        wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(
            f"fit of {len(trace):,} requests: {wall:.1f} s ({cpu:.1f} s of CPU); model "
            f"{out.stat().st_size / 1e6:.1f} MB, peak {memory:.2f} GB (with the trace)"
        )
        part = open_trace(trace, head=1_000_000)
        for kind in ("episodes", "cascade", "renewal", "bootstrap"):
            begin = time.perf_counter()
            model = squall.fit(part, kind=kind, **({"block": "10m"} if kind == "bootstrap" else {}))
            middle = time.perf_counter()
            squall.generate(model, seed=1)
            end = time.perf_counter()
            print(f"{len(part):,} requests, {kind}: fit {middle - begin:.1f} s, draw {end - middle:.2f} s", flush=True)


if __name__ == "__main__":
    main()
