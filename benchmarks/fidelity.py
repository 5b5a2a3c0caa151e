"""How true to a trace is what each workload model draws? The tables of docs/fidelity.md.

    python benchmarks/fidelity.py [TRACE…] [--seeds 10]    every model and the baselines, for each trace
    python benchmarks/fidelity.py --hard [CASE…]           the default on the test cases of hard_traces.py
    python benchmarks/fidelity.py --extrapolate [CASE…]    fitted to one part, judged on another, longer or busier

TRACE may also be one of the CASEs; they need SQUALL_TRACES, the folder of the real traces. What each model draws goes
through the simulator at several loads (llama-3.1-8b on one h100, uncalibrated; --hard also on two replicas at the
trace's own rate, and a 70B model on four a100) beside the trace itself. A cell is the median over the seeds of
generated / real, with the range, and * where the real value lies outside of it.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from hard_traces import CASES

from squall.characterize.concurrency import despread
from squall.fidelity import LOADS, _distances, _downstream, _same_clock, _samples, baselines_of, felt, statistics
from squall.progress import notes
from squall.seeds import stream
from squall.simulate import saturation_rate, simulate
from squall.trace import Trace, TraceMeta, open_trace
from squall.workload import bootstrap, fit, generate

METRICS = ("ttft_p90", "ttft_p99", "e2e_mean")
BANDS = {"ttft_p90": (0.87, 1.15), "ttft_p99": (0.67, 1.5), "e2e_mean": (0.85, 1.15)}
CLUSTERS: list[tuple[str, dict[str, Any], tuple[float | None, ...]]] = [
    ("8b on one h100", {}, (0.3, 0.8, 1.1)),
    ("8b on two h100", {"replicas": 2}, (None,)),
    ("70b on four a100", {"gpu": "a100", "model": "llama-3.1-70b", "tp": 4}, (0.7,)),
]
"""Clusters of --hard and loads, shares of capacity; None is the trace's own rate, if the cluster sustains it."""


def models(trace: Trace) -> dict[str, Callable[[int], Trace]]:
    """What draws a trace from a seed, by name."""
    fitted = {kind: fit(trace, kind=kind) for kind in ("auto", "cascade", "renewal")}
    return {
        "fit (auto)": lambda seed: generate(fitted["auto"], seed=seed),
        "fit --kind cascade": lambda seed: generate(fitted["cascade"], seed=seed),
        "fit --kind renewal": lambda seed: generate(fitted["renewal"], seed=seed),
        **baselines_of(trace),
    }


def table(name: str, trace: Trace, seeds: int) -> None:
    """Every model at every load."""
    gaps = np.diff(trace.table["arrival"].to_numpy())
    print(f"\n**{name}** ({len(trace):,} requests, gap CV {gaps.std() / gaps.mean():.3g})")
    capacity = saturation_rate(trace)
    draws = {label: [draw(seed) for seed in range(seeds)] for label, draw in models(trace).items()}
    for load in LOADS:
        print(f"\n| load {load:g}, drawn from | P90 TTFT | P99 TTFT | mean E2E |\n|---|---|---|---|")
        for label, drawn in draws.items():
            rows, _ = _downstream(trace, drawn, capacity, (load,), {})
            cells = [
                f"{one.ratio:.2f} [{one.low / one.real:.2f}, {one.high / one.real:.2f}]{'' if one.inside else '*'}"
                for one in rows
                if one.metric in METRICS
            ]
            print(f"| {label} | " + " | ".join(cells) + " |", flush=True)


