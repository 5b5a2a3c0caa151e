"""The queue of a replica, compiled: who is admitted next.

FCFS is a list through the attempts. An order by a key that a request keeps (priority, predicted length, deadline, …) is
a pairing heap through the same fields: a request that comes or leaves costs O(log waiting). VTC (arXiv 2401.00588)
keeps one list per client and serves the one that has received least, in weighted tokens: w_p per prompt token at
admission, w_q per output token; a client that becomes active is lifted to the least of the active ones.
"""

from typing import Any, NamedTuple

import numpy as np

from squall.native import lean

KEYED, VTC = range(2)


class Queue(NamedTuple):
    """An order other than FCFS. Arrays of the requests, or with the replica as the first axis."""

    kind: int
    key: np.ndarray  # (requests,) the smallest goes first; empty for VTC
    client: np.ndarray  # (requests,) int64, for VTC
    root: np.ndarray  # (replicas,) of the heap, -1 if empty
    served: np.ndarray  # (replicas, clients) weighted tokens
    head: np.ndarray  # (replicas, clients) of a client's list
    tail: np.ndarray
    active: np.ndarray  # (replicas, clients) how many of its requests wait or run
    prompt_weight: float
    output_weight: float


@lean
def _before(queue: Queue, attempts: np.ndarray, a: int, b: int) -> bool:
    """Whether `a` goes before `b`: what has its blocks already, then by key, then arrival, then number."""
    if (attempts[a].blocks > 0) != (attempts[b].blocks > 0):
        return attempts[a].blocks > 0
    first, second = queue.key[attempts[a].request], queue.key[attempts[b].request]
    if first != second:
        return first < second
    if attempts[a].sent != attempts[b].sent:
        return attempts[a].sent < attempts[b].sent
    return a < b


@lean
def _meld(queue: Queue, attempts: np.ndarray, a: int, b: int) -> Any:
    """The root of the heap of two roots, -1 being the empty one."""
    if a < 0:
        return b
    if b < 0:
        return a
    if _before(queue, attempts, b, a):
        a, b = b, a
    child = attempts[a].child
    attempts[b].next = child
    attempts[b].previous = a
    if child >= 0:
        attempts[child].previous = b
    attempts[a].child = b
    return a


@lean
def _orphaned(queue: Queue, attempts: np.ndarray, a: int) -> Any:
    """The heap of all children of `a`: melded in pairs from the left, then into one from the right."""
    pairs = np.int64(-1)  # a stack through `previous`
    child = np.int64(attempts[a].child)
    attempts[a].child = -1
    while child >= 0:
        partner = np.int64(attempts[child].next)
        following = np.int64(attempts[partner].next) if partner >= 0 else np.int64(-1)
        attempts[child].next = attempts[child].previous = -1
        if partner >= 0:
            attempts[partner].next = attempts[partner].previous = -1
        pair = np.int64(_meld(queue, attempts, child, partner))
        attempts[pair].previous = pairs
        pairs = pair
        child = following
    root = np.int64(-1)
    while pairs >= 0:
        following = np.int64(attempts[pairs].previous)
        attempts[pairs].previous = -1
        root = np.int64(_meld(queue, attempts, root, pairs))
        pairs = following
    return root


@lean
def _cut(queue: Queue, attempts: np.ndarray, root: int, a: int) -> Any:
    """The root of the heap without `a`."""
    children = _orphaned(queue, attempts, a)
    if a == root:
        return children
    before, after = attempts[a].previous, attempts[a].next
    if attempts[before].child == a:
        attempts[before].child = after
    else:
        attempts[before].next = after
    if after >= 0:
        attempts[after].previous = before
    return _meld(queue, attempts, root, children)


@lean
def _last_with_blocks(attempts: np.ndarray, head: int) -> Any:
    """The last of those at the head of a list that have their blocks already; -1 if there is none."""
    last, a = np.int64(-1), np.int64(head)
    while a >= 0 and attempts[a].blocks > 0:
        last, a = a, np.int64(attempts[a].next)
    return last


