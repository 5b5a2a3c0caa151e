"""Published statistics of public traces beside squall's, computed from the files themselves.

The published figures are those of BurstGPT's authors (Wang et al., KDD 2025) and of independent full passes over the
released files; docs/reference-statistics.md says which is which. A figure passes if ours differs by no more than the
rounding of the published one, or by the share that is allowed where its definition is not known exactly. Which file is
which is told by its sha256, or for BurstGPT by its clock, so that files with other line ends are known too.
"""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import polars as pl
from msgspec import Struct

from squall.characterize import Characterization, Stream, characterize
from squall.characterize.concurrency import dispersion
from squall.characterize.cycles import Hours, autocorrelation, hour_of_day, peak_to_trough
from squall.characterize.summary import position
from squall.errors import InputError
from squall.trace import Trace, open_trace

Figures = Iterator[tuple[str, str, str, float | None, float]]
"""Section of the table, quantity, the published figure as printed, ours, and the share that it may differ by."""

HOURLY = ("day", "hour", "conversation", "api", "all")
ROUNDING, LOOSE = 0.0, 0.02
"""Within the rounding of the published figure; or within 2 %, where the quantile rule or the rows are not known."""


class Check(Struct, frozen=True, kw_only=True):
    """One published figure beside ours."""

    trace: str
    section: str
    quantity: str
    published: str
    ours: float | None
    difference: float | None
    """Ours minus the published figure, in the unit of the latter."""
    passed: bool


class ReferenceStatistics(Struct, frozen=True, kw_only=True):
    checks: list[Check]
    passed: int
    failed: int


def reference_statistics(*paths: str | Path, out: str | Path | None = None) -> ReferenceStatistics:
    """Compare the published statistics of the files at `paths` with squall's; `out` is a directory for a CSV of them.

    Known are BurstGPT parts 1 and 3 (whole, and the published conversation head of part 3), hourly counts of part 1
    (columns day, hour, conversation, api, all), Azure's conversation trace of 2023 and Mooncake's. Raises InputError
    for any other file.
    """
    if not paths:
        raise InputError(
            "reference-statistics: name the files, for instance BurstGPT_1.csv BurstGPT_3.csv; "
            "they are at https://github.com/HPMLL/BurstGPT/releases."
        )
    checks = [check for path in paths for check in _checks(path)]
    passed = sum(check.passed for check in checks)
    if out is not None:
        folder = Path(out)
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--out {out}: it is a file; name a directory to write to.")
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "reference-statistics.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(Check.__struct_fields__)
            writer.writerows([getattr(check, name) for name in Check.__struct_fields__] for check in checks)
    return ReferenceStatistics(checks=checks, passed=passed, failed=len(checks) - passed)


def _checks(path: str | Path) -> Iterator[Check]:
    figures = _hourly_file(path) or _trace_file(path)
    for section, quantity, published, ours, allowed in figures:
        number = published.replace(",", "").removesuffix(" %")
        scale = 100.0 if published.endswith("%") else 1.0
        decimals = len(number.partition(".")[2])
        difference = None if ours is None else ours * scale - float(number)
        limit = max(0.5000001 * 10.0**-decimals if decimals or scale > 1 else 1e-9, allowed * abs(float(number)))
        yield Check(
            trace=Path(path).name,
            section=section,
            quantity=quantity,
            published=published,
            ours=ours,
            difference=difference,
            passed=difference is not None and abs(difference) <= limit,
        )


def _hourly_file(path: str | Path) -> Figures | None:
    if not Path(path).is_file():
        return None
    with Path(path).open("rb") as file:
        names = tuple(file.readline().decode("utf-8", "replace").strip().split(","))
    if names != HOURLY:
        return None
    table = pl.read_csv(path)
    return _hourly({name: table[name].to_numpy() for name in HOURLY[2:]})