def hard(folder: Path, cases: list[str], seeds: int) -> None:
    """The default on each case: worst ratios over clusters and loads, how many out of band and outside the range."""
    print(
        "| case | requests | gap CV | P90 TTFT | P99 TTFT | mean E2E | dispersion | KS, Spearman | out of band "
        "| outside |"
    )
    print("|---" * 10 + "|")
    total = np.zeros(3, int)
    for name in cases or list(CASES):
        trace = CASES[name](folder)
        gaps = np.diff(trace.table["arrival"].to_numpy())
        model = fit(trace)
        drawn = [generate(model, seed=seed) for seed in range(seeds)]
        worst, counts = downstream_summary(trace, drawn)
        total += counts
        real, *others = _same_clock(trace, drawn, 0)[:2]
        found = [statistics(one, trace.span) for one in (real, *others[0])]
        curve = {
            scale: float(np.median([one["dispersion"].get(scale) or np.nan for one in found[1:]])) / index
            for scale, index in found[0]["dispersion"].items()
            if index
        }
        off = max(curve.values(), key=lambda ratio: abs(np.log(ratio)), default=float("nan"))
        distances = [_distances(_samples(real), _samples(one))["ks"] for one in others[0]]
        ks = max(
            float(np.median([one[key] or 0.0 for one in distances])) for key in ("request_tokens", "response_tokens")
        )
        rank = [one["spearman"]["request_response"] or 0.0 for one in found]
        cells = " | ".join(f"{worst[metric]:.2f}" for metric in METRICS)
        print(
            f"| {name} | {len(trace):,} | {gaps.std() / gaps.mean():.3g} | {cells} | {off:.2f} | "
            f"{ks:.3f}, {np.median(rank[1:]) - rank[0]:+.3f} | {counts[1]} of {counts[0]} | {counts[2]} |",
            flush=True,
        )
    print(f"\nall: {total[1]} of {total[0]} out of band, {total[2]} outside of the seeds' range")


def downstream_summary(trace: Trace, drawn: list[Trace]) -> tuple[dict[str, float], np.ndarray]:
    """The ratio that is off the most for each metric, and how many there are, out of band, and outside the range."""
    ratios: dict[str, list[float]] = {metric: [] for metric in METRICS}
    counts = np.zeros(3, int)
    for _, cluster, loads in CLUSTERS:
        capacity = saturation_rate(trace, **cluster)
        for load in loads:
            if load is None and trace.rate > 0.9 * capacity:
                continue
            speed = 1.0 if load is None else load * capacity / trace.rate
            results = [felt(simulate(open_trace(one, speed=speed), **cluster)) for one in (trace, *drawn)]
            for metric, (low, high) in BANDS.items():
                real, new = results[0][metric], [one[metric] for one in results[1:]]
                if not real or None in new:
                    continue
                ratio = float(np.median(new)) / real
                ratios[metric].append(ratio)
                counts += (1, not low <= ratio <= high, not min(new) <= real <= max(new))
    return {
        metric: max(some, key=lambda ratio: abs(np.log(ratio)), default=float("nan")) for metric, some in ratios.items()
    }, counts


def between(trace: Trace, begin: float, end: float) -> Trace:
    """The part of a trace from `begin` to `end` s, from 0."""
    rows = trace.table.filter((pl.col("arrival") >= begin) & (pl.col("arrival") < end))
    return trace.replace(rows.with_columns(arrival=pl.col("arrival") - begin))


def together(traces: list[Trace]) -> Trace:
    """Traces on one clock."""
    meta = TraceMeta(source="together", format="test", tick=traces[0].meta.tick)
    return Trace(pl.concat([one.table for one in traces]).sort("arrival", maintain_order=True), meta)


def after(first: Trace, second: Trace, span: float) -> Trace:
    """One trace behind the other."""
    return together([first, second.replace(second.table.with_columns(arrival=pl.col("arrival") + span))])


def extrapolations(
    trace: Trace,
) -> dict[str, tuple[Trace, Trace, Callable[[Any, int], Trace], Callable[[str, int], Trace]]]:
    """What is asked beyond a trace: its part to fit, the part to judge on, and how a model and a bootstrap draw it."""
    span = float(trace.table["arrival"][-1]) + 1e-3
    first, second = between(trace, 0, span / 2), between(trace, span / 2, span)
    rate = len(first) / (span / 2)
    both = together([first, second])
    half = trace.replace(trace.table.filter(pl.Series(stream(3, "half").random(len(trace)) < 0.5)))
    whole = trace.rate
    return {
        "the other half": (
            first, second,
            lambda model, seed: generate(model, duration=span / 2, start=span / 2, seed=seed),
            lambda block, seed: bootstrap(first, block, seed=seed),
        ),
        "twice as long": (
            first, trace,
            lambda model, seed: generate(model, duration=span, seed=seed),
            lambda block, seed: after(
                bootstrap(first, block, seed=seed), bootstrap(first, block, seed=seed + 1000), span / 2
            ),
        ),
        "twice the clients": (
            first, both,
            lambda model, seed: generate(model, rate=2 * rate, duration=span / 2, seed=seed),
            lambda block, seed: together(
                [bootstrap(first, block, seed=seed), bootstrap(first, block, seed=seed + 1000)]
            ),
        ),
        "every client twice as active": (
            half, trace,
            lambda model, seed: generate(model, rate=whole, duration=span, seed=seed),
            lambda block, seed: together(
                [bootstrap(half, block, seed=seed), bootstrap(half, block, seed=seed + 1000)]
            ),
        ),
    }  # fmt: skip


