"""The loop of the simulated cluster, compiled: requests come, are routed, retried, given up; replicas go up and down.

What one replica does in a step is in replica.py. The clock counts ticks of 10 ps in int64 (2.9 years), so sums of step
times are exact and independent of their order. At one tick the order is: step ends, ends of KV transfers, deadlines,
what API servers hand on, arrivals, retries, the autoscaler, replicas up and down; then every idle replica that was
touched schedules, in their order.

Options that are not used are types (None for the pool of blocks or the queue), so that they cost nothing.
"""

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from squall import native
from squall.native import Bundle, Form, inlined, lean
from squall.progress import note
from squall.simulate.blocks import clear, find_hits, register_prompt
from squall.simulate.records import (
    ARRIVE,
    ARRIVED,
    ASKED,
    ATTEMPT,
    BOTH,
    BREAK,
    BY_BACKLOG,
    BY_FORECAST,
    BY_KV,
    BY_QUEUE,
    BY_RATE,
    CHANGING,
    DEADLINE,
    DECODE,
    DOWN,
    DRAINING,
    ENTERED,
    FRONT,
    GIVE_UP,
    HEAPED,
    INTERRUPTED,
    KV_END,
    LEAST_KV,
    LEAST_LOAD,
    LOGGED,
    LOOKED,
    NEVER,
    NOW,
    OFF,
    OK,
    OPEN,
    PASS,
    PENDING,
    POWER_OF_TWO,
    PREFILL,
    PREFIX_AFFINITY,
    QUEUE_FULL,
    QUEUED,
    RANDOM,
    READY,
    REFUSED,
    REJECT,
    REPLICA_UP,
    RESET,
    RETRY,
    ROLE_SMOOTHING,
    ROLE_TREND,
    ROUND_ROBIN,
    RUNNING,
    SCALE,
    SENDING,
    SESSION_AFFINITY,
    STARTING,
    STEPPED,
    STUCK,
    TICKS,
    TIMEOUT,
    TRANSFER,
    TURN,
    UNFIT,
    UNSERVABLE,
    UNSETTLED,
    UP,
    USED,
    Engines,
    Limits,
    Work,
    engines_of,
    with_room,
)
from squall.simulate.replica import (
    account,
    blocks_for,
    blocks_taken,
    fail,
    free_reserved,
    hand_something_to,
    leave_source,
    let_go,
    log_event,
    new_attempt,
    next_random,
    pop_event,
    push_event,
    receive,
    seen_at,
    set_end,
    settle,
    start_step,
    steps_before,
    switch_off,
    wake,
    widen,
    write_back,
    write_out,
)
from squall.simulate.waiting import (
    always_asks,
    becomes_active,
    dequeue,
    enqueue,
    first_waiting,
    leaves,
)


@inlined
def _load(engines: Engines, r: int, limits: Limits, by_blocks: bool) -> Any:
    """What the router knows of replica `r`: its requests, or its used blocks."""
    if limits.scrape > 0:
        return engines.shared.used[r] if by_blocks else engines.shared.outstanding[r]
    me = engines.state[r]
    return me.blocks - me.free if by_blocks else _requests(me)


@inlined
def _requests(me: Any) -> Any:
    return me.fronted + me.waiting + me.running - me.aborted


@lean
def look(engines: Engines, limits: Limits, now: Any) -> None:
    """The router's picture is of the last multiple of its scrape interval, before what happens at that tick."""
    if now // limits.scrape > engines.shared.counters[LOOKED]:
        engines.shared.counters[LOOKED] = now // limits.scrape
        at = now // limits.scrape * limits.scrape
        for r in range(engines.state.size):
            me = engines.state[r]
            engines.shared.outstanding[r] = _requests(me)
            engines.shared.used[r] = me.blocks - me.free
            j = steps_before(me, at)
            if j > 0:
                if me.steady > 0:
                    engines.shared.used[r] += blocks_taken(engines, r, limits, j)
                for i in range(me.young, me.running):
                    if engines.finals[r, i] == UNSETTLED:
                        s = engines.running[r, i]
                        engines.shared.used[r] += blocks_for(s.computed + j, limits.block_size) - s.blocks


