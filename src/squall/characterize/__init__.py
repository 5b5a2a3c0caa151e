"""What is in a trace: concurrency, conversations, lengths and failures, per service and model and over all."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from msgspec import Struct, structs

from squall.characterize.bursts import Bursts, bursts
from squall.characterize.concurrency import (
    Dispersion,
    FitMethod,
    GammaFits,
    Gaps,
    RateSeries,
    despread,
    dispersion_curve,
    gamma_fits,
    gamma_windows,
    gap_statistics,
    rate_series,
)
from squall.characterize.conversations import Conversations, session_statistics
from squall.characterize.cycles import (
    HourBoxes,
    Periodicity,
    Weeks,
    WorkingDay,
    clock_hours,
    day_of_week,
    hour_boxes,
    hour_of_day,
    peak_to_trough,
    periodicity,
    weekly_maps,
    working_day,
)
from squall.characterize.failures import Failures, failure_statistics
from squall.characterize.findings import sentences
from squall.characterize.lengths import (
    Band,
    Correlation,
    Lengths,
    LengthTime,
    length_statistics,
    length_time,
    request_response,
    response_bands,
)
from squall.characterize.prefixes import Prefixes, prefix_sharing
from squall.characterize.series import Series, series_of, write_series
from squall.errors import InputError
from squall.seeds import DEFAULT_SEED
from squall.trace import Trace, TraceMeta, TraceSource, open_trace
from squall.units import Duration, seconds
from squall.verb import callable_room

__all__ = ["Characterization", "Stream", "characterize"]


class Stream(Struct, frozen=True, kw_only=True):
    """The requests of one service and model, or of the whole trace. All times are over the span of the whole trace."""

    service: str | None
    model: str | None
    requests: int
    share: float
    """Of the trace's requests."""
    rate: float | None
    """Mean requests/s over the trace's span."""
    failed_share: float
    request_tokens: Lengths
    """Over all requests of known length (> 0), failed ones included."""
    response_tokens: Lengths
    """Over successful requests."""
    correlation: Correlation
    response_bands: list[Band]
    """Response length by request length."""
    length_time: list[LengthTime]
    """Dependence of request lengths on time, at several scales."""
    gaps: Gaps
    gamma_windows: GammaFits
    dispersion: list[Dispersion]
    """Index of dispersion of counts by scale."""
    hour_of_day: list[float]
    """Mean requests per hour of the day; empty if the clock is unknown or the trace shorter than a day."""
    day_of_week: list[float]
    """Mean requests per day, Monday first; empty as above, or if the trace is shorter than a week."""
    peak_to_trough: float | None
    """Of `hour_of_day`."""
    periodicity: Periodicity
    hours: HourBoxes
    """Requests and tokens per hour, by hour of the day: five numbers each."""
    weeks: Weeks
    """Requests by week and day, and by weekday and hour."""
    working_day: WorkingDay
    """The average working day's Gamma parameters by slot of one window."""
    bursts: list[Bursts]
    """At several scales."""
    rate_series: RateSeries
    conversations: Conversations
    failures: Failures
    prefixes: Prefixes

    @property
    def name(self) -> str:
        """Model and service as far as they are recorded, such as `ChatGPT conversation`; `unnamed` if neither is."""
        return " ".join(part for part in (self.model, self.service) if part) or "unnamed"


class Characterization(Struct, frozen=True, kw_only=True):
    """What is in a trace. What is not known or not defined is null (or an empty list), never an invented number."""

    meta: TraceMeta
    """Which rows of which input this is about: source, sha256, steps, …"""
    requests: int
    span: float
    """Seconds from the first to the last arrival."""
    rate: float | None
    """Requests/s; null if all arrive at once."""
    failed_share: float
    total: Stream
    """All classes together."""
    classes: list[Stream]
    """One per service and model, the largest first; names that the trace does not record are null."""
    findings: list[str]
    """What the numbers say, in plain sentences."""


