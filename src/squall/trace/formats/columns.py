"""Any CSV file, JSON lines or access log, by a mapping: `arrival=ts,request_tokens=prompt,response_tokens=completion`.

A log line is written when its request ends: `ended` with `elapsed` in place of `arrival`. `status` is the HTTP status,
`path` the request line or path, of which only those that generate text are kept, `first_token` the seconds to it.
"""

import re
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import polars as pl

from squall.errors import InputError
from squall.trace.formats.rows import (
    Finding,
    Format,
    Parsed,
    blank_to_null,
    finding_at,
    float_column,
    numbered_sessions,
    quote,
    read_csv,
    token_column,
)
from squall.trace.formats.times import wall_clock
from squall.trace.table import REQUIRED, SERVICES

_MAPPED = (
    *REQUIRED,
    *("failed", "service", "model", "session", "elapsed", "ended", "status", "path", "first_token", "cached_tokens"),
)
_TIMES = ("arrival", "ended", "elapsed", "first_token")
_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def columns_format(mapping: str, log_format: str | None = None) -> Format:
    """The format of a file whose columns `mapping` names: `COLUMN=NAME` for each column of the Trace table it has.

    The file is CSV, JSON lines (a NAME may be a path such as usage.prompt_tokens), or lines of an access log in the
    `log_format` of nginx (`$remote_addr [$time_local] "$request" …`), whose variables are then the names. Times are
    seconds or ISO times; `arrival=NAME:ms` (`:us`, `:ns`, also for elapsed and first_token) says otherwise. Raises
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
    if "ended" in chosen:
        if "arrival" in chosen or "elapsed" not in chosen:
            raise InputError(f"--columns {mapping}: ended goes with elapsed, in place of arrival.")
    elif missing := [name for name in REQUIRED if name not in chosen]:
        raise InputError(f"--columns {mapping}: {missing[0]} is missing; a trace needs {', '.join(REQUIRED)}.")
    for name in REQUIRED[1:]:
        if name not in chosen:
            raise InputError(f"--columns {mapping}: {name} is missing; a trace needs {', '.join(REQUIRED)}.")
    pattern = None if log_format is None else _pattern(log_format)
    parse = partial(_parse_columns, chosen=chosen, mapping=mapping, pattern=pattern)
    if pattern is not None:
        return Format("columns", "mapped log", "json", (), parse, None)
    return Format("columns", "mapped CSV", "csv", (), parse, None)


def lines_format(mapping: str) -> Format:
    """The same for JSON lines."""
    return replace(columns_format(mapping), title="mapped JSON lines", kind="json")


def _pattern(log_format: str) -> re.Pattern[str]:
    """A regular expression for the lines of an access log. A field ends where what follows it begins."""
    parts = re.split(r"\$(?:(\w+)|\{(\w+)\})", log_format.strip())
    names = [bare or braced for bare, braced in zip(parts[1::3], parts[2::3], strict=True)]
    if not names or len(set(names)) < len(names):
        raise InputError(f"--format {log_format}: it names no variable, or one twice; give nginx's log_format line.")
    text = re.escape(parts[0])
    for name, after in zip(names, parts[3::3], strict=True):
        value = r"\d\d/\w{3}/\d{4}:[\d:]{8} [+-]\d{4}" if name == "time_local" else f"[^{re.escape(after[:1])}]*"
        text += f"(?P<{name}>{value if after or name == 'time_local' else '.*'}){re.escape(after)}"
    return re.compile(text)


def _parse_columns(data: bytes, chosen: dict[str, str], mapping: str, pattern: re.Pattern[str] | None) -> Parsed:
    as_json = pattern is None and data.lstrip()[:1] == b"{"
    separator = _separator(data)
    if pattern is not None:
        header = list(pattern.groupindex)
    elif as_json:
        header = None
    else:
        header = [name.strip() for name in data.split(b"\n", 1)[0].decode("utf-8-sig", "replace").split(separator)]
        header = [name.strip('"') for name in header]
    names, units = {}, {}
    for column, name in chosen.items():
        plain, colon, unit = name.rpartition(":")
        if (header is None or name not in header) and colon and unit in _UNITS and column in _TIMES:
            name, units[column] = plain, unit
        if header is not None and name not in header:
            what = "format has no variable" if pattern is not None else "file has no column"
            have = ", ".join(header[:12])
            raise InputError(f"--columns {mapping}: the {what} {name!r}; it has {have}.")
        names[column] = name
    if header is None:
        frame, findings = _json_lines(data, set(names.values()))
        for name in names.values():
            if not findings and frame[name].null_count() == len(frame):
                raise InputError(f"--columns {mapping}: no line has the field {name!r}")
    elif pattern is not None:
        frame, findings = _log_lines(data, pattern, set(names.values()))
    else:
        # A length may be missing where the outcome is known from elsewhere.
        loose = {"request_tokens", "response_tokens"} if chosen.keys() & {"status", "failed", "path"} else set()
        required = {names[column] for column in names if column in {*REQUIRED, "ended"} - loose}
        frame, findings = read_csv(data, set(header) - required, separator)
    meta: dict[str, Any] = {"notes": [f"columns were mapped: {mapping}"]}
    frame = _requests_of(frame, names, meta)
    return _mapped(frame, names, units, findings, meta)


def _requests_of(frame: pl.DataFrame, names: dict[str, str], meta: dict[str, Any]) -> pl.DataFrame:
    """Without the lines of other requests: other paths, or without tokens if outcomes and no paths are mapped."""
    if "path" in names:
        path = frame[names["path"]].fill_null("").str.extract(r"^(?:[A-Z]+ )?([^ ?]*)").str.strip_chars_end("/")
        keep, why = path.str.contains(r"/(?:completions|responses|messages)$").fill_null(False), "to other paths"
    elif names.keys() & {"status", "failed"}:
        keep = ~(_blank(frame[names["request_tokens"]]) & _blank(frame[names["response_tokens"]]))
        why = "without token counts"
    else:
        return frame
    if not keep.all():
        meta["notes"].append(f"{int((~keep).sum()):,} lines {why} were left out")
    return frame.filter(keep)


def _blank(text: pl.Series) -> pl.Series:
    return text.is_null() | (text == "").fill_null(False)


def _mapped(
    frame: pl.DataFrame, names: dict[str, str], units: dict[str, str], findings: list[Finding], meta: dict[str, Any]
) -> Parsed:
    columns: dict[str, pl.Series] = {}
    sessions = None
    for column, name in names.items():
        if column in ("arrival", "ended"):
            columns["arrival"], clocks = _arrival(frame, name, units.get(column), findings)
            meta |= clocks
        elif column in ("elapsed", "first_token"):
            columns[column] = float_column(frame, name, findings) * _UNITS[units.get(column, "s")]
        elif column in ("request_tokens", "response_tokens", "cached_tokens"):
            columns[column] = token_column(frame, name, findings)
        elif column == "failed":
            columns[column] = _truth(frame[name], name, findings)
        elif column == "status":
            columns["http_status"] = token_column(frame, name, findings)
        elif column == "service":
            columns[column] = _service(frame[name], name, findings)
        elif column == "model":
            columns[column] = blank_to_null(frame[name])
        elif column == "session":
            columns[column], sessions = numbered_sessions(blank_to_null(frame[name]))
    if "ended" in names:
        columns["arrival"] = columns["arrival"] - columns["elapsed"].fill_null(0.0)
        early = columns["arrival"].min()
        if early is not None and "utc" in meta:
            columns["arrival"] = columns["arrival"] - early
            meta |= _moved(meta, float(early))  # type: ignore[arg-type]
        elif early is not None:
            meta["clock"] = float(early)  # type: ignore[arg-type]
    said = columns["failed"].fill_null(False) if "failed" in columns else pl.repeat(False, len(frame), eager=True)
    if "http_status" in columns:
        said |= (columns["http_status"] >= 400).fill_null(False)
    for length in ("request_tokens", "response_tokens"):
        columns[length] = columns[length].set(said & columns[length].is_null(), 0)
        _demand(frame[names[length]], ~said, findings)
    if "failed" in columns or "http_status" in columns:
        # Failed where it says so, and, as everywhere, where there is no response.
        columns["failed"] = said | (columns["response_tokens"] == 0).fill_null(False)
        columns["response_tokens"] = columns["response_tokens"].set(columns["failed"], 0)
    return Parsed(pl.DataFrame(columns), findings, meta, session_names=sessions)


def _demand(text: pl.Series, where: pl.Series, findings: list[Finding]) -> None:
    """A finding for every value that is missing, unless the reader of the file has found that."""
    missing = _blank(text) & where
    if missing.any() and not any(finding.code == "missing-value" for finding in findings):
        findings.append(finding_at("error", "missing-field", f"{text.name!r} is missing or empty", missing))


def _moved(clocks: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The clocks of a moment that many seconds later (earlier, if negative)."""
    midnight = clocks["midnight"] + seconds
    ns = round(seconds * 1e9)
    return {
        "utc": clocks["utc"] + ns,
        "epoch": clocks["epoch"] + ns,
        "midnight": midnight % 86400,
        "weekday": int(clocks["weekday"] + midnight // 86400) % 7,
    }


def _json_lines(data: bytes, names: set[str]) -> tuple[pl.DataFrame, list[Finding]]:
    """The fields at these paths (`usage.prompt_tokens`) of each line as text."""
    wanted = {name: name.split(".") for name in names}
    rows: dict[str, list[str | None]] = {name: [] for name in names}
    bad: dict[str, list[int]] = {}
    lines = data.removeprefix(b"\xef\xbb\xbf").rstrip().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = msgspec.json.decode(line, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            bad.setdefault(str(error), []).append(number)
            record = {}
        for name, path in wanted.items():
            value: Any = record
            if name in record:
                value = record[name]
            else:
                for key in path:
                    value = value.get(key) if isinstance(value, dict) else None
            rows[name].append(None if value is None or isinstance(value, dict | list) else _text(value))
    findings = [
        Finding(severity="error", code="bad-line", message=text, count=len(at), rows=at[:10])
        for text, at in bad.items()
    ]
    frame = pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String))
    return frame.with_columns(pl.all().replace("-", None)), findings


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _log_lines(data: bytes, pattern: re.Pattern[str], names: set[str]) -> tuple[pl.DataFrame, list[Finding]]:
    """The wanted fields of each line as text; `-` is nginx's word for nothing."""
    rows: list[dict[str, str | None]] = []
    bad = []
    for number, line in enumerate(data.decode("utf-8", "replace").rstrip().split("\n"), start=1):
        match = pattern.fullmatch(line.rstrip("\r"))
        if match is None:
            bad.append(number)
        rows.append({name: match[name] if match else None for name in names})
    frame = pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String)).with_columns(pl.all().replace("-", None))
    findings = []
    if bad:
        message = "it is not as --format says that lines are"
        findings.append(Finding(severity="error", code="bad-line", message=message, count=len(bad), rows=bad[:10]))
    return frame, findings


def _separator(data: bytes) -> str:
    """The separator of the header: a comma, unless another one occurs more often."""
    line = data.split(b"\n", 1)[0]
    return max((",", ";", "\t", "|"), key=lambda mark: line.count(mark.encode()))


def _arrival(
    frame: pl.DataFrame, name: str, unit: str | None, findings: list[Finding]
) -> tuple[pl.Series, dict[str, Any]]:
    """Seconds: numbers on the file's own clock, or times of day from the earliest on, with their wall clock."""
    text = frame[name]
    _demand(text, pl.repeat(True, len(text), eager=True), findings)
    known = text.filter(text.is_not_null() & (text != ""))
    # The first value decides, so that one wrong number is said to be wrong, and not the whole column to be no times.
    if unit is None and len(known) and ":" in str(known[0]) and ("-" in str(known[0])[:5] or "/" in str(known[0])[:4]):
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
