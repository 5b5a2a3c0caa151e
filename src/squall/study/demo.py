"""The main job end to end: a trace, what is in it, a model of it, a real server under it, and what smooth load hides.

The finding is a comparison at equal mean rate and with the same requests in the same order: only the arrivals differ.
Any difference in the simulated P99 TTFT, KV use, preemptions or timeouts is therefore what the shape of arrivals does.
"""

import os
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl

from squall.characterize import Characterization, characterize
from squall.characterize.concurrency import despread
from squall.errors import InputError, SquallError
from squall.local import available, serving
from squall.progress import note, progress
from squall.replay import replay
from squall.report import report
from squall.report.terminal import number, percent
from squall.run import Metrics, Run, metrics, write_run
from squall.seeds import DEFAULT_SEED
from squall.simulate import saturation_rate, simulate
from squall.trace import Trace, TraceSource, open_trace, write_trace
from squall.units import in_words
from squall.workload import Workload, fit, generate, smooth

DEFAULT_TRACE = "burstgpt://all?start=14h&duration=4h"
LOCAL_SECONDS = 45.0
LOCAL_LOAD = 0.85
"""Share of the local server's measured capacity that the slice asks of it: bursts queue, and drain again."""
LOCAL_PROMPT, LOCAL_RESPONSE = 96, 32
"""Longer requests of the slice are clipped: a laptop's CPU computes some 200 prompt tokens a second."""
SIMULATED_LOAD = 0.6
"""Share of the modelled server's saturation rate that every simulated arm asks of it."""
SIMULATED_REQUESTS = 50_000
TIMEOUT = 120.0
"""Clients of the simulated server give up after this many seconds."""
SLO = "ttft=2s,tpot=100ms"
SEEDS = 5
LOCAL_SLOTS = 4
FEWEST = 20
OWN, MODELLED = "the trace's own", "drawn from the fitted model"
TITLES = {
    OWN: "the trace's own arrivals",
    "Poisson": "Poisson arrivals",
    "uniform": "uniform arrivals",
    MODELLED: "drawn from the fitted model",
}
FILES = {OWN: "own", "Poisson": "poisson", "uniform": "uniform", MODELLED: "model"}
SMALL_KV_TOKENS = 2587 * 16
TARGETS: dict[str, dict[str, Any]] = {
    "small": {"calibration": "rtx4090-llama-3.1-8b-vllm-0.19"},
    "large": {"gpu": "h100", "model": "llama-3.1-8b", "engine": "vllm-0.24"},
}


class Arm(msgspec.Struct, frozen=True, kw_only=True):
    """One simulated run of the comparison; the ranges are the lowest and highest over its seeds."""

    arrivals: str
    runs: int
    ttft_tail: float
    """The demo's `percentile` of TTFT, of all requests offered, from schedule."""
    ttft_tail_range: tuple[float, float]
    ttft_tail_at_least: bool
    """Whether these are lower bounds, by what those who gave up had waited: so many did that the percentile has no
    answer."""
    e2e_tail: float | None
    """The same percentile of E2E, of the requests that succeeded."""
    peak_kv: float | None
    preemptions: int
    failed: int
    goodput_share: float | None


class Demo(msgspec.Struct, frozen=True, kw_only=True):
    """What the demo did and found, and where the page is."""

    trace: str
    requests: int
    report: str
    findings: list[str]
    local: Metrics | None
    """Of the replay against the real server; null if it was skipped."""
    target: dict[str, Any]
    """The modelled server, everything resolved."""
    percentile: str
    """`p99`, or `p90` where the trace has fewer than 100 requests."""
    arms: list[Arm]
    took: float


def demo(
    trace: TraceSource | None = None, *, out: str | Path = "squall-demo", local: bool = True, **options: Any
) -> Demo:
    """Run the main job and write `out`/report.html beside the trace, the model and the runs that it is made from.

    `trace` defaults to a day drawn from the built-in BurstGPT profile; trace `options` as everywhere. With `local` a
    slice is replayed for 45 s against a real llama.cpp server on this machine, if squall[local] is installed.
    """
    begin = time.monotonic()
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {out}: it is a file; name a directory to write to.")
    folder.mkdir(parents=True, exist_ok=True)
    findings: list[str] = []

    note("1/5  reading and characterising the trace")
    asked = open_trace(DEFAULT_TRACE if trace is None else trace, **options)
    write_trace(asked, folder / "trace.parquet")
    findings.append(_about_trace(asked, characterize(asked)))

    note("2/5  fitting a workload model")
    seed = int(options.get("seed", DEFAULT_SEED))
    served = _served(asked, seed)
    model = fit(served, out=folder / "model.json", seed=seed)

    note(f"3/5  replaying a slice against a real llama.cpp server for {LOCAL_SECONDS:g} s")
    missing = available() if local else "--no-local was given"
    measured = None
    if missing:
        findings.append(f"No real server was loaded: {missing}.")
        note(f"     skipped: {missing}")
    else:
        run, sentence = _replay_slice(served, seed)
        write_run(run, folder / "local.parquet")
        measured = metrics(run)
        findings.append(sentence + _about_local(measured))

    note("4/5  simulating the same requests under their own and under smooth arrivals")
    target = _target(served)
    own, arms, sentences = _compare(served, model, target, seed, folder)
    findings += sentences

    note("5/5  writing the report")
    runs = ([run] if measured else []) + own
    page = report(
        asked, *runs, out=folder / "report.html", title=f"squall demo: {_name(asked)}", slo=SLO, lead=findings
    )
    return Demo(
        trace=asked.meta.source,
        requests=len(asked),
        report=str(page),
        findings=findings,
        local=measured,
        target=own[0].meta.target,
        percentile=_percentile(served),
        arms=arms,
        took=time.monotonic() - begin,
    )


