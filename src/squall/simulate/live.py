"""The modelled cluster step by step, for whoever lives in real time with it: `serve`.

The scheduler, the blocks and the step times are those of a simulation (kernel.py), function by function; only the loop
around them differs: it stops at a given tick, takes arrivals and cancellations as they come, and tells of every token.
Windows are off, since nobody knows what will happen within them.
"""

from heapq import heappop, heappush
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from squall.errors import InputError
from squall.seeds import DEFAULT_SEED
from squall.simulate import kernel
from squall.simulate.bundle import bundled
from squall.simulate.cluster import Cluster
from squall.simulate.engine import _kernel_seeds
from squall.simulate.kernel import (
    ATTEMPT,
    NEVER,
    OK,
    QUEUED,
    RUNNING,
    TRANSFER,
    Engines,
    Limits,
    _account,
    _enter,
    _give_up,
    _look,
    _receive,
    _set_end,
    _start,
    _wake,
    _widen,
)

TOKEN = np.dtype([("time", np.int64), ("slot", np.int32), ("index", np.int32)], align=True)
"""What happened to a request: its token number `index` (from 1) is there; or 0: it was refused on arrival."""
REFUSED = 0
_EVENTS = 1 << 14
_MODELLED = {
    "scheduler": "fcfs",
    "preemption": "recompute",
    "prefix_caching": False,
    "fail": None,
    "mtbf": None,
    "autoscale": None,
    "prefill_replicas": None,
    "decode_replicas": None,
}
"""What must be as it is: other values need the whole list of requests in advance, or events of their own."""


@njit
def _finish_tick(engines: Engines, attempts: np.ndarray, limits: Limits, now: Any) -> None:
    """Let whatever was touched at this tick schedule."""
    shared = engines.shared
    for t in range(1, shared.touched[0] + 1):
        r = shared.touched[t]
        _account(engines, r, now)
        _start(engines, r, attempts, None, None, limits, now)
    shared.touched[0] = 0


@njit
def _tell_tokens(
    engines: Engines, r: int, attempts: np.ndarray, limits: Limits, out: np.ndarray, told: int, now: Any
) -> Any:
    """Note the tokens that the end of replica `r`'s step will bring; returns how many entries `out` has then."""
    me = engines.state[r]
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


def _entries(sources: int) -> tuple[Any, Any]:
    @njit(cache=True)
    def advance(
        engines: Engines,
        attempts: np.ndarray,
        settings: np.ndarray,
        affinity: np.ndarray,
        at: np.ndarray,
        slots: np.ndarray,
        until: int,
        out: np.ndarray,
    ) -> Any:
        """Run up to and with tick `until`; `slots` reach the cluster at the ticks `at`, ascending.

        Returns (entries of `out`, arrivals taken, whether `out` was too small to come to the end).
        """
        assert sources >= 0  # noqa: S101 - part of the cache's key
        limits = settings[0]
        shared = engines.shared
        leaves = shared.ends.size // 2
        told, arrived = 0, 0
        most = 2 * engines.running.size + 1
        while True:
            coming = at[arrived] if arrived < at.size else NEVER
            now = min(coming, shared.ends[1])
            if now > until:
                return told, arrived, False
            if told + most > out.size:
                return told, arrived, True
            _widen(engines.samples, shared.width, now)
            if limits.scrape > 0:
                _look(engines, limits, now)
            while True:
                if shared.ends[1] == now:
                    i = 1
                    while i < leaves:
                        i = 2 * i if shared.ends[2 * i] == now else 2 * i + 1
                    r = i - leaves
                    _account(engines, r, now)
                    _set_end(engines, r, NEVER)
                    told = _tell_tokens(engines, r, attempts, limits, out, told, now)
                    _receive(engines, r, attempts, None, None, limits, now)
                    _wake(engines, r, attempts, None, None, limits, now)
                elif arrived < at.size and at[arrived] == now and told + most <= out.size:
                    a = slots[arrived]
                    _enter(engines, attempts, a, None, None, limits, affinity, now)
                    if attempts[a].state >= OK:
                        out[told].time = now
                        out[told].slot = a
                        out[told].index = REFUSED
                        told += 1
                    arrived += 1
                else:
                    break
                while shared.woken[0] > 0:
                    shared.woken[0] -= 1
                    _wake(engines, shared.woken[shared.woken[0] + 1], attempts, None, None, limits, now)
            _finish_tick(engines, attempts, limits, now)

    @njit(cache=True)
    def cancel(engines: Engines, attempts: np.ndarray, settings: np.ndarray, a: int, now: int) -> None:
        """The client of `a` is gone: its blocks are free at the next schedule."""
        assert sources >= 0  # noqa: S101
        limits = settings[0]
        shared = engines.shared
        _widen(engines.samples, shared.width, now)
        _give_up(engines, attempts, a, None, None, limits, now)
        while shared.woken[0] > 0:
            shared.woken[0] -= 1
            _wake(engines, shared.woken[shared.woken[0] + 1], attempts, None, None, limits, now)
        _finish_tick(engines, attempts, limits, now)

    return advance, cancel


