"""Requests through the kernel, and what comes out of it as a Run: attempts, token times, time series, notes."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import msgspec
import numpy as np
import polars as pl

from squall import __version__, native
from squall.errors import InputError, SquallError
from squall.run.table import SERIES, STATUSES, TOKEN_SOURCES, Run, RunMeta
from squall.seeds import DEFAULT_SEED, stream
from squall.simulate import kernel, records
from squall.simulate.blocks import Pool
from squall.simulate.cluster import Cluster
from squall.simulate.policies import affinity_of, pool_for, queue_for
from squall.simulate.records import TICKS
from squall.trace.table import SCHEMA as TRACE_SCHEMA
from squall.trace.table import Trace

TOKEN_TIMES = 1_000_000
"""Up to so many response tokens, a simulation keeps the time of each (`chunks`, for ITL); beyond, first and last,
unless it is asked to keep them."""

STARVED = 60.0
"""Seconds: an attempt is starved if it was still without a token so long after an attempt that had come to its replica
later got its first."""

_TICKS = float(TICKS)
CLOCK_END = 5e7
"""Seconds that a simulation may span, of the 9.2e7 of its clock."""

# What the kernel does not know, as states of attempts: requests that cannot be simulated, without a prompt or without a
# known response length, and what was under way at an interrupt.
_NO_PROMPT, _RECORDED_FAILURE, _STOPPED = records.RESET + 1, records.RESET + 2, records.RESET + 3

# state of an attempt -> status, reason, http_status, message
_WORDS = {
    records.OK: ("ok", None, 200, None),
    records.TIMEOUT: ("timeout", None, None, None),
    records.QUEUE_FULL: ("http_error", "queue_full", 429, "the replica's queue is full"),
    records.REFUSED: ("refused", "no_replica", None, "no replica was up"),
    records.RESET: ("reset", "replica_failed", None, "the replica failed"),
    records.UNSERVABLE: (
        "http_error",
        "unservable",
        400,
        "prompt and response exceed max_model_len or the whole KV cache",
    ),
    _NO_PROMPT: ("cancelled", "no_prompt", None, None),
    _RECORDED_FAILURE: ("cancelled", "recorded_failure", None, None),
    _STOPPED: ("cancelled", "stop", None, None),  # when the simulation was interrupted
}


class Outcome(msgspec.Struct, frozen=True):
    """What the kernel returns (see there), with `request` as a position in the arrays that `run_requests` was given."""

    attempts: np.ndarray
    replicas: np.ndarray
    samples: np.ndarray
    width: int
    end: int
    unservable: int
    """Attempts that can never fit."""
    in_order: bool
    """Whether the first attempts are those of the requests in their order."""
    token_ticks: np.ndarray
    pool: Pool | None
    """blocks.Pool as it ended, with prefix caching."""
    token_start: np.ndarray
    """(attempts,) where the tokens of an attempt's request begin in `token_ticks`; empty if these are."""
    events: np.ndarray
    """records.EVENT, in time order; empty unless asked for."""
    steps: np.ndarray
    """records.STEP, in the order of their starts; empty unless asked for."""
    interrupted: bool = False
    """Only the attempts are there that had come until then; some are not over (their state is below records.OK)."""


