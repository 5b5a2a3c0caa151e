"""What the server said of itself during a run, and whether client and server saw the same latencies.

A server's histogram counts its requests by bucket. The client's sample is put into the same buckets. They agree if
every quantile of the one lies in the same bucket as that of the other: more the buckets cannot show. The client sees
every latency a little later than the server (network, reading), so a client's quantile may lie beyond the bucket by
`EDGE`.
"""

from typing import TYPE_CHECKING

import msgspec
import numpy as np

if TYPE_CHECKING:
    import polars as pl

LEVELS = (50, 90, 99)
EDGE = 0.005
"""Seconds, and `EDGE_SHARE` of the edge: how far a client's quantile may lie outside the server's bucket."""
EDGE_SHARE = 0.02
COUNT_SHARE = 0.02
"""Counts that differ by more are of different requests: other clients, or lost ones."""


class Histogram(msgspec.Struct, kw_only=True):
    """What a server's histogram gained during the run."""

    edges: list[float]
    """Upper edges of the buckets in seconds, ascending; the last bucket has none."""
    counts: list[int]
    """Requests in each bucket: one more than there are edges."""
    sum: float
    """Seconds of all of them."""


class ServerMetrics(msgspec.Struct, kw_only=True):
    """What was read from the server's metrics page."""

    name: str
    """`vLLM`, `SGLang`, `llama.cpp`, `TGI` or `Dynamo`, by the names on the page."""
    url: str
    interval: float
    """Seconds between readings, as planned."""
    scrapes: int = 0
    """Readings that succeeded."""
    failed: int = 0
    error: str | None = None
    """Why the last of those failed."""
    restarts: int = 0
    """How often the server's counters began anew."""
    histograms: dict[str, Histogram] = {}
    """`ttft` and `e2e`, of the servers that have them."""


class Level(msgspec.Struct, frozen=True, kw_only=True):
    """A quantile: the server's bucket and the client's value."""

    level: int
    low: float
    high: float | None
    """Null: the last bucket has no upper edge."""
    client: float
    within: bool


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """One latency, as the server's histogram and as the client's sample have it (from send), in seconds."""

    metric: str
    """`ttft` or `e2e`."""
    server_n: int
    client_n: int
    server_mean: float
    client_mean: float
    levels: list[Level]
    """Those that the counts support."""
    largest_gap: float
    """Largest difference, over the edges, of the shares of requests at or below an edge."""
    agree: bool | None
    """Whether all levels are within their buckets. Null: the counts are of different requests."""


def agreements(server: ServerMetrics | None, table: "pl.DataFrame") -> list[Agreement]:
    """The comparisons that can be made for the attempts in `table`; none without histograms or answers."""
    if server is None:
        return []
    sent = table.filter(table["sent"].is_not_null())
    answered = sent.filter(sent["status"] == "ok")
    samples = {
        "ttft": (sent["first_token"] - sent["sent"]).drop_nulls().to_numpy(),
        "e2e": (answered["last_token"] - answered["sent"]).drop_nulls().to_numpy(),
    }
    return [
        _agreement(which, histogram, np.sort(samples[which]))
        for which, histogram in server.histograms.items()
        if which in samples and sum(histogram.counts) > 0 and len(samples[which]) > 0
    ]


def _agreement(which: str, histogram: Histogram, client: np.ndarray) -> Agreement:
    n, total = len(client), sum(histogram.counts)
    reach = np.cumsum(histogram.counts)
    edges = np.array(histogram.edges)
    levels = []
    for level in LEVELS:
        if n * (100 - level) < 100:
            break
        bucket = int(np.searchsorted(reach, np.ceil(level / 100 * total)))
        low = float(edges[bucket - 1]) if bucket else 0.0
        high = float(edges[bucket]) if bucket < len(edges) else None
        value = float(client[max(0, int(np.ceil(level / 100 * n)) - 1)])
        beyond = high is not None and value > high * (1 + EDGE_SHARE) + EDGE
        within = value >= low * (1 - EDGE_SHARE) and not beyond
        levels.append(Level(level=level, low=low, high=high, client=value, within=within))
    shares = np.searchsorted(client, edges, side="right") / n
    gap = float(np.abs(shares - reach[:-1] / total).max()) if len(edges) else 0.0
    same = abs(total - n) <= max(1.0, COUNT_SHARE * n)
    return Agreement(
        metric=which,
        server_n=total,
        client_n=n,
        server_mean=histogram.sum / total,
        client_mean=float(client.mean()),
        levels=levels,
        largest_gap=gap,
        agree=all(level.within for level in levels) if same and levels else None,
    )
