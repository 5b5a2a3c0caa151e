"""What a report says: tables and charts on runs and traces, with captions that say what to see and how sure it is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from squall.characterize import Characterization, Stream
from squall.report import charts
from squall.report.terminal import agreement, duration, number, percent
from squall.run import Metrics, Run
from squall.run.metrics import Failure, Quantiles, latencies, per_request
from squall.trace import Trace, TraceMeta
from squall.units import in_words

if TYPE_CHECKING:
    import altair as alt

MOST_CLASSES = len(charts.LIGHT) - 1
"""A trace is drawn as a whole and by at most this many classes, the largest."""


@dataclass(frozen=True)
class MeasuredRun:
    """A run and what the page says about it."""

    run: Run
    metrics: Metrics
    latency: dict[str, np.ndarray]

    @classmethod
    def of(cls, run: Run, metrics: Metrics) -> "MeasuredRun":
        """`run` with its latencies by request."""
        return cls(run, metrics, latencies(per_request(run.table)))


@dataclass(frozen=True)
class MeasuredTrace:
    """A trace and what is in it."""

    trace: Trace
    content: Characterization


@dataclass(frozen=True)
class Table:
    """Rows under the names of their columns, with a note below."""

    title: str
    head: Sequence[str]
    rows: Sequence["Row"]
    note: str = ""
    marked: bool = True
    """The columns are series of the charts and carry their colours."""


@dataclass(frozen=True)
class Row:
    name: str
    cells: Sequence[str]
    group: bool = False
    """The row begins a group: a line stands above it."""
    text: bool = False
    """The cells are words, which may wrap."""


@dataclass(frozen=True)
class Figure:
    """A chart with what to see in it and how sure that is."""

    id: str
    title: str
    chart: "alt.LayerChart"
    caption: str


@dataclass(frozen=True)
class Entry:
    """A line of a legend."""

    name: str
    badge: str = ""
    bad: bool = False


@dataclass(frozen=True)
class Section:
    title: str
    text: str
    findings: Sequence[str] = ()
    """Sentences that carry the numbers that they rest on."""
    legend: Sequence[Entry] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()


@dataclass(frozen=True)
class Origin:
    """Where something on the page comes from."""

    name: str
    facts: Sequence[tuple[str, str]] = field(default_factory=list)


def warnings(name: str, metrics: Metrics) -> list[str]:
    found = []
    if metrics.verdict == "CLIENT-LIMITED":
        reasons = f" ({'; '.join(metrics.verdict_reasons)})" if metrics.verdict_reasons else ""
        found.append(
            f"{name} is CLIENT-LIMITED{reasons}: the client was too slow, so its latencies must not be trusted."
        )
    if metrics.state != "complete":
        found.append(f"{name} is {metrics.state}: it holds only what happened until then.")
    return found


# --- runs ---------------------------------------------------------------------------------------------------------


def run_sections(runs: Mapping[str, MeasuredRun]) -> list[Section]:
    """Comparison, latency, and load and system over time; nothing without runs."""
    if not runs:
        return []
    legend = [_run_entry(name, measured.metrics) for name, measured in runs.items()]
    compared = "What was answered. " + _how_sure(runs)
    return [
        Section("Runs side by side" if len(runs) > 1 else "The run", compared, tables=[_comparison(runs)]),
        Section(
            "Latency",
            "From the moment at which a request was due, which is what its user feels.",
            legend=legend,
            figures=_latency_figures(runs),
        ),
        Section("Over time", "Load, and what it did to the system.", legend=legend, figures=_time_figures(runs)),
    ]


def _run_entry(name: str, metrics: Metrics) -> Entry:
    if metrics.verdict == "CLIENT-LIMITED":
        return Entry(name, metrics.verdict, bad=True)
    return Entry(name, _calibrated(metrics).strip("-"))


def _calibrated(metrics: Metrics) -> str:
    """A simulation's step time in one word; `_how_sure` has the whole of it."""
    if not metrics.step_time:
        return "-"
    return "uncalibrated" if "uncalibrated" in metrics.step_time else "calibrated"


