"""The step loop of the simulated cluster, compiled: engines that schedule like vLLM v1.

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

The clock counts ticks of 10 ps in int64 (2.9 years), so sums of step times are exact and independent of their order. At
one tick the order is: step ends, ends of KV transfers, deadlines, arrivals, retries, the autoscaler, replicas up and
down; then every idle replica that was touched schedules, in their order.

Options that are not used are types (None for the pool of blocks or the queue), so that they cost nothing.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from squall.jit import njit
from squall.simulate.blocks import (
    clear,
    find_hits,
    give_back,
    grow,
    holds_invariants,
    inlined,
    lean,
    longest_hit,
    register_prompt,
    release,
    take_hits,
)
from squall.simulate.bundle import bundled
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

TICKS = 100_000_000_000  # per second
NEVER: Any = np.int64(2**62)
UNSETTLED: Any = np.int64(2**42)  # in place of the number of a last step

# States of an attempt; those from OK on are final. TRANSFER: its KV cache is on the way from prefill to decode.
QUEUED, RUNNING, TRANSFER, OK, TIMEOUT, QUEUE_FULL, UNSERVABLE, REFUSED, RESET = range(9)
ROUND_ROBIN, RANDOM, LEAST_OUTSTANDING, LEAST_KV, POWER_OF_TWO, PREFIX_AFFINITY, SESSION_AFFINITY = range(7)
# Kinds of events in the heap, in their order at one tick. Step ends come before them, arrivals just before the retries.
KV_END, DEADLINE, RETRY, SCALE, UP, DOWN = range(6)
# What a sample of the time series accumulates: time integrals, except KV_PEAK and PREEMPTIONS.
RUNNING_TIME, WAITING_TIME, KV_PEAK, PREEMPTIONS, TOKENS = range(5)
# Kinds of the event log. FIRST is the first token, REJECT a 429 or 400 or a refused connection, GIVE_UP a client's
# timeout, RESERVE a decode replica's blocks for a transfer that begins, BREAK a connection lost with its replica.
ARRIVE, ADMIT, PREEMPT, FIRST, FINISH, REJECT, GIVE_UP, RESERVE, BREAK, REPLICA_UP, REPLICA_DOWN, NEW_ROLE = range(12)
# Whether a step mixes prefill and decode (vLLM v1), is of prefills whenever there are any, or admits only when no
# sequence decodes.
MIXED, PREFILL_FIRST, DECODE_FIRST = range(3)
BOTH, PREFILL, DECODE = range(3)  # roles of a replica
OFF, STARTING, READY, DRAINING, CHANGING = range(5)  # DRAINING: before it stops, CHANGING: before its other role
# What the autoscaler looks at (0 = none), or by what prefill and decode replicas change their roles.
BY_QUEUE, BY_KV, BY_RATE, BY_BACKLOG, BY_FORECAST = range(1, 6)
_ALL, _PREFILLS, _DECODES = range(3)

SAMPLES = 512
LONGEST_WINDOW = 1 << 20
LEAST_LOAD = 0.5  # share of a side's capacity below which no replica changes its role
_PLACE = 20  # bits of a place among the running
LIVELOCK = 10_000  # preemptions of one attempt, beyond 10 per token that it generated

EVENT = np.dtype(
    [
        ("time", np.int64),  # ticks
        ("attempt", np.int64),  # row of the attempts; -1 for what happens to a replica
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

TO_COME = np.dtype([("tick", np.int64), ("kind", np.int64), ("who", np.int64)], align=True)

ATTEMPT = np.dtype(
    [
        ("sent", np.int64),  # by the client
        ("first", np.int64),  # step end of the first token
        ("last", np.int64),  # and of the last one so far
        ("ended", np.int64),
        ("request", np.int32),
        ("prompt", np.int32),
        ("output", np.int32),  # tokens that it will generate
        ("generated", np.int32),  # up to date while it does not run
        ("computed", np.int32),  # while it waits: tokens whose keys and values it will not have to compute again
        ("blocks", np.int32),  # while it waits: held for it
        ("cached", np.int32),  # prompt tokens found in the prefix cache at its first admission
        ("preemptions", np.int32),
        ("replica", np.int32),
        ("source", np.int32),  # the prefill replica that still holds its blocks; -1
        ("epoch", np.int32),  # of that replica: another one now, and they are lost
        ("held", np.int32),  # blocks.py: the list of these blocks
        ("node", np.int32),  # and of those held for it where it waits
        ("next", np.int32),  # in the queue of its replica
        ("previous", np.int32),
        ("child", np.int32),
        ("number", np.int16),  # of the attempt, from 1
        ("state", np.int16),
    ],
    align=True,
)

SEQUENCE = np.dtype(
    [
        ("attempt", np.int64),
        ("last", np.int64),  # tick of the last token; -1
        ("request", np.int32),
        ("prompt", np.int32),
        ("output", np.int32),  # tokens to generate here: 1 on a prefill replica
        ("computed", np.int32),  # tokens whose keys and values are in the cache (or will be after the step in flight)
        ("generated", np.int32),  # received
        ("blocks", np.int32),
        ("node", np.int32),  # blocks.py: the list of its blocks
        ("registered", np.int32),  # how many of these can be found
        ("new", np.int32),  # tokens of it in the last composed step
        ("next", np.int32),  # its part in the last composed step: 0 none, 1 scheduled, 3 and yields a token
        ("now", np.int32),  # and in the one before
    ],
    align=True,
)
WORDS = SEQUENCE.itemsize // 8

REPLICA = np.dtype(
    [
        ("blocks", np.int64),  # usable
        ("max_seqs", np.int64),
        ("budget", np.int64),
        ("watermark", np.int64),
        ("role", np.int64),
        ("up", np.int64),
        ("epoch", np.int64),  # how often it lost all it had
        ("since_on", np.int64),  # paid for since
        ("on", np.int64),  # ticks paid for before that
        ("free", np.int64),  # blocks
        ("host_free", np.int64),  # blocks for swapping
        ("running", np.int64),  # how many
        ("waiting", np.int64),
        ("head", np.int64),  # of the FCFS queue; -1 if empty
        ("tail", np.int64),
        ("aborted", np.int64),  # among the running: they leave at the next schedule
        ("orphans", np.int64),  # preempted with a token in flight
        ("busy", np.int64),  # a step is in flight
        ("queued", np.int64),  # the next step is composed
        ("sequences", np.int64),  # of the step in flight
        ("tokens", np.int64),
        ("ticks", np.int64),
        ("next_size", np.int64),  # of the last composed step
        ("next_tokens", np.int64),
        ("next_ticks", np.int64),
        ("next_gpu", np.int64),  # ticks of its GPU work
        ("next_kv", np.int64),
        ("next_pairs", np.float64),
        ("next_decode", np.int64),  # all its sequences decode
        ("extra", np.int64),  # ticks for moving blocks before it
        ("left", np.int64),  # of the budget, while composing
        ("same", np.int64),  # how many of its sequences were in the one before too
        ("last_size", np.int64),  # of that one
        ("last_decode", np.int64),
        ("emitting", np.int64),  # of its sequences, how many yield a token in the one before
        ("least", np.int64),  # tokens that the one nearest to its end still has to receive; of those not steady
        ("composed", np.int64),  # number of the last composed step, of the one in flight, and of the last received
        ("flying", np.int64),
        ("received", np.int64),
        ("received_at", np.int64),
        ("steady", np.int64),  # how many of the running are
        ("final", np.int64),  # the least of their finals; how many have it, none before which place, their part of
        ("leaving", np.int64),  # `base`, and how many of them would need a block in the step after it
        ("leaving_from", np.int64),
        ("leaving_base", np.int64),
        ("leaving_need", np.int64),
        ("base", np.int64),  # their tokens in the cache once they have the one of step n, less n for each
        ("young", np.int64),  # all running before this place are steady and have their first token
        (
            "closed",
            np.int64,
        ),  # why nobody more was admitted: 2 holds whoever arrives, 1 until somebody does, 0 may change
        ("window", np.int64),  # steps after the one in flight that are entered already; 0 = none
        ("first_end", np.int64),  # of the step in flight when the window began
        ("second", np.int64),  # ticks of the step after it
        ("slope", np.int64),  # ticks that each further one takes longer
        ("growth", np.int64),  # the same, of the GPU's work alone
        ("window_from", np.int64),
        ("link_free", np.int64),  # when its link has sent all KV transfers
        ("since", np.int64),  # the time series is accounted up to here
        ("token_rate", np.float64),  # of the step or window in flight, per tick
        ("steps", np.int64),
        ("windows", np.int64),
        ("jumped", np.int64),  # steps that were not taken singly
        ("computed", np.int64),  # tokens computed
        ("lost", np.int64),  # tokens of these whose cache entries were given up by preemption
        ("preemptions", np.int64),
        ("swapped", np.int64),  # blocks moved to the host and back
        ("changes", np.int64),  # of its role
        ("role_since", np.int64),
        ("prefilling", np.int64),  # ticks in the role of prefill, before that
    ],
    align=True,
)


class Limits(NamedTuple):
    """What holds for the whole cluster and its clients; times in ticks."""

    replicas: int
    block_size: int
    max_model_len: int
    asynchronous: int
    full_gate: int
    order: int
    chunk: int  # most tokens of one prompt in a step; 0 = no limit
    swap: int  # ticks to move a block to the host or back; 0 = preempted requests compute again
    router: int
    scrape: int  # how often the router looks; 0 = it always knows
    queue_limit: int
    timeout: int
    retries: int
    backoff: int  # full jitter below backoff * 2**(attempt - 1), at most backoff_cap
    backoff_cap: int
    ingest: int  # from sending to the queue
    ingest_per_token: int
    delivery: int  # from the step end of the last token to the end at the client
    transfer: int  # setup of a KV transfer
    transfer_per_token: int
    per_prompt_token: float  # ticks of a replica that computes nothing else, in full steps
    scale_by: int
    scale_target: float  # of the metric; or by what factor a change of roles must lower the load
    scale_every: int
    scale_down_after: int
    provisioning: int
    least_replicas: int
    windows: int  # whether to use them
    debug: int  # whether to check the invariants at every step


LIMITS = np.dtype(
    [(name, np.float64 if kind is float else np.int64) for name, kind in Limits.__annotations__.items()], align=True
)


def packed(limits: Limits) -> np.ndarray:
    """(1,) LIMITS: compiled functions pass a record as one pointer, a tuple field by field."""
    return np.array([tuple(limits)], LIMITS)


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


COST = np.dtype([(name, np.float64) for name in StepCost._fields[:-1]] + [("points", np.int64)], align=True)
"""The same per replica, with the number of its points."""


class Clock(NamedTuple):
    """What the cluster shares."""

    width: np.ndarray  # (3,) ticks of a sample, when the one of now begins, and its number
    ends: np.ndarray  # (2 * 2**k,) a tournament: the earliest step end at [1], that of replica r at [2**k + r]
    touched: np.ndarray  # (1 + replicas,) how many, then which idle replicas schedule at the end of the tick
    woken: np.ndarray  # (1 + replicas,) how many, then which busy or idle ones something was handed to
    counters: np.ndarray  # (15,) see below
    outstanding: np.ndarray  # (replicas,) what the router saw last: requests
    used: np.ndarray  # (replicas,) and blocks
    random: np.ndarray  # (2, 1) uint64 states: of the router and of the retry jitter


OPEN, PENDING, ARRIVED, TURN, LOOKED, STUCK, LOGGED, STEPPED, HEAPED, NOW, ENTERED, USED, SENDING, ASKED, UNFIT = range(
    15
)


class Engines(NamedTuple):
    """All that the replicas own; the first axis is the replica."""

    state: np.ndarray  # REPLICA
    running: np.ndarray  # (, max_seqs) SEQUENCE in the order of their admission
    words: np.ndarray  # (, max_seqs * 8) the same memory, for moving them
    finals: np.ndarray  # (, max_seqs) the number of a steady sequence's last step; UNSETTLED if it is not steady
    phases: np.ndarray  # (, block_size) how many of the steady need a block in the steps of this remainder
    orphans: np.ndarray  # (, max_seqs) attempts
    costs: np.ndarray  # COST
    points: np.ndarray  # (, k, 2)
    gemm: np.ndarray  # (, max_seqs + 1) seconds of a step of so many single tokens; nan = not yet known
    samples: np.ndarray  # (, SAMPLES, 5)
    shared: Clock
    events: np.ndarray  # EVENT; empty unless asked for, and never full
    steps: np.ndarray  # STEP; likewise
    token_ticks: np.ndarray  # of every token of the requests' last attempts; empty unless asked for
    token_start: np.ndarray  # (requests,)
    heap: np.ndarray  # TO_COME, the earliest first; never full
    scratch: np.ndarray  # (3, max(max_seqs, block_size + 2))


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
        memory += cost.experts * (1.0 - np.exp(tokens * cost.log_unrouted))
    compute = cost.per_token * tokens + cost.per_sequence * sequences
    low, high = min(memory, compute), max(memory, compute)
    gemm = high * (1.0 + (low / high) ** cost.knee) ** (1.0 / cost.knee)
    return gemm + cost.reduce + cost.reduce_per_token * tokens


@njit(cache=True)
def gpu_seconds(cost: StepCost, tokens: float, sequences: float, kv_tokens: float, attention_pairs: float) -> float:
    """t_gpu of a step; `kv_tokens` is D + R and `attention_pairs` is Q of step_time.py."""
    attention = cost.per_kv_token * kv_tokens + cost.per_attention_pair * attention_pairs
    return _gemm_seconds(cost, tokens, sequences) + attention


@inlined
def _ticks(seconds: float) -> Any:
    return np.int64(np.rint(seconds * TICKS))


@inlined
def _blocks(tokens: int, block_size: int) -> int:
    return (tokens + block_size - 1) // block_size


@lean
def _random(state: np.ndarray) -> Any:
    """The next of the splitmix64 stream in `state[0]`, as a float in [0, 1)."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return np.float64(z >> np.uint64(11)) * 2.0**-53


