"""Prefix sharing: how much of the prompts a cache has seen before, and how large it must be to remember.

A prompt is a sequence of blocks, and equal hashes mean equal text up to and including the block. With an infinite cache
a block hits if an earlier request had it; what a server saves is the run of hits at the front of the prompt. With a
cache of C blocks that forgets the least recently used, a block hits if its reuse distance, the number of distinct
blocks touched since its last use, is below C (Mattson et al., Evaluation techniques for storage hierarchies, 1970).
"""

import numpy as np
import polars as pl
from msgspec import Struct

from squall.characterize.summary import Octaves, Summary, octaves, summary


class CacheSize(Struct, frozen=True, kw_only=True):
    """A cache that forgets the least recently used block."""

    blocks: int
    hit_share: float
    """Share of all blocks that hit."""


class Prefixes(Struct, frozen=True, kw_only=True):
    """Prefix sharing among the requests with block hashes; `requests` is 0 and the rest null where there are none."""

    requests: int = 0
    block_size: int | None = None
    """Tokens per block."""
    blocks: int = 0
    distinct: int = 0
    seen_share: float | None = None
    """Share of blocks that an earlier request had."""
    hit_share: float | None = None
    """Share of blocks in the run of seen ones at the front of their prompt: hits of an infinite prefix cache."""
    sharing_share: float | None = None
    """Share of requests with at least one hit."""
    shared: Summary = Summary()
    """Blocks of that run per request."""
    shared_octaves: Octaves = Octaves()
    """Requests by the blocks of that run."""
    popularity: Summary = Summary()
    """Requests per distinct block."""
    reuse_time: Summary = Summary()
    """Seconds since the last use of a block that is used again."""
    reuse_distance: Summary = Summary()
    """Distinct blocks used since."""
    cache: list[CacheSize] = []
    """Hit share by size of the cache, doubling up to one that forgets nothing."""


def prefix_sharing(table: pl.DataFrame, block_size: int | None) -> Prefixes:
    """The `prefix` of the requests in `table` (columns of the Trace, sorted by arrival)."""
    rows = table.select("arrival", "prefix").filter(pl.col("prefix").list.len() > 0)
    if rows.is_empty():
        return Prefixes()
    sizes = rows["prefix"].list.len().to_numpy().astype(np.int64)
    _, born, block = np.unique(rows["prefix"].explode().to_numpy(), return_index=True, return_inverse=True)
    request = np.repeat(np.arange(sizes.size), sizes)
    previous = last_use(block)
    seen = request[born[block]] < request
    first = np.cumsum(sizes) - sizes
    place = np.arange(block.size) - np.repeat(first, sizes)
    shared = np.minimum.reduceat(np.where(seen, np.repeat(sizes, sizes), place), first)
    again = np.flatnonzero(seen)
    distance = reuse_distances(previous)[again]
    arrival = rows["arrival"].to_numpy()
    return Prefixes(
        requests=sizes.size,
        block_size=block_size,
        blocks=block.size,
        distinct=int(block.max()) + 1,
        seen_share=float(seen.mean()),
        hit_share=float(shared.sum() / block.size),
        sharing_share=float(np.mean(shared > 0)),
        shared=summary(shared),
        shared_octaves=octaves(shared),
        popularity=summary(np.bincount(block)),
        reuse_time=summary(arrival[request[again]] - arrival[request[previous[again]]]),
        reuse_distance=summary(distance),
        cache=_cache_sizes(distance, block.size),
    )


def last_use(block: np.ndarray) -> np.ndarray:
    """For each use of a block the place of the use before it, -1 for the first."""
    order = np.argsort(block, kind="stable")
    previous = np.full(block.size, -1)
    same = block[order[1:]] == block[order[:-1]]
    previous[order[1:][same]] = order[:-1][same]
    return previous


def reuse_distances(previous: np.ndarray) -> np.ndarray:
    """Distinct blocks used between each use and the one before it (`previous`, from `last_use`); -1 for first uses.

    Between them lie i - previous_i - 1 uses; those that are not the first of their block since then, j with
    previous_j > previous_i and j < i, repeat a block already counted. All j are counted at once by merging: in
    stretches of doubling length, each right half counts the greater elements of its left half.
    """
    again = np.flatnonzero(previous >= 0)
    by_value = np.argsort(previous[again], kind="stable")
    repeats, width = np.zeros(again.size, np.int64), 1
    place = np.arange(again.size)
    while width < again.size:
        pair = place // (2 * width)
        order = by_value[np.argsort(pair[by_value], kind="stable")]
        left = (order // width) % 2 == 0
        below = np.cumsum(left)
        first = np.flatnonzero(np.diff(pair, prepend=-1))
        size = np.diff(first, append=again.size)
        until = np.repeat(below[first + size - 1], size)
        repeats[order[~left]] += (until - below)[~left]
        width *= 2
    distance = np.full(previous.size, -1)
    distance[again] = again - previous[again] - 1 - repeats
    return distance


def _cache_sizes(distance: np.ndarray, blocks: int) -> list[CacheSize]:
    if distance.size == 0:
        return []
    ordered = np.sort(distance)
    sizes = 2 ** np.arange(int(ordered[-1]).bit_length() + 1)
    hits = np.searchsorted(ordered, sizes)
    return [CacheSize(blocks=int(c), hit_share=float(n / blocks)) for c, n in zip(sizes, hits, strict=True)]