def _how_sure(runs: Mapping[str, MeasuredRun]) -> str:
    uncalibrated = [name for name, m in runs.items() if _calibrated(m.metrics) == "uncalibrated"]
    calibrated = sorted({m.metrics.step_time or "" for m in runs.values() if _calibrated(m.metrics) == "calibrated"})
    sentences = ["Each is a single run: small differences may be chance."] if len(runs) > 1 else []
    if uncalibrated:
        whose = "The simulation is" if len(uncalibrated) == 1 else "The simulations are"
        sentences.append(f"{whose} not calibrated on a real server: read the order and the shape, not the seconds.")
    sentences += [f"The simulator's step time is {text}." for text in calibrated]
    return " ".join(sentences)


def _comparison(runs: Mapping[str, MeasuredRun]) -> Table:
    columns = [measured.metrics for measured in runs.values()]

    def cells(value: Callable[[Metrics], Any], shown: Callable[[Any], str] = str) -> list[str]:
        return [shown(value(metrics)) for metrics in columns]

    rows = [
        Row("verdict", cells(lambda m: m.verdict), text=True),
        Row("made by", cells(lambda m: m.kind), text=True),
        Row("step time", cells(_calibrated)),
        Row("requests offered", cells(lambda m: m.requests, _count), group=True),
        Row("offered rate", cells(lambda m: m.offered_rate, _per_second)),
        Row("failed", cells(lambda m: f"{m.failed:,} ({percent(m.failed / m.requests if m.requests else None)})")),
    ]
    for label, name, levels in (
        ("TTFT", "ttft", ("p50", "p90", "p99")),
        ("E2E", "e2e", ("p50", "p90", "p99")),
        ("TPOT", "tpot", ("p50", "p99")),
        ("ITL", "itl", ("p50", "p99")),
        ("jitter", "jitter", ("p50",)),
    ):
        for level in levels:
            values = cells(attrgetter(f"{name}.{level}"), duration)
            rows.append(Row(f"{label} {level.upper()}", values, group=level == levels[0]))
    if any(m.failed for m in columns):
        rows.append(Row("TTFT P99 of all offered", cells(lambda m: _of_offered(m.of_offered.ttft)), group=True))
        rows.append(Row("E2E P99 of all offered", cells(lambda m: _of_offered(m.of_offered.e2e))))
    # A modelled client is never late.
    late = cells(lambda m: None if m.kind == "simulation" else m.lateness.p99, duration)
    rows.append(Row("lateness P99", late, group=True))
    rows.append(Row("output tokens/s", cells(lambda m: m.output_token_throughput, number), group=True))
    note = (
        "Latencies are of requests that succeeded, from schedule; failures count in every share. "
        "A dash: not recorded, or too few requests for that percentile (P90 needs 10, P99 100)."
    )
    limits = next((m.slo for m in columns if m.slo), None)
    if limits:
        rows.append(Row("met the SLO", cells(lambda m: m.goodput_share, percent)))
        rows.append(Row("goodput", cells(lambda m: m.goodput, _per_second)))
        text = ", ".join(f"{name.upper()} ≤ {in_words(limit)}" for name, limit in limits.items())
        note += f" The SLO: {text}; its share is of the requests offered."
    rows.append(Row("peak KV cache use", cells(lambda m: m.kv_cache.peak, percent), group=True))
    rows.append(Row("preemptions", cells(lambda m: m.preemptions, _count)))
    return Table("Comparison of the runs", ["", *runs], _known(rows), note)


def _latency_figures(runs: Mapping[str, MeasuredRun]) -> list[Figure]:
    latency = {name: measured.latency for name, measured in runs.items()}
    offered = {name: measured.metrics.requests for name, measured in runs.items()}
    figures = []
    for which, title, what in (
        ("ttft", "Time to first token", "whose first token came within x"),
        ("e2e", "End to end", "that were answered completely within x"),
        ("tpot", "Time per output token", "whose mean gap between tokens was x or less"),
    ):
        if not any(getattr(measured.metrics, which).n for measured in runs.values()):
            continue
        caption = f"Share of the requests offered {what}; further left is faster."
        if any(measured.metrics.failed for measured in runs.values()):
            short = " or answers of one token" if which == "tpot" else ""
            caption += f" A curve that ends below 100 % has failures{short}."
        caption += f" {_spread(runs, which)} {_counts(runs, which)}"
        chart = charts.latency_cdf(latency, which, _LATENCY_AXIS[which], offered)
        figures.append(Figure(f"cdf-{which}", title, chart, caption))
    return figures


_LATENCY_AXIS = {"ttft": "TTFT", "e2e": "E2E latency", "tpot": "TPOT"}


