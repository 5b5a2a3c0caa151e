"""The event loop of a replay: releases rows at their times, and decides what became of each.

A send never waits for a response. Everything that costs time (parsing answers, writing the journal) is done between
deadlines. One process runs one `Sender`; many workers are many of these, each with its rows and its own journal file.
"""

import asyncio
import gc
import random
import resource
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic_ns
from typing import Any

import msgspec
import numpy as np

from squall.replay.connection import Exchange, Pool
from squall.replay.pacer import Alarm, Pacer
from squall.replay.prompt import Dialect, Prompts, Salt
from squall.replay.schedule import PROMPT_LIMIT, Schedule
from squall.replay.stream import MESSAGE_LIMIT, Outcome, Reply
from squall.replay.target import Target
from squall.run.journal import Attempt, Writer, client_path, lines_path
from squall.run.verdict import Client

BEAT = 10_000_000
"""Nanoseconds between heartbeats: they measure stalls, and look after timeouts, the journal and the end."""
SPARES, SPARES_AHEAD = 16, 100_000_000
"""At most so many connections are opened ahead of the rows that are due within so many nanoseconds."""
QUIET = 300_000
"""Nanoseconds before a deadline in which no answer is parsed."""
BACKLOG = 512
"""Answers waiting to be parsed at which one is parsed all the same."""
AHEAD = 32
"""Requests whose bytes are made ahead of their time."""
AHEAD_BYTES = 1 << 24
RETRY_STATUS = (429, 503)
FIRST_BACKOFF = 0.5
LONGEST_BACKOFF = 30.0
LONGEST_RETRY_AFTER = 120
SHORT_DRAIN = 3_000_000_000
"""Nanoseconds that requests in flight are given after an interrupt."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that a sending process needs to know; the same for all workers but for the rows."""

    target: Target
    dialect: Dialect
    salt: Salt
    seed: int
    fresh: bytes
    journal: Path
    timeout: float | None = None
    connect_timeout: float = 10.0
    retries: int = 0
    max_concurrency: int | None = None
    drain_timeout: float = 60.0
    stop_after: float | None = None
    """Seconds after which no further row is sent, where a concurrency limit holds rows back beyond the schedule."""


@dataclass
class Counts:
    """How far a sender is."""

    total: int = 0
    released: int = 0
    in_flight: int = 0
    ok: int = 0
    failed: int = 0
    cancelled: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass
class _Stages:
    """Seconds that the parts of sending took, one entry per first attempt sent."""

    pacer: array = field(default_factory=lambda: array("f"))
    connect: array = field(default_factory=lambda: array("f"))
    write: array = field(default_factory=lambda: array("f"))
    stall: array = field(default_factory=lambda: array("f"))


