"""The engine's scheduler as one would explain it: slow, obvious, one step at a time. The kernel must agree with it
exactly.

It follows vLLM v1: one `schedule` for prefill and decode, FCFS, chunked prefill, blocks taken when needed, the last
admitted preempted when there are none, recompute. With asynchronous scheduling the engine keeps one composed step in
hand. Only the duration of a step is taken from the product (it is tested on its own).
"""

from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from squall.simulate.kernel import TICKS, StepCost, gpu_seconds


@dataclass(eq=False)
class Request:
    """One request and what happened to it; times are ticks."""

    sent: int
    prompt: int
    output: int
    computed: int = 0
    generated: int = 0
    in_flight: int = 0
    blocks: int = 0
    preemptions: int = 0
    cached: int = 0
    chain: int = 0  # what its tokens are, with prefix caching; 0 = unknown
    held: list[int] = field(default_factory=list)
    registered: int = 0
    replica: int | None = None
    outcome: str | None = None
    ended: int | None = None
    tokens: list[int] = field(default_factory=list)

    @property
    def known(self) -> int:
        return self.prompt + self.generated


@dataclass(eq=False)
class Step:
    """What a step computes: (request, tokens already computed, new tokens, whether it yields a token)."""

    parts: list[tuple[Request, int, int, bool]]
    ticks: int = 0

    @property
    def decode_only(self) -> bool:
        return all(new == 1 and computed >= r.prompt for r, computed, new, _ in self.parts)

    @property
    def members(self) -> list[Request]:
        return [part[0] for part in self.parts]


