"""How alike are two traces: statistically, and in what a server would make of them?

A statistic alone can mislead: two traces with the same mean rate and the same CV of the gaps can differ by factors in
the tail latency that they cause. So both are also run through a modelled cluster, at several loads. 100 % load is the
rate that the cluster sustains for the REAL trace's lengths; both traces are compressed in time by the same factor, so
that a generated trace which asks for more work is not forgiven. A model is drawn with several seeds: the median over
the seeds says whether it is off, and the range whether the real trace could have been one of its draws.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl

from squall.characterize.concurrency import bin_counts, despread, dispersion
from squall.errors import InputError
from squall.progress import progress
from squall.run.metrics import latencies, per_request
from squall.run.table import Run, RunMeta
from squall.seeds import DEFAULT_SEED, stream
from squall.simulate import saturation_rate, simulate
from squall.trace import Trace, TraceSource, open_trace
from squall.units import in_words
from squall.verb import callable_room
from squall.workload import Workload, bootstrap, generate, smooth
from squall.workload.drawing import named

LOADS = (0.5, 0.8, 1.1)
SCALES = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Seconds, of the dispersion curve."""
LATENCIES = ("ttft_p90", "ttft_p99", "e2e_mean", "peak_kv", "preemptions")
BANDS = {"ttft_p90": (0.9, 1.1), "ttft_p99": (0.87, 1.15), "e2e_mean": (0.93, 1.07)}
"""Ratios generated / real within which the verdict calls a simulated latency the same."""
KS_LENGTHS, SPEARMAN, DISPERSION = 0.02, 0.03, 0.15
"""Distances within which the verdict calls lengths, their rank correlation and the dispersion of counts the same."""
QUANTILES = (0.001, 0.005, *(k / 100 for k in range(1, 100)), 0.995, 0.999)
"""Shares of the distributions that are kept."""
BLOCKS = (5.0, 30.0, 120.0)
"""Seconds, of the block bootstraps among the baselines."""
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


class Distribution(msgspec.Struct, frozen=True, kw_only=True):
    """Quantiles of the real trace, and of the generated ones: their median, lowest and highest over the seeds."""

    share: list[float]
    real: list[float]
    generated: list[float]
    low: list[float]
    high: list[float]


class Baseline(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of the real trace if only a part of it is kept: the same downstream comparison."""

    name: str
    downstream: list[Downstream]


class Fidelity(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `fidelity`. Distances are medians over the seeds."""

    verdict: str
    """`alike`, `alike in part` or `not alike`: downstream latencies, lengths and dispersion against the bands."""
    summary: list[str]
    """What agrees, what does not, and how sure that is: plain sentences."""
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
    baselines: list[Baseline]
    """Empty unless asked for."""
    distributions: dict[str, Distribution]
    """Of gaps (s), request_tokens and response_tokens (answered requests)."""
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
    baselines: bool = False,
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
    baselines
        Also judge what is left if parts of the real trace are thrown away: Poisson arrivals, Gamma arrivals with the
        gaps' CV, shuffled lengths, block bootstraps of 5, 30 and 120 s; each drawn `seeds` times.

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
            f"{asked.meta.source}: {len(asked)} request{'s' * (len(asked) > 1)} over {asked.span:g} s: too few to "
            "compare with; 10 at different times are needed."
        )
    first = int(options.get("seed", DEFAULT_SEED))
    drawn, draws, name = _generated(generated, asked, range(first, first + seeds), options)
    asked, drawn, notes = _same_clock(asked, drawn, first)
    span = max(asked.span, max(trace.span for trace in drawn))
    words: dict[str, Any] = {"gpu": gpu, "model": model, "replicas": replicas, "calibration": calibration}
    words = {key: value for key, value in words.items() if value is not None}
    capacity = saturation_rate(asked, **words)
    downstream, meta = _downstream(asked, drawn, capacity, loads, words)
    beside = _baselines(asked, range(first, first + seeds), capacity, loads, words) if baselines else []
    of = [statistics(trace, span) for trace in (asked, *drawn)]
    samples = [_samples(trace) for trace in (asked, *drawn)]
    distances = [_distances(samples[0], sample) for sample in samples[1:]]

    def compared(part: str) -> dict[str, Compared]:
        return {key: Compared(**_spread([one[part].get(key) for one in of])) for key in of[0][part]}

    def curve(part: str) -> list[AtScale]:
        return [AtScale(scale=scale, **_spread([one[part].get(scale) for one in of])) for scale in of[0][part]]

    spearman = compared("spearman")
    both = spearman["request_response"]
    result = Fidelity(
        verdict="",
        summary=[],
        real=asked.meta.source,
        generated=name,
        seeds=draws,
        target=meta.target,
        step_time=meta.step_time,
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
        baselines=beside,
        distributions=_distributions(samples),
        notes=notes,
    )
    verdict, summary = judge(result)
    return msgspec.structs.replace(result, verdict=verdict, summary=summary)


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