def _trace_file(path: str | Path) -> Figures:
    trace = open_trace(path)
    known = _KNOWN.get(trace.meta.sha256 or "") or (_by_clock(trace) if trace.meta.format == "burstgpt" else None)
    if known is None:
        raise InputError(
            f"{path}: no published statistics are known of this file; known are BurstGPT parts 1 and 3, Azure's "
            "conversation trace of 2023 and Mooncake's."
        )
    return known(trace, characterize(trace))


def _by_clock(trace: Trace) -> "Callable[[Trace, Characterization], Figures] | None":
    """BurstGPT's parts stand one after the other on one clock."""
    if trace.meta.clock < 5_270_000:
        return _part_1
    return _part_3 if trace.meta.clock >= 19_440_000 else None


# ------------------------------------------------------------------------------------------------------ BurstGPT part 1


def _part_1(trace: Trace, found: Characterization) -> Figures:
    table = trace.table
    yield from _counts(table, "whole file", {"rows": "1,429,737", "ChatGPT": "1,210,109", "GPT-4": "219,628"})
    yield from _counts(table, "whole file", {"api": "1,275,518", "conversation": "154,219"})
    request, response = _sum(table, "request_tokens"), _sum(table, "response_tokens")
    yield "whole file", "request tokens, sum", "872,984,237", request, ROUNDING
    yield "whole file", "response tokens, sum", "176,278,813", response, ROUNDING
    yield "whole file", "rate, 1/s", "0.2713", found.rate, ROUNDING
    yield (
        "whole file",
        "tokens/s over all time",
        "199",
        (request + response) / found.span if found.span else None,
        0.005,
    )
    gaps = np.sort(np.diff(table["arrival"].to_numpy()))
    yield from _sample(
        "whole file", "gap, s", gaps, {"mean": "3.686", "p50": "1", "p95": "12", "p99": "52", "max": "15,240"}
    )
    yield "whole file", "gap, standard deviation", "48.957", float(gaps.std()) if gaps.size else None, ROUNDING
    head = table.head(59_999)
    for name, numbers in (
        ("request", {"mean": "374.06", "p50": "74", "p90": "1,291", "p99": "3,023"}),
        ("response", {"mean": "122.32", "p50": "14", "p90": "401", "p99": "757"}),
    ):
        ordered = np.sort(head[f"{name}_tokens"].to_numpy())
        yield from _sample("whole file", f"{name} tokens of the first 59,999 rows", ordered, numbers, LOOSE)
    yield from _classes_of_part_1(table, found)
    hours = (table["arrival"].to_numpy() + trace.meta.clock) // 3600
    by_service = {
        "conversation": table["service"].to_numpy() == "conversation",
        "api": table["service"].to_numpy() == "api",
        "all": np.ones(len(table), bool),
    }
    counts = {name: np.bincount(hours[mask].astype(np.int64), minlength=1464) for name, mask in by_service.items()}
    yield from _hourly(counts)
    failed = {"all": "1.780 %", "conversation": "5.519 %", "api": "1.327 %", "ChatGPT": "1.731 %", "GPT-4": "2.049 %"}
    yield from _failures(table, failed)
    lost = table.filter(pl.col("failed"))
    yield "failures", "failed rows", "25,443", float(len(lost)), ROUNDING
    yield "failures", "of these without request length", "25,427", float((lost["request_tokens"] == 0).sum()), ROUNDING


