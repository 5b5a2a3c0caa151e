"""Requests as logs and tracers record them, one by one and often at their end: what their formats share.

Of such a log only times, lengths, names and outcomes are read: prompts and answers that it may hold stay in it. Beside
the Trace's columns it can have those of `ANSWER`, of which `squall capture --import` makes a Run.
"""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import msgspec
import polars as pl

from squall.errors import InputError
from squall.trace.formats.rows import LARGEST_COUNT, Finding, Parsed, Severity, numbered_sessions

ANSWER = {"first_token": pl.Float64, "http_status": pl.Int32, "cached_tokens": pl.Int32}
"""Seconds from arrival to first token, and what else a log may know of the answer; the columns of `Parsed` for it."""

_DAY = 86400 * 10**9


class Logged(msgspec.Struct, kw_only=True):
    """One request of a log."""

    start: int
    """Nanoseconds of Unix time."""
    elapsed: float | None = None
    request_tokens: int | None = None
    response_tokens: int | None = None
    failed: bool = False
    model: str | None = None
    session: str | None = None
    first_token: float | None = None
    http_status: int | None = None
    cached_tokens: int | None = None


class Found:
    """What a parser came across: message -> rows, for each kind of finding."""

    def __init__(self) -> None:
        self._rows: dict[tuple[Severity, str, str], list[int]] = {}

    def add(self, severity: Severity, code: str, message: str, row: int) -> None:
        """One more row (from 1) of which this is to be said."""
        self._rows.setdefault((severity, code, message), []).append(row)

    def count(self, code: str) -> int:
        """How many rows have a finding of this kind."""
        return sum(len(rows) for (_, known, _), rows in self._rows.items() if known == code)

    def findings(self) -> list[Finding]:
        """All of them, the first ten rows of each."""
        return [
            Finding(severity=severity, code=code, message=message, count=len(rows), rows=rows[:10])
            for (severity, code, message), rows in self._rows.items()
        ]


def checked(it: Logged, row: int, found: Found) -> Logged | None:
    """`it` with 0 for the lengths of a request that failed, or None and a finding if it cannot be read or counted."""
    for name in ("request_tokens", "response_tokens"):
        value = getattr(it, name)
        if value is not None and not 0 <= value <= LARGEST_COUNT:
            message = f"{name} is {value}, which is not a token count (a whole number below 2^31)"
            found.add("error", "bad-line", message, row)
            return None
    if it.elapsed is not None and it.elapsed < 0:
        found.add("error", "bad-line", f"it ends {-it.elapsed:g} s before it begins", row)
        return None
    if it.request_tokens is None or it.response_tokens is None:
        if not it.failed:
            found.add("warning", "no-usage", "succeeded without token counts, so it is left out", row)
            return None
        it.request_tokens, it.response_tokens = it.request_tokens or 0, 0
    if it.failed or it.response_tokens == 0:
        it.failed, it.response_tokens = True, 0
    return it


def parsed(requests: Iterable[Logged], found: Found, notes: list[str], **meta: Any) -> Parsed:
    """The requests in their order, on a clock that begins with the earliest of them (UTC)."""
    rows = list(requests)
    if not rows:
        left = found.count("no-usage")
        if left:
            raise InputError(
                f"none of the {left:,} requests in it has token counts; have them logged (streams report them only if "
                "asked, with stream_options.include_usage)"
            )
        findings = found.findings()
        if not findings:
            raise InputError("there is no request for generated text in it")
        return Parsed(_empty(), findings, {"notes": notes, **meta})
    left = found.count("no-usage")
    if left:
        notes.append(f"{left:,} requests that succeeded without token counts were left out")
    start = min(row.start for row in rows)
    names = pl.Series([row.session for row in rows], dtype=pl.String)
    numbers, sessions = numbered_sessions(names)
    columns = {
        "arrival": pl.Series([(row.start - start) / 1e9 for row in rows], dtype=pl.Float64),
        "request_tokens": pl.Series([row.request_tokens for row in rows], dtype=pl.Int32),
        "response_tokens": pl.Series([row.response_tokens for row in rows], dtype=pl.Int32),
        "failed": pl.Series([row.failed for row in rows], dtype=pl.Boolean),
        "model": pl.Series([row.model for row in rows], dtype=pl.String),
        "session": numbers,
        "elapsed": pl.Series([row.elapsed for row in rows], dtype=pl.Float64),
        **{name: pl.Series([getattr(row, name) for row in rows], dtype=kind) for name, kind in ANSWER.items()},
    }
    clocks = {
        "utc": start,
        "epoch": start,
        "midnight": start % _DAY / 1e9,
        "weekday": (3 + start // _DAY) % 7,  # 1970-01-01 was a Thursday
    }
    return Parsed(
        pl.DataFrame(columns),
        found.findings(),
        {**clocks, "notes": notes, **meta},
        session_names=None if sessions.is_empty() else sessions,
    )


def _empty() -> pl.DataFrame:
    return pl.DataFrame(schema={"arrival": pl.Float64, "request_tokens": pl.Int32, "response_tokens": pl.Int32})


def unix_time(value: Any) -> int:
    """Nanoseconds of Unix time, from seconds or an ISO time (UTC if it has no offset). Raises ValueError."""
    if isinstance(value, bool) or value is None:
        raise ValueError(f"{value!r} is no time")
    if isinstance(value, int | float):
        if not 0 <= value < 4e10:
            raise ValueError(f"{value!r} is no Unix time in seconds")
        return round(value * 1e9) if isinstance(value, float) else value * 10**9
    moment = datetime.fromisoformat(str(value))
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86400 + since.seconds) * 10**9 + since.microseconds * 1000


def as_count(value: Any) -> int | None:
    """A token count that may be a number or, as protocol buffers write 64-bit numbers in JSON, text; None if neither.

    Numbers out of range are kept, for `checked` to name.
    """
    if isinstance(value, str) and value.lstrip("-").isdecimal():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        return None
    return int(value)


def as_name(value: Any) -> str | None:
    """A short text, else None."""
    return value if isinstance(value, str) and 0 < len(value) <= 256 else None