def _samples(trace: Trace) -> dict[str, np.ndarray]:
    """What is compared as a distribution: lengths of answered requests, and gaps."""
    answered = trace.table.filter(~pl.col("failed"))
    lengths = {name: answered[name].to_numpy() for name in ("request_tokens", "response_tokens")}
    return lengths | {"gaps": np.diff(trace.table["arrival"].to_numpy())}


def _distances(real: dict[str, np.ndarray], generated: dict[str, np.ndarray]) -> dict[str, dict[str, float | None]]:
    from scipy.stats import ks_2samp, wasserstein_distance

    known = {key: min(real[key].size, generated[key].size) > 0 for key in real}
    return {
        "ks": {
            key: float(ks_2samp(real[key], generated[key], method="asymp").statistic) if known[key] else None
            for key in known
        },
        "wasserstein": {
            key: float(wasserstein_distance(real[key], generated[key])) if known[key] else None for key in known
        },
    }


def _distributions(samples: Sequence[dict[str, np.ndarray]]) -> dict[str, Distribution]:
    """Quantiles of the first sample (real) and, over the others, the median and the range of each quantile."""
    found = {}
    for key in samples[0]:
        if min(sample[key].size for sample in samples) < 2:
            continue
        real, *drawn = (np.quantile(sample[key], QUANTILES) for sample in samples)
        columns = real, np.median(drawn, axis=0), np.min(drawn, axis=0), np.max(drawn, axis=0)
        lists = (column.tolist() for column in columns)
        found[key] = Distribution(
            share=list(QUANTILES), **dict(zip(("real", "generated", "low", "high"), lists, strict=True))
        )
    return found


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
) -> tuple[list[Downstream], RunMeta]:
    """Every trace at every load, compressed by the factor that brings the real one there; and the metadata of a run."""
    jobs = [(trace, load * capacity / real.rate) for load in loads for trace in (real, *drawn)]

    def simulated(job: tuple[Trace, float]) -> tuple[dict[str, float | None], RunMeta]:
        run = simulate(open_trace(job[0], speed=job[1]), **cluster)
        return felt(run), run.meta

    results: list[dict[str, float | None]] = []
    threads = ThreadPoolExecutor(_cores())
    try:
        with progress("Simulating", total=len(jobs)) as advance:
            for numbers, of_run in threads.map(simulated, jobs):
                results.append(numbers)
                meta = of_run
                advance(len(results))
    finally:
        threads.shutdown(cancel_futures=True)  # an interrupt must not wait for all of them
    each = 1 + len(drawn)
    rows = [
        Downstream(load=load, metric=metric, **_spread([one[metric] for one in results[k * each : (k + 1) * each]]))
        for k, load in enumerate(loads)
        for metric in LATENCIES
    ]
    return rows, meta


