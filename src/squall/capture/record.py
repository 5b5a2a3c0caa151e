"""What is kept of each request, and the files it goes to: a folder of segments, each a Trace and a Run.

    capture.json           when the capture began, of what
    live-00003.jsonl       the segment being written: one line a request, appended once a second
    trace-00001.parquet    closed segments, as the two tables that every verb reads
    run-00001.parquet
    trace.parquet, run.parquet   all segments together, made when the capture ends (or by `squall capture --finish`)

A thread writes, so that neither a slow nor a full disk holds up traffic: what cannot be written is dropped and counted.
"""

import os
import threading
from collections import deque
from pathlib import Path
from time import monotonic
from typing import Any

import msgspec
import polars as pl

from squall import __version__
from squall.capture.asked import BLOCK_TOKENS
from squall.errors import InputError
from squall.progress import note
from squall.run import Run, RunMeta, read_run, write_run
from squall.trace import Trace, TraceMeta, read_trace, write_trace

HEADER = "capture.json"
FLUSH = 1.0
"""Seconds between writes: what `kill -9` may cost."""
MOST_WAITING = 200_000
"""Records that wait for the disk before they are dropped."""
BYTES_PER_TOKEN = 4.0
"""Assumed where no usage was ever reported."""


class Captured(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One request: seconds since the capture began, tokens, hashes. No text, no key, no address."""

    arrival: float
    """First byte of the request."""
    sent: float | None = None
    """Request handed to the upstream."""
    first_byte: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    done: float | None = None
    ended: float
    status: str
    reason: str | None = None
    http_status: int | None = None
    model: str | None = None
    service: str | None = None
    request_tokens: int | None = None
    response_tokens: int | None = None
    token_source: str | None = None
    cached_tokens: int | None = None
    prompt_bytes: int = 0
    client: int | None = None
    session: int | None = None
    turn: int | None = None
    prefix: list[int] = []


_COLUMNS: dict[str, Any] = {
    "arrival": pl.Float64,
    "sent": pl.Float64,
    "first_byte": pl.Float64,
    "first_token": pl.Float64,
    "last_token": pl.Float64,
    "done": pl.Float64,
    "ended": pl.Float64,
    "status": pl.String,
    "reason": pl.String,
    "http_status": pl.Int32,
    "model": pl.String,
    "service": pl.String,
    "request_tokens": pl.Int32,
    "response_tokens": pl.Int32,
    "token_source": pl.String,
    "cached_tokens": pl.Int32,
    "prompt_bytes": pl.Int64,
    "client": pl.Int64,
    "session": pl.Int64,
    "turn": pl.Int32,
    "prefix": pl.List(pl.Int64),
}
_ROW = pl.Schema(_COLUMNS)


class Header(msgspec.Struct, kw_only=True):
    """When and of what. The salt is not in it."""

    upstream: str
    epoch: int
    """Nanoseconds from 1970-01-01 UTC to the clock's zero."""
    midnight: float
    """Seconds from the local midnight to it."""
    weekday: int
    version: str = __version__


class Recorder:
    """Takes records from the relay's loop and writes them from a thread of its own."""

    def __init__(self, folder: Path, header: Header, *, rotate_seconds: float, rotate_bytes: int) -> None:
        self._folder, self._header = folder, header
        self._rotate_seconds, self._rotate_bytes = rotate_seconds, rotate_bytes
        self._encode = msgspec.json.Encoder().encode_lines
        self._waiting: deque[Captured] = deque()
        self._number = 1 + max((_number(path) for path in segments(folder)), default=0)
        self._file: int | None = None
        self._size = 0
        self._opened = 0.0
        self._stop = threading.Event()
        self.written = 0
        self.dropped = 0
        """Records that were not written: the disk was full, or too slow for too long."""
        self._thread = threading.Thread(target=self._work, name="squall-recorder", daemon=True)
        self._thread.start()

    def take(self, record: Captured) -> None:
        """Keep `record`; never waits."""
        if len(self._waiting) >= MOST_WAITING:
            self.dropped += 1
        else:
            self._waiting.append(record)

    def close(self) -> None:
        """Write what waits and close the segment."""
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        while True:
            stopping = self._stop.wait(FLUSH)
            self._flush()
            old = self._size >= self._rotate_bytes or monotonic() - self._opened >= self._rotate_seconds
            if self._file is not None and (stopping or old):
                self._rotate()
            if stopping and not self._waiting:
                return

    def _flush(self) -> None:
        records = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if not records:
            return
        data = self._encode(records)
        try:
            if self._file is None:
                self._open()
            view = memoryview(data)
            while view:
                view = view[os.write(self._file, view) :]  # type: ignore[arg-type]
        except OSError as error:
            if not self.dropped:
                note(f"capture: records cannot be written ({error.strerror}) and are dropped until they can.")
            self.dropped += len(records)
            if self._file is not None:  # half a batch would be half a line
                os.ftruncate(self._file, self._size)
            return
        self._size += len(data)
        self.written += len(records)

    def _open(self) -> None:
        path = self._folder / f"live-{self._number:05d}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size, self._opened = 0, monotonic()

    def _rotate(self) -> None:
        if self._file is None:
            return
        os.close(self._file)
        self._file = None
        try:
            close_segment(self._folder / f"live-{self._number:05d}.jsonl", self._header)
        except (OSError, pl.exceptions.PolarsError) as error:
            note(f"capture: segment {self._number} stays as it is ({error}); squall capture --finish reads it later.")
        self._number += 1


def segments(folder: Path) -> list[Path]:
    """All segment files in `folder`, open and closed."""
    return sorted([*folder.glob("live-?????.jsonl"), *folder.glob("trace-?????.parquet")])


def close_segment(live: Path, header: Header) -> None:
    """Turn the lines of `live` into a Trace and a Run beside it, then remove it; half a last line is left out."""
    rows = _lines(live)
    if not rows.is_empty():
        trace, run = tables(rows, header)
        number = _number(live)
        write_run(run, live.with_name(f"run-{number:05d}.parquet"))
        write_trace(trace, live.with_name(f"trace-{number:05d}.parquet"))
    live.unlink()


def finish(folder: str | Path) -> tuple[Trace, Run]:
    """All that was captured in `folder`, also by a capture that was killed; writes trace.parquet and run.parquet.

    Raises InputError if nothing was captured there.
    """
    folder = Path(folder)
    file = folder / HEADER
    if not file.is_file():
        raise InputError(f"{folder}: this is not the folder of a capture; it lacks {HEADER}.")
    try:
        header = msgspec.json.decode(file.read_bytes(), type=Header)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: it cannot be read ({error}).") from error
    for live in sorted(folder.glob("live-?????.jsonl")):
        close_segment(live, header)
    numbers = sorted(_number(path) for path in folder.glob("trace-?????.parquet"))
    if not numbers:
        raise InputError(f"{folder}: nothing was captured here: no request for generated text has ended.")
    traces = [read_trace(folder / f"trace-{number:05d}.parquet") for number in numbers]
    runs = [read_run(folder / f"run-{number:05d}.parquet") for number in numbers]
    trace, run = _joined(traces, header), _joined_runs(runs)
    write_trace(trace, folder / "trace.parquet")
    write_run(run, folder / "run.parquet")
    return trace, run


def tables(rows: pl.DataFrame, header: Header) -> tuple[Trace, Run]:
    """Records as a Trace, whose arrival 0 is the first request, and the Run that answers it, on the same clock."""
    rows = rows.sort("arrival", maintain_order=True)
    zero = float(rows["arrival"][0])
    estimated = rows["request_tokens"].is_null()
    # A client that hangs up in mid-answer has been served what it got.
    served = (rows["status"] == "ok") | (
        (rows["status"] == "cancelled") & (rows["response_tokens"] > 0).fill_null(False)
    )
    tokens = pl.col("request_tokens").fill_null((pl.col("prompt_bytes") / _ratio(rows)).ceil().cast(pl.Int32))
    table = rows.select(
        arrival=pl.col("arrival") - zero,
        request_tokens=tokens,
        response_tokens=pl.when(served).then(pl.col("response_tokens").fill_null(0)).otherwise(0),
        failed=~served,
        service="service",
        model="model",
        session="session",
        turn="turn",
        elapsed=pl.col("ended") - pl.col("arrival"),
        prefix=pl.when(pl.col("prefix").list.len() > 0).then(pl.col("prefix")),
    )
    notes = [
        f"block hashes are of {BLOCK_TOKENS} token ids, or of 256 bytes of text taken for {BLOCK_TOKENS} tokens",
    ]
    if estimated.any():
        notes.append(
            f"request_tokens of {int(estimated.sum()):,} requests are estimated from their bytes: nobody counted them"
        )
    local = header.midnight + zero
    meta = TraceMeta(
        source=f"capture of {header.upstream}",
        format="capture",
        epoch=header.epoch + round(zero * 1e9),
        midnight=local % 86400,
        weekday=(header.weekday + int(local // 86400)) % 7,
        block_size=BLOCK_TOKENS if table["prefix"].null_count() < len(table) else None,
        rows=len(rows),
        notes=notes,
    )
    trace = Trace.of(table, meta)
    moments = ("sent", "first_byte", "first_token", "last_token", "done", "ended")
    answered = rows.select(
        pl.int_range(pl.len(), dtype=pl.Int64).alias("request"),
        pl.lit(1, pl.Int32).alias("attempt"),
        (pl.col("arrival") - zero).alias("scheduled"),
        *((pl.col(name) - zero).alias(name) for name in moments),
        *(
            pl.col(name)
            for name in ("status", "reason", "http_status", "request_tokens", "response_tokens", "token_source")
        ),
        *(pl.col(name) for name in ("cached_tokens", "service", "model")),
        failed=~served,
    )
    run_meta = RunMeta(
        kind="recorded",
        title="captured",
        trace=meta,
        target={"url": header.upstream},
        offered=len(rows),
        version=header.version,
        open_loop=False,
        verdict="UNCHECKED",
        verdict_reasons=["captured: the load was the clients', and latency is as the proxy saw it"],
    )
    return trace, Run.of(answered, run_meta)


def _ratio(rows: pl.DataFrame) -> float:
    """Bytes of prompt per token, from the requests whose tokens are known."""
    known = rows.filter(pl.col("request_tokens") > 0, pl.col("prompt_bytes") > 0)
    if known.is_empty():
        return BYTES_PER_TOKEN
    return int(known["prompt_bytes"].sum()) / int(known["request_tokens"].sum())


def _joined(traces: list[Trace], header: Header) -> Trace:
    """Segments one after another on the clock of the capture. A request that ends late may lie in a later segment."""
    first = min(trace.meta.epoch or 0 for trace in traces)
    parts = [trace.table.with_columns(pl.col("arrival") + _offset(trace.meta, first)) for trace in traces]
    earliest = min(traces, key=lambda trace: trace.meta.epoch or 0)
    notes = list(dict.fromkeys(text for trace in traces for text in trace.meta.notes))
    whole = earliest.meta
    meta = msgspec.structs.replace(
        whole,
        rows=sum(map(len, traces)),
        notes=notes,
        block_size=next((trace.meta.block_size for trace in traces if trace.meta.block_size), None),
    )
    return Trace.of(pl.concat(parts), meta)


def _joined_runs(runs: list[Run]) -> Run:
    metas = [run.meta.trace for run in runs]
    first = min((meta.epoch or 0) for meta in metas if meta is not None)
    moments = ("scheduled", "sent", "first_byte", "first_token", "last_token", "done", "ended")
    parts = []
    for run, meta in zip(runs, metas, strict=True):
        offset = _offset(meta, first) if meta is not None else 0.0
        parts.append(run.table.with_columns(pl.col(name) + offset for name in moments))
    table = pl.concat(parts).sort("scheduled", maintain_order=True)
    table = table.with_columns(request=pl.int_range(pl.len(), dtype=pl.Int64))
    return Run(table, msgspec.structs.replace(runs[0].meta, offered=len(table)))


def _offset(meta: TraceMeta, first: int) -> float:
    return ((meta.epoch or first) - first) / 1e9


def _lines(live: Path) -> pl.DataFrame:
    text = live.read_bytes()
    end = text.rfind(b"\n") + 1
    if end < len(text):
        note(f"{live}: the last line is half-written and left out.")
    rows = pl.read_ndjson(text[:end], schema=_ROW) if end else pl.DataFrame(schema=_ROW)
    return rows.with_columns(pl.col("prompt_bytes").fill_null(0))  # what has its default is left out of a line


def _number(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def write_header(folder: Path, header: Header) -> None:
    """Begin a capture in `folder`."""
    (folder / HEADER).write_bytes(msgspec.json.format(msgspec.json.encode(header), indent=1) + b"\n")


def summary(trace: Trace, run: Run) -> dict[str, Any]:
    """A capture in numbers, as JSON data."""
    table = run.table
    return {
        "requests": len(trace),
        "span": trace.span,
        "failed": int((table["status"] != "ok").sum()),
        "sessions": trace.table["session"].drop_nulls().n_unique(),
        "request_tokens": int(trace.table["request_tokens"].sum()),
        "response_tokens": int(trace.table["response_tokens"].sum()),
    }
