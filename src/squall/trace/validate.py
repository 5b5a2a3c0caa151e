"""Everything that is wrong or odd with a trace file, with row numbers."""

import hashlib
from pathlib import Path

import msgspec
import polars as pl

from squall.trace.catalogue import known_by_file_name, known_by_hash
from squall.trace.files import examine
from squall.trace.formats import Finding, Parsed, Severity, finding_at

LONG_REQUEST = 1_000_000
"""Prompts above this are beyond the context of any served model today (tokens)."""
LONG_CONTEXT = 32_768
"""Prompts above this do not fit into many served models (tokens)."""
LONG_SILENCE = 3600.0

BURSTGPT_PARTS = {1: 5.0, 2: 5_270_414.0, 3: 19_440_110.0}
"""The first second of each published part on BurstGPT's clock (of part 2: of its form without failures)."""


class Validation(msgspec.Struct, kw_only=True, frozen=True):
    """What `validate` found. `ok` means that every verb will take the file."""

    source: str
    format: str
    sha256: str
    rows: int
    ok: bool
    findings: list[Finding]


def validate(source: str | Path, *, format: str | None = None, columns: str | None = None) -> Validation:
    """All findings in a trace file, errors first. Raises InputError only if the file is not a trace at all."""
    parsed, form, data = examine(source, format, columns)
    sha256 = hashlib.sha256(data).hexdigest()
    findings = parsed.findings + _origin(source, form.name, sha256, parsed) + _spelling(data) + _oddities(parsed)
    if parsed.columns.is_empty():
        findings.append(
            Finding(severity="error", code="no-rows", message="there is no request in it, only a header", count=0)
        )
    order = {"error": 0, "warning": 1, "info": 2}
    return Validation(
        source=str(source),
        format=form.name,
        sha256=sha256,
        rows=len(parsed.columns),
        ok=not any(finding.severity == "error" for finding in findings),
        findings=sorted(findings, key=lambda finding: order[finding.severity]),
    )


def _oddities(parsed: Parsed) -> list[Finding]:
    """What is legal and yet worth knowing before the numbers are believed."""
    table = parsed.columns
    if table.is_empty():
        return []
    request, response, arrival = table["request_tokens"], table["response_tokens"], table["arrival"]
    gap = arrival.diff()
    checks: list[tuple[Severity, str, str, pl.Series]] = [
        ("warning", "out-of-order", "earlier than the row before; readers sort by time, ties in file order", gap < 0),
        (
            "warning",
            "no-prompt",
            "0 request tokens and yet a response; it cannot be sent",
            (request == 0) & (response > 0),
        ),
        (
            "warning",
            "very-long-request",
            f"more than {LONG_REQUEST:,} request tokens; no served model takes it",
            request > LONG_REQUEST,
        ),
        ("info", "failed", "failed in the recorded system (0 response tokens)", response == 0),
        (
            "info",
            "failed-without-length",
            "failed, and the prompt's length is unknown (0/0); it cannot be sent",
            (response == 0) & (request == 0),
        ),
        (
            "info",
            "duplicate",
            "copy of another row, word for word; duplicates are data and are kept",
            _duplicates(table),
        ),
        ("info", "silence", f"begins after a silence of more than {LONG_SILENCE / 3600:g} h", gap > LONG_SILENCE),
        ("info", "tie", "same time as the row before; the file's order is kept (--ties decides)", gap == 0),
        (
            "info",
            "long-context",
            f"more than {LONG_CONTEXT:,} request tokens; nothing is clipped unless --max-request-tokens says so",
            (request > LONG_CONTEXT) & (request <= LONG_REQUEST),
        ),
    ]
    if "elapsed" in table.columns:
        whole = not (table["elapsed"] % 1 != 0).any()
        if whole:
            checks.append(("info", "elapsed-zero", "0 s elapsed, which means less than 1 s", table["elapsed"] == 0))
        checks.append(("info", "elapsed-missing", "the elapsed time is not recorded", table["elapsed"].is_null()))
    if parsed.total_tokens is not None:
        checks.append(
            (
                "warning",
                "wrong-total",
                "'Total tokens' is not the sum of request and response",
                parsed.total_tokens != request + response,
            )
        )
    found = [finding_at(severity, code, message, mask) for severity, code, message, mask in checks if mask.any()]
    return found + _sessions(parsed) + _prefixes(table)


