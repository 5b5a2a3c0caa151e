"""The step loop of the simulated cluster, compiled: engines that schedule like vLLM v1, with KV blocks counted.

There is no prefill or decode mode, only `computed` chasing `prompt + generated`. A step first serves the running
requests in the order of their admission (each takes the blocks it needs; when none is free the last admitted is
preempted and recomputes later), then, if it preempted nobody, admits from the head of the queue. With asynchronous
scheduling the next step is composed while one runs, so what happens during a step is seen one step later.

The clock counts ticks of 10 ps in int64 (2.9 years), so sums of step times are exact and independent of their order. At
one tick the order is: step ends, deadlines, arrivals, retries; then every idle replica that was touched schedules.

All compiled functions are in this one file, because numba's cache sees only changes of the file of the function called.
"""

from heapq import heappop, heappush
from typing import Any, NamedTuple

import numpy as np
from numba import njit

TICKS = 100_000_000_000  # per second
NEVER: Any = np.int64(2**62)

# States of an attempt; those from OK on are final.
QUEUED, RUNNING, OK, TIMEOUT, QUEUE_FULL, UNSERVABLE = range(6)
ROUND_ROBIN, RANDOM, LEAST_OUTSTANDING = range(3)
# Kinds of events, in their order at one tick. Arrivals come from a sorted array, just before the retries.
STEP_END, DEADLINE, RETRY = range(3)
# What a sample of the time series accumulates: time integrals, except KV_PEAK and PREEMPTIONS.
RUNNING_TIME, WAITING_TIME, KV_PEAK, PREEMPTIONS, TOKENS = range(5)

# Kinds of the event log. FIRST is the first token, REJECT a 429 or 400, GIVE_UP a client's timeout.
ARRIVE, ADMIT, PREEMPT, FIRST, FINISH, REJECT, GIVE_UP = range(7)

SAMPLES = 512

EVENT = np.dtype(
    [
        ("time", np.int64),  # ticks
        ("attempt", np.int64),  # row of the attempts
        ("kind", np.int32),
        ("replica", np.int32),  # -1 if it reached none
    ],
    align=True,
)

STEP = np.dtype(
    [
        ("start", np.int64),
        ("ticks", np.int64),  # how long it takes
        ("replica", np.int32),
        ("sequences", np.int32),  # scheduled in it
        ("tokens", np.int32),  # computed by it
        ("running", np.int32),  # at its start
        ("waiting", np.int32),
        ("free", np.int32),  # blocks
        ("preemptions", np.int64),  # of the replica so far
    ],
    align=True,
)

ATTEMPT = np.dtype(
    [
        ("request", np.int64),
        ("sent", np.int64),  # by the client
        ("first", np.int64),  # step end of the first token
        ("last", np.int64),  # and of the last one so far
        ("ended", np.int64),
        ("prompt", np.int32),
        ("output", np.int32),  # tokens that it will generate
        ("computed", np.int32),  # tokens whose keys and values are in the cache (or will be after the step in flight)
        ("generated", np.int32),
        ("in_flight", np.int32),  # tokens scheduled but not yet received; always 0 with synchronous scheduling
        ("blocks", np.int32),
        ("preemptions", np.int32),
        ("replica", np.int32),
        ("next", np.int32),  # in the queue of its replica
        ("previous", np.int32),
        ("number", np.int32),  # of the attempt, from 1
        ("state", np.int32),
    ],
    align=True,
)

REPLICA = np.dtype(
    [
        ("free", np.int64),  # blocks
        ("running", np.int64),  # how many
        ("waiting", np.int64),
        ("head", np.int64),  # of the queue; -1 if empty
        ("tail", np.int64),
        ("aborted", np.int64),  # among the running: they leave at the next schedule
        ("busy", np.int64),  # a step is in flight
        ("slot", np.int64),  # where the plan of the step in flight, or of the last one, lies
        ("queued", np.int64),  # the other slot holds the next step's plan
        ("gpu_ticks", np.int64),  # of the last composed step
        ("decode_only", np.int64),  # was that one
        ("since", np.int64),  # the time series is accounted up to here
        ("token_rate", np.float64),  # of the step in flight, per tick
        ("steps", np.int64),
        ("computed", np.int64),  # tokens computed
        ("lost", np.int64),  # tokens of these whose cache entries were given up by preemption
        ("preemptions", np.int64),
    ],
    align=True,
)

