"""Everything that is wrong or odd with a trace file, with row numbers."""

import hashlib
from pathlib import Path

import msgspec
import polars as pl

from squall.trace.files import examine
from squall.trace.formats import Finding, Parsed, finding_at

LONG_REQUEST = 1_000_000
"""Prompts above this are beyond the context of any served model today (tokens)."""
LONG_SILENCE = 3600.0


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
    findings = parsed.findings + _oddities(parsed)
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
    checks: list[tuple[str, str, str, pl.Series]] = [
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
        ("info", "tie", "same time as the row before; the file's order is kept", gap == 0),
    ]
    if parsed.total_tokens is not None:
        checks.append(
            (
                "warning",
                "wrong-total",
                "'Total tokens' is not the sum of request and response",
                parsed.total_tokens != request + response,
            )
        )
    return [finding_at(severity, code, message, mask) for severity, code, message, mask in checks if mask.any()]  # type: ignore[arg-type]


def _duplicates(table: pl.DataFrame) -> pl.Series:
    return ~table.drop("prefix", strict=False).select(pl.struct(pl.all()).is_first_distinct()).to_series()
