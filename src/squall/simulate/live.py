"""The modelled cluster step by step, for whoever lives in real time with it: `serve`.

The scheduler, the blocks and the step times are those of a simulation (replica.py), function by function; only the loop
around them differs: it stops at a given tick, takes arrivals and cancellations as they come, and tells of every token.
Windows are off, since nobody knows what will happen within them. What a simulation reads from its trace (the key of a
queue order, the client, the hashes of prompt blocks) comes here with each request.

A request has a slot, which is its row among the attempts. By `2 * slot` the kernel finds what is kept of it, so that
the hashes of a prompt have a begin and an end of their own, wherever they lie.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from heapq import heappop, heappush
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from squall import native
from squall.errors import InputError
from squall.guest import RaisedError
from squall.native import Bundle, Form, lean
from squall.seeds import DEFAULT_SEED, stream
from squall.simulate import kernel, records
from squall.simulate.blocks import Pool, clear
from squall.simulate.cluster import Cluster
from squall.simulate.engine import kernel_seeds
from squall.simulate.kernel import end_transfer, enter, give_up, look, pass_front
from squall.simulate.policies import Choices, OwnPolicy, pool_for, queue_of
from squall.simulate.records import (
    ATTEMPT,
    FRONT,
    KV_END,
    NEVER,
    OK,
    PASS,
    PREFILL,
    QUEUED,
    RUNNING,
    TICKS,
    TRANSFER,
    Engines,
)
from squall.simulate.replica import account, pop_event, receive, results_pass, set_end, start_step, wake, widen
from squall.simulate.waiting import KEYED, VTC, Queue
from squall.trace.table import SCHEMA

TOKEN = np.dtype([("time", np.int64), ("slot", np.int32), ("index", np.int32)], align=True)
"""What happened to a request: its token number `index` (from 1) is there; or 0: it was refused on arrival."""
REFUSED = 0
MOST_CLIENTS = 4096
"""Clients that `vtc` tells apart; further ones share accounts with them."""
LIVE_LIMIT = 2.0
"""Seconds for the key of a request, in which nothing else happens here."""
_EVENTS = 1 << 14
_MODELLED = frozenset(
    (
        *("scheduler", "prediction_error", "step_order", "chunk_size", "preemption", "swap_space", "swap_bandwidth"),
        *("watermark", "prefix_caching", "eviction", "host_cache", "host_bandwidth", "router", "scrape_interval"),
        *("prefill_replicas", "decode_replicas", "kv_bandwidth", "kv_latency"),
        *("api_request_time", "api_result_time"),
    )
)
_INSTEAD = {
    "clients": "a request's `user` is its client",
    "priorities": "a request's own `priority` counts, as in vLLM",
    "deadlines": "requests do not say what their deadline is",
    "own_blocks": "with --prefix-caching it knows what a resumed request finds again",
    "shared_prefix": "what prompts share, their own texts say",
    "fail": "--fail-rate and --failures make requests fail; a replica behind a port of its own can be killed",
    "mtbf": "--fail-rate and --failures make requests fail; a replica behind a port of its own can be killed",
    "autoscale": "start and stop replicas behind ports of their own",
    "price": "it has no result in which a cost could stand",
}
"""Why what is not modelled live is not, by the field of Choices."""


@lean
def _finish_tick(engines: Engines, attempts: np.ndarray, limits: Any, pool: Any, queue: Any, now: Any) -> None:
    """Let whatever was touched at this tick schedule."""
    shared = engines.shared
    for t in range(1, shared.touched[0] + 1):
        r = shared.touched[t]
        account(engines, r, now)
        start_step(engines, r, attempts, pool, queue, limits, now)
    shared.touched[0] = 0


@lean
def _wake_all(engines: Engines, attempts: np.ndarray, limits: Any, pool: Any, queue: Any, now: Any) -> None:
    """Wake those to which something was handed."""
    shared = engines.shared
    while shared.woken[0] > 0:
        shared.woken[0] -= 1
        wake(engines, shared.woken[shared.woken[0] + 1], attempts, pool, queue, limits, now)


@lean
def _tell_tokens(
    engines: Engines, r: int, attempts: np.ndarray, limits: Any, out: np.ndarray, told: int, now: Any
) -> Any:
    """Note the tokens that the end of replica `r`'s step will bring; returns how many entries `out` has then."""
    me = engines.state[r]
    if me.role == PREFILL:  # its token is the first of the decode replica's
        return told
    now = results_pass(me, limits, now)
    for i in range(me.running):
        s = engines.running[r, i]
        if (s.now if limits.asynchronous else s.next) == 3 and attempts[s.attempt].state == RUNNING:
            out[told].time = now
            out[told].slot = s.attempt
            out[told].index = s.generated + 1
            told += 1
    for k in range(me.orphans):
        a = engines.orphans[r, k]
        if attempts[a].state <= TRANSFER:
            out[told].time = now
            out[told].slot = a
            out[told].index = attempts[a].generated + 1
            told += 1
    return told


