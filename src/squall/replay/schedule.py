"""What is sent when: the rows of a Trace as arrays of absolute times and lengths, made once before the run."""

from dataclasses import dataclass

import numpy as np
import polars as pl

from squall.errors import InputError
from squall.trace.table import Trace

PROMPT_LIMIT = 2**21
"""Tokens of the longest prompt that is sent (about 10 MB of text); longer ones are recorded as cancelled."""


@dataclass(frozen=True)
class Schedule:
    """Rows in the order of their times. All arrays have one entry per request that the run offers."""

    request: np.ndarray
    """int64: row of the Trace."""
    at: np.ndarray
    """int64: nanoseconds after the run's start, ascending."""
    request_tokens: np.ndarray
    """int64: prompt length asked for; 0 cannot be sent."""
    response_tokens: np.ndarray
    """int64: response length asked for, at least 1: a recorded failure has 0, but no server answers with nothing."""

    def __len__(self) -> int:
        return len(self.request)

    def part(self, worker: int, workers: int) -> "Schedule":
        """Every `workers`-th row, so that all workers have the same load at all times."""
        return Schedule(*(column[worker::workers] for column in vars(self).values()))


def rows_of(trace: Trace, duration: float | None = None) -> pl.DataFrame:
    """The offered rows of `trace` in the columns of a Run; `scheduled` is in seconds after the first arrival.

    With `duration` only the rows scheduled before that many seconds. Raises InputError for times and lengths that
    cannot be sent.
    """
    table = trace.table.with_row_index("request")
    arrival = table["arrival"]
    if arrival.null_count() or not arrival.is_finite().all():
        raise InputError(f"{trace.meta.source}: an arrival is missing or not a number; see `squall validate`.")
    for name in ("request_tokens", "response_tokens"):
        if table[name].null_count() or (table[name] < 0).any():
            raise InputError(f"{trace.meta.source}: {name} is missing or negative in a row; see `squall validate`.")
    rows = table.select(
        pl.col("request").cast(pl.Int64),
        scheduled=pl.col("arrival") - pl.col("arrival").min(),
        asked_request_tokens="request_tokens",
        asked_response_tokens="response_tokens",
        service="service",
        model="model",
        failed="failed",
    )
    return rows if duration is None else rows.filter(pl.col("scheduled") < duration)


def schedule_of(rows: pl.DataFrame) -> Schedule:
    """The arrays that the senders need, from the table that `rows_of` made."""
    return Schedule(
        rows["request"].to_numpy(),
        np.rint(rows["scheduled"].to_numpy() * 1e9).astype(np.int64),
        rows["asked_request_tokens"].cast(pl.Int64).to_numpy(),
        np.maximum(rows["asked_response_tokens"].cast(pl.Int64).to_numpy(), 1),
    )
