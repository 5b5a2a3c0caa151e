"""The engine's scheduler as one would explain it: slow, obvious, one step at a time. The kernel must agree with it
exactly.

It follows vLLM v1: one `schedule` for prefill and decode, FCFS, chunked prefill, blocks taken when needed, the last
admitted preempted when there are none, recompute (or swap). With asynchronous scheduling the engine keeps one composed
step in hand. Each has an API server, which does one thing after another: it takes in a request, or it sends out what a
step brought. Disaggregated, an engine computes prompts only and keeps their blocks until they have been sent to the one
that generates; the two kinds may change over. Only the duration of a step is taken from the product (it is tested on
its own).
"""

from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from squall.simulate.records import BY_FORECAST, LEAST_LOAD, TICKS, StepCost
from squall.simulate.replica import gpu_seconds


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
    on_host: int = 0  # tokens computed before it was swapped out
    source: Any = None  # the engine that computed its prompt and still has it
    source_held: list[int] = field(default_factory=list)
    fetching: bool = False
    arrived: bool = False  # its prompt, from there; it has its blocks
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

    def register(self, r: Request, upto: int) -> None:
        while r.chain and (r.registered + 1) * self.block_size <= upto:
            block = r.held[r.registered]
            self.key[block] = (r.chain, r.registered)
            self.found.setdefault(self.key[block], []).append(block)
            r.registered += 1

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
        self.register(r, min(computed, r.known))

    def release(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self.users[block] -= 1
            if not self.users[block]:
                self.free[block] = None

    def check(self, lists: list[list[int]]) -> None:
        held = Counter(block for blocks in lists for block in blocks)
        assert all(held[block] == users for block, users in enumerate(self.users))
        assert all((users == 0) == (block in self.free) for block, users in enumerate(self.users))
        assert all(self.key[block] == key for key, blocks in self.found.items() for block in blocks)


class Engine:
    """One replica."""

    def __init__(self, number: int, limits: Any, cost: StepCost, cluster: "Cluster") -> None:
        self.number, self.limits, self.cost, self.cluster = number, limits, cost, cluster
        self.role = "both" if not limits.prefills else "prefill" if number < limits.prefills else "decode"
        self.changing, self.changes, self.back_at = False, 0, -1
        self.free = limits.blocks
        self.host_free = limits.host_free
        self.extra = 0  # ticks of moving blocks, before the next step
        self.link_free = 0
        self.api_free = 0  # when the API server has done all it was given
        self.passing: list[tuple[int, Request]] = []  # requests that it is to hand over, and when
        self.asked = self.hits = 0  # blocks, of prompts admitted
        self.cache = Cache(limits.blocks, limits.block_size) if limits.caching else None
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
            self.cache.release(r.held)
            self.free = len(self.cache.free)
        else:
            self.free += r.blocks
        r.blocks, r.held, r.registered, r.arrived = 0, [], 0, False

    def release_sent(self, r: Request) -> None:
        """The prompt of `r` is not needed here any more."""
        if self.cache:
            self.cache.release(r.source_held)
            self.free = len(self.cache.free)
        else:
            self.free += ceil(r.prompt / self.limits.block_size)
        r.source, r.source_held = None, []

    def tokens_of(self, r: Request) -> int:
        """To be generated here."""
        return 1 if self.role == "prefill" else r.output

    def preempt(self, victim: Request) -> None:
        blocks = victim.blocks
        self.release(victim)
        if self.limits.swap and self.host_free >= blocks:
            victim.on_host = victim.computed
            self.host_free -= blocks
            self.extra += self.limits.swap * blocks
        victim.computed = 0
        victim.preemptions += 1
        self.waiting.insert(next((i for i, r in enumerate(self.waiting) if not r.arrived), len(self.waiting)), victim)

    def fetch(self, r: Request, watermark: int, now: int) -> bool:
        """Reserve blocks for a prompt that another engine computed, and begin to move what is not here already."""
        size = self.limits.block_size
        hits = self.cache.hits(r) if self.cache else []
        idle = sum(not self.cache.users[block] for block in hits) if self.cache else 0
        need = ceil(r.prompt / size) - len(hits)
        if need + idle + watermark > self.free:
            return False
        for block in hits:
            self.cache.take(r, block)
        r.registered = len(hits)
        self.free -= idle + need
        if self.cache:
            self.cache.grow(r, need, 0)
        r.blocks = len(hits) + need
        r.fetching = True
        begin = max(r.source.link_free, now)
        sent = r.prompt - len(hits) * size
        r.source.link_free = begin + self.limits.transfer + self.limits.transfer_per_token * sent
        self.cluster.transfers.append((r.source.link_free, self.cluster.requests.index(r), r))
        return True

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
            if r.in_flight and r.computed + 2 - r.in_flight >= r.prompt + self.tokens_of(r):
                continue
            new = min(r.known + r.in_flight - r.computed, budget, limits.chunk or budget)
            while not self.allocate(r, new):
                victim = self.running.pop()
                self.preempt(victim)
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
                watermark = limits.watermark if self.running else 0
                if r.source:
                    if not self.fetch(r, watermark, now):
                        break
                    self.waiting.pop(0)
                    continue
                assert r.computed == r.in_flight == 0
                hits = self.cache.hits(r) if self.cache and not r.arrived else []
                idle = sum(not self.cache.users[block] for block in hits) if self.cache else 0
                ready = r.prompt - 1 if r.arrived else max(r.on_host, len(hits) * limits.block_size)
                new = min(r.known - ready, budget, limits.chunk or budget)
                whole = ceil(r.known / limits.block_size) - len(hits) - r.blocks + idle
                if limits.full_gate and whole + watermark > self.free:
                    break
                need = ceil((ready + new) / limits.block_size) - len(hits) - r.blocks
                if need + idle + watermark > self.free:
                    break
                if not r.arrived:
                    for block in hits:
                        self.cache.take(r, block)
                    self.free -= idle
                    r.blocks = r.registered = len(hits)
                    self.hits += len(hits)
                    self.asked += (r.known - 1) // limits.block_size
                    if not r.preemptions:
                        r.cached = ready
                    there = ceil(r.on_host / limits.block_size)
                    self.host_free += there
                    self.extra += limits.swap * max(0, there - len(hits))
                r.computed, r.on_host, r.arrived = ready, 0, False
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
        step.ticks = self.duration(step) + self.extra
        self.extra = 0
        self.last = step
        self.steps.append((len(parts), sum(new for _, _, new, _ in parts)))
        return step

    def check(self, parts: list[tuple[Request, int, int, bool]]) -> None:
        here = [r for r in self.cluster.requests if r.replica == self.number]
        sent = [r for r in self.cluster.requests if r.source is self]
        if self.cache:
            self.cache.check([r.held for r in here] + [r.source_held for r in sent])
        else:
            blocks = sum(r.blocks for r in here) + sum(ceil(r.prompt / self.limits.block_size) for r in sent)
            assert self.free + blocks == self.limits.blocks
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
        prompts = 0.0 if step.decode_only else cost.host_prompts
        host = round((cost.host + cost.host_per_sequence * n + prompts) * TICKS)
        if self.limits.asynchronous:
            return max(1, max(gpu, host) + round(cost.gap * TICKS))
        return max(1, gpu + host)

    def receive(self, now: int) -> None:
        """The current step has ended."""
        assert self.current is not None
        told = now
        if self.limits.front_out:
            self.api_free = told = max(self.api_free, now) + self.limits.front_out * len(self.current.parts)
        for r, _, _, emits in self.current.parts:
            if not emits or r.outcome:
                continue
            r.in_flight -= self.limits.asynchronous
            if self.role == "prefill":
                if r in self.running:  # else it was preempted, and has to compute all again
                    self.hand_over(r)
                continue
            r.generated += 1
            r.tokens.append(told)
            if r.generated == r.output:
                r.outcome, r.ended = "ok", told + self.limits.delivery
                self.log.append((now, "finish", r))
                (self.running if r in self.running else self.waiting).remove(r)
                self.host_free += ceil(r.on_host / self.limits.block_size)
                self.release(r)
        self.current, self.ends = None, None

    def take_in(self, r: Request, now: int) -> None:
        """The API server reads a request when it comes to it, and hands it to the scheduler."""
        self.api_free = max(self.api_free, now) + self.limits.front_in
        self.passing.append((self.api_free, r))
        self.hand_in(now)

    def hand_in(self, now: int) -> None:
        while self.passing and self.passing[0][0] == now:
            self.waiting.append(self.passing.pop(0)[1])

    def hand_over(self, r: Request) -> None:
        """To the generating engine with the fewest requests; the blocks stay here until they are sent."""
        self.running.remove(r)
        them = [e for e in self.cluster.engines if e.role == "decode" and e.ready]
        target = min(them, key=lambda e: sum(not r.outcome for r in e.running) + len(e.waiting))
        r.source, r.source_held = self, r.held
        r.held, r.registered, r.blocks, r.computed = [], 0, 0, 0
        r.replica = target.number
        target.waiting.append(r)

    @property
    def ready(self) -> bool:
        return not self.changing and self.back_at < 0

    def go_on(self, now: int) -> None:
        """Start the next step if the GPU is idle; asynchronously, compose the one after it at once."""
        if self.current:
            return
        # A step of nobody, since all were preempted, lets others be admitted at once.
        self.current, self.next = self.next or self.schedule(now) or self.schedule(now), None
        if self.current:
            self.ends = now + self.current.ticks
            if self.limits.asynchronous:
                self.next = self.schedule(now)
        elif self.changing and not (self.running or self.waiting or self.passing) and self.free == self.limits.blocks:
            self.role = "decode" if self.role == "prefill" else "prefill"
            self.changing, self.changes = False, self.changes + 1
            if self.limits.provisioning:
                self.back_at = now + self.limits.provisioning


class Cluster:
    """Engines behind a round-robin router; no retries."""

    def __init__(self, requests: list[Request], limits: Any, cost: StepCost) -> None:
        self.requests, self.limits = requests, limits
        self.engines = [Engine(number, limits, cost, self) for number in range(limits.replicas)]
        self.transfers: list[tuple[int, int, Request]] = []  # when a prompt will have arrived, its number
        self.coming = sorted(requests, key=lambda r: r.sent + limits.ingest)
        self.turn = 0
        self.entered: list[Request] = []  # since the last look at the roles
        self.mean = 0.0
        self.trends: list[list[float]] = []

    def run(self) -> None:
        limits = self.limits
        look = limits.scale_every if limits.scale_by else -1
        while True:
            times = [e.ends for e in self.engines if e.ends is not None]
            times += [e.passing[0][0] for e in self.engines if e.passing]
            times += [r.sent + limits.ingest for r in self.coming[:1]] + [at for at, _, _ in self.transfers]
            if not times:
                break
            waiting = [r for r in self.requests if r.replica is not None and not r.outcome]
            times += [at for at in (deadline(r, limits) for r in waiting) if at < 2**61]
            times += [e.back_at for e in self.engines if e.back_at >= 0]
            now = min(times + ([look] if look >= 0 else []))
            for e in self.engines:
                if e.ends == now:
                    e.receive(now)
            for at, number, r in sorted(self.transfers, key=lambda it: it[:2]):
                if at == now:
                    self.transfers.remove((at, number, r))
                    self.arrive(r)
            for r in self.requests:
                if r.replica is not None and not r.outcome and deadline(r, limits) == now:
                    self.give_up(r, now)
            for e in self.engines:
                e.hand_in(now)
            while self.coming and self.coming[0].sent + limits.ingest == now:
                self.enter(self.coming.pop(0), now)
            if look == now:
                self.change_roles()
                look += limits.scale_every
            for e in self.engines:
                if e.back_at == now:
                    e.back_at = -1
            for e in self.engines:
                e.go_on(now)

    def arrive(self, r: Request) -> None:
        """The prompt of `r` is where it was sent."""
        e = self.engines[r.replica]
        r.source.release_sent(r)
        r.fetching = False
        if r.outcome:
            e.release(r)
            return
        r.arrived = True
        if e.cache:
            e.cache.register(r, r.prompt)
        e.waiting.insert(0, r)

    def give_up(self, r: Request, now: int) -> None:
        r.outcome, r.ended = "timeout", max(now, r.sent + self.limits.timeout)
        e = self.engines[r.replica]
        if r not in e.waiting:
            e.passing = [entry for entry in e.passing if entry[1] is not r]
        else:
            e.waiting.remove(r)
            if r.source:
                r.source.release_sent(r)
            e.host_free += ceil(r.on_host / self.limits.block_size)
            e.release(r)

    def enter(self, r: Request, now: int) -> None:
        limits, n = self.limits, len(self.engines)
        self.entered.append(r)
        total = r.prompt + r.output
        if total > limits.max_model_len or ceil(total / limits.block_size) > limits.blocks:
            r.outcome, r.ended = "unservable", now
            return
        while self.engines[self.turn % n].role == "decode" or not self.engines[self.turn % n].ready:
            self.turn += 1
        e = self.engines[self.turn % n]
        self.turn += 1
        if len(e.waiting) + len(e.passing) >= limits.queue_limit:
            r.outcome, r.ended = "queue_full", now
            return
        r.replica = e.number
        e.take_in(r, now)

    def change_roles(self) -> None:
        """One engine changes over if the fuller side is loaded, and would be much less so with another split."""
        limits, engines, n = self.limits, self.engines, len(self.engines)
        prompts, responses = self.demands()
        loads = {k: max(prompts / k, responses / (n - k)) for k in range(1, n)}
        best = min(loads, key=loads.__getitem__)
        now = sum((e.role == "prefill") != e.changing for e in engines)
        if best == now or loads[now] < LEAST_LOAD or loads[now] < limits.scale_target * loads[best]:
            return
        giver, taker = ("decode", "prefill") if best > now else ("prefill", "decode")
        back = [e for e in engines if e.role == taker and e.changing]
        ready = [e for e in engines if e.role == giver and e.ready]
        if back:
            back[0].changing = False
        elif len(ready) > 1:
            min(ready, key=lambda e: len(e.running) + len(e.waiting) + len(e.passing)).changing = True

    def demands(self) -> tuple[float, float]:
        """In engines: prompts to compute in the time between two looks, and the share of places or blocks asked for.
        What comes is smoothed, what waits is not."""
        limits, entered = self.limits, self.entered
        coming = float(sum(r.prompt for r in entered))
        if entered:
            self.mean = coming / len(entered)
        self.entered = []
        tokens = held = responses = 0.0
        for e in self.engines:
            if e.role == "prefill":
                tokens += len(e.waiting) * self.mean
            else:
                held += max(len(e.running) / limits.max_seqs, (limits.blocks - e.free) / limits.blocks)
                places = len(e.waiting) / limits.max_seqs
                responses += max(places, len(e.waiting) * self.mean / limits.block_size / limits.blocks)
        expected = self.expected([coming, held])
        tokens, responses = tokens + expected[0], responses + expected[1]
        asked = sum(e.asked for e in self.engines)
        if asked and limits.caching:
            tokens *= 1.0 - sum(e.hits for e in self.engines) / asked
        return tokens * limits.per_prompt_token / limits.scale_every, responses

    def expected(self, values: list[float]) -> list[float]:
        """Each smoothed exponentially; for a forecast with Holt's linear trend, one look ahead."""
        if not self.trends:
            self.trends = [[value, 0.0] for value in values]
            return values
        bend = 0.1 if self.limits.scale_by == BY_FORECAST else 0.0
        for trend, value in zip(self.trends, values, strict=True):
            level = 0.2 * value + (1.0 - 0.2) * (trend[0] + trend[1])
            trend[:] = level, bend * (level - trend[0]) + (1.0 - bend) * trend[1]
        return [max(0.0, level + slope) for level, slope in self.trends]


def run(requests: list[Request], limits: Any, cost: StepCost) -> list[Engine]:
    """All requests (ascending in `sent`) through the cluster; returns its engines."""
    cluster = Cluster(requests, limits, cost)
    cluster.run()
    return cluster.engines


def deadline(r: Request, limits: Any) -> int:
    """When the engine learns that the client has given up; never at the tick of its arrival."""
    return max(r.sent + limits.ingest + 1, r.sent + limits.timeout - limits.delivery)
