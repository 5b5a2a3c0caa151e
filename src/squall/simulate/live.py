"""The modelled cluster step by step, for whoever lives in real time with it: `serve`.

The scheduler, the blocks and the step times are those of a simulation (kernel.py), function by function; only the loop
around them differs: it stops at a given tick, takes arrivals and cancellations as they come, and tells of every token.
"""

from heapq import heappop, heappush
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from numba import njit

from squall.seeds import DEFAULT_SEED
from squall.simulate import kernel
from squall.simulate.cluster import Cluster
from squall.simulate.engine import _kernel_seeds
from squall.simulate.kernel import (
    ATTEMPT,
    NEVER,
    OK,
    PLAN,
    QUEUED,
    REPLICA,
    RUNNING,
    SAMPLES,
    Limits,
    StepCost,
    _account,
    _enter,
    _give_up,
    _receive_tokens,
    _Replicas,
    _start_steps,
    _widen,
)
from squall.simulate.step_time import step_cost

TOKEN = np.dtype([("time", np.int64), ("slot", np.int32), ("index", np.int32)], align=True)
"""What happened to a request: its token number `index` (from 1) is there; or 0: it was refused on arrival."""
REFUSED = 0


class _World(NamedTuple):
    """What is kept from one call to the next."""

    engines: Any
    attempts: np.ndarray
    ends: np.ndarray  # (replicas,) when the step in flight ends
    turn: np.ndarray
    randoms: np.ndarray
    no_ticks: np.ndarray  # token times are told, not kept
    touched: np.ndarray  # (replicas,) whether an idle replica has to schedule


@njit
def _start_touched(world: _World, limits: Limits, cost: StepCost, now: Any) -> None:
    """Let whatever was touched at this tick schedule."""
    for r in range(world.ends.size):
        if world.touched[r]:
            world.touched[r] = False
            _account(world.engines, r, limits.blocks, now)
            duration = _start_steps(world.engines, r, world.attempts, limits, cost, now)
            if duration > 0:
                world.ends[r] = now + duration


@njit
def _tell_tokens(world: _World, r: int, out: np.ndarray, told: int, now: Any) -> Any:
    """Note the tokens that the end of replica `r`'s step brings; returns how many entries `out` has then."""
    slot = world.engines.state[r].slot
    entries = world.engines.entries[r, slot]
    for k in range(world.engines.plans[r, slot].size):
        a = entries[k] >> 1
        if entries[k] & 1 and world.attempts[a].state < OK:
            out[told].time = now
            out[told].slot = a
            out[told].index = world.attempts[a].generated + 1
            told += 1
    return told


def _entries(sources: int) -> tuple[Any, Any]:
    @njit(cache=True)
    def advance(
        world: _World,
        limits: Limits,
        cost: StepCost,
        at: np.ndarray,
        slots: np.ndarray,
        until: int,
        out: np.ndarray,
    ) -> Any:
        """Run up to and with tick `until`; `slots` reach the cluster at the ticks `at`, ascending.

        Returns (entries of `out`, arrivals taken, whether `out` was too small to come to the end).
        """
        assert sources >= 0  # noqa: S101 - part of the cache's key
        engines, attempts, ends = world.engines, world.attempts, world.ends
        events = [(NEVER, np.int64(0), np.int64(0))]
        told, arrived = 0, 0
        most = engines.running.size + 1
        while True:
            coming = at[arrived] if arrived < at.size else NEVER
            now = min(coming, ends.min())
            if now > until:
                return told, arrived, False
            if told + most > out.size:
                return told, arrived, True
            _widen(engines.samples, engines.width, now)
            for r in range(ends.size):
                if ends[r] == now:
                    ends[r] = NEVER
                    _account(engines, r, limits.blocks, now)
                    told = _tell_tokens(world, r, out, told, now)
                    _receive_tokens(engines, r, attempts, limits, now, world.no_ticks, world.no_ticks)
                    world.touched[r] = True
            while arrived < at.size and at[arrived] == now and told < out.size:
                a = slots[arrived]
                r = _enter(engines, attempts, a, events, limits, world.turn, world.randoms, now)
                if r < 0:
                    out[told].time = now
                    out[told].slot = a
                    out[told].index = REFUSED
                    told += 1
                elif not engines.state[r].busy:
                    world.touched[r] = True
                arrived += 1
            _start_touched(world, limits, cost, now)

    @njit(cache=True)
    def cancel(world: _World, limits: Limits, cost: StepCost, a: int, now: int) -> None:
        """The client of `a` is gone: its blocks are free at the next schedule."""
        assert sources >= 0  # noqa: S101
        events = [(NEVER, np.int64(0), np.int64(0))]
        _widen(world.engines.samples, world.engines.width, now)
        r = world.attempts[a].replica
        _give_up(world.engines, world.attempts, a, events, limits, world.randoms[1], now)
        if not world.engines.state[r].busy:
            world.touched[r] = True
        _start_touched(world, limits, cost, now)

    return advance, cancel