def run_requests(
    arrival: np.ndarray,
    prompt: np.ndarray,
    output: np.ndarray,
    cluster: Cluster,
    *,
    seed: int = DEFAULT_SEED,
    token_times: int = 0,
    events: bool = False,
    steps: bool = False,
    asked: pl.DataFrame | None = None,
    hash_tokens: int | None = None,
    windows: bool = True,
    watch: Callable[[int, int], object] | None = None,
    partial: bool = False,
) -> Outcome:
    """Run (n,) requests through the cluster: seconds at which they are sent (ascending), tokens, tokens.

    The time of every token is kept if there are at most `token_times` of them. `events` and `steps` keep a log of what
    happened to every attempt (arrive, admit, preempt, first token, finish, reject, give up) and of every step. `watch`
    is told now and then how many requests have come, and how many of them are not over. An interrupt from the keyboard
    gives the outcome until then if `partial`. Raises InputError for impossible times.
    """
    if not (arrival[0] >= 0 and arrival[-1] <= CLOCK_END):
        raise InputError(
            f"the trace has arrivals from {arrival[0]:g} to {arrival[-1]:g} s, but the simulator's clock runs from 0 to"
            f" {CLOCK_END:g} s; select a part with --between, or divide the gaps with --speed."
        )
    if cluster.choices.own_blocks:
        # Who is never preempted has nothing to find again: that is known sooner without looking at single blocks.
        plain = run_requests(
            arrival,
            prompt,
            output,
            msgspec.structs.replace(cluster, choices=msgspec.structs.replace(cluster.choices, own_blocks=False)),
            seed=seed,
            token_times=token_times,
            events=events,
            steps=steps,
            asked=asked,
            hash_tokens=hash_tokens,
            windows=windows,
            watch=watch,
            partial=partial,
        )
        if plain.interrupted and plain.attempts["preemptions"].any():
            raise KeyboardInterrupt
        if plain.interrupted or (len(plain.attempts) == len(arrival) and not plain.attempts["preemptions"].any()):
            return plain
    limits = cluster.limits()._replace(windows=int(windows and not steps))
    replicas, costs, points = cluster.machines()
    sent = np.rint(arrival * TICKS).astype(np.int64)
    # The engines see a request after its ingestion, which may take longer for a longer prompt.
    seen = sent + limits.ingest_per_token * prompt.astype(np.int64)
    in_order = bool((seen[1:] >= seen[:-1]).all())
    order: Any = slice(None) if in_order else np.argsort(seen, kind="stable")
    start, tokens = np.empty(0, np.int64), 0
    if int(output.sum(dtype=np.int64)) <= token_times:
        ends = np.cumsum(output[order], dtype=np.int64)
        start, tokens = ends - output[order], int(ends[-1])
    chosen = cluster.choices
    pool, queue, affinity = None, None, np.empty(0, np.uint64)
    if _looks_at_requests(cluster):
        generated = output[order].astype(np.int64)
        asked = _described(arrival, prompt, output, asked)[order]
        queue = queue_for(chosen, asked, generated, limits.replicas, seed)
        affinity = affinity_of(chosen, asked)
        pool = pool_for(
            chosen,
            asked,
            generated,
            hash_tokens,
            replicas=replicas,
            block_size=cluster.block_size,
            block_bytes=cluster.block_bytes,
        )
    attempts, replicas, samples, width, token_ticks, event_log, step_log, counters = kernel.run_cluster(
        sent[order],
        prompt[order].astype(np.int32),
        output[order].astype(np.int32),
        records.packed(limits),
        replicas,
        costs,
        points,
        pool,
        queue,
        affinity,
        chosen.outages(limits.replicas, float(arrival[-1]), seed),
        kernel_seeds(seed),
        start,
        tokens,
        TICKS // 64,
        events,
        steps,
        watch,
    )
    repeated = int(counters[records.STUCK])
    interrupted = repeated == records.INTERRUPTED
    if interrupted and not partial:
        raise KeyboardInterrupt
    if interrupted:
        repeated = 0
        attempts = np.concatenate([attempts[: counters[records.ENTERED]], attempts[len(arrival) :]])
    if repeated < 0:
        raise SquallError("an invariant of the simulation broke; this is a bug in squall, please report it.")
    token_start = start[attempts["request"]] if tokens else start
    if not in_order:
        attempts["request"] = order[attempts["request"]]
    if repeated:
        raise SquallError(
            f"request {attempts['request'][repeated - 1]} was preempted over {records.LIVELOCK:,} times without"
            " progress; this cluster cannot serve it beside the others: give it more --kv-blocks."
        )
    if events:
        event_log = event_log[np.argsort(event_log["time"], kind="stable")]
    stuck = int(counters[[records.OPEN, records.PENDING]].sum())
    if stuck and not interrupted:
        raise SquallError(
            f"the simulation stopped with {stuck} requests that no replica could serve; this is a bug in squall,"
            " please report it."
        )
    return Outcome(
        attempts,
        replicas,
        samples,
        int(width),
        int(counters[records.NOW]),
        int(counters[records.UNFIT]),
        in_order and not interrupted,
        token_ticks,
        pool,
        token_start,
        event_log,
        step_log,
        interrupted,
    )


