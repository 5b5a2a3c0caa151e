"""KV blocks that have an identity, compiled: the prefix cache of one replica after another.

Every full block carries a hash of all tokens up to its end. A freed block stays findable at the tail of a free list
until it is allocated anew from the list's head, so the least recently used is evicted, and of one sequence its end
before its beginning. Blocks are shared by counting references. Below the GPU there may be a host tier that keeps
the hashes of what was evicted, least recently used out first; loading from it takes time on a link of given bandwidth.

What tokens a block holds is known from the trace's hashes (`ids`), or from its sessions (`chain`: one number for
requests whose prompts continue one another), or not at all (key 0, which is never found).
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit

lean = njit(_nrt=False, no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""For what only compiled functions call, and that allocates nothing: no counting of references to the arrays that are
passed around (half of the time), no wrappers for Python (half of the compilation)."""

POOL = np.dtype(
    [
        ("nodes", np.int64),  # of the block lists, used so far
        ("spare", np.int64),  # first of the given back; -1 if none
        ("miss", np.uint64),  # the key that the stuck request lacked first
        ("stuck", np.int64),  # the request that did not fit at the head of the queue; -1
        ("wake", np.int64),  # blocks were freed, or `miss` was registered, since then
        ("host_used", np.int64),
        ("hits", np.int64),  # blocks found on the GPU
        ("host_hits", np.int64),
        ("asked", np.int64),  # full blocks of the prompts admitted
        ("kept", np.int64),  # block lists of prompts that do not run: computed and not yet sent, or fetched
        ("unsent", np.int64),  # blocks that a decode replica had already when it would have fetched them
        ("evictions", np.int64),  # of blocks that could have been found
    ],
    align=True,
)


class Pool(NamedTuple):
    """All replicas' blocks; the first axis is the replica. A list's sentinel is its last index."""

    state: np.ndarray  # POOL
    reference: np.ndarray  # (, blocks) how many sequences hold the block
    key: np.ndarray  # (, blocks) uint64; 0 = cannot be found
    before: np.ndarray  # (, blocks + 1) the free list (with FIFO: all blocks in the order of their allocation)
    after: np.ndarray
    table: np.ndarray  # (, 2**k) open addressing with linear probing: block + 1, or 0
    node_block: np.ndarray  # (, nodes) the block lists of the sequences, from their last block backwards
    node_before: np.ndarray
    host_key: np.ndarray  # (, host blocks) uint64
    host_before: np.ndarray  # (, host blocks + 1) least recently used first
    host_after: np.ndarray
    host_table: np.ndarray
    chain: np.ndarray  # (requests,) uint64; 0 = unknown
    ids: np.ndarray  # the traces' hashes, one request's after another's
    ids_start: np.ndarray  # (requests + 1,); empty without ids
    hash_tokens: int  # tokens that one of the ids stands for
    shared: int  # tokens that every prompt begins with
    fifo: int
    host_ticks: int  # to load one block from the host
    block_size: int
    most_kept: int  # for so many lists beside the running there is room


@lean
def mixed(a: Any, b: Any) -> Any:
    """A 64-bit hash of two, never 0."""
    z = np.uint64(a) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(b) * np.uint64(0xD1B54A32D192ED03)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)


@lean
def block_key(pool: Pool, request: int, i: int, prompt: int) -> Any:
    """What is in full block `i` of the request, all before it included; 0 if that is unknown."""
    end = (i + 1) * pool.block_size
    if end <= min(pool.shared, prompt):
        return mixed(np.uint64(1), np.uint64(i))
    if pool.ids_start.size > 0:
        if end > prompt:
            return np.uint64(0)
        at = pool.ids_start[request] + (end - 1) // pool.hash_tokens
        if at >= pool.ids_start[request + 1]:
            return np.uint64(0)
        return mixed(np.uint64(pool.ids[at]), np.uint64(end) + np.uint64(1 << 40))
    chain = pool.chain[request]
    return mixed(chain, np.uint64(i)) if chain else np.uint64(0)


@lean
def _home(key: Any, mask: int) -> Any:
    return np.int64(key >> np.uint64(8)) & mask


@lean
def _find(table: np.ndarray, keys: np.ndarray, key: Any) -> Any:
    """The block registered first under `key`, or -1."""
    mask = np.int64(table.size - 1)
    slot = _home(key, mask)
    while table[slot] != 0:
        b = np.int64(table[slot] - 1)
        if keys[b] == key:
            return b
        slot = (slot + 1) & mask
    return np.int64(-1)


@lean
def _insert(table: np.ndarray, key: Any, b: int) -> None:
    mask = np.int64(table.size - 1)
    slot = _home(key, mask)
    while table[slot] != 0:
        slot = (slot + 1) & mask
    table[slot] = b + 1


