"""What the compiled simulator works on: times in ticks, the records of attempts and replicas, and all settings."""

from typing import Any, NamedTuple

import numpy as np

TICKS = 100_000_000_000  # per second
NEVER: Any = np.int64(2**62)
UNSETTLED: Any = np.int64(2**42)  # in place of the number of a last step

# States of an attempt; those from OK on are final. TRANSFER: its KV cache is on the way from prefill to decode; FRONT:
# the API server of its replica has not handed it to the engine yet.
QUEUED, RUNNING, TRANSFER, FRONT, OK, TIMEOUT, QUEUE_FULL, UNSERVABLE, REFUSED, RESET = range(10)
ROUND_ROBIN, RANDOM, LEAST_OUTSTANDING, LEAST_KV, POWER_OF_TWO, PREFIX_AFFINITY, SESSION_AFFINITY = range(7)
# Kinds of events in the heap, in their order at one tick. Step ends come before them, arrivals just before the retries.
KV_END, DEADLINE, PASS, RETRY, SCALE, UP, DOWN = range(7)
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
ALL, PREFILLS, DECODES = range(3)

SAMPLES = 512
LONGEST_WINDOW = 1 << 20
LEAST_LOAD = 0.5  # share of a side's capacity below which no replica changes its role
ROLE_SMOOTHING, ROLE_TREND = 0.2, 0.1  # of what comes between two looks at the roles, and of its slope (Holt)
PLACE = 20  # bits of a place among the running
INTERRUPTED = -2  # of counters[STUCK]: the loop stops where it is
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
        ("first", np.int64),  # when the first token has left the API server: at its step's end, if that takes no time
        ("last", np.int64),  # and of the last one so far
        ("ended", np.int64),  # in FRONT: when it will have passed
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
        ("epoch", np.int32),  # of that replica, or of the one whose API server has it: another one now, and it is lost
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
        ("received_at", np.int64),  # when its results had passed the API server
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
        ("front_free", np.int64),  # when its API server will have done all it has
        ("fronted", np.int64),  # how many requests that has
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
    front_in: int  # of the API server, one after another: for a request
    front_out: int  # and for each sequence of a step's results
    delivery: int  # from the last token's leaving it to the end at the client
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
    per_row: float  # of a sequence, outside the matrix products
    host: float
    host_per_sequence: float
    host_prompts: float  # of a step that computes some of a prompt, beyond
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


class Work(NamedTuple):
    """A simulation: all that the compiled loop reads and writes."""

    engines: Engines
    attempts: np.ndarray  # ATTEMPT: the first ones of the requests, then the retries
    arrival: np.ndarray  # (n,) int64 ticks at which the clients send, ascending by when the engines see them
    prompt: np.ndarray  # (n,) int32 tokens
    output: np.ndarray
    pool: Any  # blocks.Pool, or None
    queue: Any  # waiting.Queue, or None
    settings: np.ndarray  # packed(Limits)
    affinity: np.ndarray  # (n,) uint64 for the router by session, else empty
    outages: np.ndarray  # (k, 3) tick, replica, ticks until it is back
    memory: np.ndarray  # of the autoscaler, or of what changes the roles


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


def with_room(engines: Engines) -> Engines:
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
