"""Conversations: turns, silences, think times, growth of the prompt, and how many run at once.

A session's requests in order of arrival are its turns. Of two neighbours (previous, next): gap = difference of their
arrivals; think time = gap minus the recorded elapsed time of the previous one, where that is known; growth =
difference of their request lengths; and the history was resent if next request >= previous request
+ 0.9 x previous response. Growth and history count pairs that both succeeded with a known length.
"""

import numpy as np
import polars as pl
from msgspec import Struct

from squall.characterize.summary import Octaves, Summary, octaves, summary

SILENCE = 600.0
"""A gap longer than this, s, cuts a session into bursts."""
MOST_TURNS = 20
FEWEST = 20
"""Fewer requests than this say nothing about a turn."""
HISTORY = 0.9
"""Share of the previous response that a follow-up must have room for to count as resending the history."""


class Turn(Struct, frozen=True, kw_only=True):
    """The requests that are the `turn`-th of their session and succeeded with a known length."""

    turn: int
    requests: int
    request_mean: float
    request_p50: float
    response_mean: float


class Conversations(Struct, frozen=True, kw_only=True):
    """Sessions in the trace; `sessions` is 0 and the rest null where the format records none."""

    sessions: int = 0
    requests: int = 0
    """Requests that belong to a session."""
    turns: Summary = Summary()
    """Requests per session. Sessions that the edges of the trace cut count with what is left of them."""
    turns_shares: list[float] = []
    """Share of sessions with 1, 2, … 20 requests."""
    by_turn: list[Turn] = []
    """How the prompt grows: lengths at the first 20 turns, as long as 20 requests have one."""
    single_share: float | None = None
    """Share of sessions with one request."""
    gaps: Summary = Summary()
    """Seconds between requests of a session."""
    gaps_octaves: Octaves = Octaves()
    """The same by factors of 2."""
    think: Summary = Summary()
    """Seconds from the end of a response to the next request; negative where it came before the end."""
    growth: Summary = Summary()
    """Request tokens minus those of the turn before."""
    shrinking_share: float | None = None
    """Share of follow-ups that are shorter than the request before them."""
    history_share: float | None = None
    """Share of follow-ups that resend the history."""
    first_request: Summary = Summary()
    """Request tokens of first turns."""
    later_request: Summary = Summary()
    """Request tokens of later turns."""
    bursts: Summary = Summary()
    """Requests per burst, where a silence of more than 600 s ends one."""
    open_mean: float | None = None
    """Sessions between their first and their last request, averaged over the span."""
    open_max: int | None = None


def session_statistics(table: pl.DataFrame) -> Conversations:
    """The sessions in `table` (columns of the Trace, of which `elapsed` may be left out; sorted by arrival)."""
    needed = ("arrival", "request_tokens", "response_tokens", "failed", "session", "elapsed")
    rows = table.select(name for name in needed if name in table.columns).filter(pl.col("session").is_not_null())
    if rows.is_empty():
        return Conversations()
    rows = rows.sort("session", maintain_order=True)
    session, arrival = rows["session"].to_numpy(), rows["arrival"].to_numpy()
    first = np.flatnonzero(np.diff(session, prepend=session[0] - 1))
    turns = np.diff(first, append=session.size)
    follow = np.delete(np.arange(session.size), first)
    gap = arrival[follow] - arrival[follow - 1]

    request, response = (rows[name].to_numpy().astype(float) for name in ("request_tokens", "response_tokens"))
    elapsed = rows["elapsed"].to_numpy().astype(float) if "elapsed" in rows.columns else np.full(len(rows), np.nan)
    usable = (request > 0) & ~rows["failed"].to_numpy()
    pair = follow[usable[follow] & usable[follow - 1]]
    growth = request[pair] - request[pair - 1]
    later = np.zeros(session.size, bool)
    later[follow] = True

    turn_of = np.arange(session.size) - np.repeat(first, turns)
    burst = np.flatnonzero(np.concatenate(([True], (np.diff(session) != 0) | (np.diff(arrival) > SILENCE))))
    opened, closed = arrival[first], arrival[first + turns - 1]
    span = float(arrival.max() - arrival.min())
    return Conversations(
        sessions=first.size,
        requests=session.size,
        turns=summary(turns),
        turns_shares=(np.bincount(turns, minlength=21)[1:21] / first.size).tolist(),
        by_turn=_by_turn(turn_of[usable], request[usable], response[usable]),
        single_share=float(np.mean(turns == 1)),
        gaps=summary(gap),
        gaps_octaves=octaves(gap),
        think=summary(gap - elapsed[follow - 1]),
        growth=summary(growth),
        shrinking_share=float(np.mean(growth < 0)) if pair.size else None,
        history_share=float(np.mean(growth >= HISTORY * response[pair - 1])) if pair.size else None,
        first_request=summary(request[usable & ~later]),
        later_request=summary(request[usable & later]),
        bursts=summary(np.diff(burst, append=session.size)),
        open_mean=float((closed - opened).sum() / span) if span > 0 else None,
        open_max=_most_at_once(opened, closed),
    )


def _by_turn(turn: np.ndarray, request: np.ndarray, response: np.ndarray) -> list[Turn]:
    """Lengths by turn, counted from 0 in `turn`."""
    found = []
    turn = np.minimum(turn, MOST_TURNS).astype(np.uint8)  # small numbers are sorted by counting
    order = np.argsort(turn, kind="stable")
    for number, here in enumerate(np.split(order, np.cumsum(np.bincount(turn, minlength=MOST_TURNS + 1)))[:MOST_TURNS]):
        if here.size < FEWEST:
            break
        asked = summary(request[here])
        found.append(
            Turn(
                turn=number + 1,
                requests=asked.n,
                request_mean=asked.mean or 0.0,
                request_p50=asked.p50 or 0.0,
                response_mean=float(response[here].mean()),
            )
        )
    return found


def _most_at_once(opened: np.ndarray, closed: np.ndarray) -> int:
    """The largest number of intervals [opened, closed] that share a moment."""
    opened, closed = np.sort(opened), np.sort(closed)
    return int((np.arange(1, opened.size + 1) - np.searchsorted(closed, opened, side="left")).max())
