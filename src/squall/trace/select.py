"""The trace options: which rows of a trace, at which load. The same on every verb that reads a TRACE."""

import importlib
import math
from dataclasses import dataclass
from typing import Any, Literal

import polars as pl

from squall.errors import InputError
from squall.progress import note
from squall.seeds import DEFAULT_SEED, stream
from squall.trace.scaling import ScaleMethod, compress, positive, scale
from squall.trace.table import Trace
from squall.trace.ties import TieRule, break_ties
from squall.units import seconds

OverLimit = Literal["drop", "clip", "keep"]


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """Filters and scaling, applied in the order of these fields."""

    format: str | None = None
    """Format of the input (burstgpt, azure, mooncake, ragpulse, conversations, vllm, litellm, opentelemetry, squall);
    detected if not given. Beside --columns: the log_format of nginx's access log ($remote_addr [$time_local] ...)."""
    columns: str | None = None
    """Columns of any CSV file, or fields of JSON lines or a log: arrival=NAME,request_tokens=NAME,..."""
    join: tuple[str, ...] = ()
    """A further part on the same clock, such as BurstGPT_2.csv after BurstGPT_1.csv; may be repeated."""
    ties: TieRule = "keep"
    """Requests inside one tick of a coarse clock: keep together, spread (sorted uniform, seeded) or even."""
    service: Literal["conversation", "api"] | None = None
    """Only this service."""
    model_name: str | None = None
    """Only requests to this recorded model (ChatGPT, GPT-4)."""
    between: str | None = None
    """Only START:END of the trace, in time from its start: 8h:9h, 90:, :2d."""
    head: int | None = None
    """Only the first N rows."""
    drop_failed: bool = False
    """Leave out the requests that the recorded system failed."""
    max_request_tokens: int | None = None
    """Limit of the prompt length; see --over-limit."""
    max_response_tokens: int | None = None
    """Limit of the response length; see --over-limit."""
    over_limit: OverLimit = "drop"
    """What to do with longer requests: drop, clip, or keep them; their number is always told."""
    sample: float | None = None
    """Keep each request with this probability (above 0, to 1)."""
    rate: float | None = None
    """Rescale to this mean rate in requests/s by --scale-method."""
    scale_method: ScaleMethod = "compress"
    """How --rate is reached: compress time, thin out, superpose shifted copies, or fit a model and draw."""
    speed: float | None = None
    """Divide all gaps by this factor."""
    arrivals: str | None = None
    """Other arrivals at the same rate, to compare with: uniform, poisson, gamma:CV, weibull:CV, maf, bootstrap:30s."""
    seed: int = DEFAULT_SEED
    """Seed of every random choice."""


def select(trace: Trace, options: TraceOptions) -> Trace:
    """`trace` with `options` applied in the order of their fields; every step is noted in the metadata.

    Ties are broken before anything is left out, so that a request's time does not depend on the filters.
    The result starts at arrival 0: START of `between`, else its first request. Raises InputError if nothing is left.
    """
    check_use(options)
    if options.seed < 0:
        raise InputError(f"--seed {options.seed}: a seed is a whole number from 0.")
    trace = break_ties(trace, options.ties, options.seed)
    trace = _filter(trace, options)
    trace = _limit(trace, options)
    if options.sample is not None:
        if not 0 < options.sample <= 1:
            raise InputError(f"--sample {options.sample}: a probability above 0 and at most 1 is needed.")
        kept = stream(options.seed, "sample").random(len(trace)) < options.sample
        trace = _kept(trace, pl.Series(kept), f"--sample {options.sample:g} --seed {options.seed}")
    if options.between is None:
        trace = _rebase(trace, float(trace.table["arrival"][0]))
    if options.speed is not None:
        positive("--speed", options.speed)
        trace = compress(trace, options.speed, f"--speed {options.speed:g}")
    if options.rate is not None:
        trace = scale(trace, options.rate, options.scale_method, options.seed)
    if options.arrivals is not None:
        # Baselines lie in a room above this one, so they are named by text.
        rearranged: Trace = importlib.import_module("squall.workload").rearranged(trace, options.arrivals, options.seed)
        return rearranged
    return trace


