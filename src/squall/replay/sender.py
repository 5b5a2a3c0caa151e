"""The event loop of a replay: releases rows at their times, and decides what became of each.

A send never waits for a response; only the next turn of one conversation does. Everything that costs time (parsing
answers, writing the journal) is done between deadlines. One process runs one `Sender`; many workers are many of these,
each with its conversations and its own journal file.
"""

import asyncio
import gc
import random
import resource
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from heapq import heappop, heappush
from pathlib import Path
from time import monotonic_ns
from typing import Any, NamedTuple

import msgspec
import numpy as np

from squall.replay.exchange import Exchange
from squall.replay.pacer import Alarm, Pacer
from squall.replay.prompt import Dialect, Prompts, Salt, Text, random_text
from squall.replay.schedule import NOT_SENT, PROMPT_LIMIT, Schedule
from squall.replay.sockets import compiled, pool_for
from squall.replay.stream import MESSAGE_LIMIT, Outcome, Reply
from squall.replay.target import Target
from squall.run.attempt import Attempt, Client, Writer, client_path, lines_path

LEAD = 100_000_000
"""Nanoseconds from the decision to start to the run's time 0."""
BEAT = 10_000_000
"""Nanoseconds between heartbeats: they measure stalls, and look after timeouts, the journal and the end."""
SPARES, SPARES_AHEAD = 64, 100_000_000
"""At most so many connections are opened ahead of the rows that are due within so many nanoseconds."""
QUIET = 300_000
"""Nanoseconds before a deadline in which no answer is parsed."""
BATCH, BACKLOG = 8, 512
"""Answers waiting to be parsed at which that does not wait for the next heartbeat, or for a pause between deadlines."""
AHEAD = 128
"""Requests whose bytes are made ahead of their time."""
AHEAD_BYTES = 1 << 24
MADE_AT_ONCE = 4
"""So many of them in a turn of the loop: a burst that comes meanwhile waits no longer than they take."""
LONGEST_BACKOFF = 30.0
LONGEST_RETRY_AFTER = 120
SHORT_DRAIN = 3_000_000_000
"""Nanoseconds that requests in flight are given after an interrupt."""
RETRY_ON = ("429", "503", "refused", "reset")
RETRY_KINDS = (*RETRY_ON, "5xx", "timeout", "truncated")
"""What `Retries.on` may name."""


@dataclass(frozen=True, kw_only=True)
class Retries:
    """When a failed request is sent again: each time as an attempt of its own, which is load but no arrival."""

    most: int = 0
    """Per request."""
    backoff: float = 0.5
    """Seconds before the first retry, doubled for each further one; 0 sends again at once, as a retry storm does."""
    jitter: bool = True
    """Draw each pause uniformly from 0.5 to 1.5 of itself, so that clients which failed together come back apart."""
    budget: float | None = None
    """At most this share of the requests sent so far, over the whole run; None: no such limit."""
    on: tuple[str, ...] = RETRY_ON


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
    first_token_timeout: float | None = None
    idle_timeout: float | None = None
    retries: Retries = Retries()
    live: bool = False
    """Later turns carry the replies as they came."""
    own_text: Text | None = None
    block_size: int = 0
    part: str = ""
    """Of the journal's file names, where this is not the first process that writes to it."""
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
    retried: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass
class _Stages:
    """Seconds that the parts of sending took, one entry per first attempt sent."""

    pacer: array = field(default_factory=lambda: array("f"))
    connect: array = field(default_factory=lambda: array("f"))
    write: array = field(default_factory=lambda: array("f"))
    stall: array = field(default_factory=lambda: array("f"))


def prepare(plan: Plan) -> None:
    """Do what takes a moment, before the time of the start is set."""
    random_text(plan.dialect.tokens, plan.seed)
    compiled()
    gc.freeze()


class _Due(NamedTuple):
    """A send that the schedule's own times do not fix: a later turn, or a retry."""

    at: int
    number: int  # decides among equal times
    row: int
    attempt: int
    retries: int


class _Limit(NamedTuple):
    """A look at an exchange that is due: did it keep its time?"""

    at: int
    number: int
    exchange: Exchange
    kind: str


