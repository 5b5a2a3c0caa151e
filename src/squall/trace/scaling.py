"""Scaling a trace to another mean rate, by named methods, and what each does to the trace beside changing its rate."""

import importlib
import math
from typing import Literal

import msgspec
import numpy as np
import polars as pl

from squall.errors import InputError
from squall.seeds import stream
from squall.trace.table import Scaling, Shape, Trace

ScaleMethod = Literal["compress", "thin", "superpose", "model"]
_SCALES = (1.0, 10.0, 60.0, 300.0)
_FEWEST_BINS = 5


def scale(trace: Trace, rate: float, method: ScaleMethod, seed: int) -> Trace:
    """`trace` at the mean `rate` (requests/s) by `method`; what it distorts is kept in the metadata."""
    positive("--rate", rate)
    if not trace.rate > 0 or len(trace) < 2:
        raise InputError(
            f"--rate {rate:g}: {trace.meta.source} has no span to rescale ({len(trace)} requests at one time)."
        )
    scaled = _scaled(trace, rate, method, seed)
    return scaled.replace(scaled.table, scaling=Scaling(method=method, before=shape_of(trace), after=shape_of(scaled)))


def _scaled(trace: Trace, rate: float, method: ScaleMethod, seed: int) -> Trace:
    factor = rate / trace.rate
    step = f"--rate {rate:g} --scale-method {method}"
    if method == "compress":
        return compress(trace, factor, step)
    if method == "thin":
        if factor > 1:
            raise InputError(
                f"{step}: thinning only lowers a rate, and the trace has {trace.rate:.4g}/s; use compress."
            )
        kept = trace.table.filter(pl.Series(stream(seed, "thin").random(len(trace)) < factor))
        if kept.is_empty():
            raise InputError(f"{step}: no request of {trace.meta.source} is left ({len(trace):,} before this step).")
        return trace.replace(kept, f"{step} --seed {seed} ({len(kept)} of {len(trace)} rows)")
    if method == "superpose":
        return _superpose(trace, factor, seed, f"{step} --seed {seed}")
    # The model lies in a room above this one, so it is named by text.
    rescaled: Trace = importlib.import_module("squall.workload").rescale(trace, rate, seed)
    return rescaled.replace(rescaled.table, f"{step} --seed {seed}")


def positive(flag: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"{flag} {value}: a number above 0 is needed.")


def compress(trace: Trace, factor: float, step: str) -> Trace:
    """Divide all gaps by `factor`: order, lengths and the CV of the gaps stay; every time scale shrinks with it."""
    meta = {"speed": trace.meta.speed * factor}
    tick = trace.meta.tick / factor if trace.meta.tick else None
    return trace.replace(trace.table.with_columns(pl.col("arrival") / factor), step, tick=tick, **meta)


def _superpose(trace: Trace, factor: float, seed: int, step: str) -> Trace:
    """Overlay ceil(factor) copies, each turned around the span by a random shift, then thin to the exact rate.

    Time scales and lengths stay; independent copies smooth the bursts, as more independent clients do.
    """
    copies = math.ceil(factor)
    random = stream(seed, "superpose")
    period = trace.span * len(trace) / (len(trace) - 1)
    sessions = (trace.table["session"].max() or 0) + 1  # type: ignore[operator]
    parts = []
    for copy in range(copies):
        shift = random.uniform(0, period) if copy else 0.0
        part = trace.table.with_columns(
            arrival=(pl.col("arrival") + shift) % period,
            session=pl.col("session") + copy * sessions,
        )
        parts.append(part.filter(pl.Series(random.random(len(part)) < factor / copies)))
    table = pl.concat(parts).sort("arrival", maintain_order=True)
    if table.is_empty():
        raise InputError(f"{step}: no request is left.")
    return trace.replace(table, step)


def shape_of(trace: Trace) -> Shape:
    """The numbers of a trace that scaling may change."""
    arrival = trace.table["arrival"].to_numpy()
    gaps = np.diff(arrival)
    sessions = trace.table["session"].drop_nulls()
    answered = trace.table.filter(~pl.col("failed"))
    peak = np.searchsorted(arrival, arrival + 60.0) - np.arange(arrival.size)
    return Shape(
        requests=len(trace),
        span=trace.span,
        rate=trace.rate if trace.span > 0 else None,
        gap_cv=float(gaps.std() / gaps.mean()) if gaps.size and gaps.mean() > 0 else None,
        dispersion={f"{scale:g}": _dispersion(arrival, scale) for scale in _SCALES},
        peak_60s=int(peak.max()),
        request_tokens=_mean(answered["request_tokens"]),
        response_tokens=_mean(answered["response_tokens"]),
        sessions=sessions.n_unique() if len(sessions) else None,
        turns=len(sessions) / sessions.n_unique() if len(sessions) else None,
    )


def _dispersion(arrival: np.ndarray, scale: float) -> float | None:
    """Variance over mean of the counts in whole bins of `scale` s; empty bins need no memory."""
    bins = int((arrival[-1] - arrival[0]) // scale)
    if bins < _FEWEST_BINS:
        return None
    place = ((arrival - arrival[0]) // scale).astype(np.int64)
    counts = np.diff(np.append(np.flatnonzero(np.diff(place[place < bins], prepend=-1)), (place < bins).sum()))
    mean = counts.sum() / bins
    return float(counts @ counts / bins / mean - mean)


def _mean(values: pl.Series) -> float | None:
    return float(values.mean()) if len(values) else None  # type: ignore[arg-type]


def table_of(scaling: Scaling) -> list[str]:
    """What a scaling did, as lines of text: before, after."""
    before, after = (msgspec.to_builtins(side) for side in (scaling.before, scaling.after))
    rows = [(name.replace("_", " "), before[name], after[name]) for name in before if name != "dispersion"]
    scales = before["dispersion"]
    rows[4:4] = [(f"dispersion, {scale} s", value, after["dispersion"][scale]) for scale, value in scales.items()]
    lines = [f"{'--scale-method ' + scaling.method:24}{'before':>12}{'after':>12}"]
    return lines + [
        f"{name:24}{_short(one):>12}{_short(two):>12}" for name, one, two in rows if (one, two) != (None,) * 2
    ]


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