def _spread(runs: Mapping[str, MeasuredRun], which: str) -> str:
    """The P99s of the runs, or their medians if not all have as many requests as a P99 needs."""
    level = "p99" if all(getattr(m.metrics, which).p99 is not None for m in runs.values()) else "p50"
    values = {name: getattr(getattr(m.metrics, which), level) for name, m in runs.items()}
    known = {name: value for name, value in values.items() if value is not None}
    if not known:
        return ""
    low, high = min(known, key=lambda name: known[name]), max(known, key=lambda name: known[name])
    if len(known) == 1 or known[low] == known[high]:
        return f"{level.upper()}: {duration(known[high])}."
    return f"{level.upper()}: from {duration(known[low])} ({low}) to {duration(known[high])} ({high})."


def _counts(runs: Mapping[str, MeasuredRun], which: str) -> str:
    counts = [getattr(m.metrics, which).n for m in runs.values()]
    return f"n = {min(counts):,}." if min(counts) == max(counts) else f"n = {min(counts):,} to {max(counts):,}."


def _time_figures(runs: Mapping[str, MeasuredRun]) -> list[Figure]:
    latency = {name: measured.latency for name, measured in runs.items()}
    arrivals = {
        name: np.sort(columns["scheduled"][np.isfinite(columns["scheduled"])]) for name, columns in latency.items()
    }
    if not any(times.size for times in arrivals.values()):
        return []
    figures = [Figure("run-arrivals", "Arrivals", charts.arrivals_over_time(latency), "Requests due per second.")]
    if any(times.size >= ENOUGH_FOR_DISPERSION and times[-1] > times[0] for times in arrivals.values()):
        chart = charts.dispersion_curves(arrivals)
        figures.append(Figure("run-dispersion", "Burstiness of the arrivals", chart, _DISPERSION))
    figures.append(Figure("in-flight", "In flight", charts.in_flight(latency), _IN_FLIGHT))
    if any(measured.metrics.ttft.n for measured in runs.values()):
        chart = charts.latency_over_time(latency, "ttft", "median TTFT")
        figures.append(Figure("ttft-time", "Time to first token over time", chart, _TTFT_OVER_TIME))
    figures += _system_figures(runs)
    failures = sorted({failure.status for measured in runs.values() for failure in measured.metrics.failures})
    if failures:
        text = f"Requests that failed, by the time they were due ({', '.join(failures)})."
        figures.append(Figure("failures", "Failures", charts.failures_over_time(latency), text))
    return figures


ENOUGH_FOR_DISPERSION = 50
"""Fewer arrivals say little about a variance of counts."""

_DISPERSION = (
    "Variance / mean of the number of arrivals in bins of growing length. Poisson arrivals stay at 1 on every scale; "
    "higher is burstier. A curve that keeps climbing has bursts on long scales too: the rate itself varies."
)
_IN_FLIGHT = (
    "Requests due and not yet over, wherever they wait. A curve that climbs for as long as requests arrive is a system "
    "that cannot keep up."
)


_TTFT_OVER_TIME = "Median of the requests that were due in each bin and succeeded, from schedule."


def _system_figures(runs: Mapping[str, MeasuredRun]) -> list[Figure]:
    """What the system itself recorded: queue, batch and KV cache, of the runs that have it."""
    figures = []
    tables = {name: measured.run for name, measured in runs.items()}
    for column, title, axis, text in (
        ("waiting", "Waiting", "requests waiting", "Requests in the server's queue, mean over each bin."),
        ("running", "Running", "requests running", "Requests in the batch, mean over each bin."),
        (
            "kv_used",
            "KV cache in use",
            "share of blocks",
            "Of the fullest replica, mean over each bin. Peaks: {peaks}.",
        ),
    ):
        recorded = [name for name, run in tables.items() if run.series[column].null_count() < len(run.series)]
        if not recorded:
            continue
        peaks = "; ".join(f"{percent(runs[name].metrics.kv_cache.peak)} ({name})" for name in recorded)
        caption = text.format(peaks=peaks)
        if column == "kv_used":
            caption += " Near 100 % requests wait or are preempted."
        if len(recorded) < len(runs):
            caption += f" Not recorded by {', '.join(name for name in runs if name not in recorded)}."
        chart = charts.system(tables, column, axis, share=column == "kv_used")
        figures.append(Figure(column.replace("_", "-"), title, chart, caption))
    preempted = [name for name, run in tables.items() if run.series["preemptions"].sum()]
    if preempted:
        chart = charts.system(tables, "preemptions", "preemptions/s", per_second=True)
        totals = "; ".join(f"{runs[name].metrics.preemptions:,} ({name})" for name in preempted)
        text = f"Requests that lost their place in the KV cache and computed it again, by the server's count: {totals}."
        figures.append(Figure("preemptions", "Preemptions", chart, text))
    queued = {name: (measured.latency, measured.run) for name, measured in runs.items()}
    queued = {name: pair for name, pair in queued.items() if pair[1].series["waiting"].sum()}
    if queued:
        chart = charts.latency_against(queued, "waiting", "requests waiting")
        text = "Each point is a request: how many waited in the server's queue when it was due, and its TTFT."
        figures.append(Figure("ttft-waiting", "TTFT against the queue", chart, text))
    return figures


