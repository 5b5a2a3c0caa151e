"""What a sending process writes down: a line per attempt as it goes, and at its end what it says of itself.

`journal.py` says how the files lie and reads them. Nothing here needs a table: a worker imports no polars.
"""

import os
from pathlib import Path

import msgspec


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


MEANINGS = {
    "bad_stream": "what came is no answer of this API",
    "eof_headers": "the connection was closed without an answer",
    "stale_reuse": "a kept connection turned out closed",
}
"""In words, the reasons whose message, if there is one, is what the server sent."""


def told(status: str, reason: str | None, http_status: int | None, message: str | None) -> str:
    """What went wrong, for people: `truncated/bad_stream, HTTP 200: what came is no answer of this API: <html>`."""
    kind = f"{status}/{reason}" if reason else status
    code = f", HTTP {http_status}" if http_status is not None else ""
    if message and http_status is not None:  # HTTP it was, until its framing broke
        message = message.replace("not HTTP: ", "broken HTTP: ", 1)
    words = [text for text in (MEANINGS.get(reason or ""), message) if text]
    return ": ".join([kind + code, *words])


class Client(msgspec.Struct, kw_only=True):
    """What a sending process says of itself at its end."""

    stall_p999: float
    """Seconds by which its loop came late to a 10 ms heartbeat."""
    collection: float
    """Longest garbage collection, seconds."""
    cpu: float
    """CPU seconds used while the run lasted."""
    wall: float
    """Seconds that the run lasted."""
    pacer_p99: float = 0.0
    """Seconds from scheduled to released."""
    connect_p99: float = 0.0
    """Seconds from released to a connection in hand."""
    write_p99: float = 0.0
    """Seconds from there to the last byte of the request."""


def lines_path(journal: Path, worker: int, part: str = "") -> Path:
    """Where `worker` writes its attempts; `part` tells apart the runs of a replay that was resumed."""
    return journal / f"worker-{worker}{part}.jsonl"


def client_path(journal: Path, worker: int, part: str = "") -> Path:
    """Where `worker` writes what it says of itself."""
    return journal / f"worker-{worker}{part}.json"


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
