"""How alike are two traces: statistically, and in what a server would make of them?

A statistic alone can mislead: two traces with the same mean rate and the same CV of the gaps can differ by factors in
the tail latency that they cause. So both are also run through a modelled cluster, at several loads. 100 % load is the
rate that the cluster sustains for the REAL trace's lengths; both traces are compressed in time by the same factor, so
that a generated trace which asks for more work is not forgiven. A model is drawn with several seeds: the median over
the seeds says whether it is off, and the range whether the real trace could have been one of its draws.
"""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl

from squall.characterize.concurrency import bin_counts, despread, dispersion
from squall.errors import InputError
from squall.progress import progress
from squall.run.metrics import latencies, per_request
from squall.run.table import Run
from squall.seeds import DEFAULT_SEED
from squall.simulate import saturation_rate, simulate
from squall.trace import Trace, TraceSource, open_trace
from squall.verb import callable_room
from squall.workload import Workload, generate
from squall.workload.drawing import named

LOADS = (0.5, 0.8, 1.1)
SCALES = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Seconds, of the dispersion curve."""
LATENCIES = ("ttft_p90", "ttft_p99", "e2e_mean", "peak_kv", "preemptions")
_SAME_TICK = 0.01


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """One number of the real trace beside the generated ones: their median, lowest and highest over the seeds."""

    real: float | None
    generated: float | None
    low: float | None
    high: float | None
    ratio: float | None
    """generated / real; null where real is 0 or unknown."""
    inside: bool | None
    """Whether the real value lies between low and high; null with a single generated trace."""


class AtScale(Compared, frozen=True, kw_only=True):
    """A number that belongs to bins of `scale` seconds."""

    scale: float


class Downstream(Compared, frozen=True, kw_only=True):
    """A result of the simulations at `load`, a share of the rate that the cluster sustains for the real trace."""

    load: float
    metric: str
    """ttft_p90, ttft_p99, e2e_mean (seconds), peak_kv (share of 1) or preemptions."""


class Fidelity(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `fidelity`. Distances are medians over the seeds."""

    real: str
    generated: str
    seeds: list[int]
    """Of the draws; empty if a trace was given."""
    target: dict[str, Any]
    """The modelled cluster of the downstream comparison, everything resolved."""
    step_time: str | None
    capacity: float
    """Requests/s that the cluster sustains for the real trace's lengths: load 1."""
    numbers: dict[str, Compared]
    """requests, rate, and mean lengths of the answered requests."""
    ks: dict[str, float | None]
    """Kolmogorov-Smirnov distance (0 to 1) of request_tokens, response_tokens (answered requests) and gaps."""
    wasserstein: dict[str, float | None]
    """Mean distance after the best pairing, in tokens and seconds."""
    spearman_difference: float | None
    """Rank correlation of request and response length, generated minus real."""
    spearman: dict[str, Compared]
    """Rank correlations: of the lengths; of each with the next request's; of the gap with its request's lengths."""
    dispersion: list[AtScale]
    """Index of dispersion of counts."""
    autocorrelation: list[AtScale]
    """Of the counts in neighbouring bins."""
    lengths_in_time: dict[str, list[AtScale]]
    """Variance of a bin's mean length over what the same lengths in random order would have (1: no memory)."""
    conversations: dict[str, Compared]
    """turns (mean), single (share of sessions with one turn), pause_p50 (s); empty without sessions."""
    failures: dict[str, Compared]
    """share, and after_failure: the share among requests that follow a failed one; empty without failures."""
    downstream: list[Downstream]
    notes: list[str]


