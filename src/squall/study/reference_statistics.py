"""Published statistics of public traces beside squall's, computed from the files themselves.

docs/reference-statistics.md says who published what. A figure passes if ours differs by no more than the rounding of
the published one (or lies in the published range), or by the share that is allowed where its definition is not known
exactly; where it is not known at all, both are printed and nothing is judged. Which file is which is told by its
sha256, or for BurstGPT by its clock, so that files with other line ends are known too.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import polars as pl
from msgspec import Struct

from squall.characterize import Characterization, characterize
from squall.characterize.concurrency import dispersion
from squall.errors import InputError
from squall.study.reference_burstgpt import (
    Figure,
    Figures,
    first_30,
    first_500,
    head_418,
    hourly,
    hours_of_azure,
    lengths,
    minutes_and_days,
    outages,
    part_1,
    part_2,
    part_3,
    part_of,
    without_failures,
)
from squall.trace import Trace, open_trace, read_servegen

HOURLY = ("day", "hour", "conversation", "api", "all")


class Check(Struct, frozen=True, kw_only=True):
    """One published figure beside ours."""

    trace: str
    section: str
    quantity: str
    published: str
    ours: float | None
    difference: float | None
    """Ours minus the published figure, in the unit of the latter; of a range, minus its nearer end, 0 inside."""
    passed: bool | None
    """None: not judged, because the definition of the published figure is not known."""


class ReferenceStatistics(Struct, frozen=True, kw_only=True):
    checks: list[Check]
    passed: int
    failed: int
    not_judged: int


def reference_statistics(*paths: str | Path, out: str | Path | None = None) -> ReferenceStatistics:
    """Compare the published statistics of the files at `paths` with squall's; `out` is a directory for a CSV of them.

    Known are BurstGPT parts 1 to 3 with and without failures, the published excerpts and aggregates of them (hourly
    counts by their columns day, hour, conversation, api, all), Azure's conversation trace of 2023 and hourly counts of
    2024, Mooncake's conversation trace, and the folder of ServeGen's deepseek-r1 pool. Raises InputError for any other.
    """
    if not paths:
        raise InputError(
            "reference-statistics: name the files, for instance BurstGPT_1.csv BurstGPT_3.csv; "
            "they are at https://github.com/HPMLL/BurstGPT/releases."
        )
    checks = [check for path in paths for check in _checks(path)]
    passed, failed = (sum(check.passed is verdict for check in checks) for verdict in (True, False))
    if out is not None:
        folder = Path(out)
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--out {out}: it is a file; name a directory to write to.")
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "reference-statistics.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(Check.__struct_fields__)
            writer.writerows([getattr(check, name) for name in Check.__struct_fields__] for check in checks)
    return ReferenceStatistics(checks=checks, passed=passed, failed=failed, not_judged=len(checks) - passed - failed)


def _checks(path: str | Path) -> Iterator[Check]:
    for figure in _pool(path) or _aggregate(path) or _trace_file(path):
        yield judged(Path(path).name, figure)


def judged(trace: str, figure: Figure) -> Check:
    """A figure with its difference, in the unit in which it was published, and its verdict."""
    number = figure.published.replace(",", "").removesuffix(" %")
    low, _, high = number.partition(" – ")
    scale = 100.0 if figure.published.endswith("%") else 1.0
    decimals = len(low.partition(".")[2])
    difference = passed = None
    if figure.ours is not None:
        ours = float(figure.ours) * scale
        difference = min(ours - float(low), 0.0) + max(ours - float(high or low), 0.0)
        if figure.allowed is not None:
            rounding = 0.5000001 * 10.0**-decimals if (decimals or scale > 1) and not high else 1e-9
            nearer = float(high or low) if difference > 0 else float(low)
            passed = abs(difference) <= max(rounding, figure.allowed * abs(nearer))
    elif figure.allowed is not None:
        passed = False
    return Check(
        trace=trace,
        section=figure.section,
        quantity=figure.quantity,
        published=figure.published,
        ours=figure.ours,
        difference=difference,
        passed=passed,
    )


# ------------------------------------------------------------------------------------------------- which file it is


def _trace_file(path: str | Path) -> Figures:
    trace = open_trace(path)
    known = _TRACES.get(trace.meta.sha256 or "") or (_burstgpt(trace) if trace.meta.format == "burstgpt" else None)
    if known is None:
        raise InputError(
            f"{path}: no published statistics are known of this file; known are BurstGPT parts 1 to 3, Azure's "
            "conversation trace of 2023 and Mooncake's."
        )
    return known(trace, characterize(trace))


def _burstgpt(trace: Trace) -> "Callable[[Trace, Characterization], Figures] | None":
    """BurstGPT's parts stand one after the other on one clock; the cleaned forms have no failures."""
    part = part_of(trace)
    if part and not trace.table["failed"].any():
        return without_failures
    return {1: part_1, 2: part_2, 3: part_3}.get(part)


