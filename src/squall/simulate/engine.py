"""Requests through the kernel, and what comes out of it as a Run: attempts, token times, time series, notes."""

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import polars as pl

from squall import __version__
from squall.errors import InputError, SquallError
from squall.run.table import SERIES, Run, RunMeta
from squall.seeds import DEFAULT_SEED, stream
from squall.simulate import kernel
from squall.simulate.cluster import Cluster
from squall.simulate.kernel import TICKS
from squall.simulate.step_time import step_cost
from squall.trace.table import Trace

TOKEN_TIMES = 5_000_000
"""Up to so many response tokens, a simulation keeps the time of each (`chunks`, for ITL); beyond, first and last."""

CLOCK_END = 5e7
"""Seconds that a simulation may span, of the 9.2e7 of its clock."""

# state of an attempt -> status, reason, http_status, message
_WORDS = {
    kernel.OK: ("ok", None, 200, None),
    kernel.TIMEOUT: ("timeout", None, None, None),
    kernel.QUEUE_FULL: ("http_error", "queue_full", 429, "the replica's queue is full"),
    kernel.UNSERVABLE: (
        "http_error",
        "unservable",
        400,
        "prompt and response exceed max_model_len or the whole KV cache",
    ),
}


class Outcome(msgspec.Struct, frozen=True):
    """What the kernel returns (see there), with `request` as a position in the arrays that `run_requests` was given."""

    attempts: np.ndarray
    replicas: np.ndarray
    samples: np.ndarray
    width: int
    end: int
    token_ticks: np.ndarray
    token_start: np.ndarray
    """(attempts,) where the tokens of an attempt's request begin in `token_ticks`."""
    events: np.ndarray
    """kernel.EVENT, in time order; empty unless asked for."""
    steps: np.ndarray
    """kernel.STEP, in the order of their starts; empty unless asked for."""


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
) -> Outcome:
    """Run (n,) requests through the cluster: seconds at which they are sent (ascending), tokens, tokens.

    The time of every token is kept if there are at most `token_times` of them. `events` and `steps` keep a log of what
    happened to every attempt (arrive, admit, preempt, first token, finish, reject, give up) and of every step. Raises
    InputError for impossible times.
    """
    if not (arrival[0] >= 0 and arrival[-1] <= CLOCK_END):
        raise InputError(
            f"arrivals from {arrival[0]:g} to {arrival[-1]:g} s: the simulator's clock runs from 0 to"
            f" {CLOCK_END:g} s; select a part with --between."
        )
    limits = cluster.limits()
    sent = np.rint(arrival * TICKS).astype(np.int64)
    # The engines see a request after its ingestion, which may take longer for a longer prompt.
    order = np.argsort(sent + limits.ingest_per_token * prompt.astype(np.int64), kind="stable")
    ends = np.cumsum(output[order], dtype=np.int64)
    start = ends - output[order]
    attempts, replicas, samples, width, end, token_ticks, event_log, step_log = kernel.run_cluster(
        sent[order],
        prompt[order].astype(np.int32),
        output[order].astype(np.int32),
        limits,
        step_cost(cluster.step_time, cluster.model, cluster.gpu, cluster.tp),
        _kernel_seeds(seed),
        start,
        int(ends[-1]) if ends[-1] <= token_times else 0,
        TICKS // 64,
        events,
        steps,
    )
    stuck = int((attempts["state"] < kernel.OK).sum())
    if stuck:
        raise SquallError(
            f"the simulation stopped with {stuck} requests that no replica could serve; this is a bug in squall,"
            " please report it."
        )
    token_start = start[attempts["request"]]
    attempts["request"] = order[attempts["request"]]
    return Outcome(attempts, replicas, samples, int(width), int(end), token_ticks, token_start, event_log, step_log)