class _Live(NamedTuple):
    """All that the compiled functions read and write."""

    engines: Engines
    attempts: np.ndarray
    settings: np.ndarray  # records.packed(Limits)
    pool: Any
    queue: Any
    affinity: np.ndarray
    at: np.ndarray  # (capacity,) ticks of arrivals, ascending; and whose they are
    slots: np.ndarray
    out: np.ndarray  # TOKEN
    said: np.ndarray  # (2,) by _advance: arrivals taken, and whether `out` was too small to come to the end
    order: np.ndarray  # (replicas,) for _ahead


@lean
def _run(
    live: Any,
    engines: Engines,
    attempts: np.ndarray,
    pool: Any,
    queue: Any,
    limits: Any,
    arrived: int,
    coming_in: int,
    until: Any,
) -> Any:
    at, slots, out, said = live.at, live.slots, live.out, live.said
    shared, heap = engines.shared, engines.heap
    leaves = shared.ends.size // 2
    told = 0
    most = 2 * engines.running.size + 1
    said[1] = 0
    while True:
        said[0] = arrived
        coming = at[arrived] if arrived < coming_in else NEVER
        now = min(coming, shared.ends[1], heap[0].tick)
        if now > until:
            return told
        if told + most > out.size:
            said[1] = 1
            return told
        widen(engines.samples, shared.width, now)
        if limits.scrape > 0:
            look(engines, limits, now)
        while True:
            if shared.ends[1] == now:
                i = 1
                while i < leaves:
                    i = 2 * i if shared.ends[2 * i] == now else 2 * i + 1
                r = i - leaves
                account(engines, r, now)
                set_end(engines, r, NEVER)
                told = _tell_tokens(engines, r, attempts, limits, out, told, now)
                receive(engines, r, attempts, pool, queue, limits, now)
                wake(engines, r, attempts, pool, queue, limits, now)
            elif heap[0].tick == now:
                kind, who = heap[0].kind, heap[0].who
                pop_event(engines)
                if kind == KV_END:
                    end_transfer(engines, attempts, who, pool, queue, limits, now)
                elif kind == PASS:
                    pass_front(engines, attempts, who, pool, queue, limits, now)
            elif arrived < coming_in and at[arrived] == now and told + most <= out.size:
                a = slots[arrived]
                enter(engines, attempts, a, pool, queue, limits, live.affinity, now)
                if attempts[a].state >= OK:
                    out[told].time = now
                    out[told].slot = a
                    out[told].index = REFUSED
                    told += 1
                arrived += 1
            else:
                break
            _wake_all(engines, attempts, limits, pool, queue, now)
        _finish_tick(engines, attempts, limits, pool, queue, now)


def _advance(live: Any, begin: int, end: int, until: int) -> int:
    """Run up to and with tick `until`; the arrivals from place `begin` to before `end` reach the cluster. Returns how
    many entries `out` has. Compiled, as the three after it, of a bundle of _Live."""
    return _run(live, live.engines, live.attempts, live.pool, live.queue, live.settings[0], begin, end, until)