@inlined
def _can_take(engines: Engines, r: int, limits: Limits, prompt: int, output: int) -> bool:
    """Whether a request could ever run on replica `r`."""
    me = engines.state[r]
    tokens = prompt if me.role == PREFILL else prompt + output
    return tokens <= me.blocks * limits.block_size


@inlined
def _fits(engines: Engines, limits: Limits, prompt: int, output: int) -> bool:
    """Whether any replica, or two of them, could ever hold a request."""
    enters, runs = False, False
    for r in range(engines.state.size):
        fits = _can_take(engines, r, limits, prompt, output)
        enters |= fits and engines.state[r].role != DECODE
        runs |= fits and engines.state[r].role != PREFILL
    return enters and runs


@inlined
def _route(engines: Engines, limits: Limits, it: Any, pool: Any, affinity: np.ndarray) -> Any:
    """The replica for attempt `it`, among those that are ready and large enough; -1 if there is none."""
    state, shared = engines.state, engines.shared
    n = state.size
    if limits.router == ROUND_ROBIN:
        turn = shared.counters[TURN]
        for _ in range(n):
            r = turn if turn < n else np.int64(0)
            turn = r + 1
            if state[r].up == READY and state[r].role != DECODE and _can_take(engines, r, limits, it.prompt, it.output):
                shared.counters[TURN] = turn
                return np.int64(r)
        return np.int64(-1)
    eligible = 0
    for r in range(n):
        if state[r].up == READY and state[r].role != DECODE and _can_take(engines, r, limits, it.prompt, it.output):
            eligible += 1
    if eligible == 0:
        return np.int64(-1)
    pick = np.int64(-1)
    other = np.int64(-1)
    if limits.router == RANDOM:
        pick = np.int64(next_random(shared.random[0]) * eligible)
    elif limits.router == SESSION_AFFINITY:
        pick = np.int64(affinity[it.request] % np.uint64(eligible))
    elif limits.router == POWER_OF_TWO:
        pick = np.int64(next_random(shared.random[0]) * eligible)
        if eligible > 1:
            other = np.int64(next_random(shared.random[0]) * (eligible - 1))
            other += other >= pick
    best, least, ties, place = np.int64(-1), np.float64(np.inf), 0, np.int64(0)
    for r in range(n):
        if not (
            state[r].up == READY and state[r].role != DECODE and _can_take(engines, r, limits, it.prompt, it.output)
        ):
            continue
        if limits.router == RANDOM or limits.router == SESSION_AFFINITY:
            if place == pick:
                return np.int64(r)
        elif limits.router != POWER_OF_TWO or place == pick or place == other:  # noqa: SIM109 (a tuple might raise)
            if limits.router == LEAST_KV:
                load = _load(engines, r, limits, True) / state[r].blocks
            elif limits.router == PREFIX_AFFINITY:
                load = float(_load(engines, r, limits, True))
                if pool is not None:
                    load -= find_hits(pool, r, it.request, it.prompt)
            else:
                load = float(_load(engines, r, limits, False))
            if load < least:
                best, least, ties = np.int64(r), load, 1
            elif load == least:
                ties += 1
                if next_random(shared.random[0]) * ties < 1.0:
                    best = np.int64(r)
        place += 1
    return best


@lean
def _reject(engines: Engines, attempts: np.ndarray, a: int, limits: Limits, now: Any) -> None:
    """Attempt `a` could never run here."""
    engines.shared.counters[UNFIT] += 1
    log_event(engines, now, REJECT, a, -1)
    fail(engines, attempts, a, UNSERVABLE, now, limits)


