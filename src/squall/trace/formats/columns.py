"""Any CSV file, by a mapping of its columns: `arrival=ts,request_tokens=prompt,response_tokens=completion`."""

from functools import partial
from typing import Any

import polars as pl

from squall.errors import InputError
from squall.trace.formats.rows import (
    Finding,
    Format,
    Parsed,
    blank_to_null,
    finding_at,
    float_column,
    quote,
    read_csv,
    session_names,
    session_numbers,
    token_column,
)
from squall.trace.formats.times import wall_clock
from squall.trace.table import REQUIRED, SERVICES

_MAPPED = (*REQUIRED, "failed", "service", "model", "session", "elapsed")
_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def columns_format(mapping: str) -> Format:
    """The format of a CSV file whose columns `mapping` names: `COLUMN=NAME` for each column of the Trace table it has.

    Times are seconds or ISO times; `arrival=NAME:ms` (`:us`, `:ns`, also for elapsed) says otherwise. Raises
    InputError.
    """
    chosen: dict[str, str] = {}
    for part in mapping.split(","):
        column, equals, name = (text.strip() for text in part.partition("="))
        if not equals or not name:
            raise InputError(f"--columns {mapping}: {part.strip()!r} is not COLUMN=NAME, such as arrival=ts.")
        if column not in _MAPPED:
            raise InputError(f"--columns {mapping}: there is no column {column!r}; there are {', '.join(_MAPPED)}.")
        if column in chosen:
            raise InputError(f"--columns {mapping}: {column} is given twice.")
        chosen[column] = name
    missing = [name for name in REQUIRED if name not in chosen]
    if missing:
        raise InputError(f"--columns {mapping}: {missing[0]} is missing; a trace needs {', '.join(REQUIRED)}.")
    return Format("columns", "mapped CSV", "csv", (), partial(_parse_columns, chosen=chosen, mapping=mapping), None)


def _parse_columns(data: bytes, chosen: dict[str, str], mapping: str) -> Parsed:
    separator = _separator(data)
    header = [name.strip() for name in data.split(b"\n", 1)[0].decode("utf-8-sig", "replace").split(separator)]
    header = [name.strip('"') for name in header]
    names, units = {}, {}
    for column, name in chosen.items():
        plain, colon, unit = name.rpartition(":")
        if name not in header and colon and unit in _UNITS and column in ("arrival", "elapsed"):
            name, units[column] = plain, unit
        if name not in header:
            have = ", ".join(header[:12])
            raise InputError(f"--columns {mapping}: the file has no column {name!r}; it has {have}.")
        names[column] = name
    required = {names[column] for column in REQUIRED}
    frame, findings = read_csv(data, set(header) - required, separator)
    meta: dict[str, Any] = {"notes": [f"columns were mapped: {mapping}"]}
    columns: dict[str, pl.Series] = {}
    for column, name in names.items():
        if column == "arrival":
            columns[column], clocks = _arrival(frame, name, units.get(column), findings)
            meta |= clocks
        elif column == "elapsed":
            columns[column] = float_column(frame, name, findings) * _UNITS[units.get(column, "s")]
        elif column in ("request_tokens", "response_tokens"):
            columns[column] = token_column(frame, name, findings)
        elif column == "failed":
            columns[column] = _truth(frame[name], name, findings)
        elif column == "service":
            columns[column] = _service(frame[name], name, findings)
        elif column == "model":
            columns[column] = blank_to_null(frame[name])
        else:
            columns[column] = session_numbers(blank_to_null(frame[name]))
    sessions = session_names(blank_to_null(frame[names["session"]])) if "session" in names else None
    if "failed" in columns:
        # Failed where it says so, and, as everywhere, where there is no response.
        columns["failed"] = columns["failed"].fill_null(False) | (columns["response_tokens"] == 0).fill_null(False)
    return Parsed(pl.DataFrame(columns), findings, meta, session_names=sessions)


def _separator(data: bytes) -> str:
    """The separator of the header: a comma, unless another one occurs more often."""
    line = data.split(b"\n", 1)[0]
    return max((",", ";", "\t", "|"), key=lambda mark: line.count(mark.encode()))


def _arrival(
    frame: pl.DataFrame, name: str, unit: str | None, findings: list[Finding]
) -> tuple[pl.Series, dict[str, Any]]:
    """Seconds: numbers on the file's own clock, or ISO times from the earliest on, with their wall clock."""
    text = frame[name]
    known = text.filter(text.is_not_null() & (text != ""))
    # The first value decides, so that one wrong number is said to be wrong, and not the whole column to be no times.
    if unit is None and len(known) and str(known[0])[:5].count("-") == 1 and ":" in str(known[0]):
        return wall_clock(text, name, findings)
    arrival = float_column(frame, name, findings) * _UNITS[unit or "s"]
    first = arrival.min()
    return arrival, {"clock": float(first)} if first is not None else {}  # type: ignore[arg-type]


def _truth(text: pl.Series, name: str, findings: list[Finding]) -> pl.Series:
    lower = text.str.to_lowercase()
    bad = text.is_not_null() & (text != "") & ~lower.is_in(list(_TRUTH))
    if bad.any():
        message = f"{name!r} is {quote(text, bad)}, which is neither true nor false"
        findings.append(finding_at("error", "not-a-truth", message, bad))
    return lower.replace_strict(_TRUTH, default=None, return_dtype=pl.Boolean)


def _service(text: pl.Series, name: str, findings: list[Finding]) -> pl.Series:
    bad = text.is_not_null() & (text != "") & ~text.is_in(list(SERVICES))
    if bad.any():
        message = f"{name!r} is {quote(text, bad)}; known are {' and '.join(map(repr, SERVICES))}"
        findings.append(finding_at("error", "unknown-service", message, bad))
    return text.replace_strict({s: s for s in SERVICES}, default=None, return_dtype=pl.Enum(SERVICES))