@lean
def _remove(table: np.ndarray, keys: np.ndarray, b: int) -> None:
    """Take block `b` out, closing the gap, so that equal keys keep their order."""
    mask = np.int64(table.size - 1)
    hole = _home(keys[b], mask)
    while table[hole] != b + 1:
        hole = (hole + 1) & mask
    slot = hole
    while True:
        slot = (slot + 1) & mask
        if table[slot] == 0:
            break
        home = _home(keys[table[slot] - 1], mask)
        if ((slot - home) & mask) >= ((slot - hole) & mask):
            table[hole] = table[slot]
            hole = slot
    table[hole] = 0


@lean
def _unlink(before: np.ndarray, after: np.ndarray, b: int) -> None:
    after[before[b]] = after[b]
    before[after[b]] = before[b]


@lean
def _link_last(before: np.ndarray, after: np.ndarray, b: int) -> None:
    end = before.size - 1
    last = before[end]
    after[last] = b
    before[b] = last
    after[b] = end
    before[end] = b


@lean
def clear(pool: Pool, r: int, blocks: int) -> None:
    """Replica `r` starts with `blocks` empty blocks, all free, in order; nothing is on its host."""
    me = pool.state[r]
    me.nodes = me.kept = 0
    me.spare = -1
    me.stuck = -1
    me.host_used = 0
    pool.reference[r, :] = 0
    pool.key[r, :] = np.uint64(0)
    pool.table[r, :] = 0
    pool.host_table[r, :] = 0
    for before, after in ((pool.before[r], pool.after[r]), (pool.host_before[r], pool.host_after[r])):
        before[-1] = after[-1] = before.size - 1
    for b in range(blocks):
        _link_last(pool.before[r], pool.after[r], b)


@lean
def _to_host(pool: Pool, r: int, key: Any) -> None:
    """Remember what is evicted from the GPU; the least recently used goes when the host is full."""
    me = pool.state[r]
    capacity = pool.host_key.shape[1]
    if capacity == 0:
        return
    keys, table, before, after = pool.host_key[r], pool.host_table[r], pool.host_before[r], pool.host_after[r]
    slot = _find(table, keys, key)
    if slot >= 0:
        _unlink(before, after, slot)
    else:
        if me.host_used < capacity:
            slot = me.host_used
            me.host_used += 1
        else:
            slot = np.int64(after[capacity])
            _unlink(before, after, slot)
            _remove(table, keys, slot)
        keys[slot] = key
        _insert(table, key, slot)
    _link_last(before, after, slot)


@lean
def _pop(pool: Pool, r: int, me: Any) -> Any:
    """Allocate the next block to be used: eviction, if it could still have been found."""
    before, after = pool.before[r], pool.after[r]
    b = np.int64(after[after.size - 1])
    if pool.fifo:
        while pool.reference[r, b] > 0:
            b = np.int64(after[b])
    _unlink(before, after, b)
    if pool.fifo:
        _link_last(before, after, b)
    key = pool.key[r, b]
    if key:
        _remove(pool.table[r], pool.key[r], b)
        pool.state[r].evictions += 1
        pool.key[r, b] = np.uint64(0)
        _to_host(pool, r, key)
    pool.reference[r, b] = 1
    me.free -= 1
    return b


@lean
def _hold(pool: Pool, r: int, sequence: Any, b: int) -> None:
    """Append block `b` to the sequence's list."""
    state = pool.state[r]
    if state.spare >= 0:
        node = state.spare
        state.spare = pool.node_before[r, node]
    else:
        node = state.nodes
        state.nodes += 1
    pool.node_block[r, node] = b
    pool.node_before[r, node] = sequence.node
    sequence.node = node
    sequence.blocks += 1


@lean
def _register(pool: Pool, r: int, b: int, key: Any) -> None:
    if key:
        pool.key[r, b] = key
        _insert(pool.table[r], key, b)
        if key == pool.state[r].miss:
            pool.state[r].wake = 1


@lean
def grow(pool: Pool, r: int, me: Any, sequence: Any, request: int, count: int, known: int) -> None:
    """Give the sequence `count` more blocks; what is now full of its first `known` tokens can be found from now on."""
    bs = pool.block_size
    full = min(sequence.computed, known) // bs
    held = sequence.blocks
    for i in range(sequence.registered, min(held, full)):
        node = sequence.node
        for _ in range(held - 1 - i):
            node = pool.node_before[r, node]
        _register(pool, r, pool.node_block[r, node], block_key(pool, request, i, sequence.prompt))
    for i in range(held, held + count):
        b = _pop(pool, r, me)
        _hold(pool, r, sequence, b)
        if i < full:
            _register(pool, r, b, block_key(pool, request, i, sequence.prompt))
    sequence.registered = max(sequence.registered, full)


