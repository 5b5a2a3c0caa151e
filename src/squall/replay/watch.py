"""Watching a replay: a live view on the terminal, and the server's own numbers read from its `/metrics`.

Both happen in a process of their own, so that neither a redraw nor a page of metrics can make a request late. The
sending process only writes its counts into a pipe, a few times a second, and drops them when the pipe is full. What the
view shows of latencies and failures is read from the journal, which the senders write anyway; what is read from the
server goes into the journal as well, and from there into the Run.
"""

import math
import os
import select
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from squall.progress import notes, printable
from squall.replay.scrape import Endpoint, PageError, Sample, Tally, fetch, read_page
from squall.run.journal import SCHEDULE, SERIES_LINES, SERVER
from squall.run.server import ServerMetrics

if TYPE_CHECKING:
    from rich.text import Text

REDRAW = 1.0
RECENT = 10.0
"""Seconds that the view's rates and percentiles look back."""
TREND = 120.0
"""Seconds that its small curves show."""
CLOSING = 3.0
"""Seconds that the watching process has for a last reading; then it is killed."""
LINES_AT_ONCE = 1 << 19
"""Bytes of the journal that are read in one redraw; more are left out of the view."""
MOST_GAPS = 20_000
SLOWEST = 10.0
"""Seconds between readings of a page that has failed `FAILURES` times in a row."""
FAILURES = 3


_CHILD = "import os; os.nice(5); from squall.replay.watch import main; main()"  # the senders go first


class Setup(msgspec.Struct, kw_only=True):
    """What the watching process is told first; it goes through the pipe, since it may hold a key."""

    title: str
    journal: str
    view: bool
    endpoint: Endpoint | None
    server: ServerMetrics | None
    base_at: int
    """When the base was read, monotonic ns."""
    secrets: tuple[str, ...]


BASE = "server.base"
"""In the journal: the page as it was before the first request, until it has been taken in."""


class Said(msgspec.Struct, omit_defaults=True):
    """What it is told later, one JSON line each."""

    start: int | None = None
    """The run's time 0, monotonic ns."""
    counts: dict[str, int] | None = None
    note: str | None = None


class Watch:
    """The watching process, as the sending one sees it. Without a view and without metrics there is none."""

    def __init__(self, *, view: bool, endpoint: Endpoint | None) -> None:
        self.view = view and notes.shown and sys.stderr.isatty()
        self._endpoint = endpoint
        self._process: subprocess.Popen[bytes] | None = None
        if self.view or endpoint is not None:
            room = str(Path(__file__).parents[2])
            paths = os.pathsep.join(path for path in (room, os.environ.get("PYTHONPATH", "")) if path)
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CHILD],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=None if self.view else subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the sender alone
                env=os.environ | {"PYTHONPATH": paths},
                bufsize=0,
            )

    def __enter__(self) -> "Watch":
        if self.view:
            notes.sink = lambda text: self._say(msgspec.json.encode(Said(note=text)))
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, title: str, journal: Path, server: ServerMetrics | None, secrets: tuple[str, ...]) -> None:
        """The journal exists; from now on it can be watched.

        The page that all counters are counted from is read here: the watching process may not be ready in time.
        """
        at = time.monotonic_ns()
        if self._endpoint is not None:
            with suppress(PageError):  # then the first page that is read is the base
                (journal / BASE).write_bytes(fetch(self._endpoint))
        setup = Setup(
            title=printable(title),
            journal=str(journal.absolute()),
            view=self.view,
            endpoint=self._endpoint,
            server=server,
            base_at=at,
            secrets=secrets,
        )
        self._say(msgspec.json.encode(setup))
        if self._process is not None and self._process.stdin is not None:
            os.set_blocking(self._process.stdin.fileno(), False)

    def start(self, at: int) -> None:
        """The run's time 0 is `at` (monotonic ns)."""
        self._say(msgspec.json.encode(Said(start=at)))

    def tell(self, counts: Any) -> None:
        """How far the senders are; never waits."""
        if self.view:
            self._say(msgspec.json.encode(Said(counts=vars(counts))))

    def close(self, within: float = CLOSING) -> None:
        """The run is over: let it read the server once more, clear the view and end."""
        notes.sink = None
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            process.wait(within)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _say(self, line: bytes) -> None:
        if self._process is None or self._process.stdin is None:
            return
        try:
            self._process.stdin.write(line + b"\n")
        except (BlockingIOError, BrokenPipeError, ValueError):  # it is busy, dead, or closed: the run goes on
            return