def _served(trace: Trace, seed: int) -> Trace:
    """The requests that a server can be asked for: with lengths, at times spread inside the recording's clock ticks."""
    served = trace.replace(
        trace.table.filter((pl.col("request_tokens") > 0) & (pl.col("response_tokens") > 0)).head(SIMULATED_REQUESTS)
    )
    if len(served) < FEWEST:
        raise InputError(
            f"{trace.meta.source}: {len(served)} of {len(trace)} requests have both lengths; the demo needs {FEWEST}."
        )
    if trace.meta.tick:
        arrival = despread(served.table["arrival"].to_numpy(), trace.meta.tick, seed)
        served = served.replace(served.table.with_columns(arrival=pl.Series(arrival)), tick=None)
    return served.replace(served.table.with_columns(pl.col("arrival") - pl.col("arrival").min()))


def _about_trace(trace: Trace, found: Characterization) -> str:
    gaps, dispersion = found.total.gaps, found.total.dispersion
    text = f"{_name(trace)}: {len(trace):,} requests in {in_words(trace.span)}, {trace.rate:.3g}/s on average"
    if gaps.cv is not None:
        text += f"; the gaps' CV is {gaps.cv:.3g} (Poisson: 1)"
    if dispersion:
        widest = dispersion[-1]
        text += f", and counts per {in_words(widest.scale)} vary {number(widest.index)} times as much as Poisson's"
    return text + "."


# -------------------------------------------------------------------------------------------------------- a real server


def _replay_slice(served: Trace, seed: int) -> tuple[Run, str]:
    """A slice from the middle of the trace against llama.cpp, its time stretched to the load that it can just bear."""
    clipped = [pl.col("request_tokens").clip(upper_bound=LOCAL_PROMPT)]
    clipped += [pl.col("response_tokens").clip(upper_bound=LOCAL_RESPONSE)]
    small = served.replace(served.table.with_columns(clipped), f"clipped to {LOCAL_PROMPT} / {LOCAL_RESPONSE} tokens")
    threads = max(1, (os.cpu_count() or 1) - 1)  # the rest is for the client: it must not be what is measured
    with serving(slots=LOCAL_SLOTS, threads=threads) as server:
        probe = small.replace(small.table.head(2 * LOCAL_SLOTS).with_columns(arrival=pl.lit(0.0)))
        first = replay(probe, url=server.url, model=server.model, api="completions", seed=seed)
        took = float(first.table["ended"].max() or 0)  # type: ignore[arg-type]
        if took <= 0 or not (first.table["status"] == "ok").any():
            raise SquallError("the local server answered no request of the probe; run `squall local` to see why")
        rate = LOCAL_LOAD * len(probe) / took
        count = min(len(small), max(FEWEST, round(rate * LOCAL_SECONDS)))
        start = (len(small) - count) // 2
        part = open_trace(small.replace(small.table.slice(start, count)))
        part = open_trace(part, speed=part.span / LOCAL_SECONDS) if part.span > 0 else part
        run = replay(part, url=server.url, model=server.model, api="completions", seed=seed + 1)
    meta = msgspec.structs.replace(run.meta, title="llama.cpp on this machine")
    sentence = (
        f"A real llama.cpp server on this machine got {count} requests from the middle of the trace in "
        f"{LOCAL_SECONDS:g} s (clipped to {LOCAL_PROMPT} prompt and {LOCAL_RESPONSE} response tokens): "
    )
    return Run(run.table, meta, run.series), sentence


def _about_local(measured: Metrics) -> str:
    answered = f"{measured.succeeded} of {measured.requests} answered"
    why = f" ({'; '.join(measured.verdict_reasons)})" if measured.verdict_reasons else ""
    if measured.ttft.p50 is None or measured.ttft.p90 is None:
        return f"{answered}; the client's verdict is {measured.verdict}{why}."
    return (
        f"{answered}, TTFT P50 {in_words(measured.ttft.p50)} and P90 {in_words(measured.ttft.p90)} from schedule; "
        f"the client's lateness is {in_words(measured.lateness.p90 or 0)} at P90, its verdict {measured.verdict}{why}."
    )