def _looks_at_requests(cluster: Cluster) -> bool:
    """Whether anything hangs on more than the times and lengths of the requests."""
    chosen = cluster.choices
    caching = chosen.prefix_caching or chosen.own_blocks
    return chosen.scheduler != "fcfs" or caching or chosen.router == "session-affinity"


def _described(arrival: np.ndarray, prompt: np.ndarray, output: np.ndarray, asked: pl.DataFrame | None) -> pl.DataFrame:
    """The requests with the columns of a trace; what is not known of them is null."""
    if asked is None:
        known = pl.DataFrame({"arrival": arrival, "request_tokens": prompt, "response_tokens": output})
        asked = pl.concat([pl.DataFrame(schema=TRACE_SCHEMA), known.cast(pl.Float64)], how="diagonal_relaxed")
    return asked


def run_trace(
    trace: Trace,
    cluster: Cluster,
    *,
    seed: int = DEFAULT_SEED,
    title: str | None = None,
    remarks: Sequence[str] = (),
    token_times: bool | None = None,
    observe: Callable[[Outcome, np.ndarray], object] | None = None,
    watch: Callable[[int, int], object] | None = None,
    partial: bool = False,
) -> Run:
    """`trace` on `cluster`, as a Run; `remarks` join its notes. Raises InputError if there is nothing to run.

    `observe` is called with the outcome, its logs of events and steps included, and the rows of the trace that were
    run. `watch` and `partial` are those of `run_requests`.
    """
    prompt, output = trace.table["request_tokens"].to_numpy(), trace.table["response_tokens"].to_numpy()
    rows = np.flatnonzero((prompt > 0) & (output > 0))
    if not rows.size:
        raise InputError(
            f"{trace.meta.source}: no request in it has both a prompt and a response, so there is nothing to simulate."
        )
    arrival = trace.table["arrival"].to_numpy()[rows]
    logs = observe is not None
    outcome = run_requests(
        arrival,
        prompt[rows],
        output[rows],
        cluster,
        seed=seed,
        token_times=TOKEN_TIMES if token_times is None else int(token_times) * 2**62,
        events=logs,
        steps=logs,
        asked=trace.table[rows] if _looks_at_requests(cluster) else None,
        hash_tokens=trace.meta.block_size,
        watch=watch,
        partial=partial,
    )
    left_out = np.flatnonzero((prompt <= 0) | (output <= 0))
    if outcome.interrupted:
        under_way = outcome.attempts["state"] < records.OK
        for name, value in (("state", _STOPPED), ("ended", outcome.end), ("last", -1), ("generated", 0)):
            outcome.attempts[name][under_way] = value
        left_out = left_out[trace.table["arrival"].to_numpy()[left_out] <= outcome.end / TICKS]
    elif observe is not None:
        observe(outcome, rows)
    totals = _totals(outcome, cluster)
    meta = RunMeta(
        kind="simulation",
        title=title or "",
        trace=trace.meta,
        target=cluster.described() | totals,
        step_time=cluster.step_time_name,
        offered=len(trace),
        seed=seed,
        version=__version__,
        state="interrupted" if outcome.interrupted else "complete",
        notes=[*_notes(cluster, outcome, totals, prompt[left_out]), *remarks],
    )
    return Run.of(_attempts(trace.table, rows, left_out, outcome, cluster), meta, _series(outcome, cluster))