def _cores() -> int:
    """Processors that this process may use; the simulator's kernel lets the others run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _baselines(
    real: Trace, seeds: range, capacity: float, loads: tuple[float, ...], cluster: dict[str, Any]
) -> list[Baseline]:
    """What keeps only a part of the real trace, judged like the generated one."""
    found = []
    for name, draw in baselines_of(real).items():
        rows, _ = _downstream(real, [draw(seed) for seed in seeds], capacity, loads, cluster)
        found.append(Baseline(name=name, downstream=rows))
    return found


def baselines_of(real: Trace) -> dict[str, Callable[[int], Trace]]:
    """By name, what makes a trace of `real` and a seed by throwing a part of its structure away."""
    gaps = np.diff(real.table["arrival"].to_numpy())
    mean = gaps.mean()
    cv = float(gaps.std() / mean) if mean > 0 else 0.0
    found: dict[str, Callable[[int], Trace]] = {"Poisson arrivals": lambda seed: smooth(real, "poisson", seed=seed)}
    if cv > 0:
        found[f"Gamma arrivals, CV {cv:.3g}"] = lambda seed: smooth(real, "gamma", cv=cv, seed=seed)
    found["lengths shuffled"] = partial(_shuffled, real)
    for block in BLOCKS:
        if block < real.span / 5:
            found[f"blocks of {in_words(block)}"] = partial(_blocks, real, block)
    return found


def _blocks(real: Trace, block: float, seed: int) -> Trace:
    return bootstrap(real, block, seed=seed)


def _shuffled(real: Trace, seed: int) -> Trace:
    """The requests of `real` at its times in random order."""
    order = pl.Series(stream(seed, "shuffled").permutation(len(real)))
    lengths = real.table.select("request_tokens", "response_tokens", "failed")[order]
    return real.replace(real.table.with_columns(lengths), f"lengths shuffled, seed {seed}")


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


# ------------------------------------------------------------------------------------------------------------ verdict


def judge(found: Fidelity) -> tuple[str, list[str]]:
    """`alike`, `alike in part` or `not alike`; and sentences on what agrees, what does not, and how sure that is."""
    latencies = [one for one in found.downstream if one.metric in BANDS and one.ratio is not None]
    off = [one for one in latencies if not BANDS[one.metric][0] <= (one.ratio or 0) <= BANDS[one.metric][1]]
    differing = _differing_statistics(found)
    if not latencies:
        verdict = "not alike" if differing else "alike"
    elif off:
        verdict = "not alike" if len(off) > len(latencies) / 2 else "alike in part"
    else:
        verdict = "alike in part" if differing else "alike"
    sentences = [_downstream_sentence(latencies, off), *_statistics_sentences(found, differing), _sureness(found)]
    return verdict, [sentence for sentence in sentences if sentence]


def metric_name(metric: str) -> str:
    """A downstream metric for people."""
    return {
        "ttft_p90": "P90 TTFT",
        "ttft_p99": "P99 TTFT",
        "e2e_mean": "mean E2E",
        "peak_kv": "peak KV use",
        "preemptions": "preemptions",
    }[metric]


def _downstream_sentence(latencies: Sequence[Downstream], off: Sequence[Downstream]) -> str:
    if not latencies:
        return "Too few requests were answered in the simulation to compare latencies."
    if not off:
        ratios = [one.ratio or 0.0 for one in latencies]
        return (
            f"A simulated server makes of both the same: all {len(latencies)} latencies of the generated one are "
            f"{_times(min(ratios))} to {_times(max(ratios))} those of the real one."
        )
    named = [
        f"{metric_name(one.metric)} at {100 * one.load:g} % load ({_times(one.ratio or 0)} the real one)"
        for one in sorted(off, key=lambda one: -abs(np.log(max(one.ratio or 0, 1e-9))))
    ]
    more = f" and {len(named) - 4} more" if len(named) > 4 else ""
    agree = len(latencies) - len(off)
    return (
        f"A simulated server tells them apart in {len(off)} of {len(latencies)} latencies: "
        f"{', '.join(named[:4])}{more}." + (f" The other {agree} agree." if agree else "")
    )


def _differing_statistics(found: Fidelity) -> list[str]:
    """The statistics that are further apart than the bands, in words."""
    off = [
        f"{key.replace('_tokens', '')} lengths (Kolmogorov-Smirnov {found.ks[key]:.3f})"
        for key in ("request_tokens", "response_tokens")
        if (found.ks[key] or 0) > KS_LENGTHS
    ]
    if abs(found.spearman_difference or 0) > SPEARMAN:
        off.append(f"their rank correlation ({found.spearman_difference:+.3f})")
    scales = [one for one in found.dispersion if one.ratio is not None and abs(one.ratio - 1) > DISPERSION]
    if scales:
        worst = max(scales, key=lambda one: abs(np.log(max(one.ratio or 0, 1e-9))))
        reach = [in_words(one.scale) for one in scales]
        at = reach[0] if len(reach) == 1 else f"{len(reach)} of {len(found.dispersion)} scales"
        off.append(
            f"burstiness at {at} (variance of counts {_times(worst.ratio or 0)} the real one's at "
            f"{in_words(worst.scale)})"
        )
    return off


def _statistics_sentences(found: Fidelity, differing: Sequence[str]) -> list[str]:
    gaps = found.ks.get("gaps")
    tail = "" if gaps is None else f" Gaps between arrivals are {gaps:.3f} apart (Kolmogorov-Smirnov, 0 to 1)."
    if not differing:
        return [f"Lengths, their correlation, and burstiness from 1 s to 10 min agree.{tail}"]
    return [f"Statistically they differ in {'; '.join(differing)}.{tail}"]


def _sureness(found: Fidelity) -> str:
    judged = [one for one in found.downstream if one.inside is not None and one.metric in BANDS]
    calibrated = (
        "" if "uncalibrated" not in (found.step_time or "") else " The simulator is not calibrated: read ratios."
    )
    if not judged:
        return f"How sure: one generated trace is one draw, so its own chance is unknown.{calibrated}"
    inside = sum(bool(one.inside) for one in judged)
    return (
        f"How sure: {len(found.seeds)} draws; the real value lies inside their range in {inside} of {len(judged)} "
        f"latencies. The real trace is one sample too, and its tail may hang on one episode.{calibrated}"
    )


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 9.95 else f"{ratio:.0f}x"


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