class Sender:
    """Sends `rows` by `plan`, whose time 0 is `start` (monotonic ns); `run()` returns when all outcomes are written."""

    def __init__(
        self, plan: Plan, rows: Schedule, start: int, *, worker: int = 0, watch: Callable[[Counts], int]
    ) -> None:
        """`watch` gets the counts ten times a second and returns how often it was asked to stop (1: drain, 2: now)."""
        self._plan, self._start, self._worker, self._watch = plan, start, worker, watch
        self._loop = asyncio.get_running_loop()
        opens, follows = rows.turns()
        self._rows = None if opens is None else opens.data  # the pacer's number -> row
        self._follows = None if follows is None else follows.data
        self._pacer = Pacer(rows.at if opens is None else rows.at[opens], start)
        self._at, self._request, self._prompt, self._answer = (
            np.ascontiguousarray(column).data
            for column in (rows.at, rows.request, rows.request_tokens, rows.response_tokens)
        )
        self._root, self._think, self._hang_up, self._blocks, self._block_ends = (
            None if column is None else np.ascontiguousarray(column).data
            for column in (rows.root, rows.think, rows.hang_up, rows.blocks, rows.block_ends)
        )
        self._prompts = Prompts(
            plan.dialect.tokens,
            salt=plan.salt,
            seed=plan.seed,
            fresh=plan.fresh,
            own=plan.own_text,
            block_size=plan.block_size,
        )
        self._histories: dict[int, tuple[bytes, int]] = {}  # row -> what it carries of the turns before, its tokens
        self._texts: dict[int, bytes] = {}  # row in flight -> its own part of the prompt, where replies are carried on
        self._later: list[_Due] = []  # a heap
        self._limits: list[_Limit] = []  # a heap
        self._number = 0
        self._retried = 0
        self._sent = 0
        self._pool = pool_for(
            self._loop,
            plan.target.address,
            tls=plan.target.context(),
            hostname=plan.target.host,
            connect_timeout=plan.connect_timeout,
        )
        if self._follows is not None or plan.max_concurrency is not None:
            self._pool.hurry()
        self._alarm = Alarm(self._pool.loop, self._ring)
        self._pulse = Alarm(self._pool.loop, self._beat, exact=False)
        self._journal = Writer(lines_path(plan.journal, worker, plan.part))
        self._random = random.Random(f"{plan.seed} {worker}")
        self._made: dict[int, bytes] = {}  # row -> request made ahead of its time
        self._made_bytes = 0
        self._make_next = 0
        self._waiting: deque[tuple[int, int]] = deque()  # (row, scheduled) due but over the concurrency limit
        self._flying: dict[Exchange, None] = {}  # in the order of their release
        self._ended: deque[Exchange] = deque()  # over, but not yet parsed and written
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
        while self._make_ahead():
            pass
        try:
            with _collections() as longest:
                self._ring()
                await self._over
        finally:
            self._pulse.close()
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
        client_path(self._plan.journal, self._worker, self._plan.part).write_bytes(msgspec.json.encode(client))
        self._watch(self.counts)

    # --- sending -------------------------------------------------------------------------------------------------

    def _ring(self) -> None:
        """Release every row that is due, in order, and set the alarm for the next."""
        now = monotonic_ns()
        for number in self._pacer.due(now):
            row = number if self._rows is None else self._rows[number]
            self._release(row, self._pacer.when(number))
        while self._later and self._later[0].at <= now:
            due = heappop(self._later)
            if due.attempt == 1:
                self._release(due.row, due.at)
            else:
                self._send(due.row, due.at, due.attempt, due.retries)
        deadline = self._deadline()
        if deadline is not None:
            self._alarm.set(deadline)
        if len(self._ended) >= BATCH or len(self._made) < AHEAD // 2:
            self._settle_soon()

    def _deadline(self) -> int | None:
        """When something is to be sent next, as far as that is known."""
        deadline = self._pacer.deadline()
        if self._later and (deadline is None or self._later[0].at < deadline):
            return self._later[0].at
        return deadline

    def _send_later(self, at: int, row: int, attempt: int = 1, retries: int = 0) -> None:
        self._number += 1
        heappush(self._later, _Due(at, self._number, row, attempt, retries))
        if self._later[0].number == self._number:
            self._alarm.set(self._deadline() or at)

    def _release(self, row: int, scheduled: int) -> None:
        self.counts.released += 1
        tokens, limit = self._prompt[row], self._plan.max_concurrency
        if tokens == 0 or tokens > PROMPT_LIMIT or (self._hang_up is not None and self._hang_up[row] == NOT_SENT):
            reason = "no_prompt" if tokens == 0 else "prompt_too_long" if tokens > PROMPT_LIMIT else "recorded_failure"
            self._cancel(row, scheduled, reason)
            self._next_turn(row, scheduled, monotonic_ns(), None)
        elif limit is not None and len(self._flying) >= limit:
            self._waiting.append((row, scheduled))
        else:
            self._send(row, scheduled)

    def _cancel(self, row: int, scheduled: int, reason: str) -> None:
        """Record that a row was never sent."""
        at = (scheduled - self._start) / 1e9
        self._write(Attempt(request=self._request[row], attempt=1, status="cancelled", scheduled=at, reason=reason))
        self.counts.cancelled += 1

    def _send(self, row: int, scheduled: int, attempt: int = 1, retries: int = 0, fresh: bool = False) -> None:
        exchange = Exchange(row, attempt, self._payload(row), scheduled, self._on_end)
        exchange.retries = retries
        exchange.keep_text = self._plan.live and self._follows is not None and self._follows[row] >= 0
        self._flying[exchange] = None
        self._sent += 1
        self._last_send = exchange.released
        plan = self._plan
        self._limit(exchange, plan.timeout, "total")
        self._limit(exchange, plan.first_token_timeout, "first")
        self._limit(exchange, plan.idle_timeout, "idle")
        if self._hang_up is not None and self._hang_up[row] >= 0:
            self._limit(exchange, self._hang_up[row], "hang_up")
        self._pool.send(exchange, fresh=fresh)

    def _limit(self, exchange: Exchange, after: float | None, kind: str) -> None:
        if after is not None:
            self._number += 1
            heappush(self._limits, _Limit(exchange.released + round(after * 1e9), self._number, exchange, kind))

    def _payload(self, row: int) -> bytes:
        made = self._made.pop(row, None)
        if made is None:
            return self._make(row)
        self._made_bytes -= len(made)
        return made

    def _make(self, row: int) -> bytes:
        dialect, request = self._plan.dialect, self._request[row]
        history, carried = self._histories.get(row, (b"", 0))
        root = request if self._root is None or self._plan.live else self._root[row]
        blocks: Sequence[int] = ()
        if self._blocks is not None and self._block_ends is not None:
            blocks = self._blocks[self._block_ends[row - 1] if row else 0 : self._block_ends[row]]
        text = self._prompts.text(request, dialect.fit.words(self._prompt[row] - carried), root, blocks)
        if self._plan.live and self._follows is not None and self._follows[row] >= 0:
            self._texts[row] = text
        return self._plan.target.request(dialect.path, dialect.body(text, self._answer[row], history))

    def _make_ahead(self) -> bool:
        """Make the bytes of the next few requests while nothing is due; whether there is room for more."""
        number = max(self._make_next, self._pacer.next)
        last = min(number + MADE_AT_ONCE, len(self._pacer))
        while number < last and len(self._made) < AHEAD and self._made_bytes < AHEAD_BYTES:
            row = number if self._rows is None else self._rows[number]
            if 0 < self._prompt[row] <= PROMPT_LIMIT:
                self._made[row] = made = self._make(row)
                self._made_bytes += len(made)
            number += 1
        self._make_next = number
        return number == last < len(self._pacer) and len(self._made) < AHEAD and self._made_bytes < AHEAD_BYTES

    # --- outcomes ------------------------------------------------------------------------------------------------

    def _on_end(self, exchange: Exchange) -> None:
        self._flying.pop(exchange, None)
        if exchange.ending == "stale_reuse" and self._stops < 2:
            self._send(exchange.row, monotonic_ns(), exchange.attempt + 1, exchange.retries, fresh=True)
        elif self._waiting:
            self._send(*self._waiting.popleft())
        if self._follows is not None and self._follows[exchange.row] >= 0:
            self._record(exchange)  # the next turn waits for it
        else:
            self._ended.append(exchange)
        if len(self._ended) >= BATCH:  # else the next heartbeat sees to them: fewer turns of the loop, warmer caches
            self._settle_soon()

    def _settle_soon(self) -> None:
        if not self._settling:
            self._settling = True
            self._pool.loop.call_soon(self._settle)

    def _settle(self) -> None:
        """Parse and write answers, a few at a time, unless a row is due in a moment; the alarm calls again."""
        self._settling = False
        deadline = self._deadline()
        more = False
        for _ in range(self._pool.at_once):
            if deadline is not None and deadline - monotonic_ns() < QUIET and len(self._ended) < BACKLOG:
                return
            if not self._ended:
                more = self._make_ahead()
                break
            self._record(self._ended.popleft())
        if self._ended or more:
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
        if self._follows is not None:
            self._after(exchange, reply, outcome)

    def _after(self, exchange: Exchange, reply: Reply, outcome: Outcome) -> None:
        """What an attempt's end means for the next turn of its conversation."""
        row, ended = exchange.row, exchange.ended or monotonic_ns()
        text = self._texts.pop(row, b"")
        history, _ = self._histories.pop(row, (b"", 0))
        following = -1 if self._follows is None else self._follows[row]
        if following < 0 or self._stops:
            return
        if outcome.status == "ok" or (outcome.status, outcome.reason) == ("cancelled", "plan"):
            carried = self._root is not None and self._root[following] != self._request[following]
            if self._plan.live and carried:
                dialect = self._plan.dialect
                known = reply.prompt_tokens
                prompt = self._prompt[row] if known is None else known
                answer = reply.pieces if reply.response_tokens is None else reply.response_tokens
                said = "".join(reply.text or ())
                self._histories[following] = dialect.remember(history, text, said), prompt + answer
            self._next_turn(row, exchange.scheduled, ended, following)
        else:
            self._orphan(following)

    def _next_turn(self, row: int, scheduled: int, ended: int, following: int | None) -> None:
        """Schedule the turn after `row`, which was scheduled and ended at these times."""
        if following is None:
            following = -1 if self._follows is None else self._follows[row]
        if following < 0 or self._think is None:
            return
        think = self._think[following]
        gap = self._at[following] - self._at[row]
        due = ended + round(think * 1e9) if think >= 0 else max(ended, scheduled + gap)
        stop_after = self._plan.stop_after
        if stop_after is not None and due > self._start + stop_after * 1e9:  # slow answers moved it beyond the end
            self._orphan(following, "plan")
        else:
            self._send_later(due, following)

    def _orphan(self, row: int, reason: str = "parent_failed") -> None:
        """Record that `row` and the turns after it will never be sent."""
        while row >= 0:
            self._cancel(row, self._start + self._at[row], reason)
            self._histories.pop(row, None)
            row = -1 if self._follows is None else self._follows[row]

    def _outcome(self, exchange: Exchange) -> tuple[Reply, Outcome]:
        reply, outcome = exchange.outcome()
        if outcome.message:
            outcome = outcome._replace(message=self._plan.target.hide(outcome.message)[:MESSAGE_LIMIT])
        return reply, outcome

    def _attempt(self, exchange: Exchange, reply: Reply, outcome: Outcome) -> Attempt:
        start = self._start

        def seconds(at: int | None) -> float | None:
            return None if at is None else (at - start) / 1e9

        dialect, chunks = self._plan.dialect, reply.chunks
        first = chunks[0] if chunks else 0
        known = None
        if reply.prompt_tokens is None and dialect.tokens == "ids":
            known = dialect.fit.tokens(dialect.fit.words(self._prompt[exchange.row]))
        answered = bool(chunks) or outcome.status == "ok"
        from_server = reply.response_tokens is not None and bool(reply.response_tokens) == bool(chunks)
        return Attempt(
            request=self._request[exchange.row],
            attempt=exchange.attempt,
            status=outcome.status,
            scheduled=seconds(exchange.scheduled),
            sent=seconds(exchange.sent),
            first_byte=seconds(exchange.first_byte),
            first_token=seconds(chunks[0]) if chunks else None,
            first_answer=seconds(reply.answer),
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
        plan = self._plan.retries
        if exchange.retries >= plan.most or self._stops or not _may_pass(exchange, reply, outcome, plan.on):
            return False
        if plan.budget is not None and self._retried >= plan.budget * (self._sent - self._retried):
            return False
        wait = min(plan.backoff * 2**exchange.retries, LONGEST_BACKOFF)
        if plan.jitter:
            wait *= 0.5 + self._random.random()
        if exchange.retry_after and exchange.retry_after.isdigit() and plan.backoff > 0:
            wait = max(wait, min(int(exchange.retry_after), LONGEST_RETRY_AFTER))
        self._retried += 1
        self.counts.retried += 1
        self._send_later(monotonic_ns() + round(wait * 1e9), exchange.row, exchange.attempt + 1, exchange.retries + 1)
        return True

    def _write(self, attempt: Attempt) -> None:
        self._journal.write(attempt)

    # --- the heartbeat, and the end ------------------------------------------------------------------------------

    def _beat(self) -> None:
        now = monotonic_ns()
        self._stages.stall.append(max(0.0, (now - self._beat_at) / 1e9))
        self._beat_at = now + BEAT
        self._pulse.set(self._beat_at)
        while self._limits and self._limits[0].at <= now:
            self._look(heappop(self._limits), now)
        self._beats += 1
        self._pool.prepare(self._pacer.soon(now + SPARES_AHEAD, self._room()))
        if self._beats % 10 == 0:
            self.counts.in_flight = len(self._flying)
            self._stop(self._watch(self.counts))
        if self._beats % 100 == 0:
            self._journal.flush()
        self._look_after_end(now)
        self._settle_soon()

    def _room(self) -> int:
        """How many more requests may be sent now, as far as it matters for opening connections."""
        limit = self._plan.max_concurrency
        return SPARES if limit is None else min(SPARES, max(0, limit - len(self._flying)))

    def _look(self, limit: _Limit, now: int) -> None:
        """Give up the exchange if it did not keep this time."""
        exchange, plan = limit.exchange, self._plan
        if exchange.ended is not None:
            return
        if limit.kind == "total":
            self._abort(exchange, "timeout/total", f"no complete answer in {plan.timeout:g} s")
        elif limit.kind == "hang_up":
            self._abort(exchange, "cancelled/plan", "hung up by plan")
        elif limit.kind == "first":
            if not exchange.fold().chunks:
                self._abort(exchange, "timeout/first", f"no token in {plan.first_token_timeout:g} s")
        elif plan.idle_timeout is not None:
            last = exchange.last_read or exchange.sent or exchange.released
            due = last + round(plan.idle_timeout * 1e9)
            if due <= now:
                self._abort(exchange, "timeout/idle", f"nothing was read for {plan.idle_timeout:g} s")
            else:
                heappush(self._limits, limit._replace(at=due))

    def _stop(self, stops: int) -> None:
        """Stop sending; what is in flight gets a moment (the first time) or none (the second)."""
        if stops <= self._stops:
            return
        self._stops = stops
        self._pacer.next = len(self._pacer)
        self._waiting.clear()  # the journal's reader gives rows without a line their outcome
        self._later.clear()
        self._last_send = monotonic_ns()
        self._drain = min(self._drain, SHORT_DRAIN) if stops == 1 else 0
        self._settle_soon()

    def _look_after_end(self, now: int) -> None:
        stop_after = self._plan.stop_after
        if stop_after is not None and now > self._start + stop_after * 1e9:
            self._drop_waiting()
        if self._deadline() is not None or now < self._last_send + self._drain:
            return
        self._drop_waiting()
        for exchange in list(self._flying):
            age = (now - (exchange.sent or exchange.released)) / 1e9
            self._abort(exchange, "cancelled/in_flight_at_end", f"no complete answer {age:.1f} s after it was sent")

    def _drop_waiting(self) -> None:
        """Rows that the concurrency limit held back until the run's time was over."""
        for row, _ in self._waiting:
            self._orphan(row, "plan")
        self._waiting.clear()
        self._settle_soon()

    def _abort(self, exchange: Exchange, ending: str, message: str) -> None:
        if exchange.ended is None:
            connection = exchange.connection
            exchange.end(ending, message)
            if connection is not None:
                connection.abort()

    def _done(self) -> bool:
        busy = self._flying or self._ended or self._waiting or self._later
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


def _may_pass(exchange: Exchange, reply: Reply, outcome: Outcome, on: tuple[str, ...]) -> bool:
    """Whether the outcome is one of the kinds after which the plan sends again."""
    status = reply.error_code if outcome.reason == "in_band" else exchange.http_status
    if outcome.status == "http_error" and status is not None:
        return str(status) in on or ("5xx" in on and 500 <= status < 600)
    return outcome.status in on and outcome.reason not in ("dns", "tls")


@contextmanager
def _collections() -> Iterator[list[float]]:
    """Make garbage collections rare, with what exists now left out of them; yields the longest in seconds."""
    longest, began = [0.0], [0]

    def measure(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            began[0] = monotonic_ns()
        else:
            longest[0] = max(longest[0], (monotonic_ns() - began[0]) / 1e9)

    gc.freeze()
    thresholds = gc.get_threshold()
    gc.set_threshold(5_000, 100, 1000)  # each looks at so many objects, a third of a microsecond for one
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
