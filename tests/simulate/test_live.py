"""The cluster that is driven step by step does what the simulation does, to the tick."""

import msgspec
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squall.errors import InputError
from squall.simulate.cluster import resolve
from squall.simulate.engine import run_requests
from squall.simulate.live import REFUSED, LiveCluster
from squall.simulate.policies import _scrambled
from squall.simulate.records import NEVER, OK, QUEUE_FULL, TICKS, UNSERVABLE
from squall.trace.table import SCHEMA

WORDS = {"gpu": "a100", "model": "llama-3.1-8b", "kv_blocks": 600, "max_num_seqs": 32, "max_num_batched_tokens": 512}


def drive(
    live: LiveCluster,
    sent: np.ndarray,
    prompt: np.ndarray,
    output: np.ndarray,
    chop: np.random.Generator,
    more=lambda k: {},
    cached: dict[int, int] | None = None,
):
    """Tokens (ticks) of every request, and the states of those that were refused; `more` is what else one brings."""
    tokens: dict[int, list[int]] = {}
    refused: dict[int, int] = {}
    of: dict[int, int] = {}
    at, now = 0, 0
    while at < len(sent) or live.next() < NEVER:
        now += int(chop.integers(1, TICKS // 5))
        while at < len(sent) and sent[at] <= now:
            of[live.submit(int(sent[at]), int(prompt[at]), int(output[at]), **more(at))] = at
            at += 1
        # What the steps under way will bring is known before.
        early = live.ahead(now)
        assert (np.diff(early["time"]) >= 0).all()
        come = live.advance(now)
        assert set(early.tolist()) <= set(come.tolist())
        for time, slot, index in come.tolist():
            if index == REFUSED:
                refused[of[slot]] = live.state(slot)
                live.release(slot)
                continue
            told = tokens.setdefault(of[slot], [])
            told.append(time)
            assert index == len(told)
            assert time <= now
            if index == output[of[slot]]:
                if cached is not None:
                    cached[of[slot]] = live.cached(slot)
                live.release(slot)
    return tokens, refused


@given(
    seed=st.integers(0, 2**32),
    engine=st.sampled_from(["vllm-0.11", "vllm-0.14", "vllm-0.24"]),
    replicas=st.integers(1, 3),
    router=st.sampled_from(["round-robin", "random", "least-outstanding"]),
    queue_limit=st.sampled_from([None, 3]),
    front=st.sampled_from([(0.0, 0.0), (3e-3, 0.0), (2e-3, 4e-4)]),
)
@settings(max_examples=40, deadline=None)
def test_every_token_at_its_tick(seed, engine, replicas, router, queue_limit, front):
    draw = np.random.default_rng(seed)
    n = 80
    router = router if replicas > 1 else "round-robin"
    cluster = resolve(**WORDS, engine=engine, replicas=replicas, router=router, queue_limit=queue_limit)
    step = msgspec.structs.replace(cluster.step_time, s_in=front[0], s_out=front[1])
    cluster = msgspec.structs.replace(cluster, step_time=step)
    arrival = np.sort(draw.gamma(0.4, 0.25, n).cumsum())
    prompt, output = draw.integers(1, 1500, n), draw.integers(1, 200, n)
    prompt[draw.integers(n)] = 20_000  # never fits
    outcome = run_requests(arrival, prompt, output, cluster, token_times=10**6)
    sent = np.rint(arrival * TICKS).astype(np.int64)
    order = np.argsort(sent, kind="stable")
    tokens, refused = drive(LiveCluster(cluster), sent[order], prompt[order], output[order], draw)
    for it, start in zip(outcome.attempts, outcome.token_start, strict=True):
        k = int(np.flatnonzero(order == it["request"])[0])
        if it["state"] == OK:
            assert tokens[k] == outcome.token_ticks[start : start + it["output"]].tolist()
        else:
            assert refused[k] == it["state"]
            assert it["state"] in (QUEUE_FULL, UNSERVABLE)


POLICIES = [
    {"scheduler": "srf"},
    {"scheduler": "lrf", "preemption": "swap", "swap_space": 1},
    {"scheduler": "sjf", "prediction_error": 0.5},
    {"scheduler": "priority"},
    {"scheduler": "vtc"},
    {"prefix_caching": True},
    {"prefix_caching": True, "eviction": "fifo", "host_cache": 0.05},
    {"prefix_caching": True, "replicas": 3, "router": "prefix-affinity"},
    {"replicas": 3, "router": "session-affinity", "step_order": "prefill-first"},
    {"replicas": 2, "router": "least-kv", "chunk_size": 100},
    {"prefill_replicas": 2, "decode_replicas": 2},
    {"fleet": "a100=1,h100=1", "router": "power-of-two", "watermark": 0.05},
]


@pytest.mark.parametrize("choices", POLICIES, ids=lambda it: "-".join(map(str, it.values())))
@pytest.mark.parametrize("engine", ["vllm-0.11", "vllm-0.24"])
def test_every_token_at_its_tick_under_every_policy(choices, engine):
    draw = np.random.default_rng(11)
    n = 120
    words = WORDS | {"engine": engine} | choices
    words |= {"gpu": None} if "fleet" in choices else {}
    simulated = {"priorities": "p0=0,p1=1,p2=2"} if choices.get("scheduler") == "priority" else {}
    simulated |= {"clients": "model"} if choices.get("scheduler") == "vtc" else {}
    offline = resolve(**words, **simulated)
    chosen = msgspec.structs.replace(offline.choices, priorities=None, clients=None)
    cluster = msgspec.structs.replace(offline, choices=chosen)
    arrival = np.sort(draw.gamma(0.4, 0.2, n).cumsum())
    prompt, output = draw.integers(1, 1200, n), draw.integers(1, 150, n)
    kind, session = draw.integers(3, size=n), draw.integers(10, size=n)
    # Sessions begin alike: the first half of what the longest of them says.
    hashes = [[hash((int(session[k]), i if i < 40 else (i, k))) for i in range(prompt[k] // 16)] for k in range(n)]
    asked = {
        "arrival": arrival,
        "request_tokens": prompt,
        "response_tokens": output,
        "session": session,
        "model": [f"p{k}" for k in kind],
        "prefix": hashes,
    }
    frame = pl.DataFrame(asked, schema={name: SCHEMA[name] for name in asked})
    frame = pl.concat([pl.DataFrame(schema=SCHEMA), frame], how="diagonal")
    outcome = run_requests(arrival, prompt, output, offline, token_times=10**6, asked=frame, hash_tokens=16)
    sent = np.rint(arrival * TICKS).astype(np.int64)
    affinity = _scrambled(session, 0)
    cached: dict[int, int] = {}
    tokens, refused = drive(
        LiveCluster(cluster),
        sent,
        prompt,
        output,
        draw,
        lambda k: {
            "hashes": hashes[k],
            "priority": float(kind[k]),
            "client": int(kind[k]),
            "affinity": int(affinity[k]),
        },
        cached,
    )
    assert not refused
    assert (outcome.attempts["state"] == OK).all()
    for it, start in zip(outcome.attempts, outcome.token_start, strict=True):
        assert tokens[it["request"]] == outcome.token_ticks[start : start + it["output"]].tolist()
        assert cached[it["request"]] == it["cached"]
    if "prefix_caching" in choices:
        assert sum(cached.values()) > 1000


@pytest.mark.parametrize(
    "choices",
    [
        {"replicas": 2, "engine": "vllm-0.11"},
        {"replicas": 2},
        {"replicas": 2, "prefix_caching": True},
        {"replicas": 2, "scheduler": "lrf", "preemption": "swap", "swap_space": 1},
        {"prefill_replicas": 1, "decode_replicas": 1},
    ],
    ids=lambda it: "-".join(map(str, it.values())),
)
@pytest.mark.parametrize("front", [0.0, 5e-3])
def test_who_goes_away_gives_everything_back(choices, front):
    draw = np.random.default_rng(7)
    cluster = resolve(**WORDS, **choices)
    step = msgspec.structs.replace(cluster.step_time, s_in=front, s_out=front / 10)
    live = LiveCluster(msgspec.structs.replace(cluster, step_time=step), capacity=60)
    for turn in range(20):
        slots = [
            live.submit(live.now, int(draw.integers(1, 1500)), 300, hashes=[turn * 1000 + i for i in range(90)])
            for _ in range(40)
        ]
        over: set[int] = set()
        for k, slot in enumerate(slots):
            if k % 5 == 0:
                for _, told, index in live.advance(live.now + int(draw.integers(1, TICKS // 20))).tolist():
                    if index in (REFUSED, 300):
                        over.add(told)
                        live.release(told)
            if slot not in over:
                live.cancel(slot)
                over.add(slot)
        live.advance(live.now + TICKS)
        assert [(load.running, load.waiting, load.kv_used) for load in live.loads()] == [(0, 0, 0.0)] * 2
        assert len(live._free) == 60
        assert sorted(live._free) == list(range(60))


def test_a_cancelled_requests_blocks_help_the_one_behind_it():
    live = LiveCluster(resolve(**WORDS))
    first = live.submit(0, 9000, 400)  # nearly the whole cache
    second = live.submit(0, 9000, 400)
    told = live.advance(2 * TICKS)
    assert set(told["slot"].tolist()) == {first}
    assert live.loads()[0].waiting == 1
    live.cancel(first)
    told = live.advance(4 * TICKS)
    assert set(told["slot"].tolist()) == {second}


def test_full():
    live = LiveCluster(resolve(**WORDS), capacity=2)
    slots = [live.submit(0, 1, 5), live.submit(0, 1, 5)]
    assert live.full
    for slot in slots:
        live.cancel(slot)  # before they arrived
    live.advance(TICKS)
    assert not live.full
    assert len(live._free) == 2


def test_users_beyond_what_the_cache_holds_only_wait():
    """NVIDIA's NIM table (Llama-3-70B FP8 on two H100, 5000 in, 500 out, closed loop): from 100 to 250 users the
    throughput is 917 to 921 tokens/s, TTFT grows from 8.0 to 88.6 s, and users - TTFT * throughput, those that are
    served, are 85.3 to 87.0."""
    cluster = resolve(model="llama-3.1-70b-fp8", gpu="h100", tp=2, kv_blocks=29_000, max_num_seqs=256)
    draw, seen = np.random.default_rng(2), []
    for users in (100, 250):
        live, sent, waits, ends = LiveCluster(cluster), {}, [], []
        coming = list(range(users))
        while len(ends) < 8 * users:
            for at in coming:
                output = int(draw.integers(450, 551))  # else they would end in waves
                sent[live.submit(at, int(draw.integers(4500, 5501)), output)] = at, output
            coming = []
            for time, slot, index in live.advance(live.next()).tolist():
                if index == 1:
                    waits.append(time - sent[slot][0])
                if index == sent[slot][1]:
                    live.release(slot)
                    del sent[slot]
                    ends.append(time)
                    coming.append(time)
        rate = 5 * users / (ends[8 * users - 1] - ends[3 * users])
        ttft = np.mean(waits[3 * users : 8 * users])
        seen.append((users - ttft * rate, rate * TICKS, ttft / TICKS))
    served, rates, ttfts = np.array(seen).T
    assert served == pytest.approx([86, 86], rel=0.02)
    assert rates[1] == pytest.approx(rates[0], rel=0.02)
    assert ttfts[1] - ttfts[0] == pytest.approx(150 / rates.mean(), rel=0.03)
    # The blocks were chosen and the step time is the default, so that these are met too is not a matter of course.
    assert 500 * rates == pytest.approx([919, 919], rel=0.05)
    assert ttfts[1] == pytest.approx(88.6, rel=0.05)


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"autoscale": "queue:8", "max_replicas": 3}, "start and stop replicas"),
        ({"fail": "0@90s"}, "--fail-rate and --failures"),
        ({"prefix_caching": True, "shared_prefix": 100}, "their own texts say"),
        ({"scheduler": "vtc", "clients": "model"}, "`user` is its client"),
        ({"scheduler": "edf", "deadlines": "api=1s"}, "requests do not say"),
        ({"price": 2.0}, "no result"),
    ],
)
def test_what_only_a_simulation_can_do_is_refused(choices, says):
    with pytest.raises(InputError, match=says):
        LiveCluster(resolve(**WORDS, **choices))


def test_the_hashes_of_thousands_of_prompts_stay_apart():
    """Their one array is gathered anew again and again, and grows no further than what is in the cluster."""
    live = LiveCluster(resolve(**WORDS, prefix_caching=True), capacity=200)
    draw, known = np.random.default_rng(3), {}
    for _ in range(3000):
        if live.full or (known and draw.random() < 0.5):
            slot = list(known)[int(draw.integers(len(known)))]
            live.release(slot)
            del known[slot]
        hashes = draw.integers(2**62, size=int(draw.integers(600))).tolist()
        slot = live.submit(0, 9000, 1, hashes=hashes)
        known[slot] = hashes
        some = list(known)[int(draw.integers(len(known)))]
        begin, end = live._hashes.start[2 * some : 2 * some + 2]
        assert live._pool.ids[begin:end].tolist() == known[some]
    assert live._pool.ids is live._hashes.ids
    assert live._hashes.ids.size < 1 << 19


@pytest.mark.parametrize("engine", ["vllm-0.11", "vllm-0.24"])
def test_what_a_step_will_bring_is_known_while_it_runs(engine):
    """From one event to the next: the tokens told at a step's end are those that were announced, but for the gone."""
    draw = np.random.default_rng(7)
    cluster = resolve(**WORDS, engine=engine, replicas=3)
    live, alive, now, announced = LiveCluster(cluster), {}, 0, 0
    for _ in range(60):
        alive[live.submit(now, int(draw.integers(1, 900)), int(draw.integers(1, 60)))] = 0
    while live.next() < NEVER:
        gone = set()
        if alive and draw.random() < 0.02:
            gone.add(slot := int(draw.choice(list(alive))))
            del alive[slot]
            live.cancel(slot)
        now = live.next()
        early = live.ahead(now).tolist()
        come = live.advance(now).tolist()
        assert not gone & {slot for _, slot, _ in early}
        assert early == come
        announced += len(early)
        for _, slot, index in come:
            if index == live.output(slot):
                del alive[slot]
                live.release(slot)
    assert not alive
    assert announced > 500
