"""Traces of one JSON object a line: Mooncake (times in ms, block hashes), RAGPulse (times in s as text, sessions)."""

import math
from typing import TypeVar

import msgspec
import polars as pl

from squall.trace.formats.rows import LARGEST_COUNT, Finding, Parsed, numbered_sessions
from squall.trace.table import SCHEMA, TraceMeta

MOONCAKE_ATTRIBUTION = "Mooncake FAST'25 trace release, https://github.com/kvcache-ai/Mooncake, Apache-2.0."
RAGPULSE_ATTRIBUTION = "RAGPulse (Wang et al., arXiv 2511.12979), https://github.com/flashserve/RAGPulse, MIT."

MOONCAKE_BLOCK = 512
RAGPULSE_MIDNIGHT = 12 * 3600.0
"""RAGPulse counts its seconds from noon of its first day."""


class MooncakeLine(msgspec.Struct):
    """One request; equal `hash_ids` are equal blocks of 512 prompt tokens, counted from the prompt's begin."""

    timestamp: float  # ms
    input_length: int
    output_length: int
    hash_ids: list[int] | None = None
    session_id: str | int | None = None


class RagpulseLine(msgspec.Struct):
    """One request. Its `hash_ids` name pieces (system prompt, passages, ...) of unequal length, not blocks."""

    timestamp: str | float  # s
    input_length: int
    output_length: int
    session_id: str | int | None = None


_Line = TypeVar("_Line", MooncakeLine, RagpulseLine)


def parse_mooncake(data: bytes) -> Parsed:
    """One JSON object a line, times in ms; `hash_ids` name the prompt's 512-token blocks, equal ids mean equal text."""
    rows, numbers, findings = _decoded(data, MooncakeLine)
    arrival = [row.timestamp / 1e3 for row in rows]
    odd = [
        number
        for number, row in zip(numbers, rows, strict=True)
        if row.hash_ids is not None and len(row.hash_ids) != -(-row.input_length // MOONCAKE_BLOCK)
    ]
    if odd:
        message = f"the number of hash_ids is not input_length / {MOONCAKE_BLOCK} rounded up"
        findings.append(Finding(severity="warning", code="block-count", message=message, count=len(odd), rows=odd[:10]))
    meta = {
        "licence": "Apache-2.0",
        "attribution": MOONCAKE_ATTRIBUTION,
        "block_size": MOONCAKE_BLOCK,
        "clock": min(arrival, default=0.0),
    }
    parsed = _parsed(rows, arrival, findings, meta)
    prefix = pl.Series("prefix", [row.hash_ids for row in rows], dtype=SCHEMA["prefix"])
    parsed.columns = parsed.columns.with_columns(prefix)
    return parsed


def parse_ragpulse(data: bytes) -> Parsed:
    """One JSON object a line, times in whole seconds (as text) from noon of the first day, with sessions."""
    rows, _, findings = _decoded(data, RagpulseLine)
    arrival = [float(row.timestamp) for row in rows]
    clock = min(arrival, default=0.0)
    meta = {
        "licence": "MIT",
        "attribution": RAGPULSE_ATTRIBUTION,
        "clock": clock,
        "midnight": (RAGPULSE_MIDNIGHT + clock) % 86400,
        "notes": ["hash_ids name pieces of unequal length, not blocks, so they are not used as prefixes"],
    }
    if all(time == int(time) for time in arrival):
        meta["tick"] = 1.0
    return _parsed(rows, arrival, findings, meta)


def _decoded(data: bytes, kind: type[_Line]) -> tuple[list[_Line], list[int], list[Finding]]:
    """The lines that are right, their row numbers, and what is wrong with the others."""
    decode = msgspec.json.Decoder(kind).decode
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    rows: list[_Line] = []
    numbers: list[int] = []
    broken: dict[str, list[int]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = decode(line)
            if problem := _problem_of(record):
                broken.setdefault(problem, []).append(number)
                continue
            rows.append(record)
            numbers.append(number)
        except msgspec.DecodeError as error:
            what = str(error)
            if number == len(lines) and "truncated" in what:
                what = "the last line is half-written: cut it off or fetch the file again"
            broken.setdefault(what, []).append(number)
    findings = [
        Finding(severity="error", code="bad-line", message=text, count=len(at), rows=at[:10])
        for text, at in broken.items()
    ]
    return rows, numbers, findings


def _problem_of(record: MooncakeLine | RagpulseLine) -> str | None:
    for name in ("timestamp", "input_length", "output_length"):
        value = getattr(record, name)
        try:
            number = float(value)
        except ValueError:
            return f"{name} is {value[:40]!r}, which is not a number"
        if number < 0 or not math.isfinite(number):
            return f"{name} is {value}, which is negative or not finite"
        if name != "timestamp" and number > LARGEST_COUNT:
            return f"{name} is {value}, which is not a token count (a whole number below 2^31)"
    return None


def _parsed(rows: list[_Line], arrival: list[float], findings: list[Finding], meta: dict[str, object]) -> Parsed:
    columns = {
        "arrival": pl.Series(arrival, dtype=pl.Float64),
        "request_tokens": pl.Series([row.input_length for row in rows], dtype=pl.Int32),
        "response_tokens": pl.Series([row.output_length for row in rows], dtype=pl.Int32),
    }
    sessions = None
    if any(row.session_id is not None for row in rows):
        names = pl.Series([None if row.session_id is None else str(row.session_id) for row in rows], dtype=pl.String)
        columns["session"], sessions = numbered_sessions(names)
    return Parsed(pl.DataFrame(columns), findings, meta, session_names=sessions)


def mooncake_lines(table: pl.DataFrame, meta: TraceMeta, wide: bool) -> pl.DataFrame:
    """Times in ms on the source's clock, lengths, and the block hashes where they are known."""
    ms = ((table["arrival"] + meta.clock) * 1e3).round(3)
    whole = bool((ms == ms.round()).all())
    columns = {
        "timestamp": ms.cast(pl.Int64) if whole else ms,
        "input_length": table["request_tokens"],
        "output_length": table["response_tokens"],
    }
    if table["prefix"].null_count() < len(table):
        columns["hash_ids"] = table["prefix"]
    return pl.DataFrame(columns)


def ragpulse_lines(table: pl.DataFrame, meta: TraceMeta, wide: bool) -> pl.DataFrame:
    """Times in s as text, lengths and sessions."""
    seconds = (table["arrival"] + meta.clock).round(6)
    whole = bool((seconds == seconds.round()).all())
    columns = {
        "timestamp": (seconds.cast(pl.Int64) if whole else seconds).cast(pl.String),
        "input_length": table["request_tokens"],
        "output_length": table["response_tokens"],
        "session_id": table["session"].cast(pl.String),
    }
    return pl.DataFrame(columns)
