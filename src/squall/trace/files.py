"""Reading and writing trace files: which format a file has, and the one way into squall for every verb."""

import gzip
import hashlib
import importlib
import io
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl

from squall.errors import InputError
from squall.files import replace_file
from squall.progress import note, progress
from squall.trace.formats import ANSWER, FORMATS, VLLM_LINE, Finding, Format, Parsed, columns_format, lines_format
from squall.trace.join import joined
from squall.trace.scaling import table_of
from squall.trace.select import TraceOptions, select
from squall.trace.table import Trace, TraceMeta, TraceSource

# Sources that are drawn, not read. Named by text and imported when asked for: the rooms that draw lie above this one.
_SCHEMES = {"burstgpt": "squall.workload.profiles:draw"}

PORTION = 1 << 20
"""Rows that are read, drawn or written at a time: a row group of a Parquet file."""

TICK_ROWS = 5_000_000

_SUFFIXES = {".parquet": "squall", ".jsonl": "mooncake", ".csv": "burstgpt"}


def open_trace(source: TraceSource, **options: Any) -> Trace:
    """The trace that `source` names, with `options` (the fields of TraceOptions) applied.

    `source` is a Trace, a file, `-` for standard input, or a built-in profile such as `burstgpt://chatgpt-api`.
    Raises InputError with one sentence: the file, the row or the option, what is wrong, what to do.
    """
    known = {field.name for field in fields(TraceOptions)}
    for name in options:
        if name not in known:
            raise InputError(f"{name}: there is no such option; the trace options are {', '.join(sorted(known))}.")
    chosen = TraceOptions(**options)
    if isinstance(chosen.join, str):
        raise InputError(f"join={chosen.join!r}: a tuple of files is needed, such as join=({chosen.join!r},).")
    trace = _source(source, chosen)
    if chosen.join:
        trace = joined([trace, *(_source(part, chosen) for part in chosen.join)])
    selected = select(trace, chosen)
    if selected.meta.scaling is not None and chosen.rate is not None and not isinstance(source, Trace):
        for text in table_of(selected.meta.scaling):
            note(text)
    return selected


def _source(source: TraceSource, chosen: TraceOptions) -> Trace:
    if isinstance(source, Trace):
        return source
    scheme, found, name = str(source).partition("://")
    if not found:
        return read_trace(source, chosen.format, chosen.columns)
    if scheme not in _SCHEMES:
        names = ", ".join(f"{known}://NAME" for known in _SCHEMES)
        raise InputError(f"{source}: no such kind of source; a TRACE is a file, - or {names}.")
    module, _, function = _SCHEMES[scheme].partition(":")
    drawn: Trace = getattr(importlib.import_module(module), function)(name, chosen.seed)
    return drawn


def read_trace(source: str | Path, format: str | None = None, columns: str | None = None) -> Trace:
    """The whole trace in a file, unfiltered. `format` overrides the detection; `columns` maps those of any CSV file.

    Rows out of order are sorted (stable) with a note. Raises InputError for the first thing wrong with the file.
    """
    return _trace(source, *_read(source, format, columns))


def read_answered(
    source: str | Path, format: str | None = None, columns: str | None = None
) -> tuple[Trace, pl.DataFrame]:
    """As `read_trace`, with what the file says of the answers: the columns of `formats.ANSWER`, row for row; null
    where it says nothing."""
    sha256, form, parsed = _read(source, format, columns)
    rows = parsed.columns.sort("arrival", maintain_order=True)
    missing = [pl.lit(None, kind).alias(name) for name, kind in ANSWER.items() if name not in rows.columns]
    return _trace(source, sha256, form, parsed), rows.with_columns(missing).select(list(ANSWER))


