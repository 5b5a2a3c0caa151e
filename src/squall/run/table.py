"""The Run table: one row per attempt, the time series of the system beside it, and the metadata."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from squall.errors import InputError
from squall.trace.table import SERVICES, TraceMeta

STATUSES = ("ok", "http_error", "timeout", "refused", "reset", "truncated", "cancelled", "client_fault")
TOKEN_SOURCES = ("server", "client", "chunks")

# All times are seconds (f64) on one monotonic clock whose zero is the run's start; null = never happened, never 0.
_COLUMNS: dict[str, Any] = {
    "request": pl.Int64,  # row of the Trace
    "attempt": pl.Int32,  # 1 is the first
    "scheduled": pl.Float64,
    "sent": pl.Float64,
    "first_byte": pl.Float64,
    "first_token": pl.Float64,  # of any channel: answer, reasoning, tool call
    "first_answer": pl.Float64,  # of the answer itself; null if none came or nobody looked
    "last_token": pl.Float64,
    "done": pl.Float64,  # terminal event seen; null for a truncated stream
    "ended": pl.Float64,  # the outcome was decided
    "status": pl.Enum(STATUSES),
    "reason": pl.String,  # refines the status: `in_band`, `no_prompt`, `queue_full`, `unservable`, …
    "http_status": pl.Int32,
    "message": pl.String,  # what the server or the exception said, at most 200 characters
    "request_tokens": pl.Int32,
    "response_tokens": pl.Int32,
    "asked_request_tokens": pl.Int32,
    "asked_response_tokens": pl.Int32,
    "token_source": pl.Enum(TOKEN_SOURCES),
    "chunks": pl.List(pl.Float64),  # seconds from first_token to each content read; the first is 0
    "replica": pl.Int32,
    "preemptions": pl.Int32,
    "cached_tokens": pl.Int32,
    "service": pl.Enum(SERVICES),  # carried through from the trace
    "model": pl.String,
    "failed": pl.Boolean,  # the trace's recorded failure
}
SCHEMA = pl.Schema(_COLUMNS)

# One row per sample; a sample covers the time since the one before it. Columns that a source lacks are null.
SERIES = pl.Schema(
    {
        "time": pl.Float64,  # seconds on the run's clock, end of the sample
        "replica": pl.Int32,
        "running": pl.Float64,  # requests in the batch: mean over the sample
        "waiting": pl.Float64,  # requests in the queue: mean over the sample
        "kv_used": pl.Float64,  # share of KV blocks in use, 0..1: highest in the sample
        "preemptions": pl.Int64,  # in the sample
        "batch_tokens": pl.Float64,  # tokens computed per second
    }
)


class RunMeta(msgspec.Struct, kw_only=True, frozen=True):
    """What was run, against what, by what; and whether the numbers can be believed."""

    kind: str
    """`replay`, `simulation` or `recorded` (a table made elsewhere)."""
    title: str = ""
    """A short name for reports: `Poisson arrivals`, `llama.cpp, 45 s`."""
    trace: TraceMeta | None = None
    target: dict[str, Any] = {}
    """Server URL, API and served model; or the modelled cluster: GPU, model, replicas, engine, KV blocks, limits."""
    step_time: str | None = None
    """Simulations: `uncalibrated roofline`, or the calibration's name and error."""
    offered: int = 0
    """Requests of the trace, each of which has at least one row."""
    seed: int | None = None
    version: str = ""
    machine: str = ""
    started: str | None = None
    """Wall-clock time of the clock's zero, ISO 8601 UTC."""
    state: str = "complete"
    """`complete`, `interrupted` or `failed`."""
    open_loop: bool = True
    verdict: str = "VALID"
    """`VALID`, `CLIENT-LIMITED`, or `UNCHECKED` (recorded elsewhere)."""
    verdict_reasons: list[str] = []
    notes: list[str] = []


@dataclass(frozen=True)
class Run:
    """What was answered: `table` has the columns of `SCHEMA`, `series` those of `SERIES` (often empty)."""

    table: pl.DataFrame
    meta: RunMeta
    series: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=SERIES))

    @classmethod
    def of(
        cls,
        columns: "dict[str, Any] | pl.DataFrame",
        meta: RunMeta,
        series: "dict[str, Any] | pl.DataFrame | None" = None,
    ) -> "Run":
        """A run from the columns that are known; the others become null. Unknown columns are an error."""
        return cls(_conform(columns, SCHEMA), meta, _conform({} if series is None else series, SERIES))

    def __len__(self) -> int:
        return len(self.table)


RunSource = Run | str | Path
"""What a verb takes for a RUN: a table in memory or a file."""


def _conform(columns: "dict[str, Any] | pl.DataFrame", schema: pl.Schema) -> pl.DataFrame:
    frame = columns if isinstance(columns, pl.DataFrame) else pl.DataFrame(columns)
    unknown = [name for name in frame.columns if name not in schema]
    if unknown:
        raise InputError(f"unknown column {unknown[0]!r} in a run table; known are {', '.join(schema)}.")
    if not frame.width:
        return pl.DataFrame(schema=schema)
    known = [pl.col(name).cast(dtype) for name, dtype in schema.items() if name in frame.columns]
    missing = [pl.lit(None, dtype).alias(name) for name, dtype in schema.items() if name not in frame.columns]
    return frame.select(*known, *missing).select(schema.names())