PLAN = np.dtype([("size", np.int64), ("tokens", np.int64), ("ticks", np.int64)], align=True)


class Limits(NamedTuple):
    """What bounds the engines and the client, all as int."""

    replicas: int
    blocks: int  # usable by one replica
    block_size: int
    max_seqs: int
    budget: int
    max_model_len: int
    asynchronous: int
    full_gate: int
    watermark: int
    router: int
    queue_limit: int
    timeout: int  # ticks
    retries: int
    backoff: int  # ticks: full jitter below backoff * 2**(attempt - 1), at most backoff_cap
    backoff_cap: int
    ingest: int  # ticks from sending to the queue
    ingest_per_token: int
    delivery: int  # ticks from the step end of the last token to the end at the client


class StepCost(NamedTuple):
    """Constants of the roofline in seconds, see step_time.py."""

    weights: float
    experts: float
    log_unrouted: float
    per_token: float
    per_sequence: float
    knee: float
    per_kv_token: float
    per_attention_pair: float
    reduce: float
    reduce_per_token: float
    host: float
    host_per_sequence: float
    gap: float
    points: np.ndarray  # (k, 2) tokens and seconds of a measured table in place of the GEMMs; (0, 2) without one


@njit
def _between(points: np.ndarray, tokens: float) -> float:
    """The line through the neighbouring points, drawn on beyond the first and the last, at `tokens`; at least 0."""
    at = 1
    while at < points.shape[0] - 1 and points[at, 0] < tokens:
        at += 1
    rise = (points[at, 1] - points[at - 1, 1]) / (points[at, 0] - points[at - 1, 0])
    return max(0.0, points[at - 1, 1] + rise * (tokens - points[at - 1, 0]))


@njit(cache=True)
def gpu_seconds(cost: StepCost, tokens: float, sequences: float, kv_tokens: float, attention_pairs: float) -> float:
    """t_gpu of a step; `kv_tokens` is D + R and `attention_pairs` is Q of step_time.py."""
    attention = cost.per_kv_token * kv_tokens + cost.per_attention_pair * attention_pairs
    if cost.points.shape[0] > 0:
        return _between(cost.points, tokens) + cost.per_sequence * sequences + attention
    memory = cost.weights
    if cost.experts > 0.0:
        memory += cost.experts * (1.0 - np.exp(tokens * cost.log_unrouted))
    compute = cost.per_token * tokens + cost.per_sequence * sequences
    low, high = min(memory, compute), max(memory, compute)
    gemm = high * (1.0 + (low / high) ** cost.knee) ** (1.0 / cost.knee)
    return gemm + attention + cost.reduce + cost.reduce_per_token * tokens


@njit
def _ticks(seconds: float) -> Any:
    return np.int64(np.rint(seconds * TICKS))


@njit
def _blocks(tokens: int, block_size: int) -> int:
    return (tokens + block_size - 1) // block_size


