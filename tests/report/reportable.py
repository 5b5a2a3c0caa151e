"""Traces and runs to report on, made up and hostile: their names and messages try to break out of the page."""

from typing import Any

import numpy as np
import polars as pl

from squall.run import Run, RunMeta
from squall.trace import Trace, TraceMeta

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)> {{ 7*7 }} \u2028 & ' \""


def trace(
    requests: int = 2000, source: str = "made.csv", model: str | None = "GPT-4", seed: int = 0, days: float = 2.0
) -> Trace:
    """Some days of bursty requests of two services, some of them failed, with block hashes of their prompts."""
    rng = np.random.default_rng(seed)
    gaps = rng.gamma(0.4, 1 / 0.4, requests)
    response = np.where(rng.random(requests) < 0.05, 0, rng.integers(1, 800, requests))
    columns = {
        "arrival": np.cumsum(gaps) / gaps.sum() * days * 86400,
        "request_tokens": np.exp(rng.normal(6, 1, requests)).astype(int) + 1,
        "response_tokens": response,
        "service": ["api" if k % 3 else "conversation" for k in range(requests)],
        "model": [model] * requests,
        "prefix": [list(range(k % 5 + 1)) for k in range(requests)],
    }
    return Trace.of(columns, TraceMeta(source=source, format="burstgpt", midnight=0.0, weekday=0, block_size=16))


def run(
    title: str = "a run", requests: int = 500, kind: str = "simulation", seed: int = 0, message: str = "", **meta: Any
) -> Run:
    """Requests at 10/s with log-normal latencies, one in ten failed; simulations have a time series."""
    rng = np.random.default_rng(seed)
    scheduled = np.cumsum(rng.exponential(0.1, requests))
    first = scheduled + rng.lognormal(-1, 1, requests)
    tokens = rng.integers(1, 200, requests)
    last = first + (tokens - 1) * 0.01
    ok = rng.random(requests) > 0.1

    def where_ok(values: np.ndarray) -> pl.Series:
        return pl.Series(np.where(ok, values, np.nan)).fill_nan(None)

    columns = {
        "request": np.arange(requests),
        "attempt": np.ones(requests, int),
        "scheduled": scheduled,
        "sent": scheduled,
        "first_token": where_ok(first),
        "last_token": where_ok(last),
        "ended": np.where(ok, last, scheduled + 1),
        "status": pl.Series(np.where(ok, "ok", "http_error")),
        "http_status": np.where(ok, 200, 503),
        "message": pl.Series([None if good else message for good in ok], dtype=pl.String),
        "request_tokens": tokens * 4,
        "response_tokens": tokens,
    }
    series = None
    if kind == "simulation":
        time = np.arange(1.0, last.max() + 1)
        series = {"time": time, "running": time % 7, "waiting": time % 5, "kv_used": (time % 10) / 10}
        meta = {"step_time": "uncalibrated roofline"} | meta
    return Run.of(columns, RunMeta(kind=kind, title=title, offered=requests, **meta), series)
