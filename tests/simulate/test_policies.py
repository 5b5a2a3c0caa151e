"""Orders of the queue, options of the KV cache and of the cluster: each does what its name says, by single steps and in
windows alike, and is refused where it would change nothing."""

import numpy as np
import polars as pl
import pytest

from squall import guest
from squall.errors import InputError
from squall.run.metrics import metrics
from squall.simulate import records, simulate
from squall.simulate.cluster import resolve
from squall.simulate.engine import overtaken_for, run_requests
from squall.trace.table import Trace, TraceMeta

SMALL = {"gpu": "l40s", "kv_blocks": 300, "max_num_seqs": 8, "max_num_batched_tokens": 512}


def conversations(n=60, span=5.0, seed=0):
    """Turns that each hold the whole conversation before them; two services."""
    rng = np.random.default_rng(seed)
    session, said = rng.integers(0, n // 5, n), {}
    prompt, output = [], rng.integers(5, 60, n)
    for s, new, answer in zip(session, rng.integers(30, 300, n), output, strict=True):
        prompt.append(said.get(s, 0) + int(new))
        said[s] = prompt[-1] + int(answer)
    columns = {"arrival": np.sort(rng.uniform(0, span, n)), "request_tokens": prompt, "response_tokens": output}
    service = np.where(session % 2 == 1, "api", "conversation")
    return Trace.of(columns | {"session": session, "service": service}, TraceMeta(source="test", format="generated"))


def at_once(prompt, output, **more):
    columns = {"arrival": np.zeros(len(prompt)), "request_tokens": prompt, "response_tokens": output}
    return Trace.of(columns | more, TraceMeta(source="test", format="generated"))


PLAIN = [
    {"scheduler": "sjf", "prediction_error": 0.5, "aging": 20.0},
    {"scheduler": "priority", "priorities": "api=0,conversation=1"},
    {"scheduler": "edf", "deadlines": "api=1s,conversation=10s", "timeout": 4, "retries": 2},
    {"scheduler": "lrf", "step_order": "prefill-first"},
    {"scheduler": "vtc"},
    {"scheduler": "vtc", "clients": "service", "timeout": 3},
    {"step_order": "prefill-first"},
    {"step_order": "decode-first"},
    {"chunk_size": 100},
    {"preemption": "swap", "swap_space": 4.0, "timeout": 4},
    {"watermark": 0.1, "queue_limit": 4, "retries": 3},
    {"router": "least-kv", "replicas": 3},
    {"router": "least-kv", "replicas": 3, "scrape_interval": "1s"},
    {"router": "power-of-two", "replicas": 3, "scrape_interval": "200ms"},
    {"router": "session-affinity", "replicas": 3},
    {"fail": "0@2s,1@3s", "restart_time": "1s", "retries": 3, "replicas": 2},
    {"mtbf": "3s", "restart_time": "500ms", "replicas": 3, "router": "least-outstanding"},
    {"prefill_replicas": 1, "decode_replicas": 2},
    {"prefill_replicas": 2, "decode_replicas": 1, "kv_bandwidth": 0.5, "timeout": 4, "retries": 1},
    {"prefill_replicas": 1, "decode_replicas": 2, "fail": "1@2s,0@3s", "restart_time": "1s", "retries": 2},
    {
        "prefill_replicas": 1,
        "decode_replicas": 2,
        "mtbf": "2s",
        "restart_time": "300ms",
        "retries": 3,
        "scheduler": "vtc",
    },
    {"prefill_replicas": 2, "decode_replicas": 2, "roles": "backlog", "role_interval": "500ms", "scheduler": "sjf"},
    {
        "prefill_replicas": 1,
        "decode_replicas": 3,
        "roles": "forecast",
        "role_interval": "300ms",
        "role_change_time": "1s",
    },
    {"prefill_replicas": 1, "decode_replicas": 2, "preemption": "swap", "swap_space": 4.0, "timeout": 4},
    {"fleet": "l40s=1,a100=2", "gpu": None, "kv_blocks": None},
    {"api_request_time": "5ms", "api_result_time": "0.3ms", "timeout": 3, "retries": 1},
    {"api_result_time": "2ms", "mtbf": "2s", "restart_time": "300ms", "retries": 3, "replicas": 2, "queue_limit": 6},
    {"api_request_time": "8ms", "autoscale": "queue:2", "max_replicas": 3, "provisioning": "1s", "scheduler": "vtc"},
]
CACHED = [
    {},
    {"eviction": "fifo"},
    {"host_cache": 2.0, "host_bandwidth": 10.0},
    {"shared_prefix": 64, "timeout": 3, "retries": 1},
    {"router": "prefix-affinity", "replicas": 3},
    {"fail": "0@2s", "restart_time": "1s", "retries": 2},
    {"scheduler": "sjf", "timeout": 4},
    {"preemption": "swap", "swap_space": 4.0, "timeout": 4},
    {"prefill_replicas": 2, "decode_replicas": 2, "router": "prefix-affinity", "kv_bandwidth": 1.0},
    {"prefill_replicas": 2, "decode_replicas": 2, "roles": "backlog", "role_interval": "500ms", "scheduler": "vtc"},
    {"prefill_replicas": 1, "decode_replicas": 2, "fail": "1@1s,0@2s,2@2s", "restart_time": "1s", "retries": 2},
]


def outcome_of(trace, windows, **words):
    cluster = resolve(**({**SMALL, **words}))
    columns = (trace.table[name].to_numpy() for name in ("arrival", "request_tokens", "response_tokens"))
    return run_requests(*columns, cluster, events=True, asked=trace.table, windows=windows)


@pytest.mark.parametrize("engine", ["vllm-0.24", "vllm-0.11"])
@pytest.mark.parametrize("words", [*PLAIN, *({"prefix_caching": True, **words} for words in CACHED)], ids=str)
def test_windows_change_nothing_and_all_is_conserved(words, engine):
    trace = conversations()
    single, jumped = (outcome_of(trace, windows, engine=engine, **words) for windows in (False, True))
    assert np.array_equal(single.attempts, jumped.attempts)
    keys = [np.sort(outcome.events, order=["time", "kind", "attempt"]).tobytes() for outcome in (single, jumped)]
    assert keys[0] == keys[1]
    for name in ("steps", "computed", "lost", "preemptions", "swapped", "on"):
        assert (single.replicas[name] == jumped.replicas[name]).all(), name
    it, replicas = jumped.attempts, jumped.replicas
    assert (it["state"] >= records.OK).all()
    assert len(it) == 60 + (it["number"] > 1).sum()
    assert (replicas["free"] == replicas["blocks"]).all()
    assert (replicas["running"] == 0).all()
    assert (replicas["waiting"] == 0).all()
    ok = it[it["state"] == records.OK]
    assert (ok["generated"] == ok["output"]).all()
    assert (ok["sent"] < ok["first"]).all()
    assert (ok["first"] <= ok["last"]).all()


def order_of(trace, **words):
    """Rows in the order of their first tokens, one at a time, all at once."""
    run = simulate(trace, gpu="l40s", max_num_seqs=1, engine="vllm-0.11", **words)
    return run.table.sort("first_token")["request"].to_list()


def test_orders_of_the_queue():
    rng = np.random.default_rng(1)
    prompt, output = rng.permutation(np.arange(10, 410, 10)), rng.permutation(np.arange(5, 45))
    service = ["api", "conversation"] * 20
    trace = at_once(prompt, output, service=service)
    assert order_of(trace) == list(range(40))
    # The first is admitted before the others are there.
    assert order_of(trace, scheduler="srf") == np.argsort(prompt).tolist()
    assert order_of(trace, scheduler="lrf") == np.argsort(-prompt).tolist()
    assert order_of(trace, scheduler="sjf") == np.argsort(output).tolist()
    wrong = order_of(trace, scheduler="sjf", prediction_error=1.0)
    assert wrong != np.argsort(output).tolist()
    assert np.corrcoef(np.argsort(wrong), output)[0, 1] > 0.3
    for words in (
        {"scheduler": "priority", "priorities": "conversation=0"},
        {"scheduler": "edf", "deadlines": "api=9s,conversation=1s"},
    ):
        assert order_of(trace, **words) == [*range(1, 40, 2), *range(0, 40, 2)]


def test_fair_queueing_protects_the_small_client():
    """One client floods, another asks now and then: under VTC it does not wait behind the flood."""
    n = 200
    service = ["api"] * n
    service[20::20] = ["conversation"] * len(service[20::20])
    trace = at_once([200] * n, [50] * n, service=service)
    words = {"gpu": "l40s", "max_num_seqs": 4}
    waits = {}
    for name in ("fcfs", "vtc"):
        table = simulate(trace, scheduler=name, **words).table
        waits[name] = table.filter(pl.col("service") == "conversation")["first_token"].mean()
    assert waits["vtc"] < 0.3 * waits["fcfs"]


def test_step_orders_trade_the_first_token_for_the_others():
    trace = conversations(200, 8.0)
    words = {"gpu": "l40s", "max_num_batched_tokens": 512, "max_num_seqs": 64}
    runs = {
        name: simulate(trace, step_order=name, **words).table for name in ("mixed", "prefill-first", "decode-first")
    }
    tpot = {
        name: ((t["last_token"] - t["first_token"]) / (t["response_tokens"] - 1)).mean() for name, t in runs.items()
    }
    ttft = {name: (t["first_token"] - t["sent"]).mean() for name, t in runs.items()}
    assert tpot["mixed"] < tpot["prefill-first"]
    assert ttft["decode-first"] > ttft["mixed"]


def test_swapping_keeps_what_was_computed():
    trace = at_once([100] * 20, [300] * 20)
    words = {"gpu": "l40s", "kv_blocks": 150, "engine": "vllm-0.11"}
    kept = simulate(trace, preemption="swap", swap_space=8.0, **words)
    lost = simulate(trace, **words)
    needed = 20 * (100 + 300 - 1)
    assert kept.table["preemptions"].sum() > 0
    assert kept.meta.target["computed_tokens"] == needed < lost.meta.target["computed_tokens"]
    assert kept.meta.target["blocks_swapped"] > 0
    assert any("preemption=swap" in line for line in kept.meta.notes)
    slow = simulate(trace, preemption="swap", swap_space=8.0, swap_bandwidth=0.1, **words)
    assert slow.table["last_token"].max() > kept.table["last_token"].max()


def test_prefix_caching_needs_a_trace_that_says_what_is_shared():
    with pytest.raises(InputError, match="--shared-prefix"):
        simulate(at_once([100, 200], [10, 20]), prefix_caching=True)
    run = simulate(at_once([1000] * 20, [10] * 20), prefix_caching=True, shared_prefix=800)
    cached = run.table["cached_tokens"].to_list()
    assert cached[0] == 0
    assert set(cached[1:]) == {800}


def test_the_traces_hashes_decide_what_is_found():
    """Blocks of 512 tokens by hash, of 16 in the engine: all full blocks of equal hashes but the last are found."""
    meta = TraceMeta(source="test", format="generated", block_size=512)
    columns = {"arrival": [0.0, 100.0, 200.0], "request_tokens": [1200, 1200, 1200], "response_tokens": [5, 5, 5]}
    trace = Trace.of(columns | {"prefix": [[1, 2, 3], [1, 2, 3], [1, 9, 8]]}, meta)
    run = simulate(trace, prefix_caching=True)
    assert run.table["cached_tokens"].to_list() == [0, 1199 // 16 * 16, 512]
    plain = simulate(trace)
    ttft = (run.table["first_token"] - run.table["sent"]).to_list()
    assert ttft[0] == pytest.approx((plain.table["first_token"] - plain.table["sent"])[0])
    assert ttft[1] < ttft[2] < ttft[0]
    assert plain.table["cached_tokens"].null_count() == 3


def test_resumed_requests_find_their_own_blocks():
    """As with prefix caching where each request is a session of its own; and nothing of anybody else's."""
    trace = conversations(60, 1.0)
    alone = trace.replace(trace.table.with_columns(session=np.arange(60)))
    own, apart, plain = (
        simulate(alone, **SMALL, **words) for words in ({"own_blocks": True}, {"prefix_caching": True}, {})
    )
    assert own.table["preemptions"].sum() > 3
    assert own.meta.target["own_blocks_found"] == apart.meta.target["prefix_cache"]["blocks_hit"] > 0
    assert own.table["last_token"].equals(apart.table["last_token"])
    assert own.table["last_token"].max() < plain.table["last_token"].max()
    assert own.table["cached_tokens"].null_count() == 60
    shared = simulate(trace, own_blocks=True, **SMALL)
    assert shared.table["last_token"].equals(own.table["last_token"])
    roomy = SMALL | {"kv_blocks": 5000}
    assert simulate(trace, own_blocks=True, **roomy).table.equals(simulate(trace, **roomy).table)


def test_a_host_cache_gives_back_what_the_gpu_evicted():
    trace = conversations(120, 20.0)
    rates = [
        simulate(trace, prefix_caching=True, **SMALL, **words).meta.target["prefix_cache"]["hit_rate"]
        for words in ({}, {"host_cache": 0.05}, {"host_cache": 4.0})
    ]
    assert rates[0] < rates[1] < rates[2]


OWN = """
print("hello")  # must not disturb anything

def shortest(request_tokens):
    return request_tokens

def broken(request_tokens):
    return 1 / 0

def nonsense(request_tokens, arrival):
    return float("nan")

def infinite(request_tokens):
    return 1e308 * request_tokens

def unknown(colour):
    return 1.0

def text(request_tokens):
    return "first"

def array(request_tokens):
    return [request_tokens, 1.0]

def nothing():
    return 1.0

def later(request_tokens):
    if request_tokens > 25:
        raise ValueError("no")
    return 1.0

def keyword(*, request_tokens):
    return request_tokens

def many(*request_tokens):
    return 1.0

def lazy(request_tokens):
    yield request_tokens

def nil(request_tokens):
    request_tokens + 1

def imports(request_tokens):
    import os
    return os.getpid()

def reads(request_tokens):
    return float(open("somewhere").read())

def mixed(request_tokens):
    return "a" if request_tokens > 15 else 1.0

def same(request_tokens):
    return 1.0

class Kind:
    pass
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "mine.py"
    path.write_text(OWN)
    return path


def test_your_own_policy(own):
    trace = at_once([30, 10, 20], [5, 5, 5])
    assert order_of(trace, scheduler=f"{own}:shortest") == order_of(trace, scheduler="srf") == [1, 2, 0]
    run = simulate(trace, scheduler=f"{own}:shortest")
    assert any("scheduler=" in line for line in run.meta.notes)


@pytest.mark.parametrize(
    ("name", "says"),
    {
        "broken": "raised|finite",
        "nonsense": "finite",
        "infinite": "finite",
        "unknown": "'colour'; a policy can ask for arrival",
        "text": "compile|finite|raised",
        "array": "not a number",
        "nothing": "no parameters",
        "missing": "no function missing",
        "later": "raised ValueError: no",
        "keyword": "plainly",
        "many": "plainly",
        "lazy": "plain function",
        "nil": "returns none, not a number",
        "imports": "IMPORT_NAME",
        "reads": "compile it: Untyped global name 'open'",
        "mixed": "compile",
        "same": "changes nothing",
        "Kind": "no function Kind",
        "": "give FILE.py:FUNCTION",
    }.items(),
)
def test_a_policy_that_cannot_be_used_is_one_sentence(own, name, says):
    with pytest.raises(InputError, match=says) as wrong:
        simulate(at_once([30, 10, 20], [5, 5, 5]), scheduler=f"{own}:{name}")
    assert str(wrong.value).startswith(f"--scheduler {own}:{name}")
    assert "\n" not in str(wrong.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("raise RuntimeError('no')", "it cannot be run: RuntimeError: no"),
        ("raise SystemExit(3)", "it cannot be run: SystemExit: 3"),
        ("def policy(:", "it cannot be run: SyntaxError"),
        ("import os; os._exit(7)", "its process died .exit code 7"),
        ("while True: pass", "was not run within 1 s"),
        ("\0\1", "it cannot be run"),
        # For all lengths but those of this trace it ends: no trying out can find it.
        (
            "def policy(request_tokens):\n    while request_tokens == 77:\n        pass\n    return request_tokens",
            "did not return within 1 s; it must end",
        ),
        (
            "import ctypes\nabort = ctypes.CDLL(None).abort\nabort.argtypes, abort.restype = [], None\n"
            "def policy(request_tokens):\n    abort()\n    return request_tokens",
            "its process died .SIGABRT",
        ),
    ],
)
def test_what_only_a_process_of_its_own_survives(tmp_path, monkeypatch, text, says):
    """Endless loops (compiled ones cannot be interrupted), crashes, and files that cannot be run."""
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.setattr(guest, "CALL_PER_ROW", 0.0)
    monkeypatch.setattr("squall.simulate.policies.OWN_LIMIT", 1.0)
    if "while True" in text:
        monkeypatch.setattr(guest, "START", 1.0)
    with pytest.raises(InputError, match=says):
        simulate(at_once([30, 77, 20], [5, 5, 5]), scheduler=f"{tmp_path}/mine.py:policy")
    # It can be mended and tried again.
    monkeypatch.undo()
    (tmp_path / "mine.py").write_text("def policy(request_tokens):\n    return request_tokens")
    assert order_of(at_once([30, 10, 20], [5] * 3), scheduler=f"{tmp_path}/mine.py:policy") == [1, 2, 0]


@pytest.mark.parametrize(
    ("where", "says"),
    [("nowhere.py:policy", "there is no such file"), ("{0}:policy", "cannot be read: Is a directory")],
)
def test_a_policy_needs_a_file(tmp_path, where, says):
    with pytest.raises(InputError, match=says):
        simulate(at_once([30, 10, 20], [5, 5, 5]), scheduler=where.format(tmp_path))


def test_a_policy_file_must_be_python(tmp_path):
    (tmp_path / "mine.txt").write_text("def policy(request_tokens):\n    return request_tokens")
    with pytest.raises(InputError, match=r"it is not a Python file \(.py\)"):
        simulate(at_once([30, 10, 20], [5, 5, 5]), scheduler=f"{tmp_path}/mine.txt:policy")


def test_sessions_stay_where_they_were():
    run = simulate(conversations(), replicas=4, router="session-affinity", **SMALL)
    table = run.table.with_columns(conversations().table["session"])
    assert table.group_by("session").agg(pl.col("replica").n_unique())["replica"].max() == 1
    assert table["replica"].n_unique() > 1


def test_prefix_affinity_finds_more():
    trace = conversations(150, 30.0)
    words = {"replicas": 3, "prefix_caching": True, **SMALL}
    rates = [
        simulate(trace, router=router, **words).meta.target["prefix_cache"]["hit_rate"]
        for router in ("round-robin", "prefix-affinity")
    ]
    assert rates[1] > rates[0] + 0.1


def test_prompts_are_cached_on_both_sides_of_a_transfer():
    """The prefill engine does not compute what it has, and what the decode engine has is not sent."""
    trace = conversations(150, 30.0)
    words = {"prefill_replicas": 1, "decode_replicas": 1, **SMALL, "kv_blocks": 3000}
    cached, plain = (simulate(trace, prefix_caching=on, **words) for on in (True, False))
    together = simulate(trace, prefix_caching=True, **(SMALL | {"kv_blocks": 3000}))
    assert cached.meta.target["prefix_cache"]["blocks_not_sent"] > 0
    assert cached.meta.target["computed_tokens"] < 0.6 * plain.meta.target["computed_tokens"]
    assert ttft(cached) < ttft(plain)
    # The answers were generated elsewhere, so the prefill engine finds the prompts of earlier turns only.
    assert 0 < cached.table["cached_tokens"].sum() < together.table["cached_tokens"].sum()


def test_swapped_blocks_that_are_still_on_the_gpu_are_not_moved_back():
    trace = at_once([100] * 20, [300] * 20, session=list(range(20)))
    words = {"gpu": "l40s", "kv_blocks": 150, "engine": "vllm-0.11", "preemption": "swap", "swap_space": 8.0}
    kept, plain = (simulate(trace, prefix_caching=on, **words).meta.target for on in (True, False))
    assert kept["computed_tokens"] == plain["computed_tokens"] == 20 * (100 + 300 - 1)
    assert 0 < kept["blocks_swapped"] < plain["blocks_swapped"]


def shifting(n=6000, span=320.0, seed=0):
    """A first half of long prompts and short answers, a second one the other way round."""
    rng = np.random.default_rng(seed)
    arrival = np.sort(rng.uniform(0, span, n))
    late = arrival > span / 2
    prompt = np.where(late, rng.integers(50, 150, n), rng.integers(2000, 4000, n))
    output = np.where(late, rng.integers(300, 500, n), rng.integers(5, 20, n))
    columns = {"arrival": arrival, "request_tokens": prompt, "response_tokens": output}
    return Trace.of(columns, TraceMeta(source="test", format="generated"))


@pytest.mark.parametrize("roles", ["backlog", "forecast"])
def test_roles_that_follow_the_load_meet_more_slos_than_any_fixed_split(roles, tmp_path):
    trace = shifting()
    words = {"gpu": "l40s", "kv_blocks": 2000, "max_num_seqs": 64, "timeout": 60}
    met = {}
    for prefills in range(1, 6):
        run = simulate(trace, prefill_replicas=prefills, decode_replicas=6 - prefills, **words)
        met[prefills] = metrics(run, slo="ttft=2s,tpot=60ms").goodput_share
    timeline = tmp_path / "timeline.json"
    run = simulate(trace, prefill_replicas=3, decode_replicas=3, roles=roles, timeline=timeline, **words)
    assert timeline.read_text().count("changes its role") == run.meta.target["role_changes"] >= 2
    assert 1 <= run.meta.target["mean_prefill_replicas"] <= 5
    assert any(f"roles={roles}" in line for line in run.meta.notes)
    assert metrics(run, slo="ttft=2s,tpot=60ms").goodput_share > max(met.values()) + 0.05, met


def test_roles_stay_as_they_are_under_a_load_that_does():
    trace = poisson(1500, 6.0)
    words = {"gpu": "l40s", "kv_blocks": 2000, "max_num_seqs": 64, "prefill_replicas": 2, "decode_replicas": 2}
    fixed, moving = simulate(trace, **words), simulate(trace, roles="backlog", **words)
    assert moving.meta.target["role_changes"] == 0
    assert moving.table.equals(fixed.table)


def test_aging_ends_starvation():
    """Short requests keep coming: the long ones never get their turn, unless waiting counts."""
    rng = np.random.default_rng(3)
    n = 3000
    output = np.where(np.arange(n) % 100 == 50, 400, 20)
    columns = {"arrival": np.cumsum(rng.exponential(1 / 18, n)), "request_tokens": [50] * n, "response_tokens": output}
    trace = Trace.of(columns, TraceMeta(source="test", format="generated"))
    words = {"gpu": "l40s", "max_num_seqs": 8, "kv_blocks": 2000}
    fair, greedy, aged = (
        simulate(trace, **words, **more) for more in ({}, {"scheduler": "sjf"}, {"scheduler": "sjf", "aging": 20.0})
    )
    starved = [run.meta.target["starved"] for run in (fair, greedy, aged)]
    assert starved[0] == starved[2] == 0 < starved[1]
    assert greedy.meta.target["longest_overtaken"] > 60
    assert any("starved" in line for line in greedy.meta.notes)
    assert ttft(greedy) < ttft(fair)


def test_overtaken_is_the_wait_behind_who_came_later():
    attempts = np.zeros(5, records.ATTEMPT)
    attempts["replica"] = [0, 0, 0, 1, -1]
    attempts["sent"] = np.array([0, 1, 2, 0, 0]) * records.TICKS
    attempts["first"] = np.array([90, 5, 7, 50, -1]) * records.TICKS
    attempts["ended"] = 99 * records.TICKS
    assert overtaken_for(attempts).tolist() == [85.0, 0.0, 0.0, 0.0, 0.0]
    attempts["first"][0] = -1  # it gave up
    assert overtaken_for(attempts)[0] == 94.0


def poisson(n, rate, seed=0):
    rng = np.random.default_rng(seed)
    columns = {
        "arrival": np.cumsum(rng.exponential(1 / rate, n)),
        "request_tokens": 1 + rng.geometric(1 / 500, n),
        "response_tokens": 1 + rng.geometric(1 / 100, n),
    }
    return Trace.of(columns, TraceMeta(source="test", format="generated"))


def ttft(run):
    return (run.table["first_token"] - run.table["scheduled"]).mean()


def test_two_choices_are_better_than_one_and_old_pictures_are_worse():
    trace = poisson(3000, 22.0)
    words = {"replicas": 8, **SMALL, "kv_blocks": 2000}
    random, two, live = (
        ttft(simulate(trace, router=r, **words)) for r in ("random", "power-of-two", "least-outstanding")
    )
    stale = ttft(simulate(trace, router="least-outstanding", scrape_interval="5s", **words))
    assert live < two < random
    assert stale > 2 * live


def test_a_failed_replica_breaks_its_connections_and_comes_back():
    trace = poisson(300, 10.0)
    run = simulate(trace, replicas=2, fail="0@10s", restart_time="5s")
    broken = run.table.filter(pl.col("status") == "reset")
    assert len(broken) > 0
    assert (broken["replica"] == 0).all()
    assert (broken["ended"] - 10).abs().max() < 1e-9
    served = run.table.filter((pl.col("status") == "ok") & (pl.col("replica") == 0))
    assert served.filter(pl.col("sent").is_between(10, 15)).is_empty()
    assert len(served.filter(pl.col("sent") > 15)) > 0
    again = simulate(trace, replicas=2, fail="0@10s", restart_time="5s", retries=3).table
    assert (again.group_by("request").agg(pl.col("status").last())["status"] == "ok").all()
    alone = simulate(trace, fail="0@10s", restart_time="5s").table
    assert (alone.filter(pl.col("sent").is_between(10.1, 14.9))["status"] == "refused").all()


def test_a_retry_storm_makes_more_attempts_than_requests():
    trace = poisson(600, 60.0)
    words = {**SMALL, "timeout": 3}
    calm, storm = simulate(trace, **words), simulate(trace, retries=5, **words)
    assert len(storm.table) > 2 * len(calm.table)
    assert storm.meta.target["computed_tokens"] > calm.meta.target["computed_tokens"]


def test_autoscaling_costs_and_helps_after_the_provisioning():
    trace = poisson(2000, 20.0)
    words = {**SMALL, "kv_blocks": 2000}
    fixed = simulate(trace, **words)
    scaled = simulate(trace, autoscale="queue:4", max_replicas=6, provisioning="20s", price=3.6, **words)
    assert ttft(scaled) < 0.7 * ttft(fixed)
    others = scaled.table.filter(pl.col("replica") > 0)
    assert others["sent"].min() > 35  # the first look after 15 s, then 20 s
    seconds, end = scaled.meta.target["replica_seconds"], scaled.meta.target["simulated_seconds"]
    assert end < seconds < 6 * end
    assert scaled.meta.target["cost"] == pytest.approx(seconds / 1000)
    assert fixed.meta.target["replica_seconds"] == pytest.approx(fixed.meta.target["simulated_seconds"])


def test_what_scales_too_late_loses_requests():
    """Ten minutes of a rate that jumps: replicas that take 103 s to be ready come when many have given up."""
    rng = np.random.default_rng(6)
    arrival = np.concatenate(
        [100 * i + np.sort(rng.uniform(0, 100, 100 * rate)) for i, rate in enumerate((15, 2, 10, 15, 5, 2))]
    )
    columns = {"arrival": arrival, "request_tokens": [600] * len(arrival), "response_tokens": [150] * len(arrival)}
    trace = Trace.of(columns, TraceMeta(source="test", format="generated"))
    words = {**SMALL, "max_num_seqs": 32, "kv_blocks": 3000, "timeout": 60, "autoscale": "queue:4", "max_replicas": 6}
    lost, tails = [], []
    for delay in ("1s", "103s"):
        table = simulate(trace, provisioning=delay, **words).table
        lost.append((table["status"] == "timeout").sum())
        tails.append((table["first_token"] - table["sent"]).quantile(0.99))
    assert lost[1] > 5 * lost[0] + 100
    assert tails[1] > 2 * tails[0]


def test_disaggregation_pays_prefill_transfer_and_one_decode_step():
    trace = at_once([2000], [50])
    words = {"engine": "vllm-0.11", "prefill_replicas": 1, "decode_replicas": 1}
    times = [
        simulate(trace, kv_latency=latency, kv_bandwidth=bandwidth, **words).table["first_token"][0]
        for latency, bandwidth in ((0.1, 10.0), (0.3, 10.0), (0.1, 5.0))
    ]
    alone = simulate(trace, engine="vllm-0.11").table["first_token"][0]
    kv = 2000 * 131_072 / 1e10
    assert times[1] - times[0] == pytest.approx(0.2, abs=1e-9)
    assert times[2] - times[0] == pytest.approx(kv, abs=1e-9)
    step = times[0] - alone - 0.1 - kv
    assert 0.003 < step < 0.02  # one decode step of an 8B model on an H100


def test_each_kind_of_gpu_has_its_own_pace():
    run = simulate(poisson(200, 4.0), fleet="h100=1,l40s=1")
    tpot = run.table.filter(pl.col("response_tokens") > 5).select(
        "replica", tpot=(pl.col("last_token") - pl.col("first_token")) / (pl.col("response_tokens") - 1)
    )
    means = dict(tpot.group_by("replica").agg(pl.col("tpot").mean()).rows())
    assert means[1] > 2 * means[0]
    assert run.meta.target["others"][0]["gpu"]["name"] == "l40s"


def test_overload_shows_a_plateau():
    """KV-bound: beyond saturation neither throughput nor the number of running requests depends on the load."""
    rng = np.random.default_rng(3)  # lengths that vary, so that requests do not end in waves
    trace = at_once(rng.integers(500, 1500, 4000), rng.integers(100, 300, 4000))
    seen = []
    for n in (2000, 4000):
        run = simulate(trace, head=n, gpu="l40s", kv_blocks=6000)
        middle = run.series.filter(
            pl.col("time").is_between(0.2 * run.series["time"][-1], 0.6 * run.series["time"][-1])
        )
        seen.append((middle["running"].mean(), middle["batch_tokens"].mean()))
    assert seen[0] == pytest.approx(seen[1], rel=0.03)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"scheduler": "lifo"}, "--scheduler lifo"),
        ({"prediction_error": 0.3}, "--prediction-error"),
        ({"scheduler": "priority"}, "--priorities"),
        ({"scheduler": "priority", "priorities": "gold=0"}, "gold"),
        ({"scheduler": "priority", "priorities": "api"}, "NAME=VALUE"),
        ({"scheduler": "priority", "priorities": "api=nan"}, "give a finite one"),
        ({"scheduler": "priority", "priorities": "api=0,api=1"}, "has a value already"),
        ({"scheduler": "edf"}, "--deadlines"),
        ({"scheduler": "edf", "deadlines": "api=1s,conversation=1s"}, "that of the arrivals"),
        ({"scheduler": "vtc", "clients": "model"}, "model"),
        ({"swap_space": 3.0}, "--preemption swap"),
        ({"preemption": "swap"}, "--swap-space"),
        ({"eviction": "fifo"}, "--prefix-caching"),
        ({"own_blocks": True, "prefix_caching": True}, "--own-blocks"),
        ({"host_bandwidth": 3.0, "prefix_caching": True}, "--host-cache"),
        ({"router": "random"}, "one replica"),
        ({"router": "prefix-affinity", "replicas": 2}, "--prefix-caching"),
        ({"router": "random", "replicas": 2, "scrape_interval": "1s"}, "--scrape-interval"),
        ({"fail": "3@10s"}, "--fail 3@10s"),
        ({"fail": "0@10s", "mtbf": "1h"}, "--mtbf"),
        ({"restart_time": "10s"}, "--restart-time"),
        ({"autoscale": "queue"}, "--autoscale queue"),
        ({"autoscale": "queue:4"}, "--max-replicas"),
        ({"autoscale": "queue:4", "max_replicas": 1}, "--max-replicas 1"),
        ({"provisioning": "10s"}, "--provisioning"),
        ({"prefill_replicas": 2}, "--prefill-replicas"),
        ({"prefill_replicas": 2, "decode_replicas": 1, "replicas": 3}, "--replicas"),
        ({"prefill_replicas": 2, "decode_replicas": 1, "autoscale": "kv:0.7", "max_replicas": 5}, "--roles"),
        ({"prefill_replicas": 1, "decode_replicas": 2, "router": "random"}, "--router random"),
        ({"prefill_replicas": 1, "decode_replicas": 1, "roles": "backlog"}, "at least three"),
        ({"prefill_replicas": 2, "decode_replicas": 1, "role_interval": "1s"}, "--role-interval"),
        ({"roles": "forecast"}, "--prefill-replicas"),
        ({"scheduler": "edf", "deadlines": "api=1s", "aging": 1.0}, "--aging"),
        ({"kv_bandwidth": 10.0}, "--kv-bandwidth"),
        ({"fleet": "h100=2", "replicas": 3}, "--fleet"),
        ({"fleet": "h100"}, "--fleet h100"),
        ({"chunk_size": 0}, "--chunk-size 0"),
        ({"watermark": 1.5}, "--watermark"),
        ({"price": -1.0}, "--price"),
        ({"api_request_time": -1.0}, "--api-request-time"),
        ({"step_order": "random"}, "--step-order"),
    ],
    ids=str,
)
def test_what_cannot_be_or_changes_nothing_is_refused(words, says):
    with pytest.raises(InputError, match=says):
        simulate(conversations(), **words)


@pytest.mark.parametrize(
    ("words", "beside"),
    [
        *((words, {}) for words in PLAIN),
        *((words, {"prefix_caching": True}) for words in CACHED if words),
        ({"prefix_caching": True}, {}),
        ({"own_blocks": True}, {}),
        ({"prediction_error": 2.0}, {"scheduler": "sjf"}),
        ({"clients": "service"}, {"scheduler": "vtc"}),
        ({"swap_space": 0.01}, {"preemption": "swap", "swap_space": 4.0, "engine": "vllm-0.11"}),
        ({"swap_bandwidth": 1.0}, {"preemption": "swap", "swap_space": 4.0, "engine": "vllm-0.11"}),
        ({"host_bandwidth": 1.0}, {"prefix_caching": True, "host_cache": 2.0}),
        ({"scrape_interval": "2s"}, {"router": "least-outstanding", "replicas": 3}),
        ({"restart_time": "100ms"}, {"fail": "0@2s"}),
        ({"kv_latency": "20ms"}, {"prefill_replicas": 1, "decode_replicas": 1}),
        ({"api_request_time": "1ms"}, {}),
        ({"api_result_time": "0.01ms"}, {}),
    ],
    ids=str,
)
def test_every_choice_changes_something(words, beside):
    trace = conversations()
    if words.get("preemption") == "swap":
        beside = {"engine": "vllm-0.11"}
    with_it, without = (outcome_of(trace, True, **(beside | more)) for more in (words, {}))
    assert with_it.attempts["last"].tobytes() != without.attempts["last"].tobytes()


def test_a_watermark_cuts_preemptions_and_delays_the_first_token():
    trace = poisson(800, 20.0)
    words = {"gpu": "l40s", "kv_blocks": 1500, "engine": "vllm-0.24"}
    runs = [simulate(trace, watermark=share, **words) for share in (0.0, 0.02, 0.05)]
    preemptions = [run.table["preemptions"].sum() for run in runs]
    assert preemptions[1] < 0.6 * preemptions[0]
    assert preemptions[2] < 0.6 * preemptions[1]
    ends = [run.table["last_token"].max() for run in runs]
    assert max(ends) < 1.01 * ends[0]  # no throughput lost
    medians = [(run.table["first_token"] - run.table["sent"]).median() for run in runs]
    assert medians[2] > medians[0]