@lean
def enter(
    engines: Engines,
    attempts: np.ndarray,
    a: int,
    pool: Any,
    queue: Any,
    limits: Limits,
    affinity: np.ndarray,
    now: Any,
) -> None:
    """Attempt `a` reaches the cluster: refused, or taken by the API server of a replica, if that needs time for it."""
    it = attempts[a]
    engines.shared.counters[OPEN] += 1
    engines.shared.counters[ARRIVED] += 1
    engines.shared.counters[ASKED] += it.prompt
    fits = np.int64(it.prompt) + it.output <= limits.max_model_len
    if fits and engines.state[0].role != BOTH:  # else it fits where it is sent to
        fits = _fits(engines, limits, it.prompt, it.output)
    if not fits:
        _reject(engines, attempts, a, limits, now)
        return
    if limits.scrape == 0 and (limits.router == LEAST_KV or limits.router == PREFIX_AFFINITY):
        for other in range(engines.state.size):
            if engines.state[other].window > 0:
                wake(engines, other, attempts, pool, queue, limits, now)
    r = _route(engines, limits, it, pool, affinity)
    if r < 0:
        if _fits(engines, limits, it.prompt, it.output):
            log_event(engines, now, REJECT, a, -1)
            fail(engines, attempts, a, REFUSED, now, limits)
        else:
            _reject(engines, attempts, a, limits, now)
        return
    it.replica = r
    me = engines.state[r]
    if me.waiting + me.fronted >= limits.queue_limit:
        log_event(engines, now, REJECT, a, r)
        fail(engines, attempts, a, QUEUE_FULL, now, limits)
        return
    if limits.timeout < NEVER:
        deadline = it.sent + limits.timeout - limits.delivery
        push_event(engines, max(now + 1, deadline), DEADLINE, a)
    if limits.front_in + limits.front_out == 0:
        _join(engines, attempts, a, pool, queue, limits, now)
        return
    if me.window > 0:  # its results pass the API server too
        wake(engines, r, attempts, pool, queue, limits, now)
    me.front_free = max(me.front_free, now) + limits.front_in
    me.fronted += 1
    it.state = FRONT
    it.epoch = me.epoch
    it.ended = me.front_free
    push_event(engines, me.front_free, PASS, a)


@lean
def _join(engines: Engines, attempts: np.ndarray, a: int, pool: Any, queue: Any, limits: Limits, now: Any) -> None:
    """Attempt `a` queues at its replica's engine."""
    it = attempts[a]
    r = np.int64(it.replica)
    me = engines.state[r]
    if me.window > 0 and always_asks(queue):  # what was served within it says where a new client begins
        wake(engines, r, attempts, pool, queue, limits, now)
    account(engines, r, now)
    becomes_active(queue, r, it.request)
    enqueue(queue, me, r, attempts, a, False)
    log_event(engines, now, ARRIVE, a, r)
    if me.window == 0 or me.closed < 2:
        wake(engines, r, attempts, pool, queue, limits, now)


@lean
def pass_front(engines: Engines, attempts: np.ndarray, a: int, pool: Any, queue: Any, limits: Limits, now: Any) -> None:
    """The API server hands attempt `a` to its engine, unless it has been given up, or the replica failed meanwhile."""
    it = attempts[a]
    if it.state != FRONT or it.ended != now:
        return
    it.ended = -1
    if it.epoch != engines.state[it.replica].epoch:
        log_event(engines, now, BREAK, a, it.replica)
        fail(engines, attempts, a, RESET, now, limits)
        return
    engines.state[it.replica].fronted -= 1
    it.state = QUEUED
    _join(engines, attempts, a, pool, queue, limits, now)


@lean
def give_up(engines: Engines, attempts: np.ndarray, a: int, pool: Any, queue: Any, limits: Limits, now: Any) -> None:
    """The client of attempt `a` has waited long enough: what waits leaves at once, what runs at the next schedule."""
    it = attempts[a]
    if it.state >= OK:
        return
    r = np.int64(it.replica)
    me = engines.state[r]
    if me.window > 0:
        wake(engines, r, attempts, pool, queue, limits, now)
    account(engines, r, now)
    if it.state == FRONT:
        me.fronted -= it.epoch == me.epoch
    elif it.state == QUEUED:
        dequeue(queue, me, r, attempts, a)
        let_go(engines, attempts, a, pool, limits)
    elif it.state == RUNNING:
        if me.steady > 0:
            write_out(engines, r, limits, False)
        me.aborted += 1
        for i in range(me.running):
            if engines.running[r, i].attempt == a:
                write_back(attempts, engines.running[r, i])
    if it.state != FRONT:
        leaves(queue, r, it.request)
    log_event(engines, now, GIVE_UP, a, r)
    fail(engines, attempts, a, TIMEOUT, max(now, it.sent + limits.timeout), limits)
    if not me.busy:  # who waits behind it may fit
        hand_something_to(engines, r)