def check_use(options: TraceOptions) -> None:
    """Refuse options that exclude each other, or change nothing."""
    if options.rate is not None and options.speed is not None:
        raise InputError("--rate and --speed both set the load; give one of them.")
    if options.scale_method != "compress" and options.rate is None:
        raise InputError(f"--scale-method {options.scale_method} does nothing without --rate.")
    if options.over_limit != "drop" and options.max_request_tokens is None and options.max_response_tokens is None:
        raise InputError(
            f"--over-limit {options.over_limit} does nothing without --max-request-tokens or --max-response-tokens."
        )


def _filter(trace: Trace, options: TraceOptions) -> Trace:
    if options.service is not None:
        if trace.table["service"].null_count() == len(trace):
            raise InputError(
                f"--service {options.service}: {trace.meta.source} does not record services; leave the flag out."
            )
        trace = _kept(trace, trace.table["service"] == options.service, f"--service {options.service}")
    if options.model_name is not None:
        names = trace.table["model"].drop_nulls().unique().sort().to_list()
        if options.model_name not in names:
            have = f"it records {', '.join(names[:8])}" if names else "it records no models"
            raise InputError(f"--model-name {options.model_name}: no such model in {trace.meta.source}; {have}.")
        trace = _kept(trace, trace.table["model"] == options.model_name, f"--model-name {options.model_name}")
    if options.between is not None:
        start, end = window_of(options.between)
        arrival = trace.table["arrival"]
        trace = _kept(trace, (arrival >= start) & (arrival < end), f"--between {options.between}")
        trace = _rebase(trace, start)
    if options.head is not None:
        if options.head < 1:
            raise InputError(f"--head {options.head}: at least one row is needed.")
        trace = _kept(trace, pl.int_range(len(trace), eager=True) < options.head, f"--head {options.head}")
    if options.drop_failed:
        trace = _kept(trace, ~trace.table["failed"], "--drop-failed")
    return trace


def window_of(text: str) -> tuple[float, float]:
    """Seconds of the window START:END; an end left open is infinite."""
    left, colon, right = text.partition(":")
    if not colon:
        raise InputError(f"--between {text}: write START:END, such as 8h:9h, 90: or :2d.")
    start = seconds(left, "--between") if left else 0.0
    end = seconds(right, "--between") if right else math.inf
    if end <= start:
        raise InputError(f"--between {text}: the end is not after the start.")
    return start, end


def _limit(trace: Trace, options: TraceOptions) -> Trace:
    for column, limit in (
        ("request_tokens", options.max_request_tokens),
        ("response_tokens", options.max_response_tokens),
    ):
        if limit is None:
            continue
        flag = f"--max-{column.replace('_', '-')}"
        if limit < 1:
            raise InputError(f"{flag} {limit}: at least one token is needed.")
        over = trace.table[column] > limit
        count = int(over.sum())
        step = f"{flag} {limit} --over-limit {options.over_limit}"
        if count:
            note(f"{step}: {count:,} of {len(trace):,} requests are longer ({options.over_limit}).")
        if options.over_limit == "drop":
            trace = _kept(trace, ~over, step)
        elif options.over_limit == "clip":
            trace = trace.replace(
                trace.table.with_columns(pl.col(column).clip(upper_bound=limit)), f"{step} ({count} rows clipped)"
            )
        else:
            trace = trace.replace(trace.table, f"{step} ({count} rows are longer)")
    return trace


def _kept(trace: Trace, keep: pl.Series, step: str) -> Trace:
    table = trace.table.filter(keep.fill_null(False))
    if table.is_empty():
        raise InputError(f"{step}: no request of {trace.meta.source} is left ({len(trace):,} before this step).")
    return trace.replace(table, f"{step} ({len(table)} of {len(trace)} rows)")


def _rebase(trace: Trace, start: float) -> Trace:
    """Arrival 0 becomes what was `start`; the clocks in the metadata move with it."""
    if start == 0:
        return trace
    meta = trace.meta
    moved: dict[str, Any] = {"clock": meta.clock + start * meta.speed}
    if meta.epoch is not None:
        moved["epoch"] = meta.epoch + round(start * meta.speed * 1e9)
    if meta.midnight is not None:
        since = meta.midnight + start * meta.speed
        moved["midnight"] = since % 86400
        if meta.weekday is not None:
            moved["weekday"] = int(meta.weekday + since // 86400) % 7
    return trace.replace(trace.table.with_columns(pl.col("arrival") - start), **moved)
