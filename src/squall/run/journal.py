"""The journal of a replay, `RUN.journal/`: written from the first second, readable at any time, even after `kill -9`.

    schedule.parquet   every request that the run offers: request, scheduled, asked lengths, what is carried through
    run.json           the RunMeta; its state is `running` until the end
    worker-0.jsonl     one line per attempt of worker 0, appended once a second: the fields of `Attempt`
    worker-0.json      what worker 0 says of itself at its end: the fields of `Client`
    series.jsonl       the server's own numbers, if it tells them: a line per reading and replica
    server.json        what was read of them as a whole: `ServerMetrics`

A request without a line was lost with its writer: it becomes a row of its own, so that the outcomes add up to the rows.
"""

from pathlib import Path

import msgspec
import polars as pl

from squall.errors import InputError
from squall.files import replace_file
from squall.progress import note
from squall.run.attempt import Attempt, Client
from squall.run.server import ServerMetrics
from squall.run.table import SCHEMA, SERIES, Run, RunMeta
from squall.run.verdict import judge

SCHEDULE = "schedule.parquet"
HEADER = "run.json"
SERIES_LINES = "series.jsonl"
SERVER = "server.json"


_LINE = pl.Schema({name: SCHEMA[name] for name in Attempt.__struct_fields__})
# Requests without a line, by the state in which the journal was left.
_MISSING = {
    "running": ("cancelled", "lost"),  # in flight or not yet sent when the writer was killed
    "interrupted": ("cancelled", "stop"),
    "failed": ("client_fault", "internal"),
    "complete": ("client_fault", "not_sent"),
}


def write_header(journal: Path, meta: RunMeta) -> None:
    """Write or replace the header: whole or not at all."""
    replace_file(journal / HEADER, msgspec.json.format(msgspec.json.encode(meta), indent=1) + b"\n")


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
    server = _server(path)
    if server is not None and server.failed:
        readings = server.scrapes + server.failed
        notes.append(
            f"{server.failed} of {readings} readings of the server's metrics failed, the last: {server.error}."
        )
    if server is not None and server.restarts:
        notes.append(f"The server's counters began anew {server.restarts} times: it was restarted.")
    meta = msgspec.structs.replace(meta, notes=notes, verdict=verdict, verdict_reasons=reasons, server=server)
    return Run.of(run.table, meta, _series(path))


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


def _server(path: Path) -> ServerMetrics | None:
    file = path / SERVER
    try:
        return msgspec.json.decode(file.read_bytes(), type=ServerMetrics) if file.is_file() else None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        note(f"{file}: cannot be read and is left out ({error}).")
        return None


def _series(path: Path) -> pl.DataFrame:
    """What was read from the server while the run lasted: a reading before time 0 only gives the counters' base."""
    file = path / SERIES_LINES
    text = file.read_bytes() if file.is_file() else b""
    text = text[: text.rfind(b"\n") + 1]
    if not text:
        return pl.DataFrame(schema=SERIES)
    try:
        return pl.read_ndjson(text, schema=SERIES).filter(pl.col("time") >= 0)
    except pl.exceptions.PolarsError as error:
        note(f"{file}: cannot be read and is left out ({error}).")
        return pl.DataFrame(schema=SERIES)


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
