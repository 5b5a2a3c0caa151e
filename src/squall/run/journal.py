"""The journal of a replay, `RUN.journal/`: written from the first second, readable at any time, even after `kill -9`.

    schedule.parquet   every request that the run offers: request, scheduled, asked lengths, what is carried through
    run.json           the RunMeta; its state is `running` until the end
    worker-0.jsonl     one line per attempt of worker 0, appended once a second: the fields of `Attempt`
    worker-0.json      what worker 0 says of itself at its end: the fields of `Client`

A request without a line was lost with its writer: it becomes a row of its own, so that the outcomes add up to the rows.
"""

import os
from pathlib import Path

import msgspec
import polars as pl

from squall.errors import InputError
from squall.progress import note
from squall.run.table import SCHEMA, Run, RunMeta
from squall.run.verdict import Client, judge

SCHEDULE = "schedule.parquet"
HEADER = "run.json"


class Attempt(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One line: what happened to one attempt, in the columns of the Run; what is null or carried is left out."""

    request: int
    attempt: int
    status: str
    scheduled: float | None = None
    sent: float | None = None
    first_byte: float | None = None
    first_token: float | None = None
    first_answer: float | None = None
    last_token: float | None = None
    done: float | None = None
    ended: float | None = None
    reason: str | None = None
    http_status: int | None = None
    message: str | None = None
    request_tokens: int | None = None
    response_tokens: int | None = None
    token_source: str | None = None
    chunks: list[float] | None = None
    cached_tokens: int | None = None


_LINE = pl.Schema({name: SCHEMA[name] for name in Attempt.__struct_fields__})
# Requests without a line, by the state in which the journal was left.
_MISSING = {
    "running": ("cancelled", "lost"),  # in flight or not yet sent when the writer was killed
    "interrupted": ("cancelled", "stop"),
    "failed": ("client_fault", "internal"),
    "complete": ("client_fault", "not_sent"),
}


def lines_path(journal: Path, worker: int, part: str = "") -> Path:
    """Where `worker` writes its attempts; `part` tells apart the runs of a replay that was resumed."""
    return journal / f"worker-{worker}{part}.jsonl"


def client_path(journal: Path, worker: int, part: str = "") -> Path:
    """Where `worker` writes what it says of itself."""
    return journal / f"worker-{worker}{part}.json"


def write_header(journal: Path, meta: RunMeta) -> None:
    """Write or replace the header: whole or not at all."""
    temporary = journal / f".{HEADER}.tmp"
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(meta), indent=1) + b"\n")
    temporary.replace(journal / HEADER)


def read_journal(path: str | Path) -> Run:
    """The run in a journal directory: its attempts, and one row for each request that has none.

    The verdict is computed from the rows that are there. A half-written last line is left out with a note; a bad line
    elsewhere raises InputError, and so does a directory that is not a journal.
    """
    path = Path(path)
    meta, offered = read_header(path), read_schedule(path)
    attempts = read_lines(path)
    status, reason = _MISSING[meta.state]
    missing = offered.join(attempts, on="request", how="anti").select(
        "request",
        "scheduled",
        attempt=pl.lit(1, pl.Int32),
        status=pl.lit(status, SCHEMA["status"]),
        reason=pl.lit(reason),
    )
    rows = pl.concat([attempts, missing], how="diagonal").sort("request", "attempt")
    table = rows.join(offered.drop("scheduled"), on="request", how="left", maintain_order="left")
    notes = list(meta.notes)
    if meta.state == "running":
        notes.append(f"The replay did not end by itself; {len(missing):,} requests have no recorded outcome.")
        meta = msgspec.structs.replace(meta, state="interrupted")
    clients = [msgspec.json.decode(file.read_bytes(), type=Client) for file in sorted(path.glob("worker-*.json"))]
    run = Run.of(table, meta)
    reasons = judge(run, clients)
    verdict = "CLIENT-LIMITED" if reasons else "VALID"
    meta = msgspec.structs.replace(meta, notes=notes, verdict=verdict, verdict_reasons=reasons)
    return Run(run.table, meta)


def read_lines(path: Path) -> pl.DataFrame:
    """The attempts in a journal directory, in no order."""
    return pl.concat([_lines(file) for file in sorted(path.glob("worker-*.jsonl"))] or [pl.DataFrame(schema=_LINE)])


def read_header(path: Path) -> RunMeta:
    """The metadata in a journal directory; InputError if it is none."""
    file = path / HEADER
    if not file.is_file() or not (path / SCHEDULE).is_file():
        raise InputError(f"{path}: this is not the journal of a replay; it lacks {HEADER} or {SCHEDULE}.")
    try:
        return msgspec.json.decode(file.read_bytes(), type=RunMeta)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: the journal's header cannot be read ({error}).") from error


def read_schedule(path: Path) -> pl.DataFrame:
    """The requests that the replay of a journal offers."""
    try:
        return pl.read_parquet(path / SCHEDULE)
    except pl.exceptions.PolarsError as error:
        raise InputError(f"{path / SCHEDULE}: the journal's schedule cannot be read ({error}).") from error


def _lines(file: Path) -> pl.DataFrame:
    text = file.read_bytes()
    end = text.rfind(b"\n") + 1
    if end < len(text):
        note(f"{file}: the last line is half-written and left out.")
    if end == 0:
        return pl.DataFrame(schema=_LINE)
    loose = {name: pl.String if isinstance(dtype, pl.Enum) else dtype for name, dtype in _LINE.items()}
    try:
        return pl.read_ndjson(text[:end], schema=loose).cast(_LINE)
    except pl.exceptions.PolarsError as error:
        raise InputError(_complaint(file, text[:end], error)) from error


def _complaint(file: Path, text: bytes, error: Exception) -> str:
    for number, line in enumerate(text.splitlines(), 1):
        try:
            msgspec.json.decode(line, type=Attempt)
        except (msgspec.DecodeError, UnicodeDecodeError) as reason:
            return f"{file}: line {number} cannot be read ({reason}); remove it to read the rest."
    return f"{file}: cannot be read ({error})."


class Writer:
    """Appends attempts to a worker's file; what was flushed survives the death of the process."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._encoder = msgspec.json.Encoder()
        self._lines: list[bytes] = []

    def write(self, attempt: Attempt) -> None:
        """Take a line."""
        self._lines.append(self._encoder.encode(attempt))

    def flush(self) -> None:
        """Hand the lines taken so far to the system, in one write."""
        if self._lines:
            self._lines.append(b"")
            data = memoryview(b"\n".join(self._lines))
            self._lines.clear()
            while data:
                data = data[os.write(self._file, data) :]

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        os.close(self._file)