def fidelity(
    real: TraceSource,
    generated: TraceSource | Workload,
    *,
    gpu: str | None = None,
    model: str | None = None,
    replicas: int = 1,
    calibration: str | Path | None = None,
    loads: tuple[float, ...] = LOADS,
    seeds: int = 10,
    **options: Any,
) -> Fidelity:
    """Compare `generated` with the `real` trace, statistically and downstream.

    Parameters
    ----------
    real
        A Trace, a file, or a built-in profile; `options` are the trace options, and apply to it and to a generated
        trace alike. `seed` among them is the first seed of the draws.
    generated
        A Trace or its file; or a Workload, its JSON file or a profile, which is drawn `seeds` times over the real
        trace's span.
    gpu, model, replicas, calibration
        The modelled cluster, as in `simulate`.
    loads
        Shares of the cluster's capacity for the real trace's lengths.

    Raises InputError if a trace cannot be read, or holds too little to compare.
    """
    if seeds < 1:
        raise InputError(f"--seeds {seeds}: at least one draw is needed.")
    if not loads or not all(0 < load < float("inf") for load in loads):
        raise InputError(
            f"--loads {','.join(map(str, loads))}: shares of the capacity above 0 are needed, like 0.5,0.8."
        )
    asked = open_trace(real, **options)
    if len(asked) < 10 or asked.span <= 0:
        raise InputError(
            f"{asked.meta.source}: {len(asked)} requests over {asked.span:g} s are too few to compare with; 10 at "
            "different times are needed."
        )
    first = int(options.get("seed", DEFAULT_SEED))
    drawn, draws, name = _generated(generated, asked, range(first, first + seeds), options)
    asked, drawn, notes = _same_clock(asked, drawn, first)
    span = max(asked.span, max(trace.span for trace in drawn))
    words: dict[str, Any] = {"gpu": gpu, "model": model, "replicas": replicas, "calibration": calibration}
    words = {key: value for key, value in words.items() if value is not None}
    capacity = saturation_rate(asked, **words)
    downstream, run = _downstream(asked, drawn, capacity, loads, words)
    of = [statistics(trace, span) for trace in (asked, *drawn)]
    distances = [_distances(asked, trace) for trace in drawn]

    def compared(part: str) -> dict[str, Compared]:
        return {key: Compared(**_spread([one[part].get(key) for one in of])) for key in of[0][part]}

    def curve(part: str) -> list[AtScale]:
        return [AtScale(scale=scale, **_spread([one[part].get(scale) for one in of])) for scale in of[0][part]]

    spearman = compared("spearman")
    both = spearman["request_response"]
    return Fidelity(
        real=asked.meta.source,
        generated=name,
        seeds=draws,
        target=run.meta.target,
        step_time=run.meta.step_time,
        capacity=capacity,
        numbers=compared("numbers"),
        ks={key: _median([one["ks"][key] for one in distances]) for key in distances[0]["ks"]},
        wasserstein={key: _median([one["wasserstein"][key] for one in distances]) for key in distances[0]["ks"]},
        spearman_difference=None if both.real is None or both.generated is None else both.generated - both.real,
        spearman=spearman,
        dispersion=curve("dispersion"),
        autocorrelation=curve("autocorrelation"),
        lengths_in_time={"request_tokens": curve("request_in_time"), "response_tokens": curve("response_in_time")},
        conversations=compared("conversations"),
        failures=compared("failures"),
        downstream=downstream,
        notes=notes,
    )


def _generated(
    generated: TraceSource | Workload, real: Trace, seeds: range, options: dict[str, Any]
) -> tuple[list[Trace], list[int], str]:
    """The traces to compare with, the seeds they were drawn with, and what they come from."""
    if isinstance(generated, Trace):
        return [open_trace(generated, **options)], [], generated.meta.source
    text = generated.source if isinstance(generated, Workload) else str(generated)
    if not isinstance(generated, Workload) and not text.endswith(".json") and "://" not in text:
        return [open_trace(generated, **options)], [], text
    workload, name = named(generated)
    span = real.span + real.span / (len(real) - 1)
    with progress(f"Drawing from {name}", total=len(seeds)) as done:
        drawn = []
        for seed in seeds:
            drawn.append(generate(workload, duration=span, seed=seed))
            done(len(drawn))
    return drawn, list(seeds), name


