"""What a run was worth: efficiency, stability, reliability, and goodput under an SLO.

Definitions, per request (a request's latency spans its attempts):

    TTFT = first token of the last attempt − scheduled time of the first     (what a user feels; the headline)
    E2E  = last token of the last attempt − scheduled time of the first      (an empty answer: its end)
    TPOT = (last token − first token) / (tokens − 1)                         so that E2E = TTFT + (tokens − 1) TPOT;
           unknown, not 0, where all tokens came in one read
    ITL  = gap between two reads of the stream / tokens per read, each gap counted as often as tokens came with it
    jitter = mean |difference| of consecutive such gaps
    lateness = sent − scheduled of the first attempt

`from_send` holds TTFT and E2E from the last attempt's own send. Latencies are those of requests that succeeded;
failures stay in the denominators of every share, and `of_offered` gives percentiles in which a failed request counts as
never answered. The names efficiency, stability and reliability are the BurstGPT paper's (Wang et al., KDD'25); it gives
no formulas, these are ours.
"""

import math
from collections.abc import Sequence

import msgspec
import numpy as np
import polars as pl

from squall.errors import InputError
from squall.run.backlog import Backlog, backlog
from squall.run.files import read_run
from squall.run.server import Agreement, agreements
from squall.run.slo import SLO, parse_slo
from squall.run.table import Run, RunSource
from squall.trace.select import window_of
from squall.units import Duration, seconds
from squall.verb import callable_room

callable_room(__name__)  # `squall.run.metrics` is this module as well as its function, whoever imports first

PERCENTILES = (50, 90, 95, 99)
MOST_WINDOWS = 100_000
FASTEST_TPOT = 5e-5
"""Seconds: no server makes 20,000 tokens/s for one request; what seems to was not observed token by token."""
_NAN = float("nan")


class Statistic(msgspec.Struct, frozen=True, kw_only=True):
    """A sample of `n` values, in seconds. Null: unknown.

    A percentile is null unless at least one value is expected above it, n (1 − p) ≥ 1: p50 needs 2 values, p90 10,
    p95 20, p99 100. Between order statistics it is interpolated linearly. `std` (n − 1) needs 2 values.
    """

    n: int = 0
    mean: float | None = None
    std: float | None = None
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    max: float | None = None


class Quantiles(msgspec.Struct, frozen=True, kw_only=True):
    """Percentiles over all `n` requests offered, a failed one counting as never answered. Null: too few, or that."""

    n: int = 0
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    bounds: dict[str, float | None] = {}
    """Upper bounds of P90, P95 and P99, each at 99 % confidence if the requests were independent: see `upper_bound`.
    Null: too few requests, or too few of them answered."""
    at_least: dict[str, float | None] = {}
    """What the percentiles that are null for want of answers are at least, each request that was given up counting with
    the time for which it was waited. Null: not even that, since too many failed otherwise."""


class FromSend(msgspec.Struct, frozen=True, kw_only=True):
    """Latencies from the moment the last attempt was sent: what the server did, without the client's lateness."""

    ttft: Statistic
    e2e: Statistic
    goodput: float | None
    goodput_share: float | None


class OfOffered(msgspec.Struct, frozen=True, kw_only=True):
    """Percentiles that failures cannot make rosier."""

    ttft: Quantiles
    e2e: Quantiles


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that failed in the same way; `message` is the first one's."""

    status: str
    reason: str | None
    http_status: int | None
    requests: int
    share: float
    """Of the requests offered."""
    message: str | None
    example: int
    """A request (row of the trace) that failed so."""


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """The requests scheduled in [start, start + window)."""

    start: float
    offered: int
    succeeded: int
    failed: int
    rate: float
    """Requests scheduled per second."""
    throughput: float
    """Requests that ended well within this window, whenever they were scheduled, per second."""
    output_token_throughput: float
    """Their tokens per second."""
    ttft_mean: float | None
    ttft_p50: float | None
    ttft_p99: float | None
    e2e_mean: float | None
    e2e_p50: float | None
    e2e_p99: float | None


class KVCache(msgspec.Struct, frozen=True, kw_only=True):
    """Share of KV blocks in use (0 to 1): time-weighted mean and highest sample, over all replicas. Null: unknown."""

    mean: float | None = None
    peak: float | None = None