def run_facts(measured: MeasuredRun) -> list[tuple[str, str]]:
    meta = measured.run.meta
    target = ", ".join(f"{key} {value}" for key, value in meta.target.items())
    facts = [
        ("kind", meta.kind),
        ("state", meta.state),
        ("verdict", "; ".join((meta.verdict, *meta.verdict_reasons))),
        ("target", target),
        ("step time", meta.step_time or ""),
        ("open loop", "yes" if meta.open_loop else "no: requests waited for others"),
        ("attempts", f"{len(measured.run):,}"),
        ("seed", "" if meta.seed is None else str(meta.seed)),
        ("squall", meta.version),
        ("machine", meta.machine),
        ("started", meta.started or ""),
        ("notes", " ".join(meta.notes)),
    ]
    if meta.server is not None:
        read = f"{meta.server.scrapes:,} times from {meta.server.name} at {meta.server.url}"
        facts.append(("server's own numbers", f"read {read}"))
        facts += [("server's histogram", agreement(one, meta.server.name)) for one in measured.metrics.agreement]
    trace = _meta_facts(meta.trace) if meta.trace else []
    failures = [
        (f"failed: {_kind(f)}", f"{f.requests:,} requests, as request {f.example}{_said(f)}")
        for f in measured.metrics.failures
    ]
    return [(key, value) for key, value in (*facts, *failures, *trace) if value]


def _kind(failure: Failure) -> str:
    parts = (failure.status, failure.reason, failure.http_status)
    return " ".join(str(part) for part in parts if part is not None)


def _said(failure: Failure) -> str:
    return f": {failure.message}" if failure.message else ""


# --- traces -------------------------------------------------------------------------------------------------------


def trace_sections(traces: Mapping[str, MeasuredTrace]) -> list[Section]:
    """What is in each trace: one is shown with its classes, several are laid over each other."""
    if not traces:
        return []
    if len(traces) == 1:
        name, measured = next(iter(traces.items()))
        streams, arrivals = _classes(measured)
        title, findings = f"The trace: {name}", measured.content.findings
    else:
        streams = {name: measured.content.total for name, measured in traces.items()}
        arrivals = {name: measured.trace.table["arrival"].to_numpy() for name, measured in traces.items()}
        title, findings = "The traces side by side", []
    text = "What was asked: " + "; ".join(
        f"{len(m.trace):,} requests over {in_words(m.trace.span)}{f' in {name}' if len(traces) > 1 else ''}"
        for name, m in traces.items()
    )
    legend = [Entry(name) for name in streams] if len(streams) > 1 else []
    return [Section(title, f"{text}.", findings, legend, [_content(streams)], _trace_figures(streams, arrivals))]


def _classes(measured: MeasuredTrace) -> tuple[dict[str, Stream], dict[str, np.ndarray]]:
    """The streams of a trace and their arrivals: all requests and, where there are several classes, the largest."""
    content, table = measured.content, measured.trace.table
    streams, arrivals = {"all requests": content.total}, {"all requests": table["arrival"].to_numpy()}
    for stream in content.classes[:MOST_CLASSES] if len(content.classes) > 1 else []:
        name = " ".join(part for part in (stream.model, stream.service) if part) or "unnamed"
        mine = pl.col("service").eq_missing(stream.service) & pl.col("model").eq_missing(stream.model)
        streams[name], arrivals[name] = stream, table.filter(mine)["arrival"].to_numpy()
    return streams, arrivals