def _read(source: str | Path, format: str | None, columns: str | None) -> tuple[str, Format, Parsed]:
    """The sha256 of a file's bytes, its format and its rows."""
    data, form = _open(source, format, columns)
    with progress(f"Reading {Path(str(source)).name}"), ThreadPoolExecutor(1) as pool:
        digest = pool.submit(hashlib.sha256, data)  # meanwhile: not all of the parsing takes all processors
        parsed = _parse(source, data, form)
    for finding in parsed.findings:
        if finding.severity == "error":
            raise InputError(f"{source}: {where(finding)}: {finding.message}. `squall validate` lists all findings.")
    return digest.result().hexdigest(), form, parsed


def examine(source: str | Path, format: str | None = None, columns: str | None = None) -> tuple[Parsed, Format, bytes]:
    """What a file's rows are and everything its parser found, good or bad; with its format and its bytes."""
    data, form = _open(source, format, columns)
    return _parse(source, data, form), form, data


def where(finding: Finding) -> str:
    """The rows of a finding for people: `row 3`, `rows 3, 8, … (12 in all)`, `the file`."""
    if not finding.rows:
        return "the file"
    if finding.count == 1:
        return f"row {finding.rows[0]}"
    shown = ", ".join(map(str, finding.rows[:3]))
    return f"rows {shown}{', …' if finding.count > 3 else ''} ({finding.count:,} in all)"


def _check(format: str | None, columns: str | None) -> None:
    """Raise InputError for what --format and --columns cannot be, before anything is read."""
    if format is not None and "$" in format:
        if columns is None:
            raise InputError("--format with the variables of a log needs --columns, which says what they mean.")
        columns_format(columns, format)
    elif columns is not None and format is not None:
        raise InputError("--columns and --format both say how to read the file; give one of them.")
    elif columns is not None:
        columns_format(columns)
    elif format is not None and format not in FORMATS:
        raise InputError(f"--format {format}: no such format; known are {', '.join(FORMATS)}.")


def _open(source: str | Path, format: str | None, columns: str | None = None) -> tuple[bytes, Format]:
    _check(format, columns)
    if str(source) == "-":
        data = sys.stdin.buffer.read()
    else:
        path = Path(source)
        _refuse_more_than_memory(path)
        if path.is_dir():
            if next(path.glob("chunk-*-trace.csv"), None):
                raise InputError(
                    f"{source}: it is a ServeGen pool, which holds fits and not requests; squall.trace.read_servegen "
                    "reads it."
                )
            raise InputError(f"{source}: it is a directory; name a trace file in it.")
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise InputError(
                f"{source}: there is no such file. A TRACE is a file, - or a profile such as burstgpt://all."
            ) from None
        except OSError as error:
            raise InputError(f"{source}: it cannot be read: {error.strerror}.") from error
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError) as error:
            raise InputError(
                f"{source}: the gzip data are damaged or cut short ({error}); fetch the file again."
            ) from error
    if not data or data.isspace():
        raise InputError(f"{source}: the file is empty.")
    return data, form_of(source, data, format, columns)


def memory_needed(path: Path) -> int:
    """About how many bytes it takes to read a file whole; 0 if there is no such file."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        magic = file.read(4)
    size = path.stat().st_size
    if magic == b"PAR1":
        return 8 * size
    return (20 if magic[:2] == b"\x1f\x8b" else 5) * size


def _refuse_more_than_memory(path: Path) -> None:
    free = memory_free()
    needed = memory_needed(path)
    if free is not None and needed > free:
        raise InputError(
            f"{path}: reading it whole takes about {needed / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are free; "
            "`squall convert` takes a part of it (--between, --head, --service, --sample), and `squall validate` all."
        )


def memory_free() -> int | None:
    """Bytes of memory that are available; None where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = next((line for line in text.splitlines() if line.startswith("MemAvailable")), None)
    return int(found.split()[1]) * 1024 if found else None