@lean
def end_transfer(
    engines: Engines, attempts: np.ndarray, a: int, pool: Any, queue: Any, limits: Limits, now: Any
) -> None:
    """The KV cache of attempt `a` has reached its decode replica, if both still live and the client still waits."""
    it = attempts[a]
    source, r = np.int64(it.source), np.int64(it.replica)
    engines.shared.counters[SENDING] -= 1
    account(engines, source, now)
    account(engines, r, now)
    intact = leave_source(engines, attempts, a, pool, limits) and it.blocks > 0
    if it.state == TRANSFER and intact:
        it.state = QUEUED
        if pool is not None:
            register_prompt(pool, r, it.request, it.prompt, np.int64(it.node))
        enqueue(queue, engines.state[r], r, attempts, a, True)
    else:
        free_reserved(engines, attempts, a, pool)
        it.computed = 0
        if it.state == TRANSFER:
            log_event(engines, now, BREAK, a, r)
            leaves(queue, r, it.request)
            fail(engines, attempts, a, RESET, now, limits)
    wake(engines, source, attempts, pool, queue, limits, now)
    wake(engines, r, attempts, pool, queue, limits, now)


@lean
def _crash(engines: Engines, r: int, attempts: np.ndarray, pool: Any, queue: Any, limits: Limits, now: Any) -> None:
    """Replica `r` fails: all its connections break, its cache is lost."""
    me = engines.state[r]
    if me.window > 0:
        wake(engines, r, attempts, pool, queue, limits, now)
    account(engines, r, now)
    if me.steady > 0:
        write_out(engines, r, limits, False)
    for i in range(me.running):
        s = engines.running[r, i]
        if attempts[s.attempt].state == RUNNING:
            write_back(attempts, s)
            leaves(queue, r, s.request)
            log_event(engines, now, BREAK, s.attempt, r)
            fail(engines, attempts, s.attempt, RESET, now, limits)
    me.running = me.aborted = me.orphans = me.busy = me.queued = me.window = me.next_size = 0
    me.token_rate = 0.0
    a = first_waiting(queue, me, r, attempts)
    while a >= 0:
        it = attempts[a]
        dequeue(queue, me, r, attempts, a)
        if it.blocks > 0:
            it.blocks = it.computed = 0
        let_go(engines, attempts, a, pool, limits)
        leaves(queue, r, it.request)
        log_event(engines, now, BREAK, a, r)
        fail(engines, attempts, a, RESET, now, limits)
        a = first_waiting(queue, me, r, attempts)
    for i in range(engines.shared.counters[HEAPED]):
        if engines.heap[i].kind == KV_END and attempts[engines.heap[i].who].replica == r:
            attempts[engines.heap[i].who].blocks = 0  # what is on its way here is lost
    me.free = me.blocks
    me.link_free = me.front_free = me.fronted = 0
    switch_off(engines, r, pool, now)
    set_end(engines, r, NEVER)


@lean
def _scale(engines: Engines, attempts: np.ndarray, pool: Any, limits: Limits, wanted: np.ndarray, now: Any) -> None:
    """Target tracking: as many replicas as bring the metric to its target; fewer only if that held for a while."""
    state = engines.state
    ready, paid = 0, 0
    total = 0.0
    for r in range(state.size):
        me = state[r]
        paid += me.up == READY or me.up == STARTING
        if me.up == READY:
            ready += 1
            if limits.scale_by == BY_QUEUE:
                total += me.waiting
            elif limits.scale_by == BY_KV:
                total += (me.blocks - me.free) / me.blocks
    if limits.scale_by == BY_RATE:
        total = engines.shared.counters[ARRIVED] / (limits.scale_every / TICKS)
    engines.shared.counters[ARRIVED] = 0
    ratio = total / max(ready, 1) / limits.scale_target
    desired = paid if abs(ratio - 1.0) <= 0.1 else np.int64(np.ceil(max(ready, 1) * ratio - 1e-9))
    desired = min(max(desired, limits.least_replicas), state.size)
    most = desired
    for k in range(wanted.size - 1, 0, -1):
        wanted[k] = wanted[k - 1]
        most = max(most, np.int64(wanted[k]))
    wanted[0] = desired
    desired = max(desired, min(paid, most))
    for r in range(state.size):
        me = state[r]
        if paid < desired and me.up == DRAINING:
            me.up = READY
            paid += 1
    for r in range(state.size):
        me = state[r]
        if paid < desired and me.up == OFF:
            me.up = STARTING
            me.since_on = now
            push_event(engines, now + limits.provisioning, UP, r)
            paid += 1
    for r in range(state.size - 1, -1, -1):
        me = state[r]
        if paid > desired and me.up == READY:
            me.up = DRAINING
            paid -= 1
            if me.fronted + me.running + me.waiting == 0 and not me.busy:
                switch_off(engines, r, pool, now)