def _content(streams: Mapping[str, Stream]) -> Table:
    columns = list(streams.values())

    def cells(value: Callable[[Stream], Any], shown: Callable[[Any], str] = number) -> list[str]:
        return [shown(value(stream)) for stream in columns]

    rows = [
        Row("requests", cells(lambda s: s.requests)),
        Row("mean rate", cells(lambda s: s.rate, _per_second)),
        Row("failed", cells(lambda s: s.failed_share, percent)),
    ]
    for name, title in (("request_tokens", "request tokens"), ("response_tokens", "response tokens")):
        for level in ("mean", "p50", "p99"):
            values = cells(attrgetter(f"{name}.{level}"))
            rows.append(Row(f"{title}, {level if level == 'mean' else level.upper()}", values, group=level == "mean"))
    rows += [
        Row("rank correlation of the two", cells(lambda s: s.correlation.spearman)),
        Row(
            "CV of the gaps",
            cells(lambda s: s.gaps.spread_cv if s.gaps.spread_cv is not None else s.gaps.cv),
            group=True,
        ),
        Row("median alpha of the windows", cells(lambda s: s.gamma_windows.alpha.p50)),
        Row("windows that reject Gamma", cells(lambda s: _rejected(s), lambda share: share)),
        Row("dispersion at 10 s", cells(lambda s: _dispersion_at(s, 10.0))),
        Row("dispersion at 5 min", cells(lambda s: _dispersion_at(s, 300.0))),
        Row("dispersion at 1 h", cells(lambda s: _dispersion_at(s, 3600.0))),
        Row("requests in bursts of minutes", cells(lambda s: _in_bursts(s, 60.0), percent)),
        Row("repeats daily (hourly counts)", cells(lambda s: s.periodicity.verdict, lambda word: word or "-")),
        Row("conversations", cells(lambda s: s.conversations.sessions or None), group=True),
        Row("mean turns", cells(lambda s: s.conversations.turns.mean)),
        Row("prompt blocks seen before", cells(lambda s: s.prefixes.hit_share, percent), group=True),
    ]
    note = "CV of the gaps: 1 for Poisson arrivals, more for bursty ones; alpha is below 1 where they are bursty."
    return Table("What is in the trace", ["", *streams], _known(rows), note)


def _dispersion_at(stream: Stream, scale: float) -> float | None:
    return next((one.spread_index or one.index for one in stream.dispersion if one.scale == scale), None)


def _rejected(stream: Stream) -> str:
    fits = stream.gamma_windows
    return f"{fits.rejected:,} of {fits.fitted:,}" if fits.fitted else "-"


def _in_bursts(stream: Stream, scale: float) -> float | None:
    return next((one.request_share for one in stream.bursts if one.scale == scale), None)


def _trace_figures(streams: Mapping[str, Stream], arrivals: Mapping[str, np.ndarray]) -> list[Figure]:
    first = next(iter(streams.values()))
    width = in_words(first.rate_series.width)
    figures = [
        Figure(
            "rate",
            "Arrivals over time",
            charts.rate_over_time(streams),
            "Over the course of each trace, whose spans differ: the rate over its mean."
            if charts.differ(streams)
            else f"Requests per second in bins of {width}.",
        ),
    ]
    if any(times.size >= ENOUGH_FOR_DISPERSION and times[-1] > times[0] for times in arrivals.values()):
        figures.append(Figure("dispersion", "Burstiness over scales", charts.dispersion_curves(arrivals), _DISPERSION))
    fits = first.gamma_windows
    if any(len(stream.gamma_windows.series.alpha) > 1 for stream in streams.values()):
        caption = (
            f"Shape of the Gamma distribution of the gaps in each window of {in_words(fits.window)}: 1 is Poisson, "
            f"less is bursty, more is regular. {fits.bursty:,} of {fits.fitted:,} windows are bursty "
            f"({next(iter(streams))}); in at least {fits.rejected:,} the gaps are not Gamma."
        )
        figures.append(Figure("alpha", "Burstiness over time", charts.alpha_over_time(streams), caption))
        told = ", ".join(
            f"{name} {s.gamma_windows.rejected:,} of {s.gamma_windows.fitted:,}" for name, s in streams.items()
        )
        caption = f"Are the gaps of a window Gamma? Windows beyond 1.36 are not (at least): {told}."
        figures.append(Figure("goodness", "How good the Gamma fits are", charts.goodness(streams), caption))
    for name, title in (("request_tokens", "Request length"), ("response_tokens", "Response length")):
        histograms = {key: h for key, s in streams.items() if (h := getattr(s, name).histogram) and h.edges[-1] > 1}
        if histograms:
            counts = ", ".join(f"{key} n = {getattr(streams[key], name).n:,}" for key in histograms)
            caption = f"Areas are shares of the requests: {counts}."
            chart = charts.lengths(histograms, "tokens", names=list(streams))
            figures.append(Figure(name.replace("_", "-"), title, chart, caption))
    figures += _length_figures(streams)
    figures += _conversation_figures(streams)
    figures += _cycle_figures(streams)
    figures += _burst_figures(streams)
    figures += _failure_figures(streams)
    shared = {name: stream for name, stream in streams.items() if stream.prefixes.cache}
    if shared:
        hits = ", ".join(f"{name} {percent(one.prefixes.hit_share)}" for name, one in shared.items())
        caption = f"{_CACHE} A cache that forgets nothing: {hits} of the blocks."
        figures.append(Figure("prefixes", "Shared prefixes", charts.cache_hits(streams), caption))
        runs = {name: one.prefixes.shared_octaves for name, one in shared.items()}
        caption = "Blocks at the front of each prompt that an earlier request had; none stands at ½."
        chart = charts.octaves(runs, list(streams), "shared blocks", of="requests")
        figures.append(Figure("shared", "Length of the shared prefix", chart, caption))
    return figures


