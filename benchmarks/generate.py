"""How fast traces are drawn and written, and how much memory that takes: `python benchmarks/generate.py [--large]`.

Each row is a fresh process that draws N requests into a Parquet file (zstd), after a small draw that loads the compiled
code. Rates are requests per second of processor time (user and system, all threads), so what a core does. The peer is
the script that people write instead, with numpy and polars: arrivals of one Gamma law, two lognormal lengths and no
dependence, sessions or failures, all in memory. `--large` adds 100 million requests (about a minute, 1 GB of disk).
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = (1_000_000, 10_000_000)
LARGE = 100_000_000
AZURE = "azure-2023/AzureLLMInferenceTrace_conv.csv"
SERVEGEN = "servegen/deepseek-r1"


def squall(model: str, size: int, out: str) -> None:
    from squall.workload import generate_file

    tally = generate_file(model, out, requests=size)
    assert tally.requests == size


def plain(_: str, size: int, out: str) -> None:
    import numpy as np
    import polars as pl

    rng = np.random.default_rng(0)
    columns = {
        "arrival": np.cumsum(rng.gamma(0.5, 2.0, size)),
        "request_tokens": rng.lognormal(6.0, 1.2, size).astype(np.int32),
        "response_tokens": rng.lognormal(4.5, 1.1, size).astype(np.int32),
    }
    pl.DataFrame(columns).write_parquet(out)


def measure(how: str, model: str, size: int) -> None:
    """Draw once small, once in full; print rate, seconds and peak memory as JSON."""
    draw = {"squall": squall, "plain": plain}[how]
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "t.parquet")
        draw(model, 50_000, out)
        began, used = time.perf_counter(), time.process_time()
        draw(model, size, out)
        result = {
            "rate": size / (time.process_time() - used),
            "wall": time.perf_counter() - began,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
            "bytes_per_request": Path(out).stat().st_size / size,
        }
    print(json.dumps(result))


def main() -> None:
    import os

    from squall import fit

    with tempfile.TemporaryDirectory() as folder:
        models = {f"burstgpt://{name}": f"burstgpt://{name}" for name in ("all", "chatgpt-api", "chatgpt-conversation")}
        if "SQUALL_TRACES" in os.environ:
            traces = Path(os.environ["SQUALL_TRACES"])
            for kind in ("renewal", "episodes", "cascade", "bootstrap"):
                path = str(Path(folder) / f"{kind}.json")
                fit(traces / AZURE, kind=kind, out=path)
                models[f"Azure 2023 conversations, --kind {kind}"] = path
            models["ServeGen deepseek-r1, 73 clients"] = str(Path(folder) / "clients.json")
            fit(traces / SERVEGEN, out=models["ServeGen deepseek-r1, 73 clients"])
        sizes = (*SIZES, LARGE) if "--large" in sys.argv else SIZES
        print(f"{'':44}{'requests':>12}{'M/s a core':>12}{'wall s':>9}{'peak MB':>9}{'B/request':>11}")
        rows = [("squall", name, path) for name, path in models.items()] + [("plain", "numpy and polars script", "")]
        for how, name, path in rows:
            for size in sizes:
                if how == "plain" and size == LARGE:
                    continue  # holds all in memory
                command = [sys.executable, __file__, "measure", how, path, str(size)]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                print(
                    f"{name:44}{size:12,}{found['rate'] / 1e6:12.2f}{found['wall']:9.1f}{found['peak_mb']:9.0f}"
                    f"{found['bytes_per_request']:11.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