def kernel_seeds(seed: int) -> np.ndarray:
    """(2, 1) uint64: the kernel's streams for the router and for the clients' retry jitter."""
    return np.array(
        [[stream(seed, purpose).integers(2**64, dtype=np.uint64)] for purpose in ("router", "retry jitter")]
    )


def _attempts(
    requests: pl.DataFrame, rows: np.ndarray, left_out: np.ndarray, outcome: Outcome, cluster: Cluster
) -> pl.DataFrame:
    """All attempts, and the requests that were left out, in the order of the requests."""
    it = outcome.attempts
    request, at = rows, np.arange(len(it))
    if len(it) > len(rows) or not outcome.in_order or len(left_out):
        request = np.concatenate([rows[it["request"]], left_out])
        place = np.argsort(request, kind="stable")  # the retries of a request stand in their order
        request, at = request[place], np.append(at, np.full(len(left_out), -1))[place]
    once = len(request) == len(requests)
    asked = requests.select("arrival", "service", "model", "failed", "request_tokens", "response_tokens")
    asked = asked if once else asked[request]
    again, caching = len(it) > len(rows), cluster.choices.prefix_caching
    spread = _spread(it, at, cluster.step_time.a2, again, caching)
    state, sent, ended = spread.state, asked["arrival"], spread.ended
    unsent = np.flatnonzero(at < 0)
    if unsent.size:
        state[unsent] = np.where(asked["request_tokens"].to_numpy()[unsent] <= 0, _NO_PROMPT, _RECORDED_FAILURE)
        ended[unsent] = sent.to_numpy()[unsent]

    def known(values: np.ndarray | pl.Series) -> pl.Series:
        """Null where nothing was sent."""
        series = pl.Series(values) if isinstance(values, np.ndarray) else values.clone()
        return series.scatter(unsent, None) if unsent.size else series

    if again:
        sent = pl.Series(np.where(spread.number == 1, sent.to_numpy(), spread.sent))
    done = pl.Series(ended)
    if (state != records.OK).any():
        done = done.set(pl.Series(state != records.OK), None)
    first = pl.Series(spread.first, nan_to_null=True)
    replica = pl.Series(spread.replica)
    if (spread.replica < 0).any():
        replica = replica.set(replica < 0, None)
    status, reason, code, message = _outcomes(state)
    columns = {
        "request": request.astype(np.int64, copy=False),
        "attempt": spread.number if again else _constant(1, pl.Int32, len(at)),
        "scheduled": asked["arrival"],
        "sent": known(sent),
        "first_byte": first,
        "first_token": first,
        "last_token": pl.Series(spread.last, nan_to_null=True),
        "done": done,
        "ended": ended,
        "status": status,
        "reason": reason,
        "http_status": code,
        "message": message,
        "request_tokens": known(asked["request_tokens"]),
        "response_tokens": known(spread.generated),
        "asked_request_tokens": asked["request_tokens"],
        "asked_response_tokens": known(asked["response_tokens"]),
        "token_source": known(_constant("server", pl.Enum(TOKEN_SOURCES), len(request))),
        "replica": replica,
        "preemptions": known(spread.preemptions),
        "service": asked["service"],
        "model": asked["model"],
        "failed": asked["failed"],
    }
    if caching:
        columns["cached_tokens"] = known(spread.cached)
    if outcome.token_ticks.size:
        columns["chunks"] = _chunks(outcome, at)
    return pl.DataFrame(columns)