def extrapolate(folder: Path, cases: list[str], seeds: int) -> None:
    """Geometric mean factors by which the medians are off, and how often the real value lies in the seeds' range.

    Every draw is brought to the mean rate of the part that it is judged on (compressed in time), because halves of a
    bursty trace differ in rate, which no model can know: what is compared is how load comes at equal mean load.
    """
    off: dict[tuple[str, str], list[float]] = {}
    curves: dict[tuple[str, str], list[float]] = {}
    inside: dict[tuple[str, str], list[bool]] = {}
    for name in cases or [case for case in CASES if case not in ("few", "seconds", "outages", "talks")]:
        for question, (part, judge, draw, boot) in extrapolations(CASES[name](folder)).items():
            fitted = {kind: fit(part, kind=kind) for kind in ("cascade", "episodes", "renewal")}
            drawn = {kind: [draw(model, seed) for seed in range(seeds)] for kind, model in fitted.items()}
            for block in ("30s", "120s"):
                if part.span > 5 * float(block[:-1]):
                    drawn[f"block bootstrap {block}"] = [boot(block, seed) for seed in range(seeds)]
            capacity = saturation_rate(judge)
            for label, traces in drawn.items():
                traces = [open_trace(one, speed=judge.rate / one.rate) for one in traces]
                real, *others = [statistics(one, judge.span)["dispersion"] for one in (judge, *traces)]
                curves.setdefault((question, label), []).extend(
                    abs(np.log(np.median([one[scale] for one in others]) / index)) for scale, index in real.items()
                )
                rows, _ = _downstream(judge, traces, capacity, (0.5, 0.8), {})
                for row in rows:
                    if row.metric in METRICS and row.ratio:
                        off.setdefault((question, label), []).append(abs(np.log(row.ratio)))
                        inside.setdefault((question, label), []).append(bool(row.inside))
                print(f"{name}, {question}, {label}: " + ", ".join(
                    f"{row.load:g} {row.metric} {row.ratio:.2f}" for row in rows if row.metric in METRICS
                ), flush=True)  # fmt: skip
    print("\n| asked | drawn from | downstream off by | real value inside | dispersion off by |\n|---|---|---|---|---|")
    for key, some in sorted(off.items(), key=lambda item: item[0][0]):
        print(
            f"| {key[0]} | {key[1]} | {np.exp(np.mean(some)):.2f} | {np.mean(inside[key]):.0%} of {len(inside[key])} | "
            f"{np.exp(np.mean(curves[key])):.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="*")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--hard", action="store_true")
    parser.add_argument("--extrapolate", action="store_true")
    asked = parser.parse_args()
    notes.shown = False
    folder = Path(os.environ.get("SQUALL_TRACES", "."))
    if asked.hard:
        return hard(folder, asked.traces, asked.seeds)
    if asked.extrapolate:
        return extrapolate(folder, asked.traces, asked.seeds)
    for path in asked.traces or ["burstgpt://all?start=14h&duration=4h"]:
        if path in CASES:
            table(path, CASES[path](folder), asked.seeds)
            continue
        trace = open_trace(path)
        if trace.meta.tick:  # all models are judged on the same clock
            spread = despread(trace.table["arrival"].to_numpy(), trace.meta.tick, 0)
            trace = trace.replace(trace.table.with_columns(arrival=pl.Series(spread)), tick=None)
        table(path.rpartition("/")[2], trace, asked.seeds)
    return None


if __name__ == "__main__":
    main()
