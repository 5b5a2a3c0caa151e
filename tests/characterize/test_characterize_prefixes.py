"""Prefix sharing against a cache simulated block by block, and the published share of Mooncake."""

from collections import OrderedDict

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

import squall
from squall.characterize.prefixes import last_use, prefix_sharing, reuse_distances

PROMPTS = st.lists(st.lists(st.integers(0, 12), min_size=0, max_size=8), min_size=1, max_size=40)


def table(prompts: list[list[int] | None]) -> pl.DataFrame:
    arrival = pl.Series("arrival", np.arange(len(prompts), dtype=float) * 2)
    return pl.DataFrame([arrival, pl.Series("prefix", prompts, dtype=pl.List(pl.Int64))])


@given(st.lists(st.integers(0, 20), max_size=150))
def test_distances_are_the_distinct_blocks_between(block: list[int]) -> None:
    uses = np.array(block, dtype=np.int64)
    previous = last_use(uses)
    for place, distance in enumerate(reuse_distances(previous)):
        before = [k for k in range(place) if block[k] == block[place]]
        assert previous[place] == (before[-1] if before else -1)
        assert distance == (len(set(block[before[-1] + 1 : place])) if before else -1)


@given(PROMPTS)
def test_shares_are_those_of_caches_run_block_by_block(prompts: list[list[int]]) -> None:
    found = prefix_sharing(table(prompts), 16)
    used = [prompt for prompt in prompts if prompt]
    assert found.requests == len(used)
    if not used:
        return
    cache: set[int] = set()
    seen, runs = 0, []
    for prompt in used:
        hits = [block in cache for block in prompt]
        seen += sum(hits)
        runs.append(hits.index(False) if False in hits else len(hits))
        cache |= set(prompt)
    total = sum(map(len, used))
    assert (found.blocks, found.distinct) == (total, len(cache))
    assert found.seen_share == pytest.approx(seen / total)
    assert found.hit_share == pytest.approx(sum(runs) / total)
    assert found.sharing_share == pytest.approx(np.mean([run > 0 for run in runs]))


def test_a_cache_of_each_size_hits_as_often_as_it_would() -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.choice(60, 6, replace=False).tolist() for _ in range(300)]
    for size in prefix_sharing(table(prompts), 16).cache:
        cache: OrderedDict[int, None] = OrderedDict()
        hits = 0
        for block in (block for prompt in prompts for block in prompt):
            hits += block in cache
            cache[block] = None
            cache.move_to_end(block)
            if len(cache) > size.blocks:
                cache.popitem(last=False)
        assert size.hit_share == pytest.approx(hits / 1800)


def test_without_hashes_there_is_nothing() -> None:
    assert prefix_sharing(table([None, [], None]), None).requests == 0
    one = prefix_sharing(table([[7]]), 16)
    assert (one.seen_share, one.shared.max, one.cache) == (0.0, 0, [])


def test_mooncake(traces) -> None:  # type: ignore[no-untyped-def]
    found = squall.characterize(traces / "mooncake" / "conversation_trace.jsonl").total.prefixes
    assert (found.requests, found.distinct, found.block_size) == (12_031, 182_790, 512)
    assert found.hit_share == pytest.approx(0.366, abs=0.0005)
    # Hashes are of the whole prefix, so that a block which was seen has all before it seen.
    assert found.seen_share == found.hit_share
    assert found.cache[-1].hit_share == pytest.approx(found.hit_share)