class _Spread(NamedTuple):
    """Columns of the run table, (rows,) each: times in seconds, nan for what never came; and what they are made of."""

    first: np.ndarray
    last: np.ndarray
    ended: np.ndarray
    generated: np.ndarray
    replica: np.ndarray
    preemptions: np.ndarray
    state: np.ndarray
    number: np.ndarray  # empty, as is the next, where every request was sent once
    sent: np.ndarray
    cached: np.ndarray  # empty without a prefix cache
    attempts: np.ndarray  # records.ATTEMPT
    at: np.ndarray  # (rows,) which of these; -1: none
    edge: float  # seconds until the client sees a token


def _fill(columns: Any) -> int:
    """Fill the columns; each attempt is read once, and not once a column. Compiled, of a bundle of _Spread."""
    at, again, caching = columns.at, columns.number.size > 0, columns.cached.size > 0
    for i in range(at.size):
        if at[i] < 0:
            continue
        it = columns.attempts[at[i]]
        if it.first >= 0:
            columns.first[i] = it.first / _TICKS + columns.edge
        if it.last >= 0:
            columns.last[i] = it.last / _TICKS + columns.edge
        columns.ended[i] = it.ended / _TICKS
        columns.generated[i] = it.generated
        columns.replica[i] = it.replica
        columns.preemptions[i] = it.preemptions
        columns.state[i] = it.state
        if again:
            columns.number[i] = it.number
            columns.sent[i] = it.sent / _TICKS
        if caching:
            columns.cached[i] = it.cached
    return 0


@cache
def _compiled(form: native.Form) -> Callable[..., int]:
    return native.load(__name__, "_fill", also=("squall.simulate.records",), bundles=(form,))


def _spread(attempts: np.ndarray, at: np.ndarray, edge: float, again: bool, caching: bool) -> _Spread:
    """The attempts of the rows `at`, with the last columns if there were retries (`again`) or a prefix cache."""
    n = at.size
    columns = _Spread(
        np.full(n, np.nan),
        np.full(n, np.nan),
        np.full(n, np.nan),
        np.zeros(n, np.int32),
        np.full(n, np.int32(-1)),
        np.zeros(n, np.int32),
        np.zeros(n, np.int16),
        np.ones(n if again else 0, np.int32),
        np.full(n if again else 0, np.nan),
        np.zeros(n if caching else 0, np.int32),
        attempts,
        at,
        edge,
    )
    bundle = native.Bundle(columns)
    _compiled(bundle.form)(bundle.address)
    return columns


def _constant(value: str | int | None, dtype: Any, count: int) -> pl.Series:
    return pl.Series([value], dtype=dtype).new_from_index(0, count)


def _outcomes(state: np.ndarray) -> tuple[pl.Series, pl.Series, pl.Series, pl.Series]:
    """Status, reason, http_status and message of each attempt."""
    code = np.zeros(max(_WORDS) + 1, np.int64)
    code[list(_WORDS)] = np.arange(len(_WORDS))
    types: tuple[Any, ...] = (pl.Enum(STATUSES), pl.String, pl.Int32, pl.String)
    if (state == state[0]).all():
        same = [_constant(word, dtype, len(state)) for word, dtype in zip(_WORDS[int(state[0])], types, strict=True)]
        return same[0], same[1], same[2], same[3]
    at = pl.Series(code[state])
    columns = [
        pl.Series([entry[i] for entry in _WORDS.values()], dtype=dtype).gather(at) for i, dtype in enumerate(types)
    ]
    return columns[0], columns[1], columns[2], columns[3]


def _chunks(outcome: Outcome, at: np.ndarray) -> pl.Series:
    """Seconds from the first token to each, for the attempts that succeeded (the last ones of their requests); of the
    rows `at`, -1 for none."""
    it = outcome.attempts
    tokens = np.where(it["state"] == records.OK, it["generated"], 0).astype(np.int64)
    begins = np.repeat(outcome.token_start, tokens)
    within = np.arange(tokens.sum()) - np.repeat(np.cumsum(tokens) - tokens, tokens)
    offsets = (outcome.token_ticks[begins + within] - np.repeat(it["first"], tokens)) / TICKS
    lists = (
        pl.DataFrame({"attempt": np.repeat(np.arange(len(it)), tokens), "chunks": offsets})
        .group_by("attempt", maintain_order=True)
        .agg("chunks")
    )
    wanted = pl.DataFrame({"attempt": at})
    return wanted.join(lists, on="attempt", how="left", maintain_order="left")["chunks"]