@lean
def _demands(engines: Engines, pool: Any, limits: Limits, memory: np.ndarray) -> Any:
    """How many replicas the prompts and the responses would fill: what comes, smoothed, and what waits.

    Prompts: the time that those which wait, and as many as come between two looks, take to compute, per time between
    two looks; what the prefix caches have found until now is left out. Responses: the places in the batch or the blocks
    that they have, and that those which wait will take, whichever is the larger share.
    """
    counters = engines.shared.counters
    if counters[ARRIVED] > 0:
        memory[0] = counters[ASKED] / counters[ARRIVED]
    mean = memory[0]  # tokens of a prompt
    tokens, responses = 0.0, 0.0
    held = 0.0
    asked, hits = 0, 0
    for r in range(engines.state.size):
        me = engines.state[r]
        if me.role == PREFILL:
            tokens += me.waiting * mean
        else:
            held += max(me.running / me.max_seqs, (me.blocks - me.free) / me.blocks)
            responses += max(me.waiting / me.max_seqs, me.waiting * mean / limits.block_size / me.blocks)
        if pool is not None:
            asked += pool.state[r].asked
            hits += pool.state[r].hits + pool.state[r].host_hits
    trend = ROLE_TREND if limits.scale_by == BY_FORECAST else 0.0
    tokens += _extrapolated(memory[2:4], float(counters[ASKED]), memory[1], trend)
    responses += _extrapolated(memory[4:6], held, memory[1], trend)
    memory[1] += 1.0
    if asked > 0:
        tokens *= 1.0 - hits / asked
    counters[ARRIVED] = counters[ASKED] = 0
    return tokens * limits.per_prompt_token / limits.scale_every, responses


@lean
def _extrapolated(memory: np.ndarray, value: float, looks: Any, trend: float) -> Any:
    """Holt's linear trend (a level and a slope, both smoothed), one look ahead; `memory` holds the two. Without a
    `trend`, simple exponential smoothing."""
    if looks == 0:
        memory[0], memory[1] = value, 0.0
    else:
        level = ROLE_SMOOTHING * value + (1.0 - ROLE_SMOOTHING) * (memory[0] + memory[1])
        memory[1] = trend * (level - memory[0]) + (1.0 - trend) * memory[1]
        memory[0] = level
    return max(0.0, memory[0] + memory[1])


@lean
def _change_role(
    engines: Engines, attempts: np.ndarray, pool: Any, queue: Any, limits: Limits, memory: np.ndarray, now: Any
) -> None:
    """Prefill and decode share the replicas as their demands are: one changes its role, when it is drained, if that
    lowers the load of the fuller side by a factor, and that load is not small."""
    state = engines.state
    prompts, responses = _demands(engines, pool, limits, memory)
    prefills = 0
    for r in range(state.size):
        prefills += (state[r].role == PREFILL) != (state[r].up == CHANGING)
    best, least = prefills, np.inf
    for n in range(1, state.size):
        load = max(prompts / n, responses / (state.size - n))
        if load < least:
            best, least = n, load
    load = max(prompts / prefills, responses / (state.size - prefills))
    if best == prefills or load < LEAST_LOAD or load < limits.scale_target * least:
        return
    giver = DECODE if best > prefills else PREFILL
    chosen, fewest, others = -1, NEVER, 0
    for r in range(state.size):
        me = state[r]
        if me.role != giver and me.up == CHANGING:  # the change that is under way is no longer wanted
            me.up = READY
            return
        if me.role == giver and me.up == READY:
            others += 1
            requests = me.fronted + me.running + me.waiting
            if requests < fewest:
                chosen, fewest = r, requests
    if others > 1:
        state[chosen].up = CHANGING
        wake(engines, chosen, attempts, pool, queue, limits, now)