def _origin(source: str | Path, form: str, sha256: str, parsed: Parsed) -> list[Finding]:
    """Which published file this is, or that it only looks like one; with or without its failures."""
    findings = []
    known, named = known_by_hash(sha256), known_by_file_name(Path(str(source)).name)
    if known is not None:
        findings.append(_whole("info", "published-file", f"byte for byte the published {known.name}: {known.title}"))
    elif named is not None:
        message = (
            f"has the name of {named.name} but not its sha256: an excerpt, an edited or older file, or a synthetic "
            "look-alike (`squall fetch` brings the real one)"
        )
        findings.append(_whole("warning", "not-the-published-file", message))
    if form != "burstgpt" or parsed.columns.is_empty():
        return findings
    failed = parsed.columns["response_tokens"] == 0
    if failed.any():
        share = int(failed.sum()) / len(failed)
        message = f"the raw form: {share:.2%} of the requests failed; do not join it with the form without failures"
        findings.append(_whole("info", "raw", message))
    else:
        findings.append(_whole("info", "without-failures", "no request failed, or the failures were removed"))
    arrival = parsed.columns["arrival"]
    first, last = arrival.min(), arrival.max()
    for part, begin in BURSTGPT_PARTS.items():
        if first == begin and last is not None and last - begin < 86400:  # type: ignore[operator]
            message = (
                f"the first rows of part {part}, less than a day, and no sample of the whole (part 1 begins with a "
                "night of conversations; its API floods begin on day 9)"
            )
            findings.append(_whole("info", "head-only", message))
    return findings


def _spelling(data: bytes) -> list[Finding]:
    """How the text is written, where that trips other readers; squall takes it all the same."""
    if data[:4] == b"PAR1":
        return []
    checks = (
        ("byte-order-mark", "begins with a UTF-8 byte-order mark", data.startswith(b"\xef\xbb\xbf")),
        ("crlf", "lines end in CRLF", b"\r\n" in data[:4096]),
        ("no-last-newline", "the last line has no line end; is the file whole?", not data.endswith(b"\n")),
    )
    return [_whole("info", code, message) for code, message, holds in checks if holds]


def _sessions(parsed: Parsed) -> list[Finding]:
    """What kind of names the sessions have, and where a conversation's request is shorter than the one before it."""
    table = parsed.columns
    if parsed.session_kind is None or "session" not in table.columns:
        return []
    kinds = {"uuid": "UUIDs", "number": "numbers", "text": "text"}
    known = table["session"].drop_nulls()
    share = f"{len(known) / len(table):.1%} of the rows"
    message = f"{known.n_unique():,} sessions named by {kinds[parsed.session_kind]}, on {share}"
    found = [_whole("info", f"{parsed.session_kind}-sessions", message)]
    shorter = table.select(
        ((pl.col("request_tokens").diff() < 0).over("session") & pl.col("session").is_not_null()).fill_null(False)
    ).to_series()
    if shorter.any():
        message = "shorter than the request before it in its session (cut, edited or another model)"
        found.append(finding_at("info", "shrinking-session", message, shorter))
    return found


def _prefixes(table: pl.DataFrame) -> list[Finding]:
    if "prefix" in table.columns and table["prefix"].null_count() < len(table):
        return []
    return [_whole("info", "no-prefixes", "no block hashes of the prompts: prefix reuse can at most be bounded")]


def _whole(severity: Severity, code: str, message: str) -> Finding:
    """A finding about the file as a whole."""
    return Finding(severity=severity, code=code, message=message, count=0)


def _duplicates(table: pl.DataFrame) -> pl.Series:
    return ~table.drop("prefix", strict=False).select(pl.struct(pl.all()).is_first_distinct()).to_series()