def run_trace(
    trace: Trace,
    cluster: Cluster,
    *,
    seed: int = DEFAULT_SEED,
    title: str | None = None,
    remarks: Sequence[str] = (),
    observe: Callable[[Outcome, np.ndarray], object] | None = None,
) -> Run:
    """`trace` on `cluster`, as a Run; `remarks` join its notes. Raises InputError if there is nothing to run.

    `observe` is called with the outcome, its logs of events and steps included, and the rows of the trace that were
    run.
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
        arrival, prompt[rows], output[rows], cluster, seed=seed, token_times=TOKEN_TIMES, events=logs, steps=logs
    )
    if observe is not None:
        observe(outcome, rows)
    left_out = trace.table.with_row_index("request").filter(
        (pl.col("request_tokens") <= 0) | (pl.col("response_tokens") <= 0)
    )
    meta = RunMeta(
        kind="simulation",
        title=title or "",
        trace=trace.meta,
        target=cluster.described() | _totals(outcome),
        step_time=cluster.step_time_name,
        offered=len(trace),
        seed=seed,
        version=__version__,
        notes=[*_notes(cluster, outcome, left_out), *remarks],
    )
    table = pl.concat([_attempts(trace.table, rows, outcome, cluster), _left_out(left_out)], how="diagonal_relaxed")
    return Run.of(table.sort("request", "attempt"), meta, _series(outcome, cluster))


def _kernel_seeds(seed: int) -> np.ndarray:
    """(2, 1) uint64: the kernel's streams for the router and for the clients' retry jitter."""
    return np.array(
        [[stream(seed, purpose).integers(2**64, dtype=np.uint64)] for purpose in ("router", "retry jitter")]
    )


def _attempts(requests: pl.DataFrame, rows: np.ndarray, outcome: Outcome, cluster: Cluster) -> pl.DataFrame:
    """The rows of all attempts that were sent."""
    it, edge = outcome.attempts, cluster.step_time.a2
    request = rows[it["request"]]
    asked = requests.select("arrival", "service", "model", "failed")[request]
    words = pl.DataFrame(
        {
            "state": pl.Series(list(_WORDS), dtype=pl.Int32),
            **{
                name: [entry[i] for entry in _WORDS.values()]
                for i, name in enumerate(("status", "reason", "http_status", "message"))
            },
        }
    )
    frame = pl.DataFrame(
        {
            "request": request.astype(np.int64),
            "attempt": it["number"],
            "scheduled": asked["arrival"],
            "sent": np.where(it["number"] == 1, asked["arrival"].to_numpy(), it["sent"] / TICKS),
            "first_token": _when(it["first"], edge),
            "last_token": _when(it["last"], edge),
            "ended": it["ended"] / TICKS,
            "request_tokens": it["prompt"],
            "response_tokens": it["generated"],
            "asked_request_tokens": it["prompt"],
            "asked_response_tokens": it["output"],
            "replica": it["replica"],
            "preemptions": it["preemptions"],
            "service": asked["service"],
            "model": asked["model"],
            "failed": asked["failed"],
            "state": it["state"],
            "chunks": _chunks(outcome),
        }
    )
    return (
        frame.join(words, on="state", how="left", maintain_order="left")
        .with_columns(
            first_byte="first_token",
            done=pl.when(pl.col("status") == "ok").then("ended"),
            token_source=pl.lit("server"),
            replica=pl.when(pl.col("replica") >= 0).then("replica"),
        )
        .drop("state")
    )


def _when(ticks: np.ndarray, edge: float) -> pl.Series:
    """Ticks as seconds at the client, null where they never came."""
    return pl.Series(np.where(ticks >= 0, ticks / TICKS + edge, np.nan), nan_to_null=True)


def _chunks(outcome: Outcome) -> pl.Series:
    """Seconds from the first token to each, for the attempts that succeeded (the last ones of their requests)."""
    it = outcome.attempts
    if not outcome.token_ticks.size:
        return pl.Series([None], dtype=pl.List(pl.Float64)).new_from_index(0, len(it))
    tokens = np.where(it["state"] == kernel.OK, it["generated"], 0).astype(np.int64)
    begins = np.repeat(outcome.token_start, tokens)
    within = np.arange(tokens.sum()) - np.repeat(np.cumsum(tokens) - tokens, tokens)
    offsets = (outcome.token_ticks[begins + within] - np.repeat(it["first"], tokens)) / TICKS
    lists = (
        pl.DataFrame({"attempt": np.repeat(np.arange(len(it)), tokens), "chunks": offsets})
        .group_by("attempt", maintain_order=True)
        .agg("chunks")
    )
    return pl.DataFrame({"attempt": np.arange(len(it))}).join(lists, on="attempt", how="left", maintain_order="left")[
        "chunks"
    ]


def _left_out(requests: pl.DataFrame) -> pl.DataFrame:
    """The rows of the requests that cannot be simulated: without a prompt, or without a known response length."""
    return requests.select(
        pl.col("request").cast(pl.Int64),
        pl.lit(1, pl.Int32).alias("attempt"),
        pl.col("arrival").alias("scheduled"),
        pl.col("arrival").alias("ended"),
        pl.lit("cancelled").alias("status"),
        pl.when(pl.col("request_tokens") <= 0)
        .then(pl.lit("no_prompt"))
        .otherwise(pl.lit("recorded_failure"))
        .alias("reason"),
        pl.col("request_tokens").alias("asked_request_tokens"),
        "service",
        "model",
        "failed",
    )


def _series(outcome: Outcome, cluster: Cluster) -> pl.DataFrame:
    """SERIES of all replicas on one grid; the last sample ends with the run."""
    count = max(1, -(-outcome.end // outcome.width))
    ends = np.minimum(np.arange(1, count + 1) * outcome.width, max(outcome.end, 1))
    spans = np.diff(ends, prepend=0)
    frames = []
    for replica in range(cluster.replicas):
        sums = outcome.samples[replica, :count]
        frames.append(
            pl.DataFrame(
                {
                    "time": ends / TICKS,
                    "replica": np.full(count, replica, np.int32),
                    "running": sums[:, kernel.RUNNING_TIME] / spans,
                    "waiting": sums[:, kernel.WAITING_TIME] / spans,
                    "kv_used": sums[:, kernel.KV_PEAK],
                    "preemptions": sums[:, kernel.PREEMPTIONS].astype(np.int64),
                    "batch_tokens": sums[:, kernel.TOKENS] / spans * TICKS,
                }
            )
        )
    return pl.concat(frames).sort("time", "replica").select(SERIES.names())


def _totals(outcome: Outcome) -> dict[str, float]:
    replicas = outcome.replicas
    return {
        "simulated_seconds": outcome.end / TICKS,
        "steps": int(replicas["steps"].sum()),
        "computed_tokens": int(replicas["computed"].sum()),
        "tokens_lost_to_preemption": int(replicas["lost"].sum()),
        "preemptions": int(replicas["preemptions"].sum()),
    }


def _notes(cluster: Cluster, outcome: Outcome, left_out: pl.DataFrame) -> list[str]:
    notes = []
    if cluster.kv_blocks_from.startswith("estimated"):
        notes.append(
            f"The KV cache of {cluster.kv_blocks:,} blocks is estimated; give --kv-blocks as the server reports"
            " it (num_gpu_blocks)."
        )
    notes.append("Prefix caching is not modelled: every prompt is computed in full, and the real hit rate is unknown.")
    notes.append("Responses have the recorded length and end as if max_tokens had been set to it.")
    if cluster.model.experts:
        notes.append("Mixture-of-experts step times assume uniform routing and were not validated.")
    no_prompt = int((left_out["request_tokens"] <= 0).sum())
    if no_prompt:
        notes.append(f"{no_prompt:,} requests without a prompt were not sent (cancelled, no_prompt).")
    if len(left_out) > no_prompt:
        notes.append(
            f"{len(left_out) - no_prompt:,} requests that the recorded system failed have no known response"
            " length and were not sent (cancelled, recorded_failure)."
        )
    unservable = int((outcome.attempts["state"] == kernel.UNSERVABLE).sum())
    if unservable:
        notes.append(
            f"{unservable:,} requests could never fit (prompt + response over {cluster.max_model_len:,} tokens of"
            f" max_model_len or {cluster.usable_blocks:,} KV blocks) and were answered 400."
        )
    if not outcome.token_ticks.size:
        notes.append(
            f"Over {TOKEN_TIMES:,} response tokens: the times of single tokens were not kept, so there is no ITL."
        )
    return notes