def _ahead(live: Any, until: int) -> int:
    """Note the tokens of the steps that run now and end by `until`, in the order of time; returns how many."""
    engines, order = live.engines, live.order
    shared, replicas, count = engines.shared, engines.state.size, 0
    leaves = shared.ends.size // 2
    for r in range(replicas):
        end = shared.ends[leaves + r]
        if end <= until:
            k = count
            while k > 0 and shared.ends[leaves + order[k - 1]] > end:
                order[k] = order[k - 1]
                k -= 1
            order[k] = r
            count += 1
    told = 0
    for k in range(count):
        end = shared.ends[leaves + order[k]]
        told = _tell_tokens(engines, order[k], live.attempts, live.settings[0], live.out, told, end)
    return told


@lean
def _give_up(engines: Engines, attempts: np.ndarray, pool: Any, queue: Any, limits: Any, a: int, now: Any) -> None:
    widen(engines.samples, engines.shared.width, now)
    give_up(engines, attempts, a, pool, queue, limits, now)
    _wake_all(engines, attempts, limits, pool, queue, now)
    _finish_tick(engines, attempts, limits, pool, queue, now)


def _cancel(live: Any, a: int, now: int) -> int:
    """The client of `a` is gone: its blocks are free at the next schedule."""
    _give_up(live.engines, live.attempts, live.pool, live.queue, live.settings[0], a, now)
    return 0


@lean
def _clear_all(engines: Engines, pool: Any) -> None:
    if pool is not None:
        for r in range(engines.state.size):
            clear(pool, r, engines.state[r].blocks)


def _begin(live: Any) -> int:
    """Every replica's cache is empty."""
    _clear_all(live.engines, live.pool)
    return 0


@cache
def _compiled(form: Form) -> dict[str, Callable[..., int]]:
    """All at once: who compiles one when a client comes or goes stops the others."""
    arguments = {"_advance": 3, "_ahead": 1, "_cancel": 2, "_begin": 0}
    return {
        name: native.load(__name__, name, count, kernel.PARTS, bundles=(form,)) for name, count in arguments.items()
    }


class Load(NamedTuple):
    """What a replica does at this moment."""

    running: int
    waiting: int
    kv_used: float
    preemptions: int
    prefix_asked: int
    """Prompt tokens looked for in the prefix cache so far, in whole blocks."""
    prefix_found: int


class _Hashes:
    """The block hashes of the prompts that are in the cluster, one after another in one array that the kernel reads."""

    def __init__(self, capacity: int) -> None:
        self.ids = np.zeros(1 << 16, np.int64)
        self.start = np.zeros(2 * capacity + 1, np.int64)
        """Of the request with slot s: from start[2 * s] to start[2 * s + 1]."""
        self._sizes: dict[int, int] = {}  # in the order of their places
        self._end = 0

    def put(self, slot: int, ids: Sequence[int]) -> bool:
        """Keep those of a slot; returns whether they lie in a new array."""
        moved = self._end + len(ids) > len(self.ids)
        if moved:
            self._gather(len(ids))
        begin, self._end = self._end, self._end + len(ids)
        self.ids[begin : self._end] = ids
        self.start[2 * slot : 2 * slot + 2] = begin, self._end
        self._sizes[slot] = len(ids)
        return moved

    def drop(self, slot: int) -> None:
        """Forget them."""
        self._sizes.pop(slot, None)
        self.start[2 * slot : 2 * slot + 2] = 0

    def _gather(self, more: int) -> None:
        """Close the gaps, in an array with room for as many again."""
        wider = np.zeros(max(1 << 16, 2 * (sum(self._sizes.values()) + more)), np.int64)
        end = 0
        for slot, size in self._sizes.items():
            begin = self.start[2 * slot]
            wider[end : end + size] = self.ids[begin : begin + size]
            self.start[2 * slot : 2 * slot + 2] = end, end + size
            end += size
        self.ids, self._end = wider, end