# --------------------------------------------------------------------------------------------------- a modelled cluster


def _target(served: Trace) -> dict[str, Any]:
    """A modelled server whose KV cache holds the longest request of the trace twice over."""
    longest = int((served.table["request_tokens"] + served.table["response_tokens"]).max())  # type: ignore[arg-type]
    return TARGETS["small" if longest * 2 <= SMALL_KV_TOKENS else "large"]


def _compare(
    served: Trace, model: Workload, target: dict[str, Any], seed: int, folder: Path
) -> tuple[list[Run], list[Arm], list[str]]:
    """The trace's own arrivals beside smooth ones at the same mean rate, with the same requests in the same order."""
    rate = SIMULATED_LOAD * saturation_rate(served, **target)
    own = open_trace(served, rate=rate)
    seeds = range(seed, seed + SEEDS)
    arms: dict[str, list[Trace]] = {
        OWN: [own],
        "Poisson": [smooth(own, "poisson", seed=number) for number in seeds],
        "uniform": [smooth(own, "uniform", seed=seed)],
        MODELLED: [open_trace(generate(model, seed=number), rate=rate) for number in seeds],
    }
    shown, results, done = [], [], 0
    with progress("Simulating", total=sum(map(len, arms.values()))) as advance:
        for name, traces in arms.items():
            measured = []
            for number, trace in enumerate(traces):
                run = simulate(trace, timeout=TIMEOUT, title=f"{TITLES[name]}, simulated", **target)
                measured.append(metrics(run, slo=SLO))
                done += 1
                advance(done)
                if number == 0:
                    shown.append(run)
                    write_run(run, folder / f"simulated-{FILES[name]}.parquet")
            results.append(_arm(name, measured, _percentile(served)))
    return shown, results, _about_arms(own, results, shown[0], rate)


def _percentile(served: Trace) -> str:
    """The highest percentile of the comparison that the number of requests supports."""
    return "p99" if len(served) >= 100 else "p90"


def _arm(name: str, measured: list[Metrics], percentile: str) -> Arm:
    def middle(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.median(known)) if known else None

    tails = [getattr(m.of_offered.ttft, percentile) for m in measured]
    bounds = [m.of_offered.ttft.at_least.get(percentile) or TIMEOUT for m in measured]
    ttft = [bound if tail is None else tail for tail, bound in zip(tails, bounds, strict=True)]
    return Arm(
        arrivals=name,
        runs=len(measured),
        ttft_tail=float(np.median(ttft)),
        ttft_tail_range=(min(ttft), max(ttft)),
        ttft_tail_at_least=None in tails,
        e2e_tail=middle([getattr(m.e2e, percentile) for m in measured]),
        peak_kv=middle([m.kv_cache.peak for m in measured]),
        preemptions=int(np.median([m.preemptions or 0 for m in measured])),
        failed=int(np.median([m.failed for m in measured])),
        goodput_share=middle([m.goodput_share for m in measured]),
    )


def _about_arms(own: Trace, arms: list[Arm], run: Run, rate: float) -> list[str]:
    real, poisson = arms[0], arms[1]
    target = run.meta.target
    lines = [
        f"Simulated on {target.get('replicas', 1)} x {target['gpu']} with {target['model']} ({run.meta.step_time}): "
        f"{rate:.3g} requests/s, {SIMULATED_LOAD:.0%} of what it can sustain, which is "
        f"{number(own.meta.speed)} times the trace's own pace."
    ]
    low, high = poisson.ttft_tail_range
    ratio = real.ttft_tail / poisson.ttft_tail
    compared = "about the same as" if 0.9 < ratio < 1.1 else f"{number(ratio, 2)} times"
    if real.ttft_tail_at_least and not poisson.ttft_tail_at_least:
        compared = f"at least {number(ratio, 2)} times"
    lines.append(
        f"{_percentile(own).upper()} TTFT under the trace's own arrivals is {first_token(real, real.ttft_tail)}, "
        f"{compared} the "
        f"{first_token(poisson, poisson.ttft_tail)} ({first_token(poisson, low)} to {first_token(poisson, high)} over "
        f"{poisson.runs} seeds) of "
        "Poisson arrivals at the same mean rate."
    )
    lines.append(
        f"Peak KV use is {percent(real.peak_kv)} against {percent(poisson.peak_kv)}, preemptions {real.preemptions:,} "
        f"against {poisson.preemptions:,}, requests that gave up after {TIMEOUT:g} s {real.failed:,} against "
        f"{poisson.failed:,}."
    )
    return lines


def first_token(arm: Arm, seconds: float) -> str:
    """A tail TTFT of an arm in words, as the page has it."""
    return f"≥ {in_words(seconds)}" if arm.ttft_tail_at_least else in_words(seconds)


def _name(trace: Trace) -> str:
    source = trace.meta.source
    return source if "://" in source else Path(source).name