_advance, _cancel = _entries(crc32(Path(kernel.__file__).read_bytes()))
"""numba's cache looks at this file alone; what it compiles is mostly in kernel.py."""


class Load(NamedTuple):
    """What a replica does at this moment."""

    running: int
    waiting: int
    kv_used: float
    preemptions: int


class LiveCluster:
    """A cluster that is driven from outside. All times are ticks of its clock, and never go back."""

    def __init__(self, cluster: Cluster, *, seed: int = DEFAULT_SEED, capacity: int = 16_384) -> None:
        """At most `capacity` requests may be in it at once."""
        self.limits = limits = cluster.limits()._replace(retries=0, timeout=int(NEVER))
        self._cost = step_cost(cluster.step_time, cluster.model, cluster.gpu, cluster.tp)
        self.now = 0
        n = limits.replicas
        engines = _Replicas(
            np.zeros(n, REPLICA),
            np.empty((n, limits.max_seqs), np.int64),
            np.zeros((n, 2), PLAN),
            np.empty((n, 2, limits.max_seqs), np.int64),
            np.zeros((n, SAMPLES, 5)),
            np.array([kernel.TICKS]),
            np.empty(0, kernel.EVENT),
            np.empty(0, kernel.STEP),
            np.zeros(2, np.int64),
        )
        engines.state["free"] = limits.blocks
        engines.state["head"] = engines.state["tail"] = -1
        self._state, self._attempts = engines.state, np.zeros(capacity, ATTEMPT)
        self._world = _World(
            engines,
            self._attempts,
            np.full(n, NEVER),
            np.zeros(1, np.int64),
            _kernel_seeds(seed),
            np.empty(0, np.int64),
            np.zeros(n, np.bool_),
        )
        self._free = list(range(capacity - 1, -1, -1))
        self._leaving: list[tuple[int, int]] = []  # slots cancelled in mid-run, and the steps of their replica
        self._coming: list[tuple[int, int, int]] = []  # tick, order, slot
        self._gone: set[int] = set()  # slots cancelled before they arrived
        self._order = 0
        self._out = np.empty(max(1 << 14, 2 * engines.running.size + 2), TOKEN)

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
        for name in ("first", "last", "ended", "replica", "next", "previous"):
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
        elif it["state"] in (QUEUED, RUNNING):
            _cancel(self._world, self.limits, self._cost, slot, self.now)
            self._leaving.append((slot, int(self._state[it["replica"]]["steps"])))

    def next(self) -> int:
        """When something happens next, if nobody comes or goes; NEVER: nothing."""
        coming = self._coming[0][0] if self._coming else int(NEVER)
        return min(coming, int(self._world.ends.min()))

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
            told, arrived, more = _advance(self._world, self.limits, self._cost, ticks, slots, until, self._out)
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
                float(1 - me["free"] / self.limits.blocks),
                int(me["preemptions"]),
            )
            for me in self._state
        ]

    def _retire(self) -> None:
        """Slots of cancelled requests that no step of the engines names any more."""
        kept = []
        for slot, steps in self._leaving:
            me = self._state[self._attempts[slot]["replica"]]
            if me["steps"] >= steps + 3 or not (me["busy"] or me["aborted"]):
                self._free.append(slot)
            else:
                kept.append((slot, steps))
        self._leaving = kept
