"""What is sent when: the rows of a Trace as arrays of absolute times, lengths and conversations, made before the run.

The arrival process governs how conversations start. A later turn goes out when the answer before it has come and the
user has thought: after the recorded think time where the trace says how long its answers took, else at its recorded
distance from the turn before, but never before the answer.
"""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from squall.errors import InputError
from squall.seeds import stream

if TYPE_CHECKING:
    import polars as pl

    from squall.trace.table import Trace

PROMPT_LIMIT = 2**21
"""Tokens of the longest prompt that is sent (about 10 MB of text); longer ones are recorded as cancelled."""

History = Literal["recorded", "live", "none"]
"""What a later turn carries: text of the recorded length, the replies as they came, or nothing (no conversations)."""
RecordedFailures = Literal["short", "cancel", "mark"]
"""What becomes of a request that the traced system failed: asks for one token, is hung up on, or is not sent."""

NO_HANG_UP = -1.0
NOT_SENT = -2.0


@dataclass(frozen=True)
class Schedule:
    """Rows in the order of their times. All arrays have one entry per request that the run offers."""

    request: np.ndarray
    """int32: row of the Trace."""
    at: np.ndarray
    """int64: nanoseconds after the run's start, ascending. For a later turn: when the trace has it."""
    request_tokens: np.ndarray
    """int32: prompt length asked for; 0 cannot be sent."""
    response_tokens: np.ndarray
    """int32: response length asked for, at least 1: a recorded failure has 0, but no server answers with nothing."""
    conversation: np.ndarray | None = None
    """int32: requests with the same number are turns of one conversation, in the order of the rows. None: no turns."""
    root: np.ndarray | None = None
    """int32: the Trace row whose text this prompt goes on with; its own row where it begins a text."""
    think: np.ndarray | None = None
    """float32: seconds from the end of the turn before to this one; nan where the trace does not tell."""
    hang_up: np.ndarray | None = None
    """float32: seconds after sending at which the client hangs up; NO_HANG_UP, or NOT_SENT at all."""
    blocks: np.ndarray | None = None
    """int64: block hashes of all prompts, one after the other."""
    block_ends: np.ndarray | None = None
    """int64: where the hashes of each row end in `blocks`."""

    def __len__(self) -> int:
        return len(self.request)

    def part(self, worker: int, workers: int) -> "Schedule":
        """Every `workers`-th conversation, so that all workers have the same load; a conversation stays on one."""
        if self.conversation is None:
            return self.rows(np.arange(worker, len(self), workers))
        return self.rows(np.flatnonzero(self.conversation % workers == worker))

    def rows(self, chosen: np.ndarray) -> "Schedule":
        """Only these rows (ascending indices)."""
        taken: dict[str, Any] = {
            field.name: column[chosen]
            for field in fields(self)
            if (column := getattr(self, field.name)) is not None and field.name not in ("blocks", "block_ends")
        }
        if self.blocks is not None and self.block_ends is not None:
            starts = np.concatenate(([0], self.block_ends[:-1]))[chosen]
            counts = self.block_ends[chosen] - starts
            ends = np.cumsum(counts)
            taken["blocks"] = self.blocks[np.repeat(starts - ends + counts, counts) + np.arange(counts.sum())]
            taken["block_ends"] = ends
        return Schedule(**taken)

    def shared_share(self, block_size: int) -> float | None:
        """Share of the prompt tokens that stand in a block which an earlier row has had: what a cache without limit
        would know. None without blocks."""
        if self.blocks is None or self.block_ends is None:
            return None
        counts = np.diff(self.block_ends, prepend=0)
        row = np.repeat(np.arange(len(self)), counts)
        place = np.arange(len(row)) - np.repeat(self.block_ends - counts, counts)
        size = np.clip(self.request_tokens[row] - place * block_size, 0, block_size)
        _, first, block = np.unique(self.blocks, return_index=True, return_inverse=True)
        known = row[first][block] < row
        return float(size[known].sum() / max(int(self.request_tokens.sum(dtype=np.int64)), 1))

    def turns(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Indices of the rows that open a conversation, and for each row the index of the next turn (-1: none).

        None, None if every row is a conversation of its own.
        """
        if self.conversation is None:
            return None, None
        order = np.argsort(self.conversation, kind="stable")
        same = self.conversation[order][1:] == self.conversation[order][:-1]
        following = np.full(len(self), -1, dtype=np.int32)
        following[order[:-1][same]] = order[1:][same]
        opens = np.ones(len(self), dtype=bool)
        opens[order[1:][same]] = False
        return np.flatnonzero(opens).astype(np.int32), following


def rows_of(trace: "Trace", duration: float | None = None) -> "pl.DataFrame":
    """The offered rows of `trace` in the columns of a Run; `scheduled` is in seconds after the first arrival.

    With `duration` only the rows scheduled before that many seconds. Raises InputError for times and lengths that
    cannot be sent.
    """
    import polars as pl

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


def schedule_of(
    rows: "pl.DataFrame",
    trace: "Trace | None" = None,
    *,
    history: History = "recorded",
    failures: RecordedFailures = "short",
    cancel_rate: float = 0.0,
    cancel_after: float = 1.0,
    seed: int = 0,
) -> Schedule:
    """The arrays that the senders need, from the table that `rows_of` made of `trace`.

    A share `cancel_rate` of the requests, chosen by `seed`, is hung up on after `cancel_after` seconds.
    """
    request = rows["request"].to_numpy()
    asked, answers = (rows[f"asked_{name}_tokens"].to_numpy() for name in ("request", "response"))
    response = np.maximum(answers, 1).astype(np.int32)
    hang_up = None
    if cancel_rate > 0:
        chosen = stream(seed, "cancel").random(int(request.max(initial=0)) + 1)[request] < cancel_rate
        hang_up = np.where(chosen, np.float32(cancel_after), np.float32(NO_HANG_UP)).astype(np.float32)
    source = None if trace is None else trace.table[request]
    if failures != "short" and rows["failed"].any():
        failed = rows["failed"].fill_null(False).to_numpy()
        hang_up = np.full(len(rows), NO_HANG_UP, dtype=np.float32) if hang_up is None else hang_up
        hang_up[failed] = NOT_SENT
        if failures == "cancel":
            elapsed = np.full(len(rows), np.nan) if source is None else source["elapsed"].cast(float).to_numpy()
            hang_up[failed] = np.where(elapsed > 0, elapsed, cancel_after)[failed]
            answered = answers[~failed & (answers > 0)]
            response[failed & (answers == 0)] = int(np.median(answered)) if len(answered) else 64
    columns: dict[str, Any] = {}
    if trace is not None and source is not None:
        if history != "none" and source["session"].null_count() < len(source):
            columns |= _conversations(source, request, asked, answers, trace.meta.speed)
        if source["prefix"].null_count() < len(source) and trace.meta.block_size:
            counts = source["prefix"].list.len().fill_null(0).to_numpy().astype(np.int64)
            columns["blocks"] = source["prefix"].drop_nulls().explode().drop_nulls().to_numpy()
            columns["block_ends"] = np.cumsum(counts)
    return Schedule(
        request.astype(np.int32),
        np.rint(rows["scheduled"].to_numpy() * 1e9).astype(np.int64),
        asked.astype(np.int32),
        response,
        hang_up=hang_up,
        **columns,
    )


def _conversations(
    source: "pl.DataFrame", request: np.ndarray, asked: np.ndarray, answers: np.ndarray, speed: float
) -> dict[str, np.ndarray]:
    """Conversation, root and think time of each row.

    A turn goes on with the text before it if its prompt is as long as the prompt and the answer before it; a shorter
    one cannot hold them, so it begins a new text.
    """
    known = source["session"].is_not_null().to_numpy()
    alone = np.flatnonzero(~known)
    name = source["session"].fill_null(0).to_numpy().copy()
    _, number = np.unique(np.where(known, name, 0), return_inverse=True)
    number = number.astype(np.int64)
    number[alone] = number.max(initial=0) + 1 + np.arange(len(alone))
    _, first, number = np.unique(number, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int32)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first), dtype=np.int32)
    conversation = rank[number]

    order = np.argsort(conversation, kind="stable")
    before, after = order[:-1], order[1:]
    same = conversation[before] == conversation[after]
    carries = same & (asked[after] >= asked[before].astype(np.int64) + answers[before])
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = ~carries
    root = np.empty(len(order), dtype=np.int32)
    root[order] = request[order][np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))]

    think = np.full(len(order), np.nan, dtype=np.float32)
    elapsed = source["elapsed"].cast(float).fill_null(float("nan")).to_numpy()
    gap = np.diff(source["arrival"].to_numpy()[order])
    think[after[same]] = np.maximum(0, gap - elapsed[before] / speed)[same]
    return {"conversation": conversation, "root": root, "think": think}
