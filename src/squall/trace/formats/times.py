"""Times of day in text: ISO 8601 with up to 9 digits of fraction, with or without an offset from UTC; and those of
access logs (`26/Nov/2026:15:50:38 +0000`)."""

from typing import Any

import polars as pl

from squall.trace.formats.rows import Finding, finding_at, quote

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_OFFSET = r"\s*(?:Z|UTC|[+-]\d\d:?\d\d)$"


def wall_clock(text: pl.Series, name: str, findings: list[Finding]) -> tuple[pl.Series, dict[str, Any]]:
    """Seconds since the earliest of these times, and where that lies on the wall clock (epoch, midnight, weekday)
    and in nanoseconds of UTC.

    Times with different offsets are put on one clock; the wall clock is that of the earliest. What is no time becomes
    null and a finding for the column `name`.
    """
    plain = _as_iso(text).str.replace("T", " ", literal=True).str.replace(_OFFSET, "")
    stamp = plain.str.to_datetime("%Y-%m-%d %H:%M:%S%.f", time_unit="ns", strict=False)
    bad = stamp.is_null() & text.is_not_null() & (text != "")
    if bad.any():
        message = f"{name!r} is {quote(text, bad)}, which is not like 2023-11-16 18:15:46.6805900"
        findings.append(finding_at("error", "not-a-time", message, bad))
    if stamp.null_count() == len(stamp):
        return pl.Series([None] * len(text), dtype=pl.Float64), {}
    offset = _offset_of(text)
    utc = stamp.dt.timestamp("ns") - offset
    first = int(utc.arg_min() or 0)
    start = int(utc[first])
    wall = start + int(offset[first])
    clocks = {
        "utc": start,
        "epoch": wall,
        "midnight": (wall % (86400 * 10**9)) / 1e9,
        "weekday": (3 + wall // (86400 * 10**9)) % 7,  # 1970-01-01 was a Thursday
    }
    return (utc - start).cast(pl.Float64) / 1e9, clocks


def _as_iso(text: pl.Series) -> pl.Series:
    """`26/Nov/2026:15:50:38 +0000` as `2026-11-26 15:50:38 +0000`; anything else as it is."""
    if not text.str.contains("/", literal=True).any():
        return text
    dashed = text.str.replace(r"^(\d\d)/(\w{3})/(\d{4}):", "${3}-${2}-${1} ")
    return dashed.str.replace_many([f"-{name}-" for name in _MONTHS], [f"-{n:02}-" for n in range(1, 13)])


def _offset_of(text: pl.Series) -> pl.Series:
    """Nanoseconds by which each wall clock is ahead of UTC; 0 where none is written."""
    parts = text.str.extract_groups(r"([+-])(\d\d):?(\d\d)$").struct
    minutes = parts.field("2").cast(pl.Int64) * 60 + parts.field("3").cast(pl.Int64)
    sign = (parts.field("1") == "-").cast(pl.Int64) * -2 + 1
    return (minutes * sign * 60 * 10**9).fill_null(0)
