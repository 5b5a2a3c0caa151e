"""What happened inside a simulation: a timeline for Perfetto, and why the slowest requests were slow.

Both read the log of events and steps that the kernel keeps when asked (`Outcome.events`, `Outcome.steps`). The timeline
is Chrome's trace format: https://ui.perfetto.dev opens it. A process is a replica; its first thread holds the engine's
steps, the other lanes the requests (queued, prefill, decode), one lane for as long as a request lasts; counters are the
running and waiting requests, the KV blocks in use and the tokens of a step.
"""

from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from squall.errors import InputError
from squall.files import check_place, replace_file
from squall.progress import note
from squall.simulate import records
from squall.simulate.cluster import Cluster
from squall.simulate.engine import Outcome
from squall.simulate.records import TICKS

MOST_STEPS = 200_000
"""Steps and counters beyond so many are left out of a timeline (about 60 MB): no viewer is happy with more."""


class Slow(msgspec.Struct, frozen=True, kw_only=True):
    """Where the time of one slow request went; all times in seconds."""

    request: int
    """Its row in the trace."""
    attempt: int
    replica: int
    status: str
    sent: float
    ttft: float | None
    e2e: float
    request_tokens: int
    response_tokens: int
    queued: float
    """Before its first admission, ingestion included."""
    ahead: int
    """Requests that waited at its replica when it arrived."""
    running: int
    """Requests that ran there then."""
    queued_for: dict[str, float]
    """Seconds of the queueing by what the first in the queue lacked: `batch full` (max_num_seqs), `kv cache full`,
    `step` (room in the steps: their token budget, and the one in flight)."""
    prefill: float
    """From its first admission to its first token."""
    decode: float
    preempted_at: list[float]
    """When its blocks were taken, because a request before it needed one and none was free."""
    requeued: float
    """In the queue again after these, seconds in all."""
    slow_steps: float
    """Share of its decode time that passed in steps which also computed prompts of others."""
    reason: str
    """In a sentence."""


def explain(outcome: Outcome, rows: np.ndarray, cluster: Cluster, count: int) -> list[Slow]:
    """The `count` attempts with the longest time from sending to the last token (or to the end of waiting for it).

    `rows` are the trace's rows of the requests that were simulated. The outcome must hold its logs.
    """
    it = outcome.attempts
    reached = np.flatnonzero((it["replica"] >= 0) & (it["ended"] >= 0))
    took = it["ended"][reached] - it["sent"][reached]
    slowest = reached[np.argsort(-took, kind="stable")[:count]]
    events = outcome.events[np.isin(outcome.events["attempt"], slowest)]
    steps = {int(r): outcome.steps[outcome.steps["replica"] == r] for r in np.unique(it["replica"][slowest])}
    wanted = {r: _wanted(outcome, r, steps[r], cluster) for r in steps}
    return [
        _explained(int(a), events[events["attempt"] == a], steps[r], wanted[r], outcome, rows)
        for a in slowest
        for r in [int(it["replica"][a])]
    ]