class LiveCluster:
    """A cluster that is driven from outside. All times are ticks of its clock, and never go back."""

    def __init__(self, cluster: Cluster, *, seed: int = DEFAULT_SEED, capacity: int = 16_384) -> None:
        """At most `capacity` requests may be in it at once. Raises InputError for what only a simulation can do."""
        check_live(cluster.choices)
        limits = cluster.limits()._replace(windows=0, retries=0, timeout=int(NEVER))
        self.limits, self._settings = limits, records.packed(limits)
        self.now = 0
        state, costs, points = cluster.machines()
        self._engines = records.engines_of(
            state,
            costs,
            points,
            block_size=limits.block_size,
            seeds=kernel_seeds(seed),
            width=records.TICKS,
            heap=3 * capacity + 64,
        )
        self._attempts = np.zeros(capacity, ATTEMPT)
        self._affinity = np.zeros(2 * capacity, np.uint64)
        self._pool = _empty_pool(cluster, state, capacity)
        self._hashes = _Hashes(capacity)
        if self._pool is not None:
            self._pool = self._pool._replace(ids=self._hashes.ids, ids_start=self._hashes.start)
        self._queue = _empty_queue(cluster.choices, len(state), capacity)
        self._at, self._slots = np.empty(capacity, np.int64), np.empty(capacity, np.int64)
        self._said = np.zeros(2, np.int64)
        self._out = np.empty(max(_EVENTS, 4 * self._engines.running.size + 2), TOKEN)
        self._bundle = self._bundled()
        self._functions = _compiled(self._bundle.form)
        self._call("_begin")
        self._own = OwnPolicy(cluster.choices.scheduler) if ":" in cluster.choices.scheduler else None
        self._key = _key_of(cluster.choices, self._own, seed)
        self._free = list(range(capacity - 1, -1, -1))
        self._leaving: list[tuple[int, int]] = []  # slots cancelled while they ran, and the steps of their replica
        self._coming: list[tuple[int, int, int]] = []  # tick, order, slot
        self._gone: set[int] = set()  # slots cancelled before they arrived
        self._order = self._order_of_all = 0
        self._held = np.empty(0, TOKEN)  # whose steps have ended, but which are still to pass the API server

    def _bundled(self) -> Bundle:
        return Bundle(
            _Live(
                self._engines,
                self._attempts,
                self._settings,
                self._pool,
                self._queue,
                self._affinity,
                self._at,
                self._slots,
                self._out,
                self._said,
                np.empty(len(self._engines.state), np.int64),
            )
        )

    def _call(self, name: str, *arguments: int) -> int:
        """Call a compiled function."""
        return self._functions[name](self._bundle.address, *arguments)

    @property
    def order_took(self) -> float:
        """Seconds of CPU for the last key that the user's own order gave."""
        return 0.0 if self._own is None else self._own.took

    @property
    def full(self) -> bool:
        """Whether there is no room for another request."""
        # Whoever gives up leaves an entry in the heap until the API server would have come to it.
        return not self._free or self._engines.shared.counters[records.HEAPED] > 2 * len(self._attempts)

    def submit(
        self,
        at: int,
        prompt: int,
        output: int,
        *,
        hashes: Sequence[int] = (),
        priority: float = 0.0,
        client: int = 0,
        affinity: int | None = None,
    ) -> int:
        """A request of so many tokens (both >= 1), sent at tick `at`; returns its slot. There must be room.

        `hashes` are of the prompt's full blocks, each with all that is before it; `priority` is for the scheduler
        `priority` (the lowest first), `client` (a number from 0) for `vtc`, and requests of one `affinity` go to one
        replica with the router `session-affinity`. Raises InputError if the user's own order of the queue fails, and
        NoReturnError if it fails for good.
        """
        at = max(at, self.now)
        key = None if self._key is None else self._key(at / TICKS, prompt, output, priority)
        slot = self._free.pop()
        if self._pool is not None:
            if self._hashes.put(slot, hashes):
                self._pool = self._pool._replace(ids=self._hashes.ids)
                self._bundle = self._bundled()
            stuck = self._pool.state["stuck"]
            stuck[stuck == slot] = -1  # that was another request
        if self._queue is not None and key is not None:
            self._queue.key[2 * slot] = key
        elif self._queue is not None:
            self._queue.client[2 * slot] = client % MOST_CLIENTS
        self._order_of_all += 1
        self._affinity[2 * slot] = self._order_of_all if affinity is None else affinity % 2**64
        it = self._attempts[slot : slot + 1]
        it[:] = np.zeros(1, ATTEMPT)
        for name, value in (("request", 2 * slot), ("number", 1), ("sent", at), ("prompt", prompt), ("output", output)):
            it[name] = value
        for name in ("first", "last", "ended", "replica", "source", "next", "previous", "child", "held", "node"):
            it[name] = -1
        seen = at + self.limits.ingest + self.limits.ingest_per_token * prompt
        heappush(self._coming, (max(seen, self.now + 1), self._order, slot))
        self._order += 1
        return slot

    def cancel(self, slot: int) -> None:
        """Its client is gone. The slot must not be used any more."""
        it = self._attempts[slot]
        if it["replica"] < 0:
            self._gone.add(slot)
        elif it["state"] in (QUEUED, RUNNING, TRANSFER, FRONT):
            held = it["state"] in (RUNNING, TRANSFER) or it["preemptions"] > 0
            self._call("_cancel", slot, self.now)
            if held:
                self._leaving.append((slot, int(self._engines.state[it["replica"]]["steps"])))
            else:
                self.release(slot)
        if (self._held["slot"] == slot).any():
            self._held = self._held[self._held["slot"] != slot]
            if it["state"] == OK:
                self.release(slot)

    def next(self) -> int:
        """When something happens next, if nobody comes or goes; NEVER: nothing."""
        coming = self._coming[0][0] if self._coming else int(NEVER)
        held = int(self._held["time"][0]) if len(self._held) else int(NEVER)
        return min(coming, held, int(self._engines.shared.ends[1]), int(self._engines.heap[0]["tick"]))

    def advance(self, until: int) -> np.ndarray:
        """Run up to and with tick `until`; returns TOKEN entries in the order of time.

        The slot of a request that was refused, or whose last token is told, is free again: look at `state` first.
        """
        count = 0
        while self._coming and self._coming[0][0] <= until:
            at, _, slot = heappop(self._coming)
            if slot in self._gone:
                self._gone.remove(slot)
                self.release(slot)
            else:
                self._at[count], self._slots[count] = at, slot
                count += 1
        parts, taken, more = [], 0, 1
        while more:
            told = self._call("_advance", taken, count, until)
            parts.append(self._out[:told].copy())
            taken, more = self._said.tolist()
        self.now = max(self.now, until)
        self._retire()
        tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if self.limits.front_out == 0:
            return tokens
        tokens = np.concatenate([self._held, tokens])
        tokens = tokens[np.argsort(tokens["time"], kind="stable")]
        passed = int(np.searchsorted(tokens["time"], until, side="right"))
        self._held = tokens[passed:]
        return tokens[:passed]

    def ahead(self, until: int) -> np.ndarray:
        """The tokens (TOKEN, in the order of time) that the steps under way will bring by tick `until`.

        What a step brings is decided when it begins. Only `cancel` takes a token away again; nothing is changed here.
        Results that pass an API server are known once their step has ended, as requests may come before them till then.
        """
        if self.limits.front_out > 0:
            return self._held[: int(np.searchsorted(self._held["time"], until, side="right"))]
        return self._out[: self._call("_ahead", until)].copy()

    def state(self, slot: int) -> int:
        """The state of a request (records.py)."""
        return int(self._attempts[slot]["state"])

    def output(self, slot: int) -> int:
        """How many tokens a request will have."""
        return int(self._attempts[slot]["output"])

    def cached(self, slot: int) -> int:
        """How many tokens of its prompt were found in the prefix cache when it was first admitted."""
        return int(self._attempts[slot]["cached"])

    def release(self, slot: int) -> None:
        """A request that was refused or has ended leaves its slot."""
        if self._pool is not None:
            self._hashes.drop(slot)
        self._free.append(slot)

    def loads(self) -> list[Load]:
        """What every replica does now."""
        loads = []
        for r, me in enumerate(self._engines.state):
            asked = found = 0
            if self._pool is not None:
                cache = self._pool.state[r]
                asked = int(cache["asked"]) * self.limits.block_size
                found = int(cache["hits"] + cache["host_hits"]) * self.limits.block_size
            used = float((me["blocks"] - me["free"]) / me["blocks"])
            running, waiting = int(me["running"] - me["aborted"]), int(me["waiting"])
            loads.append(Load(running, waiting, used, int(me["preemptions"]), asked, found))
        return loads

    def _retire(self) -> None:
        """Slots of cancelled requests that no step and no list of the engines names any more."""
        if not self._leaving:
            return
        state = self._engines.state
        kept = []
        for slot, steps in self._leaving:
            it = self._attempts[slot]
            me = state[it["replica"]]
            still = it["source"] >= 0  # its blocks are on their way between replicas
            if not still and ((me["aborted"] == 0 and me["orphans"] == 0) or me["steps"] >= steps + 3):
                self.release(slot)
            else:
                kept.append((slot, steps))
        self._leaving = kept