_advance, _cancel = _entries(kernel._fingerprint())


class Load(NamedTuple):
    """What a replica does at this moment."""

    running: int
    waiting: int
    kv_used: float
    preemptions: int


class LiveCluster:
    """A cluster that is driven from outside. All times are ticks of its clock, and never go back."""

    def __init__(self, cluster: Cluster, *, seed: int = DEFAULT_SEED, capacity: int = 16_384) -> None:
        """At most `capacity` requests may be in it at once. Raises InputError for what only a simulation can do."""
        limits = cluster.limits()._replace(windows=0, retries=0, timeout=int(NEVER))
        if any(getattr(cluster.choices, name) != default for name, default in _MODELLED.items()):
            raise InputError(
                f"serve: of the cluster's policies these exist only in `squall simulate`: {', '.join(_MODELLED)}."
            )
        self.limits = limits
        self.now = 0
        state, costs, points = cluster.machines()
        # Its heap stays empty: nothing is to come but what clients do.
        self._engines = kernel.engines_of(
            state, costs, points, block_size=limits.block_size, seeds=_kernel_seeds(seed), width=kernel.TICKS
        )
        self._bundle = bundled(self._engines)
        self._settings = kernel.packed(limits)
        self._attempts = np.zeros(capacity, ATTEMPT)
        self._affinity = np.zeros(capacity, np.uint64)
        self._free = list(range(capacity - 1, -1, -1))
        self._leaving: list[tuple[int, int]] = []  # slots cancelled while they ran, and the steps of their replica
        self._coming: list[tuple[int, int, int]] = []  # tick, order, slot
        self._gone: set[int] = set()  # slots cancelled before they arrived
        self._order = 0
        self._out = np.empty(max(_EVENTS, 4 * self._engines.running.size + 2), TOKEN)

    @property
    def full(self) -> bool:
        """Whether there is no room for another request."""
        return not self._free

    def submit(self, at: int, prompt: int, output: int) -> int:
        """A request of so many tokens (both >= 1), sent at tick `at`; returns its slot. There must be room."""
        slot = self._free.pop()
        at = max(at, self.now)
        it = self._attempts[slot : slot + 1]
        it[:] = np.zeros(1, ATTEMPT)
        for name, value in (("request", slot), ("number", 1), ("sent", at), ("prompt", prompt), ("output", output)):
            it[name] = value
        for name in ("first", "last", "ended", "replica", "source", "next", "previous", "child"):
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
        elif it["state"] in (QUEUED, RUNNING, TRANSFER):
            running = it["state"] == RUNNING
            _cancel(self._bundle, self._attempts, self._settings, slot, self.now)
            if running or it["preemptions"] > 0:
                self._leaving.append((slot, int(self._engines.state[it["replica"]]["steps"])))
            else:
                self._free.append(slot)

    def next(self) -> int:
        """When something happens next, if nobody comes or goes; NEVER: nothing."""
        coming = self._coming[0][0] if self._coming else int(NEVER)
        return min(coming, int(self._engines.shared.ends[1]))

    def advance(self, until: int) -> np.ndarray:
        """Run up to and with tick `until`; returns TOKEN entries in the order of time.

        The slot of a request that was refused, or whose last token is told, is free again: look at `state` first.
        """
        due: list[tuple[int, int]] = []
        while self._coming and self._coming[0][0] <= until:
            at, _, slot = heappop(self._coming)
            if slot in self._gone:
                self._gone.remove(slot)
                self._free.append(slot)
            else:
                due.append((at, slot))
        ticks, slots = np.array(due, np.int64).reshape(-1, 2).T.copy()
        parts, more = [], True
        while more:
            told, arrived, more = _advance(
                self._bundle, self._attempts, self._settings, self._affinity, ticks, slots, until, self._out
            )
            parts.append(self._out[:told].copy())
            ticks, slots = ticks[arrived:], slots[arrived:]
        self.now = max(self.now, until)
        self._retire()
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def state(self, slot: int) -> int:
        """The state of a request (kernel.py)."""
        return int(self._attempts[slot]["state"])

    def output(self, slot: int) -> int:
        """How many tokens a request will have."""
        return int(self._attempts[slot]["output"])

    def release(self, slot: int) -> None:
        """A request that was refused or has ended leaves its slot."""
        self._free.append(slot)

    def loads(self) -> list[Load]:
        """What every replica does now."""
        return [
            Load(
                int(me["running"] - me["aborted"]),
                int(me["waiting"]),
                float((me["blocks"] - me["free"]) / me["blocks"]),
                int(me["preemptions"]),
            )
            for me in self._engines.state
        ]

    def _retire(self) -> None:
        """Slots of cancelled requests that no step and no list of the engines names any more."""
        if not self._leaving:
            return
        state = self._engines.state
        kept = []
        for slot, steps in self._leaving:
            me = state[self._attempts[slot]["replica"]]
            if (me["aborted"] == 0 and me["orphans"] == 0) or me["steps"] >= steps + 3:
                self._free.append(slot)
            else:
                kept.append((slot, steps))
        self._leaving = kept
