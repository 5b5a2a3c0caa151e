"""The compiled step loop against the slow scheduler of oracle.py, closed forms, and laws that hold for every queue."""

import os
from typing import NamedTuple

import numpy as np
import oracle
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squall.errors import SquallError
from squall.simulate import kernel, records, replica
from squall.simulate.cluster import kernel_costs, kernel_replicas, resolve
from squall.simulate.engine import run_requests
from squall.simulate.policies import Choices, pool_for
from squall.simulate.records import NEVER, TICKS, Limits, StepCost
from squall.simulate.step_time import StepTime

NAMES = {
    records.OK: "ok",
    records.TIMEOUT: "timeout",
    records.QUEUE_FULL: "queue_full",
    records.UNSERVABLE: "unservable",
}

COSTS = StepCost(
    weights=6e-3,
    experts=0.0,
    log_unrouted=0.0,
    per_token=2e-5,
    per_sequence=1e-6,
    knee=2.0,
    per_kv_token=4e-8,
    per_attention_pair=1e-9,
    reduce=0.0,
    reduce_per_token=0.0,
    per_row=2e-6,
    host=1e-3,
    host_per_sequence=1e-5,
    host_prompts=5e-4,
    gap=1e-4,
    points=np.empty((0, 2)),
)


class Setup(NamedTuple):
    """Limits of the cluster and sizes of each replica, flat, as the oracle reads them."""

    limits: Limits
    sizes: dict

    def __getattr__(self, name):
        return self.sizes[name] if name in self.sizes else getattr(self.limits, name)

    def replace(self, **changes):
        sizes = {name: changes.pop(name, value) for name, value in self.sizes.items()}
        return Setup(self.limits._replace(**changes), sizes)


def make_limits(**changes):
    base = resolve(kv_blocks=101, block_size=16, max_num_seqs=8, engine="vllm-0.11", step_time=StepTime(a0=0.0))
    limits = base.limits()._replace(full_gate=1, ingest=0, ingest_per_token=0, delivery=0, max_model_len=10**9, debug=1)
    sizes = {"blocks": 100, "max_seqs": 8, "budget": 64, "watermark": 0, "host_free": 0}
    return Setup(limits, sizes | {"caching": False, "prefills": 0}).replace(**changes)


def replicas_of(setup):
    """As the kernel begins with them; the first `prefills` only compute prompts, if there are any."""
    sizes = {name: value for name, value in setup.sizes.items() if name not in ("caching", "prefills")}
    replicas = kernel_replicas(setup.replicas, **sizes)
    if setup.prefills:
        replicas["role"] = np.where(np.arange(setup.replicas) < setup.prefills, records.PREFILL, records.DECODE)
    return replicas


def run_kernel(sent, prompt, output, setup, cost=COSTS, seeds=(1, 2), pool=None, queue=None, log_steps=True, **more):
    sent, prompt, output = np.array(sent, np.int64), np.array(prompt, np.int32), np.array(output, np.int32)
    ends = np.cumsum(output, dtype=np.int64)
    result = kernel.run_cluster(
        sent,
        prompt,
        output,
        records.packed(setup.limits),
        replicas_of(setup),
        *kernel_costs([cost] * setup.replicas),
        pool,
        queue,
        more.get("affinity", np.empty(0, np.uint64)),
        more.get("outages", np.empty((0, 3), np.int64)),
        np.array(seeds, np.uint64)[:, None],
        ends - output,
        int(ends[-1]),
        TICKS // 64,
        True,
        log_steps,
    )
    counters = result[-1]
    assert counters[records.STUCK] == 0
    return (*result[:4], counters[records.NOW], *result[4:-1], ends - output)


def make_pool(setup, prompt, output, chain):
    asked = pl.DataFrame({"request_tokens": prompt, "session": chain, "prefix": pl.Series([None] * len(prompt))})
    pool = pool_for(
        Choices(prefix_caching=True, prefill_replicas=setup.prefills or None),
        asked,
        np.array(output),
        None,
        replicas=replicas_of(setup),
        block_size=setup.block_size,
        block_bytes=1.0,
    )
    return pool._replace(chain=np.array(chain, np.uint64))