def _aggregate(path: str | Path) -> Figures | None:
    """Files of counts, which are no traces."""
    file = Path(path)
    if not file.is_file() or file.stat().st_size > 1e6:
        return None
    data = file.read_bytes()
    if tuple(data.split(b"\n", 1)[0].decode("utf-8", "replace").strip().split(",")) == HOURLY:
        table = pl.read_csv(path)
        return hourly({name: table[name].to_numpy() for name in HOURLY[2:]})
    match hashlib.sha256(data).hexdigest():
        case "89c3e5573ee1cbfc0cf5b6e132225ccc9e76b71afa7d4b4dea6771ffabcc6755":
            return first_500(np.array(data.split(), int))
        case "bcc4ec40ca78c5ba3e0bc9625f37afcccf7a9684bb8950d16cc78fea8ceb4be4":
            return minutes_and_days(json.loads(data))
        case "5d74d18a497b45327708a5f9366d18527d6ddd9db80693b80efec564bd735c7f":
            table = pl.read_csv(path)
            bins = table["interval"].to_numpy()
            names = ("request_count", "zero_response_count")
            return outages(*(np.bincount(bins, table[name].to_numpy()) for name in names))
        case "c5d0790e6fa5db24cb8d57ce7c464a857cac695cc69713d25b45eb0b216af51d":
            return hours_of_azure(pl.read_csv(path)["conversation"].to_numpy())
    return None


def _pool(path: str | Path) -> Figures | None:
    return _servegen(Path(path)) if Path(path).is_dir() else None


# ------------------------------------------------------------------------------------------------------------- others


def _azure(trace: Trace, found: Characterization) -> Figures:
    one, minute = found.total, found.total.length_time[0]
    request = {"mean": "1,155", "p50": "1,020", "p90": "2,735", "p99": "4,142", "max": "14,050"}
    yield from lengths(one.request_tokens, request, "request")
    response = {"mean": "211", "p50": "129", "p90": "424", "p99": "601", "max": "1,000"}
    yield from lengths(one.response_tokens, response, "response")
    index = dict(dispersion(trace.table["arrival"].to_numpy()))
    figures: list[tuple[str, str, float | None]] = [
        ("requests", "19,366", float(found.requests)),
        ("span, s", "3,501.7", found.span),
        ("rate, 1/s", "5.53", found.rate),
        ("gaps of 0 s", "0", one.gaps.tied),
        ("gap CV", "1.09", one.gaps.cv),
        ("dispersion at 1 s", "1.39", index.get(1.0)),
        ("dispersion at 10 s", "3.86", index.get(10.0)),
        ("dispersion at 60 s", "16.1", index.get(60.0)),
        ("dispersion at 300 s", "56.1", index.get(300.0)),
        ("Pearson correlation", "-0.11", one.correlation.pearson),
        ("Spearman correlation", "0.07", one.correlation.spearman),
        ("count against mean length, 60 s", "0.48", minute.correlation),
        ("CV of tokens per 60 s", "0.348", minute.cv),
        ("the same with shuffled lengths", "0.237", minute.shuffled_cv),
    ]
    for quantity, number, ours in figures:
        # One shuffle was published, of 58 windows; ours is the mean over all shuffles.
        yield Figure("arrivals", quantity, number, ours, 0.1 if "shuffled" in quantity else 0.002)


