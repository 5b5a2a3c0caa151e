"""`simulate` and `saturation_rate` as their users call them: tables, failures, notes, reproducibility, speed."""

import time
from itertools import pairwise

import numpy as np
import polars as pl
import pytest

import squall
from squall.errors import InputError
from squall.run.files import read_run
from squall.run.table import SCHEMA, SERIES
from squall.simulate import saturation_rate, simulate
from squall.trace.table import Trace, TraceMeta

META = TraceMeta(source="made for a test", format="generated")


def make_trace(arrival, prompt, output, **more):
    return Trace.of({"arrival": arrival, "request_tokens": prompt, "response_tokens": output, **more}, META)


def poisson(n, rate, seed=0, prompt=800, output=150):
    rng = np.random.default_rng(seed)
    lengths = 1 + rng.poisson(prompt, n), 1 + rng.poisson(output, n)
    return make_trace(np.cumsum(rng.exponential(1 / rate, n)), *lengths)


def test_the_run_is_complete_and_says_what_was_simulated():
    trace = poisson(300, 5)
    run = squall.simulate(trace, title="five a second")
    assert run.table.schema == SCHEMA
    assert run.series.schema == SERIES
    table = run.table
    assert len(table) == 300
    assert (table["status"] == "ok").all()
    assert (table["response_tokens"] == trace.table["response_tokens"]).all()
    order = ["scheduled", "sent", "first_token", "last_token", "done"]
    for before, after in pairwise(order):
        assert (table[after] >= table[before]).all()
    assert (table["chunks"].list.len() == table["response_tokens"]).all()
    assert (table["chunks"].list.first() == 0).all()
    spans = table["last_token"] - table["first_token"]
    assert (table["chunks"].list.last() - spans).abs().max() < 1e-9
    meta = run.meta
    assert (meta.kind, meta.title, meta.offered) == ("simulation", "five a second", 300)
    assert meta.step_time == "uncalibrated roofline"
    assert meta.target["kv_blocks_from"].startswith("estimated")
    assert meta.target["engine_flags"]["async_scheduling"] is True
    assert set(meta.target["step_time_coefficients"]) >= {"e_bw", "e_fl", "o_gap"}
    assert any("Prefix caching" in line for line in meta.notes)
    assert any("estimated" in line for line in meta.notes)


def test_series_cover_the_run():
    run = simulate(poisson(2000, 20), replicas=2)
    series = run.series
    assert 100 < len(series) / 2 <= 512
    assert series["time"].is_sorted()
    end = run.meta.target["simulated_seconds"]
    assert series["time"][-1] == pytest.approx(end)
    width = series.filter(pl.col("replica") == 0)["time"].diff().drop_nulls()
    assert width[:-1].n_unique() < 4
    assert series["kv_used"].is_between(0, 1).all()
    assert series["preemptions"].sum() == run.table["preemptions"].sum()
    spans = np.diff(series.filter(pl.col("replica") == 0)["time"].to_numpy(), prepend=0)
    for replica in (0, 1):
        mine = series.filter(pl.col("replica") == replica)
        rows = run.table.filter(pl.col("replica") == replica)
        in_engine = ((mine["running"] + mine["waiting"]).to_numpy() * spans).sum()
        step = run.meta.target["step_time_coefficients"]
        latency = (rows["last_token"] - rows["sent"]).sum() - len(rows) * (step["a0"] + step["a2"])
        assert in_engine == pytest.approx(latency, rel=1e-6)  # Little's law


def test_what_cannot_run_stays_in_the_table():
    trace = make_trace(
        [0.0, 1.0, 2.0, 3.0, 4.0],
        [100, 0, 50, 10_000_000, 100],
        [10, 0, 0, 10, 20],
        service=["api", "api", None, None, "conversation"],
    )
    run = simulate(trace)
    said = run.table.select("status", "reason", "http_status").rows()
    assert said == [
        ("ok", None, 200),
        ("cancelled", "no_prompt", None),
        ("cancelled", "recorded_failure", None),
        ("http_error", "unservable", 400),
        ("ok", None, 200),
    ]
    assert run.table["request"].to_list() == [0, 1, 2, 3, 4]
    assert run.table["sent"].is_null().to_list() == [False, True, True, False, False]
    assert run.table["replica"].to_list() == [0, None, None, None, 0]
    assert run.table["failed"].to_list() == [False, True, True, False, False]
    assert run.table["service"].to_list() == ["api", "api", None, None, "conversation"]
    assert run.meta.offered == 5
    notes = " ".join(run.meta.notes)
    assert "without a prompt" in notes
    assert "recorded system failed" in notes
    assert "could never fit" in notes


def test_a_trace_without_work_is_refused():
    with pytest.raises(InputError, match="nothing to simulate"):
        simulate(make_trace([0.0], [10], [0]))
    with pytest.raises(InputError, match="clock"):
        simulate(make_trace([0.0, 1e9], [10, 10], [5, 5]))


def test_overload_is_refused_timed_out_and_retried():
    run = simulate(poisson(400, 60), gpu="rtx4090", queue_limit=20, timeout="8s", retries=2)
    table = run.table
    statuses = set(table["status"].unique())
    assert {"ok", "http_error", "timeout"} == statuses
    assert set(table.filter(pl.col("status") == "http_error")["http_status"]) == {429}
    assert table["attempt"].max() == 3
    timeouts = table.filter(pl.col("status") == "timeout")
    assert (timeouts["ended"] - timeouts["sent"] - 8).abs().max() < 1e-6
    ok = table.filter(pl.col("status") == "ok")
    assert (ok["ended"] - ok["sent"]).max() <= 8 + 1e-9
    assert table.select(pl.col("attempt").diff().over("request").drop_nulls().unique())["attempt"].to_list() == [1]
    first = table.filter(pl.col("attempt") == 1)
    assert first["request"].to_list() == list(range(400))
    again = table.filter(pl.col("attempt") > 1)
    assert (again["scheduled"] < again["sent"]).all()  # a retry is still the same user's wait
    assert (again.join(first, on="request")["scheduled"] == again.join(first, on="request")["scheduled_right"]).all()


