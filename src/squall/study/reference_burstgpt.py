"""What is published about BurstGPT, beside squall's figures: the parts, and the excerpts and aggregates of them.

Figures come from the authors' release and figures (Wang et al., KDD 2025) and from independent full passes over the
released files. All parts share one clock; day 0 is a Wednesday.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from squall.characterize import Characterization
from squall.characterize.concurrency import gamma_windows
from squall.characterize.cycles import Hours, autocorrelation, hour_of_day, peak_to_trough
from squall.characterize.failures import clustering
from squall.characterize.lengths import request_response
from squall.characterize.summary import position
from squall.trace import Trace
from squall.trace.catalogue import CATALOGUE

ROUNDING, WHOLE, LOOSE, READ = 0.0, 0.005, 0.02, 0.1
"""Shares by which a figure may differ: its rounding; 0.5 % where a mean was rounded to whole numbers; 2 % where the
quantile rule or the rows are not known; and 10 % where it was read off a chart."""
HOUR, DAY = 3600, 86_400
LONG_GAP = 3600.0


class Figure(NamedTuple):
    """One published figure and ours."""

    section: str
    quantity: str
    published: str
    """As printed: a number, a share (`7.26 %`) or a range (`500 – 1,500`)."""
    ours: float | None
    allowed: float | None = ROUNDING
    """The share that it may differ by beyond its rounding; None: not judged, because its definition is not known."""


Figures = Iterator[Figure]


# --------------------------------------------------------------------------------------------------------------- parts


def part_1(trace: Trace, found: Characterization) -> Figures:
    """All of part 1, failures included."""
    table = trace.table
    yield from _file(trace, "5", "5,269,973", ("burstgpt-1", "burstgpt-1-git"))
    yield from _counts(table, "whole file", {"rows": "1,429,737", "ChatGPT": "1,210,109", "GPT-4": "219,628"})
    yield from _counts(table, "whole file", {"api": "1,275,518", "conversation": "154,219"})
    request, response = _sum(table, "request_tokens"), _sum(table, "response_tokens")
    yield Figure("whole file", "request tokens, sum", "872,984,237", request)
    yield Figure("whole file", "response tokens, sum", "176,278,813", response)
    yield Figure("whole file", "rate, 1/s", "0.2713", found.rate)
    over_all = (request + response) / found.span if found.span else None
    yield Figure("whole file", "tokens/s over all time", "199", over_all, 0.005)
    minutes = _minutes(trace)
    yield Figure("whole file", "tokens/s over non-empty minutes", "287.4", _mean(minutes), 0.001)
    yield Figure("whole file", "tokens/s of a minute, p99", "3,670.1", _quantile(minutes, 0.99), LOOSE)
    yield Figure("whole file", "tokens/s of a minute, peak", "7,310.6", float(minutes.max(initial=0)), 0.001)
    arrival = table["arrival"].to_numpy()
    gaps = np.sort(np.diff(arrival))
    yield from sample(
        "whole file", "gap, s", gaps, {"mean": "3.686", "p50": "1", "p95": "12", "p99": "52", "max": "15,240"}
    )
    yield Figure("whole file", "gap, standard deviation", "48.957", float(gaps.std()) if gaps.size else None)
    # The three readings of the densest minute are published by different hands and contradict each other.
    yield Figure("whole file", "densest 60 s, 1/s", "20.8", densest(arrival, 60) / 60, None)
    answered = arrival[~table["failed"].to_numpy()]
    yield Figure("whole file", "densest 60 s, answered requests", "1,136", float(densest(answered, 60)), None)
    yield Figure("whole file", "densest 72 s", "1,666", float(densest(arrival, 72)), None)
    groups, copies = duplicates(table)
    yield Figure("whole file", "rows that have copies, groups", "35,878", float(groups))
    yield Figure("whole file", "rows in these groups", "89,918", float(copies))
    head = table.head(59_999)
    yield from _counts(head, "first 59,999 rows", {"ChatGPT": "50,494", "GPT-4": "9,505"})
    yield from _counts(head, "first 59,999 rows", {"api": "32,262", "conversation": "27,737"})
    for name, numbers in (
        ("request", {"mean": "374.06", "p50": "74", "p90": "1,291", "p95": "1,697", "p99": "3,023", "max": "6,142"}),
        ("response", {"mean": "122.32", "p50": "14", "p90": "401", "p95": "510", "p99": "757", "max": "7,315"}),
    ):
        ordered = np.sort(head[f"{name}_tokens"].to_numpy())
        yield from sample("first 59,999 rows", f"{name} tokens", ordered, numbers, LOOSE)
    yield from _classes_of_part_1(table, found)
    clock = arrival + trace.meta.clock
    yield from hourly(
        {name: np.bincount((clock[rows] // HOUR).astype(int), minlength=1464) for name, rows in _services(table)}
    )
    failed = {"all": "1.780 %", "conversation": "5.519 %", "api": "1.327 %", "ChatGPT": "1.731 %", "GPT-4": "2.049 %"}
    yield from _failures(table, failed)
    lost = table.filter(pl.col("failed"))
    yield Figure("failures", "failed rows", "25,443", float(len(lost)))
    yield Figure("failures", "of these without request length", "25,427", float((lost["request_tokens"] == 0).sum()))
    bins = (clock // 300).astype(int)
    length = max(17_568, int(bins[-1]) + 1)
    yield from outages(
        np.bincount(bins, minlength=length), np.bincount(bins[table["failed"].to_numpy()], minlength=length)
    )
    yield from _charts(trace)


def part_2(trace: Trace, found: Characterization) -> Figures:
    """All of part 2, failures included; little is published about it."""
    table = trace.table
    yield from _file(trace, None, None, ("burstgpt-2",))
    yield Figure("whole file", "rows", "3,858,400", float(len(table)), 1.3e-5)
    yield Figure("failures", "all, failed", "1.92 %", found.failed_share)
    answered = table.filter(~pl.col("failed"))
    yield from _counts(answered, "answered", {"rows": "3,784,213", "ChatGPT": "3,696,864", "GPT-4": "87,349"})
    yield from _counts(answered, "answered", {"api": "3,704,768", "conversation": "79,445"})


def part_3(trace: Trace, found: Characterization) -> Figures:
    """All of part 3, failures included."""
    table = trace.table
    yield from _file(trace, "19,440,110", "28,943,983", ("burstgpt-3",))
    yield from _counts(table, "classes", {"rows": "5,344,021", "ChatGPT": "4,553,782", "GPT-4": "790,239"})
    yield from _counts(table, "classes", {"api": "5,110,404", "conversation": "233,617"})
    arrival = table["arrival"].to_numpy()
    clock = arrival + trace.meta.clock
    quarters = np.unique(clock // 900).size
    yield Figure("whole file", "15-minute bins with requests, of 10,560", "9,874", float(quarters))
    ok = table.filter(~pl.col("failed"))
    published = {
        "api": (
            ("457", "326", "794", "3,141", "125,591"),
            ("68.9", "14", "111", "804"),
            ("2.35", "0", "5", "39"),
            ("0.183", "0.54", "3.0"),
            ("0.67", "1.50", "5.22", "72.5 %", "11,683"),
        ),
        "conversation": (
            ("953", "517", "2,354", "5,630", "71,197"),
            ("272", "187", "669", "1,067"),
            ("7.00", "3", "16", "61"),
            ("0.438", "0.025", "34.8"),
            ("0.77", "0.92", "1.12", "29.7 %", "1,026"),
        ),
    }
    levels = ("mean", "p50", "p90", "p99", "max")
    for service, (request, response, elapsed, (pearson, rate, ratio), gap_cvs) in published.items():
        rows = ok.filter(_named(service))
        for name, numbers in (("request_tokens", request), ("response_tokens", response), ("elapsed", elapsed)):
            ordered = np.sort(rows[name].drop_nulls().to_numpy())
            told = dict(zip(levels, numbers, strict=False))
            about = "elapsed, s" if name == "elapsed" else name.replace("_", " ")
            yield from sample("classes", f"{service}, {about}", ordered, told, LOOSE)
        pair = rows.select(pl.corr("request_tokens", "response_tokens")).item() if len(rows) > 2 else None
        yield Figure("classes", f"{service}, correlation", pearson, pair, LOOSE)
        times = arrival[(table["service"] == service).to_numpy()]
        yield Figure("classes", f"{service}, rate, 1/s", rate, times.size / found.span if found.span else None)
        counts = np.bincount(((times + trace.meta.clock) // HOUR).astype(int) - int(clock[0] // HOUR))
        first = int(clock[0] // HOUR)
        daily = peak_to_trough(hour_of_day(_as_hours(counts, first)))
        yield Figure("classes", f"{service}, hour-of-day peak/trough", ratio, daily, LOOSE)
        yield from _short_windows(service, times, gap_cvs)
    for model, three in {"GPT-4": ("1,304", "427", "11"), "ChatGPT": ("785", "198", "2")}.items():
        rows = ok.filter(_named("conversation") & _named(model))
        for name, level, number in zip(
            ("request_tokens", "response_tokens", "elapsed"), ("mean", "mean", "p50"), three, strict=True
        ):
            ordered = np.sort(rows[name].drop_nulls().to_numpy())
            yield from sample(
                "classes", f"{model} conversation, {name.replace('_', ' ')}", ordered, {level: number}, LOOSE
            )
    long = table.select((pl.col("request_tokens") >= 32_000).mean()).item()
    yield Figure("classes", "requests of 32,000 tokens or more", "0.029 %", long, LOOSE)
    # Which rows and estimator the published distances are of is not known; the order of the families is the point.
    for side, lognormal, gamma in (("request", "0.127", "0.555"), ("response", "0.194", "0.479")):
        fits = {fit.family: fit.ks for fit in getattr(found.total, f"{side}_tokens").fits}
        yield Figure("classes", f"{side} tokens, KS of the lognormal", lognormal, fits.get("lognormal"), None)
        yield Figure("classes", f"{side} tokens, KS of the Gamma", gamma, fits.get("gamma"), None)
    failed = {"all": "7.26 %", "conversation": "0.794 %", "api": "7.556 %", "ChatGPT": "7.735 %", "GPT-4": "4.518 %"}
    yield from _failures(table, failed)
    yield Figure("failures", "failed rows", "387,963", float(table["failed"].sum()))
    yield from _sessions(table, found)


def without_failures(trace: Trace, found: Characterization) -> Figures:
    """The cleaned form of a part."""
    published = {
        1: ("1,404,294", "1,189,167", "215,127", "1,258,587", "145,707", "29,665", "7,315", "15,240", "49"),
        2: ("3,784,213", "3,696,864", "87,349", "3,704,768", "79,445", "31,407", "12,472", "37,133", "60"),
        3: ("4,956,058", "4,201,522", "754,536", "4,724,297", "231,761", "125,591", "5,383", "18,872", "57"),
    }  # fmt: skip
    clocks = {1: ("5", "5,269,973"), 2: ("5,270,414", "10,454,395"), 3: ("19,440,110", "28,943,983")}
    distinct = {2: ("3,695,526", "1,106,930,193"), 3: ("4,805,535", "2,921,256,052")}
    table, part = trace.table, part_of(trace)
    rows, chat, gpt4, api, talk, request, response, gap, silences = published[part]
    yield from _file(trace, *clocks[part], (f"burstgpt-{part}-without-fails",))
    yield from _counts(table, "whole file", {"rows": rows, "ChatGPT": chat, "GPT-4": gpt4})
    yield from _counts(table, "whole file", {"api": api, "conversation": talk})
    yield Figure("whole file", "request tokens, max", request, float(table["request_tokens"].max() or 0))  # type: ignore[arg-type]
    yield Figure("whole file", "response tokens, max", response, float(table["response_tokens"].max() or 0))  # type: ignore[arg-type]
    gaps = np.diff(table["arrival"].to_numpy())
    yield Figure("whole file", "gap, max", gap, float(gaps.max(initial=0)))
    yield Figure("whole file", "gaps above 1 h", silences, float((gaps > LONG_GAP).sum()))
    if part in distinct:
        single = table.drop("turn", "prefix").unique()
        yield Figure("whole file", "different rows", distinct[part][0], float(len(single)), LOOSE)
        tokens = _sum(single, "request_tokens") + _sum(single, "response_tokens")
        yield Figure("whole file", "tokens of the different rows", distinct[part][1], tokens, LOOSE)


def part_of(trace: Trace) -> int:
    """Which part of BurstGPT a trace is of, by its clock; 0 if of none."""
    clock = trace.meta.clock
    return 1 if clock < 5_270_000 else 2 if clock < 10_454_400 else 3 if clock >= 19_440_000 else 0


def _file(trace: Trace, first: str | None, last: str | None, names: tuple[str, ...]) -> Figures:
    """Whether these are the published bytes, and the clock."""
    hashes = {file.sha256 for name in names for file in CATALOGUE[name].files}
    yield Figure("file", "published sha256 (1: yes)", "1", float(trace.meta.sha256 in hashes))
    arrival = trace.table["arrival"]
    if first and last:
        yield Figure("file", "first second", first, trace.meta.clock + float(arrival[0]))
        yield Figure("file", "last second", last, trace.meta.clock + float(arrival[-1]))
    falls = any("earlier than the row before" in note for note in trace.meta.notes)
    yield Figure("file", "times that fall (0: none)", "0", float(falls))


def _classes_of_part_1(table: pl.DataFrame, found: Characterization) -> Figures:
    published = {
        ("ChatGPT", "api"): ("77.4 %", "1,090,000", "218", "2,161", "221", "3,403", "26", "187", "1,628", "1.4 %"),
        ("GPT-4", "api"): ("11.8 %", "167,000", "460", "1,105", "466", "2,813", "40", "1,038", "1,350", "1.0 %"),
        ("ChatGPT", "conversation"): ("7.2 %", "97,000", "481", "1,664", "533", "2,481", "229", "543", "952", "5.5 %"),
        ("GPT-4", "conversation"): ("3.6 %", "48,000", "520", "1,843", "576", "3,504", "240", "549", "954", "5.5 %"),
    }
    for (model, service), (share, good, in50, in90, ok50, in99, out50, out90, out99, failed) in published.items():
        rows = table.filter(_named(model) & _named(service))
        name, ok = f"{model} {service}", rows.filter(~pl.col("failed"))
        yield Figure("classes", f"{name}, share", share, len(rows) / len(table))
        yield Figure("classes", f"{name}, answered", good, float(len(ok)), 0.011)
        every = np.sort(rows["request_tokens"].to_numpy())
        yield from sample(
            "classes", f"{name}, request tokens with failed rows", every, {"p50": in50, "p90": in90}, LOOSE
        )
        answered = np.sort(ok["request_tokens"].to_numpy())
        yield from sample("classes", f"{name}, request tokens", answered, {"p50": ok50, "p99": in99}, LOOSE)
        answers = np.sort(ok["response_tokens"].to_numpy())
        numbers = {"p50": out50, "p90": out90, "p99": out99}
        yield from sample("classes", f"{name}, response tokens", answers, numbers, LOOSE)
        yield Figure("classes", f"{name}, failed", failed, 1 - len(ok) / len(rows) if len(rows) else None)
        if model == "ChatGPT":
            rate = "0.210" if service == "api" else "0.0195"
            yield Figure("classes", f"{name}, rate, 1/s", rate, len(rows) / found.span if found.span else None, 0.005)


def _short_windows(service: str, times: np.ndarray, published: tuple[str, ...]) -> Figures:
    """CV of the gaps, as recorded, in windows of 5 minutes; how many gaps a window needed is not published."""
    if times.size < 2:
        return
    cv = np.sort(gamma_windows(times, 300.0, minimum=20).cv)
    cv = cv[np.isfinite(cv)]
    for share, number in zip((0.1, 0.5, 0.9), published, strict=False):
        yield Figure(
            "classes", f"{service}, gap CV in 5 minutes, p{share * 100:.0f}", number, _quantile(cv, share), None
        )
    above = float((cv > 1).mean()) if cv.size else None
    yield Figure("classes", f"{service}, 5-minute windows with a CV above 1", published[3], above, None)
    yield Figure("classes", f"{service}, such windows (20 gaps or more)", published[4], float(cv.size), None)


def _sessions(table: pl.DataFrame, found: Characterization) -> Figures:
    talk = found.total.conversations
    sessions: list[tuple[str, str, float | None]] = [
        ("sessions", "55,920", float(talk.sessions)),
        ("requests", "233,617", float(talk.requests)),
        ("turns, mean", "4.18", talk.turns.mean),
        ("turns, p50", "2", talk.turns.p50),
        ("turns, p75", "4", talk.turns.p75),
        ("turns, p90", "9", talk.turns.p90),
        ("turns, p99", "31", talk.turns.p99),
        ("turns, max", "436", talk.turns.max),
        ("silences", "177,697", float(talk.gaps.n)),
        ("silence, mean", "5,709", talk.gaps.mean),
        ("silence, p10", "20", talk.gaps.p10),
        ("silence, p25", "42", talk.gaps.p25),
        ("silence, p50", "131", talk.gaps.p50),
        ("silence, p75", "533", talk.gaps.p75),
        ("silence, p90", "2,340", talk.gaps.p90),
        ("silence, p99", "78,903", talk.gaps.p99),
        ("think time, p50", "124", talk.think.p50),
        ("first request, mean", "170", talk.first_request.mean),
        ("later requests, mean", "1,199", talk.later_request.mean),
        ("growth, mean", "187", talk.growth.mean),
        ("growth, p10", "-124", talk.growth.p10),
        ("growth, p50", "125", talk.growth.p50),
        ("history resent", "60 %", talk.history_share),
        ("bursts at 600 s", "97,348", float(talk.bursts.n)),
        ("bursts a day", "885", talk.bursts.n / 110),
        ("requests per burst", "2.4", talk.bursts.mean),
    ]
    for quantity, number, ours in sessions:
        yield Figure("sessions", quantity, number, ours, LOOSE)
    shares = ("35.5", "20.4", "11.9", "7.6", "5.1", "3.7", "2.8", "2.1", "1.8", "1.3")
    for turns, (number, ours) in enumerate(zip(shares, talk.turns_shares, strict=False), 1):
        yield Figure("sessions", f"sessions of {turns} request{'s' * (turns > 1)}", f"{number} %", ours)
    rows = table.filter(pl.col("session").is_not_null()).sort("session", maintain_order=True)
    if rows.is_empty():
        return
    session, arrival = rows["session"].to_numpy(), rows["arrival"].to_numpy()
    same, gap = np.diff(session) == 0, np.diff(arrival)
    log = np.log(gap[same & (gap > 0)])
    yield Figure("sessions", "silence, mean of the logarithm", "5.18", float(log.mean()) if log.size else None, LOOSE)
    yield Figure("sessions", "silence, sd of the logarithm", "1.96", float(log.std()) if log.size else None, LOOSE)
    begins = np.flatnonzero(np.concatenate([[True], ~same | (gap > 600)]))
    bursts = np.sort(np.diff(begins, append=session.size))
    for share, number in ((0.99, "14"), (0.995, "18"), (0.99975, "61")):
        yield Figure("sessions", f"requests per burst, p{100 * share:g}", number, _quantile(bursts, share), 0.06)


# -------------------------------------------------------------------------------------------------------------- charts


def _charts(trace: Trace) -> Figures:
    """Read off the charts of the authors' repository, which show part 1. Their boxes agree with working days only."""
    table = trace.table
    clock = table["arrival"].to_numpy() + trace.meta.clock
    hours = (clock // HOUR).astype(int)
    days = max(61, int(hours[-1]) // 24 + 1)
    weekend = np.isin(np.arange(days) % 7, (3, 4))
    tokens = {side: table[f"{side}_tokens"].to_numpy() for side in ("request", "response")}
    maps = {
        ("ChatGPT", "conversation"): ("1,700 – 2,900", "700 – 1,300"),
        ("GPT-4", "conversation"): ("600 – 1,500", "250 – 700"),
    }
    boxes = {
        ("ChatGPT", "conversation"): (
            {0: 45, 10: 160, 12: 65, 15: 185, 18: 75, 20: 115, 23: 75},
            "5",
            ("120,000", "47,000"),
        ),
        ("GPT-4", "conversation"): ({0: 25, 10: 67, 12: 27, 15: 85, 23: 45}, "4", ("65,000", "21,000")),
    }
    for model, service in (
        ("ChatGPT", "conversation"),
        ("GPT-4", "conversation"),
        ("ChatGPT", "api"),
        ("GPT-4", "api"),
    ):
        rows = (table["model"] == model).to_numpy() & (table["service"] == service).to_numpy()
        name = f"{model} {service}"
        by_hour = np.bincount(hours[rows], minlength=24 * days)[: 24 * days].reshape(days, 24)
        daily = by_hour.sum(1)
        if service == "api":
            full, busy = ("28,000", (500, 1500)) if model == "ChatGPT" else ("12,000", (50, 450))
            # The colour scale ends at 28,000.
            yield Figure("charts", f"{name}, requests of the fullest day", full, float(daily.max()), None)
            medians = [float(np.median(column[column > 0])) for column in by_hour.T if column.any()]
            about = f"{busy[0]} – {busy[1]:,}"
            for word, choice in (("least", min), ("most", max)):
                ours = choice(medians, default=0.0)
                yield Figure(
                    "charts", f"{name}, {word} median of an hour of the day, hours with requests", about, ours, None
                )
            continue
        for word, part, number in zip(("working", "weekend"), (~weekend, weekend), maps[model, service], strict=True):
            yield Figure(
                "charts", f"{name}, requests of a {word} day, median", number, float(np.median(daily[part])), READ
            )
        at, night, peaks = boxes[model, service]
        median = np.median(by_hour[~weekend], axis=0)
        for hour, requests in at.items():
            # Two hours that were read as one; whole requests of small counts are not told apart on the chart.
            ours = float(median[hour : hour + 1 + (hour in (10, 15))].mean())
            allowed = max(READ, 6 / requests)
            yield Figure("charts", f"{name}, requests at {hour} h, median", str(requests), ours, allowed)
        yield Figure("charts", f"{name}, requests at 4 to 7 h, median", night, float(median[4:8].mean()), 1.0)
        for side, number in zip(("request", "response"), peaks, strict=True):
            sums = np.bincount(hours[rows], tokens[side][rows], 24 * days)[: 24 * days].reshape(days, 24)
            ours = float(np.median(sums[~weekend][:, 15:17]))
            yield Figure("charts", f"{name}, {side} tokens an hour at 15 to 16 h, median", number, ours, READ)
    yield from _bands(table)


def _bands(table: pl.DataFrame) -> Figures:
    """Responses by request length in conversations, within 10 % of a length; and the slope above 400 tokens."""
    answered = table.filter(_named("conversation") & ~pl.col("failed"))
    read = {"ChatGPT": ("250 – 290", "80 – 100", "450"), "GPT-4": ("250 – 290", "300 – 350", "400")}
    for model, medians in read.items():
        rows = answered.filter(_named(model))
        for length, number in zip((30, 100, 2000), medians, strict=True):
            near = np.sort(rows.filter(_near(length))["response_tokens"].to_numpy())
            quantity = f"{model} conversation, median response to {length:,} tokens"
            yield Figure("charts", quantity, number, _quantile(near, 0.5), 2 * READ)
    for length, low, high in ((300, "10", "360"), (2000, "190", "720")):
        near = np.sort(answered.filter(_near(length))["response_tokens"].to_numpy())
        for share, number in ((0.05, low), (0.95, high)):
            quantity = f"conversation, p{100 * share:.0f} of the responses to {length:,} tokens"
            yield Figure("charts", quantity, number, _quantile(near, share), max(2 * READ, 15 / float(number)))
    sides = [answered[f"{side}_tokens"].to_numpy() for side in ("request", "response")]
    slope = request_response(*sides).slope if len(answered) else None
    yield Figure("charts", "conversation, slope of the response at 400 to 2,000 tokens", "0.18", slope, READ)


def _near(length: int) -> pl.Expr:
    return pl.col("request_tokens").is_between(0.9 * length, 1.1 * length)


# ------------------------------------------------------------------------------------------------------ hours and bins


def hourly(counts: dict[str, np.ndarray]) -> Figures:
    """From the requests of part 1 in each hour from the first midnight on, by service and of all."""
    published = {
        "conversation": ("105.3", "0.86", "446", "23", "16", "40", "78", "0.78", "0.80", "45.6"),
        "api": ("871.3", "2.60", "33,236", "9", "19", "636", "5,890", "0.06", "0.01", "11.3"),
        "all": ("976.6", "2.33", "33,344", "9", "19", "36", "5,322", "0.07", "0.02", "11.7"),
    }
    cycles = {
        "conversation": ("237.0", "5.2", "16", "6"),
        "api": ("1,662.3", "147.0", "12", "7"),
        "all": ("1,795.9", "153.3", "14", "7"),
    }
    for name, (mean, cv, most, day, hour, empty, index, acf_day, acf_week, ratio) in published.items():
        series = counts[name].astype(float)
        about = series.mean()
        fullest = int(series.argmax())
        yield Figure("hours", f"{name}, requests/h", mean, float(about))
        yield Figure("hours", f"{name}, CV per hour", cv, float(series.std() / about) if about else None)
        yield Figure("hours", f"{name}, fullest hour", most, float(series.max()))
        yield Figure("hours", f"{name}, day of the fullest hour", day, float(fullest // 24))
        yield Figure("hours", f"{name}, hour of the fullest hour", hour, float(fullest % 24))
        yield Figure("hours", f"{name}, empty hours", empty, float((series == 0).sum()))
        yield Figure("hours", f"{name}, dispersion at 1 h", index, _dispersion(series, 1), 0.007)
        yield Figure("hours", f"{name}, ACF at 24 h", acf_day, autocorrelation(series, 24))
        yield Figure("hours", f"{name}, ACF at 168 h", acf_week, autocorrelation(series, 168))
        cycle = hour_of_day(_as_hours(series))
        yield Figure("hours", f"{name}, hour-of-day peak/trough", ratio, peak_to_trough(cycle))
        for quantity, number, ours in zip(
            ("requests in the peak hour of the day", "in the trough", "the peak's hour", "the trough's hour"),
            cycles[name],
            (
                max(cycle, default=None),
                min(cycle, default=None),
                *(float(end(cycle)) for end in (np.argmax, np.argmin)),
            ),
            strict=True,
        ):
            yield Figure("hours", f"{name}, {quantity}", number, ours)
    yield from _shape(counts["conversation"].astype(float), counts["api"].astype(float))


def _shape(conversation: np.ndarray, api: np.ndarray) -> Figures:
    """Dispersion that grows with the scale, hours that hold most of the load, the first days, the working day."""
    dispersion = {1: "5,890", 3: "12,984", 6: "21,817", 12: "33,069", 24: "33,236"}
    for scale, number in dispersion.items():
        yield Figure("shape", f"api, dispersion at {scale} h", number, _dispersion(api, scale), 1e-4)
    yield Figure("shape", "api, ACF at 1 h", "0.68", autocorrelation(api, 1))
    yield Figure("shape", "api, empty hours from day 9 on, of 1,248", "464", float((api[216:] == 0).sum()))
    for name, series, top, number in (
        ("api", api, 0.01, "20.3 %"),
        ("api", api, 0.1, "64.9 %"),
        ("conversation", conversation, 0.1, "27.1 %"),
    ):
        fullest = np.sort(series)[::-1][: round(top * series.size)]
        share = float(fullest.sum() / series.sum()) if series.any() else None
        yield Figure("shape", f"{name}, requests in the fullest {top:.0%} of the hours", number, share)
    days = api[: api.size // 24 * 24].reshape(-1, 24).sum(1)
    first = ("14", "4", "1", "2", "1", "43", "246", "57", "975", "146,378", "89,828")
    for day, number in enumerate(first):
        yield Figure("shape", f"api, requests of day {day}", number, float(days[day]) if day < days.size else None)
    weekdays = np.arange(conversation.size // 24) % 7
    weekend = np.isin(weekdays, (3, 4))
    talks = conversation[: weekdays.size * 24].reshape(-1, 24)
    for hour, number in {6: "5.9", 10: "238", 12: "95", 16: "278", 21: "169"}.items():
        yield Figure("shape", f"conversation, working day at {hour} h", number, _mean(talks[~weekend][:, hour]), WHOLE)
    for rest, number in ((3, "1,367"), (4, "1,672")):
        yield Figure(
            "shape", f"conversation, days {rest} of the week", number, _mean(talks[weekdays == rest].sum(1)), WHOLE
        )


def outages(requests: np.ndarray, failed: np.ndarray) -> Figures:
    """From the requests of part 1 in each bin of 5 minutes from the first midnight on, and those that failed."""
    stretches = {
        "day 0": (slice(0, 259), ("3,014", "247", "98", "11", "2.0")),
        "flood of day 10": (slice(2888, 2957), ("73,124", "255", "5", "71", "300")),
    }
    for name, (bins, (every, lost, bad, most, dispersion)) in stretches.items():
        count, fails = requests[bins].astype(float), failed[bins].astype(float)
        found = clustering(count, fails)
        yield Figure("outages", f"{name}, requests", every, float(count.sum()))
        yield Figure("outages", f"{name}, failed", lost, float(fails.sum()))
        yield Figure("outages", f"{name}, 5-minute bins with failures", bad, float((fails > 0).sum()))
        yield Figure("outages", f"{name}, most failures of a bin", most, float(fails.max(initial=0)))
        yield Figure("outages", f"{name}, dispersion over binomial", dispersion, found.dispersion, LOOSE)
        if name == "day 0":
            yield Figure("outages", f"{name}, ACF of the failures at 5 min", "0.39", found.lag1_count)
            yield Figure("outages", f"{name}, correlation of share and count", "0.09", found.load_correlation)
            yield Figure("outages", f"{name}, empty bins", "55", float((count == 0).sum()))
        else:
            about = float(count.std() / count.mean()) if count.any() else None
            yield Figure("outages", f"{name}, mean requests of a bin", "1,060", _mean(count), 0.001)
            yield Figure("outages", f"{name}, CV of the counts", "0.20", about)


def minutes_and_days(found: dict[str, Any]) -> Figures:
    """From tokens/s per non-empty minute of days 0 to 6, tokens and requests per day, and requests by hour of day."""
    rates = np.array([one["tps"] for one in found["week1_min"]])
    tokens = sum(one["tok"] for one in found["daily"])
    yield Figure("minutes", "non-empty minutes of days 0 to 6, of 10,080", "6,366", float(rates.size))
    yield Figure("minutes", "of these with 0.0 tokens/s", "143", float((rates == 0).sum()))
    yield Figure("minutes", "tokens of all days", "1,049,263,050", float(tokens))
    yield Figure("minutes", "tokens/s over all time", "199", tokens / (61 * DAY), 0.005)
    requests = sum(one["req"] for one in found["daily"])
    yield Figure("minutes", "requests of all days", "1,429,737", float(requests))
    cycle = [float(one["rph"]) for one in found["hourly_avg"]]
    yield Figure("minutes", "hour-of-day peak/trough", "11.7", peak_to_trough(cycle))


def hours_of_azure(counts: np.ndarray) -> Figures:
    """From the requests of Azure's conversation service in each hour of six days of May 2024."""
    series = counts.astype(float)
    cycle = series.reshape(-1, 24).mean(0)
    yield Figure("hours", "requests", "24,732,434", float(series.sum()))
    yield Figure("hours", "requests/h", "171,753", float(series.mean()), 1e-5)
    yield Figure("hours", "CV per hour", "0.26", float(series.std() / series.mean()))
    yield Figure("hours", "emptiest hour", "75,636", float(series.min()))
    yield Figure("hours", "fullest hour", "269,237", float(series.max()))
    yield Figure("hours", "hour-of-day peak/trough", "1.82", peak_to_trough(cycle.tolist()))
    yield Figure("hours", "the peak's hour", "14", float(cycle.argmax()))
    yield Figure("hours", "the trough's hour", "22", float(cycle.argmin()))


# ------------------------------------------------------------------------------------------------------------ excerpts


def head_418(trace: Trace, found: Characterization) -> Figures:
    """The first 418 conversation requests of part 3."""
    one, talk = found.total, found.total.conversations
    yield from lengths(one.request_tokens, {"mean": "615", "p50": "328", "p90": "1,134", "max": "25,085"}, "request")
    yield from lengths(one.response_tokens, {"mean": "168", "p50": "98", "p90": "418"}, "response")
    arrival = trace.table["arrival"].to_numpy()
    clock = arrival + trace.meta.clock
    counts = np.bincount((clock // HOUR).astype(int) - int(clock[0] // HOUR))
    busy = np.argsort(counts)[::-1][:3] + int(clock[0] // HOUR)
    gaps = [np.diff(clock[clock // HOUR == hour]) for hour in busy]
    cvs = [float(gap.std() / gap.mean()) for gap in gaps]
    figures: list[tuple[str, str, float | None]] = [
        ("requests", "418", float(found.requests)),
        ("span, h", "11.82", found.span / HOUR),
        ("gap, mean s", "102", one.gaps.mean),
        ("gap CV", "3.14", one.gaps.cv),
        ("gap CV in the three busiest hours, least", "1.0 – 1.3", min(cvs)),
        ("gap CV in the three busiest hours, most", "1.0 – 1.3", max(cvs)),
        ("emptiest hour", "5", float(counts.min())),
        ("fullest hour", "151", float(counts.max())),
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
        yield Figure("conversations", quantity, number, ours, 0.005)


def first_30(trace: Trace, found: Characterization) -> Figures:
    """The first 30 rows of part 1."""
    table = trace.table
    lost = table.filter(pl.col("failed"))
    yield Figure("rows", "requests", "30", float(len(table)))
    yield Figure("rows", "first second", "5", trace.meta.clock)
    yield Figure("rows", "last second", "2,293", trace.meta.clock + found.span)
    yield Figure("rows", "gap, mean s", "78.9", found.total.gaps.mean)
    yield Figure("rows", "gap CV", "0.83", found.total.gaps.cv)
    yield Figure("rows", "failed", "1", float(len(lost)))
    yield Figure("rows", "second of the failure", "1,106", float(lost["arrival"][0]) + trace.meta.clock)
    yield from _counts(table, "rows", {"conversation": "30"})


def first_500(tokens: np.ndarray) -> Figures:
    """Request tokens of the first 500 rows of part 1, capped at 1,023; failed rows are 0."""
    yield Figure("lengths", "requests", "500", float(tokens.size))
    yield Figure("lengths", "at the cap", "96", float((tokens == 1023).sum()))
    yield Figure("lengths", "failed", "19", float((tokens == 0).sum()))
    yield from sample("lengths", "request tokens, capped", np.sort(tokens), {"mean": "430", "p50": "321"}, 0.001)


# ---------------------------------------------------------------------------------------------------------- quantities


def densest(arrival: np.ndarray, width: float) -> int:
    """The most of the sorted times (s) that lie in any half-open stretch of `width` s."""
    return int((np.searchsorted(arrival, arrival + width) - np.arange(arrival.size)).max(initial=0))


def duplicates(table: pl.DataFrame) -> tuple[int, int]:
    """Groups of rows that are alike in all that is recorded, and the rows in them."""
    groups = table.drop("turn", "prefix").group_by(pl.all()).len().filter(pl.col("len") > 1)
    return len(groups), int(groups["len"].sum())


def _minutes(trace: Trace) -> np.ndarray:
    """Tokens/s in each minute of the clock that has requests, ascending."""
    table = trace.table
    minute = ((table["arrival"].to_numpy() + trace.meta.clock) // 60).astype(int)
    tokens = table["request_tokens"].to_numpy().astype(float) + table["response_tokens"].to_numpy()
    occupied = np.bincount(minute) > 0
    return np.sort(np.bincount(minute, tokens)[occupied] / 60)


def _services(table: pl.DataFrame) -> Iterator[tuple[str, np.ndarray]]:
    for name in ("conversation", "api"):
        yield name, (table["service"] == name).to_numpy()
    yield "all", np.ones(len(table), bool)


def _as_hours(counts: np.ndarray, first: int = 0) -> Hours:
    nothing = np.zeros(counts.size)
    return Hours(first=first, requests=counts, request_tokens=nothing, response_tokens=nothing, covered=nothing + 1)


def _dispersion(hours: np.ndarray, scale: int) -> float | None:
    """Index of dispersion of hourly counts put together by `scale`."""
    counts = hours[: hours.size // scale * scale].reshape(-1, scale).sum(1)
    return float(counts.var() / counts.mean()) if counts.any() else None


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None


def _quantile(ordered: np.ndarray, share: float) -> float | None:
    return float(ordered[position(share, ordered.size)]) if ordered.size else None


def _counts(table: pl.DataFrame, section: str, published: dict[str, str]) -> Figures:
    for name, number in published.items():
        ours = len(table) if name == "rows" else len(table.filter(_named(name)))
        yield Figure(section, name if name == "rows" else f"{name} rows", number, float(ours))


def _failures(table: pl.DataFrame, published: dict[str, str]) -> Figures:
    for name, number in published.items():
        rows = table if name == "all" else table.filter(_named(name))
        yield Figure("failures", f"{name}, failed", number, rows["failed"].mean())  # type: ignore[arg-type]


def _named(name: str) -> pl.Expr:
    return pl.col("service" if name in ("api", "conversation") else "model") == name


def _sum(table: pl.DataFrame, column: str) -> float:
    return float(table[column].cast(pl.Int64).sum())


def sample(
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
            ours = _quantile(ordered, float(level[1:]) / 100)
        yield Figure(section, f"{name}, {level}", number, ours, allowed)


def lengths(found: object, published: dict[str, str], side: str) -> Figures:
    """Figures of a Summary of tokens."""
    for level, number in published.items():
        yield Figure("lengths", f"{side} tokens, {level}", number, getattr(found, level), 0.005)
