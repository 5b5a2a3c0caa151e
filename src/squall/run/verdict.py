"""Whether a replay's numbers can be believed: VALID, or CLIENT-LIMITED with the gates that failed.

An open loop whose sends drift behind the schedule measures its own sender. All gates look at first attempts: retries
are load, but no arrivals. A quantile is the order statistic below it, so that one hiccup in a short run is forgiven.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl

from squall.run.attempt import Client
from squall.run.table import Run

LATENESS_P99 = 0.005
LATENESS_P999 = 0.020
SLICE = 10.0
SLICE_SHARE = 0.01
GAP_CV = 0.03
STALL_P999 = 0.010
COLLECTION = 0.005
CPU_SHARE = 0.8
MOMENTS = ("scheduled", "sent", "first_byte", "first_token", "last_token", "done", "ended")


def judge(run: Run, clients: list[Client]) -> list[str]:
    """The gates that `run` fails, each as a sentence; none: VALID. `clients` are the workers that came to their end.

    A closed loop (`open_loop` False) is late by design: only the client's own faults and its stalls count.
    """
    first = run.table.filter(pl.col("attempt") == 1)
    reasons = _invariants(run.table)
    faults = (run.table["status"] == "client_fault").sum()
    if faults:
        kinds = run.table.filter(pl.col("status") == "client_fault")["reason"].drop_nulls().unique().sort().to_list()
        reasons.append(f"{faults} attempts failed by the client's own fault ({', '.join(kinds)})")
    if run.meta.open_loop:
        reasons += _lateness(first, clients) + _delivery(first) + _shape(first)
    stall = max((client.stall_p999 for client in clients), default=0.0)
    if stall > STALL_P999:
        reasons.append(
            f"the sending loop stalled: p99.9 of its heartbeat {stall * 1e3:.1f} ms (limit {STALL_P999 * 1e3:g} ms)"
        )
    collection = max((client.collection for client in clients), default=0.0)
    if collection > COLLECTION:
        reasons.append(f"a garbage collection took {collection * 1e3:.1f} ms (limit {COLLECTION * 1e3:g} ms)")
    busy = max((client.cpu / client.wall for client in clients if client.wall > 1), default=0.0)
    if busy > CPU_SHARE:
        reasons.append(
            f"a sending process used {100 * busy:.0f} % of a core (limit {100 * CPU_SHARE:g} %): use more --workers"
        )
    return reasons


def _invariants(table: pl.DataFrame) -> list[str]:
    """A row whose moments are out of order, or whose tokens came at no time, is a fault of the recorder."""
    wrong = pl.lit(False)
    for earlier, later in pairwise(MOMENTS):
        wrong = wrong | (pl.col(earlier) > pl.col(later)).fill_null(False)
    wrong = wrong | ((pl.col("response_tokens") > 0) != pl.col("first_token").is_not_null()).fill_null(False)
    broken = table.filter(wrong)
    if broken.is_empty():
        return []
    return [f"{len(broken)} rows contradict themselves, the first is request {broken['request'][0]}: a fault of ours"]


def sent_against_asked(run: Run) -> dict[str, Any]:
    """What was sent beside what was asked, over first attempts: count, rate, CV of the gaps, and dispersion.

    Dispersion is the variance over the mean of the counts in windows of 1, 10 and 100 mean gaps; None where fewer than
    ten windows fit. It sees what the CV of gaps does not: gaps in another order.
    """
    first = run.table.filter((pl.col("attempt") == 1) & pl.col("sent").is_not_null())
    result: dict[str, Any] = {"requests": {"asked": run.meta.offered, "sent": len(first)}}
    if len(first) < 3:
        return result
    asked, sent = (np.sort(first[name].to_numpy()) for name in ("scheduled", "sent"))
    pairs = {"rate": _rate, "gap_cv": _gap_cv}
    result |= {name: {"asked": _known(of(asked)), "sent": _known(of(sent))} for name, of in pairs.items()}
    gap = float(asked[-1] - asked[0]) / (len(asked) - 1)
    result["dispersion"] = [
        {"window": width * gap, "asked": _dispersion(asked, width * gap), "sent": _dispersion(sent, width * gap)}
        for width in (1, 10, 100)
        if gap > 0
    ]
    return result


def _rate(times: np.ndarray) -> float:
    return (len(times) - 1) / (times[-1] - times[0]) if times[-1] > times[0] else float("nan")


def _dispersion(times: np.ndarray, width: float) -> float | None:
    windows = int((times[-1] - times[0]) // width)
    if windows < 10:
        return None
    counts = np.histogram(times, windows, (times[0], times[0] + windows * width))[0]
    return float(counts.var() / counts.mean())


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _lateness(first: pl.DataFrame, clients: list[Client]) -> list[str]:
    late = (first["sent"] - first["scheduled"]).drop_nulls().to_numpy()
    if not late.size:
        return []
    reasons = []
    cause = max(
        ("the pacer", max((client.pacer_p99 for client in clients), default=0.0)),
        ("opening connections", max((client.connect_p99 for client in clients), default=0.0)),
        ("writing", max((client.write_p99 for client in clients), default=0.0)),
        key=lambda pair: pair[1],
    )
    for name, share, limit in (("p99", 0.99, LATENESS_P99), ("p99.9", 0.999, LATENESS_P999)):
        value = float(np.quantile(late, share, method="lower"))
        if value > limit:
            because = f", mostly {cause[0]} (p99 {cause[1] * 1e3:.1f} ms)" if clients and cause[1] > 0 else ""
            reasons.append(f"requests were sent late: {name} {value * 1e3:.1f} ms (limit {limit * 1e3:g} ms){because}")
    return reasons


def _delivery(first: pl.DataFrame) -> list[str]:
    """At the end of every slice, plus the lateness allowed, at most 1 % of its requests may still be unsent."""
    sent = first.filter(pl.col("sent").is_not_null())
    if sent.is_empty():
        return []
    scheduled, gone = np.sort(sent["scheduled"].to_numpy()), np.sort(sent["sent"].to_numpy())
    edges = np.arange(SLICE, scheduled[-1] + SLICE, SLICE)
    asked = np.searchsorted(scheduled, edges)
    behind = asked - np.searchsorted(gone, edges + LATENESS_P999)
    wrong = behind > np.maximum(1, SLICE_SHARE * np.diff(asked, prepend=0))
    if not wrong.any():
        return []
    return [
        f"sending fell behind: {behind.max():,} requests were still to be sent at the end of a slice of {SLICE:g} s "
        f"({wrong.sum()} of {len(edges)} slices)"
    ]


def _shape(first: pl.DataFrame) -> list[str]:
    sent = first.filter(pl.col("sent").is_not_null())
    if len(sent) < 30:
        return []
    asked, got = _gap_cv(sent["scheduled"].to_numpy()), _gap_cv(sent["sent"].to_numpy())
    limit = GAP_CV * max(asked, 1.0)  # of even gaps, whose CV is 0, nobody can be within 3 %
    if not np.isfinite(asked) or abs(got - asked) <= limit:
        return []
    return [f"the gaps between sends have CV {got:.3f}, the schedule's {asked:.3f} (limit {limit:.3f} apart)"]


def _gap_cv(times: np.ndarray) -> float:
    gaps = np.diff(np.sort(times))
    mean = gaps.mean()
    return float(gaps.std() / mean) if mean > 0 else float("nan")
