"""Requests a second through the simulator, beside the offline replay of the Dynamo mocker: same requests, same machine.

    python benchmarks/simulate.py --peer /path/to/python         (of a venv with ai-dynamo-runtime==1.6.1)
    python benchmarks/simulate.py --whole                        10.6 million requests, reading and writing included

Both run on one core, on the same requests, replicas and limits (blocks of 16 tokens, 28,000 of them, 1,024 sequences
and 8,192 tokens a step, round-robin). Each is run several times after a warm-up that compiles, for some seconds in all,
and the best counts; the compile time is printed apart. Times are CPU seconds of the process, which a busy machine
changes least: ours from a trace in memory to a Run in memory, the mocker's from its JSON lines to its summary. The step
times differ (a roofline here, the mocker's polynomial there), so simulated time is printed too. Azure and Mooncake are
read from SQUALL_TRACES, and left out where it is not set.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import squall
from squall.simulate.cluster import resolve
from squall.simulate.engine import run_trace
from squall.trace.files import open_trace
from squall.trace.table import Trace

LIMITS = {"kv_blocks": 28_001, "block_size": 16, "max_num_seqs": 1024, "max_num_batched_tokens": 8192}
LEAST = 3.0
"""Seconds, in all: what takes a tenth of a second would else be measured by a disturbance."""
PEER = """
import json, os, sys, time
os.sched_setaffinity(0, {int(sys.argv[4])})
from dynamo import _core
limits = json.loads(sys.argv[2])
limits["num_gpu_blocks"] = limits.pop("kv_blocks") - 1
best = None
for _ in range(int(sys.argv[5])):
    began = time.process_time()
    result = _core.run_mocker_trace_replay(
        [sys.argv[1]], {"engine": limits}, num_workers=int(sys.argv[3]), trace_block_size=512
    )
    took = time.process_time() - began
    best = took if best is None else min(best, took)
summary = result.summary() if callable(result.summary) else result.summary
simulated, completed = summary["duration_ms"] / 1e3, summary["completed_requests"]
print(json.dumps({"seconds": best, "simulated": simulated, "completed": completed}))
"""


def workloads(folder: str | None) -> dict[str, tuple[Trace, int, bool]]:
    """Name -> trace, replicas, prefix caching."""
    chat = squall.generate("burstgpt://all", requests=100_000, seed=1)
    found = {"BurstGPT-like, 40/s": (open_trace(chat, rate=40.0, drop_failed=True), 4, False)}
    if folder:
        azure = Path(folder) / "azure-2023" / "AzureLLMInferenceTrace_conv.csv"
        found["Azure conversation"] = (open_trace(azure), 2, False)
        mooncake = Path(folder) / "mooncake" / "conversation_trace.jsonl"
        found["Mooncake, prefix caching"] = (open_trace(mooncake), 4, True)
    return found


def write_mooncake(trace: Trace, path: Path) -> None:
    """The trace as the mocker reads it; without block hashes every prompt gets its own."""
    table, block = trace.table, 0
    prefixes = table["prefix"].to_list() if "prefix" in table.columns else [None] * len(table)
    columns = (table[name].to_list() for name in ("arrival", "request_tokens", "response_tokens"))
    with path.open("w") as out:
        for arrival, prompt, response, prefix in zip(*columns, prefixes, strict=True):
            blocks = -(-prompt // 512)
            ids = prefix if prefix is not None else list(range(block, block + blocks))
            block += blocks
            line = {"timestamp": 1e3 * arrival, "input_length": prompt, "output_length": response, "hash_ids": ids}
            out.write(json.dumps(line) + "\n")


def ours(trace: Trace, replicas: int, caching: bool, repeats: int) -> dict[str, float]:
    """Seconds (best), steps and simulated seconds of the simulation alone."""
    cluster = resolve(model="llama-3.1-8b", gpu="h100", replicas=replicas, prefix_caching=caching, **LIMITS)
    times: list[float] = []
    while len(times) < repeats or sum(times) < LEAST:
        began = time.process_time()
        run = run_trace(trace, cluster, token_times=False)
        times.append(time.process_time() - began)
    target = run.meta.target
    return {
        "seconds": min(times),
        "steps": target["steps"],
        "simulated": target["simulated_seconds"],
        "completed": int((run.table["status"] == "ok").sum()),
    }


def peer(python: str, trace: Trace, replicas: int, caching: bool, core: int, repeats: int) -> dict[str, float]:
    """Seconds (best) and simulated seconds of the mocker."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.jsonl"
        write_mooncake(trace, path)
        limits = json.dumps(LIMITS | {"enable_prefix_caching": caching})
        call = [python, "-c", PEER, str(path), limits, str(replicas), str(core), str(repeats)]
        said = subprocess.run(call, check=True, capture_output=True, text=True, timeout=600).stdout
    return json.loads(said.strip().splitlines()[-1])


def side_by_side(python: str | None, repeats: int) -> None:
    """The table."""
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    began = time.perf_counter()
    run_trace(Trace.of({"arrival": [0.0], "request_tokens": [9], "response_tokens": [2]}, META), resolve())
    print(f"first call (compile, or load the cache): {time.perf_counter() - began:.1f} s")
    for name, (trace, replicas, caching) in workloads(os.environ.get("SQUALL_TRACES")).items():
        mine = ours(trace, replicas, caching, repeats)
        n = len(trace)
        mean = (np.mean(trace.table[column].to_numpy()) for column in ("request_tokens", "response_tokens"))
        print(f"{name}: {n:,} requests ({' in, '.join(f'{value:.0f}' for value in mean)} out), {replicas} replicas")
        print(
            f"  squall   {mine['seconds']:8.3f} s  {n / mine['seconds']:12,.0f} requests/s"
            f"  {mine['steps'] / mine['seconds']:12,.0f} steps/s  {mine['simulated'] / mine['seconds']:10,.0f} x real"
            f" time  ({mine['completed']:,} answered in {mine['simulated']:,.0f} s simulated)"
        )
        if python:
            other = peer(python, trace, replicas, caching, core, repeats)
            print(
                f"  mocker   {other['seconds']:8.3f} s  {n / other['seconds']:12,.0f} requests/s"
                f"  {'':12}          {other['simulated'] / other['seconds']:10,.0f} x real"
                f" time  ({other['completed']:,} answered in {other['simulated']:,.0f} s simulated)"
            )
            print(f"  ratio    {other['seconds'] / mine['seconds']:8.1f}")


def whole() -> None:
    """10.6 million requests through 4 replicas, from a Parquet file to a Parquet file, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        trace, run = Path(folder) / "trace.parquet", Path(folder) / "run.parquet"
        squall.generate("burstgpt://all", requests=10_600_000, out=trace)
        call = ["simulate", str(trace), "-o", str(run), "--replicas", "4", "--gpu", "h100", "--quiet"]
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "squall", *call], check=True, stdout=subprocess.DEVNULL)
        took = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        size = run.stat().st_size / 2**20
        print(f"10.6 million requests, 4 replicas: {took:.1f} s, {peak:.2f} GiB at most, {size:.0f} MiB written")


META = squall.trace.table.TraceMeta(source="benchmark", format="generated")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="python of a venv with ai-dynamo-runtime==1.6.1")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="the 10.6 million instead")
    given = parser.parse_args()
    if given.whole:
        whole()
    else:
        side_by_side(given.peer, given.repeats)
