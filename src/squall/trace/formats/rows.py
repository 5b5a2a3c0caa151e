"""What every format shares: findings with row numbers, and CSV columns checked one by one.

A parser never repairs silently: what is wrong with a row becomes a `Finding` with its row number, and the caller
decides (read_trace refuses errors, validate lists them all).
"""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Literal

import msgspec
import polars as pl

from squall.errors import InputError
from squall.trace.table import SCHEMA, TraceMeta

LARGEST_COUNT = 2**31 - 1

Severity = Literal["error", "warning", "info"]
SessionKind = Literal["uuid", "number", "text"]


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
    session_names: pl.Series | None = None
    """The sessions' names, in the order of their numbers; None if the format has none."""

    @property
    def session_kind(self) -> "SessionKind | None":
        return None if self.session_names is None else session_kind(self.session_names)


@dataclass(frozen=True)
class Format:
    """One file format. `required` are the columns or keys that make it what it is."""

    name: str
    title: str
    kind: Literal["csv", "json", "log", "parquet"]
    required: tuple[str, ...]
    parse: Callable[[bytes], Parsed]
    write: "Writer | None"
    """None: squall only reads it."""
    whole: bool = False
    """Whether its records hang together, so that it cannot be read block by block."""


Writer = Callable[[Iterator[pl.DataFrame], Callable[[], TraceMeta], IO[bytes], bool], None]
"""Writes frames of a trace to an open file: (frames, metadata, file, whether sessions or elapsed times are known)."""


def text_writer(lines: Callable[[pl.DataFrame, TraceMeta, bool], pl.DataFrame], form: Literal["csv", "json"]) -> Writer:
    """The writer of a text format, given the columns that a frame becomes: (frame, metadata, wide) -> columns."""

    def write(frames: Iterator[pl.DataFrame], meta: Callable[[], TraceMeta], file: IO[bytes], wide: bool) -> None:
        for number, frame in enumerate(frames):
            columns = lines(frame.cast(SCHEMA), meta(), wide)
            if form == "csv":
                file.write(columns.write_csv(include_header=number == 0).encode())
            else:
                file.write(columns.write_ndjson().encode())

    return write


def read_typed(data: bytes, types: dict[str, Any], required: Sequence[str]) -> pl.DataFrame | None:
    """A CSV file at full speed, if every field of it has its column's type and nothing asks for a closer look.

    None for anything unusual, however harmless (unknown columns, padded names, `12.0` for a count, a missing, negative
    or infinite number): `read_csv` then finds out what and where. What passes here has no finding there.
    """
    names = io.BytesIO(data).readline().decode("utf-8", "replace").rstrip("\r\n").split(",")
    if not set(names) <= set(types) or not set(required) <= set(names):
        return None
    try:
        frame = pl.read_csv(data, schema={name: types[name] for name in names})
    except pl.exceptions.PolarsError:
        return None
    for column in frame:
        if column.name in required and column.null_count():
            return None
        if column.dtype.is_numeric():
            lowest: Any = column.min()
            if (lowest is not None and lowest < 0) or not column.is_finite().all():
                return None
        elif column.dtype == pl.String:
            values = column.drop_nulls().unique()
            if (values.str.strip_chars() != values).any() or (column.name in required and (values == "").any()):
                return None
    return frame


def read_csv(data: bytes, optional: set[str], separator: str = ",") -> tuple[pl.DataFrame, list[Finding]]:
    """Every field as text, columns by their stripped names; rows with too few or too many fields are findings."""
    try:
        frame = pl.read_csv(
            io.BytesIO(data),
            infer_schema=False,
            encoding="utf8-lossy",
            truncate_ragged_lines=True,
            separator=separator,
        )
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
    findings += _ragged(data, frame.width, separator.encode())
    return frame, findings


def _ragged(data: bytes, width: int, separator: bytes) -> list[Finding]:
    """Rows with more fields than the header; counting separators is exact where no field is quoted."""
    lines = data.count(b"\n") + (not data.endswith(b"\n"))
    if data.count(separator) <= (width - 1) * lines or b'"' in data:
        return []
    rows = [number for number, line in enumerate(data.split(b"\n")[1:], start=1) if line.count(separator) >= width]
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


def float_column(frame: pl.DataFrame, name: str, findings: list[Finding]) -> pl.Series:
    """The column as finite numbers >= 0; anything else is a finding and null."""
    text = frame[name]
    if text.dtype.is_numeric():
        return text.cast(pl.Float64)  # checked by read_typed
    value = text.cast(pl.Float64, strict=False)
    bad = (value.is_null() | ~value.is_finite()) & text.is_not_null() & (text != "")
    if bad.any():
        findings.append(
            finding_at("error", "not-a-number", f"{name!r} is {quote(text, bad)}, which is not a number", bad)
        )
    negative = value < 0
    if negative.any():
        findings.append(
            finding_at("error", "negative", f"{name!r} is {quote(text, negative)}, which is negative", negative)
        )
    return value.set(bad.fill_null(False), None)


def token_column(frame: pl.DataFrame, name: str, findings: list[Finding]) -> pl.Series:
    """The column as token counts: whole numbers from 0 to 2^31 - 1 (`12.0` counts as 12)."""
    if frame[name].dtype.is_integer():
        return frame[name].cast(pl.Int32)  # checked by read_typed
    value = float_column(frame, name, findings)
    odd = (value != value.round()) | (value > LARGEST_COUNT)
    if odd.any():
        findings.append(
            finding_at(
                "error",
                "not-a-count",
                f"{name!r} is {quote(frame[name], odd)}, which is not a token count (a whole number below 2^31)",
                odd,
            )
        )
    return value.set((odd | (value < 0)).fill_null(False), None).cast(pl.Int32)


def quote(text: pl.Series, mask: pl.Series) -> str:
    return repr(str(text.filter(mask.fill_null(False))[0])[:40])


def blank_to_null(text: pl.Series) -> pl.Series:
    """An empty field is an unknown value."""
    return text.set((text == "").fill_null(False), None)


def numbered_sessions(names: pl.Series) -> tuple[pl.Series, pl.Series]:
    """The sessions' numbers, from 0 in the order of their first request, row by row, and their names by number.

    The names themselves carry no meaning.
    """
    rows = names.is_not_null().arg_true()
    known = names.gather(rows).to_frame("name")
    each = known["name"].unique(maintain_order=True)
    numbers = known.join(each.to_frame("name").with_row_index("number"), on="name", how="left", maintain_order="left")
    blank = pl.zeros(len(names), pl.Int64, eager=True).set(names.is_null(), None)
    return blank.scatter(rows, numbers["number"].cast(pl.Int64)), each


def session_kind(names: pl.Series) -> SessionKind | None:
    """What the session ids of a file look like; None if there are none."""
    known = names.drop_nulls().unique().cast(pl.String)
    if known.is_empty():
        return None
    if known.str.contains(r"^[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$").all():
        return "uuid"
    return "number" if known.str.contains(r"^\d+$").all() else "text"
