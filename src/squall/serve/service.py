"""The modelled cluster in (scaled) real time: a clock that drives it, and the streams that it feeds.

The cluster's tick t lies at the moment  start + t / (TICKS * speed)  of the machine's clock. A request enters the
cluster at the tick of its last byte, and every token is written at the moment of its tick. Thousands of tokens that
have one moment cannot all be written in it: they are written around it (tokens.py). How far from it each really left is
measured, and said aloud when it is more than `LATE`.
"""

import asyncio
import random
import time
from collections.abc import Callable
from time import monotonic_ns

import msgspec
import numpy as np

from squall.errors import InputError
from squall.guest import NoReturnError
from squall.progress import note
from squall.replay.pacer import Alarm
from squall.serve import api, exposition
from squall.serve.http import Request, error_body
from squall.serve.tokens import Outlets
from squall.simulate.cluster import Cluster
from squall.simulate.live import MOST_CLIENTS, REFUSED, TOKEN, LiveCluster
from squall.simulate.records import NEVER, QUEUE_FULL, TICKS, UNSERVABLE

LATE = 0.005
"""Seconds off its moment at which a token is late: the limit of the p99."""
HORIZON = 0.025
"""Seconds after the next step's end within which other steps' tokens are looked at, to be written with its own."""
CAPACITY = 16_384
"""Requests that may be in the cluster at once."""
WORTH = 100_000
"""Nanoseconds before its moment from which on it is worth to begin with a step's tokens before."""
LOOK = 1.0
"""Seconds between looks at lateness and at requests that have taken too long."""
SLOW_ORDER = 0.001
"""Seconds that one request may take in an order of the queue that somebody wrote himself."""
TELL = 10.0
"""Seconds between sentences about not keeping up."""

_REFUSALS = {
    QUEUE_FULL: (429, "the queue is full"),
    UNSERVABLE: (400, "prompt and answer together can never fit into the KV cache of this server"),
}


class Stream:
    """A request in the cluster."""

    __slots__ = ("ask", "event", "reply", "request", "slot")

    def __init__(self, request: Request, ask: api.Ask, reply: api.Reply, slot: int) -> None:
        self.request, self.ask, self.reply, self.slot = request, ask, reply, slot
        self.event = b""
        """The event of one token as it goes over the wire; empty if the answer is not streamed."""


