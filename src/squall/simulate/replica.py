"""The steps of a replica, compiled: an engine that schedules like vLLM v1.

There is no prefill or decode mode, only `computed` chasing `prompt + generated`. A step first serves the running
requests in the order of their admission (each takes the blocks it needs; when none is free one is preempted and
recomputes later), then, if it preempted nobody, admits from the queue (waiting.py). KV blocks are counted or, for
prefix caching, have an identity (blocks.py). With asynchronous scheduling the next step is composed while one runs, so
what happens during a step is seen one step later.

A sequence whose prompt is computed takes one token in every step from then on, until its last one in a step whose
number is known (`finals`). Such *steady* sequences are not touched in a step: their tokens and blocks follow from the
number of the step, how many there are and how many of them fill a block in it (`phases`). Where that is not so (blocks
or budget run out, a client gives up), all are written out and looked at one by one.

Steps in which the same sequences each yield one more token follow one another for as long as nothing else happens, and
each takes the same time longer than the one before: the end of the i-th is known in closed form, exactly, in integers.
Such a *window* is entered with the step that begins it and settled when it ends, or when something happens to its
replica; the result is that of single steps.
"""

from math import exp
from typing import Any

import numpy as np

from squall.native import inlined, lean
from squall.simulate.blocks import (
    clear,
    give_back,
    grow,
    holds_invariants,
    longest_hit,
    release,
    take_hits,
)
from squall.simulate.records import (
    ADMIT,
    ALL,
    BREAK,
    DECODE,
    DECODE_FIRST,
    DECODES,
    DRAINING,
    FINISH,
    FIRST,
    HEAPED,
    KV_END,
    KV_PEAK,
    LIVELOCK,
    LOGGED,
    LONGEST_WINDOW,
    NEVER,
    NEW_ROLE,
    OFF,
    OK,
    OPEN,
    PENDING,
    PLACE,
    PREEMPT,
    PREEMPTIONS,
    PREFILL,
    PREFILL_FIRST,
    PREFILLS,
    QUEUED,
    READY,
    REPLICA_DOWN,
    RESERVE,
    RESET,
    RETRY,
    RUNNING,
    RUNNING_TIME,
    SAMPLES,
    SENDING,
    STARTING,
    STEPPED,
    STUCK,
    TICKS,
    TOKENS,
    TRANSFER,
    UNSERVABLE,
    UNSETTLED,
    UP,
    USED,
    WAITING_TIME,
    WORDS,
    Engines,
    Limits,
    StepCost,
)
from squall.simulate.waiting import (
    always_asks,
    becomes_active,
    charge,
    dequeue,
    enqueue,
    first_waiting,
    leaves,
    stands,
    victim,
)


@lean
def _between(points: np.ndarray, tokens: float) -> float:
    """The line through the neighbouring points, drawn on beyond the first and the last, at `tokens`; at least 0."""
    at = 1
    while at < points.shape[0] - 1 and points[at, 0] < tokens:
        at += 1
    rise = (points[at, 1] - points[at - 1, 1]) / (points[at, 0] - points[at - 1, 0])
    return max(0.0, points[at - 1, 1] + rise * (tokens - points[at - 1, 0]))


@inlined
def _gemm_seconds(cost: StepCost, tokens: float, sequences: float) -> float:
    """The part of a step that all its tokens pass together."""
    if cost.points.shape[0] > 0:
        return _between(cost.points, tokens) + cost.per_sequence * sequences
    memory = cost.weights
    if cost.experts > 0.0:
        memory += cost.experts * (1.0 - exp(tokens * cost.log_unrouted))
    compute = cost.per_token * tokens + cost.per_sequence * sequences
    low, high = min(memory, compute), max(memory, compute)
    gemm = high * (1.0 + (low / high) ** cost.knee) ** (1.0 / cost.knee)
    return gemm + cost.reduce + cost.reduce_per_token * tokens + cost.per_row * sequences


def gpu_seconds(cost: StepCost, tokens: float, sequences: float, kv_tokens: float, attention_pairs: float) -> float:
    """t_gpu of a step; `kv_tokens` is D + R and `attention_pairs` is Q of step_time.py."""
    attention = cost.per_kv_token * kv_tokens + cost.per_attention_pair * attention_pairs
    return _gemm_seconds(cost, tokens, sequences) + attention


@inlined
def _ticks(seconds: float) -> Any:
    return np.int64(np.rint(seconds * TICKS))


@inlined
def blocks_for(tokens: int, block_size: int) -> int:
    return (tokens + block_size - 1) // block_size