@inlined
def _needs_room(engines: Engines) -> bool:
    """Whether one more event could overrun the heap or a log."""
    counters = engines.shared.counters
    room = 6 * engines.running.size + 2 * counters[OPEN] + 16
    return (
        counters[HEAPED] + 2 * counters[OPEN] + 16 > engines.heap.size
        or (engines.events.size > 0 and counters[LOGGED] + room > engines.events.size)
        or (engines.steps.size > 0 and counters[STEPPED] + 2 * engines.state.size > engines.steps.size)
    )


@lean
def _advance(
    engines: Engines,
    attempts: np.ndarray,
    arrival: np.ndarray,
    prompt: np.ndarray,
    output: np.ndarray,
    pool: Any,
    queue: Any,
    limits: Limits,
    affinity: np.ndarray,
    outages: np.ndarray,
    memory: np.ndarray,
) -> bool:
    """Run until all is done (or stuck), or until something has to be made larger first; returns whether it is done."""
    shared, heap, state = engines.shared, engines.heap, engines.state
    counters = shared.counters
    n = arrival.size
    leaves_of_tree = shared.ends.size // 2
    arrived = counters[ENTERED]
    coming: Any = seen_at(limits, arrival[arrived], prompt[arrived]) if arrived < n else NEVER
    while arrived < n or counters[OPEN] + counters[PENDING] + counters[SENDING] > 0 or shared.ends[1] < NEVER:
        now = np.int64(min(coming, heap[0].tick, shared.ends[1]))
        if shared.touched[0] > 0:  # interrupted within a tick
            now = counters[NOW]
        if now == NEVER or counters[STUCK] != 0:
            break
        counters[NOW] = now
        widen(engines.samples, shared.width, now)
        if limits.scrape > 0:
            look(engines, limits, now)
        while True:
            if _needs_room(engines) or (counters[USED] == attempts.size and counters[PENDING] > 0):
                return False
            if shared.ends[1] == now:
                i = 1
                while i < leaves_of_tree:
                    i = 2 * i if shared.ends[2 * i] == now else 2 * i + 1
                r = i - leaves_of_tree
                account(engines, r, now)
                if state[r].window > 0:
                    settle(engines, r, attempts, pool, queue, limits, state[r].window)
                set_end(engines, r, NEVER)
                receive(engines, r, attempts, pool, queue, limits, now)
                wake(engines, r, attempts, pool, queue, limits, now)
            elif coming == now and not (heap[0].tick == now and heap[0].kind < RETRY):
                a = arrived
                arrived += 1
                counters[ENTERED] = arrived
                new_attempt(attempts[a], a, 1, arrival[a], prompt[a], output[a])
                coming = seen_at(limits, arrival[arrived], prompt[arrived]) if arrived < n else NEVER
                enter(engines, attempts, a, pool, queue, limits, affinity, now)
            elif heap[0].tick == now:
                kind, who = heap[0].kind, heap[0].who
                pop_event(engines)
                if kind == DEADLINE:
                    give_up(engines, attempts, who, pool, queue, limits, now)
                elif kind == KV_END:
                    end_transfer(engines, attempts, who, pool, queue, limits, now)
                elif kind == PASS:
                    pass_front(engines, attempts, who, pool, queue, limits, now)
                elif kind == RETRY:
                    old, used = attempts[who], counters[USED]
                    sent = now - seen_at(limits, 0, old.prompt)
                    new_attempt(attempts[used], old.request, old.number + 1, sent, old.prompt, old.output)
                    counters[PENDING] -= 1
                    counters[USED] += 1
                    enter(engines, attempts, used, pool, queue, limits, affinity, now)
                elif kind == SCALE:
                    if limits.scale_by == BY_KV or limits.scale_by >= BY_BACKLOG:
                        for r in range(state.size):
                            if state[r].window > 0:
                                wake(engines, r, attempts, pool, queue, limits, now)
                    if limits.scale_by >= BY_BACKLOG:
                        _change_role(engines, attempts, pool, queue, limits, memory, now)
                    else:
                        _scale(engines, attempts, pool, limits, memory, now)
                    push_event(engines, now + limits.scale_every, SCALE, 0)
                elif kind == UP:
                    if state[who].up == STARTING:
                        state[who].up = READY
                        state[who].since = now
                        log_event(engines, now, REPLICA_UP, -1, who)
                else:
                    r = outages[who, 1]
                    if state[r].up >= READY:
                        _crash(engines, r, attempts, pool, queue, limits, now)
                        state[r].up = STARTING
                        state[r].since_on = now
                        push_event(engines, now + outages[who, 2], UP, r)
            else:
                break
            while shared.woken[0] > 0:
                shared.woken[0] -= 1
                wake(engines, shared.woken[shared.woken[0] + 1], attempts, pool, queue, limits, now)
        for t in range(1, shared.touched[0] + 1):
            r = shared.touched[t]
            account(engines, r, now)
            start_step(engines, r, attempts, pool, queue, limits, now)
        shared.touched[0] = 0
    return True


