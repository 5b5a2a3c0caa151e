"""Run files: Parquet with the metadata inside, CSV and JSON lines with it beside them; and tables made elsewhere.

`run.parquet` holds the table and, in the file's key-value metadata, the RunMeta; `run.series.parquet` the time series.
`run.csv` and `run.jsonl` have `run.meta.json` and `run.series.csv` or `run.series.jsonl` beside them.
"""

from pathlib import Path

import msgspec
import polars as pl

from squall.errors import InputError
from squall.files import check_place, replace_file
from squall.progress import note
from squall.run.table import SCHEMA, SERIES, Run, RunMeta, RunSource
from squall.trace.table import TraceMeta

SUFFIXES = (".parquet", ".csv", ".jsonl")
REQUIRED = ("sent", "first_token", "last_token", "request_tokens", "response_tokens")
"""What a table made elsewhere must have to be read as a run."""

_KEY = "squall.run"  # of the RunMeta in a Parquet file's key-value metadata


def check_run_path(path: str | Path, reads: object = None) -> Path:
    """`path` as a Path, or InputError if no run can be written there (`check_place`)."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: a run is written as {', '.join(SUFFIXES)}; give a name with one of these suffixes.")
    return check_place(path, reads)


def write_run(run: Run, path: str | Path) -> None:
    """Write `run` to `path`; the suffix says how (.parquet, .csv, .jsonl). Missing folders are made.

    Every file appears whole or not at all: it is written under a temporary name and then renamed, the table last.
    """
    path = check_run_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = msgspec.json.encode(run.meta)
    series = _series_path(path)
    if run.series.is_empty():
        series.unlink(missing_ok=True)  # an earlier run's series must not be read as this one's
    else:
        replace_file(series, lambda temporary: _write_table(run.series, temporary, path.suffix.lower()))
    if path.suffix.lower() == ".parquet":
        replace_file(path, lambda temporary: run.table.write_parquet(temporary, metadata={_KEY: meta.decode()}))
    else:
        replace_file(_meta_path(path), msgspec.json.format(meta, indent=1) + b"\n")
        replace_file(path, lambda temporary: _write_table(run.table, temporary, path.suffix.lower()))


def read_run(source: RunSource) -> Run:
    """The run that `source` names: a Run (returned as it is), a file, or the journal of a replay that did not end well.

    A table made elsewhere is read as kind `recorded` if it has `sent`, `first_token`, `last_token`, `request_tokens`
    and `response_tokens` (seconds on one clock; tokens). What it lacks is filled in where that is safe, and noted:
    `scheduled` becomes `sent`, `request` the row number, `status` `ok` where there is a last token and `truncated`
    elsewhere. Its times are shifted so that the run starts at 0. Raises InputError naming the missing column, or the
    row that is wrong.
    """
    if isinstance(source, Run):
        return source
    path = Path(source)
    journal = _journal_of(path)
    if journal is not None:
        from squall.run.journal import read_journal

        return read_journal(journal)
    if not path.exists():
        raise InputError(
            f"{path}: there is no such run; give a {', '.join(SUFFIXES)} file that squall or you have written."
        )
    if path.is_dir():
        raise InputError(f"{path}: this is a directory; give a run file, or the .journal of a replay.")
    table, raw = _read_table(path), _read_meta(path)
    if raw is None:
        return _recorded(table, path)
    try:
        meta = msgspec.json.decode(raw, type=RunMeta)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise InputError(f"{path}: its run metadata cannot be read ({error}); write the run again.") from error
    return Run.of(_known(table, SCHEMA, path), meta, _read_series(path))


def holds_run(path: str | Path) -> bool:
    """Whether the file at `path` is a run (and not a trace): it has a column `sent`, or is the journal of a replay.

    False for what cannot be read: the reader that is then tried says why.
    """
    path = Path(path)
    if _journal_of(path) is not None:
        return True
    if not path.is_file() or path.suffix.lower() not in SUFFIXES:
        return False
    try:
        if path.suffix.lower() == ".parquet":
            return "sent" in pl.read_parquet_schema(path)
        with path.open(encoding="utf-8-sig", errors="replace") as lines:
            first = lines.readline(1 << 20)
        return '"sent"' in first if path.suffix.lower() == ".jsonl" else "sent" in first.strip().split(",")
    except (OSError, pl.exceptions.PolarsError):
        return False


def _journal_of(path: Path) -> Path | None:
    if path.suffix == ".journal":
        return path if path.is_dir() else None
    beside = Path(f"{path}.journal")
    return beside if not path.exists() and beside.is_dir() else None


def _series_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.series{path.suffix}")


def _meta_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.meta.json")


def _write_table(frame: pl.DataFrame, path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        frame.write_parquet(path)
    elif suffix == ".jsonl":
        frame.write_ndjson(path)
    else:
        lists = [name for name, dtype in frame.schema.items() if isinstance(dtype, pl.List)]
        text = [
            pl.concat_str(
                pl.lit("["), pl.col(name).list.eval(pl.element().cast(pl.String)).list.join(","), pl.lit("]")
            ).alias(name)
            for name in lists
        ]
        frame.with_columns(text).write_csv(path)


def _read_table(path: Path) -> pl.DataFrame:
    """The file as it stands: CSV as text, the others with the types that they declare or show."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: a run is a {', '.join(SUFFIXES)} file; rename it if it is one of these.")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty.")
    try:
        if suffix == ".parquet":
            return pl.read_parquet(path)
        if suffix == ".csv":
            return pl.read_csv(path, infer_schema=False)
        return pl.read_ndjson(path, infer_schema_length=None)
    except pl.exceptions.PolarsError as error:
        raise InputError(_complaint(path, suffix, error)) from error