@lean
def next_random(state: np.ndarray) -> Any:
    """The next of the splitmix64 stream in `state[0]`, as a float in [0, 1)."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return np.float64(z >> np.uint64(11)) * 2.0**-53


@inlined
def seen_at(limits: Limits, sent: Any, prompt: int) -> Any:
    """When the cluster sees a request that is sent at `sent`."""
    return sent + limits.ingest + limits.ingest_per_token * prompt


@inlined
def results_pass(me: Any, limits: Limits, now: Any) -> Any:
    """When the results of the step in flight, which ends at `now`, have passed the API server of its replica."""
    if limits.front_out == 0:
        return now
    return max(me.front_free, now) + limits.front_out * me.sequences


@inlined
def log_event(engines: Engines, now: Any, kind: int, attempt: int, replica: int) -> None:
    if engines.events.size > 0:
        it = engines.events[engines.shared.counters[LOGGED]]
        it.time = now
        it.kind = kind
        it.attempt = attempt
        it.replica = replica
        engines.shared.counters[LOGGED] += 1


@lean
def _earlier(heap: np.ndarray, i: int, j: int) -> bool:
    a, b = heap[i], heap[j]
    if a.tick != b.tick:
        return a.tick < b.tick
    if a.kind != b.kind:
        return a.kind < b.kind
    return a.who < b.who


@lean
def _swap(heap: np.ndarray, i: int, j: int) -> None:
    a, b = heap[i], heap[j]
    a.tick, b.tick = b.tick, a.tick
    a.kind, b.kind = b.kind, a.kind
    a.who, b.who = b.who, a.who


@lean
def push_event(engines: Engines, tick: Any, kind: int, who: int) -> None:
    heap = engines.heap
    i = engines.shared.counters[HEAPED]
    engines.shared.counters[HEAPED] += 1
    heap[i].tick, heap[i].kind, heap[i].who = tick, kind, who
    while i > 0 and _earlier(heap, i, (i - 1) // 2):
        _swap(heap, i, (i - 1) // 2)
        i = (i - 1) // 2


@lean
def pop_event(engines: Engines) -> None:
    """Take the first out; what lies beyond the others is never due."""
    heap = engines.heap
    engines.shared.counters[HEAPED] -= 1
    count = engines.shared.counters[HEAPED]
    _swap(heap, 0, count)
    heap[count].tick = NEVER
    i = np.int64(0)
    while True:
        child = 2 * i + 1
        if child >= count:
            break
        if child + 1 < count and _earlier(heap, child + 1, child):
            child += 1
        if not _earlier(heap, child, i):
            break
        _swap(heap, i, child)
        i = child


@inlined
def set_end(engines: Engines, r: int, end: Any) -> None:
    ends = engines.shared.ends
    i = ends.size // 2 + r
    ends[i] = end
    while i > 1:
        i //= 2
        ends[i] = min(ends[2 * i], ends[2 * i + 1])


@inlined
def account(engines: Engines, r: int, now: Any) -> None:
    """Add the state that held since the last call to the samples."""
    me = engines.state[r]
    start = me.since
    if start >= now:
        return
    width = engines.shared.width
    me.since = now
    while start < now:
        at, end = width[2], now
        if start < width[1]:
            at = start // width[0]
            end = (at + 1) * width[0]
        sums = engines.samples[r, at]
        sums[RUNNING_TIME] += me.running * (end - start)
        sums[WAITING_TIME] += me.waiting * (end - start)
        sums[TOKENS] += me.token_rate * (end - start)
        sums[KV_PEAK] = max(sums[KV_PEAK], (me.blocks - me.free) / me.blocks)
        start = end


@inlined
def widen(samples: np.ndarray, width: np.ndarray, now: Any) -> None:
    """Go on to the sample of `now`; merge neighbouring ones until it is one of them."""
    if now < width[1] + width[0]:
        return
    while now >= width[0] * SAMPLES:
        for r in range(samples.shape[0]):
            for i in range(SAMPLES // 2):
                for q in range(samples.shape[2]):
                    a, b = samples[r, 2 * i, q], samples[r, 2 * i + 1, q]
                    samples[r, i, q] = max(a, b) if q == KV_PEAK else a + b
            samples[r, SAMPLES // 2 :, :] = 0.0
        width[0] *= 2
    width[2] = now // width[0]
    width[1] = width[2] * width[0]


# The life of an attempt


@lean
def new_attempt(it: Any, request: int, number: int, sent: Any, prompt: int, output: int) -> None:
    it.request = request
    it.number = number
    it.sent = sent
    it.prompt = prompt
    it.output = output
    it.first = it.last = it.ended = it.replica = it.source = it.next = it.previous = it.child = -1
    it.held = it.node = -1


@lean
def fail(engines: Engines, attempts: np.ndarray, a: int, state: int, ended: Any, limits: Limits) -> None:
    """Attempt `a` is over; its client tries again later, unless no retry is left or the request can never fit."""
    it = attempts[a]
    it.state = state
    it.ended = ended
    engines.shared.counters[OPEN] -= 1
    if state != UNSERVABLE and it.number <= limits.retries:
        longest = np.int64(limits.backoff_cap)
        if it.number < 20:  # beyond, the cap holds and the shift would overflow
            longest = min(longest, np.int64(limits.backoff) << np.int64(it.number - 1))
        arrival = seen_at(limits, ended + np.int64(next_random(engines.shared.random[1]) * longest), it.prompt)
        push_event(engines, max(arrival, ended + 1), RETRY, a)
        engines.shared.counters[PENDING] += 1


@lean
def hand_something_to(engines: Engines, r: int) -> None:
    """Replica `r` is woken after the event at hand."""
    woken = engines.shared.woken
    for k in range(1, woken[0] + 1):
        if woken[k] == r:
            return
    woken[0] += 1
    woken[woken[0]] = r


@lean
def leave_source(engines: Engines, attempts: np.ndarray, a: int, pool: Any, limits: Limits) -> bool:
    """The prefill replica need not hold the blocks of attempt `a` any more; returns whether it still had them."""
    it = attempts[a]
    r = np.int64(it.source)
    source = engines.state[r]
    it.source = -1
    if source.epoch != it.epoch:
        return False
    if pool is None:
        source.free += blocks_for(it.prompt, limits.block_size)
    else:
        give_back(pool, r, source, np.int64(it.held), np.int64(blocks_for(it.prompt, limits.block_size)))
        pool.state[r].kept -= 1
    return True


@lean
def free_reserved(engines: Engines, attempts: np.ndarray, a: int, pool: Any) -> None:
    """Free the blocks that are held where attempt `a` waits."""
    it = attempts[a]
    if it.blocks > 0:
        r = np.int64(it.replica)
        if pool is None:
            engines.state[r].free += it.blocks
        else:
            give_back(pool, r, engines.state[r], np.int64(it.node), np.int64(it.blocks))
            pool.state[r].kept -= 1
    it.blocks = 0


@lean
def let_go(engines: Engines, attempts: np.ndarray, a: int, pool: Any, limits: Limits) -> None:
    """Give up what is held for an attempt that does not run: blocks at a prefill replica, here, or on the host."""
    it = attempts[a]
    if it.source >= 0:
        source = np.int64(it.source)
        if leave_source(engines, attempts, a, pool, limits):
            hand_something_to(engines, source)
    elif limits.swap > 0 and it.computed > 0 and it.blocks == 0:
        engines.state[it.replica].host_free += blocks_for(it.computed, limits.block_size)
    free_reserved(engines, attempts, a, pool)
    it.computed = 0


@inlined
def write_back(attempts: np.ndarray, sequence: Any) -> None:
    it = attempts[sequence.attempt]
    it.generated = sequence.generated
    it.last = sequence.last


@inlined
def _free_blocks(engines: Engines, r: int, pool: Any, sequence: Any) -> None:
    me = engines.state[r]
    if pool is None:
        me.free += sequence.blocks
        sequence.blocks = 0
    else:
        release(pool, r, me, sequence)


@inlined
def _move(engines: Engines, r: int, to: Any, at: Any, count: Any) -> None:
    """Put `count` sequences from place `at` on in place `to`, which is before it; word by word, as numba copies records
    by a call, and unsigned, as it would look at each for an index from the end."""
    words = engines.words[r]
    back = np.uint64(WORDS * (at - to))
    for k in range(np.uint64(WORDS * at), np.uint64(WORDS * (at + count))):
        words[k - back] = words[k]


@inlined
def _remove(engines: Engines, r: int, to: Any, at: Any, end: Any) -> Any:
    """Let the sequences of the places from `at` to before `end`, and their finals, follow those before place `to`;
    returns the place after them."""
    finals = engines.finals[r]
    back = at - to
    if back > 0 and at < end:
        _move(engines, r, to, at, end - at)
        for i in range(np.uint64(at), np.uint64(end)):
            finals[i - np.uint64(back)] = finals[i]
    return end - back


@lean
def _drop_gone(engines: Engines, r: int, attempts: np.ndarray, pool: Any) -> None:
    """Take what has left out of the running, keeping their order; free the blocks it still holds."""
    me, running = engines.state[r], engines.running[r]
    kept = 0
    for i in range(me.running):
        if attempts[running[i].attempt].state != RUNNING:
            _free_blocks(engines, r, pool, running[i])
        else:
            if kept < i:
                _move(engines, r, kept, i, 1)
            kept += 1
    me.running = kept
    me.aborted = 0


@lean
def _preempt(
    engines: Engines,
    r: int,
    attempts: np.ndarray,
    pool: Any,
    queue: Any,
    limits: Limits,
    at: int,
    yields: bool,
    now: Any,
) -> None:
    """Give up the sequence at place `at`: it waits again and will compute all again, or come back from the host.

    `yields` says whether the step in flight yields a token of it, which will still be received.
    """
    me, running = engines.state[r], engines.running[r]
    sequence = running[at]
    a = sequence.attempt
    it = attempts[a]
    write_back(attempts, sequence)
    blocks = sequence.blocks
    if limits.swap > 0 and me.host_free >= blocks:
        it.computed = sequence.computed
        me.host_free -= blocks_for(sequence.computed, limits.block_size)
        me.extra += limits.swap * blocks
        me.swapped += blocks
    else:
        it.computed = 0
        me.lost += sequence.computed
    _free_blocks(engines, r, pool, sequence)
    _move(engines, r, at, at + 1, me.running - at - 1)
    me.running -= 1
    if yields:
        engines.orphans[r, me.orphans] = a
        me.orphans += 1
    me.preemptions += 1
    it.preemptions += 1
    it.state = QUEUED
    if it.preemptions > LIVELOCK + 10 * it.generated:
        engines.shared.counters[STUCK] = a + 1
    enqueue(queue, me, r, attempts, a, True)
    log_event(engines, now, PREEMPT, a, r)


# Steady sequences


@inlined
def _first_need(s: Any, final: Any, block_size: int) -> Any:
    """The remainder of the steps in which a steady sequence needs a block."""
    return (final - (s.prompt + s.output - 2)) % block_size


@inlined
def _steady_tokens(s: Any, final: Any, received: Any) -> Any:
    """How many tokens a steady sequence has when step `received` was the last one received."""
    return max(np.int64(s.generated), s.output - (final - received))


@inlined
def _leaves_with(me: Any, s: Any, i: Any, final: Any, block_size: int) -> None:
    """Take the steady sequence at place `i` into account of who ends first."""
    if final < me.final:
        me.final = final
        me.leaving_from = i
        me.leaving = me.leaving_base = me.leaving_need = 0
    if final == me.final:
        me.leaving += 1
        me.leaving_base += s.prompt + s.output - 1 - final
        me.leaving_need += (s.prompt + s.output - 1) % block_size == 0


@inlined
def _settle_in(engines: Engines, r: int, limits: Limits) -> None:
    """Whoever got its prompt computed, or its next token, in the step just composed goes on like that by itself."""
    me, running, finals = engines.state[r], engines.running[r], engines.finals[r]
    if me.role == PREFILL:  # nothing goes on there
        return
    young = me.running
    for i in range(me.young, me.running):
        s = running[i]
        if finals[i] == UNSETTLED:
            if s.next != 3:
                young = min(young, i)
                continue
            coming = 1 + (limits.asynchronous & (s.now >> 1))
            final = me.composed + s.output - s.generated - coming
            finals[i] = final
            _leaves_with(me, s, i, final, limits.block_size)
            me.steady += 1
            me.base += s.prompt + s.output - 1 - final
            engines.phases[r, _first_need(s, final, limits.block_size)] += 1
        if s.generated == 0:
            young = min(young, i)
    me.young = young


@inlined
def _forget(engines: Engines, r: int, s: Any, final: Any, limits: Limits) -> None:
    me = engines.state[r]
    me.steady -= 1
    me.base -= s.prompt + s.output - 1 - final
    engines.phases[r, _first_need(s, final, limits.block_size)] -= 1


@lean
def write_out(engines: Engines, r: int, limits: Limits, composing: bool) -> None:
    """Make the steady sequences ordinary ones, with everything about them written down."""
    me, running, finals = engines.state[r], engines.running[r], engines.finals[r]
    in_last = composing or not limits.asynchronous or me.queued or not me.busy  # else the last composed step was empty
    for i in range(me.running):
        final = finals[i]
        if final == UNSETTLED:
            continue
        s = running[i]
        _forget(engines, r, s, final, limits)
        finals[i] = UNSETTLED
        if limits.asynchronous and final >= me.flying and s.output - (final - me.flying) > s.generated:
            s.now = 3
        tokens = _steady_tokens(s, final, me.received)
        if tokens > s.generated:
            s.generated = tokens
            s.last = me.received_at
        s.next = 3 if in_last and final >= me.composed else 0
        s.computed = s.prompt + s.output - 1 - (final - min(me.composed, final))
        s.blocks = blocks_for(s.computed, limits.block_size)
    me.final = NEVER
    me.young = 0


@inlined
def blocks_taken(engines: Engines, r: int, limits: Limits, steps: Any) -> Any:
    """How many blocks the steady sequences take in the next `steps` steps to be composed."""
    size = np.int64(limits.block_size)
    phases = engines.phases[r]
    me = engines.state[r]
    rounds = steps // size
    taken = rounds * me.steady
    at = me.composed % size
    for _ in range(steps - rounds * size):
        at = at + 1 if at + 1 < size else np.int64(0)
        taken += phases[at]
    return taken


@inlined
def _steps_with_blocks(engines: Engines, r: int, limits: Limits, most: Any) -> Any:
    """For how many steps to be composed the free blocks suffice, looking no further than `most`."""
    size = np.int64(limits.block_size)
    phases = engines.phases[r]
    me = engines.state[r]
    if (most // size + 1) * me.steady <= me.free:
        return most
    rounds = me.free // me.steady
    left = me.free - rounds * me.steady
    steps = rounds * size
    at = me.composed % size
    for _ in range(1, size):
        at = at + 1 if at + 1 < size else np.int64(0)
        left -= phases[at]
        if left < 0:
            break
        steps += 1
    return steps


@inlined
def _serve_steady(engines: Engines, r: int, limits: Limits) -> bool:
    """Schedule the steady sequences all at once; returns False, and does nothing, if anybody would fall short."""
    me, running, finals = engines.state[r], engines.running[r], engines.finals[r]
    block_size = limits.block_size
    step = me.composed + 1
    size, base, need = me.steady, me.base, engines.phases[r, step % block_size]
    if me.final < step:  # these will have ended with what is in flight
        size -= me.leaving
        base -= me.leaving_base
        need -= me.leaving_need
    left, free = me.left - size, me.free - need
    if left < 0 or free < 0:
        return False
    for i in range(me.young, me.running):
        if finals[i] == UNSETTLED:
            s = running[i]
            in_flight = limits.asynchronous & (s.next >> 1)
            wanted = s.prompt + s.generated + in_flight - s.computed
            if limits.chunk > 0:
                wanted = min(wanted, limits.chunk)
            if wanted > left and i < me.running - 1:
                return False
            wanted = min(wanted, left)
            left -= wanted
            free -= max(0, blocks_for(s.computed + wanted, block_size) - s.blocks)
            if free < 0:
                return False
    me.left -= size
    me.free -= need
    me.next_size += size
    me.same += size
    me.emitting += size
    me.next_kv += base + size * step
    return True


# Composing a step


@lean
def _serve_running(
    engines: Engines, r: int, attempts: np.ndarray, pool: Any, queue: Any, limits: Limits, which: int, now: Any
) -> bool:
    """Schedule those of the running that are wanted and not steady, as far as the budget goes; returns whether any was
    preempted."""
    me, running, finals = engines.state[r], engines.running[r], engines.finals[r]
    block_size = limits.block_size
    preempted, over = False, False
    i = np.int64(me.young)
    while i < me.running:
        if finals[i] < UNSETTLED:
            i += 1
            continue
        s = running[i]
        if which != DECODES:
            s.now = s.next
            s.next = 0
        in_flight = limits.asynchronous & (s.now >> 1)
        # With only one token in flight missing, nothing is left to schedule.
        if over or me.left <= 0 or (in_flight and s.computed + 1 >= s.prompt + s.output):
            i += 1
            continue
        whole = s.prompt + s.generated + in_flight - s.computed
        decode = whole == 1 and s.computed >= s.prompt
        if (which == PREFILLS and decode) or (which == DECODES and not decode):
            i += 1
            continue
        new = min(whole, me.left)
        if limits.chunk > 0:
            new = min(new, limits.chunk)
        need = 0
        if s.computed + new > s.blocks * block_size:
            need = blocks_for(s.computed + new, block_size) - s.blocks
        gone = False
        while need > me.free and not gone:
            preempted = True
            v = victim(queue, running, me.running, attempts)
            if v < i:
                other = running[v]
                if other.next:  # it leaves the step too
                    me.left += other.new
                    me.next_size -= 1
                    me.same -= other.now & 1
                    me.emitting -= other.now >> 1
                    before = other.computed - other.new
                    if other.new == 1 and before >= other.prompt:
                        me.next_kv -= before + 1
                    else:
                        me.next_kv -= before
                        me.next_pairs -= other.new * (before + other.new / 2)
                    other.computed = before
                _preempt(engines, r, attempts, pool, queue, limits, v, limits.asynchronous & (other.now >> 1), now)
                i -= 1
                s = running[i]
            else:
                held = running[v]
                flag = held.now if v == i else held.next
                _preempt(engines, r, attempts, pool, queue, limits, v, limits.asynchronous & (flag >> 1), now)
                gone = v == i
        if gone:
            over = True
            continue
        if decode:
            me.next_kv += s.computed + 1
        else:
            me.next_decode = 0
            me.next_kv += s.computed
            me.next_pairs += new * (s.computed + new / 2)
        s.computed += new
        if pool is None:
            me.free -= need
            s.blocks += need
        else:
            known = s.prompt + s.generated
            if need > 0 or min(s.computed, known) >= (s.registered + 1) * block_size:
                grow(pool, r, me, s, s.request, need, known)
        s.new = new
        s.next = 3 if new == whole else 1
        me.same += s.now & 1
        me.emitting += s.now >> 1
        me.least = min(me.least, s.output - s.generated)
        me.next_size += 1
        me.left -= new
        i += 1
    return preempted


@lean
def _reserve(
    engines: Engines, r: int, attempts: np.ndarray, a: int, pool: Any, limits: Limits, watermark: int, now: Any
) -> bool:
    """Take the blocks for a prompt that was computed elsewhere and begin to fetch what is not here already; returns
    whether there were enough of them."""
    me, it = engines.state[r], attempts[a]
    need = blocks_for(it.prompt, limits.block_size)
    hits, idle = 0, 0
    if pool is not None:
        state = pool.state[r]
        if (state.stuck == a and not state.wake) or state.kept == pool.most_kept:
            return False
        hits, idle, _, state.miss = longest_hit(pool, r, it.request, it.prompt, (it.prompt - 1) // limits.block_size)
    if need - hits + idle + watermark > me.free:
        if pool is not None:
            pool.state[r].stuck = a
            pool.state[r].wake = 0
        return False
    if pool is None:
        me.free -= need
    else:
        s = engines.running[r, me.running]  # not yet anybody's
        s.node, s.blocks, s.prompt, s.computed = -1, 0, it.prompt, it.prompt
        pool.state[r].stuck = -1
        take_hits(pool, r, me, s, it.request, hits, 0)
        pool.state[r].hits -= hits
        pool.state[r].unsent += hits
        grow(pool, r, me, s, it.request, need - hits, 0)
        it.node = s.node
        pool.state[r].kept += 1
    it.blocks = need
    it.state = TRANSFER
    engines.shared.counters[SENDING] += 1
    source = engines.state[it.source]
    tokens = np.int64(it.prompt - hits * limits.block_size)
    source.link_free = max(source.link_free, now) + limits.transfer + limits.transfer_per_token * tokens
    push_event(engines, source.link_free, KV_END, a)
    return True


@lean
def _admit(
    engines: Engines,
    r: int,
    attempts: np.ndarray,
    pool: Any,
    queue: Any,
    limits: Limits,
    now: Any,
) -> None:
    """Admit from the queue as long as the next one fits; it blocks all behind it, and never preempts."""
    me, running = engines.state[r], engines.running[r]
    block_size = limits.block_size
    me.closed = 2
    while me.left > 0 and me.running < me.max_seqs:
        a = first_waiting(queue, me, r, attempts)
        if a < 0:
            me.closed = 0
            return
        it = attempts[a]
        known = it.prompt + it.generated
        watermark = me.watermark if me.running > 0 else 0
        if it.source >= 0:  # its prompt was computed elsewhere: reserve the blocks, then fetch them
            if engines.state[it.source].epoch != it.epoch:
                dequeue(queue, me, r, attempts, a)
                it.source = -1
                it.computed = 0
                leaves(queue, r, it.request)
                log_event(engines, now, BREAK, a, r)
                fail(engines, attempts, a, RESET, now, limits)
                continue
            if not _reserve(engines, r, attempts, a, pool, limits, watermark, now):
                me.closed = stands(queue) if pool is None else 0
                return
            dequeue(queue, me, r, attempts, a)
            log_event(engines, now, RESERVE, a, r)
            continue
        hits, idle, host = 0, 0, 0
        held = np.int64(it.computed)
        if pool is not None and it.blocks == 0:
            state = pool.state[r]
            full = me.role == PREFILL and state.kept + me.running >= pool.most_kept
            if (state.stuck == a and not state.wake) or full:
                me.closed = 0
                return
            hits, idle, host, state.miss = longest_hit(pool, r, it.request, it.prompt, (known - 1) // block_size)
            if held > 0:  # all it had is on the host: no other copy from there is needed
                host = 0
            held = max(held, np.int64((hits + host) * block_size))
        whole = known - held
        new = min(whole, me.left)
        if limits.chunk > 0:
            new = min(new, limits.chunk)
        need = blocks_for(held + new, block_size) - it.blocks - hits
        asked = blocks_for(known, block_size) - it.blocks - hits if limits.full_gate else need
        if max(asked, need) + idle + watermark > me.free:
            if pool is not None:
                pool.state[r].stuck = a
                pool.state[r].wake = 0
                me.closed = 0
            else:
                me.closed = stands(queue)
            return
        dequeue(queue, me, r, attempts, a)
        s = running[me.running]
        engines.finals[r, me.running] = UNSETTLED
        me.running += 1
        s.attempt = a
        s.last = it.last
        s.request = it.request
        s.prompt = it.prompt
        s.output = 1 if me.role == PREFILL else it.output
        s.generated = it.generated
        s.blocks = it.blocks
        s.node = it.node
        s.registered = it.prompt // block_size if it.blocks > 0 else 0
        s.now = 0
        s.new = new
        s.computed = held
        it.state = RUNNING
        if it.preemptions == 0 and it.blocks == 0:
            charge(queue, r, it.request, it.prompt, 0)
            it.cached = (hits + host) * block_size
        if limits.swap > 0 and it.computed > 0 and it.blocks == 0:
            back = blocks_for(it.computed, block_size)
            me.host_free += back
            back = max(0, back - hits)
            me.swapped += back
            me.extra += limits.swap * back
        fetched = it.blocks > 0
        it.computed = 0
        it.blocks = 0
        it.node = -1
        if pool is None:
            s.computed += new
            me.free -= need
            s.blocks += need
        else:
            pool.state[r].stuck = -1
            if fetched:
                pool.state[r].kept -= 1
            else:
                pool.state[r].asked += (known - 1) // block_size
            if hits + host > 0:
                take_hits(pool, r, me, s, s.request, hits, host)
                me.extra += pool.host_ticks * host
            s.computed += new
            grow(pool, r, me, s, s.request, need - host, known)
        if new == 1 and held >= s.prompt:
            me.next_kv += held + 1
            me.least = min(me.least, s.output - s.generated)
        else:
            me.next_decode = 0
            me.next_kv += held
            me.next_pairs += new * (held + new / 2)
        s.next = 3 if new == whole else 1
        me.next_size += 1
        me.left -= new
        log_event(engines, now, ADMIT, a, r)


@inlined
def _duration(cost: Any, gpu: Any, size: int, decode: int, asynchronous: int) -> Any:
    """Ticks of a step whose GPU work takes `gpu` ticks."""
    host = _ticks(cost.host + cost.host_per_sequence * size + (0.0 if decode else cost.host_prompts))
    return max(gpu, host) + _ticks(cost.gap) if asynchronous else gpu + host


@inlined
def _price(engines: Engines, r: int, limits: Limits) -> None:
    """How long the composed step takes."""
    me = engines.state[r]
    cost = engines.costs[r]
    size = me.next_size
    me.next_tokens = me.budget - me.left
    if me.next_decode and me.last_decode and me.same == size and me.last_size == size:
        # The same sequences, each one token longer: an exact arithmetic progression in ticks.
        me.next_gpu += _ticks(cost.per_kv_token * size)
    else:
        gemm = engines.gemm[r, size] if me.next_tokens == size else np.nan
        if np.isnan(gemm):
            full = StepCost(
                cost.weights,
                cost.experts,
                cost.log_unrouted,
                cost.per_token,
                cost.per_sequence,
                cost.knee,
                cost.per_kv_token,
                cost.per_attention_pair,
                cost.reduce,
                cost.reduce_per_token,
                cost.per_row,
                cost.host,
                cost.host_per_sequence,
                cost.host_prompts,
                cost.gap,
                engines.points[r, : cost.points],
            )
            gemm = _gemm_seconds(full, float(me.next_tokens), float(size))
            if me.next_tokens == size:
                engines.gemm[r, size] = gemm
        attention = cost.per_kv_token * float(me.next_kv) + cost.per_attention_pair * me.next_pairs
        me.next_gpu = _ticks(gemm + attention)
    took = _duration(cost, me.next_gpu, size, me.next_decode, limits.asynchronous)
    me.next_ticks = max(1, took) + me.extra


@lean
def _check(engines: Engines, r: int, pool: Any, limits: Limits, attempts: np.ndarray) -> bool:
    """Whether the invariants of a replica hold after composing a step (debug builds)."""
    me, running = engines.state[r], engines.running[r]
    sound = me.left >= 0 and 0 <= me.running <= me.max_seqs and 0 <= me.free <= me.blocks
    held = 0
    for i in range(me.running):
        it = running[i]
        final = engines.finals[r, i]
        if final < UNSETTLED:
            sound &= final > me.received
            held += blocks_for(it.prompt + it.output - 1 - max(0, final - me.composed - 1), limits.block_size)
        else:
            sound &= it.blocks == blocks_for(it.computed, limits.block_size)
            held += it.blocks
        sound &= it.generated < it.output and attempts[it.attempt].state == RUNNING
    if pool is not None:
        return sound and holds_invariants(pool, r, me.blocks, me.free)
    for a in range(engines.shared.counters[USED]):
        waiting = attempts[a]
        if waiting.source == r and waiting.epoch == me.epoch:
            held += blocks_for(waiting.prompt, limits.block_size)
        if waiting.replica == r:
            held += waiting.blocks
    return sound and held + me.free == me.blocks


@lean
def _compose(
    engines: Engines,
    r: int,
    attempts: np.ndarray,
    pool: Any,
    queue: Any,
    limits: Limits,
    now: Any,
) -> Any:
    """Schedule the next step of replica `r`; returns the number of its sequences."""
    me = engines.state[r]
    if me.aborted > 0:
        _drop_gone(engines, r, attempts, pool)
    me.last_size = me.next_size
    me.last_decode = me.next_decode
    me.left = me.budget
    if me.next_size > 0:
        me.extra = 0  # else it holds up the next step that is one
    me.next_size = me.next_kv = me.same = me.emitting = me.closed = 0
    me.next_pairs = 0.0
    me.next_decode = 1
    me.least = NEVER
    before = me.preemptions
    if me.steady > 0 and not _serve_steady(engines, r, limits):
        write_out(engines, r, limits, True)
    if limits.order == PREFILL_FIRST:
        preempted = _serve_running(engines, r, attempts, pool, queue, limits, PREFILLS, now)
        if not preempted:
            _admit(engines, r, attempts, pool, queue, limits, now)
        if me.next_size == 0:
            _serve_running(engines, r, attempts, pool, queue, limits, DECODES, now)
    else:
        preempted = _serve_running(engines, r, attempts, pool, queue, limits, ALL, now)
        if not preempted:
            if limits.order == DECODE_FIRST and me.next_size > 0 and me.next_decode:
                me.closed = 2
            elif me.waiting > 0:
                _admit(engines, r, attempts, pool, queue, limits, now)
    if me.preemptions > before:
        engines.samples[r, engines.shared.width[2], PREEMPTIONS] += me.preemptions - before
        me.closed = 0
    if limits.debug and not _check(engines, r, pool, limits, attempts):
        engines.shared.counters[STUCK] = -1
    if me.next_size > 0:
        me.composed += 1
        _price(engines, r, limits)
        if limits.windows and pool is None and not always_asks(queue) and limits.order != PREFILL_FIRST:
            _settle_in(engines, r, limits)
    return me.next_size


# Windows of decode steps


@inlined
def _window_end(me: Any, i: Any) -> Any:
    """The end of the i-th step of the window, from 1."""
    return me.first_end + (i - 1) * me.second + me.slope * ((i - 1) * (i - 2) // 2)


@inlined
def _window_passed(me: Any, limits: Limits, i: Any) -> Any:
    """When the results of the i-th step of the window, from 1, have passed the API server.

    f(i) = max(f(i - 1), end(i)) + c: of end(k) + (i - k + 1)*c the largest, which has k at one of its ends, as the
    steps of a window become longer, never shorter.
    """
    if limits.front_out == 0:
        return _window_end(me, i)
    first = results_pass(me, limits, me.first_end)
    if i == 1:
        return first
    each = limits.front_out * me.running
    return max(first, _window_end(me, 2), _window_end(me, i) - (i - 2) * each) + (i - 1) * each


@lean
def steps_before(me: Any, now: Any) -> Any:
    """How many steps of the window ended before `now`; 0 without one."""
    low, high = np.int64(0), np.int64(me.window)
    while low < high:
        middle = (low + high + 1) // 2
        if _window_end(me, middle) < now:
            low = middle
        else:
            high = middle - 1
    return low


@inlined
def _open_window(engines: Engines, r: int, limits: Limits, now: Any) -> None:
    """After a step was started: enter as many as possible of those that must follow it.

    With m further steps, each of the running receives m tokens before the last of them is the one in flight. That is
    what single steps would do if nobody finishes (nor, asynchronously, is known to finish with what is in flight), if
    there are blocks, and if the queue stays as it is; whatever happens from outside settles the window early.
    """
    me = engines.state[r]
    b = me.running
    if me.next_size != b or not me.next_decode or me.aborted or me.orphans or me.extra:
        return
    if me.waiting > 0 and me.closed == 0:
        return
    if limits.asynchronous and (not me.queued or me.emitting != b):
        return
    m = min(min(me.least, me.final - me.received) - 1 - limits.asynchronous, LONGEST_WINDOW)
    if m < 2:
        return
    m = min(m, _steps_with_blocks(engines, r, limits, m) if me.steady == b else me.free // b * limits.block_size)
    if m < 2:
        return
    cost = engines.costs[r]
    growth = _ticks(cost.per_kv_token * b)
    second = _duration(cost, me.next_gpu + (0 if limits.asynchronous else growth), b, 1, limits.asynchronous)
    slope = growth
    if limits.asynchronous:
        host = _ticks(cost.host + cost.host_per_sequence * b)
        if me.next_gpu < host:  # the host sets the pace, until the GPU takes longer
            slope = 0
            if growth > 0:
                m = min(m, (host - me.next_gpu) // growth)
                if m < 2:
                    return
    if second < 1:
        return
    me.window = m
    me.first_end = now + me.ticks
    me.second = second
    me.slope = slope
    me.growth = growth
    me.window_from = now
    me.windows += 1
    end = _window_end(me, m + 1)
    me.token_rate = (me.tokens + m * b) / (end - now)
    set_end(engines, r, end)


@lean
def settle(engines: Engines, r: int, attempts: np.ndarray, pool: Any, queue: Any, limits: Limits, j: Any) -> None:
    """Bring the running to where they are after the first `j` steps of the window; it is over then."""
    me, running, finals = engines.state[r], engines.running[r], engines.finals[r]
    block_size = limits.block_size
    me.window = 0
    if j == 0:
        return
    end, last = _window_end(me, j), _window_passed(me, limits, j)
    begin_told = _window_passed(me, limits, 1)
    ticks = engines.token_ticks
    for i in range(0 if ticks.size > 0 else me.young, me.running):
        s = running[i]
        if ticks.size > 0:
            had = _steady_tokens(s, finals[i], me.received) if finals[i] < UNSETTLED else np.int64(s.generated)
            begin = engines.token_start[s.request] + had
            for k in range(j):
                ticks[begin + k] = _window_passed(me, limits, k + 1)
        if s.generated == 0:
            attempts[s.attempt].first = begin_told
            log_event(engines, me.first_end, FIRST, s.attempt, r)
            if finals[i] < UNSETTLED:
                s.generated = 1
                s.last = begin_told
        if finals[i] < UNSETTLED:
            continue
        s.last = last
        s.generated += j
        if pool is None:
            s.computed += j
            if s.computed > s.blocks * block_size:
                need = blocks_for(s.computed, block_size) - s.blocks
                s.blocks += need
                me.free -= need
        charge(queue, r, s.request, 0, j)
    if pool is not None:
        _grow_in_turn(engines, r, pool, limits, j)
    if me.steady > 0:
        me.free -= blocks_taken(engines, r, limits, j)
        if me.steady == me.running:
            me.young = me.running
    me.composed += j
    me.flying += j
    me.received += j
    me.received_at = last
    me.next_gpu += j * me.growth
    me.steps += j
    me.jumped += j
    me.computed += j * me.running
    if limits.front_out > 0:
        me.front_free = last
    me.sequences = me.running
    me.tokens = me.running
    me.ticks = _window_end(me, j + 1) - end
    me.next_ticks = me.ticks if not limits.asynchronous else me.second + me.slope * j


@lean
def _grow_in_turn(engines: Engines, r: int, pool: Any, limits: Limits, j: Any) -> None:
    """Take the blocks of `j` decode steps in the order in which single steps would: by step, then by place."""
    me, running = engines.state[r], engines.running[r]
    block_size = limits.block_size
    # by[d] are the sequences that need a block at step d, d + block_size, …; a sequence's last block is full by then.
    count, fill, by = engines.scratch[0], engines.scratch[1], engines.scratch[2]
    count[: block_size + 2] = 0
    for i in range(me.running):
        count[(-running[i].computed) % block_size + 2] += 1
    for d in range(1, block_size + 2):
        count[d] += count[d - 1]
    for d in range(block_size + 2):
        fill[d] = count[d]
    for i in range(me.running):
        d = (-running[i].computed) % block_size + 1
        by[fill[d]] = i
        fill[d] += 1
    for step in range(1, j + 1):
        d = (step - 1) % block_size + 1
        for k in range(count[d], fill[d]):
            s = running[by[k]]
            before = s.computed
            s.computed += step
            grow(pool, r, me, s, s.request, 1, s.prompt + s.generated - j + step)
            s.computed = before
    for i in range(me.running):
        running[i].computed += j
    if not limits.asynchronous:
        d = j % block_size + 1
        for k in range(count[d], fill[d]):
            s = running[by[k]]
            grow(pool, r, me, s, s.request, 0, s.prompt + s.generated)


@lean
def _interrupt(engines: Engines, r: int, attempts: np.ndarray, pool: Any, queue: Any, limits: Limits, now: Any) -> bool:
    """Something happens to replica `r` within its window: settle it; returns whether a step of it ends just now."""
    me = engines.state[r]
    account(engines, r, now)
    low = steps_before(me, now)
    # The time series took the mean rate of the window; now it is known better.
    guessed = me.token_rate * (now - me.window_from)
    begun, done = me.window_from, 0.0
    if low > 0:
        begun = _window_end(me, low)
        done = me.tokens + (low - 1) * me.running
    end = _window_end(me, low + 1)
    settle(engines, r, attempts, pool, queue, limits, low)
    me.token_rate = me.tokens / me.ticks
    engines.samples[r, engines.shared.width[2], TOKENS] += done + me.token_rate * (now - begun) - guessed
    set_end(engines, r, end)
    return end == now


# Steps begin and end


@inlined
def _finish(engines: Engines, r: int, attempts: np.ndarray, queue: Any, limits: Limits, a: int, now: Any) -> None:
    it = attempts[a]
    it.state = OK
    it.ended = engines.state[r].received_at + limits.delivery
    engines.shared.counters[OPEN] -= 1
    leaves(queue, r, it.request)
    log_event(engines, now, FINISH, a, r)


@lean
def _hand_over(
    engines: Engines, r: int, attempts: np.ndarray, pool: Any, queue: Any, limits: Limits, s: Any, now: Any
) -> None:
    """The prompt of sequence `s` is computed: its attempt queues at the decode replica with the fewest requests, as
    replica `r` keeps its blocks until they are there."""
    best, least = -1, NEVER
    for d in range(engines.state.size):
        other = engines.state[d]
        if other.role == DECODE and other.up == READY and other.running + other.waiting - other.aborted < least:
            best, least = d, other.running + other.waiting - other.aborted
    a = s.attempt
    it = attempts[a]
    leaves(queue, r, it.request)
    if best < 0:
        log_event(engines, now, BREAK, a, r)
        fail(engines, attempts, a, RESET, now, limits)
        return
    it.state = QUEUED
    it.source = r
    it.epoch = engines.state[r].epoch
    it.computed = it.prompt - 1
    if pool is None:
        engines.state[r].free -= s.blocks
    else:
        it.held = s.node
        s.node = -1
        pool.state[r].kept += 1
    it.replica = best
    account(engines, best, now)
    becomes_active(queue, best, it.request)
    enqueue(queue, engines.state[best], best, attempts, a, False)
    hand_something_to(engines, best)


@inlined
def _end_steady(
    engines: Engines, r: int, attempts: np.ndarray, queue: Any, limits: Limits, known: Any, now: Any
) -> Any:
    """Those before place `known` whose last step has just been received leave, and the others move up; returns the
    place after them."""
    me, running, finals = engines.state[r], engines.running[r], engines.finals[r]
    received, left = me.received, me.leaving
    to = begin = min(np.int64(me.leaving_from), known)
    i: Any = np.uint64(begin)
    while left > 0:
        while i < np.uint64(known) and finals[i] != received:
            i += np.uint64(1)
        if i >= np.uint64(known):
            break
        s = running[i]
        s.generated = s.output
        s.last = me.received_at
        _forget(engines, r, s, received, limits)
        write_back(attempts, s)
        _finish(engines, r, attempts, queue, limits, s.attempt, now)
        me.free += blocks_for(s.prompt + s.output - 1, limits.block_size)
        to = _remove(engines, r, to, begin, np.int64(i))
        begin = np.int64(i) + 1
        i += np.uint64(1)
        left -= 1
    return _remove(engines, r, to, begin, known)


@inlined
def _next_final(engines: Engines, r: int, limits: Limits) -> None:
    """Who of the steady ends first."""
    me, running, finals = engines.state[r], engines.running[r], engines.finals[r]
    # Of the least final the first place, in one vectorised pass.
    first, left = NEVER, np.int64(0)
    for i in range(me.running):
        first = min(first, (finals[i] << PLACE) | i)
    me.final = NEVER
    least = first >> PLACE
    if least >= UNSETTLED:
        return
    for i in range(me.running):
        left += finals[i] == least
    at = first & ((1 << PLACE) - 1)
    while left > 0:
        if finals[at] == least:
            _leaves_with(me, running[at], at, least, limits.block_size)
            left -= 1
        at += 1


@lean
def receive(engines: Engines, r: int, attempts: np.ndarray, pool: Any, queue: Any, limits: Limits, now: Any) -> None:
    """The step in flight has ended: what yields gets one more token; the finished leave and free their blocks."""
    me, running, finals = engines.state[r], engines.running[r], engines.finals[r]
    ticks = engines.token_ticks
    me.received = me.flying
    told = results_pass(me, limits, now)
    me.received_at = told
    if limits.front_out > 0:
        me.front_free = told
    ending = me.final == me.received
    begin = np.int64(me.young) if ticks.size == 0 else np.int64(0)
    kept, before = begin, np.int64(me.running)
    if ending and begin > 0:
        kept = _end_steady(engines, r, attempts, queue, limits, begin, now)
    young = np.int64(-1)
    for i in range(begin, before):
        final = finals[i]
        s = running[i]
        gone = False
        if final < UNSETTLED:
            tokens = s.output - (final - me.received)
            if tokens > s.generated:
                if ticks.size > 0:
                    ticks[engines.token_start[s.request] + tokens - 1] = told
                if s.generated == 0:
                    attempts[s.attempt].first = told
                    log_event(engines, now, FIRST, s.attempt, r)
                    s.generated = 1
                    s.last = told
            if final == me.received:
                gone = True
                s.generated = s.output
                s.last = told
                s.blocks = blocks_for(s.prompt + s.output - 1, limits.block_size)
                _forget(engines, r, s, final, limits)
                write_back(attempts, s)
                _finish(engines, r, attempts, queue, limits, s.attempt, now)
        elif (s.now if limits.asynchronous else s.next) == 3 and not (
            me.aborted > 0 and attempts[s.attempt].state != RUNNING  # timed out while the step ran
        ):
            if me.role == PREFILL:
                gone = True
                _hand_over(engines, r, attempts, pool, queue, limits, s, now)
            else:
                if s.generated == 0:
                    attempts[s.attempt].first = told
                    log_event(engines, now, FIRST, s.attempt, r)
                if ticks.size > 0:
                    ticks[engines.token_start[s.request] + s.generated] = told
                s.last = told
                s.generated += 1
                charge(queue, r, s.request, 0, 1)
                if s.generated == s.output:
                    gone = True
                    write_back(attempts, s)
                    _finish(engines, r, attempts, queue, limits, s.attempt, now)
        if gone:
            _free_blocks(engines, r, pool, s)
        else:
            if young < 0 and (final == UNSETTLED or s.generated == 0):
                young = kept
            if kept < i:
                _remove(engines, r, kept, i, i + 1)
            kept += 1
    me.running = kept
    me.young = young if young >= 0 else kept
    if ending or (kept < before and me.steady > 0):
        _next_final(engines, r, limits)
    for k in range(me.orphans):
        a = engines.orphans[r, k]
        it = attempts[a]
        if it.state > TRANSFER or me.role == PREFILL:  # there the token counts for nothing without its blocks
            continue
        if it.generated == 0:
            it.first = told
            log_event(engines, now, FIRST, a, r)
        if ticks.size > 0:
            ticks[engines.token_start[it.request] + it.generated] = told
        it.last = told
        it.generated += 1
        charge(queue, r, it.request, 0, 1)
        if it.generated == it.output:
            # It was preempted with its last token in flight: nothing has to be computed again.
            dequeue(queue, me, r, attempts, a)
            if it.computed == 0:
                me.lost -= it.prompt + it.output - 1
            let_go(engines, attempts, a, pool, limits)
            _finish(engines, r, attempts, queue, limits, a, now)
    me.orphans = 0
    me.busy = 0


@lean
def switch_off(engines: Engines, r: int, pool: Any, now: Any) -> None:
    me = engines.state[r]
    me.up = OFF
    me.on += now - me.since_on
    me.epoch += 1
    if pool is not None:
        clear(pool, r, me.blocks)
    log_event(engines, now, REPLICA_DOWN, -1, r)


@lean
def _drained(engines: Engines, r: int, pool: Any, limits: Limits, now: Any) -> None:
    """Replica `r` was to take no more requests: once it has none left it stops, or takes its other role."""
    me = engines.state[r]
    if me.running > 0 or me.waiting > 0 or me.fronted > 0 or me.free < me.blocks:
        return
    if me.up == DRAINING:
        switch_off(engines, r, pool, now)
        return
    if me.role == PREFILL:
        me.role = DECODE
        me.prefilling += now - me.role_since
    else:
        me.role = PREFILL
    me.role_since = now
    me.changes += 1
    me.up = READY
    if limits.provisioning > 0:
        me.up = STARTING
        push_event(engines, now + limits.provisioning, UP, r)
    log_event(engines, now, NEW_ROLE, -1, r)


@lean
def start_step(
    engines: Engines,
    r: int,
    attempts: np.ndarray,
    pool: Any,
    queue: Any,
    limits: Limits,
    now: Any,
) -> None:
    """Let an idle replica start its next step, if there is one, and the window that follows."""
    me = engines.state[r]
    size, before = me.queued, me.preemptions
    if size == 0:
        size = _compose(engines, r, attempts, pool, queue, limits, now)
    if size == 0 and me.preemptions > before:  # all of it: others may go now
        size = _compose(engines, r, attempts, pool, queue, limits, now)
    if size == 0:
        me.token_rate = 0.0
        if me.up >= DRAINING:
            _drained(engines, r, pool, limits, now)
        return
    me.queued = 0
    me.busy = 1
    me.flying = me.composed
    me.sequences = me.next_size
    me.tokens = me.next_tokens
    me.ticks = me.next_ticks
    me.steps += 1
    me.computed += me.tokens
    me.token_rate = me.tokens / me.ticks
    if limits.asynchronous:
        me.queued = _compose(engines, r, attempts, pool, queue, limits, now) > 0
    if engines.steps.size > 0:
        it = engines.steps[engines.shared.counters[STEPPED]]
        it.start = now
        it.ticks = me.ticks
        it.replica = r
        it.sequences = me.sequences
        it.tokens = me.tokens
        it.running = me.running
        it.waiting = me.waiting
        it.free = me.free
        it.preemptions = me.preemptions
        engines.shared.counters[STEPPED] += 1
    set_end(engines, r, now + me.ticks)
    if limits.windows and not (me.role == DECODE and always_asks(queue)):  # who is handed over asks what was served
        _open_window(engines, r, limits, now)


@lean
def wake(engines: Engines, r: int, attempts: np.ndarray, pool: Any, queue: Any, limits: Limits, now: Any) -> None:
    """Replica `r` has to look again: its window is over; if it is idle it schedules at the end of the tick."""
    me = engines.state[r]
    if me.window > 0 and _interrupt(engines, r, attempts, pool, queue, limits, now):
        set_end(engines, r, NEVER)
        receive(engines, r, attempts, pool, queue, limits, now)
    if not me.busy:
        touched = engines.shared.touched
        at = touched[0]
        for k in range(1, touched[0] + 1):
            if touched[k] == r:
                return
        while at > 0 and touched[at] > r:
            touched[at + 1] = touched[at]
            at -= 1
        touched[at + 1] = r
        touched[0] += 1