# --- in the process of its own --------------------------------------------------------------------------------------


def main() -> None:
    """The life of the watching process: until its standard input ends."""
    with open(0, "rb", buffering=0, closefd=False) as pipe:
        lines = _Lines(pipe.fileno())
        first = lines.next(None)
        if first is None:
            return
        setup = msgspec.json.decode(first, type=Setup)
        reader = None if setup.endpoint is None or setup.server is None else _Reader(setup)
        if setup.view:
            _show(setup, lines, reader)
        else:
            while (line := lines.next(None)) is not None:
                said = msgspec.json.decode(line, type=Said)
                if said.start is not None and reader is not None:
                    reader.begin(said.start)
        if reader is not None:
            reader.end()
    os._exit(0)  # a reading that hangs must not hold us


class _Lines:
    """Lines from a pipe, with a limit on the wait."""

    def __init__(self, fd: int) -> None:
        self._fd, self._lines, self._rest, self.over = fd, deque[bytes](), b"", False

    def next(self, within: float | None) -> bytes | None:
        """The next line; None at the end, or if none came `within` so many seconds."""
        until = None if within is None else time.monotonic() + within
        while not self._lines and not self.over:
            left = None if until is None else max(0.0, until - time.monotonic())
            if not select.select([self._fd], [], [], left)[0]:
                return None
            data = os.read(self._fd, 1 << 16)
            self.over = not data
            *whole, self._rest = (self._rest + data).split(b"\n")
            self._lines += whole
        return self._lines.popleft() if self._lines else None


class _Reader:
    """Reads the server's page at its interval, in a thread, and writes what it finds into the journal."""

    def __init__(self, setup: Setup) -> None:
        assert setup.endpoint is not None  # noqa: S101
        assert setup.server is not None  # noqa: S101
        self._endpoint, self.summary, self._secrets = setup.endpoint, setup.server, setup.secrets
        self._journal, self._base_at = Path(setup.journal), setup.base_at
        self._tally = Tally(self.summary)
        self._last_call = threading.Event()
        self._done = threading.Event()
        self._start = 0
        self._began = False
        self.samples: deque[list[Sample]] = deque(maxlen=600)
        self.alive = False
        """Whether the last reading succeeded."""

    def begin(self, start: int) -> None:
        """Read from now on."""
        self._start, self._began = start, True
        threading.Thread(target=self._run, daemon=True).start()

    def end(self) -> None:
        """Read once more."""
        self._last_call.set()
        if self._began:
            self._done.wait(CLOSING - 0.3)

    def _take_base(self) -> None:
        file = self._journal / BASE
        if file.is_file():
            reading = read_page(file.read_bytes())
            if reading is not None and reading.server == self.summary.name:
                self._tally.add((self._base_at - self._start) / 1e9, reading)
            file.unlink()

    def _run(self) -> None:
        self._take_base()
        due, in_a_row = time.monotonic(), 0
        with open(self._journal / SERIES_LINES, "ab", buffering=0) as series:
            while True:
                last = self._last_call.is_set()
                self.alive = self._read(series)
                in_a_row = 0 if self.alive else in_a_row + 1
                if last:
                    break
                pause = self.summary.interval if in_a_row < FAILURES else max(self.summary.interval, SLOWEST)
                due += pause
                due = max(due, time.monotonic())  # what was missed is not made up for
                self._last_call.wait(due - time.monotonic())
        self._done.set()

    def _read(self, series: Any) -> bool:
        at = (time.monotonic_ns() - self._start) / 1e9
        try:
            reading = read_page(fetch(self._endpoint))
            if reading is None or reading.server != self.summary.name:
                raise PageError(f"the page is no longer that of {self.summary.name}")
        except PageError as error:
            self.summary.failed += 1
            text = str(error)
            for secret in self._secrets:
                text = text.replace(secret, "***")
            self.summary.error = printable(text)[:200]
            samples: list[Sample] = []
        else:
            samples = self._tally.add(at, reading)
            series.write(b"".join(msgspec.json.encode(sample) + b"\n" for sample in samples))
            self.samples.append(samples)
        temporary = self._journal / f".{SERVER}.tmp"
        temporary.write_bytes(msgspec.json.encode(self.summary))
        temporary.replace(self._journal / SERVER)
        return bool(samples)


