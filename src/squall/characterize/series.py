"""The whole series behind a characterisation, as Parquet: what the JSON holds in few numbers or thinned for a chart.

windows.parquet      the Gamma fit of every window: start, requests, gaps, rate, alpha, beta, cv, ks
hours.parquet        every hour of the clock: start, requests, request_tokens, response_tokens, covered
bursts.parquet       every burst at every scale: scale, start, length, requests, peak
dispersion.parquet   the index of dispersion of the counts: scale, index, spread_index
autocorrelation.parquet, spectrum.parquet   of the counts: lag (s), correlation; period (s), strength
fits.parquet         the families fitted to the lengths, the likeliest first: side, rank, family, ks, aic, bic
bands.parquet        responses by request length: low, high, n, mean, p5, p50, p95
turns.parquet        lengths by turn of the conversation: turn, requests, request_mean, request_p50, response_mean
working_day.parquet  the average working day: start, windows, rate, alpha, beta, pooled_alpha, pooled_beta

Each has the columns service and model, both null for all requests together. Times are seconds on the trace's clock.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import polars as pl

from squall.characterize.bursts import burst_table
from squall.characterize.concurrency import GammaWindows
from squall.characterize.cycles import HOUR, Hours
from squall.errors import InputError

if TYPE_CHECKING:
    from squall.characterize import Characterization, Stream

Series = dict[str, pl.DataFrame]
"""File name without suffix -> table."""


@dataclass(frozen=True)
class OverTime:
    """What the series of one class are made from."""

    windows: GammaWindows
    hours: Hours | None
    arrivals: np.ndarray
    """Sorted seconds, spread inside the clock's ticks, where it has any."""
    midnight: float | None
    start: float
    end: float


def series_of(stream: "Stream", over_time: OverTime) -> Series:
    """The series of one class; those that its trace cannot have are left out."""
    windows, hours, midnight = over_time.windows, over_time.hours, over_time.midnight
    found = {
        "windows": pl.DataFrame(
            {"start": windows.start, "requests": windows.count, "gaps": windows.gaps, "rate": windows.rate}
            | {"alpha": windows.alpha, "beta": windows.beta, "cv": windows.cv, "ks": windows.ks},
        ).fill_nan(None)
    }
    if hours is not None and midnight is not None:
        begin = (hours.first + np.arange(hours.requests.size)) * HOUR - midnight
        tokens = {"request_tokens": hours.request_tokens, "response_tokens": hours.response_tokens}
        found["hours"] = pl.DataFrame(
            {"start": begin, "requests": hours.requests} | tokens | {"covered": hours.covered}
        ).with_columns(pl.col(*tokens).cast(pl.Int64))
    start, end = over_time.start, over_time.end
    runs = [
        burst_table(over_time.arrivals, one.scale, start, end)[0].select(pl.lit(one.scale).alias("scale"), pl.all())
        for one in stream.bursts
    ]
    if runs:
        found["bursts"] = pl.concat(runs)
    found |= {name: pl.DataFrame(rows) for name, rows in _rows(stream).items() if rows}
    day = stream.working_day
    if day.start:
        columns = {"start": day.start, "windows": day.windows, "rate": day.rate}
        columns |= {"alpha": day.parameters.alpha, "beta": day.parameters.beta}
        columns |= {"pooled_alpha": day.pooled.alpha, "pooled_beta": day.pooled.beta}
        found["working_day"] = pl.DataFrame(
            columns, schema_overrides={name: pl.Float64 for name in columns if name != "windows"}
        )
    return found


def _rows(stream: "Stream") -> dict[str, list[dict[str, Any]]]:
    """The tables that are in the JSON already."""
    cycle, lengths = stream.periodicity, {"request": stream.request_tokens, "response": stream.response_tokens}
    step = cycle.autocorrelation_bin or 0.0
    return {
        "dispersion": [
            {"scale": one.scale, "index": float(one.index), "spread_index": one.spread_index or float("nan")}
            for one in stream.dispersion
        ],
        "autocorrelation": [{"lag": k * step, "correlation": one} for k, one in enumerate(cycle.autocorrelation)],
        "spectrum": [
            {"period": period, "strength": strength}
            for period, strength in zip(cycle.spectrum.period, cycle.spectrum.strength, strict=True)
        ],
        "fits": [
            {"side": side, "rank": k, "family": fit.family, "ks": fit.ks, "aic": fit.aic, "bic": fit.bic}
            for side, one in lengths.items()
            for k, fit in enumerate(one.fits, start=1)
        ],
        "bands": [msgspec.to_builtins(band) for band in stream.response_bands],
        "turns": [msgspec.to_builtins(turn) for turn in stream.conversations.by_turn],
    }


def write_series(
    folder: Path, result: "Characterization", series: Iterable[tuple[tuple[str | None, str | None], Series]]
) -> None:
    """Write characterization.json and one Parquet file per series into `folder`, which is made if need be."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: it is a file; name a directory for the series.")
    folder.mkdir(parents=True, exist_ok=True)
    tables: dict[str, list[pl.DataFrame]] = {}
    for (service, model), found in series:
        for name, table in found.items():
            named = table.select(
                pl.lit(service, pl.String).alias("service"), pl.lit(model, pl.String).alias("model"), pl.all()
            )
            tables.setdefault(name, []).append(named)
    for name, parts in tables.items():
        pl.concat(parts).fill_nan(None).write_parquet(folder / f"{name}.parquet")
    (folder / "characterization.json").write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))