@lean
def _begin(engines: Engines, attempts: np.ndarray, work: Any, pool: Any, limits: Limits) -> None:
    """Before anything happens."""
    arrival, outages = work.arrival, work.outages
    engines.shared.counters[USED] = arrival.size
    if limits.debug:  # the invariants are those of all attempts
        for a in range(arrival.size):
            new_attempt(attempts[a], a, 1, arrival[a], work.prompt[a], work.output[a])
    if pool is not None:
        for r in range(engines.state.size):
            clear(pool, r, engines.state[r].blocks)
    for k in range(outages.shape[0]):
        push_event(engines, outages[k, 0], DOWN, k)
    if limits.scale_by > 0:
        push_event(engines, limits.scale_every, SCALE, 0)


def _run(work: Any) -> int:
    """Run on; returns 0 if with_room and more attempts are needed to go on. Compiled, of a bundle of records.Work."""
    engines, attempts, limits = work.engines, work.attempts, work.settings[0]
    counters = engines.shared.counters
    if counters[USED] == 0:
        _begin(engines, attempts, work, work.pool, limits)
    if not _advance(
        engines,
        attempts,
        work.arrival,
        work.prompt,
        work.output,
        work.pool,
        work.queue,
        limits,
        work.affinity,
        work.outages,
        work.memory,
    ):
        return 0
    now = counters[NOW]
    for r in range(engines.state.size):
        account(engines, r, now)
        me = engines.state[r]
        if me.up != OFF:
            me.on += now - me.since_on
        if me.role == PREFILL:
            me.prefilling += now - me.role_since
    return 1


PARTS = tuple(f"squall.simulate.{name}" for name in ("blocks", "kernel", "records", "replica", "waiting"))
"""The modules whose functions are compiled together."""
WATCHED = 10_000
"""Attempts from which on a run can be interrupted: fewer take less time than is worth a thread."""

GLANCE = 0.1
"""Seconds between two looks at a run in its thread."""
COMPILING = "Compiling the simulator for these options: this is done once, and takes some 15 s."


@cache
def _compiled(form: Form) -> Callable[..., int]:
    """_run for what is used: without a pool of blocks, or a queue, there is no code for them."""
    return native.load(__name__, "_run", also=PARTS, slow=lambda: note(COMPILING), bundles=(form,))


def _watched(
    run: Callable[[int], int],
    bundle: Bundle,
    attempts: int,
    counters: np.ndarray,
    watch: Callable[[int, int], object] | None,
) -> int:
    """`run`, for many attempts in a thread beside this one, which can thus be interrupted: what runs stops where it is.

    `watch` is then told now and again how many requests have come, and how many of them are not over.
    """
    if attempts < WATCHED or threading.current_thread() is not threading.main_thread():
        return run(bundle.address)
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(run(bundle.address)), daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(GLANCE)
            if watch is not None:
                watch(int(counters[ENTERED]), int(counters[OPEN] + counters[PENDING]))
    except KeyboardInterrupt:
        counters[STUCK] = INTERRUPTED
        thread.join()
        done[:] = [1]
    return done[0]