class _Line(msgspec.Struct):
    """What the view wants of a line of the journal."""

    status: str
    attempt: int
    reason: str | None = None
    http_status: int | None = None
    scheduled: float | None = None
    sent: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    ended: float | None = None
    chunks: list[float] | None = None


class Recent:
    """What ended lately, from the journal's lines as they are written."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._read: dict[Path, int] = {}
        self._decode = msgspec.json.Decoder(_Line).decode
        self.values: dict[str, deque[tuple[float, Any]]] = {name: deque() for name in ("ttft", "e2e", "late", "itl")}
        self.failures: Counter[str] = Counter()
        self.left_out = 0
        """Bytes of the journal that came too fast to be looked at."""

    def look(self, now: float) -> None:
        """Take in the lines written since the last call; forget what is older than RECENT."""
        for path in self._journal.glob("worker-*.jsonl"):
            begin, size = self._read.get(path, 0), path.stat().st_size
            if size - begin > 8 * LINES_AT_ONCE:
                self.left_out += size - LINES_AT_ONCE - begin
                begin = size - LINES_AT_ONCE
            with path.open("rb") as file:
                file.seek(begin)
                data = file.read(LINES_AT_ONCE)
            end = data.rfind(b"\n") + 1
            self._read[path] = begin + end
            for line in data[:end].splitlines():
                try:
                    self._take(self._decode(line), now)
                except (msgspec.DecodeError, UnicodeDecodeError):  # the rest of a line, after a jump
                    continue
        for kept in self.values.values():
            while kept and kept[0][0] < now - RECENT:
                kept.popleft()

    def _take(self, line: _Line, now: float) -> None:
        if line.status not in ("ok", "cancelled"):
            parts = (line.status, line.reason, line.http_status)
            self.failures[" ".join(str(part) for part in parts if part is not None)] += 1
        ended = now if line.ended is None else line.ended
        if line.sent is not None and line.scheduled is not None and line.attempt == 1:
            self.values["late"].append((ended, line.sent - line.scheduled))
        if line.first_token is not None and line.scheduled is not None:
            self.values["ttft"].append((ended, line.first_token - line.scheduled))
            if line.status == "ok" and line.last_token is not None:
                self.values["e2e"].append((ended, line.last_token - line.scheduled))
        if line.chunks and len(line.chunks) > 1:
            self.values["itl"].append((ended, np.diff(line.chunks)))

    def sample(self, name: str) -> np.ndarray:
        """The values of `name` (`ttft`, `e2e`, `late`, `itl`) of what ended in the last RECENT seconds."""
        kept = [value for _, value in self.values[name]]
        if not kept:
            return np.empty(0)
        if name != "itl":
            return np.array(kept)
        gaps = np.concatenate(kept)
        return gaps[:: -(-len(gaps) // MOST_GAPS)]


class View:
    """The lines of the view, from what is known at a moment."""

    def __init__(self, setup: Setup) -> None:
        self._title = setup.title
        self._recent = Recent(Path(setup.journal))
        self._scheduled: np.ndarray | None = None
        self._journal = Path(setup.journal)
        self._history = deque([(0.0, 0, 0)])  # time, released, ended
        self._ttft: deque[tuple[float, float]] = deque()
        self.start: int | None = None
        self.counts: dict[str, int] = {}

    def lines(
        self, now_ns: int, width: int, summary: ServerMetrics | None, samples: "Iterable[list[Sample]]"
    ) -> "Text":
        """Everything to be shown; `summary` and `samples` are the server's own numbers, if there are any."""
        from rich.text import Text

        text = Text(no_wrap=True, overflow="ellipsis")
        if self.start is None:
            text.append(f"{self._title}\n", style="bold")
            return text.append("getting ready\n", style="dim")
        now = (now_ns - self.start) / 1e9
        if self._scheduled is None:
            self._scheduled = _scheduled(self._journal)
        self._recent.look(now)
        self._head(text, now, width)
        self._load(text, now)
        self._latency(text, now)
        if summary is not None:
            _server(text, now, width, summary, list(samples))
            if samples:
                self._ttft_trend(text, now, width)
        return text

    def _head(self, text: "Text", now: float, width: int) -> None:
        assert self._scheduled is not None  # noqa: S101
        span = float(self._scheduled[-1]) if self._scheduled.size else 0.0
        total, released = self.counts.get("total", self._scheduled.size), self.counts.get("released", 0)
        clock = f"{_clock(now)} of {_clock(span)}"
        title = self._title[: max(10, width - len(clock) - 3)]
        text.append(title, style="bold").append(" " * max(1, width - 1 - len(title) - len(clock))).append(f"{clock}\n")
        done = f" {released:,} of {total:,} sent"
        room = max(10, width - 1 - len(done))
        filled = round(room * released / total) if total else 0
        text.append("━" * filled, style="green").append("─" * (room - filled), style="dim").append(f"{done}\n")

    def _load(self, text: "Text", now: float) -> None:
        assert self._scheduled is not None  # noqa: S101
        counts = self.counts
        ok, failed, cancelled = (counts.get(name, 0) for name in ("ok", "failed", "cancelled"))
        if counts and now > 0:
            self._history.append((now, counts.get("released", 0), ok + failed + cancelled))
        while len(self._history) > 2 and self._history[1][0] <= now - RECENT:
            self._history.popleft()
        asked = np.searchsorted(self._scheduled, (max(0.0, now - RECENT), now), side="right")
        span = min(RECENT, max(now, 1e-9))
        then, released, ended = self._history[0]
        length = max(now - then, 1e-9)
        rates = {
            "asked": (asked[1] - asked[0]) / span,
            "sent": (self._history[-1][1] - released) / length,
            "ended": (self._history[-1][2] - ended) / length,
        }
        told = "   ".join(f"{name} {rate:,.1f}" for name, rate in rates.items()) if now > 1 else "-"
        text.append(f"{'per second':<12}", style="dim").append(f"{told}   (last {RECENT:g} s)\n")
        text.append(f"{'requests':<12}", style="dim").append(f"in flight {counts.get('in_flight', 0):,}   ok {ok:,}   ")
        text.append(f"failed {failed:,}", style="bold red" if failed else "").append(f"   cancelled {cancelled:,}\n")
        if self._recent.failures:
            kinds = ", ".join(f"{printable(kind)}: {count:,}" for kind, count in self._recent.failures.most_common(4))
            text.append(f"{'failures':<12}", style="dim").append(f"{kinds}\n", style="red")

    def _latency(self, text: "Text", now: float) -> None:
        names = ("p50", "p90", "p99", "max")
        head = "".join(f"{name:>11}" for name in names)
        text.append(f"{'ended lately':<12}{head}{'n':>9}\n", style="dim")
        for name, label in (("ttft", "TTFT"), ("itl", "ITL"), ("e2e", "E2E"), ("late", "sent late")):
            values = self._recent.sample(name)
            n = values.size
            shown = ["-"] * 4
            if n:
                enough = [level for level in (50, 90, 99) if n * (100 - level) >= 100]
                found = [*np.percentile(values, enough), *[math.nan] * (3 - len(enough)), values.max()]
                shown = [_seconds(float(value)) for value in found]
                if name == "ttft":
                    self._ttft.append((now, float(np.median(values))))
            text.append(f"{label:<12}", style="dim").append("".join(f"{cell:>11}" for cell in shown) + f"{n:>9,}\n")

    def _ttft_trend(self, text: "Text", now: float, width: int) -> None:
        while self._ttft and self._ttft[0][0] < now - TREND:
            self._ttft.popleft()
        peak = max((value for _, value in self._ttft), default=0.0)
        _trend(text, "TTFT p50", list(self._ttft), now, width, _seconds(peak), peak)


