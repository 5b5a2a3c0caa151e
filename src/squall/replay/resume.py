"""Going on with a replay that was killed: its journal says what is done, and when it was killed says what is lost.

The run's clock stops with the kill and goes on with the resumption, so that every request keeps its scheduled time.
What was in flight at the kill, or sent in the second that no line tells of, is lost and stays so: to send it again
would be a burst that the trace does not have. The rest of a conversation that lost a turn is lost with it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from squall.errors import InputError
from squall.replay.schedule import Schedule
from squall.run.attempt import Attempt, Writer, lines_path
from squall.run.journal import read_header, read_lines, read_schedule, write_header
from squall.run.table import RunMeta

if TYPE_CHECKING:
    from pathlib import Path

    import polars as pl

    from squall.replay.sender import Plan


@dataclass(frozen=True)
class Resumption:
    """Where a killed replay stood."""

    number: int
    """1 for the first resumption."""
    since: int
    """Nanoseconds of the run's clock at which it goes on."""
    left: np.ndarray
    """Indices of the rows that are still to be sent."""
    lost: np.ndarray
    """Indices of those whose outcome died with the writer."""
    meta: RunMeta

    def take_up(self, plan: "Plan", schedule: Schedule, meta: RunMeta) -> tuple[Schedule, RunMeta]:
        """Record what is lost; returns what is left of `schedule`, and the metadata that goes on."""
        writer = Writer(lines_path(plan.journal, 0, f"{plan.part}-lost"))
        for row in self.lost:
            writer.write(
                Attempt(
                    request=int(schedule.request[row]),
                    attempt=1,
                    status="cancelled",
                    scheduled=float(schedule.at[row]) / 1e9,
                    reason="lost",
                )
            )
        writer.close()
        told = (
            f"The replay was killed {self.since / 1e9:.1f} s after its start and resumed: {len(self.lost):,} requests "
            f"were lost, {len(self.left):,} were left to send. The server's caches and queue are not what they were."
        )
        meta = msgspec.structs.replace(
            meta,
            started=self.meta.started,
            notes=[*self.meta.notes, told],
            target=meta.target | {"resumed": self.number},
        )
        write_header(plan.journal, meta)
        return schedule.rows(self.left), meta


def resumption(journal: "Path", rows: "pl.DataFrame", schedule: Schedule) -> Resumption:
    """What the journal of a killed replay leaves to do. InputError if it is not the journal of this replay."""
    meta = read_header(journal)
    if not read_schedule(journal).equals(rows):
        raise InputError(
            f"--resume: {journal} is of another trace, or of other trace options or --duration; repeat the command "
            "exactly, with --resume added."
        )
    lines = read_lines(journal).select("request", "sent", "ended")
    known = np.isin(schedule.request, lines["request"].to_numpy())
    moments = [float(value) for name in ("sent", "ended") if (value := lines[name].max()) is not None]  # type: ignore[arg-type]
    cut = round(max(moments, default=-1.0) * 1e9)
    lost = ~known & (schedule.at <= cut)
    if schedule.conversation is not None:
        broken = np.unique(schedule.conversation[lost])
        lost |= ~known & np.isin(schedule.conversation, broken)
    left = np.flatnonzero(~known & ~lost)
    number = 1 + sum(1 for file in journal.glob("worker-0.*-lost.jsonl"))
    since = int(schedule.at[left[0]]) if len(left) else max(cut, 0)
    return Resumption(number, since, left, np.flatnonzero(lost), meta)