class Sender:
    """Sends `rows` by `plan`, whose time 0 is `start` (monotonic ns); `run()` returns when all outcomes are written."""

    def __init__(
        self, plan: Plan, rows: Schedule, start: int, *, worker: int = 0, watch: Callable[[Counts], int]
    ) -> None:
        """`watch` gets the counts ten times a second and returns how often it was asked to stop (1: drain, 2: now)."""
        self._plan, self._start, self._worker, self._watch = plan, start, worker, watch
        self._loop = asyncio.get_running_loop()
        self._pacer = Pacer(rows.at, start)
        self._request, self._prompt, self._answer = (
            np.ascontiguousarray(column).data for column in (rows.request, rows.request_tokens, rows.response_tokens)
        )
        self._prompts = Prompts(plan.dialect.tokens, salt=plan.salt, seed=plan.seed, fresh=plan.fresh)
        self._pool = Pool(
            self._loop,
            plan.target.address,
            tls=plan.target.context(),
            hostname=plan.target.host,
            connect_timeout=plan.connect_timeout,
        )
        self._alarm = Alarm(self._loop, self._ring)
        self._journal = Writer(lines_path(plan.journal, worker))
        self._random = random.Random(f"{plan.seed} {worker}")
        self._made: dict[int, bytes] = {}  # row -> request made ahead of its time
        self._made_bytes = 0
        self._make_next = 0
        self._waiting: deque[int] = deque()  # rows that are due but over the concurrency limit
        self._flying: dict[Exchange, None] = {}  # in the order of their release
        self._ended: deque[Exchange] = deque()  # over, but not yet parsed and written
        self._retries: set[asyncio.TimerHandle] = set()
        self._settling = False
        self._stops = 0
        self._drain = round(plan.drain_timeout * 1e9)
        self._last_send = start
        self._stages = _Stages()
        self._over: asyncio.Future[None] = self._loop.create_future()
        self.counts = Counts(total=len(rows))

    async def run(self) -> None:
        """Send everything, drain, write the journal. Raises OSError if the journal cannot be written."""
        self._loop.set_exception_handler(self._failed)
        cpu, began = _cpu(), monotonic_ns()
        self._beat_at, self._beats = began, 0
        self._beat()
        self._make_ahead()
        try:
            with _collections() as longest:
                self._ring()
                await self._over
        finally:
            self._next_beat.cancel()
            self._alarm.close()
            self._pool.close()
            self._journal.close()
        stages = self._stages
        client = Client(
            stall_p999=_quantile(stages.stall, 0.999),
            collection=longest[0],
            cpu=_cpu() - cpu,
            wall=(monotonic_ns() - began) / 1e9,
            pacer_p99=_quantile(stages.pacer, 0.99),
            connect_p99=_quantile(stages.connect, 0.99),
            write_p99=_quantile(stages.write, 0.99),
        )
        client_path(self._plan.journal, self._worker).write_bytes(msgspec.json.encode(client))
        self._watch(self.counts)

    # --- sending -------------------------------------------------------------------------------------------------

    def _ring(self) -> None:
        """Release every row that is due, in order, and set the alarm for the next."""
        for row in self._pacer.due(monotonic_ns()):
            self._release(row)
        deadline = self._pacer.deadline()
        if deadline is not None:
            self._alarm.set(deadline)
        self._settle_soon()

    def _release(self, row: int) -> None:
        self.counts.released += 1
        tokens, limit = self._prompt[row], self._plan.max_concurrency
        if tokens == 0 or tokens > PROMPT_LIMIT:
            scheduled = (self._pacer.when(row) - self._start) / 1e9
            reason = "no_prompt" if tokens == 0 else "prompt_too_long"
            self._write(
                Attempt(request=self._request[row], attempt=1, status="cancelled", scheduled=scheduled, reason=reason)
            )
            self.counts.cancelled += 1
        elif limit is not None and len(self._flying) >= limit:
            self._waiting.append(row)
        else:
            self._send(row, self._pacer.when(row))

    def _send(self, row: int, scheduled: int, attempt: int = 1, retries: int = 0, fresh: bool = False) -> None:
        exchange = Exchange(row, attempt, self._payload(row), scheduled, self._on_end)
        exchange.retries = retries
        self._flying[exchange] = None
        self._last_send = exchange.released
        self._pool.send(exchange, fresh=fresh)

    def _payload(self, row: int) -> bytes:
        made = self._made.pop(row, None)
        if made is None:
            return self._make(row)
        self._made_bytes -= len(made)
        return made

    def _make(self, row: int) -> bytes:
        dialect = self._plan.dialect
        text = self._prompts.text(self._request[row], dialect.fit.words(self._prompt[row]))
        return self._plan.target.request(dialect.path, dialect.body(text, self._answer[row]))

    def _make_ahead(self) -> None:
        """Make the bytes of the next requests while nothing is due."""
        row = max(self._make_next, self._pacer.next)
        while row < len(self._prompt) and len(self._made) < AHEAD and self._made_bytes < AHEAD_BYTES:
            if 0 < self._prompt[row] <= PROMPT_LIMIT:
                self._made[row] = made = self._make(row)
                self._made_bytes += len(made)
            row += 1
        self._make_next = row

    # --- outcomes ------------------------------------------------------------------------------------------------

    def _on_end(self, exchange: Exchange) -> None:
        self._flying.pop(exchange, None)
        self._ended.append(exchange)
        if exchange.ending == "stale_reuse" and self._stops < 2:
            self._send(exchange.row, monotonic_ns(), exchange.attempt + 1, exchange.retries, fresh=True)
        elif self._waiting:
            row = self._waiting.popleft()
            self._send(row, self._pacer.when(row))
        self._settle_soon()

    def _settle_soon(self) -> None:
        if not self._settling:
            self._settling = True
            self._loop.call_soon(self._settle)

    def _settle(self) -> None:
        """Parse and write one answer, unless a row is due in a moment; the alarm calls again."""
        self._settling = False
        deadline = self._pacer.deadline()
        if deadline is not None and deadline - monotonic_ns() < QUIET and len(self._ended) < BACKLOG:
            return
        if self._ended:
            self._record(self._ended.popleft())
        else:
            self._make_ahead()
        if self._ended:
            self._settle_soon()
        elif self._done():
            self._finish()

    def _record(self, exchange: Exchange) -> None:
        reply, outcome = self._outcome(exchange)
        if exchange.attempt == 1 and exchange.sent is not None and exchange.connected is not None:
            self._stages.pacer.append((exchange.released - exchange.scheduled) / 1e9)
            self._stages.connect.append((exchange.connected - exchange.released) / 1e9)
            self._stages.write.append((exchange.sent - exchange.connected) / 1e9)
        self._write(self._attempt(exchange, reply, outcome))
        if exchange.ending == "stale_reuse" or self._retry(exchange, reply, outcome):
            return
        if outcome.status == "ok":
            self.counts.ok += 1
        elif outcome.status == "cancelled":
            self.counts.cancelled += 1
        else:
            self.counts.failed += 1

    def _outcome(self, exchange: Exchange) -> tuple[Reply, Outcome]:
        reply, outcome = exchange.outcome()
        message = outcome.message
        return reply, outcome._replace(message=None if not message else self._plan.target.hide(message)[:MESSAGE_LIMIT])

    def _attempt(self, exchange: Exchange, reply: Reply, outcome: Outcome) -> Attempt:
        def seconds(at: int | None) -> float | None:
            return None if at is None else (at - self._start) / 1e9

        dialect, chunks = self._plan.dialect, reply.chunks
        first = chunks[0] if chunks else 0
        words = dialect.fit.words(self._prompt[exchange.row])
        known = dialect.fit.tokens(words) if dialect.tokens == "ids" else None
        answered = bool(chunks) or outcome.status == "ok"
        from_server = bool(reply.response_tokens) == bool(chunks) and reply.response_tokens is not None
        return Attempt(
            request=self._request[exchange.row],
            attempt=exchange.attempt,
            status=outcome.status,
            scheduled=seconds(exchange.scheduled),
            sent=seconds(exchange.sent),
            first_byte=seconds(exchange.first_byte),
            first_token=seconds(chunks[0]) if chunks else None,
            last_token=seconds(chunks[-1]) if chunks else None,
            done=seconds(reply.done) if outcome.status == "ok" else None,
            ended=seconds(exchange.ended),
            reason=outcome.reason,
            http_status=exchange.http_status,
            message=outcome.message,
            request_tokens=reply.prompt_tokens if reply.prompt_tokens is not None else known,
            response_tokens=(reply.response_tokens if from_server else reply.pieces) if answered else None,
            token_source=("server" if from_server else "chunks") if answered else None,
            chunks=[(at - first) // 1000 / 1e6 for at in chunks] if chunks else None,
            cached_tokens=reply.cached_tokens,
        )

    def _retry(self, exchange: Exchange, reply: Reply, outcome: Outcome) -> bool:
        """Send again after a while, if the failure may pass and the plan allows; whether it will be."""
        busy = exchange.http_status in RETRY_STATUS or (
            outcome.reason == "in_band" and reply.error_code in RETRY_STATUS
        )
        gone = outcome.status == "reset" or outcome.reason == "refused"
        if exchange.retries >= self._plan.retries or self._stops or not (busy or gone):
            return False
        wait = min(FIRST_BACKOFF * 2**exchange.retries, LONGEST_BACKOFF) * (0.5 + self._random.random())
        if exchange.retry_after and exchange.retry_after.isdigit():
            wait = max(wait, min(int(exchange.retry_after), LONGEST_RETRY_AFTER))

        def again() -> None:
            self._retries.discard(handle)
            self._send(exchange.row, monotonic_ns(), exchange.attempt + 1, exchange.retries + 1)

        handle = self._loop.call_later(wait, again)
        self._retries.add(handle)
        return True

    def _write(self, attempt: Attempt) -> None:
        self._journal.write(attempt)

    # --- the heartbeat, and the end ------------------------------------------------------------------------------

    def _beat(self) -> None:
        now = monotonic_ns()
        self._stages.stall.append(max(0.0, (now - self._beat_at) / 1e9))
        self._beat_at = now + BEAT
        self._next_beat = self._loop.call_later(BEAT / 1e9, self._beat)
        if self._plan.timeout is not None:
            self._time_out(now - round(self._plan.timeout * 1e9))
        self._beats += 1
        self._pool.prepare(self._pacer.soon(now + SPARES_AHEAD, self._room()))
        if self._beats % 10 == 0:
            self.counts.in_flight = len(self._flying)
            self._stop(self._watch(self.counts))
        if self._beats % 100 == 0:
            self._journal.flush()
        self._look_after_end(now)

    def _room(self) -> int:
        """How many more requests may be sent now, as far as it matters for opening connections."""
        limit = self._plan.max_concurrency
        return SPARES if limit is None else min(SPARES, max(0, limit - len(self._flying)))

    def _time_out(self, released: int) -> None:
        """Give up what was released before; the oldest stand first."""
        while self._flying and (oldest := next(iter(self._flying))).released <= released:
            self._abort(oldest, "timeout/total", f"no complete answer in {self._plan.timeout:g} s")

    def _stop(self, stops: int) -> None:
        """Stop sending; what is in flight gets a moment (the first time) or none (the second)."""
        if stops <= self._stops:
            return
        self._stops = stops
        self._pacer.next = len(self._prompt)
        self._waiting.clear()  # the journal's reader gives rows without a line their outcome
        for handle in self._retries:
            handle.cancel()
        self._retries.clear()
        self._last_send = monotonic_ns()
        self._drain = min(self._drain, SHORT_DRAIN) if stops == 1 else 0
        self._settle_soon()

    def _look_after_end(self, now: int) -> None:
        stop_after = self._plan.stop_after
        if stop_after is not None and self._waiting and now > self._start + stop_after * 1e9:
            self._drop_waiting()
        if self._pacer.deadline() is not None or now < self._last_send + self._drain:
            return
        self._drop_waiting()
        for exchange in list(self._flying):
            age = (now - (exchange.sent or exchange.released)) / 1e9
            self._abort(exchange, "cancelled/in_flight_at_end", f"no complete answer {age:.1f} s after it was sent")

    def _drop_waiting(self) -> None:
        """Rows that the concurrency limit held back until the run's time was over."""
        for row in self._waiting:
            scheduled = (self._pacer.when(row) - self._start) / 1e9
            self._write(
                Attempt(request=self._request[row], attempt=1, status="cancelled", scheduled=scheduled, reason="plan")
            )
            self.counts.cancelled += 1
        self._waiting.clear()
        self._settle_soon()

    def _abort(self, exchange: Exchange, ending: str, message: str) -> None:
        if exchange.ended is None:
            connection = exchange.connection
            exchange.end(ending, message)
            if connection is not None:
                connection.abort()

    def _done(self) -> bool:
        busy = self._flying or self._ended or self._waiting or self._retries
        return self._pacer.deadline() is None and not busy

    def _finish(self) -> None:
        if not self._over.done():
            self.counts.in_flight = 0
            self._over.set_result(None)

    def _failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """An error in a callback (a full disk, a fault of ours) ends the run instead of hanging it."""
        error = context.get("exception")
        if isinstance(error, Exception) and not self._over.done():
            self._over.set_exception(error)


@contextmanager
def _collections() -> Iterator[list[float]]:
    """Make garbage collections rare, with what exists now left out of them; yields the longest in seconds."""
    longest, began = [0.0], [0]

    def measure(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            began[0] = monotonic_ns()
        else:
            longest[0] = max(longest[0], (monotonic_ns() - began[0]) / 1e9)

    gc.collect()
    gc.freeze()
    thresholds = gc.get_threshold()
    gc.set_threshold(20_000, 100, 1000)
    gc.callbacks.append(measure)
    try:
        yield longest
    finally:
        gc.callbacks.remove(measure)
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _quantile(values: array, share: float) -> float:
    return float(np.quantile(np.frombuffer(values, dtype=np.float32), share, method="lower")) if values else 0.0
