"""The step loop of the simulated cluster, compiled: engines that schedule like vLLM v1, with KV blocks counted.

There is no prefill or decode mode, only `computed` chasing `prompt + generated`. A step first serves the running requests
in the order of their admission (each takes the blocks it needs; when none is free the last admitted is preempted and
recomputes later), then, if it preempted nobody, admits from the head of the queue. With asynchronous scheduling the next
step is composed while one runs, so what happens during a step is seen one step later.

The clock counts ticks of 10 ps in int64 (2.9 years), so sums of step times are exact and independent of their order. At
one tick the order is: step ends, deadlines, arrivals, retries; then every idle replica that was touched schedules.

All compiled functions are in this one file, because numba's cache sees only changes of the file of the function called.
"""

from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np
from numba import njit

TICKS = 100_000_000_000  # per second
NEVER = np.int64(2**62)

# States of an attempt; those from OK on are final.
QUEUED, RUNNING, OK, TIMEOUT, QUEUE_FULL, UNSERVABLE = range(6)
ROUND_ROBIN, RANDOM, LEAST_OUTSTANDING = range(3)
# Kinds of events, in their order at one tick. Arrivals come from a sorted array, just before the retries.
STEP_END, DEADLINE, RETRY = range(3)
# What a sample of the time series accumulates: time integrals, except KV_PEAK and PREEMPTIONS.
RUNNING_TIME, WAITING_TIME, KV_PEAK, PREEMPTIONS, TOKENS = range(5)

SAMPLES = 512

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


@njit(cache=True)
def gpu_seconds(cost, tokens, sequences, kv_tokens, attention_pairs):
    """t_gpu of a step; `kv_tokens` is D + R and `attention_pairs` is Q of step_time.py."""
    memory = cost.weights
    if cost.experts > 0.0:
        memory += cost.experts * (1.0 - np.exp(tokens * cost.log_unrouted))
    compute = cost.per_token * tokens + cost.per_sequence * sequences
    low, high = min(memory, compute), max(memory, compute)
    gemm = high * (1.0 + (low / high) ** cost.knee) ** (1.0 / cost.knee)
    attention = cost.per_kv_token * kv_tokens + cost.per_attention_pair * attention_pairs
    return gemm + attention + cost.reduce + cost.reduce_per_token * tokens


@njit(cache=True)
def _ticks(seconds):
    return np.int64(np.rint(seconds * TICKS))


@njit(cache=True)
def _blocks(tokens, block_size):
    return (tokens + block_size - 1) // block_size


