"""The Trace table: one row per request, and the metadata that says which rows of which input these are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl

from squall.errors import InputError

SERVICES = ("conversation", "api")

_COLUMNS: dict[str, Any] = {
    "arrival": pl.Float64,  # seconds since the trace's start
    "request_tokens": pl.Int32,
    "response_tokens": pl.Int32,  # 0 = failed
    "failed": pl.Boolean,  # the recorded system failed this request
    "service": pl.Enum(SERVICES),
    "model": pl.String,
    "session": pl.Int64,
    "turn": pl.Int32,  # 1 is the first request of its session
    "elapsed": pl.Float64,  # recorded end-to-end seconds
    "prefix": pl.List(pl.Int64),  # block hashes of the prompt
}
SCHEMA = pl.Schema(_COLUMNS)
REQUIRED = ("arrival", "request_tokens", "response_tokens")


class Shape(msgspec.Struct, kw_only=True, frozen=True):
    """The numbers of a trace that scaling it may change; null: not known, or too short to say."""

    requests: int
    span: float
    rate: float | None
    gap_cv: float | None
    peak_60s: int
    """Most requests in any 60 s."""
    request_tokens: float | None
    """Means, of the answered requests."""
    response_tokens: float | None
    sessions: int | None
    turns: float | None
    """Mean requests of a session."""
    dispersion: dict[str, float | None]
    """Variance over mean of the counts in bins of so many seconds."""


class Scaling(msgspec.Struct, kw_only=True, frozen=True):
    """What `--rate` did to a trace beside changing its rate."""

    method: str
    before: Shape
    after: Shape


class TraceMeta(msgspec.Struct, kw_only=True, frozen=True):
    """Where a trace comes from and what was done to it, in order; it travels with every number that squall prints."""

    source: str
    """The file or profile, as the user named it."""
    format: str
    """`burstgpt`, `azure`, `mooncake`, `squall`, `profile`, `generated`, …"""
    sha256: str | None = None
    """Of the input file's bytes."""
    licence: str | None = None
    attribution: str | None = None
    clock: float = 0.0
    """The source's own clock (seconds) at arrival 0; writers put it back."""
    epoch: int | None = None
    """Nanoseconds from 1970-01-01 to arrival 0 on the source's wall clock, where it has one."""
    midnight: float | None = None
    """Seconds from a local midnight to arrival 0: hour of day = (midnight + arrival) / 3600 mod 24. None: unknown."""
    weekday: int | None = None
    """Weekday (Monday = 0) of that midnight's day. None: unknown."""
    block_size: int | None = None
    """Tokens per block hash in `prefix`."""
    tick: float | None = None
    """Resolution of the recorded times in seconds (BurstGPT 1, Mooncake 3): shorter gaps are artefacts."""
    rows: int = 0
    """Rows read from the source, before any filter."""
    steps: list[str] = []
    """Filters and scalings applied since reading, in order, each as a short text (`--head 100`)."""
    speed: float = 1.0
    """Product of all time compressions applied."""
    scaling: Scaling | None = None
    """What the last `--rate` changed; None: none was given, or the file was scaled block by block."""
    seed: int | None = None
    notes: list[str] = []
    """What a reader had to decide or repair, one sentence each."""


@dataclass(frozen=True)
class Trace:
    """What was asked: `table` has the columns of `SCHEMA`, sorted by arrival; `meta` says which rows these are."""

    table: pl.DataFrame
    meta: TraceMeta

    @classmethod
    def of(cls, columns: "dict[str, Any] | pl.DataFrame", meta: TraceMeta) -> "Trace":
        """A trace from the columns that are known; the others become null, `failed` becomes response_tokens == 0.

        Turns are counted where sessions are known. Raises InputError if a required column or every row is missing.
        """
        frame = columns if isinstance(columns, pl.DataFrame) else pl.DataFrame(columns)
        missing = [name for name in REQUIRED if name not in frame.columns]
        if missing:
            raise InputError(
                f"{meta.source}: a trace needs the columns {', '.join(REQUIRED)}; {', '.join(missing)} is missing."
            )
        if frame.is_empty():
            raise InputError(f"{meta.source}: there is no request in it.")
        if "failed" not in frame.columns:
            frame = frame.with_columns(failed=pl.col("response_tokens") == 0)
        known = [pl.col(name).cast(dtype) for name, dtype in SCHEMA.items() if name in frame.columns]
        unknown = [pl.lit(None, dtype).alias(name) for name, dtype in SCHEMA.items() if name not in frame.columns]
        table = frame.select(*known, *unknown).select(SCHEMA.names())
        if not table["arrival"].is_sorted():
            table = table.sort("arrival", maintain_order=True)
        if table["turn"].null_count() == len(table) and table["session"].null_count() < len(table):
            table = table.with_columns(turn=_turns(table["session"]))
        return cls(table, meta)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def span(self) -> float:
        """Seconds from the first to the last arrival."""
        return float(self.table["arrival"][-1] - self.table["arrival"][0])

    @property
    def rate(self) -> float:
        """Mean requests/s: (n - 1) gaps over the span; nan if all requests arrive at once."""
        return (len(self) - 1) / self.span if self.span > 0 else float("nan")

    def replace(self, table: pl.DataFrame, step: str | None = None, **meta: Any) -> "Trace":
        """This trace with other rows and, if `step` is given, that step added to the metadata."""
        steps = [*self.meta.steps, step] if step else self.meta.steps
        return Trace(table, msgspec.structs.replace(self.meta, steps=steps, **meta))


def _turns(session: pl.Series) -> pl.Series:
    """The place of each request in its session, from 1; null outside of sessions (which are most rows, so left out)."""
    rows = session.is_not_null().arg_true()
    known = session.gather(rows).to_numpy()
    order = np.argsort(known, kind="stable")
    first = np.flatnonzero(np.diff(known[order], prepend=known[order[0]] - 1))
    place = np.empty(known.size, np.int32)
    place[order] = np.arange(1, known.size + 1) - np.repeat(first, np.diff(first, append=known.size))
    return pl.zeros(len(session), pl.Int32, eager=True).set(session.is_null(), None).scatter(rows, place)


TraceSource = Trace | str | Path
"""What a verb takes for a TRACE: a table in memory, a file, `-`, or a built-in profile such as `burstgpt://all`."""
