"""How true to a trace is what each workload model draws? The table of docs/fidelity.md.

    python benchmarks/fidelity.py [TRACE…] [--seeds 10]

For every trace, and for bursty ones made of the first: what each model draws goes through the simulator at loads 0.5,
0.8 and 1.1 (llama-3.1-8b on one h100, uncalibrated) beside the trace itself. A cell is the median over the seeds of
generated / real, with the range, and * where the real value lies outside of it.
"""

import argparse
from collections.abc import Callable

import numpy as np
import polars as pl

from squall.characterize.concurrency import despread
from squall.fidelity import LOADS, _downstream
from squall.seeds import stream
from squall.simulate import saturation_rate
from squall.trace import Trace, open_trace
from squall.workload import bootstrap, fit, generate, smooth

METRICS = ("ttft_p90", "ttft_p99", "e2e_mean")


def clumped(trace: Trace) -> Trace:
    """The first half of the rows in bursts with heavy-tailed sizes and lognormal silences between them."""
    rng = stream(5, "clumped")
    rows = len(trace) // 2
    times: list[float] = []
    now = 0.0
    while len(times) < rows:
        size = min(900, int(np.ceil(rng.pareto(1.2) * 8 + 1)))
        times += list(now + np.cumsum(rng.standard_gamma(0.35, size) / 0.35 / rng.lognormal(np.log(25), 0.8)))
        now = times[-1] + rng.lognormal(np.log(6), 1.3)
    return trace.replace(trace.table.head(rows).with_columns(arrival=pl.Series(np.array(times[:rows]))), tick=None)


def clients(trace: Trace) -> Trace:
    """The rows, sorted by response length, dealt to twelve clients: four steady, eight in bursts; a burst is alike."""
    rng = stream(6, "clients")
    table, arrival = trace.table.sort("response_tokens"), np.empty(len(trace))
    for client, rows in enumerate(np.array_split(np.arange(len(trace)), 12)):
        if client % 3 == 0:
            arrival[rows] = rng.random(rows.size) * trace.span
            continue
        size = np.minimum((rng.pareto(1.3, rows.size) * 20 + 5).astype(int), rows.size)
        owner = np.repeat(np.arange(rows.size), size)[: rows.size]
        begin = rng.random(rows.size) * trace.span
        arrival[rng.permutation(rows)] = begin[owner] + rng.exponential(0.5, rows.size)
    return Trace.of(table.with_columns(arrival=pl.Series(arrival)), trace.meta)


def models(trace: Trace) -> dict[str, Callable[[int], Trace]]:
    """What draws a trace from a seed, by name."""
    gaps = np.diff(trace.table["arrival"].to_numpy())
    lengths = pl.col("request_tokens", "response_tokens")
    auto, renewal = fit(trace), fit(trace, kind="renewal")

    def shuffled(seed: int) -> Trace:
        order = pl.Series(stream(seed, "shuffled").permutation(len(trace)))
        return trace.replace(trace.table.with_columns(trace.table.select(lengths)[order]))

    return {
        "fit (auto)": lambda seed: generate(auto, seed=seed),
        "fit --kind renewal": lambda seed: generate(renewal, seed=seed),
        "Poisson, lengths in place": lambda seed: smooth(trace, "poisson", seed=seed),
        "Gamma with the gaps' CV, lengths in place": lambda seed: smooth(
            trace, "gamma", cv=float(gaps.std() / gaps.mean()), seed=seed
        ),
        "own arrivals, lengths shuffled": shuffled,
        "block bootstrap 5 s": lambda seed: bootstrap(trace, 5, seed=seed),
        "block bootstrap 30 s": lambda seed: bootstrap(trace, 30, seed=seed),
        "block bootstrap 120 s": lambda seed: bootstrap(trace, 120, seed=seed),
    }


def table(name: str, trace: Trace, seeds: int) -> None:
    gaps = np.diff(trace.table["arrival"].to_numpy())
    print(f"\n**{name}** ({len(trace):,} requests, gap CV {gaps.std() / gaps.mean():.3g})\n")
    print("| drawn from | " + " | ".join(f"{load:g} {metric}" for load in LOADS for metric in METRICS) + " |")
    print("|---" * (1 + len(LOADS) * len(METRICS)) + "|")
    capacity = saturation_rate(trace)
    for label, draw in models(trace).items():
        rows, _ = _downstream(trace, [draw(seed) for seed in range(seeds)], capacity, LOADS, {})
        cells = [
            f"{one.ratio:.2f} [{one.low / one.real:.2f}, {one.high / one.real:.2f}]{'' if one.inside else '*'}"
            for one in rows
            if one.metric in METRICS
        ]
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", nargs="*", default=["burstgpt://all?start=14h&duration=4h"])
    parser.add_argument("--seeds", type=int, default=10)
    asked = parser.parse_args()
    traces = [open_trace(path) for path in asked.traces]
    for path, trace in zip(asked.traces, traces, strict=True):
        if trace.meta.tick:  # all models are judged on the same clock
            spread = despread(trace.table["arrival"].to_numpy(), trace.meta.tick, 0)
            trace = trace.replace(trace.table.with_columns(arrival=pl.Series(spread)), tick=None)
        table(path.rpartition("/")[2], trace, asked.seeds)
    table("the first, clumped", clumped(traces[0]), asked.seeds)
    table("the first, dealt to clients", clients(traces[0]), asked.seeds)


if __name__ == "__main__":
    main()
