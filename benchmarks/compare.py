"""How often do the intervals of `squall compare` hold the truth? The coverage table of docs/compare.md; and its speed.

    python benchmarks/compare.py [--trials 150] [--only simulator] [--length 1000] [--speed]

Runs of 300, 1,000 and 5,000 requests are cut, far from each other, out of queues that have been running for long, at
50, 80 and 95 % of their capacity; B's server is 3 % faster. The truth is the ratio of A and B over millions of
requests. A cell is the share of the 95 % intervals that hold it and, in brackets, the share of runs for which one was
given: the others were told that they are too short. Its own error is 1.8 points at 95 % of 150. "paired": both runs
answer the same arrivals. `met` is the share within an SLO, the 90th percentile of A.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
import polars as pl
from numba import njit

from squall.compare import _difference, _View, compare
from squall.run import Run, RunMeta, resampling
from squall.run.slo import parse_slo
from squall.simulate import saturation_rate, simulate
from squall.simulate.hardware import GPUS
from squall.trace import Trace, TraceMeta

LOADS = (0.5, 0.8, 0.95)
LENGTHS = (300, 1_000, 5_000)
METRICS = ("ttft_mean", "ttft_p50", "ttft_p90", "ttft_p99", "goodput_share")
WARM = 20_000
"""Requests left out at the start of a path."""
APART = 5_000
"""Requests between two runs that are cut out of the same path."""
FASTER = 1.03


@dataclass(frozen=True)
class Path:
    """Many requests in a row: when they came, and what A and B made of them (seconds)."""

    schedule: np.ndarray
    ttft: tuple[np.ndarray, np.ndarray]
    e2e: tuple[np.ndarray, np.ndarray]


@njit(cache=True)
def waits(arrival: np.ndarray, service: np.ndarray) -> np.ndarray:
    """Time from arrival to end in a queue with one server, first come first served."""
    result = np.empty(arrival.size)
    free = 0.0
    for k in range(arrival.size):
        free = max(free, arrival[k]) + service[k]
        result[k] = free - arrival[k]
    return result


def queue(load: float, seed: int, n: int, shape: float, sigma: float) -> Path:
    """One server; gaps are gamma of this shape, lengths of service lognormal; TTFT and E2E are the same."""
    rng = np.random.default_rng([seed, 1])
    arrival = np.cumsum(rng.gamma(shape, 1 / (shape * load), n))
    service = np.exp(sigma * rng.standard_normal(n) - sigma**2 / 2)
    both = waits(arrival, service), waits(arrival, service / FASTER)
    return Path(arrival, both, both)


def simulated(load: float, seed: int, n: int) -> Path:
    """The simulator: Llama 3.1 8B on an H100 with little KV cache, B's with 3 % more bandwidth; bursty arrivals."""
    cluster = {"kv_blocks": 3000, "max_num_seqs": 64}
    h100 = GPUS["h100"]
    faster = msgspec.structs.replace(h100, bandwidth_tb_s=FASTER * h100.bandwidth_tb_s)

    def made(size: int, gap: float, seed: int) -> Trace:
        rng = np.random.default_rng([seed, 2])
        columns = {
            "arrival": np.cumsum(rng.gamma(0.3, gap / 0.3, size)),
            "request_tokens": np.clip(rng.lognormal(6, 1, size), 10, 6000).astype(int),
            "response_tokens": np.clip(rng.lognormal(5, 0.8, size), 5, 1500).astype(int),
            "failed": np.zeros(size, bool),
        }
        return Trace.of(columns, TraceMeta(source="made", format="made", sha256="ab" * 32))

    trace = made(n, 1 / (load * saturation_rate(made(5000, 1.0, 0), gpu=h100, **cluster)), seed)
    runs = [simulate(trace, gpu=gpu, token_times=False, **cluster).table for gpu in (h100, faster)]
    since = runs[0]["scheduled"].to_numpy()
    first, last = ([run[name].to_numpy() - since for run in runs] for name in ("first_token", "last_token"))
    return Path(since, (first[0], first[1]), (last[0], last[1]))


PROCESSES = {
    "M/D/1": lambda load, seed, n: queue(load, seed, n, 1.0, 0.0),
    "bursty queue": lambda load, seed, n: queue(load, seed, n, 0.3, 1.0),
    "simulator": simulated,
}