@lean
def enqueue(queue: Any, me: Any, r: int, attempts: np.ndarray, a: int, in_front: bool) -> None:
    """Put `a` in the queue; preempted ones go in front (a heap has no front), behind those that have their blocks
    already, since these would wait with them for ever."""
    it = attempts[a]
    it.next = it.previous = it.child = -1
    me.waiting += 1
    if queue is None:
        if in_front:
            it.previous = _last_with_blocks(attempts, me.head) if it.blocks == 0 else -1
            it.next = attempts[it.previous].next if it.previous >= 0 else me.head
            if it.next >= 0:
                attempts[it.next].previous = a
            else:
                me.tail = a
            if it.previous >= 0:
                attempts[it.previous].next = a
            else:
                me.head = a
        else:
            it.previous = me.tail
            if me.tail >= 0:
                attempts[me.tail].next = a
            else:
                me.head = a
            me.tail = a
    elif queue.kind == KEYED:
        queue.root[r] = _meld(queue, attempts, queue.root[r], a)
    else:
        c = queue.client[it.request]
        if in_front:
            it.previous = _last_with_blocks(attempts, queue.head[r, c]) if it.blocks == 0 else -1
            it.next = attempts[it.previous].next if it.previous >= 0 else queue.head[r, c]
            if it.next >= 0:
                attempts[it.next].previous = a
            else:
                queue.tail[r, c] = a
            if it.previous >= 0:
                attempts[it.previous].next = a
            else:
                queue.head[r, c] = a
        else:
            it.previous = queue.tail[r, c]
            if it.previous >= 0:
                attempts[it.previous].next = a
            else:
                queue.head[r, c] = a
            queue.tail[r, c] = a


@lean
def dequeue(queue: Any, me: Any, r: int, attempts: np.ndarray, a: int) -> None:
    """Take `a` out, wherever it stands."""
    it = attempts[a]
    before, after = it.previous, it.next
    me.waiting -= 1
    if queue is None:
        if before >= 0:
            attempts[before].next = after
        else:
            me.head = after
        if after >= 0:
            attempts[after].previous = before
        else:
            me.tail = before
    elif queue.kind == KEYED:
        queue.root[r] = _cut(queue, attempts, queue.root[r], a)
    else:
        c = queue.client[it.request]
        if before >= 0:
            attempts[before].next = after
        else:
            queue.head[r, c] = after
        if after >= 0:
            attempts[after].previous = before
        else:
            queue.tail[r, c] = before
    it.next = it.previous = it.child = -1


@lean
def first_waiting(queue: Any, me: Any, r: int, attempts: np.ndarray) -> Any:
    """Who is to be admitted next; -1 if nobody waits."""
    if queue is None:
        return np.int64(me.head)
    if queue.kind == KEYED:
        return np.int64(queue.root[r])
    best = np.int64(-1)
    if me.waiting > 0:
        least = np.inf
        for c in range(queue.head.shape[1]):
            a = np.int64(queue.head[r, c])
            if a >= 0 and attempts[a].blocks > 0:
                return a
            if a >= 0 and (
                queue.served[r, c] < least or (queue.served[r, c] == least and attempts[a].sent < attempts[best].sent)
            ):
                best, least = a, queue.served[r, c]
    return best


@lean
def becomes_active(queue: Any, r: int, request: int) -> None:
    """VTC: the client of a request that arrives; one that had none is lifted to the least of the active ones."""
    if queue is not None and queue.kind == VTC:
        c = queue.client[request]
        if queue.active[r, c] == 0:
            least = np.inf
            for other in range(queue.active.shape[1]):
                if queue.active[r, other] > 0:
                    least = min(least, queue.served[r, other])
            if least < np.inf:
                queue.served[r, c] = max(queue.served[r, c], least)
        queue.active[r, c] += 1


@lean
def leaves(queue: Any, r: int, request: int) -> None:
    """VTC: a request of the client is done."""
    if queue is not None and queue.kind == VTC:
        queue.active[r, queue.client[request]] -= 1


@lean
def charge(queue: Any, r: int, request: int, prompt_tokens: int, output_tokens: int) -> None:
    """VTC: the client of the request has received this."""
    if queue is not None and queue.kind == VTC:
        queue.served[r, queue.client[request]] += (
            queue.prompt_weight * prompt_tokens + queue.output_weight * output_tokens
        )


@lean
def victim(queue: Any, running: np.ndarray, count: int, attempts: np.ndarray) -> Any:
    """Which of the running to preempt: the last admitted, or in an order by key the one that would go last."""
    if queue is None or queue.kind == VTC:
        return count - 1
    worst = 0
    for i in range(1, count):
        if _before(queue, attempts, running[worst].attempt, running[i].attempt):
            worst = i
    return worst


@lean
def stands(queue: Any) -> int:
    """How long a queue whose head does not fit stays as it is while blocks are only taken: 2 whoever arrives, 1 until
    somebody does, 0 not at all."""
    if queue is None:
        return 2
    return 1 if queue.kind == KEYED else 0


@lean
def always_asks(queue: Any) -> bool:
    """Whether what has been served until now decides on what an arrival does to the queue."""
    if queue is None:
        return False
    return queue.kind == VTC