def check_live(choices: Choices) -> None:
    """Raise InputError for what a simulation can choose and a cluster that lives from moment to moment cannot."""
    default = Choices()
    for name in choices.__struct_fields__:
        if name not in _MODELLED and getattr(choices, name) != getattr(default, name):
            why = _INSTEAD.get(name, "only `squall simulate` has it")
            raise InputError(f"--{name.replace('_', '-')} is not for serve: {why}; leave it out.")
    if choices.scheduler == "edf":
        raise InputError(f"--scheduler edf is not for serve: {_INSTEAD['deadlines']}; there is --scheduler priority.")


def _asked(capacity: int, longest: int) -> pl.DataFrame:
    """A frame of `2 * capacity` requests, all of them different, with the columns of a trace."""
    n = 2 * capacity
    rows = {
        "arrival": np.arange(n, dtype=float),
        "request_tokens": np.minimum(np.arange(1, n + 1), longest),
        "response_tokens": np.ones(n, np.int64),
        "session": np.arange(n) % MOST_CLIENTS,
        "prefix": [[1]] + [None] * (n - 1),
    }
    known = pl.DataFrame(rows, schema={name: SCHEMA[name] for name in rows})
    return pl.concat([pl.DataFrame(schema=SCHEMA), known], how="diagonal")


