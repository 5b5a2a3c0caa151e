"""The file formats of public LLM traces: how each one is recognised, parsed, checked row by row, and written.

A parser never repairs silently: what is wrong with a row becomes a `Finding` with its row number, and the caller
decides (read_trace refuses errors, validate lists them all).
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import polars as pl

from squall.errors import InputError
from squall.trace.table import REQUIRED, SCHEMA, SERVICES, TraceMeta

BURSTGPT_ATTRIBUTION = (
    "Derived from BurstGPT (Wang et al., KDD 2025, doi 10.1145/3711896.3737413), "
    "https://github.com/HPMLL/BurstGPT, CC BY 4.0."
)
AZURE_ATTRIBUTION = (
    "Azure LLM inference trace, Azure Public Dataset (2023: Patel et al., Splitwise; "
    "2024: Stojkovic et al., DynamoLLM), CC BY 4.0."
)
MOONCAKE_ATTRIBUTION = "Mooncake FAST'25 trace release, https://github.com/kvcache-ai/Mooncake, Apache-2.0."

# Day 0 of BurstGPT's clock is taken for Wednesday, 1 November 2023: the weekday pattern, the labels of the authors'
# heat map and the month ends of all three parts fit no other day. The authors have not said so.
BURSTGPT_DAY0_WEEKDAY = 2

_SERVICE_OF_LOG_TYPE = {"Conversation log": "conversation", "API log": "api"}
_LOG_TYPE_OF_SERVICE = {service: log_type for log_type, service in _SERVICE_OF_LOG_TYPE.items()}
_LARGEST = 2**31 - 1


Severity = Literal["error", "warning", "info"]


class Finding(msgspec.Struct, kw_only=True, frozen=True):
    """One thing that is wrong or odd with a file, and where."""

    severity: Severity
    code: str
    message: str
    count: int = 1
    rows: list[int] = []
    """The first of the rows concerned; 1 is the first row of data."""


@dataclass
class Parsed:
    """A file's rows as columns of the Trace table, with what is wrong with them and what is known of the source.

    `arrival` is on the source's own clock.
    """

    columns: pl.DataFrame
    findings: list[Finding]
    meta: dict[str, Any] = field(default_factory=dict)
    total_tokens: pl.Series | None = None


@dataclass(frozen=True)
class Format:
    """One file format. `required` are the columns or keys that make it what it is."""

    name: str
    title: str
    kind: Literal["csv", "jsonl", "parquet"]
    required: tuple[str, ...]
    parse: Callable[[bytes], Parsed]
    write: Callable[[pl.DataFrame, TraceMeta], bytes]


# ---------------------------------------------------------------------------------------------------------------- CSV


def _read_csv(data: bytes, optional: set[str]) -> tuple[pl.DataFrame, list[Finding]]:
    """Every field as text, columns by their stripped names; rows with too few or too many fields are findings."""
    try:
        frame = pl.read_csv(io.BytesIO(data), infer_schema=False, encoding="utf8-lossy", truncate_ragged_lines=True)
    except pl.exceptions.PolarsError as error:
        raise InputError(f"it cannot be read as CSV: {str(error).splitlines()[0]}") from error
    frame = frame.rename({name: name.strip().lstrip("\ufeff") for name in frame.columns})
    frame = frame.with_columns(pl.all().str.strip_chars())
    blank = frame.select(pl.all_horizontal((pl.all().is_null()) | (pl.all() == ""))).to_series()
    last = len(frame)
    while last and blank[last - 1]:
        last -= 1
    frame = frame.head(last)
    findings = []
    needed = [name for name in frame.columns if name not in optional]
    short = (
        frame.select(pl.any_horizontal(pl.col(needed).is_null() | (pl.col(needed) == ""))).to_series()
        if needed and last
        else pl.Series([], dtype=pl.Boolean)
    )
    if short.any():
        rows = _numbers(short)
        half = rows[-1] == len(frame) and not data.rstrip(b" ").endswith(b"\n")
        tail = "; the last line is half-written: cut it off or fetch the file again" if half else ""
        findings.append(finding_at("error", "missing-value", f"a field is missing or empty{tail}", short))
    findings += _ragged(data, frame.width)
    return frame, findings


def _ragged(data: bytes, width: int) -> list[Finding]:
    """Rows with more fields than the header. No known format quotes its fields, so counting commas is exact."""
    lines = data.count(b"\n") + (not data.endswith(b"\n"))
    if data.count(b",") <= (width - 1) * lines or b'"' in data:
        return []
    rows = [number for number, line in enumerate(data.split(b"\n")[1:], start=1) if line.count(b",") >= width]
    message = f"more fields than the header's {width}"
    return (
        [Finding(severity="error", code="extra-field", message=message, count=len(rows), rows=rows[:10])]
        if rows
        else []
    )


def _numbers(mask: pl.Series, limit: int = 10) -> list[int]:
    """Row numbers (1-based) where `mask` holds: the first `limit`, then the last."""
    hits = mask.fill_null(False).arg_true()
    found = [int(row) + 1 for row in hits.head(limit)]
    return [*found, int(hits[-1]) + 1] if len(hits) > limit else found


def finding_at(severity: Severity, code: str, message: str, mask: pl.Series) -> Finding:
    """A finding at the rows where `mask` holds."""
    return Finding(
        severity=severity, code=code, message=message, count=int(mask.fill_null(False).sum()), rows=_numbers(mask)
    )


def _float_column(frame: pl.DataFrame, name: str, findings: list[Finding]) -> pl.Series:
    """The column as finite numbers >= 0; anything else is a finding and null."""
    text = frame[name]
    value = text.cast(pl.Float64, strict=False)
    bad = (value.is_null() | ~value.is_finite()) & text.is_not_null() & (text != "")
    if bad.any():
        findings.append(
            finding_at("error", "not-a-number", f"{name!r} is {_quote(text, bad)}, which is not a number", bad)
        )
    negative = value < 0
    if negative.any():
        findings.append(
            finding_at("error", "negative", f"{name!r} is {_quote(text, negative)}, which is negative", negative)
        )
    return value.set(bad.fill_null(False), None)


def _token_column(frame: pl.DataFrame, name: str, findings: list[Finding]) -> pl.Series:
    """The column as token counts: whole numbers from 0 to 2^31 - 1 (`12.0` counts as 12)."""
    value = _float_column(frame, name, findings)
    odd = (value != value.round()) | (value > _LARGEST)
    if odd.any():
        findings.append(
            finding_at(
                "error",
                "not-a-count",
                f"{name!r} is {_quote(frame[name], odd)}, which is not a token count (a whole number below 2^31)",
                odd,
            )
        )
    return value.set((odd | (value < 0)).fill_null(False), None).cast(pl.Int32)


def _quote(text: pl.Series, mask: pl.Series) -> str:
    return repr(str(text.filter(mask.fill_null(False))[0])[:40])


# ----------------------------------------------------------------------------------------------------------- BurstGPT

_BURSTGPT_OPTIONAL = {"Session ID", "Session prefix", "Elapsed time", "Model", "Log Type", "Total tokens"}


def _parse_burstgpt(data: bytes) -> Parsed:
    """Both published schemas (6 and 8 columns) and cuts of them, by column name: positions differ between the parts."""
    frame, findings = _read_csv(data, _BURSTGPT_OPTIONAL)
    have = set(frame.columns)
    columns = {
        "arrival": _float_column(frame, "Timestamp", findings),
        "request_tokens": _token_column(frame, "Request tokens", findings),
        "response_tokens": _token_column(frame, "Response tokens", findings),
    }
    if "Log Type" in have:
        text = frame["Log Type"]
        unknown = text.is_not_null() & (text != "") & ~text.is_in(list(_SERVICE_OF_LOG_TYPE))
        if unknown.any():
            message = (
                f"'Log Type' is {_quote(text, unknown)}; known are {' and '.join(map(repr, _SERVICE_OF_LOG_TYPE))}"
            )
            findings.append(finding_at("error", "unknown-log-type", message, unknown))
        columns["service"] = text.replace_strict(_SERVICE_OF_LOG_TYPE, default=None, return_dtype=pl.Enum(SERVICES))
    if "Model" in have:
        columns["model"] = _blank_to_null(frame["Model"])
    for name in ("Session ID", "Session prefix"):
        if name in have:
            columns["session"] = _session_numbers(_blank_to_null(frame[name]))
    if "Elapsed time" in have:
        columns["elapsed"] = _float_column(frame, "Elapsed time", findings)
    total = _token_column(frame, "Total tokens", findings) if "Total tokens" in have else None
    first = columns["arrival"].min()
    clock = float(first) if first is not None else 0.0  # type: ignore[arg-type]
    meta = {
        "licence": "CC BY 4.0",
        "attribution": BURSTGPT_ATTRIBUTION,
        "clock": clock,
        "midnight": clock % 86400,
        "weekday": (BURSTGPT_DAY0_WEEKDAY + int(clock // 86400)) % 7,
    }
    if not (columns["arrival"] % 1 != 0).any():
        meta["tick"] = 1.0
    return Parsed(pl.DataFrame(columns), findings, meta, total)


def _blank_to_null(text: pl.Series) -> pl.Series:
    return text.set((text == "").fill_null(False), None)


def _session_numbers(names: pl.Series) -> pl.Series:
    """Sessions numbered from 0 in the order of their first request: the ids themselves carry no meaning."""
    known = names.drop_nulls().unique(maintain_order=True)
    return names.replace_strict(
        known, pl.Series(range(len(known)), dtype=pl.Int64), default=None, return_dtype=pl.Int64
    )


def _write_burstgpt(table: pl.DataFrame, meta: TraceMeta) -> bytes:
    """8 columns if sessions or elapsed times are known, else 6; blank where squall does not know."""
    wide = table["session"].null_count() < len(table) or table["elapsed"].null_count() < len(table)
    columns = [
        _shortest(pl.col("arrival") + meta.clock).alias("Timestamp"),
        *([pl.col("session").alias("Session ID"), _shortest(pl.col("elapsed")).alias("Elapsed time")] if wide else []),
        pl.col("model").alias("Model"),
        pl.col("request_tokens").alias("Request tokens"),
        pl.col("response_tokens").alias("Response tokens"),
        (pl.col("request_tokens").cast(pl.Int64) + pl.col("response_tokens")).alias("Total tokens"),
        pl.col("service").cast(pl.String).replace(_LOG_TYPE_OF_SERVICE).alias("Log Type"),
    ]
    return table.select(columns).write_csv().encode()


def _shortest(seconds: pl.Expr) -> pl.Expr:
    """Whole seconds as `5`, others to the microsecond."""
    rounded = seconds.round(6)
    return (
        pl.when(rounded == rounded.round())
        .then(rounded.cast(pl.Int64).cast(pl.String))
        .otherwise(rounded.cast(pl.String))
    )


# -------------------------------------------------------------------------------------------------------------- Azure


def _parse_azure(data: bytes) -> Parsed:
    """Azure 2023 and 2024: wall-clock times with up to 9 digits of fraction, with or without an offset from UTC."""
    frame, findings = _read_csv(data, set())
    text = frame["TIMESTAMP"]
    plain = text.str.replace("T", " ", literal=True).str.replace(r"(?:Z|[+-]\d\d:?\d\d)$", "")
    stamp = plain.str.to_datetime("%Y-%m-%d %H:%M:%S%.f", time_unit="ns", strict=False)
    bad = stamp.is_null() & text.is_not_null() & (text != "")
    if bad.any():
        findings.append(
            finding_at(
                "error",
                "not-a-time",
                f"'TIMESTAMP' is {_quote(text, bad)}, which is not like 2023-11-16 18:15:46.6805900",
                bad,
            )
        )
    columns = {
        "request_tokens": _token_column(frame, "ContextTokens", findings),
        "response_tokens": _token_column(frame, "GeneratedTokens", findings),
    }
    first = stamp.min()
    meta: dict[str, Any] = {"licence": "CC BY 4.0", "attribution": AZURE_ATTRIBUTION}
    arrival = pl.Series([None] * len(frame), dtype=pl.Float64)
    if first is not None:
        nanoseconds = stamp.dt.timestamp("ns")
        start = nanoseconds.min()
        arrival = (nanoseconds - start).cast(pl.Float64) / 1e9
        meta |= {"epoch": start, "midnight": (start % (86400 * 10**9)) / 1e9, "weekday": first.weekday()}  # type: ignore[operator, union-attr]
    return Parsed(pl.DataFrame({"arrival": arrival, **columns}), findings, meta)


def _write_azure(table: pl.DataFrame, meta: TraceMeta) -> bytes:
    start = meta.epoch if meta.epoch is not None else round(meta.clock * 1e9)
    stamp = (start + (pl.col("arrival") * 1e9).round().cast(pl.Int64)).cast(pl.Datetime("ns"))
    # strftime knows 3, 6 and 9 digits; the format has 7, so the last two of nine are cut.
    columns = [
        stamp.dt.strftime("%Y-%m-%d %H:%M:%S.%9f").str.head(-2).alias("TIMESTAMP"),
        pl.col("request_tokens").alias("ContextTokens"),
        pl.col("response_tokens").alias("GeneratedTokens"),
    ]
    return table.select(columns).write_csv().encode()


# ----------------------------------------------------------------------------------------------------------- Mooncake


class _MooncakeLine(msgspec.Struct):
    timestamp: float  # ms
    input_length: int
    output_length: int
    hash_ids: list[int] | None = None


MOONCAKE_BLOCK = 512


def _parse_mooncake(data: bytes) -> Parsed:
    """One JSON object a line, times in ms; `hash_ids` name the prompt's 512-token blocks, equal ids mean equal text."""
    decode = msgspec.json.Decoder(_MooncakeLine).decode
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    rows: list[_MooncakeLine] = []
    broken: dict[str, list[int]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = decode(line)
            if problem := _problem_of(record):
                broken.setdefault(problem, []).append(number)
                continue
            rows.append(record)
        except msgspec.DecodeError as error:
            what = str(error)
            if number == len(lines) and not data.endswith(b"\n"):
                what = "the last line is half-written: cut it off or fetch the file again"
            broken.setdefault(what, []).append(number)
    findings = [
        Finding(severity="error", code="bad-line", message=text, count=len(at), rows=at[:10])
        for text, at in broken.items()
    ]
    columns = {
        "arrival": [row.timestamp / 1e3 for row in rows],
        "request_tokens": [row.input_length for row in rows],
        "response_tokens": [row.output_length for row in rows],
        "prefix": [row.hash_ids for row in rows],
    }
    odd = [
        n
        for n, row in enumerate(rows, start=1)
        if row.hash_ids is not None and len(row.hash_ids) != -(-row.input_length // MOONCAKE_BLOCK)
    ]
    if odd:
        message = f"the number of hash_ids is not input_length / {MOONCAKE_BLOCK} rounded up"
        findings.append(Finding(severity="warning", code="block-count", message=message, count=len(odd), rows=odd[:10]))
    meta = {
        "licence": "Apache-2.0",
        "attribution": MOONCAKE_ATTRIBUTION,
        "block_size": MOONCAKE_BLOCK,
        "clock": min((row.timestamp / 1e3 for row in rows), default=0.0),
    }
    schema = {name: SCHEMA[name] for name in columns}
    return Parsed(pl.DataFrame(columns, schema=schema), findings, meta)


def _problem_of(record: _MooncakeLine) -> str | None:
    for name in ("timestamp", "input_length", "output_length"):
        value = getattr(record, name)
        if value < 0 or not math.isfinite(value):
            return f"{name} is {value}, which is negative or not finite"
        if name != "timestamp" and value > _LARGEST:
            return f"{name} is {value}, which is not a token count (a whole number below 2^31)"
    return None


def _write_mooncake(table: pl.DataFrame, meta: TraceMeta) -> bytes:
    ms = ((table["arrival"] + meta.clock) * 1e3).round(3)
    whole = bool((ms == ms.round()).all())
    columns = {
        "timestamp": ms.cast(pl.Int64) if whole else ms,
        "input_length": table["request_tokens"],
        "output_length": table["response_tokens"],
    }
    if table["prefix"].null_count() < len(table):
        columns["hash_ids"] = table["prefix"]
    return pl.DataFrame(columns).write_ndjson().encode()


# ----------------------------------------------------------------------------------------------------------- Parquet

_META_KEY = "squall.trace"


def _parse_squall(data: bytes) -> Parsed:
    """squall's own Parquet: the Trace table, its metadata in the file's key-value metadata."""
    try:
        frame = pl.read_parquet(io.BytesIO(data))
        kept = pl.read_parquet_metadata(io.BytesIO(data)).get(_META_KEY)
        meta = msgspec.json.decode(kept, type=TraceMeta) if kept else None
    except (pl.exceptions.PolarsError, msgspec.DecodeError, OSError) as error:
        raise InputError(f"it cannot be read as a squall Parquet file: {str(error).splitlines()[0]}") from error
    missing = [name for name in REQUIRED if name not in frame.columns]
    if missing:
        raise InputError(f"the column {missing[0]!r} is missing; a squall Parquet trace has {', '.join(REQUIRED)}")
    findings: list[Finding] = []
    for name in REQUIRED:
        if not frame.schema[name].is_numeric():
            raise InputError(f"the column {name!r} holds {frame.schema[name]}, not numbers")
        column = frame[name].cast(pl.Float64)
        bad = column.is_null() | ~column.is_finite() | (column < 0)
        if bad.any():
            findings.append(finding_at("error", "bad-value", f"{name!r} is missing, negative or not finite", bad))
    frame = frame.select([name for name in SCHEMA if name in frame.columns])
    return Parsed(frame, findings, {"kept": meta} if meta else {})


def _write_squall(table: pl.DataFrame, meta: TraceMeta) -> bytes:
    out = io.BytesIO()
    table.write_parquet(out, metadata={_META_KEY: msgspec.json.encode(meta).decode()})
    return out.getvalue()


FORMATS = {
    form.name: form
    for form in (
        Format(
            "burstgpt",
            "BurstGPT CSV",
            "csv",
            ("Timestamp", "Request tokens", "Response tokens"),
            _parse_burstgpt,
            _write_burstgpt,
        ),
        Format(
            "azure",
            "Azure LLM inference CSV",
            "csv",
            ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
            _parse_azure,
            _write_azure,
        ),
        Format(
            "mooncake",
            "Mooncake JSON lines",
            "jsonl",
            ("timestamp", "input_length", "output_length"),
            _parse_mooncake,
            _write_mooncake,
        ),
        Format("squall", "squall Parquet", "parquet", REQUIRED, _parse_squall, _write_squall),
    )
}
