"""How often do the intervals of `squall compare` hold the truth? The coverage table of docs/compare.md; and its speed.

    python benchmarks/compare.py [--trials 200] [--speed]

Pairs of runs are drawn from processes whose neighbours are alike, with a known ratio of their metrics; a cell is the
share of the 95 % intervals that hold it, and the median width of the interval as a ratio. Its own error is 1.5 points
at 95 % and 200 trials. "paired": both runs answer the same arrivals.
"""

import argparse
import time
from collections.abc import Callable
from functools import cache

import numpy as np
import polars as pl
from numba import njit

from squall.compare import _difference, _View, compare
from squall.run import Run, RunMeta

METRICS = ("e2e_mean", "e2e_p50", "e2e_p90", "e2e_p99")
Process = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""Schedule, and the latencies of A and B: of the same requests if used as a pair."""


@njit(cache=True)
def waits(arrival: np.ndarray, service: np.ndarray) -> np.ndarray:
    """Time from arrival to end in a queue with one server, first come first served."""
    result = np.empty(arrival.size)
    free = 0.0
    for k in range(arrival.size):
        free = max(free, arrival[k]) + service[k]
        result[k] = free - arrival[k]
    return result


@njit(cache=True)
def smoothed(noise: np.ndarray, phi: float) -> np.ndarray:
    """AR(1) with unit variance."""
    result = np.empty(noise.size)
    state = noise[0]
    for k in range(noise.size):
        state = phi * state + np.sqrt(1 - phi * phi) * noise[k]
        result[k] = state
    return result


def autoregressive(phi: float) -> Process:
    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        common = smoothed(rng.standard_normal(n), phi)
        own = [smoothed(rng.standard_normal(n), phi) for _ in range(2)]
        a, b = (np.exp(0.8 * common + 0.6 * each) for each in own)
        return np.arange(n, dtype=float), a, 0.9 * b

    return draw


def queue(load: float, faster: float = 0.97) -> Process:
    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        arrival = np.cumsum(rng.exponential(1 / load, n + 2000))
        a, b = (waits(arrival, np.full(arrival.size, service)) for service in (1.0, faster))
        return arrival[2000:] - arrival[2000], a[2000:], b[2000:]

    return draw


CASES: dict[str, tuple[Process, int]] = {
    "independent, n = 2,000": (autoregressive(0.0), 2_000),
    "AR(1) 0.9, n = 2,000": (autoregressive(0.9), 2_000),
    "AR(1) 0.99, n = 20,000": (autoregressive(0.99), 20_000),
    "M/D/1 at 70 %, n = 2,000": (queue(0.7), 2_000),
    "M/D/1 at 70 %, n = 20,000": (queue(0.7), 20_000),
    "M/D/1 at 90 %, n = 20,000": (queue(0.9), 20_000),
    "M/D/1 at 90 %, n = 200,000": (queue(0.9), 200_000),
}


@cache
def truth(name: str) -> dict[str, float]:
    """log(B / A) of each metric, from 20 million requests."""
    process, _ = CASES[name]
    sums = {metric: np.zeros(2) for metric in METRICS}
    for k in range(20):
        _, *both = process(np.random.default_rng([9, k]), 1_000_000)
        for side, values in enumerate(both):
            found = [values.mean(), *np.percentile(values, [50, 90, 99])]
            for metric, value in zip(METRICS, found, strict=True):
                sums[metric][side] += value
    return {metric: float(np.log(b / a)) for metric, (a, b) in sums.items()}


def view(schedule: np.ndarray, latency: np.ndarray) -> _View:
    end = schedule + latency
    nothing = np.full(end.size, np.nan)
    columns = {"scheduled": schedule, "ended": end, "end": end, "e2e": latency, "ttft": nothing, "tpot": nothing}
    return _View(pl.DataFrame(columns | {"ok": np.ones(end.size, bool), "tokens": nothing}), None)


def coverage(name: str, paired: bool, trials: int) -> dict[str, tuple[float, float, float]]:
    """For each metric: share of intervals that hold the truth, their median width, and the share without one."""
    process, n = CASES[name]
    held: dict[str, list[bool]] = {metric: [] for metric in METRICS}
    width: dict[str, list[float]] = {metric: [] for metric in METRICS}
    for trial in range(trials):
        schedule, a, b = process(np.random.default_rng([1, trial]), n)
        if not paired:
            other, _, b = process(np.random.default_rng([2, trial]), n)
            views = [view(schedule, a), view(other, b)]
        else:
            views = [view(schedule, a), view(schedule, b)]
        for index, metric in enumerate(METRICS):
            one = _difference(metric, views, paired, 0.05, trial, index)
            if one is None or one.low is None or one.high is None:
                continue
            low, high = np.log1p(one.low), np.log1p(one.high)
            held[metric].append(low <= truth(name)[metric] <= high)
            width[metric].append(high - low)
    return {
        metric: (
            float(np.mean(held[metric])) if held[metric] else float("nan"),
            float(np.median(width[metric])) if width[metric] else float("nan"),
            1 - len(held[metric]) / trials,
        )
        for metric in METRICS
    }


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
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--case", choices=list(CASES))
    asked = parser.parse_args()
    if asked.speed:
        speed(1_000)
        speed(1_000_000)
        return
    print("| process | | mean | P50 | P90 | P99 |\n|---|---|---|---|---|---|")
    for name in [asked.case] if asked.case else CASES:
        for paired in (False, True):
            found = coverage(name, paired, asked.trials)
            cells = [
                "-"
                if none == 1
                else f"{100 * share:.1f} % ({np.exp(width):.2f}){f', none in {100 * none:.0f} %' if none else ''}"
                for share, width, none in found.values()
            ]
            print(f"| {name} | {'paired' if paired else 'unpaired'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
