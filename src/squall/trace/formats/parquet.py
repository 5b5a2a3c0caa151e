"""squall's own Parquet: the Trace table, its metadata in the file's key-value metadata."""

import io
from collections.abc import Callable, Iterator
from typing import IO

import msgspec
import polars as pl
from polars.io.plugins import register_io_source

from squall.errors import InputError
from squall.trace.formats.rows import Finding, Parsed, finding_at
from squall.trace.table import REQUIRED, SCHEMA, TraceMeta

_META_KEY = "squall.trace"
ROW_GROUP = 1 << 17
"""Rows of a row group: fewer than the sessions that polars can number by an array, which is three times faster than by
hashing, and few enough to stay in the cache."""


def parse_squall(data: bytes) -> Parsed:
    """squall's own Parquet: the Trace table, its metadata in the file's key-value metadata."""
    try:
        frame = pl.read_parquet(io.BytesIO(data))
    except (pl.exceptions.PolarsError, OSError) as error:
        raise InputError(f"it cannot be read as a squall Parquet file: {str(error).splitlines()[0]}") from error
    return checked(frame, kept_meta(io.BytesIO(data)))


def kept_meta(file: IO[bytes]) -> TraceMeta | None:
    """The metadata that a squall Parquet file holds; None if it holds none."""
    try:
        kept = pl.read_parquet_metadata(file).get(_META_KEY)
        return msgspec.json.decode(kept, type=TraceMeta) if kept else None
    except (pl.exceptions.PolarsError, msgspec.DecodeError, OSError) as error:
        raise InputError(f"it cannot be read as a squall Parquet file: {str(error).splitlines()[0]}") from error


def checked(frame: pl.DataFrame, meta: TraceMeta | None) -> Parsed:
    """The columns of a squall Parquet file, checked."""
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
    # Columns of the type Null say nothing.
    frame = frame.select([name for name in SCHEMA if frame.schema.get(name, pl.Null) != pl.Null])
    if frame.schema.get("model") not in (None, pl.String):
        frame = frame.with_columns(pl.col("model").cast(pl.String))
    return Parsed(frame, findings, {"kept": meta} if meta else {})


def write_squall(frames: Iterator[pl.DataFrame], meta: Callable[[], TraceMeta], file: IO[bytes], wide: bool) -> None:
    """One row group for each frame, with the first one's types; the metadata are asked for after the last one."""
    begin = [next(frames)]
    schema = begin[0].schema

    def source(
        with_columns: list[str] | None, predicate: pl.Expr | None, n_rows: int | None, batch_size: int | None
    ) -> Iterator[pl.DataFrame]:
        yield begin.pop()
        yield from frames

    register_io_source(source, schema=schema).sink_parquet(
        file,
        # A sixth more bytes than zstd's lowest level, and half the time, which is a fifth of that of drawing a trace.
        compression="lz4",
        statistics=False,
        row_group_size=ROW_GROUP,
        metadata=lambda _: {_META_KEY: msgspec.json.encode(meta()).decode()},
        engine="streaming",
    )