def form_of(source: str | Path, data: bytes, format: str | None = None, columns: str | None = None) -> Format:
    """The format of a file by its first bytes, unless `format` or `columns` say it."""
    _check(format, columns)
    if columns is not None:
        first = data.lstrip()[:1]
        if format is not None:
            return columns_format(columns, format)
        if data[:4] == b"PAR1" or first == b"[":
            raise InputError(
                f"{source}: --columns maps the columns of a CSV file or the fields of JSON lines, and this is neither; "
                "leave it out."
            )
        return lines_format(columns) if first == b"{" else columns_format(columns)
    return _demand_columns(source, data, FORMATS[format]) if format else _detect(source, data)


def _detect(source: str | Path, data: bytes) -> Format:
    if data[:4] == b"PAR1":
        return FORMATS["squall"]
    line, names = _header(data)
    head = data[:_HEAD]
    if line.startswith(("{", "[")):
        return FORMATS[_json_format(line, head)]
    if VLLM_LINE.search(head) or (b" HTTP/1." in head and b"INFO:  " in head):
        return FORMATS["vllm"]
    for form in FORMATS.values():
        if form.kind == "csv" and set(form.required) <= names:
            return form
    # Nearly a known format: say what is missing, not merely that it is unknown.
    best = max(
        (form for form in FORMATS.values() if form.kind == "csv"), key=lambda form: len(set(form.required) & names)
    )
    if set(best.required) & names:
        return _demand_columns(source, data, best)
    titles = ", ".join(form.title for form in FORMATS.values())
    mapping = " --columns maps the columns of any CSV file, with --format the fields of an access log."
    mapping = mapping if len(names) >= 3 or " HTTP/" in line else ""
    raise InputError(f"{source}: not a trace format that squall knows ({titles}); it begins {line[:60]!r}.{mapping}")


_HEAD = 1 << 18
"""Bytes in which a log has its first request."""


def _json_format(line: str, head: bytes) -> str:
    """Which JSON format a file has, by its first line, or by the names in its first bytes where that is not whole."""
    begin = head[:4096]
    if b'"resourceSpans"' in begin:
        return "opentelemetry"
    if b'"startTime"' in begin and b'"call_type"' in begin:
        return "litellm"
    try:
        first = msgspec.json.decode(line)
    except msgspec.DecodeError:
        first = None
    if line.startswith("[") or (line == "{" and first is None):
        return "conversations"
    if isinstance(first, dict):
        if "conversations" in first or "conversation" in first:
            return "conversations"
        if isinstance(first.get("timestamp"), str) or isinstance(first.get("hash_ids"), dict):
            return "ragpulse"
    return "mooncake"


def _demand_columns(source: str | Path, data: bytes, form: Format) -> Format:
    if form.kind == "csv":
        missing = [name for name in form.required if name not in _header(data)[1]]
        if missing:
            raise InputError(
                f"{source}: the column {missing[0]!r} is missing; a {form.title} file has {', '.join(form.required)}."
            )
    elif (form.kind == "parquet") != (data[:4] == b"PAR1"):
        raise InputError(f"{source}: this is not a {form.title} file; leave --format out to have the format detected.")
    return form


def _header(data: bytes) -> tuple[str, set[str]]:
    line = io.BytesIO(data).readline().decode("utf-8", "replace").strip().removeprefix("\ufeff").strip()
    return line, {name.strip() for name in line.split(",")}


def _parse(source: str | Path, data: bytes, form: Format) -> Parsed:
    try:
        return form.parse(data)
    except InputError as error:
        raise InputError(f"{source}: {error}".rstrip(".") + ".") from error