class Metrics(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `metrics`. Times in seconds, rates per second, shares of 1; null = not known."""

    kind: str
    title: str
    state: str
    verdict: str
    verdict_reasons: list[str]
    step_time: str | None
    """Simulations: how the step time was found (`uncalibrated roofline`)."""
    requests: int
    """Requests offered: those in the table, or the plan's number if it is higher (an interrupted run)."""
    succeeded: int
    failed: int
    empty: int
    """Succeeded without a single token; they count as succeeded and never as goodput."""
    attempts: int
    errors: dict[str, int]
    """Failed requests by status; `unrecorded` are offered ones without a row."""
    failures: list[Failure]
    duration: float | None
    """From the first scheduled time to the last end."""
    offered_rate: float | None
    """(n − 1) / (last − first scheduled time)."""
    throughput: float | None
    """Requests that succeeded / duration."""
    input_token_throughput: float | None
    output_token_throughput: float | None
    """Tokens of requests that succeeded / duration."""
    slo: dict[str, float] | None
    goodput: float | None
    """Requests that met the whole SLO / duration."""
    goodput_share: float | None
    """Requests that met the whole SLO / requests offered."""
    ttft: Statistic
    tpot: Statistic
    at_once: int
    """Requests that succeeded and whose several tokens came in one read: not in `tpot`."""
    too_fast: int
    """Requests whose TPOT is below FASTEST_TPOT: their reads held more than they seem to; they are in `tpot`."""
    backlog: Backlog | None
    """Whether the server kept up with an open loop."""
    itl: Statistic
    """Over token gaps; n counts the gaps between reads that were observed, 0 where the run recorded no reads."""
    e2e: Statistic
    from_send: FromSend
    of_offered: OfOffered
    lateness: Statistic
    jitter: Statistic
    """Over requests with at least three reads."""
    tokens_per_read: float | None
    """Above 1, several tokens share one time stamp, and ITL and jitter are those of reads spread over their tokens."""
    window: float
    windows: list[Window]
    window_jitter: dict[str, float | None]
    """Mean |difference| of the mean TTFT and E2E of consecutive windows: drift and bursts, not single requests."""
    kv_cache: KVCache
    preemptions: int | None
    agreement: list[Agreement]
    """Whether the server's own latency histograms, where it has them, show what the client measured."""
    notes: list[str]


def metrics(
    run: RunSource, *, slo: str | None = None, window: Duration | None = None, between: str | None = None
) -> Metrics:
    """Efficiency, stability and reliability of `run`, and its goodput under `slo` (like `ttft=1s,tpot=100ms,e2e=30s`).

    `window` is the length of the windows of the per-window series; by default 60 s, or as many whole minutes as make at
    most 10,000 of them. `between` (`60s:`, `1m:10m`, of the run's clock) counts only the requests scheduled in that
    time, as where a server warms up first and drains last. An empty run or one in which all requests failed
    gives nulls. Raises InputError if the run cannot be read, or the SLO or the window make no sense.
    """
    run = read_run(run)
    if between is not None:
        run = _between(run, between)
    limits = parse_slo(slo) if slo is not None else None
    requests = per_request(run.table)
    offered = max(run.meta.offered, len(requests))
    latency = latencies(requests)
    good, tokens = latency["ok"], latency["tokens"]
    succeeded = int(good.sum())
    ends = np.fmax(latency["ended"], latency["end"])
    scheduled = latency["scheduled"]
    duration = _positive(np.nanmax(ends) - np.nanmin(scheduled)) if np.isfinite(ends).any() else None
    width = seconds(window, "--window") if window is not None else 60.0 * math.ceil((duration or 60.0) / 600_000.0)
    met, met_from_send = (
        _met(latency, limits, ttft, e2e) for ttft, e2e in (("ttft", "e2e"), ("sent_ttft", "sent_e2e"))
    )
    gaps = _token_gaps(run.table)
    windows = _windows(latency, ends, width)
    ttft, e2e = statistic(latency["ttft"][good]), statistic(latency["e2e"][good])
    at_once = int((latency["at_once"] & good).sum())
    too_fast = int(((latency["tpot"] < FASTEST_TPOT) & good).sum())
    behind = backlog(scheduled, ends) if run.meta.open_loop else None

    def rate(count: float | None) -> float | None:
        return None if duration is None or count is None else float(count) / duration

    def share(count: int | None) -> float | None:
        return None if count is None or not offered else count / offered

    return Metrics(
        kind=run.meta.kind,
        title=run.meta.title,
        state=run.meta.state,
        verdict=run.meta.verdict,
        verdict_reasons=run.meta.verdict_reasons,
        step_time=run.meta.step_time,
        requests=offered,
        succeeded=succeeded,
        failed=offered - succeeded,
        empty=int((good & ~(tokens > 0)).sum()),
        attempts=len(run.table),
        errors=_errors(requests, offered),
        failures=_failures(requests, offered),
        duration=duration,
        offered_rate=_rate(scheduled),
        throughput=rate(succeeded),
        input_token_throughput=rate(_total(latency["input_tokens"][good])),
        output_token_throughput=rate(_total(tokens[good])),
        slo=limits.limits if limits else None,
        goodput=rate(met),
        goodput_share=share(met),
        ttft=ttft,
        tpot=statistic(latency["tpot"][good]),
        at_once=at_once,
        too_fast=too_fast,
        backlog=behind,
        itl=gaps.itl,
        e2e=e2e,
        from_send=FromSend(
            ttft=statistic(latency["sent_ttft"][good]),
            e2e=statistic(latency["sent_e2e"][good]),
            goodput=rate(met_from_send),
            goodput_share=share(met_from_send),
        ),
        of_offered=OfOffered(
            ttft=_quantiles(latency["ttft"][good], offered, _waited(requests, latency, "first_token")),
            e2e=_quantiles(latency["e2e"][good], offered, _waited(requests, latency)),
        ),
        lateness=Statistic() if _unscheduled(run, latency) else statistic(latency["lateness"]),
        jitter=gaps.jitter,
        tokens_per_read=gaps.tokens_per_read,
        window=width,
        windows=windows,
        window_jitter={
            "ttft": _mean_step([w.ttft_mean for w in windows]),
            "e2e": _mean_step([w.e2e_mean for w in windows]),
        },
        kv_cache=_kv_cache(run.series),
        preemptions=_preemptions(run),
        agreement=agreements(run.meta.server, run.table),
        notes=[*run.meta.notes, *_odd(at_once, too_fast, behind)],
    )


def _odd(at_once: int, too_fast: int, behind: Backlog | None) -> list[str]:
    """What is odd about a run's numbers, as sentences."""
    found = []
    if at_once:
        found.append(f"{at_once:,} answers of several tokens came in one read: their TPOT is unknown and left out.")
    if too_fast:
        found.append(
            f"{too_fast:,} answers have a TPOT below {FASTEST_TPOT * 1e6:g} µs, which no server reaches: several reads "
            "came together, or the token counts are wrong."
        )
    if behind is not None and behind.grows:
        found.append(
            f"The server fell behind: {behind.first:.3g} requests in flight in the first quarter, {behind.last:.3g} in "
            "the last. Latencies of such a run grow with its length; do not compare them with another length's."
        )
    return found


def _waited(requests: pl.DataFrame, latency: dict[str, np.ndarray], until: str | None = None) -> np.ndarray:
    """Seconds from schedule for which requests were waited that were given up, as far as `until` had not come."""
    given_up = (requests["status"] == "timeout") | (
        (requests["status"] == "cancelled") & requests["sent"].is_not_null()
    )
    kept = given_up.fill_null(False).to_numpy()
    if until is None:
        return (latency["ended"] - latency["scheduled"])[kept]
    came = requests[until].cast(pl.Float64).fill_null(_NAN).to_numpy()
    return (np.where(np.isfinite(came), came, latency["ended"]) - latency["scheduled"])[kept]


def _between(run: Run, text: str) -> Run:
    """Only what was scheduled (and the server's numbers read) in the window `text`; a note says so."""
    start, end = window_of(text)
    moment = "scheduled" if run.table["scheduled"].null_count() < len(run.table) else "sent"
    first = pl.col(moment).min().over("request")
    table = run.table.filter((first >= start) & (first < end))
    if table.is_empty():
        raise InputError(f"--between {text}: no request of the run is scheduled in that time.")
    series = run.series.filter(pl.col("time").is_between(start, end, closed="left"))
    meta = msgspec.structs.replace(
        run.meta,
        offered=table["request"].n_unique(),
        server=None,  # its histograms are of the whole run
        notes=[*run.meta.notes, f"Only requests scheduled in --between {text} are counted."],
    )
    return Run.of(table, meta, series)


def statistic(values: np.ndarray, weights: np.ndarray | None = None) -> Statistic:
    """The Statistic of the finite `values`; with `weights` each counts that often (n stays the number of values)."""
    finite = np.isfinite(values)
    values = values[finite]
    n = len(values)
    if not n:
        return Statistic()
    levels = [p for p in PERCENTILES if n * (100 - p) >= 100]
    if weights is None:
        mean = float(values.mean())
        std = float(values.std(ddof=1)) if n > 1 else None
        found = np.percentile(values, levels)
    else:
        weights = weights[finite]
        mean = float(np.average(values, weights=weights))
        std = float(np.sqrt(np.average((values - mean) ** 2, weights=weights) * n / (n - 1))) if n > 1 else None
        order = np.argsort(values)
        reach = np.cumsum(weights[order])
        found = values[order][np.searchsorted(reach, np.array(levels) / 100 * reach[-1]).clip(max=n - 1)]
    percentiles = {f"p{p}": float(value) for p, value in zip(levels, found, strict=True)}
    return Statistic(n=n, mean=mean, std=std, max=float(values.max()), **percentiles)


def _quantiles(answered: np.ndarray, offered: int, waited: np.ndarray) -> Quantiles:
    """Percentiles of `answered` and, above it, as many infinities as there were requests without an answer.

    `waited` are seconds after which some of these were given up.
    """
    values = np.sort(answered[np.isfinite(answered)])
    least = np.sort(np.concatenate((values, waited[np.isfinite(waited)])))
    found, at_least = {}, {}
    for p in PERCENTILES:
        place = p / 100 * (offered - 1)
        if offered * (100 - p) < 100:
            continue
        if int(np.ceil(place)) < len(values):
            found[f"p{p}"] = float(np.interp(place, np.arange(len(values)), values))
        else:
            at_least[f"p{p}"] = float(least[int(place)]) if int(place) < len(least) else None
    bounds = {f"p{p}": upper_bound(values, offered, p / 100) for p in (90, 95, 99)}
    return Quantiles(n=offered, **found, bounds=bounds, at_least=at_least)


def upper_bound(values: np.ndarray, n: int, share: float, confidence: float = 0.99) -> float | None:
    """Upper confidence bound of the `share` quantile of `n` independent draws; `values` are the finite ones, ascending.

    The value above which d draws lie is above the quantile unless at most d of n draws are: probability P(Binomial(n,
    1 - share) <= d). The largest d for which that is at most 1 - confidence gives the bound. As in MLPerf's early
    stopping, d is at least 1, so P90 needs 64 draws and P99 662. Draws that are not finite lie above all others.
    Null with fewer draws, or where the bound is not finite.
    """
    miss = 1 - share
    # The probability of d from that of d - 1, in logarithms: n may be millions.
    most = int(n * miss)  # beyond its mean the probability is above a half
    d = np.arange(1, most + 1)
    steps = np.log((n - d + 1) / d * (miss / share)) if n else np.zeros(0)
    below = np.cumsum(np.exp(np.concatenate(([n * math.log(share)], n * math.log(share) + np.cumsum(steps)))))
    above = int(np.searchsorted(below, 1 - confidence, side="right")) - 1
    place = n - 1 - above
    return float(values[place]) if above >= 1 and place < len(values) else None


def per_request(table: pl.DataFrame) -> pl.DataFrame:
    """One row per request, in order: its last attempt, with `first_scheduled` and `first_sent` of its first."""
    first = {"first_scheduled": pl.col("scheduled"), "first_sent": pl.col("sent")}
    if table["request"].n_unique() == len(table):
        return table.with_columns(**first)
    ordered = table.sort("request", "attempt", maintain_order=True)
    firsts = {name: moment.first().over("request") for name, moment in first.items()}
    return ordered.with_columns(**firsts).unique("request", keep="last", maintain_order=True)


def latencies(requests: pl.DataFrame) -> dict[str, np.ndarray]:
    """Columns by request, seconds or tokens, nan where unknown; `ok` says which succeeded, `at_once` which have several
    tokens that came in one read."""

    def column(name: str) -> np.ndarray:
        return requests[name].cast(pl.Float64).fill_null(_NAN).to_numpy()

    scheduled, sent = column("first_scheduled"), column("sent")
    first, last, tokens = column("first_token"), column("last_token"), column("response_tokens")
    end = requests.select(pl.coalesce("last_token", "done", "ended").fill_null(_NAN)).to_series().to_numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        tpot = np.where((tokens > 1) & (last > first), (last - first) / (tokens - 1), _NAN)
    return {
        "ok": (requests["status"] == "ok").fill_null(False).to_numpy(),
        "tokens": tokens,
        "input_tokens": column("request_tokens"),
        "scheduled": scheduled,
        "end": end,
        "ended": column("ended"),
        "ttft": first - scheduled,
        "e2e": end - scheduled,
        "tpot": tpot,
        "at_once": (tokens > 1) & (last == first),
        "sent_ttft": first - sent,
        "sent_e2e": end - sent,
        "lateness": column("first_sent") - scheduled,
    }


def _met(latency: dict[str, np.ndarray], slo: SLO | None, ttft: str, e2e: str) -> int | None:
    return None if slo is None else int(requests_that_met(latency, slo, ttft, e2e).sum())


def requests_that_met(latency: dict[str, np.ndarray], slo: SLO, ttft: str = "ttft", e2e: str = "e2e") -> np.ndarray:
    """Which requests succeeded with a token and within all limits. What came in one read meets any TPOT."""
    met = latency["ok"] & np.isfinite(latency["ttft"])
    for limit, values in ((slo.ttft, latency[ttft]), (slo.e2e, latency[e2e])):
        if limit is not None:
            met &= values <= limit
    if slo.tpot is not None:
        met &= (latency["tpot"] <= slo.tpot) | (latency["tokens"] == 1) | latency["at_once"]
    return met


class _Gaps(msgspec.Struct, frozen=True):
    itl: Statistic
    jitter: Statistic
    tokens_per_read: float | None


def _token_gaps(table: pl.DataFrame) -> _Gaps:
    """ITL and jitter from the times at which the streams of successful attempts were read."""
    streams = table.filter((pl.col("status") == "ok") & (pl.col("chunks").list.len() > 1)).select(
        "chunks", "response_tokens"
    )
    if streams.is_empty():
        return _Gaps(Statistic(), Statistic(), None)
    reads = streams["chunks"].list.len().cast(pl.Int64).to_numpy()
    tokens = streams["response_tokens"].cast(pl.Float64).fill_null(_NAN).to_numpy()
    # Tokens are taken as evenly spread over the reads after the first; unknown or fewer than two count as one per read.
    per_read = np.where(tokens > 1, (tokens - 1) / (reads - 1), 1.0)
    ends = np.cumsum(reads)
    inside = np.ones(ends[-1] - 1, dtype=bool)
    inside[ends[:-1] - 1] = False  # the step from one stream's last read to the next one's first is no gap
    of_gap = np.repeat(per_read, reads - 1)
    gaps = np.diff(streams["chunks"].explode().to_numpy())[inside] / of_gap
    change = np.abs(np.diff(gaps))
    stream = np.repeat(np.arange(len(reads)), reads - 1)
    same = stream[1:] == stream[:-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        jitter = np.bincount(stream[1:][same], change[same], len(reads)) / (reads - 2)
    return _Gaps(statistic(gaps, of_gap), statistic(jitter), float(of_gap.mean()))


def _errors(requests: pl.DataFrame, offered: int) -> dict[str, int]:
    counts = (
        requests.filter(pl.col("status") != "ok")["status"]
        .cast(pl.String)
        .value_counts(sort=True)
        .sort("count", "status", descending=[True, False])
    )
    errors = dict(counts.iter_rows())
    return {**errors, "unrecorded": offered - len(requests)} if offered > len(requests) else errors


def _failures(requests: pl.DataFrame, offered: int) -> list[Failure]:
    kinds = (
        requests.filter(pl.col("status") != "ok")
        .group_by("status", "reason", "http_status", maintain_order=True)
        .agg(requests=pl.len(), message=pl.col("message").drop_nulls().first(), example=pl.col("request").first())
        .sort("requests", descending=True, maintain_order=True)
    )
    return [Failure(**kind, share=kind["requests"] / offered) for kind in kinds.iter_rows(named=True)]


def _windows(latency: dict[str, np.ndarray], ends: np.ndarray, width: float) -> list[Window]:
    """Consecutive windows from the first scheduled time to the last end, empty ones included."""
    if width <= 0:
        raise InputError("--window: it must be longer than 0; give a length such as 60s.")
    known = np.isfinite(latency["scheduled"])
    if not known.any():
        return []
    zero = latency["scheduled"][known].min()
    count = int((np.nanmax(np.append(ends, latency["scheduled"][known])) - zero) // width) + 1
    if count > MOST_WINDOWS:
        raise InputError(f"--window: {width:g} s would make {count:,} windows; give a longer one.")
    ok, of_end = latency["ok"], (ends - zero) // width
    frame = pl.DataFrame(
        {
            "window": ((latency["scheduled"][known] - zero) // width).astype(np.int64),
            "ok": ok[known],
            "ttft": np.where(ok, latency["ttft"], _NAN)[known],
            "e2e": np.where(ok, latency["e2e"], _NAN)[known],
        }
    ).with_columns(pl.col("ttft", "e2e").fill_nan(None))
    columns = [pl.len().alias("offered"), pl.col("ok").sum().alias("succeeded")]
    for name in ("ttft", "e2e"):
        value = pl.col(name)
        columns += [value.mean().alias(f"{name}_mean"), value.count().alias(f"{name}_n")]
        columns += [value.quantile(p / 100, "linear").alias(f"{name}_p{p}") for p in (50, 99)]
    rows = {row["window"]: row for row in frame.group_by("window").agg(columns).iter_rows(named=True)}
    done = ok & np.isfinite(of_end)
    completed = np.bincount(of_end[done].astype(np.int64), minlength=count)
    tokens = np.bincount(of_end[done].astype(np.int64), np.nan_to_num(latency["tokens"])[done], minlength=count)
    return [_window(rows.get(k, {}), zero + k * width, width, completed[k], tokens[k]) for k in range(count)]


def _window(row: dict[str, float], start: float, width: float, completed: int, tokens: float) -> Window:
    offered, succeeded = int(row.get("offered", 0)), int(row.get("succeeded", 0))
    found = {f"{name}_mean": row.get(f"{name}_mean") for name in ("ttft", "e2e")}
    for name in ("ttft", "e2e"):
        for p in (50, 99):
            found[f"{name}_p{p}"] = row.get(f"{name}_p{p}") if row.get(f"{name}_n", 0) * (100 - p) >= 100 else None
    return Window(
        start=float(start),
        offered=offered,
        succeeded=succeeded,
        failed=offered - succeeded,
        rate=offered / width,
        throughput=float(completed) / width,
        output_token_throughput=float(tokens) / width,
        **found,
    )


def _mean_step(values: Sequence[float | None]) -> float | None:
    """Mean |difference| of consecutive values, over the steps at which both are known."""
    known = np.array([_NAN if value is None else value for value in values], dtype=float)
    steps = np.abs(np.diff(known))
    return float(np.nanmean(steps)) if np.isfinite(steps).any() else None


def _unscheduled(run: Run, latency: dict[str, np.ndarray]) -> bool:
    """Whether a table made elsewhere had no schedule: its lateness is not 0 but unknown."""
    return run.meta.kind == "recorded" and not latency["lateness"].any()


def _kv_cache(series: pl.DataFrame) -> KVCache:
    samples = series.drop_nulls(["time", "kv_used"])
    if samples.is_empty():
        return KVCache()
    # A sample covers the time since the one before it on its replica; the first ones get the usual length.
    covered = samples.sort("time").with_columns(covers=pl.col("time").diff().over("replica"))
    weights = covered["covers"].fill_null(covered["covers"].median() or 1.0).to_numpy()
    used = covered["kv_used"].to_numpy()
    mean = np.average(used, weights=weights) if weights.sum() > 0 else used.mean()
    return KVCache(mean=float(mean), peak=float(used.max()))


def _preemptions(run: Run) -> int | None:
    for counts in (run.table["preemptions"], run.series["preemptions"]):
        if counts.null_count() < len(counts):
            return int(counts.sum())
    return None


def _rate(scheduled: np.ndarray) -> float | None:
    known = scheduled[np.isfinite(scheduled)]
    span = _positive(np.ptp(known)) if len(known) > 1 else None
    return None if span is None else (len(known) - 1) / span


def _total(values: np.ndarray) -> float | None:
    """Sum of what is known; None if nothing is."""
    return float(np.nansum(values)) if np.isfinite(values).any() else None


def _positive(value: float) -> float | None:
    return float(value) if value > 0 else None