def characterize(
    trace: TraceSource,
    *,
    window: Duration = "20m",
    fit: FitMethod = "moments",
    out: str | Path | None = None,
    **options: Any,
) -> Characterization:
    """Concurrency, conversations, lengths and failures of a trace, per service and model.

    `window` is the time over which gaps are fitted by a Gamma distribution, by `fit` "moments" or "mle"; `out` is a
    directory for characterization.json and the whole series as Parquet; `options` are the trace options (see
    TraceOptions). Raises InputError for a trace or an option that cannot be used.
    """
    width = seconds(window, "--window")
    if width == 0:
        raise InputError("--window 0: a window is longer than 0 s; take 20m, for instance.")
    opened = open_trace(trace, **options)
    seed = options.get("seed", DEFAULT_SEED)
    hashed = opened.table["prefix"].null_count() < len(opened)
    table = opened.table if hashed else opened.table.drop("prefix")
    parts = table.partition_by("service", "model", maintain_order=True)
    parts.sort(key=len, reverse=True)
    # Sorting and fitting release the interpreter lock; of one class the whole trace says it all.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tables = [table, *(parts if len(parts) > 1 else [])]
        measured = pool.map(lambda rows: _stream(rows, opened, width, fit, seed, keep=out is not None), tables)
        (total, whole), *rest = measured
    streams = [stream for stream, _ in rest] or [total]
    classes = [
        structs.replace(stream, service=part["service"][0], model=part["model"][0])
        for stream, part in zip(streams, parts, strict=True)
    ]
    result = Characterization(
        meta=opened.meta,
        requests=len(opened),
        span=opened.span,
        rate=total.rate,
        failed_share=total.failed_share,
        total=total,
        classes=classes,
        findings=sentences(total, classes),
    )
    if out is not None:
        series = [whole, *(one for _, one in rest)]
        names = [(None, None), *((one.service, one.model) for one in classes)]
        write_series(Path(out), result, zip(names, series, strict=False))
    return result


def _stream(
    rows: pl.DataFrame, trace: Trace, window: float, fit: FitMethod, seed: int, keep: bool
) -> tuple[Stream, Series]:
    """The aspects of `rows`, which are all of `trace` or one class of it, and if `keep` their whole series."""
    meta = trace.meta
    arrivals = rows["arrival"].to_numpy()
    start, end = float(trace.table["arrival"][0]), float(trace.table["arrival"][-1])
    request, response = rows["request_tokens"].to_numpy(), rows["response_tokens"].to_numpy()
    failed = rows["failed"].to_numpy()
    answered = ~failed & (request > 0)
    # Compressed time has no hours of the day.
    midnight = meta.midnight if meta.speed == 1 else None
    hours = None if midnight is None else clock_hours(arrivals, request, response, start, end, midnight)
    cycle = hour_of_day(hours)
    # Spreading a single tick would invent a process out of nothing.
    spread = despread(arrivals, meta.tick, seed) if meta.tick and arrivals[-1] > arrivals[0] else None
    finest = arrivals if spread is None else spread
    fits = gamma_windows(finest, window, method=fit, phase=midnight or 0.0)
    stream = Stream(
        service=None,
        model=None,
        requests=len(rows),
        share=len(rows) / len(trace),
        rate=trace.rate * len(rows) / len(trace) if trace.span > 0 else None,
        failed_share=float(np.mean(failed)),
        request_tokens=length_statistics(request[request > 0]),
        response_tokens=length_statistics(response[~failed]),
        correlation=request_response(request[answered], response[answered]),
        response_bands=response_bands(request[answered], response[answered]),
        length_time=length_time(arrivals[request > 0], request[request > 0], start, end),
        gaps=gap_statistics(arrivals, spread),
        gamma_windows=gamma_fits(fits, meta.tick),
        dispersion=dispersion_curve(arrivals, start, end, spread, meta.tick),
        hour_of_day=cycle,
        day_of_week=day_of_week(hours, meta.weekday),
        peak_to_trough=peak_to_trough(cycle),
        periodicity=periodicity(finest, start, end),
        hours=hour_boxes(hours),
        weeks=weekly_maps(hours, midnight, meta.weekday),
        working_day=working_day(fits, start, end, midnight, meta.weekday),
        bursts=bursts(finest, start, end),
        rate_series=rate_series(arrivals, start, end),
        conversations=session_statistics(rows),
        failures=failure_statistics(arrivals, failed, request, start, end, fits),
        prefixes=prefix_sharing(rows, meta.block_size) if "prefix" in rows.columns else Prefixes(),
    )
    return stream, series_of(stream, fits, hours, finest, midnight, start, end) if keep else {}


callable_room(__name__)