def _show(setup: Setup, lines: _Lines, reader: "_Reader | None") -> None:
    from rich.console import Console
    from rich.live import Live

    console, view = Console(stderr=True, highlight=False), View(setup)
    with Live(
        console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
    ) as live:
        due = time.monotonic()
        while not lines.over:
            line = lines.next(max(0.0, due - time.monotonic()))
            if line is not None:
                said = msgspec.json.decode(line, type=Said)
                if said.start is not None:
                    view.start = said.start
                    if reader is not None:
                        reader.begin(said.start)
                if said.counts is not None:
                    view.counts = said.counts
                if said.note is not None:
                    console.print(printable(said.note), markup=False)
            if time.monotonic() >= due:
                summary, samples = (None, []) if reader is None else (reader.summary, list(reader.samples))
                live.update(view.lines(time.monotonic_ns(), console.width, summary, samples), refresh=True)
                due = time.monotonic() + REDRAW


def _server(text: "Text", now: float, width: int, summary: ServerMetrics, samples: list[list[Sample]]) -> None:
    """The server's own lines: where it stands, and curves of its queue and its KV cache."""
    text.append(f"{summary.name:<12}", style="dim")
    if not samples:
        text.append(f"{summary.error or 'not read yet'}\n", style="yellow" if summary.error else "dim")
        return
    last = samples[-1]
    told = []
    for column, label in (("running", "running"), ("waiting", "waiting")):
        values = [value for row in last if (value := getattr(row, column)) is not None]
        told += [f"{label} {sum(values):,.0f}"] if values else []
    used = [row.kv_used for row in last if row.kv_used is not None]
    told += [f"KV cache {100 * max(used):.0f} %"] if used else []
    preempted = [row.preemptions for rows in samples for row in rows if row.preemptions is not None]
    told += [f"preemptions {sum(preempted):,}"] if preempted else []
    tokens = [row.batch_tokens for row in last if row.batch_tokens is not None]
    told += [f"{sum(tokens):,.0f} tokens/s"] if tokens else []
    text.append("   ".join(told))
    age = now - last[0].time
    if age > 3 * summary.interval + 2:
        text.append(f"   {age:.0f} s ago: {summary.error}", style="yellow")
    if summary.restarts:
        text.append(f"   restarted {summary.restarts} x", style="yellow")
    text.append("\n")
    waiting = [(rows[0].time, sum(row.waiting or 0.0 for row in rows)) for rows in samples]
    peak = max((value for at, value in waiting if at > now - TREND), default=0.0)
    _trend(text, "waiting", waiting, now, width, f"{peak:,.0f}", peak)
    if used:
        series = [(rows[0].time, max((row.kv_used or 0.0 for row in rows), default=0.0)) for rows in samples]
        peak = max((value for at, value in series if at > now - TREND), default=0.0)
        _trend(text, "KV cache", series, now, width, f"{100 * peak:.0f} %", 1.0)