@njit(cache=True)
def _random(state):
    """The next of the splitmix64 stream in `state[0]`, as a float in [0, 1)."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return np.float64(z >> np.uint64(11)) * 2.0**-53


# The queue of a replica: a doubly linked list through the attempts.


@njit(cache=True)
def _append(me, attempts, a):
    attempts[a].next = -1
    attempts[a].previous = me.tail
    if me.tail >= 0:
        attempts[me.tail].next = a
    else:
        me.head = a
    me.tail = a
    me.waiting += 1


@njit(cache=True)
def _prepend(me, attempts, a):
    attempts[a].previous = -1
    attempts[a].next = me.head
    if me.head >= 0:
        attempts[me.head].previous = a
    else:
        me.tail = a
    me.head = a
    me.waiting += 1


@njit(cache=True)
def _unlink(me, attempts, a):
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


@njit(cache=True)
def _drop_done(me, attempts, running):
    """Take the attempts that are in a final state out of the running ones, in order; free the blocks they still hold."""
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


@njit(cache=True)
def _preempt_last(me, attempts, running):
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


@njit(cache=True)
def _compose(me, attempts, running, plan, before, into, entries, entries_before, limits, cost):
    """Schedule one step of a replica into `plan[into]`; an empty plan has size 0.

    An entry is `attempt << 1 | emits`: whether its last known token is computed, so that the step yields a new one.
    """
    if me.aborted > 0:
        _drop_done(me, attempts, running)
        me.aborted = 0
    budget = limits.budget
    size = 0
    kv_tokens = 0
    pairs = 0.0
    decode_only = True
    same = True
    preempted = me.preemptions

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
        same = same and size < plan[before].size and entries_before[size] == entry
        entries[size] = entry
        size += 1
        budget -= new
        i += 1

    if me.preemptions == preempted:
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
            me.free -= need
            it.blocks = need
            pairs += new * (new / 2)
            decode_only = False
            it.computed = new
            emits = new == known
            if emits:
                it.in_flight += limits.asynchronous
            entries[size] = (a << 1) | np.int64(emits)
            same = False
            size += 1
            budget -= new

    plan[into].size = size
    if size == 0:
        return
    tokens = limits.budget - budget
    plan[into].tokens = tokens
    if decode_only and same and size == plan[before].size and me.decode_only:
        # The same sequences, each one token longer: an exact arithmetic progression in ticks.
        me.gpu_ticks += _ticks(cost.per_kv_token * size)
    else:
        me.gpu_ticks = _ticks(gpu_seconds(cost, float(tokens), float(size), float(kv_tokens), pairs))
    me.decode_only = decode_only
    host = _ticks(cost.host + cost.host_per_sequence * size)
    if limits.asynchronous:
        plan[into].ticks = max(1, max(me.gpu_ticks, host) + _ticks(cost.gap))
    else:
        plan[into].ticks = max(1, me.gpu_ticks + host)


@njit(cache=True)
def _receive_tokens(me, attempts, running, plan, entries, limits, now, token_ticks, token_start):
    """The step in flight has ended: every entry that emits gets one more token; the finished leave and free their blocks."""
    finished = False
    for k in range(plan[me.slot].size):
        if not entries[k] & 1:
            continue
        a = entries[k] >> 1
        it = attempts[a]
        if it.state >= OK:
            continue  # timed out while the step ran: its token is dropped
        if it.generated == 0:
            it.first = now
        it.last = now
        if token_ticks.size > 0:
            token_ticks[token_start[it.request] + it.generated] = now
        it.generated += 1
        it.in_flight -= limits.asynchronous
        if it.generated == it.output:
            if it.state == QUEUED:
                _unlink(me, attempts, a)  # preempted with its last token in flight
            else:
                finished = True
            it.state = OK
            it.ended = now + limits.delivery
    if finished:
        _drop_done(me, attempts, running)  # the aborted leave with them, as they would at the schedule that follows
        me.aborted = 0
    me.busy = 0


@njit(cache=True)
def _account(me, sums, clock, blocks, now):
    """Add the state that held since the last call to the samples `sums[sample, quantity]`; `clock[0]` is their width."""
    used = (blocks - me.free) / blocks
    start = me.since
    me.since = now
    while start < now:
        sample = start // clock[0]
        end = min(now, (sample + 1) * clock[0])
        sums[sample, RUNNING_TIME] += me.running * (end - start)
        sums[sample, WAITING_TIME] += me.waiting * (end - start)
        sums[sample, TOKENS] += me.token_rate * (end - start)
        sums[sample, KV_PEAK] = max(sums[sample, KV_PEAK], used)
        start = end


@njit(cache=True)
def _widen(samples, clock, now):
    """Merge neighbouring samples until `now` lies in the last one or before."""
    while now >= clock[0] * SAMPLES:
        for r in range(samples.shape[0]):
            for i in range(SAMPLES // 2):
                for q in range(samples.shape[2]):
                    a, b = samples[r, 2 * i, q], samples[r, 2 * i + 1, q]
                    samples[r, i, q] = max(a, b) if q == KV_PEAK else a + b
            samples[r, SAMPLES // 2 :, :] = 0.0
        clock[0] *= 2


@njit(cache=True)
def _route(replicas, limits, counter, random):
    if limits.router == RANDOM:
        return np.int64(_random(random) * limits.replicas)
    if limits.router == ROUND_ROBIN:
        counter[0] += 1
        return (counter[0] - 1) % limits.replicas
    best, ties = 0, 1
    for r in range(limits.replicas):
        load = replicas[r].running + replicas[r].waiting - replicas[r].aborted
        least = replicas[best].running + replicas[best].waiting - replicas[best].aborted
        if r > 0 and load < least:
            best, ties = r, 1
        elif r > 0 and load == least:
            ties += 1
            if _random(random) * ties < 1.0:
                best = r
    return best


@njit(cache=True)
def _fail(events, attempts, a, state, ended, limits, random):
    """Attempt `a` is over; its client tries again later unless it has used its retries or the request can never be served."""
    it = attempts[a]
    it.state = state
    it.ended = ended
    if state != UNSERVABLE and it.number <= limits.retries:
        longest = limits.backoff_cap
        if it.number < 20:  # beyond, the cap holds and the shift would overflow
            longest = min(longest, limits.backoff << (it.number - 1))
        wait = np.int64(_random(random) * longest)
        arrival = ended + wait + limits.ingest + limits.ingest_per_token * it.prompt
        heappush(events, (max(arrival, ended + 1), np.int64(RETRY), np.int64(a)))


@njit(cache=True)
def run_cluster(arrival, prompt, output, limits, cost, seeds, token_start, token_total, width):
    """Run requests through the cluster until none is left.

    Parameters
    ----------
    arrival, prompt, output
        (n,) int64 ticks at which the clients send, ascending by the time at which the engines see them; int32 tokens.
    seeds
        (2,) uint64: of the router and of the retry jitter.
    token_start, token_total
        (n,) int64 offsets into the (token_total,) ticks of all tokens of the last attempts; token_total 0 keeps none.
    width
        Ticks of the first samples of the time series.

    Returns
    -------
    attempts (ATTEMPT; the first n are the first attempts), replicas (REPLICA), samples (replicas, SAMPLES, 5), their width
    in ticks, the tick of the end, and the token ticks.
    """
    n = arrival.size
    attempts = np.zeros(n, ATTEMPT)
    used = n
    for a in range(n):
        attempts[a].request = a
        attempts[a].sent = arrival[a]
        attempts[a].first = -1
        attempts[a].last = -1
        attempts[a].ended = -1
        attempts[a].prompt = prompt[a]
        attempts[a].output = output[a]
        attempts[a].replica = -1
        attempts[a].number = 1
    replicas = np.zeros(limits.replicas, REPLICA)
    for r in range(limits.replicas):
        replicas[r].free = limits.blocks
        replicas[r].head = -1
        replicas[r].tail = -1
    running = np.empty((limits.replicas, limits.max_seqs), np.int64)
    # A step holds at most max_seqs sequences, of one token or more each.
    entries = np.empty((limits.replicas, 2, min(limits.max_seqs, limits.budget)), np.int64)
    plans = np.zeros((limits.replicas, 2), PLAN)
    samples = np.zeros((limits.replicas, SAMPLES, 5))
    clock = np.array([width])
    counter = np.zeros(1, np.int64)
    for_router, for_jitter = seeds[:1].copy(), seeds[1:].copy()
    token_ticks = np.full(token_total, np.int64(-1))
    touched = np.empty(limits.replicas, np.int64)
    is_touched = np.zeros(limits.replicas, np.bool_)
    events = [(NEVER, np.int64(STEP_END), np.int64(0))]  # the sentinel tells numba the type, and is never reached
    now = np.int64(0)
    arrived = 0

    while True:
        coming = NEVER
        if arrived < n:
            coming = arrival[arrived] + limits.ingest + limits.ingest_per_token * prompt[arrived]
        if min(coming, events[0][0]) == NEVER:
            break
        now = min(coming, events[0][0])
        _widen(samples, clock, now)
        touches = 0

        while True:
            kind, who = RETRY, np.int64(-1)
            if events[0][0] == now and (events[0][1] < RETRY or coming > now):
                _, kind, who = heappop(events)
            elif coming > now:
                break

            if kind == STEP_END:
                me = replicas[who]
                _account(me, samples[who], clock, limits.blocks, now)
                _receive_tokens(
                    me, attempts, running[who], plans[who], entries[who, me.slot], limits, now, token_ticks, token_start
                )
                r = who

            elif kind == DEADLINE:
                it = attempts[who]
                if it.state >= OK:
                    continue
                r = np.int64(it.replica)
                me = replicas[r]
                _account(me, samples[r], clock, limits.blocks, now)
                if it.state == QUEUED:
                    _unlink(me, attempts, who)
                else:
                    me.aborted += 1
                _fail(events, attempts, who, TIMEOUT, max(now, it.sent + limits.timeout), limits, for_jitter)
                continue

            else:
                if who < 0:
                    a = np.int64(arrived)
                    arrived += 1
                    coming = NEVER
                    if arrived < n:
                        coming = arrival[arrived] + limits.ingest + limits.ingest_per_token * prompt[arrived]
                else:
                    a = np.int64(used)
                    used += 1
                    if a == attempts.size:
                        larger = np.zeros(2 * a, ATTEMPT)
                        larger[:a] = attempts
                        attempts = larger
                    attempts[a].request = attempts[who].request
                    attempts[a].prompt = attempts[who].prompt
                    attempts[a].output = attempts[who].output
                    attempts[a].number = attempts[who].number + 1
                    attempts[a].sent = now - limits.ingest - limits.ingest_per_token * attempts[a].prompt
                    attempts[a].first = -1
                    attempts[a].last = -1
                    attempts[a].ended = -1
                    attempts[a].replica = -1
                it = attempts[a]
                total = np.int64(it.prompt) + it.output
                if total > limits.max_model_len or _blocks(total, limits.block_size) > limits.blocks:
                    _fail(events, attempts, a, UNSERVABLE, now, limits, for_jitter)
                    continue
                r = _route(replicas, limits, counter, for_router)
                it.replica = r
                me = replicas[r]
                if me.waiting >= limits.queue_limit:
                    _fail(events, attempts, a, QUEUE_FULL, now, limits, for_jitter)
                    continue
                _account(me, samples[r], clock, limits.blocks, now)
                _append(me, attempts, a)
                if limits.timeout < NEVER:
                    heappush(events, (max(now + 1, it.sent + limits.timeout - limits.delivery), np.int64(DEADLINE), a))

            if not replicas[r].busy and not is_touched[r]:
                is_touched[r] = True
                touched[touches] = r
                touches += 1

        for t in range(touches):
            r = touched[t]
            is_touched[r] = False
            me = replicas[r]
            _account(me, samples[r], clock, limits.blocks, now)
            preemptions = me.preemptions
            if me.queued:
                me.queued = 0
                me.slot = 1 - me.slot
                me.busy = 1
            else:
                other = 1 - me.slot
                _compose(
                    me,
                    attempts,
                    running[r],
                    plans[r],
                    me.slot,
                    other,
                    entries[r, other],
                    entries[r, me.slot],
                    limits,
                    cost,
                )
                if plans[r, other].size > 0:
                    me.slot = other
                    me.busy = 1
            me.token_rate = 0.0
            if me.busy:
                step = plans[r, me.slot]
                heappush(events, (now + step.ticks, np.int64(STEP_END), np.int64(r)))
                me.token_rate = step.tokens / step.ticks
                me.steps += 1
                me.computed += step.tokens
                if limits.asynchronous:
                    other = 1 - me.slot
                    _compose(
                        me,
                        attempts,
                        running[r],
                        plans[r],
                        me.slot,
                        other,
                        entries[r, other],
                        entries[r, me.slot],
                        limits,
                        cost,
                    )
                    me.queued = plans[r, other].size > 0
            samples[r, now // clock[0], PREEMPTIONS] += me.preemptions - preemptions

    for r in range(limits.replicas):
        _account(replicas[r], samples[r], clock, limits.blocks, now)
    return attempts[:used], replicas, samples, clock[0], now, token_ticks