def _wanted(outcome: Outcome, replica: int, steps: np.ndarray, cluster: Cluster) -> np.ndarray:
    """(steps,) blocks for the prompt of who was admitted next: it stood first in the queue, and all behind it waited
    for what it lacked."""
    admitted = outcome.events[(outcome.events["kind"] == records.ADMIT) & (outcome.events["replica"] == replica)]
    prompts = np.append(outcome.attempts["prompt"][admitted["attempt"]], 0)
    return -(-prompts[np.searchsorted(admitted["time"], steps["start"], "right")] // cluster.block_size)


def _explained(
    a: int,
    events: np.ndarray,
    steps: np.ndarray,
    wanted: np.ndarray,
    outcome: Outcome,
    rows: np.ndarray,
) -> Slow:
    it = outcome.attempts[a]
    admitted, preempted = (events["time"][events["kind"] == kind] for kind in (records.ADMIT, records.PREEMPT))
    end = int(it["last"] if it["state"] == records.OK else it["ended"])
    sent, first = int(it["sent"]), int(it["first"])
    begin = int(admitted[0]) if admitted.size else end
    arrived = events["time"][events["kind"] == records.ARRIVE]
    seen = steps[max(0, int(np.searchsorted(steps["start"], arrived[0] if arrived.size else sent, "right")) - 1)]
    waits = _waits(steps, wanted, sent, begin, int(outcome.replicas["max_seqs"][it["replica"]]))
    again = [int(admitted[admitted >= at][0] if (admitted >= at).any() else end) - int(at) for at in preempted]
    slow = _share_with_prefill(steps, first, end) if first >= 0 else 0.0
    parts = {
        "queued": begin - sent,
        "prefill": (first if first >= 0 else end) - begin,
        "decode": end - first if first >= 0 else 0,
        "requeued": sum(again),
    }
    return Slow(
        request=int(rows[it["request"]]),
        attempt=int(it["number"]),
        replica=int(it["replica"]),
        status="ok" if it["state"] == records.OK else "timeout" if it["state"] == records.TIMEOUT else "failed",
        sent=sent / TICKS,
        ttft=None if first < 0 else (first - sent) / TICKS,
        e2e=(end - sent) / TICKS,
        request_tokens=int(it["prompt"]),
        response_tokens=int(it["generated"]),
        ahead=int(seen["waiting"]),
        running=int(seen["running"]),
        queued_for={name: ticks / TICKS for name, ticks in waits.items() if ticks > 0},
        preempted_at=[int(at) / TICKS for at in preempted],
        slow_steps=slow,
        reason=_reason(parts, waits, len(preempted), int(seen["waiting"]), int(it["generated"]), slow),
        **{name: ticks / TICKS for name, ticks in parts.items()},
    )


def _waits(steps: np.ndarray, wanted: np.ndarray, sent: int, begin: int, places: int) -> dict[str, int]:
    """Ticks from `sent` to `begin`, by what the first in the queue lacked at the start of the step that then ran."""
    low, high = np.searchsorted(steps["start"], [sent, begin], "right")
    during, wanted = steps[max(0, low - 1) : high], wanted[max(0, low - 1) : high]
    starts = np.clip(during["start"], sent, begin)
    ends = np.clip(np.append(during["start"][1:], begin), sent, begin) if during.size else starts
    held = ends - starts
    full = during["running"] >= places
    short = ~full & (during["free"] < wanted)
    return {
        "batch full": int(held[full].sum()),
        "kv cache full": int(held[short].sum()),
        "step": int(begin - sent - held[full | short].sum()),
    }


def _share_with_prefill(steps: np.ndarray, first: int, end: int) -> float:
    """Of the time from `first` to `end`, in steps of more tokens than sequences."""
    inside = steps[(steps["start"] >= first) & (steps["start"] < end)]
    mixed = inside["ticks"][inside["tokens"] > inside["sequences"]].sum()
    return float(mixed / (end - first)) if end > first else 0.0


def _reason(
    parts: dict[str, int], waits: dict[str, int], preemptions: int, ahead: int, tokens: int, slow: float
) -> str:
    """The largest part of the time, in words."""
    largest = max(parts, key=lambda name: parts[name] - (parts["requeued"] if name == "decode" else 0))
    if largest == "queued":
        missing = max(waits, key=lambda name: waits[name])
        why = {"batch full": "a place in the batch", "kv cache full": "free KV blocks", "step": "room in the steps"}
        others = f", behind {ahead:,} other{'s' * (ahead != 1)}" if ahead else ""
        return f"queued for {why[missing]}{others}"
    if largest == "requeued":
        return f"preempted {preemptions} time{'s' * (preemptions > 1)} for want of KV blocks, and queued again"
    if largest == "prefill":
        return "its prompt took long: chunks share each step's token budget with others"
    others = f", {slow:.0%} of them beside prompts of others" if slow >= 0.05 else ""
    return f"long: {tokens:,} tokens to generate, one a step{others}"


def write_timeline(outcome: Outcome, rows: np.ndarray, path: str | Path) -> int:
    """Write the Chrome trace JSON of a simulation to `path`; returns how many events it has. The outcome must hold its
    logs."""
    path = Path(path)
    events = [*_step_slices(outcome), *_replica_marks(outcome), *_request_slices(outcome, rows)]
    events.sort(key=lambda event: event["ts"])  # stable: a request stays before its phases
    events = [*_names(outcome, {(event["pid"], event["tid"]) for event in events if "tid" in event}), *events]
    if len(outcome.steps) > MOST_STEPS:
        note(
            f"{path}: it has the first {MOST_STEPS:,} of {len(outcome.steps):,} steps, and all requests, since no"
            " viewer is happy with more; select a part with --head or --between."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, msgspec.json.encode({"displayTimeUnit": "ms", "traceEvents": events}))
    return len(events)


def check_timeline_path(path: str | Path, reads: object = None) -> Path:
    """`path`, or InputError if no timeline can be written there (`check_place`)."""
    path = Path(path)
    if path.suffix != ".json":
        raise InputError(f"{path}: a timeline is a .json file; give such a name.")
    return check_place(path, reads)


def _microseconds(ticks: Any) -> Any:
    return np.asarray(ticks) / (TICKS / 1e6)


def _names(outcome: Outcome, threads: set[tuple[int, int]]) -> list[dict[str, Any]]:
    """Of the processes, which are replicas, and of their threads: the steps first, then the lanes of requests."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": replica, "name": "process_name", "args": {"name": f"replica {replica}"}}
        for replica in range(len(outcome.replicas))
    ]
    for replica, lane in sorted(threads):
        shared = {"ph": "M", "pid": replica, "tid": lane}
        name = f"requests, lane {lane}" if lane else "steps"
        events.append(shared | {"name": "thread_name", "args": {"name": name}})
        events.append(shared | {"name": "thread_sort_index", "args": {"sort_index": lane}})
    return events


def _step_slices(outcome: Outcome) -> list[dict[str, Any]]:
    """A slice per step, and the counters at its start."""
    steps = outcome.steps[:MOST_STEPS]
    columns = {name: steps[name].tolist() for name in ("replica", "sequences", "tokens", "running", "waiting", "free")}
    columns |= {"at": _microseconds(steps["start"]).tolist(), "took": _microseconds(steps["ticks"]).tolist()}
    events: list[dict[str, Any]] = []
    blocks = outcome.replicas["blocks"].tolist()
    for replica, sequences, tokens, running, waiting, free, at, took in zip(*columns.values(), strict=True):
        shared = {"pid": replica, "ts": at}
        kind = "decode" if tokens == sequences else "mixed"
        args = {"sequences": sequences, "tokens": tokens}
        events.append(shared | {"ph": "X", "tid": 0, "dur": took, "name": kind, "cat": "step", "args": args})
        events.append(shared | {"ph": "C", "name": "requests", "args": {"running": running, "waiting": waiting}})
        events.append(shared | {"ph": "C", "name": "KV blocks", "args": {"used": blocks[replica] - free}})
        events.append(shared | {"ph": "C", "name": "step tokens", "args": {"tokens": tokens}})
    return events


def _replica_marks(outcome: Outcome) -> list[dict[str, Any]]:
    """A mark where a replica stops, is ready again, or takes its other role."""
    names = {records.REPLICA_UP: "up", records.REPLICA_DOWN: "down", records.NEW_ROLE: "changes its role"}
    log = outcome.events[outcome.events["attempt"] < 0]
    return [
        {"ph": "i", "s": "p", "pid": replica, "tid": 0, "ts": at, "name": names[kind], "cat": "replica"}
        for at, replica, kind in zip(
            _microseconds(log["time"]).tolist(), log["replica"].tolist(), log["kind"].tolist(), strict=True
        )
    ]


def _request_slices(outcome: Outcome, rows: np.ndarray) -> list[dict[str, Any]]:
    """Queued, prefill and decode of every attempt that reached a replica, on the lowest lane that is free."""
    it = outcome.attempts
    log = outcome.events[outcome.events["attempt"] >= 0]
    log = log[np.argsort(log["attempt"], kind="stable")]
    begins = np.searchsorted(log["attempt"], np.arange(len(it)), "left")
    ends = np.searchsorted(log["attempt"], np.arange(len(it)), "right")
    free: dict[int, list[int]] = {}
    busy: dict[int, list[tuple[int, int]]] = {}
    lanes: dict[int, int] = {}
    events: list[dict[str, Any]] = []
    for a in np.argsort(it["sent"], kind="stable").tolist():
        replica, mine = int(it["replica"][a]), log[begins[a] : ends[a]]
        if replica < 0 or not mine.size:
            continue
        start, end = int(mine["time"][0]), int(mine["time"][-1])
        idle, taken = free.setdefault(replica, []), busy.setdefault(replica, [])
        while taken and taken[0][0] <= start:
            heappush(idle, heappop(taken)[1])
        if idle:
            lane = heappop(idle)
        else:
            lane = lanes[replica] = lanes.get(replica, 0) + 1
        heappush(taken, (end, lane))
        name = f"request {rows[it['request'][a]]}"
        args = {"request_tokens": int(it["prompt"][a]), "response_tokens": int(it["generated"][a])}
        shared = {"ph": "X", "pid": replica, "tid": lane, "cat": "request"}
        span = {"ts": float(_microseconds(start)), "dur": float(_microseconds(end - start))}
        events.append(shared | span | {"name": name, "args": args | {"attempt": int(it["number"][a])}})
        phase, since = "queued", start
        for time, kind in zip(mine["time"].tolist(), mine["kind"].tolist(), strict=True):
            following = {
                records.ADMIT: "decode" if phase == "queued again" else "prefill",
                records.PREEMPT: "queued again",
                records.FIRST: "decode",
            }.get(kind)
            if following is None and time < end:
                continue
            if time > since:
                span = {"ts": float(_microseconds(since)), "dur": float(_microseconds(time - since))}
                events.append(shared | span | {"name": phase})
            if kind == records.PREEMPT:
                events.append(
                    {"ph": "i", "s": "t", "pid": replica, "tid": lane, "ts": span["ts"] + span["dur"]}
                    | {"name": "preempted", "cat": "request"}
                )
            phase, since = following or phase, time
    return events