def view(path: Path, side: int, cut: slice, limit: float) -> _View:
    schedule = path.schedule[cut]
    e2e, ttft = path.e2e[side][cut], path.ttft[side][cut]
    end = schedule + e2e
    nothing = np.full(end.size, np.nan)
    columns = {"scheduled": schedule, "ended": end, "end": end, "e2e": e2e, "ttft": ttft, "tpot": nothing}
    ok = np.ones(end.size, bool)
    return _View(pl.DataFrame(columns | {"ok": ok, "tokens": nothing}), parse_slo(f"ttft={limit}s"))


def truth(paths: list[Path], limit: float) -> dict[str, float]:
    """log(B / A) of each latency and the difference of the shares within `limit`, over all paths."""
    a, b = (np.concatenate([path.ttft[side][WARM:] for path in paths]) for side in (0, 1))
    levels = [np.log(np.percentile(b, level) / np.percentile(a, level)) for level in (50, 90, 99)]
    found = [np.log(b.mean() / a.mean()), *levels, (b <= limit).mean() - (a <= limit).mean()]
    return dict(zip(METRICS, map(float, found), strict=True))


def coverage(process: str, load: float, trials: int, lengths: list[int]) -> Iterator[tuple[int, bool, list[str]]]:
    """Of each length, paired and not: what the cells of a row say."""
    size = WARM + trials * (max(lengths) + APART)
    paths = [PROCESSES[process](load, seed, size) for seed in (1, 2)]
    limit = float(np.percentile(paths[0].ttft[0][WARM:], 90))
    true = truth(paths, limit)
    for n in lengths:
        for paired in (True, False):
            held: dict[str, list[bool]] = {metric: [] for metric in METRICS}
            for trial in range(trials):
                start = WARM + trial * (n + APART)
                cut = slice(start, start + n)
                views = [view(paths[0], 0, cut, limit), view(paths[0 if paired else 1], 1, cut, limit)]
                for index, metric in enumerate(METRICS):
                    one = _difference(metric, views, paired, 0.05, trial, index)
                    if one is None or one.low is None or one.high is None:
                        continue
                    low, high = (np.log1p(end) if one.relative else end for end in (one.low, one.high))
                    held[metric].append(bool(low <= true[metric] <= high))
            cells = [
                f"{100 * np.mean(held[name]):.0f} ({100 * len(held[name]) / trials:.0f})" if held[name] else "-"
                for name in METRICS
            ]
            yield n, paired, cells


def speed(rows: int) -> None:
    rng = np.random.default_rng(3)
    runs = []
    arrival = np.cumsum(rng.exponential(1.0, rows))
    for service in (0.8, 0.79):
        latency = waits(arrival, np.full(rows, service))
        columns = {
            "request": np.arange(rows),
            "attempt": np.ones(rows, np.int32),
            "scheduled": arrival,
            "sent": arrival,
            "first_token": arrival + 0.5 * latency,
            "last_token": arrival + latency,
            "ended": arrival + latency,
            "status": np.full(rows, "ok"),
            "request_tokens": np.full(rows, 100),
            "response_tokens": np.full(rows, 50),
        }
        runs.append(Run.of(columns, RunMeta(kind="replay", offered=rows)))
    began, cpu = time.perf_counter(), time.process_time()
    found = compare(*runs, slo="ttft=3s")
    print(
        f"{rows:,} requests a side, {len(found.differences)} metrics, {found.pairing.split(':')[0]}: "
        f"{time.perf_counter() - began:.1f} s, {time.process_time() - cpu:.1f} s of CPU"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=150)
    parser.add_argument("--only", choices=list(PROCESSES))
    parser.add_argument("--load", type=float, choices=LOADS)
    parser.add_argument("--length", type=int, action="append")
    parser.add_argument("--speed", action="store_true")
    asked = parser.parse_args()
    if asked.speed:
        speed(1_000)
        speed(1_000_000)
        return
    resampling.DRAWS = 500  # coarser ends of the intervals, and four times as fast
    print("| process | requests | | mean | P50 | P90 | P99 | met |\n|---|---|---|---|---|---|---|---|")
    for process in [asked.only] if asked.only else PROCESSES:
        for load in [asked.load] if asked.load else LOADS:
            for n, paired, cells in coverage(process, load, asked.trials, asked.length or [*LENGTHS]):
                name = f"{process}, {100 * load:.0f} %"
                print(f"| {name} | {n:,} | {'paired' if paired else 'unpaired'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