def _mooncake(trace: Trace, found: Characterization) -> Figures:
    one = found.total
    five_minutes = next(point for point in one.length_time if point.scale == 300)
    request = {"mean": "12,035", "p50": "6,909", "p90": "27,367", "p99": "85,401", "max": "126,195"}
    yield from lengths(one.request_tokens, request, "request")
    yield from lengths(one.response_tokens, {"mean": "343", "p50": "350", "p90": "597", "max": "2,000"}, "response")
    blocks = trace.table.select((pl.col("prefix").list.len() == (pl.col("request_tokens") / 512).ceil()).mean()).item()
    ticks = trace.table["arrival"].n_unique()
    figures: list[tuple[str, str, float | None]] = [
        ("requests", "12,031", float(found.requests)),
        ("span, s", "3,537", found.span),
        ("gap CV, ticks left in", "3.03", one.gaps.cv),
        ("different times", "1,180", float(ticks)),
        ("requests at one time", "10.2", found.requests / ticks),
        ("prompts with ceil(tokens / 512) blocks", "100 %", blocks),
        ("distinct blocks", "182,790", float(one.prefixes.distinct)),
        ("blocks that an infinite cache hits", "36.6 %", one.prefixes.hit_share),
        ("CV of tokens per 300 s", "0.033", five_minutes.cv),
        ("the same with shuffled lengths", "0.098", five_minutes.shuffled_cv),
        ("count against mean length, 300 s", "-0.94", five_minutes.correlation),
    ]
    for quantity, number, ours in figures:
        # One shuffle was published, of twelve windows; ours is the mean over all of them.
        yield Figure("trace", quantity, number, ours, 0.2 if "shuffled" in quantity else 1e-6)


def _servegen(folder: Path) -> Figures:
    """The pool of 73 clients of deepseek-r1."""
    pool = read_servegen(folder)
    rate = np.array([client.rate for client in pool.clients])
    cv, shape = (np.array([getattr(client, name) for client in pool.clients]) for name in ("cv", "shape"))
    pattern = np.array([client.pattern for client in pool.clients])
    active, total = rate > 0, rate.sum(0)
    weighed = np.zeros(3)
    for client in pool.clients:
        for start, own in zip(client.start, client.rate, strict=True):
            block = client.block_at(start)
            if own and block and block.input_tokens.values.size and block.output_tokens.values.size:
                weighed += own * np.array([1.0, block.input_tokens.mean, block.output_tokens.mean])
    gamma = shape[pattern == "gamma"]
    burst = cv[active]
    figures: list[tuple[str, str, float | None, float]] = [
        ("clients", "73", float(len(pool.clients)), 0.0),
        ("windows of clients", "10,512", float(rate.size), 0.0),
        ("active ones", "3,111", float(active.sum()), 0.0),
        ("Gamma", "2,589", float((pattern == "gamma").sum()), 0.0),
        ("Weibull", "522", float((pattern == "weibull").sum()), 0.0),
        ("rate, mean, 1/s", "16.0", float(total.mean()), 0.0),
        ("rate, least", "4.3", float(total.min()), 0.0),
        ("rate, most", "42.5", float(total.max()), 0.0),
        ("CV of the gaps, p50", "1.03", float(np.median(burst)), 0.01),
        ("CV of the gaps, p90", "3.95", float(np.quantile(burst, 0.9)), 0.01),
        ("CV of the gaps, mean over requests", "2.28", float((cv * rate).sum() / rate.sum()), 0.0),
        ("Gamma shape, p10", "0.16", float(np.quantile(gamma, 0.1)), 0.0),
        ("Gamma shape, p50", "0.99", float(np.quantile(gamma, 0.5)), 0.0),
        ("Gamma shape, p90", "1.64", float(np.quantile(gamma, 0.9)), 0.0),
        ("Gamma shapes below 1", "51 %", float((gamma < 1).mean()), 0.0),
        ("requests of the largest client", "28.6 %", float(rate.sum(1).max() / rate.sum()), 0.0),
        ("input tokens, mean", "1,268", weighed[1] / weighed[0], 0.001),
        ("output tokens, mean", "1,527", weighed[2] / weighed[0], 0.001),
    ]
    for quantity, number, ours, allowed in figures:
        yield Figure("pool", quantity, number, ours, allowed)


_TRACES: "dict[str, Callable[[Trace, Characterization], Figures]]" = {
    "ae1adecd52e0cebee8ecef60128a5fdee6557554c54a7db9ab29e47e28559973": first_30,
    "a059a18d2be0a877a9db39c85dc8e695440bcc8e737495e3e42f8901afc10b55": head_418,
    "2f1e5b666d4e3055fdbba98598ce2ec307767b9064e03e2fa46676dbcc7d0bf8": _azure,
    "b8cbb061a85206d729d91cdc2981f43c9e0d99209dce588d3af5f7934408b9df": _mooncake,
}