@inlined
def _seen(limits: Limits, sent: Any, prompt: int) -> Any:
    """When the cluster sees a request that is sent at `sent`."""
    return sent + limits.ingest + limits.ingest_per_token * prompt


@inlined
def _log(engines: Engines, now: Any, kind: int, attempt: int, replica: int) -> None:
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
def _push(engines: Engines, tick: Any, kind: int, who: int) -> None:
    heap = engines.heap
    i = engines.shared.counters[HEAPED]
    engines.shared.counters[HEAPED] += 1
    heap[i].tick, heap[i].kind, heap[i].who = tick, kind, who
    while i > 0 and _earlier(heap, i, (i - 1) // 2):
        _swap(heap, i, (i - 1) // 2)
        i = (i - 1) // 2


@lean
def _pop(engines: Engines) -> None:
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
def _set_end(engines: Engines, r: int, end: Any) -> None:
    ends = engines.shared.ends
    i = ends.size // 2 + r
    ends[i] = end
    while i > 1:
        i //= 2
        ends[i] = min(ends[2 * i], ends[2 * i + 1])


@inlined
def _account(engines: Engines, r: int, now: Any) -> None:
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
def _widen(samples: np.ndarray, width: np.ndarray, now: Any) -> None:
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
def _new_attempt(it: Any, request: int, number: int, sent: Any, prompt: int, output: int) -> None:
    it.request = request
    it.number = number
    it.sent = sent
    it.prompt = prompt
    it.output = output
    it.first = it.last = it.ended = it.replica = it.source = it.next = it.previous = it.child = -1
    it.held = it.node = -1


@lean
def _fail(engines: Engines, attempts: np.ndarray, a: int, state: int, ended: Any, limits: Limits) -> None:
    """Attempt `a` is over; its client tries again later, unless no retry is left or the request can never fit."""
    it = attempts[a]
    it.state = state
    it.ended = ended
    engines.shared.counters[OPEN] -= 1
    if state != UNSERVABLE and it.number <= limits.retries:
        longest = np.int64(limits.backoff_cap)
        if it.number < 20:  # beyond, the cap holds and the shift would overflow
            longest = min(longest, np.int64(limits.backoff) << np.int64(it.number - 1))
        arrival = _seen(limits, ended + np.int64(_random(engines.shared.random[1]) * longest), it.prompt)
        _push(engines, max(arrival, ended + 1), RETRY, a)
        engines.shared.counters[PENDING] += 1


@lean
def _hand_something_to(engines: Engines, r: int) -> None:
    """Replica `r` is woken after the event at hand."""
    woken = engines.shared.woken
    for k in range(1, woken[0] + 1):
        if woken[k] == r:
            return
    woken[0] += 1
    woken[woken[0]] = r


@lean
def _leave_source(engines: Engines, attempts: np.ndarray, a: int, pool: Any, limits: Limits) -> bool:
    """The prefill replica need not hold the blocks of attempt `a` any more; returns whether it still had them."""
    it = attempts[a]
    r = np.int64(it.source)
    source = engines.state[r]
    it.source = -1
    if source.epoch != it.epoch:
        return False
    if pool is None:
        source.free += _blocks(it.prompt, limits.block_size)
    else:
        give_back(pool, r, source, np.int64(it.held))
        pool.state[r].kept -= 1
    return True


@lean
def _free_reserved(engines: Engines, attempts: np.ndarray, a: int, pool: Any) -> None:
    """Free the blocks that are held where attempt `a` waits."""
    it = attempts[a]
    if it.blocks > 0:
        r = np.int64(it.replica)
        if pool is None:
            engines.state[r].free += it.blocks
        else:
            give_back(pool, r, engines.state[r], np.int64(it.node))
            pool.state[r].kept -= 1
    it.blocks = 0


@lean
def _let_go(engines: Engines, attempts: np.ndarray, a: int, pool: Any, limits: Limits) -> None:
    """Give up what is held for an attempt that does not run: blocks at a prefill replica, here, or on the host."""
    it = attempts[a]
    if it.source >= 0:
        source = np.int64(it.source)
        if _leave_source(engines, attempts, a, pool, limits):
            _hand_something_to(engines, source)
    elif limits.swap > 0 and it.computed > 0 and it.blocks == 0:
        engines.state[it.replica].host_free += _blocks(it.computed, limits.block_size)
    _free_reserved(engines, attempts, a, pool)
    it.computed = 0


@inlined
def _write_back(attempts: np.ndarray, sequence: Any) -> None:
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
    _write_back(attempts, sequence)
    blocks = sequence.blocks
    if limits.swap > 0 and me.host_free >= blocks:
        it.computed = sequence.computed
        me.host_free -= _blocks(sequence.computed, limits.block_size)
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
    _log(engines, now, PREEMPT, a, r)


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
def _write_out(engines: Engines, r: int, limits: Limits, composing: bool) -> None:
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
        s.blocks = _blocks(s.computed, limits.block_size)
    me.final = NEVER
    me.young = 0


@inlined
def _blocks_taken(engines: Engines, r: int, limits: Limits, steps: Any) -> Any:
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
            free -= max(0, _blocks(s.computed + wanted, block_size) - s.blocks)
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
        if which != _DECODES:
            s.now = s.next
            s.next = 0
        in_flight = limits.asynchronous & (s.now >> 1)
        # With only one token in flight missing, nothing is left to schedule.
        if over or me.left <= 0 or (in_flight and s.computed + 1 >= s.prompt + s.output):
            i += 1
            continue
        whole = s.prompt + s.generated + in_flight - s.computed
        decode = whole == 1 and s.computed >= s.prompt
        if (which == _PREFILLS and decode) or (which == _DECODES and not decode):
            i += 1
            continue
        new = min(whole, me.left)
        if limits.chunk > 0:
            new = min(new, limits.chunk)
        need = 0
        if s.computed + new > s.blocks * block_size:
            need = _blocks(s.computed + new, block_size) - s.blocks
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
    need = _blocks(it.prompt, limits.block_size)
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
    _push(engines, source.link_free, KV_END, a)
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
                _log(engines, now, BREAK, a, r)
                _fail(engines, attempts, a, RESET, now, limits)
                continue
            if not _reserve(engines, r, attempts, a, pool, limits, watermark, now):
                me.closed = stands(queue) if pool is None else 0
                return
            dequeue(queue, me, r, attempts, a)
            _log(engines, now, RESERVE, a, r)
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
        need = _blocks(held + new, block_size) - it.blocks - hits
        asked = _blocks(known, block_size) - it.blocks - hits if limits.full_gate else need
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
            back = _blocks(it.computed, block_size)
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
        _log(engines, now, ADMIT, a, r)


@inlined
def _duration(cost: Any, gpu: Any, size: int, asynchronous: int) -> Any:
    """Ticks of a step whose GPU work takes `gpu` ticks."""
    host = _ticks(cost.host + cost.host_per_sequence * size)
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
                cost.host,
                cost.host_per_sequence,
                cost.gap,
                engines.points[r, : cost.points],
            )
            gemm = _gemm_seconds(full, float(me.next_tokens), float(size))
            if me.next_tokens == size:
                engines.gemm[r, size] = gemm
        attention = cost.per_kv_token * float(me.next_kv) + cost.per_attention_pair * me.next_pairs
        me.next_gpu = _ticks(gemm + attention)
    me.next_ticks = max(1, _duration(cost, me.next_gpu, size, limits.asynchronous)) + me.extra


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
            held += _blocks(it.prompt + it.output - 1 - max(0, final - me.composed - 1), limits.block_size)
        else:
            sound &= it.blocks == _blocks(it.computed, limits.block_size)
            held += it.blocks
        sound &= it.generated < it.output and attempts[it.attempt].state == RUNNING
    if pool is not None:
        return sound and holds_invariants(pool, r, me.blocks, me.free)
    for a in range(engines.shared.counters[USED]):
        waiting = attempts[a]
        if waiting.source == r and waiting.epoch == me.epoch:
            held += _blocks(waiting.prompt, limits.block_size)
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
        _write_out(engines, r, limits, True)
    if limits.order == PREFILL_FIRST:
        preempted = _serve_running(engines, r, attempts, pool, queue, limits, _PREFILLS, now)
        if not preempted:
            _admit(engines, r, attempts, pool, queue, limits, now)
        if me.next_size == 0:
            _serve_running(engines, r, attempts, pool, queue, limits, _DECODES, now)
    else:
        preempted = _serve_running(engines, r, attempts, pool, queue, limits, _ALL, now)
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


@lean
def _steps_before(me: Any, now: Any) -> Any:
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
    second = _duration(cost, me.next_gpu + (0 if limits.asynchronous else growth), b, limits.asynchronous)
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
    _set_end(engines, r, end)


@lean
def _settle(engines: Engines, r: int, attempts: np.ndarray, pool: Any, queue: Any, limits: Limits, j: Any) -> None:
    """Bring the running to where they are after the first `j` steps of the window; it is over then."""
    me, running, finals = engines.state[r], engines.running[r], engines.finals[r]
    block_size = limits.block_size
    me.window = 0
    if j == 0:
        return
    last = _window_end(me, j)
    ticks = engines.token_ticks
    for i in range(0 if ticks.size > 0 else me.young, me.running):
        s = running[i]
        if ticks.size > 0:
            had = _steady_tokens(s, finals[i], me.received) if finals[i] < UNSETTLED else np.int64(s.generated)
            begin = engines.token_start[s.request] + had
            for k in range(j):
                ticks[begin + k] = _window_end(me, k + 1)
        if s.generated == 0:
            attempts[s.attempt].first = me.first_end
            _log(engines, me.first_end, FIRST, s.attempt, r)
            if finals[i] < UNSETTLED:
                s.generated = 1
                s.last = me.first_end
        if finals[i] < UNSETTLED:
            continue
        s.last = last
        s.generated += j
        if pool is None:
            s.computed += j
            if s.computed > s.blocks * block_size:
                need = _blocks(s.computed, block_size) - s.blocks
                s.blocks += need
                me.free -= need
        charge(queue, r, s.request, 0, j)
    if pool is not None:
        _grow_in_turn(engines, r, pool, limits, j)
    if me.steady > 0:
        me.free -= _blocks_taken(engines, r, limits, j)
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
    me.tokens = me.running
    me.ticks = _window_end(me, j + 1) - last
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
    _account(engines, r, now)
    low = _steps_before(me, now)
    # The time series took the mean rate of the window; now it is known better.
    guessed = me.token_rate * (now - me.window_from)
    begun, done = me.window_from, 0.0
    if low > 0:
        begun = _window_end(me, low)
        done = me.tokens + (low - 1) * me.running
    end = _window_end(me, low + 1)
    _settle(engines, r, attempts, pool, queue, limits, low)
    me.token_rate = me.tokens / me.ticks
    engines.samples[r, engines.shared.width[2], TOKENS] += done + me.token_rate * (now - begun) - guessed
    _set_end(engines, r, end)
    return end == now


# Steps begin and end


@inlined
def _finish(engines: Engines, r: int, attempts: np.ndarray, queue: Any, limits: Limits, a: int, now: Any) -> None:
    it = attempts[a]
    it.state = OK
    it.ended = now + limits.delivery
    engines.shared.counters[OPEN] -= 1
    leaves(queue, r, it.request)
    _log(engines, now, FINISH, a, r)


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
        _log(engines, now, BREAK, a, r)
        _fail(engines, attempts, a, RESET, now, limits)
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
    _account(engines, best, now)
    becomes_active(queue, best, it.request)
    enqueue(queue, engines.state[best], best, attempts, a, False)
    _hand_something_to(engines, best)


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
        s.last = now
        _forget(engines, r, s, received, limits)
        _write_back(attempts, s)
        _finish(engines, r, attempts, queue, limits, s.attempt, now)
        me.free += _blocks(s.prompt + s.output - 1, limits.block_size)
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
        first = min(first, (finals[i] << _PLACE) | i)
    me.final = NEVER
    least = first >> _PLACE
    if least >= UNSETTLED:
        return
    for i in range(me.running):
        left += finals[i] == least
    at = first & ((1 << _PLACE) - 1)
    while left > 0:
        if finals[at] == least:
            _leaves_with(me, running[at], at, least, limits.block_size)
            left -= 1
        at += 1


@lean
def _receive(engines: Engines, r: int, attempts: np.ndarray, pool: Any, queue: Any, limits: Limits, now: Any) -> None:
    """The step in flight has ended: what yields gets one more token; the finished leave and free their blocks."""
    me, running, finals = engines.state[r], engines.running[r], engines.finals[r]
    ticks = engines.token_ticks
    me.received = me.flying
    me.received_at = now
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
                    ticks[engines.token_start[s.request] + tokens - 1] = now
                if s.generated == 0:
                    attempts[s.attempt].first = now
                    _log(engines, now, FIRST, s.attempt, r)
                    s.generated = 1
                    s.last = now
            if final == me.received:
                gone = True
                s.generated = s.output
                s.last = now
                s.blocks = _blocks(s.prompt + s.output - 1, limits.block_size)
                _forget(engines, r, s, final, limits)
                _write_back(attempts, s)
                _finish(engines, r, attempts, queue, limits, s.attempt, now)
        elif (s.now if limits.asynchronous else s.next) == 3 and not (
            me.aborted > 0 and attempts[s.attempt].state != RUNNING  # timed out while the step ran
        ):
            if me.role == PREFILL:
                gone = True
                _hand_over(engines, r, attempts, pool, queue, limits, s, now)
            else:
                if s.generated == 0:
                    attempts[s.attempt].first = now
                    _log(engines, now, FIRST, s.attempt, r)
                if ticks.size > 0:
                    ticks[engines.token_start[s.request] + s.generated] = now
                s.last = now
                s.generated += 1
                charge(queue, r, s.request, 0, 1)
                if s.generated == s.output:
                    gone = True
                    _write_back(attempts, s)
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
            it.first = now
            _log(engines, now, FIRST, a, r)
        if ticks.size > 0:
            ticks[engines.token_start[it.request] + it.generated] = now
        it.last = now
        it.generated += 1
        charge(queue, r, it.request, 0, 1)
        if it.generated == it.output:
            # It was preempted with its last token in flight: nothing has to be computed again.
            dequeue(queue, me, r, attempts, a)
            if it.computed == 0:
                me.lost -= it.prompt + it.output - 1
            _let_go(engines, attempts, a, pool, limits)
            _finish(engines, r, attempts, queue, limits, a, now)
    me.orphans = 0
    me.busy = 0


@lean
def _switch_off(engines: Engines, r: int, pool: Any, now: Any) -> None:
    me = engines.state[r]
    me.up = OFF
    me.on += now - me.since_on
    me.epoch += 1
    if pool is not None:
        clear(pool, r, me.blocks)
    _log(engines, now, REPLICA_DOWN, -1, r)


@lean
def _drained(engines: Engines, r: int, pool: Any, limits: Limits, now: Any) -> None:
    """Replica `r` was to take no more requests: once it has none left it stops, or takes its other role."""
    me = engines.state[r]
    if me.running > 0 or me.waiting > 0 or me.free < me.blocks:
        return
    if me.up == DRAINING:
        _switch_off(engines, r, pool, now)
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
        _push(engines, now + limits.provisioning, UP, r)
    _log(engines, now, NEW_ROLE, -1, r)


@lean
def _start(
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
    _set_end(engines, r, now + me.ticks)
    if limits.windows and not (me.role == DECODE and always_asks(queue)):  # who is handed over asks what was served
        _open_window(engines, r, limits, now)


@lean
def _wake(engines: Engines, r: int, attempts: np.ndarray, pool: Any, queue: Any, limits: Limits, now: Any) -> None:
    """Replica `r` has to look again: its window is over; if it is idle it schedules at the end of the tick."""
    me = engines.state[r]
    if me.window > 0 and _interrupt(engines, r, attempts, pool, queue, limits, now):
        _set_end(engines, r, NEVER)
        _receive(engines, r, attempts, pool, queue, limits, now)
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


# The cluster


@inlined
def _load(engines: Engines, r: int, limits: Limits, by_blocks: bool) -> Any:
    """What the router knows of replica `r`: its requests, or its used blocks."""
    if limits.scrape > 0:
        return engines.shared.used[r] if by_blocks else engines.shared.outstanding[r]
    me = engines.state[r]
    return me.blocks - me.free if by_blocks else me.running + me.waiting - me.aborted


@lean
def _look(engines: Engines, limits: Limits, now: Any) -> None:
    """The router's picture is of the last multiple of its scrape interval, before what happens at that tick."""
    if now // limits.scrape > engines.shared.counters[LOOKED]:
        engines.shared.counters[LOOKED] = now // limits.scrape
        at = now // limits.scrape * limits.scrape
        for r in range(engines.state.size):
            me = engines.state[r]
            engines.shared.outstanding[r] = me.running + me.waiting - me.aborted
            engines.shared.used[r] = me.blocks - me.free
            j = _steps_before(me, at)
            if j > 0:
                if me.steady > 0:
                    engines.shared.used[r] += _blocks_taken(engines, r, limits, j)
                for i in range(me.young, me.running):
                    if engines.finals[r, i] == UNSETTLED:
                        s = engines.running[r, i]
                        engines.shared.used[r] += _blocks(s.computed + j, limits.block_size) - s.blocks


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
        pick = np.int64(_random(shared.random[0]) * eligible)
    elif limits.router == SESSION_AFFINITY:
        pick = np.int64(affinity[it.request] % np.uint64(eligible))
    elif limits.router == POWER_OF_TWO:
        pick = np.int64(_random(shared.random[0]) * eligible)
        if eligible > 1:
            other = np.int64(_random(shared.random[0]) * (eligible - 1))
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
        elif limits.router != POWER_OF_TWO or place in (pick, other):
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
                if _random(shared.random[0]) * ties < 1.0:
                    best = np.int64(r)
        place += 1
    return best


@lean
def _reject(engines: Engines, attempts: np.ndarray, a: int, limits: Limits, now: Any) -> None:
    """Attempt `a` could never run here."""
    engines.shared.counters[UNFIT] += 1
    _log(engines, now, REJECT, a, -1)
    _fail(engines, attempts, a, UNSERVABLE, now, limits)


@lean
def _enter(
    engines: Engines,
    attempts: np.ndarray,
    a: int,
    pool: Any,
    queue: Any,
    limits: Limits,
    affinity: np.ndarray,
    now: Any,
) -> None:
    """Attempt `a` reaches the cluster: refused, or queued at a replica."""
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
                _wake(engines, other, attempts, pool, queue, limits, now)
    r = _route(engines, limits, it, pool, affinity)
    if r < 0:
        if _fits(engines, limits, it.prompt, it.output):
            _log(engines, now, REJECT, a, -1)
            _fail(engines, attempts, a, REFUSED, now, limits)
        else:
            _reject(engines, attempts, a, limits, now)
        return
    it.replica = r
    me = engines.state[r]
    if me.waiting >= limits.queue_limit:
        _log(engines, now, REJECT, a, r)
        _fail(engines, attempts, a, QUEUE_FULL, now, limits)
        return
    if me.window > 0 and always_asks(queue):  # what was served within it says where a new client begins
        _wake(engines, r, attempts, pool, queue, limits, now)
    _account(engines, r, now)
    becomes_active(queue, r, it.request)
    enqueue(queue, me, r, attempts, a, False)
    _log(engines, now, ARRIVE, a, r)
    if limits.timeout < NEVER:
        deadline = it.sent + limits.timeout - limits.delivery
        _push(engines, max(now + 1, deadline), DEADLINE, a)
    if me.window == 0 or me.closed < 2:
        _wake(engines, r, attempts, pool, queue, limits, now)


@lean
def _give_up(engines: Engines, attempts: np.ndarray, a: int, pool: Any, queue: Any, limits: Limits, now: Any) -> None:
    """The client of attempt `a` has waited long enough: what waits leaves at once, what runs at the next schedule."""
    it = attempts[a]
    if it.state >= OK:
        return
    r = np.int64(it.replica)
    me = engines.state[r]
    if me.window > 0:
        _wake(engines, r, attempts, pool, queue, limits, now)
    _account(engines, r, now)
    if it.state == QUEUED:
        dequeue(queue, me, r, attempts, a)
        _let_go(engines, attempts, a, pool, limits)
    elif it.state == RUNNING:
        if me.steady > 0:
            _write_out(engines, r, limits, False)
        me.aborted += 1
        for i in range(me.running):
            if engines.running[r, i].attempt == a:
                _write_back(attempts, engines.running[r, i])
    leaves(queue, r, it.request)
    _log(engines, now, GIVE_UP, a, r)
    _fail(engines, attempts, a, TIMEOUT, max(now, it.sent + limits.timeout), limits)
    if not me.busy:  # who waits behind it may fit
        _hand_something_to(engines, r)


@lean
def _end_transfer(
    engines: Engines, attempts: np.ndarray, a: int, pool: Any, queue: Any, limits: Limits, now: Any
) -> None:
    """The KV cache of attempt `a` has reached its decode replica, if both still live and the client still waits."""
    it = attempts[a]
    source, r = np.int64(it.source), np.int64(it.replica)
    engines.shared.counters[SENDING] -= 1
    _account(engines, source, now)
    _account(engines, r, now)
    intact = _leave_source(engines, attempts, a, pool, limits) and it.blocks > 0
    if it.state == TRANSFER and intact:
        it.state = QUEUED
        if pool is not None:
            register_prompt(pool, r, it.request, it.prompt, np.int64(it.node))
        enqueue(queue, engines.state[r], r, attempts, a, True)
    else:
        _free_reserved(engines, attempts, a, pool)
        it.computed = 0
        if it.state == TRANSFER:
            _log(engines, now, BREAK, a, r)
            leaves(queue, r, it.request)
            _fail(engines, attempts, a, RESET, now, limits)
    _wake(engines, source, attempts, pool, queue, limits, now)
    _wake(engines, r, attempts, pool, queue, limits, now)


@lean
def _crash(engines: Engines, r: int, attempts: np.ndarray, pool: Any, queue: Any, limits: Limits, now: Any) -> None:
    """Replica `r` fails: all its connections break, its cache is lost."""
    me = engines.state[r]
    if me.window > 0:
        _wake(engines, r, attempts, pool, queue, limits, now)
    _account(engines, r, now)
    if me.steady > 0:
        _write_out(engines, r, limits, False)
    for i in range(me.running):
        s = engines.running[r, i]
        if attempts[s.attempt].state == RUNNING:
            _write_back(attempts, s)
            leaves(queue, r, s.request)
            _log(engines, now, BREAK, s.attempt, r)
            _fail(engines, attempts, s.attempt, RESET, now, limits)
    me.running = me.aborted = me.orphans = me.busy = me.queued = me.window = me.next_size = 0
    me.token_rate = 0.0
    a = first_waiting(queue, me, r, attempts)
    while a >= 0:
        it = attempts[a]
        dequeue(queue, me, r, attempts, a)
        if it.blocks > 0:
            it.blocks = it.computed = 0
        _let_go(engines, attempts, a, pool, limits)
        leaves(queue, r, it.request)
        _log(engines, now, BREAK, a, r)
        _fail(engines, attempts, a, RESET, now, limits)
        a = first_waiting(queue, me, r, attempts)
    for i in range(engines.shared.counters[HEAPED]):
        if engines.heap[i].kind == KV_END and attempts[engines.heap[i].who].replica == r:
            attempts[engines.heap[i].who].blocks = 0  # what is on its way here is lost
    me.free = me.blocks
    me.link_free = 0
    _switch_off(engines, r, pool, now)
    _set_end(engines, r, NEVER)


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
            _push(engines, now + limits.provisioning, UP, r)
            paid += 1
    for r in range(state.size - 1, -1, -1):
        me = state[r]
        if paid > desired and me.up == READY:
            me.up = DRAINING
            paid -= 1
            if me.running == 0 and me.waiting == 0 and not me.busy:
                _switch_off(engines, r, pool, now)


@lean
def _demands(engines: Engines, pool: Any, limits: Limits, memory: np.ndarray) -> Any:
    """How many replicas the prompts and the responses would fill.

    Prompts: the time that those which wait, and as many as came since the last look, take to compute, per time between
    two looks; what the prefix caches have found until now is left out. Responses: the places in the batch or the blocks
    that they have, and that those which wait will take, whichever is the larger share.
    """
    counters = engines.shared.counters
    if counters[ARRIVED] > 0:
        memory[0] = counters[ASKED] / counters[ARRIVED]
    mean = memory[0]  # tokens of a prompt
    tokens = float(counters[ASKED])
    responses = 0.0
    asked, hits = 0, 0
    for r in range(engines.state.size):
        me = engines.state[r]
        if me.role == PREFILL:
            tokens += me.waiting * mean
        else:
            places = (me.running + me.waiting) / me.max_seqs
            blocks = (me.blocks - me.free + me.waiting * mean / limits.block_size) / me.blocks
            responses += max(places, blocks)
        if pool is not None:
            asked += pool.state[r].asked
            hits += pool.state[r].hits + pool.state[r].host_hits
    if asked > 0:
        tokens *= 1.0 - hits / asked
    counters[ARRIVED] = counters[ASKED] = 0
    return tokens * limits.per_prompt_token / limits.scale_every, responses


@lean
def _extrapolated(memory: np.ndarray, value: float, looks: Any) -> Any:
    """Holt's linear trend (a level and a slope, smoothed), one look ahead; `memory` holds the two."""
    if looks == 0:
        memory[0], memory[1] = value, 0.0
    else:
        level = 0.5 * value + 0.5 * (memory[0] + memory[1])
        memory[1] = 0.3 * (level - memory[0]) + 0.7 * memory[1]
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
    if limits.scale_by == BY_FORECAST:
        prompts = _extrapolated(memory[2:4], prompts, memory[1])
        responses = _extrapolated(memory[4:6], responses, memory[1])
    memory[1] += 1.0
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
            if me.running + me.waiting < fewest:
                chosen, fewest = r, me.running + me.waiting
    if others > 1:
        state[chosen].up = CHANGING
        _wake(engines, chosen, attempts, pool, queue, limits, now)


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
    coming: Any = _seen(limits, arrival[arrived], prompt[arrived]) if arrived < n else NEVER
    while arrived < n or counters[OPEN] + counters[PENDING] + counters[SENDING] > 0 or shared.ends[1] < NEVER:
        now = np.int64(min(coming, heap[0].tick, shared.ends[1]))
        if shared.touched[0] > 0:  # interrupted within a tick
            now = counters[NOW]
        if now == NEVER or counters[STUCK] != 0:
            break
        counters[NOW] = now
        _widen(engines.samples, shared.width, now)
        if limits.scrape > 0:
            _look(engines, limits, now)
        while True:
            if _needs_room(engines) or (counters[USED] == attempts.size and counters[PENDING] > 0):
                return False
            if shared.ends[1] == now:
                i = 1
                while i < leaves_of_tree:
                    i = 2 * i if shared.ends[2 * i] == now else 2 * i + 1
                r = i - leaves_of_tree
                _account(engines, r, now)
                if state[r].window > 0:
                    _settle(engines, r, attempts, pool, queue, limits, state[r].window)
                _set_end(engines, r, NEVER)
                _receive(engines, r, attempts, pool, queue, limits, now)
                _wake(engines, r, attempts, pool, queue, limits, now)
            elif coming == now and not (heap[0].tick == now and heap[0].kind < RETRY):
                a = arrived
                arrived += 1
                counters[ENTERED] = arrived
                _new_attempt(attempts[a], a, 1, arrival[a], prompt[a], output[a])
                coming = _seen(limits, arrival[arrived], prompt[arrived]) if arrived < n else NEVER
                _enter(engines, attempts, a, pool, queue, limits, affinity, now)
            elif heap[0].tick == now:
                kind, who = heap[0].kind, heap[0].who
                _pop(engines)
                if kind == DEADLINE:
                    _give_up(engines, attempts, who, pool, queue, limits, now)
                elif kind == KV_END:
                    _end_transfer(engines, attempts, who, pool, queue, limits, now)
                elif kind == RETRY:
                    old, used = attempts[who], counters[USED]
                    sent = now - _seen(limits, 0, old.prompt)
                    _new_attempt(attempts[used], old.request, old.number + 1, sent, old.prompt, old.output)
                    counters[PENDING] -= 1
                    counters[USED] += 1
                    _enter(engines, attempts, used, pool, queue, limits, affinity, now)
                elif kind == SCALE:
                    if limits.scale_by == BY_KV or limits.scale_by >= BY_BACKLOG:
                        for r in range(state.size):
                            if state[r].window > 0:
                                _wake(engines, r, attempts, pool, queue, limits, now)
                    if limits.scale_by >= BY_BACKLOG:
                        _change_role(engines, attempts, pool, queue, limits, memory, now)
                    else:
                        _scale(engines, attempts, pool, limits, memory, now)
                    _push(engines, now + limits.scale_every, SCALE, 0)
                elif kind == UP:
                    if state[who].up == STARTING:
                        state[who].up = READY
                        state[who].since = now
                        _log(engines, now, REPLICA_UP, -1, who)
                else:
                    r = outages[who, 1]
                    if state[r].up >= READY:
                        _crash(engines, r, attempts, pool, queue, limits, now)
                        state[r].up = STARTING
                        state[r].since_on = now
                        _push(engines, now + outages[who, 2], UP, r)
            else:
                break
            while shared.woken[0] > 0:
                shared.woken[0] -= 1
                _wake(engines, shared.woken[shared.woken[0] + 1], attempts, pool, queue, limits, now)
        for t in range(1, shared.touched[0] + 1):
            r = shared.touched[t]
            _account(engines, r, now)
            _start(engines, r, attempts, pool, queue, limits, now)
        shared.touched[0] = 0
    return True


def _entry(sources: int) -> Any:
    @njit(cache=True, nogil=True)
    def run(
        engines: Engines,
        attempts: np.ndarray,
        arrival: np.ndarray,
        prompt: np.ndarray,
        output: np.ndarray,
        pool: Any,
        queue: Any,
        settings: np.ndarray,
        affinity: np.ndarray,
        outages: np.ndarray,
        memory: np.ndarray,
    ) -> bool:
        """Run on; returns False if _with_room and more attempts are needed to go on."""
        assert sources >= 0  # noqa: S101  # part of the cache's key
        limits = settings[0]
        counters = engines.shared.counters
        if counters[USED] == 0:
            counters[USED] = arrival.size
            if limits.debug:  # the invariants are those of all attempts
                for a in range(arrival.size):
                    _new_attempt(attempts[a], a, 1, arrival[a], prompt[a], output[a])
            if pool is not None:
                for r in range(engines.state.size):
                    clear(pool, r, engines.state[r].blocks)
            for k in range(outages.shape[0]):
                _push(engines, outages[k, 0], DOWN, k)
            if limits.scale_by > 0:
                _push(engines, limits.scale_every, SCALE, 0)
        if not _advance(engines, attempts, arrival, prompt, output, pool, queue, limits, affinity, outages, memory):
            return False
        now = counters[NOW]
        for r in range(engines.state.size):
            _account(engines, r, now)
            me = engines.state[r]
            if me.up != OFF:
                me.on += now - me.since_on
            if me.role == PREFILL:
                me.prefilling += now - me.role_since
        return True

    return run


def _fingerprint() -> int:
    """Of the compiled files together: numba's cache itself looks only at the one of the function that is called."""
    from zlib import crc32

    here = Path(__file__).parent
    return crc32(b"".join((here / name).read_bytes() for name in ("kernel.py", "blocks.py", "waiting.py", "bundle.py")))


_run = _entry(_fingerprint())


def engines_of(
    replicas: np.ndarray,
    costs: np.ndarray,
    points: np.ndarray,
    *,
    block_size: int,
    seeds: np.ndarray,
    width: int,
    heap: int = 64,
    events: int = 0,
    steps: int = 0,
    token_ticks: np.ndarray | None = None,
    token_start: np.ndarray | None = None,
) -> Engines:
    """Replicas (REPLICA) with nothing to do, as they begin; `events`, `steps`: room in the logs, 0 for none."""
    count, most = len(replicas), int(replicas["max_seqs"].max())
    leaves_of_tree = 1 << max(0, count - 1).bit_length()
    shared = Clock(
        np.array([width, 0, 0]),
        np.full(2 * leaves_of_tree, NEVER),
        np.zeros(2 * count + 2, np.int64),
        np.zeros(2 * count + 2, np.int64),
        np.zeros(UNFIT + 1, np.int64),
        np.zeros(count, np.int64),
        np.zeros(count, np.int64),
        seeds.copy(),
    )
    state = replicas.copy()
    state["final"] = NEVER
    to_come = np.zeros(heap, TO_COME)
    to_come["tick"] = NEVER
    running = np.zeros((count, most), SEQUENCE)
    return Engines(
        state,
        running,
        running.view(np.int64),
        np.full((count, most), UNSETTLED),
        np.zeros((count, block_size), np.int64),
        np.empty((count, most), np.int64),
        costs,
        points,
        np.full((count, most + 1), np.nan),
        np.zeros((count, SAMPLES, 5)),
        shared,
        np.empty(events, EVENT),
        np.empty(steps, STEP),
        np.empty(0, np.int64) if token_ticks is None else token_ticks,
        np.empty(0, np.int64) if token_start is None else token_start,
        to_come,
        np.empty((3, max(most, block_size + 2)), np.int64),
    )


def _with_room(engines: Engines) -> Engines:
    """The same, with room in the heap and the logs for whatever one event, or one tick of all replicas, can write."""
    counters, replicas = engines.shared.counters, engines.state.size
    events, steps, heap = engines.events, engines.steps, engines.heap
    room = 6 * engines.running.size + 2 * int(counters[OPEN]) + 16
    if counters[HEAPED] + 2 * counters[OPEN] + 16 > heap.size:
        wider = np.empty(2 * heap.size + 4 * int(counters[OPEN]) + 32, TO_COME)
        wider["tick"] = NEVER
        wider[: heap.size] = heap
        heap = wider
    if events.size > 0 and counters[LOGGED] + room > events.size:
        events = np.resize(events, 2 * events.size + room)
    if steps.size > 0 and counters[STEPPED] + 2 * replicas > steps.size:
        steps = np.resize(steps, 2 * steps.size + 2 * replicas)
    return engines._replace(heap=heap, events=events, steps=steps)


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

    Returns
    -------
    attempts (ATTEMPT; the first n are the first ones of the requests, then the retries), replicas (REPLICA), samples
    (replicas, SAMPLES, 5), their width in ticks, the token ticks, the events (EVENT), the steps (STEP), and the
    counters: at NOW the tick of the end, at OPEN the attempts that never ended, at UNFIT the unservable ones, at STUCK
    0, or 1 + the attempt that was preempted again and again, or -1 if an invariant broke (debug).
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
    known, order, counters = bundled(pool), bundled(queue), engines.shared.counters
    while not _run(
        bundled(engines),
        attempts,
        arrival,
        prompt,
        output,
        known,
        order,
        settings,
        affinity,
        outages,
        memory,
    ):
        engines = _with_room(engines)
        if counters[USED] == len(attempts) and counters[PENDING] > 0:
            attempts = np.concatenate([attempts, np.zeros(len(attempts), ATTEMPT)])
    return (
        attempts[: counters[USED]],
        engines.state,
        engines.samples,
        engines.shared.width[0],
        engines.token_ticks,
        engines.events[: counters[LOGGED]],
        engines.steps[: counters[STEPPED]],
        counters,
    )
