"""What is in a trace: concurrency, conversations, lengths and failures, per service and model and over all."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
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
from squall.characterize.series import OverTime, series_of, write_series
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
    seed = options.get("seed", DEFAULT_SEED)
    # Sorting and fitting release the interpreter lock. The whole trace takes longest, so it begins, and the classes are
    # told apart meanwhile; of one class it says all.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pool.submit(import_module, "scipy.special")  # takes 0.2 s, in which a large file is read
        opened = open_trace(trace, **options)

        def measure(rows: pl.DataFrame) -> _Measured:
            return _Measured(
                rows,
                pool.submit(_over_time, rows, opened, width, fit, seed),
                pool.submit(_by_request, rows, opened),
            )

        columns = [name for name in _READ if opened.table[name].null_count() < len(opened)]
        whole = measure(opened.table.select(columns))
        named = opened.table.select(*columns, "service", "model")
        parts = named.partition_by("service", "model", maintain_order=True)
        parts.sort(key=len, reverse=True)
        each = [measure(part) for part in parts] if len(parts) > 1 else [whole]
        total = whole.stream(opened)
        classes = [
            structs.replace(one.stream(opened), service=part["service"][0], model=part["model"][0])
            for one, part in zip(each, parts, strict=True)
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
        names = [(None, None), *((one.service, one.model) for one in classes)]
        made = [(total, whole), *(zip(classes, each, strict=True) if len(each) > 1 else ())]
        series = (series_of(stream, one.times.result()[1]) for stream, one in made)
        write_series(Path(out), result, zip(names, series, strict=False))
    return result


_READ = ("arrival", "request_tokens", "response_tokens", "failed", "session", "elapsed", "prefix")
"""Columns that the aspects look at, where anything is known."""


@dataclass(frozen=True)
class _Measured:
    """Rows, which are the whole trace or one class of it, and what is being found out about them."""

    rows: pl.DataFrame
    times: "Future[tuple[dict[str, Any], OverTime]]"
    requests: "Future[dict[str, Any]]"

    def stream(self, trace: Trace) -> Stream:
        return Stream(
            service=None,
            model=None,
            requests=len(self.rows),
            share=len(self.rows) / len(trace),
            rate=trace.rate * len(self.rows) / len(trace) if trace.span > 0 else None,
            **self.times.result()[0],
            **self.requests.result(),
        )


def _over_time(
    rows: pl.DataFrame, trace: Trace, window: float, fit: FitMethod, seed: int
) -> tuple[dict[str, Any], OverTime]:
    """When the `rows` of `trace` arrive and fail: fields of a Stream, and what the whole series are made from."""
    meta = trace.meta
    arrivals = rows["arrival"].to_numpy()
    start, end = float(trace.table["arrival"][0]), float(trace.table["arrival"][-1])
    request, response = rows["request_tokens"].to_numpy(), rows["response_tokens"].to_numpy()
    # Compressed time has no hours of the day.
    midnight = meta.midnight if meta.speed == 1 else None
    hours = None if midnight is None else clock_hours(arrivals, request, response, start, end, midnight)
    cycle = hour_of_day(hours)
    # Spreading a single tick would invent a process out of nothing.
    spread = despread(arrivals, meta.tick, seed) if meta.tick and arrivals[-1] > arrivals[0] else None
    finest = arrivals if spread is None else spread
    fits = gamma_windows(finest, window, method=fit, phase=midnight or 0.0)
    found = {
        "length_time": length_time(arrivals, request, start, end),
        "gaps": gap_statistics(arrivals, spread),
        "gamma_windows": gamma_fits(fits, meta.tick),
        "dispersion": dispersion_curve(arrivals, start, end, spread, meta.tick),
        "hour_of_day": cycle,
        "day_of_week": day_of_week(hours, meta.weekday),
        "peak_to_trough": peak_to_trough(cycle),
        "periodicity": periodicity(finest, start, end),
        "hours": hour_boxes(hours),
        "weeks": weekly_maps(hours, midnight, meta.weekday),
        "working_day": working_day(fits, start, end, midnight, meta.weekday),
        "bursts": bursts(finest, start, end),
        "rate_series": rate_series(arrivals, start, end),
        "failures": failure_statistics(arrivals, rows["failed"].to_numpy(), request, start, end, fits),
    }
    return found, OverTime(fits, hours, finest, midnight, start, end)


def _by_request(rows: pl.DataFrame, trace: Trace) -> dict[str, Any]:
    """How long the `rows` of `trace` are, their conversations and prefixes: fields of a Stream."""
    request, response = rows["request_tokens"].to_numpy(), rows["response_tokens"].to_numpy()
    failed = rows["failed"].to_numpy()
    answered = ~failed & (request > 0)
    pairs = request[answered], response[answered]
    return {
        "failed_share": float(np.mean(failed)),
        "request_tokens": length_statistics(request, request > 0),
        "response_tokens": length_statistics(response, ~failed),
        "correlation": request_response(*pairs),
        "response_bands": response_bands(*pairs),
        "conversations": session_statistics(rows) if "session" in rows.columns else Conversations(),
        "prefixes": prefix_sharing(rows, trace.meta.block_size) if "prefix" in rows.columns else Prefixes(),
    }


callable_room(__name__)