def _length_figures(streams: Mapping[str, Stream]) -> list[Figure]:
    """How well families of distributions fit the lengths, and what a request says about its response."""
    figures = []
    if any(stream.request_tokens.fits or stream.response_tokens.fits for stream in streams.values()):
        caption = "Distance of each fitted family from the lengths; the tooltip has its place by BIC. Likeliest: "
        caption += "; ".join(_nearest(name, stream) for name, stream in list(streams.items())[:MOST_TOLD]) + "."
        figures.append(Figure("families", "Families of lengths", charts.families(streams), caption))
    if any(len(stream.response_bands) > 1 for stream in streams.values()):
        slopes = [f"{n} {s.correlation.slope:+.2f}" for n, s in streams.items() if s.correlation.slope is not None]
        caption = "Median response by request length (mean dashed, if there are few), with the middle 90 %."
        if slopes:
            caption += f" Response tokens per request token from 400 to 2,000: {', '.join(slopes)}."
        chart = charts.response_band(streams)
        figures.append(Figure("response-band", "Response against request", chart, caption))
    return figures


def _nearest(name: str, stream: Stream) -> str:
    """The likeliest family of each side, and the peaks of the responses."""
    sides = [("requests", stream.request_tokens.best_fit), ("responses", stream.response_tokens.best_fit)]
    told = f"{name}: {', '.join(f'{side} {fit.family} (KS {number(fit.ks)})' for side, fit in sides if fit)}"
    peaks = [f"{mode.tokens:,.0f} ({percent(mode.share)})" for mode in stream.response_tokens.modes]
    return f"{told}, response peaks at {' and '.join(peaks)} tokens" if len(peaks) > 1 else told


def _conversation_figures(streams: Mapping[str, Stream]) -> list[Figure]:
    talks = {name: stream for name, stream in streams.items() if stream.conversations.sessions}
    if not talks:
        return []
    told = ", ".join(
        f"{n} {s.conversations.sessions:,} of {number(s.conversations.turns.mean)} turns" for n, s in talks.items()
    )
    caption = f"Share of the conversations with so many turns or more: {told}. The trace's edges cut some."
    figures = [Figure("turns", "Turns of a conversation", charts.turns(streams), caption)]
    gaps = {name: found for name, s in talks.items() if (found := s.conversations.gaps_octaves).counts}
    if gaps:
        medians = ", ".join(f"{name} {duration(talks[name].conversations.gaps.p50)}" for name in gaps)
        caption = f"Time between two requests of a conversation, by factors of 2. Medians: {medians}."
        chart = charts.octaves(gaps, list(streams), "silence", of="silences", duration=True)
        figures.append(Figure("silences", "Silences in a conversation", chart, caption))
    if any(len(s.conversations.by_turn) > 1 for s in talks.values()):
        grown = [
            f"{n} {s.conversations.growth.mean:+,.0f}"
            for n, s in talks.items()
            if s.conversations.growth.mean is not None
        ]
        caption = f"Mean prompt at each turn. Mean growth from one turn to the next in tokens: {', '.join(grown)}."
        figures.append(Figure("growth", "Growth of the prompt", charts.growth(streams), caption))
    return figures