def _classes_of_part_1(table: pl.DataFrame, found: Characterization) -> Figures:
    published = {
        ("ChatGPT", "api"): ("77.4 %", "218", "2,161", "3,403", "26", "187", "1,628", "1.4 %"),
        ("GPT-4", "api"): ("11.8 %", "460", "1,105", "2,813", "40", "1,038", "1,350", "1.0 %"),
        ("ChatGPT", "conversation"): ("7.2 %", "481", "1,664", "2,481", "229", "543", "952", "5.5 %"),
        ("GPT-4", "conversation"): ("3.6 %", "520", "1,843", "3,504", "240", "549", "954", "5.5 %"),
    }
    for (model, service), (share, in50, in90, in99, out50, out90, out99, failed) in published.items():
        rows = table.filter((pl.col("model") == model) & (pl.col("service") == service))
        name, ok = f"{model} {service}", rows.filter(~pl.col("failed"))
        yield "classes", f"{name}, share", share, len(rows) / len(table), ROUNDING
        every = np.sort(rows["request_tokens"].to_numpy())
        yield from _sample(
            "classes", f"{name}, request tokens with failed rows", every, {"p50": in50, "p90": in90}, LOOSE
        )
        good = np.sort(ok["request_tokens"].to_numpy())
        yield from _sample("classes", f"{name}, request tokens", good, {"p99": in99}, LOOSE)
        answers = np.sort(ok["response_tokens"].to_numpy())
        numbers = {"p50": out50, "p90": out90, "p99": out99}
        yield from _sample("classes", f"{name}, response tokens", answers, numbers, LOOSE)
        yield "classes", f"{name}, failed", failed, 1 - len(ok) / len(rows) if len(rows) else None, ROUNDING


def _hourly(counts: dict[str, np.ndarray]) -> Figures:
    """From the requests in each hour from the first midnight on."""
    published = {
        "conversation": ("105.3", "0.86", "446", "40", "78", "0.78", "0.80", "45.6"),
        "api": ("871.3", "2.60", "33,236", "636", "5,890", "0.06", "0.01", "11.3"),
        "all": ("976.6", "2.33", "33,344", "36", "5,322", "0.07", "0.02", "11.7"),
    }
    for name, (mean, cv, most, empty, index, day, week, ratio) in published.items():
        series = counts[name].astype(float)
        zero = np.zeros(series.size)
        hours = Hours(first=0, requests=series, request_tokens=zero, response_tokens=zero, covered=zero + 1)
        about = series.mean()
        yield "hours", f"{name}, requests/h", mean, float(about), ROUNDING
        yield "hours", f"{name}, CV per hour", cv, float(series.std() / about) if about else None, ROUNDING
        yield "hours", f"{name}, fullest hour", most, float(series.max()), ROUNDING
        yield "hours", f"{name}, empty hours", empty, float((series == 0).sum()), ROUNDING
        yield "hours", f"{name}, dispersion at 1 h", index, float(series.var() / about) if about else None, 0.007
        yield "hours", f"{name}, ACF at 24 h", day, autocorrelation(series, 24), ROUNDING
        yield "hours", f"{name}, ACF at 168 h", week, autocorrelation(series, 168), ROUNDING
        yield "hours", f"{name}, hour-of-day peak/trough", ratio, peak_to_trough(hour_of_day(hours)), ROUNDING


# ------------------------------------------------------------------------------------------------------ BurstGPT part 3