class Service:
    """One port: a cluster and its clients. Use within a running event loop."""

    def __init__(
        self,
        cluster: Cluster,
        limits: api.Limits,
        *,
        speed: float,
        seed: int,
        timeout: float | None,
        failing: Callable[[float], float] | None,
        name: str = "",
    ) -> None:
        """`failing` gives the share of requests that fail, by the cluster's time in seconds."""
        self.live = LiveCluster(cluster, seed=seed, capacity=CAPACITY)
        self._cluster, self._speed = cluster, speed
        self._caching = cluster.choices.prefix_caching
        self._limits = msgspec.structs.replace(
            limits,
            block=cluster.block_size if self._caching else 0,
            priorities=cluster.choices.scheduler == "priority" or ":" in cluster.choices.scheduler,
        )
        self._fair, self._clients = cluster.choices.scheduler == "vtc", dict[str, int]()
        self._order = cluster.choices.scheduler if ":" in cluster.choices.scheduler else None
        self._timeout, self._failing, self._name = timeout, failing, name
        self._random = random.Random(f"{seed} serve {name}")
        self._loop = asyncio.get_running_loop()
        self._streams: dict[int, Stream] = {}
        self._number = 0
        self._alarm = Alarm(self._loop, self._ring)
        self._set_for = int(NEVER)
        self._late_looks = 0
        self._told = -TELL
        self.behind = 0.0, 0.0
        """P99 and the largest of the timing errors in the last look, seconds."""
        self.failure: InputError | None = None
        """Why it cannot go on."""
        self.tally = exposition.Tally()
        self._start = monotonic_ns()
        self._started = time.time()
        self._ns_per_tick = 1e9 / (TICKS * speed)
        self._horizon = int(HORIZON * 1e9 / self._ns_per_tick)
        self.outlets = Outlets(CAPACITY, self._start, self._ns_per_tick, exposition.ITL)
        self._early: tuple[float, np.ndarray] = (np.inf, np.empty(0, TOKEN))
        self._ended: set[int] = set()
        self._look = self._loop.call_later(LOOK, self._look_after)

    # --- requests ----------------------------------------------------------------------------------------------------

    def handle(self, request: Request) -> None:
        """Answer a request, now or when the cluster has its tokens."""
        try:
            self._route(request)
        except api.ApiError as error:
            self.tally.refused(error.status)
            request.answer(error.status, error_body(error.status, error.message, error.param))

    def _route(self, request: Request) -> None:
        path = request.path.rstrip("/") or "/"
        if path in api.PATHS:
            if request.method != "POST":
                raise api.ApiError(405, f"{path} takes POST")
            self._ask(request, api.read(api.PATHS[path], request.body, self._limits))
        elif path == "/tokenize" and request.method == "POST":
            request.answer(200, api.tokenize(request.body, self._limits))
        elif request.method not in ("GET", "HEAD"):
            raise api.ApiError(404, "there is nothing here")
        elif path in ("/health", "/ping"):
            request.answer(200, b"")
        elif path == "/v1/models":
            request.answer(200, api.models(self._limits, int(self._started)))
        elif path == "/version":
            request.answer(200, b'{"version":"squall"}')
        elif path == "/metrics":
            self._advance()
            page = exposition.page(
                self.tally,
                self.outlets,
                self.live.loads(),
                self._limits.model,
                self._cluster,
                self._started,
                self.behind,
            )
            request.answer(200, page, "text/plain; version=0.0.4; charset=utf-8")
        else:
            raise api.ApiError(404, "there is nothing here")

    def _ask(self, request: Request, ask: api.Ask) -> None:
        now = self._now(request.arrived)
        if self._failing is not None and self._random.random() < self._failing(now / TICKS):
            raise api.ApiError(500, "a failure that was asked for (injected)")
        if self.live.full:
            raise api.ApiError(503, "too many requests at once")
        self._number += 1
        try:
            slot = self.live.submit(
                now,
                ask.prompt,
                ask.output,
                hashes=ask.hashes,
                priority=float(ask.priority),
                client=self._client(ask.client) if self._fair else 0,
                affinity=None if ask.session is None else hash(ask.session),
            )
        except InputError as error:  # an order of the queue that somebody wrote himself
            if isinstance(error, NoReturnError):
                self.failure = error
            raise api.ApiError(500, str(error)) from error
        took = self.live.order_took
        if self._order is not None and took > SLOW_ORDER:
            note(
                f"serve: --scheduler {self._order} took {1e3 * took:.0f} ms for one request, and every stream waited "
                f"for it; a function for a served cluster takes microseconds (said once)."
            )
            self._order = None
        ask.hashes = []
        stream = Stream(request, ask, api.Reply(ask, self._number, self._limits.model), slot)
        if ask.stream:
            stream.event = request.frame(stream.reply.event)
        self.outlets.take(slot, ask.output, ask.stream)
        self._streams[slot] = stream
        request.on_gone = lambda: self._gone(slot)
        self._set()

    def _client(self, name: str) -> int:
        """A number for the client, the same each time; when there are too many, some share one."""
        if len(self._clients) < MOST_CLIENTS:
            return self._clients.setdefault(name, len(self._clients))
        known = self._clients.get(name)
        return hash(name) % MOST_CLIENTS if known is None else known

    def _gone(self, slot: int) -> None:
        """The client went away."""
        if self._streams.pop(slot, None) is not None:
            self.outlets.shut(slot)
            self._advance()
            self.live.cancel(slot)
            self.tally.cancelled()
            self._set()

    # --- the clock ---------------------------------------------------------------------------------------------------

    def _now(self, at: int) -> int:
        """The cluster's tick at the monotonic time `at` (ns)."""
        return int((at - self._start) / self._ns_per_tick)

    def _moment(self, tick: int) -> int:
        """The monotonic time (ns) of a tick."""
        return self._start + int(tick * self._ns_per_tick)

    def _ring(self) -> None:
        self._set_for = int(NEVER)
        at, rows = self._early
        if monotonic_ns() >= at:
            self._early = np.inf, rows[:0]
            self._write(rows, due=False)
        self._advance()

    def _set(self) -> None:
        """Set the alarm for what happens next."""
        due = min(self._moment(self.live.next()) + 1000, self._early[0])
        if due < self._set_for:
            self._set_for = int(due)
            self._alarm.set(self._set_for)

    def _advance(self) -> None:
        """Let the cluster come up to now, and tell its clients; see when tokens are to be written next."""
        told = self.live.advance(self._now(monotonic_ns()))
        if len(told):
            self._write(told, due=True)
        due = self.live.next()
        rows = self.live.ahead(due + self._horizon) if due < NEVER else told[:0]
        at, count = self.outlets.plan(rows)
        self._early = (at, rows[:count]) if at < self._moment(due) - WORTH else (np.inf, rows[:0])
        self._set()

    def _write(self, rows: np.ndarray, due: bool) -> None:
        """Write tokens; when they are `due`, the requests whose last ones they are leave the cluster."""
        at, write = 0, self.outlets.write
        while (at := write(rows, at, due)) < len(rows):
            tick, slot, index = rows[at].item()
            at += 1
            stream = self._streams.get(slot)
            if index == REFUSED:
                self._refuse(slot)
            elif stream is not None:
                self._tell(stream, index, tick)
                if index == stream.ask.output:
                    del self._streams[slot]
                    self._ended.add(slot)
            if due and slot in self._ended:  # else its client is gone: the slot was given back when it went
                self._ended.remove(slot)
                self.live.release(slot)

    def _tell(self, stream: Stream, index: int, tick: int) -> None:
        """Write a token that is not like all others."""
        request, ask, reply, slot = stream.request, stream.ask, stream.reply, stream.slot
        if index == 1 and self._caching:
            reply.cached = self.live.cached(slot)
        last = index == ask.output
        if not ask.stream:
            if last:
                request.answer(200, reply.whole(index))
        elif index == 1 or last:
            token = reply.first() if index == 1 else reply.event
            request.events(request.frame(token + reply.last(index) if last else token), last=last)
        else:
            request.write(stream.event[self.outlets.taken(slot) :])
        if stream.event and index == 1 and not last and request.flushed:
            self.outlets.open(slot, request.fileno, stream.event)
        now = self.outlets.told(slot, index, tick if ask.stream or last else None)
        if index == 1:
            self.tally.first((now - request.arrived) / 1e9, ask.prompt)
        if last:
            self.tally.finish((now - request.arrived) / 1e9)

    def _refuse(self, slot: int) -> None:
        state = self.live.state(slot)
        self.live.release(slot)
        stream = self._streams.pop(slot, None)
        if stream is not None:
            status, message = _REFUSALS.get(state, (503, "no replica can take this request"))
            self.tally.refused(status)
            stream.request.answer(
                status, error_body(status, message), **({"retry_after": "1"} if status == 429 else {})
            )

    # --- once a second -----------------------------------------------------------------------------------------------

    def _look_after(self) -> None:
        self._look = self._loop.call_later(LOOK, self._look_after)
        errors = self.outlets.look()
        self.behind = (float(np.quantile(errors, 0.99)), float(errors.max())) if errors.size else (0.0, 0.0)
        self._late_looks = self._late_looks + 1 if self.behind[0] > LATE else 0
        now = time.monotonic()
        if self._late_looks >= 3 and now - self._told > TELL:
            self._told = now
            note(
                f"serve: cannot keep up{self._name}: 1 % of the tokens leave {1e3 * self.behind[0]:.0f} ms or more off "
                f"their moment (limit {1e3 * LATE:g} ms), so latencies are not the model's; lower --speed or the load."
            )
        if self._timeout is not None:
            self._time_out(monotonic_ns() - round(self._timeout / self._speed * 1e9))

    def _time_out(self, arrived: int) -> None:
        """Give up what arrived before; the oldest stand first."""
        while self._streams:
            slot, stream = next(iter(self._streams.items()))
            if stream.request.arrived > arrived:
                return
            del self._streams[slot]
            self.outlets.shut(slot)
            self.live.cancel(slot)
            self.tally.refused(504)
            body = error_body(504, f"no complete answer in {self._timeout:g} s")
            if stream.request.begun:
                stream.request.events(stream.request.frame(b"data: " + body + b"\n\n"), last=True)
            else:
                stream.request.answer(504, body)

    def close(self) -> None:
        """Stop the clock."""
        self._look.cancel()
        self._alarm.close()