def _complaint(path: Path, suffix: str, error: Exception) -> str:
    if suffix == ".jsonl":
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    msgspec.json.decode(line.strip() or b"{}", type=dict)
                except (msgspec.DecodeError, msgspec.ValidationError):
                    return f"{path}: line {number} is not a JSON object; remove it or write the line again."
    return f"{path}: this is not a readable {suffix[1:]} file ({str(error).splitlines()[0].rstrip('.')})."


def _read_meta(path: Path) -> bytes | None:
    if path.suffix.lower() == ".parquet":
        text = pl.read_parquet_metadata(path).get(_KEY)
        return None if text is None else text.encode()
    beside = _meta_path(path)
    return beside.read_bytes() if beside.is_file() else None


def _read_series(path: Path) -> pl.DataFrame | None:
    beside = _series_path(path)
    return _known(_read_table(beside), SERIES, beside) if beside.is_file() else None


def _known(frame: pl.DataFrame, schema: pl.Schema, path: Path) -> pl.DataFrame:
    """The columns of `schema` in `frame`, with its types; the others are left out with a note."""
    unknown = [name for name in frame.columns if name not in schema]
    if unknown:
        note(f"{path}: ignored the columns {', '.join(unknown[:8])}{', …' if len(unknown) > 8 else ''}.")
    return pl.DataFrame([_typed(frame[name], dtype, path) for name, dtype in schema.items() if name in frame.columns])


def _typed(column: pl.Series, dtype: pl.DataType, path: Path) -> pl.Series:
    """`column` as `dtype`; what stands for "nothing" becomes null. InputError names the first row that is wrong."""
    if column.dtype == pl.String and dtype != pl.String:
        column = column.str.strip_chars()
        column = column.set(column.str.to_lowercase().is_in(_NOTHING), None)
    elif column.dtype.is_float():
        column = column.fill_nan(None)
    if column.dtype == dtype:
        typed = column
    elif dtype.is_integer():  # via floats, since other programs write whole numbers as 17.0
        floats = column.cast(pl.Float64, strict=False)
        typed = floats.set(floats != floats.round(), None).cast(dtype, strict=False)
    elif isinstance(dtype, pl.List) and column.dtype == pl.String:
        typed = _decoded(column, dtype, path)
    elif dtype == pl.Boolean and column.dtype == pl.String:
        typed = column.str.to_lowercase().replace_strict(
            {"true": True, "false": False}, default=None, return_dtype=pl.Boolean
        )
    else:
        typed = column.cast(dtype, strict=False)
    wrong = typed.is_null() & column.is_not_null()
    if typed.dtype == pl.Float64:
        wrong |= ~typed.is_finite().fill_null(True)
    if wrong.any():
        row = int(wrong.arg_max() or 0)
        kind = f"one of {', '.join(dtype.categories)}" if isinstance(dtype, pl.Enum) else _KINDS[dtype.base_type()]
        raise InputError(
            f"{path}: row {row + 1}: {column.name} is {column[row]!r}, not {kind}; correct it or leave it empty."
        )
    return typed