def _part_3(trace: Trace, found: Characterization) -> Figures:
    table = trace.table
    yield from _counts(table, "classes", {"rows": "5,344,021", "ChatGPT": "4,553,782", "GPT-4": "790,239"})
    yield from _counts(table, "classes", {"api": "5,110,404", "conversation": "233,617"})
    ok = table.filter(~pl.col("failed"))
    published = {
        "api": (("457", "326", "794", "3,141", "125,591"), ("68.9", "14", "111", "804"), "0.183"),
        "conversation": (("953", "517", "2,354", "5,630", "71,197"), ("272", "187", "669", "1,067"), "0.438"),
    }
    levels = ("mean", "p50", "p90", "p99", "max")
    for service, (request, response, pearson) in published.items():
        rows = ok.filter(pl.col("service") == service)
        for name, numbers in (("request", request), ("response", response)):
            ordered = np.sort(rows[f"{name}_tokens"].to_numpy())
            told = dict(zip(levels, numbers, strict=False))
            yield from _sample("classes", f"{service}, {name} tokens", ordered, told, LOOSE)
        pair = rows.select(pl.corr("request_tokens", "response_tokens")).item() if len(rows) > 2 else None
        yield "classes", f"{service}, correlation", pearson, pair, LOOSE
    failed = {"all": "7.26 %", "conversation": "0.794 %", "api": "7.556 %", "ChatGPT": "7.735 %", "GPT-4": "4.518 %"}
    yield from _failures(table, failed)
    talk = found.total.conversations
    sessions: list[tuple[str, str, float | None]] = [
        ("sessions", "55,920", float(talk.sessions)),
        ("turns, mean", "4.18", talk.turns.mean),
        ("turns, p50", "2", talk.turns.p50),
        ("turns, p75", "4", talk.turns.p75),
        ("turns, p90", "9", talk.turns.p90),
        ("turns, p99", "31", talk.turns.p99),
        ("turns, max", "436", talk.turns.max),
        ("sessions of one request", "35.5 %", talk.single_share),
        ("silence, mean", "5,709", talk.gaps.mean),
        ("silence, p50", "131", talk.gaps.p50),
        ("silence, p90", "2,340", talk.gaps.p90),
        ("think time, p50", "124", talk.think.p50),
        ("first request, mean", "170", talk.first_request.mean),
        ("later requests, mean", "1,199", talk.later_request.mean),
        ("growth, mean", "187", talk.growth.mean),
        ("growth, p50", "125", talk.growth.p50),
        ("history resent", "60 %", talk.history_share),
        ("bursts at 600 s", "97,348", float(talk.bursts.n)),
        ("requests per burst", "2.4", talk.bursts.mean),
    ]
    for quantity, number, ours in sessions:
        yield "sessions", quantity, number, ours, LOOSE


# ------------------------------------------------------------------------------------------------- excerpts and others


def _head_418(trace: Trace, found: Characterization) -> Figures:
    one, talk = found.total, found.total.conversations
    yield from _lengths(one, {"mean": "615", "p50": "328", "p90": "1,134", "max": "25,085"}, "request_tokens")
    yield from _lengths(one, {"mean": "168", "p50": "98", "p90": "418"}, "response_tokens")
    figures: list[tuple[str, str, float | None]] = [
        ("requests", "418", float(found.requests)),
        ("gap, mean s", "102", one.gaps.mean),
        ("gap CV", "3.14", one.gaps.cv),
        ("sessions", "141", float(talk.sessions)),
        ("turns, mean", "2.96", talk.turns.mean),
        ("turns, max", "24", talk.turns.max),
        ("sessions of one request", "43 %", talk.single_share),
        ("silence, p50", "123", talk.gaps.p50),
        ("silence, p90", "1,447", talk.gaps.p90),
        ("growth, p50", "116", talk.growth.p50),
        ("shrinking follow-ups", "16 %", talk.shrinking_share),
        ("correlation", "0.18", one.correlation.pearson),
    ]
    for quantity, number, ours in figures:
        yield "conversations", quantity, number, ours, 0.005


def _azure(trace: Trace, found: Characterization) -> Figures:
    one, minute = found.total, found.total.length_time[0]
    request = {"mean": "1,155", "p50": "1,020", "p90": "2,735", "p99": "4,142", "max": "14,050"}
    yield from _lengths(one, request, "request_tokens")
    response = {"mean": "211", "p50": "129", "p90": "424", "p99": "601", "max": "1,000"}
    yield from _lengths(one, response, "response_tokens")
    index = dict(dispersion(trace.table["arrival"].to_numpy()))
    figures: list[tuple[str, str, float | None]] = [
        ("requests", "19,366", float(found.requests)),
        ("rate, 1/s", "5.53", found.rate),
        ("gap CV", "1.09", one.gaps.cv),
        ("dispersion at 1 s", "1.39", index.get(1.0)),
        ("dispersion at 10 s", "3.86", index.get(10.0)),
        ("dispersion at 60 s", "16.1", index.get(60.0)),
        ("dispersion at 300 s", "56.1", index.get(300.0)),
        ("Pearson correlation", "-0.11", one.correlation.pearson),
        ("Spearman correlation", "0.07", one.correlation.spearman),
        ("count against mean length, 60 s", "0.48", minute.correlation),
        ("CV of tokens per 60 s", "0.348", minute.cv),
    ]
    for quantity, number, ours in figures:
        yield "arrivals", quantity, number, ours, 0.002