def _same_clock(real: Trace, drawn: list[Trace], seed: int) -> tuple[Trace, list[Trace], list[str]]:
    """Both as recorded if their clocks are equally fine; else both with the requests spread inside their ticks."""
    ticks = [trace.meta.tick or 0.0 for trace in (real, *drawn)]
    if max(ticks) - min(ticks) <= _SAME_TICK * max(ticks):
        return real, drawn, []
    spread = [
        trace.replace(
            trace.table.with_columns(arrival=pl.Series(despread(trace.table["arrival"].to_numpy(), tick, seed))),
            tick=None,
        )
        if tick
        else trace
        for tick, trace in zip(ticks, (real, *drawn), strict=True)
    ]
    coarse = (
        f"One of the two clocks has ticks of {max(ticks):.3g} s, the other {min(ticks):.3g} s: requests were spread "
        "inside their ticks."
    )
    return spread[0], spread[1:], [coarse]


# --------------------------------------------------------------------------------------------------------- statistics


def statistics(trace: Trace, span: float) -> dict[str, dict[Any, float | None]]:
    """What `fidelity` compares of a trace, by part and key; bins cover `span` seconds from the first request."""
    table = trace.table
    arrival = table["arrival"].to_numpy() - table["arrival"][0]
    answered = table.filter(~pl.col("failed"))
    request, response = answered["request_tokens"].to_numpy(), answered["response_tokens"].to_numpy()
    at = answered["arrival"].to_numpy() - table["arrival"][0]
    gaps = np.diff(at, prepend=0.0)
    parts: dict[str, dict[Any, float | None]] = {
        "numbers": {
            "requests": float(len(trace)),
            "rate": trace.rate,
            "request_tokens": _mean(request),
            "response_tokens": _mean(response),
        },
        "spearman": {
            "request_response": _spearman(request, response),
            "request_next": _spearman(request[:-1], request[1:]),
            "response_next": _spearman(response[:-1], response[1:]),
            "gap_request": _spearman(gaps[1:], request[1:]),
            "gap_response": _spearman(gaps[1:], response[1:]),
        },
        "dispersion": dict(dispersion(arrival, SCALES, 0.0, span)),
        "autocorrelation": {scale: _neighbours(arrival, scale, span) for scale in SCALES if span >= 5 * scale},
        "request_in_time": {scale: _in_time(at, request, scale) for scale in SCALES if span >= 5 * scale},
        "response_in_time": {scale: _in_time(at, response, scale) for scale in SCALES if span >= 5 * scale},
        "conversations": _conversations(table),
        "failures": _failures(table["failed"].to_numpy()),
    }
    return parts


def _distances(real: Trace, generated: Trace) -> dict[str, dict[str, float | None]]:
    from scipy.stats import ks_2samp, wasserstein_distance

    samples = []
    for trace in (real, generated):
        answered = trace.table.filter(~pl.col("failed"))
        lengths = {name: answered[name].to_numpy() for name in ("request_tokens", "response_tokens")}
        samples.append(lengths | {"gaps": np.diff(trace.table["arrival"].to_numpy())})
    known = {key: min(sample[key].size for sample in samples) > 0 for key in samples[0]}
    return {
        "ks": {
            key: float(ks_2samp(samples[0][key], samples[1][key], method="asymp").statistic) if known[key] else None
            for key in known
        },
        "wasserstein": {
            key: float(wasserstein_distance(samples[0][key], samples[1][key])) if known[key] else None for key in known
        },
    }