def _trace(source: str | Path, sha256: str, form: Format, parsed: Parsed) -> Trace:
    known = dict(parsed.meta)
    notes = list(known.pop("notes", []))
    kept: TraceMeta | None = known.pop("kept", None)
    known.pop("utc", None)
    columns = parsed.columns
    if columns.is_empty():
        raise InputError(f"{source}: there is no request in it, only a header.")
    if not columns["arrival"].is_sorted():
        drops = columns["arrival"].diff() < 0
        notes.append(
            f"row {int(drops.arg_true()[0]) + 1} is earlier than the row before it "
            f"({int(drops.sum()):,} such rows): sorted by time, ties in file order"
        )
        note(f"{source}: {notes[-1]}.")
        columns = columns.sort("arrival", maintain_order=True)
    if kept is not None:
        return Trace.of(columns, kept)
    columns = columns.with_columns(pl.col("arrival") - pl.col("arrival").min())
    if "tick" not in known:
        known["tick"] = tick_of(columns["arrival"])
    meta = TraceMeta(
        source=str(source),
        format=form.name,
        sha256=sha256,
        rows=len(columns),
        notes=notes,
        **known,
    )
    return Trace.of(columns, meta)


def tick_of(arrival: pl.Series) -> float | None:
    """The resolution of recorded times where many requests share one: the 5 % quantile of the positive gaps; else None.

    With fewer than a fifth of the gaps at zero, ties are chance and the clock is fine enough. The first TICK_ROWS rows
    decide.
    """
    times = arrival.head(TICK_ROWS).to_numpy()
    positive = times[1:] > times[:-1]
    if not 2 <= np.count_nonzero(positive) <= 0.8 * positive.size:
        return None
    return float(pl.Series(np.diff(times)[positive]).quantile(0.05) or 0) or None


def write_trace(trace: Trace, path: str | Path, format: str | None = None) -> None:
    """Write `trace`; the suffix says how: .parquet squall, .jsonl Mooncake, .csv BurstGPT (or Azure, if read as such).

    Written to a temporary file beside `path` first, so that a failure leaves no half a file. `-` is standard output.
    """
    table = trace.table
    wide = any(table[name].null_count() < len(table) for name in ("session", "elapsed"))
    if Path(path).suffix == ".csv" and format is None and trace.meta.format == "azure":
        format = "azure"
    # What is null throughout is written as such: it costs nothing.
    null = [pl.col(name).cast(pl.Null) for name in table.columns if table[name].null_count() == len(table)]
    write_frames(table.with_columns(null).iter_slices(PORTION), lambda: trace.meta, path, format, wide=wide)


def write_frames(
    frames: Iterator[pl.DataFrame],
    meta: Callable[[], TraceMeta],
    path: str | Path,
    format: str | None = None,
    *,
    wide: bool,
) -> None:
    """Write a trace that comes in frames (SCHEMA's columns, sorted by arrival), without holding more than one of them.

    The columns have SCHEMA's types, or in all frames Null where nothing is known, and an Enum for the models.
    `meta` is called with the first frame for its clocks, and by Parquet after the last one. `wide` says whether a
    BurstGPT file has columns for sessions and elapsed times.
    """
    path = Path(path)
    name = format or ("burstgpt" if str(path) == "-" else _SUFFIXES.get(path.suffix))
    if name is None or name not in FORMATS:
        what = f"--to {format}: no such format" if format else f"{path}: the suffix {path.suffix!r} names no format"
        known = "|".join(FORMATS)
        raise InputError(f"{what}; use .parquet (squall), .csv (BurstGPT or Azure), .jsonl (Mooncake) or --to {known}.")
    write = FORMATS[name].write
    if write is None:
        raise InputError(f"{path}: squall reads {FORMATS[name].title} but does not write it; use .parquet or .csv.")
    if str(path) == "-":
        write(frames, meta, sys.stdout.buffer, wide)
        return

    def fill(temporary: Path) -> None:
        with temporary.open("wb") as file:
            write(frames, meta, file, wide)

    replace_file(path, fill)


def convert(source: TraceSource, out: str | Path, *, to: str | None = None, **options: Any) -> Trace:
    """Read `source`, apply the trace `options`, write to `out` (format by suffix or `to`); returns what was written.

    All of it is held in memory; `squall.trace.convert_file` converts files of any size.
    """
    trace = open_trace(source, **options)
    write_trace(trace, out, to)
    return trace