def _series(outcome: Outcome, cluster: Cluster) -> pl.DataFrame:
    """SERIES of all replicas on one grid; the last sample ends with the run."""
    count = max(1, -(-outcome.end // outcome.width))
    ends = np.minimum(np.arange(1, count + 1) * outcome.width, max(outcome.end, 1))
    spans = np.diff(ends, prepend=0)
    frames = []
    for replica in range(cluster.capacity):
        sums = outcome.samples[replica, :count]
        frames.append(
            pl.DataFrame(
                {
                    "time": ends / TICKS,
                    "replica": np.full(count, replica, np.int32),
                    "running": sums[:, records.RUNNING_TIME] / spans,
                    "waiting": sums[:, records.WAITING_TIME] / spans,
                    "kv_used": sums[:, records.KV_PEAK],
                    "preemptions": sums[:, records.PREEMPTIONS].astype(np.int64),
                    "batch_tokens": sums[:, records.TOKENS] / spans * TICKS,
                }
            )
        )
    return pl.concat(frames).sort("time", "replica").select(SERIES.names())


def _totals(outcome: Outcome, cluster: Cluster) -> dict[str, Any]:
    replicas = outcome.replicas
    totals: dict[str, Any] = {
        "simulated_seconds": outcome.end / TICKS,
        "steps": int(replicas["steps"].sum()),
        "steps_in_windows": int(replicas["jumped"].sum()),
        "computed_tokens": int(replicas["computed"].sum()),
        "tokens_lost_to_preemption": int(replicas["lost"].sum()),
        "preemptions": int(replicas["preemptions"].sum()),
        "replica_seconds": float(replicas["on"].sum() / TICKS),
    }
    # First come, first served: nobody is overtaken.
    overtaken = np.zeros(1) if cluster.choices.scheduler == "fcfs" else overtaken_for(outcome.attempts)
    totals["starved"] = int((overtaken > STARVED).sum())
    totals["longest_overtaken"] = float(overtaken.max())
    if cluster.choices.own_blocks:
        found = 0 if outcome.pool is None else outcome.pool.state["hits"].sum() + outcome.pool.state["host_hits"].sum()
        totals["own_blocks_found"] = int(found)
    elif outcome.pool is not None:
        state = outcome.pool.state
        asked = int(state["asked"].sum())
        hits = int(state["hits"].sum()), int(state["host_hits"].sum())
        totals["prefix_cache"] = {
            "blocks_asked": asked,
            "blocks_hit": hits[0],
            "blocks_hit_on_host": hits[1],
            "hit_rate": sum(hits) / asked if asked else None,
            "evictions": int(state["evictions"].sum()),
        }
        if cluster.choices.disaggregated:
            totals["prefix_cache"]["blocks_not_sent"] = int(state["unsent"].sum())
    if cluster.choices.disaggregated:
        totals["role_changes"] = int(replicas["changes"].sum())
        totals["mean_prefill_replicas"] = float(replicas["prefilling"].sum() / max(outcome.end, 1))
    if cluster.choices.preemption == "swap":
        totals["blocks_swapped"] = int(replicas["swapped"].sum())
    if cluster.choices.price is not None:
        totals["cost"] = totals["replica_seconds"] / 3600 * cluster.choices.price
    return totals


def overtaken_for(attempts: np.ndarray) -> np.ndarray:
    """(attempts,) seconds that each was still without a token after one that had come to its replica later got its
    first; 0 for who was not overtaken."""
    waited = np.zeros(len(attempts))
    order = np.lexsort((attempts["sent"], attempts["replica"]))
    groups = np.split(order, np.flatnonzero(np.diff(attempts["replica"][order])) + 1)
    for rows in groups:
        it = attempts[rows]
        first = np.where(it["first"] >= 0, it["first"], records.NEVER)
        later = np.append(np.minimum.accumulate(first[::-1])[::-1][1:], records.NEVER)
        until = np.where(it["first"] >= 0, it["first"], it["ended"])
        waited[rows] = np.where(it["replica"] >= 0, np.maximum(until - later, 0) / TICKS, 0.0)
    return waited


def _notes(cluster: Cluster, outcome: Outcome, totals: dict[str, Any], left_out: np.ndarray) -> list[str]:
    """`left_out` are the prompt lengths of the requests that were."""
    notes = []
    if outcome.interrupted:
        notes.append(
            f"Interrupted after {outcome.end / TICKS:,.0f} simulated seconds: {len(outcome.attempts):,} attempts had"
            f" begun, {(outcome.attempts['state'] == _STOPPED).sum():,} of them were under way (cancelled, stop); later"
            " ones were not sent."
        )
    if cluster.kv_blocks_from.startswith("estimated"):
        notes.append(
            f"The KV cache of {cluster.kv_blocks:,} blocks is estimated; give --kv-blocks as the server reports"
            " it (num_gpu_blocks)."
        )
    if cluster.choices.own_blocks:
        notes.append(
            "Of the prefix cache only what resumed requests find of their own is modelled; what prompts share, and so"
            " the real hit rate, is unknown."
        )
    elif outcome.pool is None:
        notes.append("Prefix caching is off: every prompt is computed in full, and the real hit rate is unknown.")
    if cluster.choices.unlike_vllm:
        notes.append(f"Not in vLLM v1: {', '.join(cluster.choices.unlike_vllm)}.")
    if cluster.choices.scrape_interval is None and cluster.router not in ("round-robin", "random", "session-affinity"):
        notes.append(f"The router {cluster.router} always knows the replicas' state; see --scrape-interval.")
    notes.append("Responses have the recorded length and end as if max_tokens had been set to it.")
    if cluster.model.experts:
        notes.append("Mixture-of-experts step times assume uniform routing and were not validated.")
    no_prompt = int((left_out <= 0).sum())
    if no_prompt:
        notes.append(f"{no_prompt:,} requests without a prompt were not sent (cancelled, no_prompt).")
    if len(left_out) > no_prompt:
        notes.append(
            f"{len(left_out) - no_prompt:,} requests that the recorded system failed have no known response"
            " length and were not sent (cancelled, recorded_failure)."
        )
    if cluster.choices.mtbf is not None and not outcome.replicas["epoch"].any():
        notes.append(f"--mtbf {cluster.choices.mtbf}: no replica failed in {totals['simulated_seconds']:,.0f} s.")
    if cluster.choices.fail and (cluster.choices.outages(cluster.capacity, 0.0, 0)[:, 0] > outcome.end).any():
        notes.append(
            f"--fail {cluster.choices.fail}: the run was over after {totals['simulated_seconds']:,.0f} s, before the"
            " last of these failures."
        )
    if totals["starved"]:
        notes.append(
            f"{totals['starved']:,} requests starved under --scheduler {cluster.choices.scheduler}: {STARVED:g} s after"
            " one that came to their replica later got its first token they still had none (the longest:"
            f" {totals['longest_overtaken']:,.0f} s); see --aging."
        )
    if outcome.unservable:
        notes.append(
            f"{outcome.unservable:,} requests could never fit (prompt + response over {cluster.max_model_len:,} tokens"
            f" of max_model_len or {cluster.usable_blocks:,} KV blocks) and were answered 400."
        )
    if not outcome.token_ticks.size:
        notes.append(
            "The times of single tokens were not kept (there are many), so there is no ITL; see --token-times."
        )
    return notes
