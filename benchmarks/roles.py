"""Prefill and decode engines that change their roles, against every fixed split, over a bursty day and a steady one.

    python benchmarks/roles.py [--rate R] [--seed S]

The day is drawn from `burstgpt://all` (conversations and API, each with its own hours and bursts) at a mean rate; the
steady one has the same requests in random order at Poisson arrivals. Eight engines (a 70B model in 4 bits on
four RTX 4090 each, batches of 16) serve them. The figure is the share of all offered requests that met the SLO.
"""

import argparse

import numpy as np
import polars as pl

import squall
from squall.run.metrics import metrics
from squall.trace.files import open_trace
from squall.trace.table import Trace

ENGINES = 8
SLO = "ttft=5s,tpot=100ms"
WORDS = {
    "model": "llama-3.1-70b-int4",
    "gpu": "rtx4090",
    "tp": 4,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 2048,
    "timeout": 120.0,
}


def steady(trace: Trace, seed: int) -> Trace:
    """The same requests in random order at Poisson arrivals."""
    random = np.random.default_rng(seed)
    table = trace.table.sample(fraction=1.0, shuffle=True, seed=seed)
    arrival = np.sort(random.uniform(0, trace.span, len(table)))
    return Trace(table.with_columns(pl.Series("arrival", arrival)), trace.meta)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    day = open_trace(f"burstgpt://all?duration=1d&rate={asked.rate:g}", drop_failed=True, seed=asked.seed)
    for name, trace in (("bursty day", day), ("steady day", steady(day, asked.seed))):
        print(f"{name}: {len(trace):,} requests in {trace.span / 3600:.1f} h")
        for prefills in range(1, ENGINES):
            show(f"fixed {prefills}:{ENGINES - prefills}", trace, prefills, "fixed")
        for roles in ("backlog", "forecast"):
            show(f"{roles}, from 2:6", trace, 2, roles)


def show(name: str, trace: Trace, prefills: int, roles: str) -> None:
    run = squall.simulate(
        trace, prefill_replicas=prefills, decode_replicas=ENGINES - prefills, roles=roles, token_times=False, **WORDS
    )
    result, target = metrics(run, slo=SLO), run.meta.target
    print(
        f"  {name:<20} {result.goodput_share:7.2%} met {SLO}; TTFT P99 {result.ttft.p99:6.2f} s, TPOT P99"
        f" {1e3 * result.tpot.p99:4.0f} ms; {target['role_changes']:,} changes, {target['mean_prefill_replicas']:.2f}"
        " engines for prefill",
        flush=True,
    )


if __name__ == "__main__":
    main()