def run_cluster(
    arrival: np.ndarray,
    prompt: np.ndarray,
    output: np.ndarray,
    settings: np.ndarray,
    replicas: np.ndarray,
    costs: np.ndarray,
    points: np.ndarray,
    pool: Any,
    queue: Any,
    affinity: np.ndarray,
    outages: np.ndarray,
    seeds: np.ndarray,
    token_start: np.ndarray,
    token_total: int,
    width: int,
    log_events: bool,
    log_steps: bool,
    watch: Callable[[int, int], object] | None = None,
) -> Any:
    """Run requests through the cluster until none is left.

    Parameters
    ----------
    arrival, prompt, output
        (n,) int64 ticks at which the clients send, ascending by when the engines see them; int32 tokens, all >= 1.
    settings, replicas, costs, points
        packed(Limits); (replicas,) REPLICA as they begin; (replicas,) COST; (replicas, k, 2) their step tables.
    pool, queue
        blocks.Pool for prefix caching, else None; waiting.Queue, or None for FCFS.
    affinity
        (n,) uint64 for the router by session, else empty.
    outages
        (k, 3) int64: tick, replica, ticks until it is back.
    seeds
        (2, 1) uint64: of the router and of the retry jitter.
    token_start, token_total
        (n,) int64 offsets into the (token_total,) ticks of the tokens of the last attempts; token_total 0 keeps none.
    width
        Ticks of the first samples of the time series; doubled whenever SAMPLES do not reach far enough.
    log_events, log_steps
        Whether to keep a row of every event in a request's life (not in the order of time), and of every step. With
        windows, steps within them are not logged.
    watch
        Is told now and then how many requests have come, and how many of them are not over.

    Returns
    -------
    attempts (ATTEMPT; the first n are the first ones of the requests, then the retries), replicas (REPLICA), samples
    (replicas, SAMPLES, 5), their width in ticks, the token ticks, the events (EVENT), the steps (STEP), and the
    counters: at NOW the tick of the end, at OPEN the attempts that never ended, at UNFIT the unservable ones, at STUCK
    0, or 1 + the attempt that was preempted again and again, or -1 if an invariant broke (debug), or INTERRUPTED: then
    the first ENTERED attempts have come, and some are not over.
    """
    n, limits = len(arrival), settings[0]
    engines = engines_of(
        replicas,
        costs,
        points,
        block_size=int(limits["block_size"]),
        seeds=seeds,
        width=width,
        heap=2 * len(outages) + 64,
        events=6 * len(replicas) * int(replicas["max_seqs"].max()) + n if log_events else 0,
        steps=2 * len(replicas) + n if log_steps else 0,
        token_ticks=np.full(token_total, np.int64(-1)),
        token_start=token_start,
    )
    attempts = np.zeros(n, ATTEMPT)
    looks = int(limits["scale_down_after"] // limits["scale_every"]) if limits["scale_by"] > 0 else 1
    memory = np.zeros(6 if limits["scale_by"] >= BY_BACKLOG else max(1, looks))
    work = Work(engines, attempts, arrival, prompt, output, pool, queue, settings, affinity, outages, memory)
    counters, bundle = engines.shared.counters, Bundle(work)
    while not _watched(_compiled(bundle.form), bundle, len(work.attempts), counters, watch):
        engines, attempts = with_room(work.engines), work.attempts
        if counters[USED] == len(attempts) and counters[PENDING] > 0:
            attempts = np.concatenate([attempts, np.zeros(len(attempts), ATTEMPT)])
        work = work._replace(engines=engines, attempts=attempts)
        bundle = Bundle(work)
    engines = work.engines
    return (
        work.attempts[: counters[USED]],
        engines.state,
        engines.samples,
        engines.shared.width[0],
        engines.token_ticks,
        engines.events[: counters[LOGGED]],
        engines.steps[: counters[STEPPED]],
        counters,
    )