MOST_TOLD = 3
"""A caption speaks of so many series."""
_CACHE = "Share of prompt blocks that a cache of x tokens would hold, forgetting the least recently used first."
MOST_MAPS = 5
"""Weekly maps are drawn of the whole and of the largest classes, so many in all."""


def _cycle_figures(streams: Mapping[str, Stream]) -> list[Figure]:
    """What repeats by hour, weekday and slot, of the traces that are long enough and have a clock."""
    figures = []
    if any(stream.hour_of_day for stream in streams.values()):
        ratios = [f"{name} {number(s.peak_to_trough)}" for name, s in streams.items() if s.peak_to_trough]
        caption = "Mean requests in each hour of the day, in the trace's own clock."
        if ratios:
            caption += f" Peak / trough: {', '.join(ratios)}."
        verdicts = [
            f"{name} {s.periodicity.verdict} ({s.periodicity.acf_day:.2f})"
            for name, s in streams.items()
            if s.periodicity.verdict and s.periodicity.acf_day is not None
        ]
        if verdicts:
            caption += f" Autocorrelation of the hourly counts at 24 h: {', '.join(verdicts)}."
        figures.append(Figure("hours", "Hour of the day", charts.hours(streams), caption))
    if any(stream.periodicity.autocorrelation for stream in streams.values()):
        bins = {name: s.periodicity.autocorrelation_bin for name, s in streams.items() if s.periodicity.autocorrelation}
        each = ", ".join(f"{in_words(width or 0)} ({name})" for name, width in bins.items())
        width = in_words(next(iter(bins.values())) or 0) if len(set(bins.values())) == 1 else each
        caption = f"Of the counts per {width} with those of x later; peaks at 1, 2, … days are a daily rhythm."
        chart = charts.autocorrelation(streams)
        figures.append(Figure("autocorrelation", "Autocorrelation", chart, caption))
    if any(stream.periodicity.spectrum.period for stream in streams.values()):
        found = [
            f"{name} {', '.join(in_words(one.period) for one in s.periodicity.periods[:3])}"
            for name, s in streams.items()
            if s.periodicity.periods
        ]
        caption = "Power of each period over that of its neighbours; noise passes the line once in a thousand series. "
        caption += f"Periods that stand out: {'; '.join(found) or 'none'}."
        figures.append(Figure("spectrum", "Dominant periods", charts.spectrum(streams), caption))
    for what, title, axis in (
        ("requests", "Requests per hour", "requests/h"),
        ("request_tokens", "Request tokens per hour", "tokens/h"),
        ("response_tokens", "Response tokens per hour", "tokens/h"),
    ):
        counts = [boxes[0].n for s in streams.values() if (boxes := getattr(s.hours, what))]
        if counts and max(counts) > 1:
            caption = f"By hour of the day over up to {max(counts)} days: the middle half of them, and the median."
            figure_id = f"boxes-{what.replace('_', '-')}"
            figures.append(Figure(figure_id, title, charts.hour_boxes(streams, what, axis), caption))
    for k, (name, stream) in enumerate(list(streams.items())[:MOST_MAPS]):
        if stream.weeks.hours:
            caption = f"{name}: mean requests on each hour of the week."
            figures.append(Figure(f"week-hours-{k}", f"The week: {name}", charts.week_by_hour(stream), caption))
        if len(stream.weeks.days) > 1:
            caption = f"{name}: requests of each day; days that the trace does not cover are left out."
            figures.append(Figure(f"week-days-{k}", f"Day by day: {name}", charts.week_by_day(stream), caption))
    several = {n: s for n, s in streams.items() if s.working_day.days > 1 and any(s.working_day.parameters.alpha)}
    working = [stream.working_day for stream in several.values()]
    if working:
        caption = (
            f"Mean alpha of the Gamma fits of each {in_words(working[0].slot or 0)} slot over "
            f"{max(day.days for day in working)} working days (Monday to Friday)."
        )
        chart = charts.working_day_alpha(several, list(streams))
        figures.append(Figure("working-day", "Burstiness over the working day", chart, caption))
    return figures