def test_same_seed_same_bytes(tmp_path):
    trace = poisson(300, 40)
    words = {"gpu": "l40s", "replicas": 3, "router": "random", "queue_limit": 8, "retries": 3}
    files = []
    for name in ("one", "two"):
        simulate(trace, out=tmp_path / f"{name}.parquet", **words, seed=7)
        files.append((tmp_path / f"{name}.parquet").read_bytes() + (tmp_path / f"{name}.series.parquet").read_bytes())
    assert files[0] == files[1]
    other = simulate(trace, **words, seed=8)
    assert not other.table.equals(read_run(tmp_path / "one.parquet").table)


def test_a_run_is_written_and_read_back(tmp_path):
    run = simulate(poisson(50, 5), out=tmp_path / "run.parquet")
    back = read_run(tmp_path / "run.parquet")
    assert back.table.equals(run.table)
    assert back.series.equals(run.series)
    assert back.meta == run.meta


@pytest.mark.parametrize(
    "change",
    [
        {"gpu": "a100"},
        {"model": "llama-3.2-3b"},
        {"tp": 2},
        {"replicas": 2},
        {"kv_blocks": 900},
        {"block_size": 512, "kv_blocks": 40},
        {"max_num_seqs": 8},
        {"max_num_batched_tokens": 256},
        {"max_model_len": 1000},
        {"queue_limit": 1},
        {"timeout": 2},
        {"engine": "vllm-0.11"},
        {"engine": "vllm-0.14", "kv_blocks": 900},
        {"head": 50},
        {"speed": 3.0},
    ],
    ids=str,
)
def test_every_option_changes_something(change):
    trace = poisson(300, 30)
    assert not simulate(trace, **change).table["last_token"].equals(simulate(trace).table["last_token"])


@pytest.mark.parametrize("router", ["random", "least-outstanding"])
def test_every_router_routes_differently(router):
    trace = poisson(300, 30)
    assert (
        not simulate(trace, replicas=3, router=router)
        .table["replica"]
        .equals(simulate(trace, replicas=3).table["replica"])
    )


def test_waiting_never_preempts_and_a_full_gate_prevents_thrashing():
    """Without the gate, prompts are admitted chunk by chunk into a pool that cannot hold them."""
    rng = np.random.default_rng(0)
    trace = make_trace(np.zeros(60), rng.integers(5000, 9000, 60), rng.integers(100, 300, 60))
    gated = simulate(trace, gpu="rtx4090", kv_blocks=2000, engine="vllm-0.19")
    open_ = simulate(trace, gpu="rtx4090", kv_blocks=2000, engine="vllm-0.14")
    assert gated.table["preemptions"].sum() < open_.table["preemptions"].sum()
    assert (open_.table["status"] == "ok").all()


def test_saturation_is_where_queues_begin_to_grow():
    rate = saturation_rate(poisson(400, 1), gpu="a100")
    end = {}
    for load in (0.8, 1.3):
        trace = poisson(3000, load * rate, seed=1)
        run = simulate(trace, gpu="a100")
        end[load] = (run.table["last_token"].max() - trace.span) / trace.span
    assert end[0.8] < 0.06
    assert end[1.3] > 0.2
    assert saturation_rate(poisson(400, 1), gpu="a100", replicas=2) == pytest.approx(2 * rate)


def test_bursts_hurt_more_than_their_rate():
    """Gamma gaps of CV 3 against Poisson at the same rate: the tail of TTFT suffers although the load is the same."""
    rng = np.random.default_rng(4)
    n, rate = 4000, 0.6 * saturation_rate(poisson(400, 1))
    lengths = 1 + rng.poisson(800, n), 1 + rng.poisson(150, n)
    tails = []
    for shape in (1.0, 1 / 9):
        gaps = rng.gamma(shape, 1 / (shape * rate), n)
        run = simulate(make_trace(np.cumsum(gaps), *lengths))
        tails.append((run.table["first_token"] - run.table["scheduled"]).quantile(0.99))
    assert tails[1] > 2 * tails[0]


@pytest.mark.alone
def test_time_grows_linearly_with_the_trace():
    def took(n, **words):
        trace = poisson(n, 60, prompt=60, output=20)
        times = []
        for _ in range(2):
            begin = time.process_time()
            simulate(trace, **words)
            times.append(time.process_time() - begin)
        return min(times)

    took(100)
    for words in ({}, {"gpu": "l40s", "timeout": 30, "queue_limit": 1000}):
        small, large = took(4_000, **words), took(40_000, **words)
        assert large < 30 * small + 0.5, words


def test_azure_conversations_on_one_h100(traces):
    run = simulate(traces / "azure-2023" / "AzureLLMInferenceTrace_conv.csv")
    assert run.meta.offered == len(run.table) == 19_366
    assert (run.table["status"] == "ok").all()
    needed = (run.table["request_tokens"].cast(pl.Int64) + run.table["response_tokens"] - 1).sum()
    assert run.meta.target["computed_tokens"] - run.meta.target["tokens_lost_to_preemption"] == needed