@st.composite
def workloads(draw):
    """Requests with gaps from none to longer than a response, lengths around block and budget edges; all limits."""
    n = draw(st.integers(1, 30))
    gap = draw(st.sampled_from([0, 1, TICKS // 200, TICKS // 20, TICKS]))
    coarse = draw(st.booleans())  # everything happens at multiples of a millisecond, so that ticks coincide
    grain = TICKS // 1000 if coarse else 1
    gaps = [grain * (gap // grain) for gap in draw(st.lists(st.integers(0, gap), min_size=n, max_size=n))]
    longest = draw(st.sampled_from([4, 40, 200]))
    prompt = draw(st.lists(st.integers(1, longest), min_size=n, max_size=n))
    output = draw(st.lists(st.integers(1, draw(st.sampled_from([1, 3, 60, 250]))), min_size=n, max_size=n))
    asynchronous = draw(st.integers(0, 1))
    limits = make_limits(
        replicas=draw(st.integers(1, 3)),
        blocks=draw(st.integers(1, 60)),
        block_size=draw(st.sampled_from([1, 4, 16])),
        max_seqs=draw(st.integers(1, 8)),
        budget=draw(st.integers(8, 64)),
        max_model_len=draw(st.sampled_from([50, 10**9])),
        asynchronous=asynchronous,
        full_gate=draw(st.integers(0, 1)),
        watermark=draw(st.sampled_from([0, 0, 2])),
        queue_limit=draw(st.sampled_from([int(NEVER), 1, 4])),
        timeout=draw(st.sampled_from([int(NEVER), TICKS // 1000, TICKS // 10, TICKS])),
        chunk=draw(st.sampled_from([0, 0, 5])),
        swap=draw(st.sampled_from([0, 0, TICKS // 10_000])),
        host_free=draw(st.sampled_from([8, 1000])),
        ingest=draw(st.sampled_from([0, TICKS // 1000])),
        delivery=draw(st.sampled_from([0, TICKS // 1000])),
        front_in=draw(st.sampled_from([0, 0, 1, TICKS // 500, TICKS // 20])),
        front_out=draw(st.sampled_from([0, 0, 1, TICKS // 1000, TICKS // 100])),
    )
    host = draw(st.sampled_from([0.0, 1e-3, 2e-2]))
    cost = COSTS._replace(host=host, per_kv_token=draw(st.sampled_from([0.0, 4e-8, 4e-6])))
    if coarse:
        flat = dict.fromkeys(("per_token", "per_sequence", "per_kv_token", "per_attention_pair"), 0.0)
        cost = cost._replace(**flat, host_per_sequence=0.0, host_prompts=0.0, gap=1e-3)
    return np.cumsum(gaps), prompt, output, limits, cost


@st.composite
def disaggregated(draw):
    """The same on engines for prefill and for decode, which may change their roles."""
    sent, prompt, output, limits, cost = draw(workloads())
    replicas = draw(st.integers(2, 5))
    limits = limits.replace(
        replicas=replicas,
        prefills=draw(st.integers(1, replicas - 1)),
        transfer=draw(st.sampled_from([0, TICKS // 1000, TICKS // 20])),
        transfer_per_token=draw(st.sampled_from([0, TICKS // 10**6, TICKS // 10**4])),
        scale_by=draw(st.sampled_from([0, records.BY_BACKLOG, records.BY_FORECAST])),
        scale_every=draw(st.sampled_from([TICKS // 100, TICKS // 10])),
        scale_target=draw(st.sampled_from([1.0, 1.2])),
        provisioning=draw(st.sampled_from([0, TICKS // 100])),
        per_prompt_token=COSTS.per_token * TICKS * draw(st.sampled_from([1.0, 10.0])),
        caching=draw(st.booleans()),
    )
    return sent, prompt, output, limits, cost


def agree(requests, engines, setup, result):
    """The kernel's attempts, tokens, preemptions, steps and event log are the oracle's."""
    attempts, replicas, _, _, _, token_ticks, events, steps, start = result
    for r, it, begin in zip(requests, attempts, start, strict=True):
        assert NAMES[it["state"]] == r.outcome
        assert it["ended"] == r.ended
        assert token_ticks[begin : begin + it["generated"]].tolist() == r.tokens
        assert it["preemptions"] == r.preemptions
        assert it["cached"] == r.cached
        assert it["replica"] == (-1 if r.replica is None else r.replica) or r.outcome == "queue_full"
        assert [it["first"], it["last"]] == ([r.tokens[0], r.tokens[-1]] if r.tokens else [-1, -1])
    log = [[], []]
    for e in events[np.argsort(events["time"], kind="stable")]:
        if e["kind"] in (records.ADMIT, records.PREEMPT, records.FINISH):
            log[0].append((int(e["time"]), int(e["kind"]), int(e["attempt"])))
    log[1] = [(at, KINDS[kind], requests.index(r)) for e in engines for at, kind, r in e.log]
    assert sorted(log[0]) == sorted(log[1])
    if setup.replicas == 1:  # of those that finish at one tick the order means nothing
        assert sorted(log[0], key=in_turn) == sorted(log[1], key=in_turn)
    for number, (e, it) in enumerate(zip(engines, replicas, strict=True)):
        assert it["changes"] == e.changes
        assert it["host_free"] == e.host_free == setup.host_free
        assert it["steps"] == len(e.steps)
        assert it["computed"] == sum(tokens for _, tokens in e.steps)
        mine = steps[steps["replica"] == number]
        assert not len(mine) or [tuple(step) for step in mine[["sequences", "tokens"]].tolist()] == e.steps, mine
        # Conservation: at the end all is free, nobody is left, and every block was counted.
        assert it["free"] + (0 if e.cache else sum(r.blocks for r in e.running)) == (
            e.free if e.cache else setup.blocks
        )
        assert it["waiting"] == len(e.waiting) == 0


def in_turn(event):
    at, kind, attempt = event
    return at, kind != records.FINISH, attempt if kind == records.FINISH else 0


KINDS = {"admit": records.ADMIT, "preempt": records.PREEMPT, "finish": records.FINISH}
CASES = 10_000 if os.environ.get("SQUALL_NIGHTLY") else 500


@settings(max_examples=CASES, deadline=None)
@given(workloads())
def test_agrees_with_the_oracle_by_single_steps_and_in_windows(workload):
    """Windows jump over most decode steps; every tick of every token must be what single steps make it."""
    sent, prompt, output, limits, cost = workload
    requests = [oracle.Request(int(s), p, o) for s, p, o in zip(sent, prompt, output, strict=True)]
    engines = oracle.run(requests, limits, cost)
    for windows in (0, 1):
        result = run_kernel(sent, prompt, output, limits.replace(windows=windows), cost, log_steps=not windows)
        agree(requests, engines, limits, result)


@settings(max_examples=CASES // 2, deadline=None)
@given(workloads(), st.data())
def test_prefix_caching_agrees_with_the_oracle(workload, data):
    """Ref-counted blocks, hash chains and the free list, against dictionaries; few chains, so that prompts share."""
    sent, prompt, output, limits, cost = workload
    chain = data.draw(st.lists(st.integers(0, 3), min_size=len(prompt), max_size=len(prompt)))
    limits = limits.replace(caching=True)
    requests = [oracle.Request(int(s), p, o, chain=c) for s, p, o, c in zip(sent, prompt, output, chain, strict=True)]
    engines = oracle.run(requests, limits, cost)
    for windows in (0, 1):
        setup = limits.replace(windows=windows)
        pool = make_pool(setup, prompt, output, chain)
        agree(requests, engines, setup, run_kernel(sent, prompt, output, setup, cost, pool=pool, log_steps=not windows))
        agree_on_blocks(engines, setup, pool)


def agree_on_blocks(engines, setup, pool):
    """The free lists are in the same order, and the same blocks can be found."""
    for r, e in enumerate(engines):
        after = pool.block["after"][r]
        order, b = [], after[-1]
        while b != setup.blocks:
            order.append(int(b))
            b = after[b]
        assert order == list(e.cache.free)
        found = {b for b in range(setup.blocks) if pool.block["place"][r, b]}
        assert found == {block for blocks in e.cache.found.values() for block in blocks}


@settings(max_examples=CASES // 2, deadline=None)
@given(disaggregated(), st.data())
def test_disaggregation_agrees_with_the_oracle(workload, data):
    """Hand-over, reserved blocks, transfers, prefix caches on both sides, and engines that change their roles."""
    sent, prompt, output, limits, cost = workload
    few = st.integers(0, 3) if limits.caching else st.just(0)
    chain = data.draw(st.lists(few, min_size=len(prompt), max_size=len(prompt)))
    requests = [oracle.Request(int(s), p, o, chain=c) for s, p, o, c in zip(sent, prompt, output, chain, strict=True)]
    engines = oracle.run(requests, limits, cost)
    for windows in (0, 1):
        setup = limits.replace(windows=windows)
        pool = make_pool(setup, prompt, output, chain) if limits.caching else None
        agree(requests, engines, setup, run_kernel(sent, prompt, output, setup, cost, pool=pool, log_steps=not windows))
        if pool is not None:
            agree_on_blocks(engines, setup, pool)


def test_windows_are_most_of_the_steps_where_little_happens():
    rng = np.random.default_rng(0)
    n = 200
    sent = np.cumsum(rng.exponential(TICKS / 4, n)).astype(np.int64)
    *_, replicas = run_kernel(sent, rng.integers(1, 200, n), rng.integers(1, 200, n), make_limits(), log_steps=False)[
        :2
    ]
    assert replicas["jumped"].sum() > 0.7 * replicas["steps"].sum()


@settings(max_examples=100, deadline=None)
@given(workloads())
def test_tokens_are_conserved(workload):
    sent, prompt, output, limits, cost = workload
    limits = limits.replace(timeout=int(NEVER))
    attempts, replicas, *_ = run_kernel(sent, prompt, output, limits, cost)
    ok = attempts[attempts["state"] == records.OK]
    needed = (ok["prompt"].astype(int) + ok["output"] - 1).sum()  # the last token is never fed back
    assert replicas["computed"].sum() - replicas["lost"].sum() == needed
    assert (replicas["free"] == limits.blocks).all()
    assert (replicas["running"] == 0).all()
    assert (ok["generated"] == ok["output"]).all()
    assert (ok["first"] <= ok["last"]).all()
    assert (ok["first"] > ok["sent"]).all()


def test_one_request_alone_takes_the_sum_of_its_steps():
    limits = make_limits(budget=50)
    attempts, replicas, *_ = run_kernel([7], [120], [4], limits)
    chunks = [(50, 0), (50, 50), (20, 100)]
    ticks = [
        round(replica.gpu_seconds(COSTS, float(x), 1.0, float(y), x * (y + x / 2)) * TICKS) + round(1.51e-3 * TICKS)
        for x, y in chunks
    ]
    assert attempts["first"][0] == 7 + sum(ticks)
    first_decode = round(replica.gpu_seconds(COSTS, 1.0, 1.0, 121.0, 0.0) * TICKS)
    growth = round(COSTS.per_kv_token * TICKS)
    decodes = [first_decode + i * growth + round(1.01e-3 * TICKS) for i in range(3)]
    assert attempts["last"][0] == 7 + sum(ticks) + sum(decodes)
    assert replicas["steps"][0] == 6


def test_asynchronous_scheduling_costs_an_arrival_one_more_step_under_load_and_none_when_idle():
    plain = COSTS._replace(host_per_sequence=0.0, host_prompts=0.0, host=COSTS.host + COSTS.host_per_sequence)
    cost = plain._replace(gap=plain.host, host=0.0)
    sent, prompt, output = [0, TICKS // 50], [16, 16], [100, 2]
    sync = run_kernel(sent, prompt, output, make_limits(), plain)[0]
    lagged = run_kernel(sent, prompt, output, make_limits(asynchronous=1), cost)[0]
    assert lagged["first"][0] == sync["first"][0]  # idle
    step = 6e-3 + 1e-3
    assert (lagged["first"][1] - sync["first"][1]) / TICKS == pytest.approx(step, rel=0.1)


def test_a_freed_request_that_was_preempted_with_its_last_token_in_flight_ends():
    # Two requests that outgrow the pool together: the later one is preempted while its step is in flight.
    limits = make_limits(blocks=5, block_size=4, budget=32, asynchronous=1)
    attempts, replicas, *_ = run_kernel([0, 0], [6, 6], [12, 5], limits)
    assert (attempts["state"] == records.OK).all()
    assert attempts["preemptions"][1] >= 1
    assert replicas["free"][0] == 5


def test_deterministic_service_waits_as_in_an_m_d_1_queue():
    """max_num_seqs 1, equal requests, Poisson arrivals: mean wait = rho*s/(2*(1-rho)) (Pollaczek-Khinchine)."""
    cluster = resolve(kv_blocks=1000, max_num_seqs=1, engine="vllm-0.11", step_time=StepTime(a0=0.0))
    n, rho = 60_000, 0.6
    alone = run_requests(np.zeros(1), np.array([200]), np.array([20]), cluster).attempts
    service = (alone["last"][0] - alone["sent"][0]) / TICKS
    arrival = np.cumsum(np.random.default_rng(5).exponential(service / rho, n))
    it = run_requests(arrival, np.full(n, 200), np.full(n, 20), cluster).attempts
    wait = (it["last"] - it["sent"]) / TICKS - service
    expected = rho * service / (2 * (1 - rho))
    batches = wait.reshape(30, -1).mean(axis=1)
    error = batches.std(ddof=1) / np.sqrt(30)
    assert wait.min() >= -1e-9
    assert abs(wait.mean() - expected) < 4 * error
    assert error < 0.05 * expected


def test_general_service_waits_as_in_an_m_g_1_queue():
    """The same with lengths that vary: mean wait = rate * E[S^2] / (2 * (1 - rho)) (Pollaczek-Khinchine)."""
    cluster = resolve(kv_blocks=1000, max_num_seqs=1, engine="vllm-0.11", step_time=StepTime(a0=0.0))
    rng = np.random.default_rng(8)
    n = 60_000
    prompt, output = rng.integers(1, 3000, n), 1 + rng.geometric(1 / 20, n)
    alone = run_requests(np.arange(n) * 10.0, prompt, output, cluster).attempts
    service = (alone["last"] - alone["sent"]) / TICKS
    rho = 0.5
    arrival = np.cumsum(rng.exponential(service.mean() / rho, n))
    it = run_requests(arrival, prompt, output, cluster).attempts
    wait = (it["last"] - it["sent"]) / TICKS - service
    expected = rho / service.mean() * np.mean(service**2) / (2 * (1 - rho))
    error = wait.reshape(30, -1).mean(axis=1).std(ddof=1) / np.sqrt(30)
    assert wait.min() >= -1e-9
    assert abs(wait.mean() - expected) < 4 * error
    assert error < 0.1 * expected


def test_littles_law_holds_in_the_time_series():
    rng = np.random.default_rng(1)
    n = 3000
    sent = np.cumsum(rng.exponential(0.01, n) * TICKS).astype(np.int64)
    prompt, output = rng.integers(1, 200, n), rng.integers(1, 100, n)
    limits = make_limits(blocks=400, max_seqs=32, budget=256, replicas=2)
    attempts, replicas, samples, _, end, *_ = run_kernel(sent, prompt, output, limits)
    in_system = samples[:, :, records.RUNNING_TIME].sum() + samples[:, :, records.WAITING_TIME].sum()
    assert in_system == pytest.approx(float((attempts["last"] - attempts["sent"]).sum()), rel=1e-9)
    assert samples[:, :, records.TOKENS].sum() == pytest.approx(float(replicas["computed"].sum()), rel=1e-9)
    assert samples[:, :, records.PREEMPTIONS].sum() == replicas["preemptions"].sum() == attempts["preemptions"].sum()
    assert samples[:, :, records.KV_PEAK].max() <= 1
    assert end == attempts["last"].max()


def test_retries_are_new_attempts_until_they_are_used_up():
    limits = make_limits(max_seqs=1, queue_limit=1, retries=3)
    sent, n = np.zeros(12, np.int64), 12
    attempts, *_ = run_kernel(sent, [16] * n, [400] * n, limits)
    assert len(attempts) > n
    numbers = {r: attempts["number"][attempts["request"] == r] for r in range(n)}
    for r, of_request in numbers.items():
        assert of_request.tolist() == list(range(1, len(of_request) + 1)), r
        states = attempts["state"][attempts["request"] == r]
        assert (states[:-1] == records.QUEUE_FULL).all()
        assert states[-1] == records.OK or len(states) == 4
    again = attempts[n:]
    previous = [
        attempts[(attempts["request"] == a["request"]) & (attempts["number"] == a["number"] - 1)][0] for a in again
    ]
    waits = np.array([(a["sent"] - b["ended"]) / TICKS for a, b in zip(again, previous, strict=True)])
    longest = 0.5 * 2.0 ** np.array([b["number"] - 1 for b in previous])
    assert ((waits >= 0) & (waits <= longest)).all()
    other = run_kernel(sent, [16] * n, [400] * n, limits, seeds=(1, 3))[0]
    assert not np.array_equal(other["sent"], attempts["sent"][: len(other)])


def test_many_retries_outgrow_the_table():
    n = 50
    limits = make_limits(max_seqs=1, queue_limit=1, retries=40)
    attempts, *_ = run_kernel(np.zeros(n, np.int64), [16] * n, [3000] * n, limits.replace(blocks=1000))
    assert len(attempts) > 4 * n
    assert np.bincount(attempts["request"]).max() <= 41
    assert (attempts["state"] >= records.OK).all()


def test_a_timeout_frees_the_blocks_of_what_ran():
    limits = make_limits(timeout=TICKS // 10, blocks=20)
    attempts, replicas, *_ = run_kernel([0, TICKS], [100, 100], [200, 5], limits)
    assert attempts["state"].tolist() == [records.TIMEOUT, records.OK]
    assert attempts["ended"][0] == TICKS // 10
    assert 0 < attempts["generated"][0] < 200
    assert replicas["free"][0] == 20


@pytest.mark.parametrize("router", [records.ROUND_ROBIN, records.RANDOM, records.LEAST_OUTSTANDING])
def test_routers_spread_requests(router):
    rng = np.random.default_rng(0)
    n = 4000
    limits = make_limits(replicas=4, router=router, blocks=10_000, max_seqs=64, budget=512)
    sent = np.cumsum(rng.exponential(TICKS / 40, n)).astype(np.int64)
    prompt, output = rng.integers(1, 300, n), rng.geometric(0.01, n)
    attempts, *_ = run_kernel(sent, prompt, output, limits)
    counts = np.bincount(attempts["replica"], minlength=4)
    assert counts.sum() == n
    assert (abs(counts - n / 4) < 5 * np.sqrt(n * 3 / 16)).all()
    if router == records.ROUND_ROBIN:
        assert attempts["replica"][:8].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_least_outstanding_prefers_the_idle_replica():
    limits = make_limits(replicas=2, router=records.LEAST_OUTSTANDING, blocks=1000)
    attempts, *_ = run_kernel([0, 1, 2, TICKS], [16] * 4, [500, 500, 1, 1], limits)
    assert attempts["replica"][0] != attempts["replica"][1]
    assert attempts["state"].tolist() == [records.OK] * 4


def test_who_is_preempted_again_and_again_without_a_token_is_named_and_never_hangs():
    """Without the gate for whole prompts a long prompt starts whenever its first chunk fits. Here it never gets to its
    last one while the short prompt's response runs, and that runs for longer than anybody should try."""
    words = {"engine": "vllm-0.11", "kv_blocks": 4, "block_size": 100_000, "max_num_batched_tokens": 100_000}
    cluster = resolve(model="llama-3.2-1b", gpu="h100", max_num_seqs=2, max_model_len=10**6, **words)
    sent, prompt = np.array([0.0, 1e-3]), np.array([1, 250_000])
    for output, stuck in ((8_000, False), (60_000, True)):
        work = sent, prompt, np.array([output, 1]), cluster
        if stuck:
            with pytest.raises(SquallError, match="request 1 was preempted over 10,000 times without progress"):
                run_requests(*work)
        else:
            attempts = run_requests(*work).attempts
            assert (attempts["state"] == records.OK).all()
            assert attempts["preemptions"][1] > 1000