def _burst_figures(streams: Mapping[str, Stream]) -> list[Figure]:
    found = [(one.scale, name, one) for name, s in streams.items() for one in s.bursts if one.bursts]
    if not found:
        return []
    scale = max((scale for scale, _, _ in found if scale <= 600), default=min(scale for scale, _, _ in found))
    told = "; ".join(
        f"{name}: {one.bursts:,} bursts hold {percent(one.request_share)} of the requests in "
        f"{percent(one.time_share)} of the time"
        for at, name, one in found
        if at == scale
    )
    caption = (
        f"Runs of {in_words(scale)} bins with more than twice the mean count (and more than Poisson arrivals have in "
        f"one of a thousand). {told}."
    )
    figures = [Figure("bursts", "Bursts", charts.burst_sizes(streams, scale), caption)]
    if any(one.off_runs.counts for at, _, one in found if at == scale):
        caption = (
            f"Lengths of the bursts in bins of {in_words(scale)}, and of the pauses between them, by factors of 2."
        )
        chart = charts.burst_runs(streams, scale)
        figures.append(Figure("burst-runs", "How long bursts and pauses last", chart, caption))
    return figures


def _failure_figures(streams: Mapping[str, Stream]) -> list[Figure]:
    if not any(stream.failures.failed for stream in streams.values()):
        return []
    clustered = [f"{n} {number(s.failures.dispersion)}" for n, s in streams.items() if s.failures.dispersion]
    caption = "Share of the requests that failed."
    if clustered:
        caption += f" Variance over that of independent failures: {', '.join(clustered)}."
    figures = [Figure("failed-share", "Failures over time", charts.failed_share_over_time(streams), caption)]
    if any(len(stream.failures.by_alpha) > 1 for stream in streams.values()):
        ranks = [f"{n} {s.failures.alpha_correlation:+.2f}" for n, s in streams.items() if s.failures.alpha_correlation]
        caption = f"By the burstiness of the window. Rank correlation with alpha: {', '.join(ranks) or 'none'}."
        chart = charts.failed_share_by_alpha(streams)
        figures.append(Figure("failed-alpha", "Failures against burstiness", chart, caption))
    if any(len(stream.failures.by_request_length) > 1 for stream in streams.values()):
        caption = "By request length, where failed requests have one recorded."
        chart = charts.failed_share_by_length(streams)
        figures.append(Figure("failed-length", "Failures against length", chart, caption))
    runs = {name: s.failures.runs_octaves for name, s in streams.items() if len(s.failures.runs_octaves.counts) > 1}
    if runs:
        expected = ", ".join(
            f"{name} {number(streams[name].failures.runs.mean)} "
            f"({number(1 / (1 - streams[name].failures.share))} if independent)"
            for name in runs
        )
        caption = f"Requests that failed one after the other. Mean length of a run: {expected}."
        chart = charts.octaves(runs, list(streams), "failures in a row", of="runs")
        figures.append(Figure("failed-runs", "Runs of failures", chart, caption))
    return figures


def trace_facts(measured: MeasuredTrace) -> list[tuple[str, str]]:
    facts = [("requests", f"{len(measured.trace):,}"), ("span", in_words(measured.trace.span))]
    return [*facts, *_meta_facts(measured.trace.meta)]


def _meta_facts(meta: TraceMeta) -> list[tuple[str, str]]:
    facts = [
        ("trace", meta.source),
        ("format", meta.format),
        ("sha256", meta.sha256 or ""),
        ("rows read", f"{meta.rows:,}" if meta.rows else ""),
        ("then", ", ".join(meta.steps)),
        ("licence", meta.licence or ""),
        ("attribution", meta.attribution or ""),
        ("seed", "" if meta.seed is None else str(meta.seed)),
        ("notes", " ".join(meta.notes)),
    ]
    return [(key, value) for key, value in facts if value]


# --- cells --------------------------------------------------------------------------------------------------------


def _known(rows: Sequence[Row]) -> list[Row]:
    """The rows in which something is known, with a proper dash for what is not."""
    known = [row for row in rows if any(cell != "-" for cell in row.cells)]
    return [replace(row, cells=["–" if cell == "-" else cell for cell in row.cells]) for row in known]


def _of_offered(quantiles: Quantiles) -> str:
    """The P99 in which a failed request counts as never answered."""
    if quantiles.p99 is None and quantiles.n >= 100:
        least = quantiles.at_least.get("p99")
        return "not answered" if least is None else f"≥ {duration(least)}"
    return duration(quantiles.p99)


def _per_second(rate: float | None) -> str:
    return "-" if rate is None else f"{number(rate)}/s"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