def _neighbours(arrival: np.ndarray, scale: float, span: float) -> float | None:
    """Correlation of the counts in neighbouring bins of `scale` seconds."""
    counts = bin_counts(arrival, scale, 0.0, span)[: int(span // scale)].astype(float)
    if counts.size < 5 or counts[1:].std() == 0 or counts[:-1].std() == 0:
        return None
    return float(np.corrcoef(counts[:-1], counts[1:])[0, 1])


def _in_time(at: np.ndarray, tokens: np.ndarray, scale: float) -> float | None:
    """Weighted variance of the bins' mean lengths, over its expectation if the lengths came in random order."""
    if tokens.size < 10 or tokens.min() == tokens.max():
        return None
    _, bin_of = np.unique(np.floor(at / scale), return_inverse=True)
    counts, sums = np.bincount(bin_of), np.bincount(bin_of, tokens)
    if counts.size < 5:
        return None
    between = float((counts * (sums / counts - tokens.mean()) ** 2).sum() / (counts.size - 1))
    return between / float(tokens.var(ddof=1))


def _conversations(table: pl.DataFrame) -> dict[Any, float | None]:
    rows = table.filter(pl.col("session").is_not_null())
    if rows.is_empty():
        return {}
    turns = rows.group_by("session").len()["len"].to_numpy()
    pauses = rows.select(pl.col("arrival").diff().over("session"))["arrival"].drop_nulls()
    return {
        "turns": float(turns.mean()),
        "single": float((turns == 1).mean()),
        "pause_p50": None if pauses.is_empty() else float(pauses.median()),  # type: ignore[arg-type]
    }


def _failures(failed: np.ndarray) -> dict[Any, float | None]:
    if not failed.any():
        return {"share": 0.0}
    after = failed[1:][failed[:-1]]
    return {"share": float(failed.mean()), "after_failure": _mean(after)}


# --------------------------------------------------------------------------------------------------------- downstream


def _downstream(
    real: Trace, drawn: list[Trace], capacity: float, loads: tuple[float, ...], cluster: dict[str, Any]
) -> tuple[list[Downstream], Run]:
    """Every trace at every load, compressed by the factor that brings the real one there."""
    rows = []
    done = 0
    with progress("Simulating", total=len(loads) * (1 + len(drawn))) as advance:
        for load in loads:
            speed = load * capacity / real.rate
            results = []
            for trace in (real, *drawn):
                run = simulate(open_trace(trace, speed=speed), **cluster)
                results.append(felt(run))
                done += 1
                advance(done)
            rows += [
                Downstream(load=load, metric=metric, **_spread([one[metric] for one in results]))
                for metric in LATENCIES
            ]
    return rows, run


def felt(run: Run) -> dict[str, float | None]:
    """What the downstream comparison looks at, of one simulated run."""
    found = latencies(per_request(run.table))
    ttft, e2e = found["ttft"][found["ok"]], found["e2e"][found["ok"]]
    used, preempted = run.series["kv_used"].max(), run.table["preemptions"].sum()
    return {
        "ttft_p90": float(np.percentile(ttft, 90)) if ttft.size >= 10 else None,
        "ttft_p99": float(np.percentile(ttft, 99)) if ttft.size >= 100 else None,
        "e2e_mean": _mean(e2e),
        "peak_kv": None if used is None else float(used),  # type: ignore[arg-type]
        "preemptions": float(preempted),
    }


def _spread(values: list[float | None]) -> dict[str, Any]:
    """The first value (real) beside the others, as the fields of Compared."""
    real, generated = values[0], np.array([value for value in values[1:] if value is not None])
    if real is None or generated.size == 0:
        middle = float(np.median(generated)) if generated.size else None
        return {"real": real, "generated": middle, "low": None, "high": None, "ratio": None, "inside": None}
    middle, low, high = float(np.median(generated)), float(generated.min()), float(generated.max())
    return {
        "real": real,
        "generated": middle,
        "low": low,
        "high": high,
        "ratio": middle / real if real else None,
        "inside": low <= real <= high if generated.size > 1 else None,
    }


def _spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    from squall.workload.lengths import spearman

    return spearman(a, b) if a.size > 2 else None


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


callable_room(__name__)