def _mooncake(trace: Trace, found: Characterization) -> Figures:
    one = found.total
    five_minutes = next(point for point in one.length_time if point.scale == 300)
    request = {"mean": "12,035", "p50": "6,909", "p90": "27,367", "p99": "85,401", "max": "126,195"}
    yield from _lengths(one, request, "request_tokens")
    yield from _lengths(one, {"mean": "343", "p50": "350", "p90": "597", "max": "2,000"}, "response_tokens")
    figures: list[tuple[str, str, float | None]] = [
        ("requests", "12,031", float(found.requests)),
        ("gap CV, ticks left in", "3.03", one.gaps.cv),
        ("distinct blocks", "182,790", float(one.prefixes.distinct)),
        ("blocks that an infinite cache hits", "36.6 %", one.prefixes.hit_share),
        ("CV of tokens per 300 s", "0.033", five_minutes.cv),
        ("count against mean length, 300 s", "-0.94", five_minutes.correlation),
    ]
    for quantity, number, ours in figures:
        yield "trace", quantity, number, ours, ROUNDING


def _lengths(stream: Stream, published: dict[str, str], side: str) -> Figures:
    for level, number in published.items():
        ours = getattr(getattr(stream, side), level)
        yield "lengths", f"{side.replace('_', ' ')}, {level}", number, ours, 0.005


_KNOWN: "dict[str, Callable[[Trace, Characterization], Figures]]" = {
    "a059a18d2be0a877a9db39c85dc8e695440bcc8e737495e3e42f8901afc10b55": _head_418,
    "2f1e5b666d4e3055fdbba98598ce2ec307767b9064e03e2fa46676dbcc7d0bf8": _azure,
    "b8cbb061a85206d729d91cdc2981f43c9e0d99209dce588d3af5f7934408b9df": _mooncake,
}


# ----------------------------------------------------------------------------------------------------------- quantities


def _counts(table: pl.DataFrame, section: str, published: dict[str, str]) -> Figures:
    for name, number in published.items():
        ours = len(table) if name == "rows" else len(table.filter(_named(name)))
        yield section, name if name == "rows" else f"{name} rows", number, float(ours), ROUNDING


def _failures(table: pl.DataFrame, published: dict[str, str]) -> Figures:
    for name, number in published.items():
        rows = table if name == "all" else table.filter(_named(name))
        yield "failures", f"{name}, failed", number, rows["failed"].mean(), ROUNDING  # type: ignore[misc]


def _named(name: str) -> pl.Expr:
    return pl.col("service" if name in ("api", "conversation") else "model") == name


def _sum(table: pl.DataFrame, column: str) -> float:
    return float(table[column].cast(pl.Int64).sum())


def _sample(
    section: str, name: str, ordered: np.ndarray, published: dict[str, str], allowed: float = ROUNDING
) -> Figures:
    """Mean, maximum and quantiles (`p90`) of a sorted sample; quantiles of whole seconds or tokens by squall's rule."""
    for level, number in published.items():
        if ordered.size == 0:
            ours = None
        elif level == "mean":
            ours = float(ordered.mean())
        elif level == "max":
            ours = float(ordered[-1])
        else:
            ours = float(ordered[position(float(level[1:]) / 100, ordered.size)])
        yield section, f"{name}, {level}", number, ours, allowed