_NOTHING = ["", "nan", "null", "none", "na"]
_KINDS = {
    pl.Float64: "a finite number",
    pl.Int64: "a whole number",
    pl.Int32: "a whole number below 2^31",
    pl.Boolean: "true or false",
    pl.String: "text",
    pl.List: "a list of numbers",
}


def _decoded(column: pl.Series, dtype: pl.DataType, path: Path) -> pl.Series:
    try:
        return column.str.json_decode(dtype)
    except pl.exceptions.PolarsError as error:
        raise InputError(
            f"{path}: the column {column.name} holds something else than JSON lists of numbers; correct or remove it."
        ) from error


def _recorded(frame: pl.DataFrame, path: Path) -> Run:
    """A table made elsewhere as a run of kind `recorded`."""
    missing = [name for name in REQUIRED if name not in frame.columns]
    if missing:
        raise InputError(f"{path}: the column {missing[0]} is missing; a run needs at least {', '.join(REQUIRED)}.")
    table = _known(frame, SCHEMA, path)
    notes = [f"{path.name} was not written by squall: what its client did cannot be checked."]
    if "status" not in table.columns:
        table = table.with_columns(
            status=pl.when(pl.col("last_token").is_null()).then(pl.lit("truncated")).otherwise(pl.lit("ok"))
        )
        notes.append("No status recorded: rows with a last token count as ok, others as truncated.")
    if "scheduled" not in table.columns:
        _check_present(table, "sent", path)
        table = table.with_columns(scheduled=pl.col("sent"))
        notes.append("No schedule recorded: latency is from send.")
    if "request" not in table.columns:
        table = table.with_columns(request=pl.int_range(pl.len(), dtype=pl.Int64))
    if "attempt" not in table.columns:
        table = table.with_columns(attempt=pl.int_range(1, pl.len() + 1, dtype=pl.Int32).over("request"))
    if "ended" not in table.columns:
        table = table.with_columns(ended=pl.col("last_token"))
    _check_order(table, path)
    moments = [
        name
        for name in ("scheduled", "sent", "first_byte", "first_token", "last_token", "done", "ended")
        if name in table.columns
    ]
    zero = table["scheduled"].min() or 0.0
    trace = TraceMeta(source=str(path), format="run", rows=len(table))
    meta = RunMeta(
        kind="recorded",
        title=path.stem,
        trace=trace,
        offered=table["request"].n_unique(),
        verdict="UNCHECKED",
        verdict_reasons=["recorded elsewhere"],
        notes=notes,
    )
    for text in notes:
        note(text)
    series = _read_series(path)
    return Run.of(
        table.with_columns(pl.col(moments) - zero),
        meta,
        None if series is None else series.with_columns(pl.col("time") - zero),
    )


def _check_present(table: pl.DataFrame, name: str, path: Path) -> None:
    if table[name].null_count():
        row = int(table[name].is_null().arg_max() or 0)
        raise InputError(f"{path}: row {row + 1}: {name} is missing; give it or remove the row.")


def _check_order(table: pl.DataFrame, path: Path) -> None:
    """Each row was scheduled, and sent before its first token, and that before its last."""
    _check_present(table, "request", path)
    _check_present(table, "scheduled", path)
    for earlier, later in (("scheduled", "sent"), ("sent", "first_token"), ("first_token", "last_token")):
        wrong = (table[later] < table[earlier]).fill_null(False)
        if wrong.any():
            row = int(wrong.arg_max() or 0)
            raise InputError(
                f"{path}: row {row + 1}: {later} ({table[later][row]}) is before {earlier} ({table[earlier][row]}); "
                "all times must be on one clock."
            )
