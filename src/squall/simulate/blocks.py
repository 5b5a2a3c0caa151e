"""KV blocks that have an identity, compiled: the prefix cache of one replica after another.

Every full block carries a hash of all tokens up to its end. A freed block stays findable at the tail of a free list
until it is allocated anew from the list's head, so the least recently used is evicted, and of one sequence its end
before its beginning. Blocks are shared by counting references. Below the GPU there may be a host tier that keeps
the hashes of what was evicted, least recently used out first; loading from it takes time on a link of given bandwidth.

What tokens a block holds is known from the trace's hashes (`ids`), or from its sessions (`chain`: one number for
requests whose prompts continue one another), or not at all (group 0, which is never found). Blocks are found through
pages: what up to 32 neighbouring blocks of a prompt hold has one hash, their group; its page has a place for each.
"""

from typing import Any, NamedTuple

import numpy as np

from squall.native import lean, prefetch

NEVER: Any = np.int64(2**62)

POOL = np.dtype(
    [
        ("nodes", np.int64),  # pieces of the block lists, used so far
        ("spare", np.int64),  # first of the given back; -1 if none
        ("pages", np.int64),  # used so far
        ("spare_page", np.int64),
        ("miss", np.uint64),  # of the block that the stuck request lacked first
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


BLOCK = np.dtype(
    [
        ("reference", np.int32),  # how many sequences hold it
        ("place", np.int32),  # where it can be found: 1 + PAGE * its page + its place there; 0 = nowhere
        ("twin", np.int32),  # 1 + the next block with the same content, 0 = none
        ("before", np.int32),  # the free list (with FIFO: all blocks in the order of their allocation)
        ("after", np.int32),
    ],
    align=True,
)

PAGE = 32  # blocks
PIECE = 16  # of a list: as many as lie side by side in memory


class Pool(NamedTuple):
    """All replicas' blocks; the first axis is the replica. A list's sentinel is its last index."""

    state: np.ndarray  # POOL
    block: np.ndarray  # (, blocks + 1) BLOCK
    page_group: np.ndarray  # (, pages) uint64
    page_count: np.ndarray  # (, pages) of its places in use; of a spare page: the next one, -1 if none
    page_block: np.ndarray  # (, pages, PAGE) 1 + the block registered first, 0 = none
    page_table: np.ndarray  # (, 2**k) open addressing with linear probing: page + 1, or 0
    held: np.ndarray  # (, nodes, PIECE) the block lists of the sequences, in pieces
    before: np.ndarray  # (, nodes) the piece before it; of a spare one: the next, -1 if none
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
def _group(pool: Pool, request: int, i: int, prompt: int) -> Any:
    """The group of full block `i` of the request, which stands for all before it too (0: unknown), and before which
    block it ends."""
    end = (i + 1) * pool.block_size
    page = np.int64(i) // PAGE
    until: Any = (page + 1) * PAGE
    if end <= min(pool.shared, prompt):
        return mixed(np.uint64(1), np.uint64(page)), min(until, min(pool.shared, prompt) // pool.block_size)
    if pool.ids_start.size > 0:
        at = (end - 1) // pool.hash_tokens
        if end > prompt or pool.ids_start[request] + at >= pool.ids_start[request + 1]:
            return np.uint64(0), NEVER
        until = min(until, (at + 1) * pool.hash_tokens // pool.block_size, prompt // pool.block_size)
        return mixed(np.uint64(pool.ids[pool.ids_start[request] + at]), np.uint64(page) + np.uint64(1 << 40)), until
    chain = pool.chain[request]
    if chain:
        return mixed(chain, np.uint64(page)), until
    return np.uint64(0), NEVER


@lean
def _content(group: Any, i: Any) -> Any:
    """A number for what block `i` of the group holds."""
    return group + (np.uint64(i % PAGE) << np.uint64(8))


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
def _unlink(block: np.ndarray, b: int) -> None:
    it = block[b]
    block[it.before].after = it.after
    block[it.after].before = it.before


@lean
def _link_last(block: np.ndarray, b: int) -> None:
    end = block.size - 1
    it, ending = block[b], block[end]
    it.before = ending.before
    it.after = end
    block[ending.before].after = b
    ending.before = b


@lean
def _unlink_host(before: np.ndarray, after: np.ndarray, b: int) -> None:
    after[before[b]] = after[b]
    before[after[b]] = before[b]


@lean
def _link_last_host(before: np.ndarray, after: np.ndarray, b: int) -> None:
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
    me.pages = 0
    me.spare_page = -1
    pool.page_table[r, :] = 0
    pool.host_table[r, :] = 0
    end: Any = pool.host_before.shape[1] - 1
    pool.host_before[r, end] = pool.host_after[r, end] = end
    block = pool.block[r]
    end = block.size - 1
    block[end].before = block[end].after = end
    for b in range(block.size):
        block[b].reference = block[b].place = block[b].twin = 0
        if b < blocks:
            _link_last(block, b)


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
        _unlink_host(before, after, slot)
    else:
        if me.host_used < capacity:
            slot = me.host_used
            me.host_used += 1
        else:
            slot = np.int64(after[capacity])
            _unlink_host(before, after, slot)
            _remove(table, keys, slot)
        keys[slot] = key
        _insert(table, key, slot)
    _link_last_host(before, after, slot)


@lean
def _unregister(pool: Pool, r: int, b: int) -> None:
    """Block `b` cannot be found any more; another one with the same content takes its place."""
    it = pool.block[r, b]
    page, at = (it.place - 1) // PAGE, (it.place - 1) % PAGE
    places = pool.page_block[r, page]
    if places[at] == b + 1:
        places[at] = it.twin
        if it.twin == 0:
            pool.page_count[r, page] -= 1
            if pool.page_count[r, page] == 0:
                _remove(pool.page_table[r], pool.page_group[r], page)
                pool.page_count[r, page] = pool.state[r].spare_page
                pool.state[r].spare_page = page
    else:
        other = pool.block[r, places[at] - 1]
        while other.twin != b + 1:
            other = pool.block[r, other.twin - 1]
        other.twin = it.twin
    it.place = 0


@lean
def _pop(pool: Pool, r: int, me: Any) -> Any:
    """Allocate the next block to be used: eviction, if it could still have been found."""
    block = pool.block[r]
    b = np.int64(block[block.size - 1].after)
    if pool.fifo:
        while block[b].reference > 0:
            b = np.int64(block[b].after)
    prefetch(block, np.int64(block[b].after))  # it is the next
    _unlink(block, b)
    if pool.fifo:
        _link_last(block, b)
    it = block[b]
    if it.place > 0:
        if pool.host_key.shape[1] > 0:
            _to_host(pool, r, _content(pool.page_group[r, (it.place - 1) // PAGE], (it.place - 1) % PAGE))
        _unregister(pool, r, b)
        pool.state[r].evictions += 1
    it.reference = 1
    me.free -= 1
    return b


@lean
def _hold(pool: Pool, r: int, sequence: Any, b: int) -> None:
    """Append block `b` to the sequence's list."""
    at = sequence.blocks % PIECE
    if at == 0:
        state = pool.state[r]
        if state.spare >= 0:
            node = state.spare
            state.spare = pool.before[r, node]
        else:
            node = state.nodes
            state.nodes += 1
        pool.before[r, node] = sequence.node
        sequence.node = node
    pool.held[r, sequence.node, at] = b
    sequence.blocks += 1


@lean
def _register(pool: Pool, r: int, b: int, group: Any, i: Any) -> None:
    """Block `b` can be found as block `i` of the group."""
    if group == 0:
        return
    state = pool.state[r]
    page = _find(pool.page_table[r], pool.page_group[r], group)
    if page < 0:
        if state.spare_page >= 0:
            page = state.spare_page
            state.spare_page = pool.page_count[r, page]
        else:
            page = state.pages
            state.pages += 1
            pool.page_block[r, page, :] = 0
        pool.page_group[r, page] = group
        pool.page_count[r, page] = 0
        _insert(pool.page_table[r], group, page)
    at = i % PAGE
    it = pool.block[r, b]
    it.place = 1 + page * PAGE + at
    it.twin = 0
    first = pool.page_block[r, page, at]
    if first == 0:
        pool.page_block[r, page, at] = b + 1
        pool.page_count[r, page] += 1
    else:
        other = pool.block[r, first - 1]
        while other.twin > 0:
            other = pool.block[r, other.twin - 1]
        other.twin = b + 1
    if _content(group, i) == state.miss:
        state.wake = 1


@lean
def grow(pool: Pool, r: int, me: Any, sequence: Any, request: int, count: int, known: int) -> None:
    """Give the sequence `count` more blocks; what is now full of its first `known` tokens can be found from now on."""
    full = min(sequence.computed, known) // pool.block_size
    held = sequence.blocks
    group, until = np.uint64(0), np.int64(0)
    for i in range(sequence.registered, min(held, full)):
        node = np.int64(sequence.node)
        for _ in range((held - 1) // PIECE - i // PIECE):
            node = np.int64(pool.before[r, node])
        if i >= until:
            group, until = _group(pool, request, i, sequence.prompt)
        _register(pool, r, np.int64(pool.held[r, node, i % PIECE]), group, i)
    for i in range(held, held + count):
        b = _pop(pool, r, me)
        _hold(pool, r, sequence, b)
        if i < full:
            if i >= until:
                group, until = _group(pool, request, i, sequence.prompt)
            _register(pool, r, b, group, i)
    sequence.registered = max(sequence.registered, full)


@lean
def longest_hit(pool: Pool, r: int, request: int, prompt: int, most: int) -> Any:
    """Blocks at the beginning of the request that are found: on the GPU, of these not in use, then on the host; and
    the content of the first one that is not found."""
    hits = 0
    idle: Any = 0
    miss = np.uint64(0)
    group, until, page = np.uint64(0), np.int64(0), np.int64(-1)
    while hits < most:
        if hits >= until:
            group, until = _group(pool, request, hits, prompt)
            page = _find(pool.page_table[r], pool.page_group[r], group) if group else np.int64(-1)
        b = np.int64(pool.page_block[r, page, hits % PAGE]) - 1 if page >= 0 else np.int64(-1)
        if b < 0:
            if group:
                miss = _content(group, hits)
            break
        idle += pool.block[r, b].reference == 0
        hits += 1
    host = 0
    if pool.host_key.shape[1] > 0:
        while hits + host < most:
            group, until = _group(pool, request, hits + host, prompt)
            if not group or _find(pool.host_table[r], pool.host_key[r], _content(group, hits + host)) < 0:
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
    block = pool.block[r]
    group, until, page = np.uint64(0), np.int64(0), np.int64(-1)
    for i in range(hits):
        if i >= until:
            group, until = _group(pool, request, i, sequence.prompt)
            page = _find(pool.page_table[r], pool.page_group[r], group)
        b = np.int64(pool.page_block[r, page, i % PAGE]) - 1
        it = block[b]
        if it.reference == 0:
            me.free -= 1
            if not pool.fifo:
                _unlink(block, b)
        it.reference += 1
        _hold(pool, r, sequence, b)
    for i in range(hits, hits + host):
        group, until = _group(pool, request, i, sequence.prompt)
        slot = _find(pool.host_table[r], pool.host_key[r], _content(group, i))
        if slot >= 0:  # else it was displaced by what made room for those before it
            _unlink_host(pool.host_before[r], pool.host_after[r], slot)
            _link_last_host(pool.host_before[r], pool.host_after[r], slot)
        b = _pop(pool, r, me)
        _hold(pool, r, sequence, b)
        _register(pool, r, b, group, i)
    sequence.registered = hits + host
    pool.state[r].hits += hits
    pool.state[r].host_hits += host


@lean
def give_back(pool: Pool, r: int, me: Any, node: Any, count: Any) -> None:
    """Nobody needs the blocks of the list any more, `count` with `node` as its last piece: the last one first; what is
    full stays findable."""
    state, block = pool.state[r], pool.block[r]
    at = np.int64((count - 1) % PIECE)
    while node >= 0:
        piece = pool.held[r, node]
        while at >= 0:
            b = np.int64(piece[at])
            it = block[b]
            it.reference -= 1
            if it.reference == 0:
                me.free += 1
                if not pool.fifo:
                    _link_last(block, b)
            at -= 1
        at = np.int64(PIECE - 1)
        following = np.int64(pool.before[r, node])
        pool.before[r, node] = state.spare
        state.spare = node
        node = following
    state.wake = 1


@lean
def release(pool: Pool, r: int, me: Any, sequence: Any) -> None:
    """The sequence gives its blocks back."""
    give_back(pool, r, me, np.int64(sequence.node), np.int64(sequence.blocks))
    sequence.node = -1
    sequence.blocks = 0
    sequence.registered = 0


@lean
def register_prompt(pool: Pool, r: int, request: int, prompt: int, node: Any) -> None:
    """A prompt computed elsewhere has arrived in the blocks of the list whose last piece is `node`: it can be found."""
    i = (prompt + pool.block_size - 1) // pool.block_size - 1
    while i >= 0:
        b = np.int64(pool.held[r, node, i % PIECE])
        if (i + 1) * pool.block_size <= prompt and pool.block[r, b].place == 0:
            _register(pool, r, b, _group(pool, request, i, prompt)[0], i)
        if i % PIECE == 0:
            node = np.int64(pool.before[r, node])
        i -= 1


@lean
def holds_invariants(pool: Pool, r: int, blocks: int, free: int) -> bool:
    """Whether free blocks and references agree, and the pages find exactly what has a place (debug builds)."""
    block = pool.block[r]
    unused: Any = 0
    findable: Any = 0
    listed: Any = 0
    for b in range(blocks):
        it = block[b]
        unused += it.reference == 0
        if it.place > 0:
            findable += 1
            page = (it.place - 1) // PAGE
            if _find(pool.page_table[r], pool.page_group[r], pool.page_group[r, page]) != page:
                return False
    for slot in range(pool.page_table.shape[1]):
        page = np.int64(pool.page_table[r, slot]) - 1
        if page < 0:
            continue
        used = 0
        for at in range(PAGE):
            here: Any = np.int64(pool.page_block[r, page, at]) - 1
            used += here >= 0
            while here >= 0:
                listed += block[here].place == 1 + page * PAGE + at
                here = np.int64(block[here].twin) - 1
        if used != pool.page_count[r, page]:
            return False
    linked = 0
    free_block: Any = np.int64(block[block.size - 1].after)
    while free_block != block.size - 1:
        linked += 1
        if not pool.fifo and block[free_block].reference > 0:
            return False
        free_block = np.int64(block[free_block].after)
    return unused == free and findable == listed and linked == (blocks if pool.fifo else free)