@njit
def _random(state: np.ndarray) -> Any:
    """The next of the splitmix64 stream in `state[0]`, as a float in [0, 1)."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return np.float64(z >> np.uint64(11)) * 2.0**-53


@njit
def _seen(limits: Limits, sent: Any, prompt: int) -> Any:
    """When the cluster sees a request that is sent at `sent`."""
    return sent + limits.ingest + limits.ingest_per_token * prompt


# The queue of a replica: a doubly linked list through the attempts.


@njit
def _append(me: Any, attempts: np.ndarray, a: int) -> None:
    attempts[a].next = -1
    attempts[a].previous = me.tail
    if me.tail >= 0:
        attempts[me.tail].next = a
    else:
        me.head = a
    me.tail = a
    me.waiting += 1


@njit
def _prepend(me: Any, attempts: np.ndarray, a: int) -> None:
    attempts[a].previous = -1
    attempts[a].next = me.head
    if me.head >= 0:
        attempts[me.head].previous = a
    else:
        me.tail = a
    me.head = a
    me.waiting += 1


@njit
def _unlink(me: Any, attempts: np.ndarray, a: int) -> None:
    before, after = attempts[a].previous, attempts[a].next
    if before >= 0:
        attempts[before].next = after
    else:
        me.head = after
    if after >= 0:
        attempts[after].previous = before
    else:
        me.tail = before
    me.waiting -= 1


@njit
def _drop_done(me: Any, attempts: np.ndarray, running: np.ndarray) -> None:
    """Take what is in a final state out of the running, keeping their order; free the blocks it still holds."""
    kept = 0
    for i in range(me.running):
        a = running[i]
        if attempts[a].state >= OK:
            me.free += attempts[a].blocks
            attempts[a].blocks = 0
        else:
            running[kept] = a
            kept += 1
    me.running = kept
    me.aborted = 0


@njit
def _preempt_last(me: Any, attempts: np.ndarray, running: np.ndarray) -> int:
    """Give up the last admitted: its blocks are freed, it goes to the head of the queue and will compute all again."""
    me.running -= 1
    a = running[me.running]
    it = attempts[a]
    me.free += it.blocks
    me.lost += it.computed
    me.preemptions += 1
    it.blocks = 0
    it.computed = 0
    it.preemptions += 1
    it.state = QUEUED
    _prepend(me, attempts, a)
    return a


class _Replicas(NamedTuple):
    """All that the replicas own; the first axis is the replica."""

    state: np.ndarray  # REPLICA
    running: np.ndarray  # (, max_seqs) attempts in the order of their admission
    plans: np.ndarray  # (, 2) PLAN: of the step in flight and of the next or the last one
    entries: np.ndarray  # (, 2, max_seqs) their sequences: `attempt << 1 | emits`, whether the step yields a new token
    samples: np.ndarray  # (, SAMPLES, 5)
    width: np.ndarray  # (1,) ticks of a sample
    events: np.ndarray  # EVENT; empty unless asked for, and never full
    steps: np.ndarray  # STEP; likewise
    logged: np.ndarray  # (2,) how many events and steps were


@njit
def _log(engines: _Replicas, now: Any, kind: int, attempt: int, replica: int) -> None:
    if engines.events.size > 0:
        it = engines.events[engines.logged[0]]
        it.time = now
        it.kind = kind
        it.attempt = attempt
        it.replica = replica
        engines.logged[0] += 1


@njit
def _compose(engines: _Replicas, r: int, attempts: np.ndarray, limits: Limits, cost: StepCost, now: Any) -> Any:
    """Schedule a step of replica `r` into the slot that is not in flight; returns the number of its sequences."""
    me = engines.state[r]
    running = engines.running[r]
    before = engines.plans[r, me.slot]
    before_entries = engines.entries[r, me.slot]
    entries = engines.entries[r, 1 - me.slot]
    if me.aborted > 0:
        _drop_done(me, attempts, running)
    budget = limits.budget
    size = 0
    kv_tokens = 0
    pairs = 0.0
    decode_only = True
    same = True
    preempted = False

    i = 0
    while i < me.running and budget > 0:
        a = running[i]
        it = attempts[a]
        if it.in_flight > 0 and it.computed + 2 - it.in_flight >= it.prompt + it.output:
            i += 1  # the step in flight already yields its last token
            continue
        target = it.prompt + it.generated + it.in_flight
        new = min(target - it.computed, budget)
        need = _blocks(it.computed + new, limits.block_size) - it.blocks
        victim = -1
        while need > me.free and victim != a:
            victim = _preempt_last(me, attempts, running)
            _log(engines, now, PREEMPT, victim, r)
            preempted = True
        if victim == a:
            break
        me.free -= need
        it.blocks += need
        if new == 1 and it.computed >= it.prompt:
            kv_tokens += it.computed + 1
        else:
            decode_only = False
            kv_tokens += it.computed
            pairs += new * (it.computed + new / 2)
        it.computed += new
        emits = it.computed == target
        if emits:
            it.in_flight += limits.asynchronous
        entry = (a << 1) | np.int64(emits)
        same = same and size < before.size and before_entries[size] == entry
        entries[size] = entry
        size += 1
        budget -= new
        i += 1

    if not preempted:
        while me.head >= 0 and budget > 0 and me.running < limits.max_seqs:
            a = me.head
            it = attempts[a]
            known = it.prompt + it.generated
            new = min(known, budget)
            watermark = limits.watermark if me.running > 0 else 0
            need = _blocks(new, limits.block_size)
            if (_blocks(known, limits.block_size) if limits.full_gate else need) + watermark > me.free:
                break  # the head of the queue blocks all behind it, and never preempts
            _unlink(me, attempts, a)
            running[me.running] = a
            me.running += 1
            it.state = RUNNING
            _log(engines, now, ADMIT, a, r)
            me.free -= need
            it.blocks = need
            pairs += new * (new / 2)
            decode_only = False
            it.computed = new
            emits = new == known
            if emits:
                it.in_flight += limits.asynchronous
            entries[size] = (a << 1) | np.int64(emits)
            size += 1
            budget -= new

    if size > 0:
        tokens = limits.budget - budget
        if decode_only and same and size == before.size and me.decode_only:
            # The same sequences, each one token longer: an exact arithmetic progression in ticks.
            me.gpu_ticks += _ticks(cost.per_kv_token * size)
        else:
            me.gpu_ticks = _ticks(gpu_seconds(cost, float(tokens), float(size), float(kv_tokens), pairs))
        me.decode_only = decode_only
        host = _ticks(cost.host + cost.host_per_sequence * size)
        duration = max(me.gpu_ticks, host) + _ticks(cost.gap) if limits.asynchronous else me.gpu_ticks + host
        plan = engines.plans[r, 1 - me.slot]
        plan.size = size
        plan.tokens = tokens
        plan.ticks = max(1, duration)
    return size


@njit
def _receive_tokens(
    engines: _Replicas,
    r: int,
    attempts: np.ndarray,
    limits: Limits,
    now: Any,
    token_ticks: np.ndarray,
    token_start: np.ndarray,
) -> None:
    """The step in flight has ended: what emits gets one more token; the finished leave and free their blocks."""
    me = engines.state[r]
    entries = engines.entries[r, me.slot]
    finished = False
    for k in range(engines.plans[r, me.slot].size):
        if not entries[k] & 1:
            continue
        a = entries[k] >> 1
        it = attempts[a]
        if it.state >= OK:
            continue  # timed out while the step ran: its token is dropped
        if it.generated == 0:
            it.first = now
            _log(engines, now, FIRST, a, r)
        it.last = now
        if token_ticks.size > 0:
            token_ticks[token_start[it.request] + it.generated] = now
        it.generated += 1
        it.in_flight -= limits.asynchronous
        if it.generated == it.output:
            if it.state == QUEUED:
                _unlink(me, attempts, a)  # preempted with its last token in flight: nothing has to be computed again
                me.lost -= it.prompt + it.output - 1
            else:
                finished = True
            _log(engines, now, FINISH, a, r)
            it.state = OK
            it.ended = now + limits.delivery
    if finished:
        _drop_done(me, attempts, engines.running[r])
    me.busy = 0


@njit
def _start_steps(engines: _Replicas, r: int, attempts: np.ndarray, limits: Limits, cost: StepCost, now: Any) -> Any:
    """Let an idle replica start its next step, if there is one; returns the ticks that it takes, or 0."""
    me = engines.state[r]
    preemptions = me.preemptions
    if me.queued or _compose(engines, r, attempts, limits, cost, now) > 0:
        me.queued = 0
        me.slot = 1 - me.slot
        me.busy = 1
        if limits.asynchronous:
            me.queued = _compose(engines, r, attempts, limits, cost, now) > 0
    engines.samples[r, now // engines.width[0], PREEMPTIONS] += me.preemptions - preemptions
    if not me.busy:
        me.token_rate = 0.0
        return 0
    plan = engines.plans[r, me.slot]
    me.token_rate = plan.tokens / plan.ticks
    me.steps += 1
    me.computed += plan.tokens
    if engines.steps.size > 0:
        it = engines.steps[engines.logged[1]]
        it.start = now
        it.ticks = plan.ticks
        it.replica = r
        it.sequences = plan.size
        it.tokens = plan.tokens
        it.running = me.running
        it.waiting = me.waiting
        it.free = me.free
        it.preemptions = me.preemptions
        engines.logged[1] += 1
    return plan.ticks


@njit
def _account(engines: _Replicas, r: int, blocks: int, now: Any) -> None:
    """Add the state that held since the last call to the samples."""
    me = engines.state[r]
    width = engines.width[0]
    start = me.since
    me.since = now
    while start < now:
        at = start // width
        end = min(now, (at + 1) * width)
        sums = engines.samples[r, at]
        sums[RUNNING_TIME] += me.running * (end - start)
        sums[WAITING_TIME] += me.waiting * (end - start)
        sums[TOKENS] += me.token_rate * (end - start)
        sums[KV_PEAK] = max(sums[KV_PEAK], (blocks - me.free) / blocks)
        start = end


@njit
def _widen(samples: np.ndarray, width: np.ndarray, now: Any) -> None:
    """Merge neighbouring samples until `now` lies in the last one or before."""
    while now >= width[0] * SAMPLES:
        for r in range(samples.shape[0]):
            for i in range(SAMPLES // 2):
                for q in range(samples.shape[2]):
                    a, b = samples[r, 2 * i, q], samples[r, 2 * i + 1, q]
                    samples[r, i, q] = max(a, b) if q == KV_PEAK else a + b
            samples[r, SAMPLES // 2 :, :] = 0.0
        width[0] *= 2


@njit
def _route(replicas: np.ndarray, limits: Limits, turn: np.ndarray, random: np.ndarray) -> Any:
    """The replica for the next arrival; `turn` counts them."""
    if limits.router == RANDOM:
        return np.int64(_random(random) * limits.replicas)
    if limits.router == ROUND_ROBIN:
        turn[0] += 1
        return (turn[0] - 1) % limits.replicas
    best, least, ties = 0, NEVER, 0
    for r in range(limits.replicas):
        load = replicas[r].running + replicas[r].waiting - replicas[r].aborted
        if load < least:
            best, least, ties = r, load, 1
        elif load == least:
            ties += 1
            if _random(random) * ties < 1.0:
                best = r
    return best


@njit
def _fail(
    events: list, attempts: np.ndarray, a: int, state: int, ended: Any, limits: Limits, jitter: np.ndarray
) -> None:
    """Attempt `a` is over; its client tries again later, unless no retry is left or the request can never fit."""
    it = attempts[a]
    it.state = state
    it.ended = ended
    if state != UNSERVABLE and it.number <= limits.retries:
        longest = limits.backoff_cap
        if it.number < 20:  # beyond, the cap holds and the shift would overflow
            longest = min(longest, limits.backoff << (it.number - 1))
        arrival = _seen(limits, ended + np.int64(_random(jitter) * longest), it.prompt)
        heappush(events, (max(arrival, ended + 1), np.int64(RETRY), np.int64(a)))


@njit
def _new_attempt(it: Any, request: int, number: int, sent: Any, prompt: int, output: int) -> None:
    it.request = request
    it.number = number
    it.sent = sent
    it.prompt = prompt
    it.output = output
    it.first = it.last = it.ended = it.replica = -1


@njit
def _enter(
    engines: _Replicas,
    attempts: np.ndarray,
    a: int,
    events: list,
    limits: Limits,
    turn: np.ndarray,
    randoms: np.ndarray,
    now: Any,
) -> Any:
    """Attempt `a` reaches the cluster: refused, or queued at a replica, whose number is returned (else -1)."""
    it = attempts[a]
    total = np.int64(it.prompt) + it.output
    if total > limits.max_model_len or _blocks(total, limits.block_size) > limits.blocks:
        _log(engines, now, REJECT, a, -1)
        _fail(events, attempts, a, UNSERVABLE, now, limits, randoms[1])
        return -1
    r = _route(engines.state, limits, turn, randoms[0])
    it.replica = r
    me = engines.state[r]
    if me.waiting >= limits.queue_limit:
        _log(engines, now, REJECT, a, r)
        _fail(events, attempts, a, QUEUE_FULL, now, limits, randoms[1])
        return -1
    _account(engines, r, limits.blocks, now)
    _append(me, attempts, a)
    _log(engines, now, ARRIVE, a, r)
    if limits.timeout < NEVER:
        deadline = it.sent + limits.timeout - limits.delivery
        heappush(events, (max(now + 1, deadline), np.int64(DEADLINE), np.int64(a)))
    return r


@njit
def _give_up(
    engines: _Replicas, attempts: np.ndarray, a: int, events: list, limits: Limits, jitter: np.ndarray, now: Any
) -> None:
    """The client of attempt `a` has waited long enough: what waits leaves at once, what runs at the next schedule."""
    it = attempts[a]
    if it.state >= OK:
        return
    me = engines.state[it.replica]
    _account(engines, it.replica, limits.blocks, now)
    if it.state == QUEUED:
        _unlink(me, attempts, a)
    else:
        me.aborted += 1
    _log(engines, now, GIVE_UP, a, it.replica)
    _fail(events, attempts, a, TIMEOUT, max(now, it.sent + limits.timeout), limits, jitter)


@njit
def _with_room(engines: _Replicas) -> _Replicas:
    """The same, with room in the logs for whatever one arrival or one tick of all replicas can write."""
    events, steps = engines.events, engines.steps
    room = 4 * engines.running.size
    if events.size and engines.logged[0] + room > events.size:
        more = np.empty(2 * events.size + room, EVENT)
        more[: engines.logged[0]] = events[: engines.logged[0]]
        events = more
    if steps.size and engines.logged[1] + 2 * engines.state.size > steps.size:
        longer = np.empty(2 * steps.size + 2 * engines.state.size, STEP)
        longer[: engines.logged[1]] = steps[: engines.logged[1]]
        steps = longer
    return _Replicas(
        engines.state,
        engines.running,
        engines.plans,
        engines.entries,
        engines.samples,
        engines.width,
        events,
        steps,
        engines.logged,
    )


@njit(cache=True, nogil=True)
def run_cluster(
    arrival: np.ndarray,
    prompt: np.ndarray,
    output: np.ndarray,
    limits: Limits,
    cost: StepCost,
    seeds: np.ndarray,
    token_start: np.ndarray,
    token_total: int,
    width: int,
    log_events: bool,
    log_steps: bool,
) -> Any:
    """Run requests through the cluster until none is left.

    Parameters
    ----------
    arrival, prompt, output
        (n,) int64 ticks at which the clients send, ascending by when the engines see them; int32 tokens, all >= 1.
    seeds
        (2, 1) uint64: of the router and of the retry jitter.
    token_start, token_total
        (n,) int64 offsets into the (token_total,) ticks of the tokens of the last attempts; token_total 0 keeps none.
    width
        Ticks of the first samples of the time series; doubled whenever SAMPLES do not reach far enough.
    log_events, log_steps
        Whether to keep a row of every event in a request's life, and of every step.

    Returns
    -------
    attempts (ATTEMPT; the first n are the first ones of the requests, then the retries), replicas (REPLICA), samples
    (replicas, SAMPLES, 5), their width in ticks, the tick of the end, the token ticks, the events (EVENT) and the steps
    (STEP).
    """
    n = arrival.size
    attempts = np.zeros(n, ATTEMPT)
    used = n
    for a in range(n):
        _new_attempt(attempts[a], a, 1, arrival[a], prompt[a], output[a])
    engines = _Replicas(
        np.zeros(limits.replicas, REPLICA),
        np.empty((limits.replicas, limits.max_seqs), np.int64),
        np.zeros((limits.replicas, 2), PLAN),
        np.empty((limits.replicas, 2, limits.max_seqs), np.int64),
        np.zeros((limits.replicas, SAMPLES, 5)),
        np.array([width]),
        np.empty(4 * limits.replicas * limits.max_seqs + n if log_events else 0, EVENT),
        np.empty(2 * limits.replicas + n if log_steps else 0, STEP),
        np.zeros(2, np.int64),
    )
    engines.state["free"][:] = limits.blocks
    engines.state["head"][:] = -1
    engines.state["tail"][:] = -1
    turn = np.zeros(1, np.int64)
    randoms = seeds.copy()
    token_ticks = np.full(token_total, np.int64(-1))
    touched = np.empty(limits.replicas, np.int64)
    is_touched = np.zeros(limits.replicas, np.bool_)
    events = [(NEVER, np.int64(STEP_END), np.int64(0))]  # the sentinel gives the type, and is never reached
    now: Any = np.int64(0)
    arrived = 0
    coming: Any = _seen(limits, arrival[0], prompt[0])

    while True:
        if min(coming, events[0][0]) == NEVER:
            break
        now = min(coming, events[0][0])
        _widen(engines.samples, engines.width, now)
        if log_events or log_steps:
            engines = _with_room(engines)
        touches = 0

        while min(coming, events[0][0]) == now:
            if events[0][0] == now and (events[0][1] < RETRY or coming > now):
                _, kind, who = heappop(events)
                if kind == DEADLINE:
                    _give_up(engines, attempts, who, events, limits, randoms[1], now)
                    continue
                if kind == STEP_END:
                    r = who
                    _account(engines, r, limits.blocks, now)
                    _receive_tokens(engines, r, attempts, limits, now, token_ticks, token_start)
                else:
                    if used == attempts.size:
                        larger = np.zeros(2 * used, ATTEMPT)
                        larger[:used] = attempts
                        attempts = larger
                    old = attempts[who]
                    sent = now - _seen(limits, 0, old.prompt)
                    _new_attempt(attempts[used], old.request, old.number + 1, sent, old.prompt, old.output)
                    r = _enter(engines, attempts, used, events, limits, turn, randoms, now)
                    used += 1
            else:
                r = _enter(engines, attempts, arrived, events, limits, turn, randoms, now)
                arrived += 1
                coming = _seen(limits, arrival[arrived], prompt[arrived]) if arrived < n else NEVER
                if log_events:
                    engines = _with_room(engines)
            if r >= 0 and not engines.state[r].busy and not is_touched[r]:
                is_touched[r] = True
                touched[touches] = r
                touches += 1

        for t in range(touches):
            r = touched[t]
            is_touched[r] = False
            _account(engines, r, limits.blocks, now)
            duration = _start_steps(engines, r, attempts, limits, cost, now)
            if duration > 0:
                heappush(events, (now + duration, np.int64(STEP_END), np.int64(r)))

    for last in range(limits.replicas):
        _account(engines, last, limits.blocks, now)
    events_kept, steps_kept = engines.events[: engines.logged[0]], engines.steps[: engines.logged[1]]
    return (
        attempts[:used],
        engines.state,
        engines.samples,
        engines.width[0],
        now,
        token_ticks,
        events_kept,
        steps_kept,
    )