@lean
def longest_hit(pool: Pool, r: int, request: int, prompt: int, most: int) -> Any:
    """Blocks at the beginning of the request that are found: on the GPU, of these not in use, then on the host; and
    the first key that is not found."""
    hits = 0
    idle: Any = 0
    miss = np.uint64(0)
    while hits < most:
        miss = block_key(pool, request, hits, prompt)
        b = _find(pool.table[r], pool.key[r], miss) if miss else np.int64(-1)
        if b < 0:
            break
        miss = np.uint64(0)
        idle += pool.reference[r, b] == 0
        hits += 1
    host = 0
    if pool.host_key.shape[1] > 0:
        while hits + host < most:
            key = block_key(pool, request, hits + host, prompt)
            if not key or _find(pool.host_table[r], pool.host_key[r], key) < 0:
                break
            host += 1
    return hits, idle, host, miss


@lean
def find_hits(pool: Pool, r: int, request: int, prompt: int) -> Any:
    """How many blocks of the prompt replica `r` would not have to compute."""
    hits, _, host, _ = longest_hit(pool, r, request, prompt, (prompt - 1) // pool.block_size)
    return hits + host


@lean
def take_hits(pool: Pool, r: int, me: Any, sequence: Any, request: int, hits: int, host: int) -> None:
    """Give the sequence the blocks that longest_hit found, those of the host copied into new ones."""
    for i in range(hits):
        b = _find(pool.table[r], pool.key[r], block_key(pool, request, i, sequence.prompt))
        if pool.reference[r, b] == 0:
            me.free -= 1
            if not pool.fifo:
                _unlink(pool.before[r], pool.after[r], b)
        pool.reference[r, b] += 1
        _hold(pool, r, sequence, b)
    for i in range(hits, hits + host):
        key = block_key(pool, request, i, sequence.prompt)
        slot = _find(pool.host_table[r], pool.host_key[r], key)
        if slot >= 0:  # else it was displaced by what made room for those before it
            _unlink(pool.host_before[r], pool.host_after[r], slot)
            _link_last(pool.host_before[r], pool.host_after[r], slot)
        b = _pop(pool, r, me)
        _hold(pool, r, sequence, b)
        _register(pool, r, b, key)
    sequence.registered = hits + host
    pool.state[r].hits += hits
    pool.state[r].host_hits += host


@lean
def give_back(pool: Pool, r: int, me: Any, node: Any) -> None:
    """Nobody needs the blocks of the list any more that ends at `node`: the last one first; what is full stays
    findable."""
    state = pool.state[r]
    while node >= 0:
        b = pool.node_block[r, node]
        pool.reference[r, b] -= 1
        if pool.reference[r, b] == 0:
            me.free += 1
            if not pool.fifo:
                _link_last(pool.before[r], pool.after[r], b)
        following = np.int64(pool.node_before[r, node])
        pool.node_before[r, node] = state.spare
        state.spare = node
        node = following
    state.wake = 1


@lean
def release(pool: Pool, r: int, me: Any, sequence: Any) -> None:
    """The sequence gives its blocks back."""
    give_back(pool, r, me, np.int64(sequence.node))
    sequence.node = -1
    sequence.blocks = 0
    sequence.registered = 0


@lean
def register_prompt(pool: Pool, r: int, request: int, prompt: int, node: Any) -> None:
    """A prompt computed elsewhere has arrived in the blocks of the list that ends at `node`: it can be found now."""
    i = (prompt + pool.block_size - 1) // pool.block_size - 1
    while node >= 0:
        b = pool.node_block[r, node]
        if (i + 1) * pool.block_size <= prompt and pool.key[r, b] == 0:
            _register(pool, r, b, block_key(pool, request, i, prompt))
        node = np.int64(pool.node_before[r, node])
        i -= 1


@lean
def holds_invariants(pool: Pool, r: int, blocks: int, free: int) -> bool:
    """Whether free blocks and references agree, and the table finds exactly what has a key (debug builds)."""
    unused: Any = 0
    findable: Any = 0
    listed: Any = 0
    for b in range(blocks):
        unused += pool.reference[r, b] == 0
        if pool.key[r, b]:
            findable += 1
            if _find(pool.table[r], pool.key[r], pool.key[r, b]) < 0:
                return False
    for slot in range(pool.table.shape[1]):
        listed += pool.table[r, slot] != 0
    linked = 0
    at: Any = np.int64(pool.after[r, -1])
    while at != pool.after.shape[1] - 1:
        linked += 1
        if not pool.fifo and pool.reference[r, at] > 0:
            return False
        at = np.int64(pool.after[r, at])
    return unused == free and findable == listed and linked == (blocks if pool.fifo else free)