def _trend(
    text: "Text", label: str, series: list[tuple[float, float]], now: float, width: int, peak: str, top: float
) -> None:
    """A curve of blocks over the last TREND seconds, its right end now."""
    room = max(10, min(60, width - 13 - 20))
    cells = [math.nan] * room
    for at, value in series:
        place = room - 1 - int((now - at) / TREND * room)
        if 0 <= place < room:
            cells[place] = value if math.isnan(cells[place]) else max(cells[place], value)
    marks = "".join(" " if value != value else _LEVELS[_level(value, top)] for value in cells)
    text.append(f"{label:<12}", style="dim").append(marks, style="cyan")
    text.append(f" peak {peak} in {TREND / 60:g} min\n", style="dim")


_LEVELS = "▁▂▃▄▅▆▇█"


def _level(value: float, top: float) -> int:
    return 0 if top <= 0 else max(0, min(7, math.ceil(value / top * 8) - 1))


def _scheduled(journal: Path) -> np.ndarray:
    import polars as pl

    return np.sort(pl.read_parquet(journal / SCHEDULE, columns=["scheduled"])["scheduled"].to_numpy())


def _clock(seconds: float) -> str:
    whole = int(max(0.0, seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def _seconds(value: float) -> str:
    if value != value:
        return "-"
    return f"{1e3 * value:,.3g} ms" if abs(value) < 1 else f"{value:,.3g} s" if value < 1000 else f"{value:,.0f} s"