def _empty_pool(cluster: Cluster, state: np.ndarray, capacity: int) -> Pool | None:
    return pool_for(
        cluster.choices,
        _asked(capacity, 1),
        np.full(2 * capacity, cluster.max_model_len),
        cluster.block_size,
        replicas=state,
        block_size=cluster.block_size,
        block_bytes=cluster.block_bytes,
    )


def _empty_queue(choices: Choices, replicas: int, capacity: int) -> Queue | None:
    if choices.scheduler == "fcfs":
        return None
    if choices.scheduler == "vtc":
        return queue_of(VTC, replicas, client=np.arange(max(2 * capacity, MOST_CLIENTS)) % MOST_CLIENTS)
    return queue_of(KEYED, replicas, key=np.zeros(2 * capacity))  # the keys come with the requests


def _key_of(choices: Choices, own: OwnPolicy | None, seed: int) -> Any:
    """The key of a request by (seconds at which it was sent, prompt, output, priority); the lowest goes first."""
    error, draw = choices.prediction_error or 0.0, stream(seed, "length predictions")

    def predicted(output: int) -> float:
        return output * float(np.exp(draw.normal(0.0, error))) if error else float(output)

    if own is not None:
        for size in (-1.0, 0.0, 1.0, 100.0, 10_000.0):
            with suppress(RaisedError):  # it may refuse what is not plausible
                own.keys(np.full((len(own.asks), 1), size), LIVE_LIMIT)

        def key(arrival: float, prompt: int, output: int, priority: float) -> float:
            values = {
                "arrival": arrival,
                "request_tokens": float(prompt),
                "predicted_tokens": predicted(output),
                "session": -1.0,
                "turn": -1.0,
                "priority": priority,
            }
            return float(own.keys([np.array([values[name]]) for name in own.asks], LIVE_LIMIT)[0])

        return key
    return {
        "priority": lambda arrival, prompt, output, priority: priority,
        "sjf": lambda arrival, prompt, output, priority: predicted(output),
        "srf": lambda arrival, prompt, output, priority: float(prompt),
        "lrf": lambda arrival, prompt, output, priority: -float(prompt),
    }.get(choices.scheduler)
