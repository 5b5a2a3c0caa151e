"""Fits the built-in calibration from the recorded run and writes it into the package; needs SQUALL_RUNS.

The run is public: bench/examples/RTX4090/Llama-3.1-8B/vllm of casys-kaist/LLMServingSim@5daddb2 (MIT, (c) 2024 CASYS
Lab at KAIST). Only fitted numbers go into the package.
"""

import json
import os
import sys
from pathlib import Path

import msgspec
import polars as pl

import squall
from squall.run import Run, RunMeta

NAME = "rtx4090-llama-3.1-8b-vllm-0.19"
SOURCE = "the vLLM 0.19.0 run of LLMServingSim@5daddb2 (casys-kaist, MIT)"


def recorded(folder: Path) -> Run:
    """The run as a table: sent is when the engine took a request over, on its own clock."""
    rows = pl.DataFrame([json.loads(line) for line in (folder / "requests.jsonl").open()])
    start = rows["queued_ts"].min()
    times = {"sent": "queued_ts", "first_token": "first_token_ts", "last_token": "last_token_ts"}
    columns = {name: rows[column] - start for name, column in times.items()}
    columns |= {"request_tokens": rows["input_toks"], "response_tokens": rows["output_toks"]}
    fixed = {"request": range(len(rows)), "attempt": [1] * len(rows), "status": ["ok"] * len(rows)}
    return Run.of(pl.DataFrame(columns | fixed).with_columns(scheduled=pl.col("sent")), RunMeta(kind="recorded"))


def main() -> None:
    """Fit on the first 100 requests, print the errors, write the file."""
    folder = os.environ.get("SQUALL_RUNS")
    if not folder:
        sys.exit("SQUALL_RUNS does not name a folder of recorded runs: nothing to derive from")
    fitted = squall.calibrate(
        run=recorded(Path(folder) / "vllm-0.19-rtx4090-llama-3.1-8b"),
        first=100,
        model="llama-3.1-8b",
        gpu="rtx4090",
        kv_blocks=2588,
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        max_model_len=32768,
        engine="vllm-0.19",
    )
    named = msgspec.structs.replace(fitted, source=SOURCE)
    out = Path(__file__).parents[1] / "src" / "squall" / "simulate" / "calibrations" / f"{NAME}.json"
    out.write_bytes(msgspec.json.format(msgspec.json.encode(named), indent=1) + b"\n")
    print(f"{NAME}: {named.name}")


if __name__ == "__main__":
    main()