class Cache:
    """Blocks with an identity: a freed one can be found until it is given out again, from the other end of the list."""

    def __init__(self, blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.free = OrderedDict.fromkeys(range(blocks))
        self.users = [0] * blocks
        self.key: list[tuple[int, int] | None] = [None] * blocks
        self.found: dict[tuple[int, int], list[int]] = {}

    def hits(self, r: Request) -> list[int]:
        blocks = []
        while r.chain and len(blocks) < (r.known - 1) // self.block_size:
            same = self.found.get((r.chain, len(blocks)))
            if not same:
                break
            blocks.append(same[0])
        return blocks

    def take(self, r: Request, block: int) -> None:
        self.free.pop(block, None)
        self.users[block] += 1
        r.held.append(block)

    def grow(self, r: Request, count: int, computed: int) -> None:
        for _ in range(count):
            block = next(iter(self.free))
            key = self.key[block]
            if key:
                self.found[key].remove(block)
                self.key[block] = None
            self.take(r, block)
        while r.chain and (r.registered + 1) * self.block_size <= min(computed, r.known):
            block = r.held[r.registered]
            self.key[block] = (r.chain, r.registered)
            self.found.setdefault(self.key[block], []).append(block)
            r.registered += 1

    def release(self, r: Request) -> None:
        for block in reversed(r.held):
            self.users[block] -= 1
            if not self.users[block]:
                self.free[block] = None
        r.held, r.registered = [], 0

    def check(self, requests: list[Request]) -> None:
        held = Counter(block for r in requests for block in r.held)
        assert all(held[block] == users for block, users in enumerate(self.users))
        assert all((users == 0) == (block in self.free) for block, users in enumerate(self.users))
        assert all(self.key[block] == key for key, blocks in self.found.items() for block in blocks)


class Engine:
    """One replica."""

    def __init__(self, limits: Any, cost: StepCost) -> None:
        self.limits, self.cost = limits, cost
        self.free = limits.blocks
        self.cache = Cache(limits.blocks, limits.block_size) if getattr(limits, "caching", False) else None
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.current: Step | None = None
        self.next: Step | None = None
        self.ends: int | None = None
        self.last: Step | None = None  # composed, for the cost of the one after
        self.last_gpu = 0
        self.steps: list[tuple[int, int]] = []  # (sequences, tokens)
        self.log: list[tuple[int, str, Request]] = []

    def allocate(self, r: Request, new: int) -> bool:
        need = ceil((r.computed + new) / self.limits.block_size) - r.blocks
        if need > self.free:
            return False
        self.free -= need
        r.blocks += need
        if self.cache:
            self.cache.grow(r, need, r.computed + new)
        return True

    def release(self, r: Request) -> None:
        if self.cache:
            self.cache.release(r)
            self.free = len(self.cache.free)
        else:
            self.free += r.blocks
        r.blocks = 0

    def schedule(self, now: int) -> Step | None:
        limits = self.limits
        for r in [r for r in self.running if r.outcome]:  # given up by their clients
            self.running.remove(r)
            self.release(r)
        budget = limits.budget
        parts: list[tuple[Request, int, int, bool]] = []
        preempted: list[Request] = []
        for r in list(self.running):
            if budget == 0 or r in preempted:
                break
            if r.in_flight and r.computed + 2 - r.in_flight >= r.prompt + r.output:
                continue
            new = min(r.known + r.in_flight - r.computed, budget)
            while not self.allocate(r, new):
                victim = self.running.pop()
                self.release(victim)
                victim.computed = 0
                victim.preemptions += 1
                self.waiting.insert(0, victim)
                preempted.append(victim)
                self.log.append((now, "preempt", victim))
                if victim is r:
                    break
            if r in preempted:
                break
            parts.append((r, r.computed, new, r.computed + new == r.known + r.in_flight))
            budget -= new
        if not preempted:
            while self.waiting and budget > 0 and len(self.running) < limits.max_seqs:
                r = self.waiting[0]
                assert r.computed == r.blocks == r.in_flight == 0
                hits = self.cache.hits(r) if self.cache else []
                idle = sum(not self.cache.users[block] for block in hits) if self.cache else 0
                ready = len(hits) * limits.block_size
                new = min(r.known - ready, budget)
                watermark = limits.watermark if self.running else 0
                whole = ceil(r.known / limits.block_size) - len(hits) + idle
                if limits.full_gate and whole + watermark > self.free:
                    break
                if ceil((ready + new) / limits.block_size) - len(hits) + idle + watermark > self.free:
                    break
                for block in hits:
                    self.cache.take(r, block)
                self.free -= idle
                r.blocks = r.registered = len(hits)
                r.computed = ready
                r.cached = ready if not r.preemptions else r.cached
                assert self.allocate(r, new)
                self.waiting.pop(0)
                self.running.append(r)
                self.log.append((now, "admit", r))
                parts.append((r, ready, new, ready + new == r.known))
                budget -= new
        for r, computed, new, emits in parts:
            r.computed = computed + new
            r.in_flight += bool(limits.asynchronous and emits)
        self.check(parts)
        if not parts:
            return None
        step = Step(parts)
        step.ticks = self.duration(step)
        self.last = step
        self.steps.append((len(parts), sum(new for _, _, new, _ in parts)))
        return step

    def check(self, parts: list[tuple[Request, int, int, bool]]) -> None:
        if self.cache:
            self.cache.check(self.running)
        else:
            assert self.free + sum(r.blocks for r in self.running) == self.limits.blocks
        assert self.free >= 0
        assert len(self.running) <= self.limits.max_seqs
        assert sum(new for _, _, new, _ in parts) <= self.limits.budget
        assert all(r.blocks == ceil(r.computed / self.limits.block_size) for r in self.running)

    def duration(self, step: Step) -> int:
        cost, n = self.cost, len(step.parts)
        same = self.last and step.decode_only and self.last.decode_only and step.members == self.last.members
        if same:
            gpu = self.last_gpu + round(cost.per_kv_token * n * TICKS)
        else:
            tokens = sum(new for _, _, new, _ in step.parts)
            decodes = [(c, x) for r, c, x, _ in step.parts if x == 1 and c >= r.prompt]
            chunks = [(c, x) for r, c, x, _ in step.parts if not (x == 1 and c >= r.prompt)]
            kv = sum(c + 1 for c, _ in decodes) + sum(c for c, _ in chunks)
            pairs = sum(x * (c + x / 2) for c, x in chunks)
            gpu = round(gpu_seconds(cost, float(tokens), float(n), float(kv), float(pairs)) * TICKS)
        self.last_gpu = gpu
        host = round((cost.host + cost.host_per_sequence * n) * TICKS)
        if self.limits.asynchronous:
            return max(1, max(gpu, host) + round(cost.gap * TICKS))
        return max(1, gpu + host)

    def receive(self, now: int) -> None:
        """The current step has ended."""
        assert self.current is not None
        for r, _, _, emits in self.current.parts:
            if not emits or r.outcome:
                continue
            r.generated += 1
            r.in_flight -= self.limits.asynchronous
            r.tokens.append(now)
            if r.generated == r.output:
                r.outcome, r.ended = "ok", now + self.limits.delivery
                self.log.append((now, "finish", r))
                (self.running if r in self.running else self.waiting).remove(r)
                self.release(r)
        self.current, self.ends = None, None

    def go_on(self, now: int) -> None:
        """Start the next step if the GPU is idle; asynchronously, compose the one after it at once."""
        if self.current:
            return
        self.current, self.next = self.next or self.schedule(now), None
        if self.current:
            self.ends = now + self.current.ticks
            if self.limits.asynchronous:
                self.next = self.schedule(now)


def run(requests: list[Request], limits: Any, cost: StepCost) -> list[Engine]:
    """All requests (ascending in `sent`) through round-robin engines; no retries."""
    engines = [Engine(limits, cost) for _ in range(limits.replicas)]
    coming = sorted(requests, key=lambda r: r.sent + limits.ingest)
    turn = 0
    while True:
        times = [e.ends for e in engines if e.ends is not None] + [r.sent + limits.ingest for r in coming[:1]]
        if not times:
            break
        deadlines = [deadline(r, limits) for r in requests if r.replica is not None and not r.outcome]
        now = min(times + [at for at in deadlines if at < 2**61])
        for e in engines:
            if e.ends == now:
                e.receive(now)
        for r in requests:
            if r.replica is not None and not r.outcome and deadline(r, limits) == now:
                r.outcome, r.ended = "timeout", max(now, r.sent + limits.timeout)
                if r in engines[r.replica].waiting:
                    engines[r.replica].waiting.remove(r)
        while coming and coming[0].sent + limits.ingest == now:
            r = coming.pop(0)
            total = r.prompt + r.output
            if total > limits.max_model_len or ceil(total / limits.block_size) > limits.blocks:
                r.outcome, r.ended = "unservable", now
                continue
            e = engines[turn % len(engines)]
            turn += 1
            if len(e.waiting) >= limits.queue_limit:
                r.outcome, r.ended = "queue_full", now
                continue
            r.replica = engines.index(e)
            e.waiting.append(r)
        for e in engines:
            e.go_on(now)
    return engines


def deadline(r: Request, limits: Any) -> int:
    """When the engine learns that the client has given up; never at the tick of its arrival."""
    return max(r.sent + limits.ingest + 1, r.sent + limits.timeout - limits.delivery)
