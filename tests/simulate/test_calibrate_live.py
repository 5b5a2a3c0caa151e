"""What is read from a live server, and what is made of closed loops, against a server whose step times are known."""

from importlib import import_module

import msgspec
import numpy as np
import polars as pl
import pytest

import squall
from squall.errors import InputError
from squall.run.table import Run, RunMeta
from squall.simulate.calibrate import errors_over_runs, simulated_requests, slowed, spread_of
from squall.simulate.cluster import resolve
from squall.simulate.engine import run_trace
from squall.simulate.hardware import MODELS
from squall.simulate.seen import Steps
from squall.simulate.step_time import StepTable, StepTime
from squall.trace.table import Trace, TraceMeta

live = import_module("squall.calibrate")

METRICS = (
    'vllm:cache_config_info{block_size="32",enable_prefix_caching="True",num_gpu_blocks="80"} 1.0\n'
    'vllm:num_preemptions_total{engine="0",model_name="tiny"} 3.0\n'
    'vllm:num_preemptions_total{engine="1",model_name="tiny"} 4.0\n'
)
PAGES = {
    "/metrics": METRICS,
    "/v1/models": '{"data": [{"id": "llama-3.2-1b", "root": "nowhere", "max_model_len": 2048}]}',
    "/version": '{"version": "0.32.0"}',
}
NOTHING = dict.fromkeys(("kv_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len"))


@pytest.fixture
def server(monkeypatch):
    pages = dict(PAGES)
    found = live._Server("http://127.0.0.1:9", None, "NO_KEY")
    monkeypatch.setattr(found, "get", lambda path: pages.get(path, ""))
    found.pages = pages
    return found


def test_limits_are_read_and_what_is_given_wins(server):
    words, said, engines = live._limits_of(server, None, None, NOTHING)
    assert (words["kv_blocks"], words["block_size"], words["max_model_len"]) == (80, 32, 2048)
    assert words["model"] == MODELS["llama-3.2-1b"]
    assert engines == ["vllm-0.24", "vllm-0.24-sync"]
    assert not said
    assert live._limits_of(server, None, "vllm-0.11", NOTHING | {"kv_blocks": 99})[0]["kv_blocks"] == 99
    server.pages["/version"] = '{"version": "0.12.1"}'
    assert live._limits_of(server, None, None, NOTHING)[2] == ["vllm-0.11"]
    assert server.counter("vllm:num_preemptions_total") == 7
    assert server.counter("vllm:nothing") is None


def test_without_a_block_count_nothing_is_calibrated(server):
    server.pages["/metrics"] = "python_info 1.0\n"
    with pytest.raises(InputError, match="--kv-blocks"):
        live._limits_of(server, None, None, NOTHING)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({}, "either --run"),
        ({"run": "x.csv", "url": "http://127.0.0.1:9"}, "either --run"),
        ({"run": "x.csv", "gpu": "h100"}, "--model is missing"),
        ({"url": "http://127.0.0.1:9", "first": 5}, "--first has no effect"),
        ({"url": "http://127.0.0.1:9", "budget": 5}, "--budget 5"),
        ({"url": "http://127.0.0.1:9"}, "is the server up"),
    ],
)
def test_impossible_calls(words, says):
    with pytest.raises(InputError, match=says):
        squall.calibrate(**words)


def test_a_first_guess_finds_the_table_behind_exact_measurements():
    """A step takes 5 ms + 20 us a token + 0.2 ms a sequence + 1 us a KV token; a request 2 ms to arrive."""
    cluster = resolve(kv_blocks=200, block_size=32, max_num_seqs=16, max_num_batched_tokens=2048)

    def step(tokens, sequences, kv):
        return 5e-3 + 2e-5 * tokens + 2e-4 * sequences + 1e-6 * kv

    def measured(kind, prompt, response, n):
        first = 2e-3 + step(prompt, 1, 0)
        gap = step(n, n, n * (prompt + response / 2))
        columns = {
            "request": range(n),
            "attempt": [1] * n,
            "sent": [0.0] * n,
            "first_token": [first] * n,
            "last_token": [first + gap * (response - 1)] * n,
            "request_tokens": [prompt] * n,
            "response_tokens": [response] * n,
            "chunks": [(gap * np.arange(response)).tolist()] * n,
        }
        run = Run.of(pl.DataFrame(columns), RunMeta(kind="recorded"))
        return live._Measured(kind, run.table, n, run)

    them = [measured("prefill", prompt, 1, 1) for prompt in (16, 64, 256, 1024)]
    them += [measured("batch", 16, 32, n) for n in (1, 2, 4, 8, 16)]
    them += [measured("context", 700, 32, n) for n in (1, 4, 8)]
    found = live._first_guess(them, cluster)
    assert found.table.per_kv_token == pytest.approx(1e-6, rel=0.02)
    for tokens, seconds in found.table.points:
        both = seconds + min(tokens, 16) * found.table.per_sequence
        assert both == pytest.approx(step(tokens, min(tokens, 16), 0), rel=0.1)


def simulated_bursts(cluster, noise):
    """What replay would have measured: BURSTS times one and several requests at one moment."""
    rng = np.random.default_rng(4)
    bursts = []
    for size in live.TOGETHER:
        sent = np.repeat(np.arange(live.BURSTS) * 0.4, size)
        of = {"sent": sent, "request_tokens": np.full(len(sent), 16), "response_tokens": np.ones(len(sent), int)}
        table = pl.DataFrame({"request": np.arange(len(sent)), **of})
        took = simulated_requests(table, cluster)["ttft"].to_numpy() + rng.exponential(noise, len(sent))
        table = table.with_columns(first_token=pl.Series(sent + took), last_token=pl.Series(sent + took))
        bursts.append(live._Measured("burst", table, size, None))
    return bursts


@pytest.mark.parametrize(("s_in", "s_out"), [(0.0, 0.0), (1e-3, 0.0), (3e-3, 0.0), (1.5e-3, 8e-4)])
@pytest.mark.parametrize("seen", [False, True])
def test_bursts_tell_the_api_servers_time_from_its_delay(s_in, s_out, seen):
    table = StepTable(points=[(1.0, 12e-3), (64.0, 16e-3), (512.0, 60e-3)], per_sequence=1e-3)
    words = {"kv_blocks": 200, "block_size": 32, "max_num_seqs": 16, "engine": "vllm-0.24-sync"}
    edges = {"a0": 4e-3, "s_in": s_in, "s_out": s_out}
    cluster = resolve(**words, step_time=StepTime(table=table, o0=0.0, o1=0.0, o_gap=0.0, **edges))
    known = msgspec.structs.replace(cluster, step_time=msgspec.structs.replace(cluster.step_time, a0=9e-3, s_in=0.0))
    bursts = simulated_bursts(cluster, 0.3e-3)
    # Tokens of one step are written in the second half of the time that their results take.
    steps = Steps(*([np.ones(9)] * 5), np.full(9, s_out / 2)) if seen else None
    found = live._with_front(bursts, known, steps).step_time
    assert found.s_out == pytest.approx(s_out, abs=0.25e-3)
    # Where the order of events is the same with another s_in, only the sum is known.
    assert found.a0 + found.s_in == pytest.approx(4e-3 + s_in, abs=0.6e-3)
    if not seen or s_in > 1.2e-3:
        assert found.s_in == pytest.approx(s_in, abs=0.6e-3)


def run_as_slow_as(factor):
    sent = np.arange(50.0)
    return pl.DataFrame(
        {
            "sent": sent,
            "first_token": sent + 0.1 * factor,
            "last_token": sent + 2.0,
            "response_tokens": np.full(50, 20),
        }
    )


def test_the_spread_of_real_runs_is_the_interval_of_their_median():
    spread = spread_of([run_as_slow_as(factor) for factor in (0.9, 1.0, 1.1)], [1, None, 3])
    assert spread.runs == 3
    assert spread.mean["ttft"] == pytest.approx(0.1)
    assert spread.p99["e2e"] == pytest.approx(0.0, abs=1e-12)
    assert spread.preemptions == [1, None, 3]
    # Of ten, the second and the ninth: the chance that the median lies beyond is 22 of 1,024.
    ten = [0.1, 0.9, 0.95, 0.97, 1.0, 1.0, 1.03, 1.05, 1.2, 9.0]
    spread = spread_of([run_as_slow_as(factor) for factor in ten], [0] * 10)
    assert spread.p50["ttft"] == pytest.approx((1.2 - 0.9) / 2)


def test_a_run_that_was_held_up_does_not_decide():
    exact = pl.DataFrame({"ttft": np.full(50, 0.1), "e2e": np.full(50, 2.0), "preemptions": np.zeros(50, int)})
    runs = [run_as_slow_as(factor) for factor in (1.0, 1.02, 1.04, 9.0, 0.98)]
    errors = errors_over_runs([(run, exact) for run in runs], 0)
    assert errors.requests == 250
    assert errors.mean["ttft"] == pytest.approx(1 / 1.02 - 1)
    assert errors.p99["e2e"] == pytest.approx(0.0)
    assert errors.preemptions == (0, 0)


def pretended(server, monkeypatch, truth):
    """Let `truth` answer what is sent to `server`, in no time; those sent together come in waves."""

    def send(arrival, prompt, response, *, at_once=None, seed):
        start, sent = 0.0, np.array(arrival, dtype=float)
        for k in range(0, len(sent) if at_once else 0, at_once or 1):
            sent[k : k + at_once] = start
            wave = slice(k, k + at_once)
            columns = {"sent": sent[wave], "request_tokens": prompt[wave], "response_tokens": response[wave]}
            start += float(simulated_requests(pl.DataFrame(columns), truth)["e2e"].max()) + 2e-3
        columns = {"arrival": sent, "request_tokens": prompt, "response_tokens": response}
        return run_trace(Trace.of(columns, TraceMeta(source="calibration", format="generated")), truth)

    monkeypatch.setattr(server, "send", send)
    monkeypatch.setattr(live, "_Server", lambda *_: server)


def test_a_whole_calibration_finds_the_server(server, monkeypatch, tmp_path):
    """All that `calibrate --url` does, against a server whose steps and API server are known."""
    table = StepTable(
        points=[(1.0, 12e-3), (16.0, 17e-3), (256.0, 38e-3), (2048.0, 150e-3)],
        per_sequence=1e-3,
        per_kv_token=1e-6,
        per_attention_pair=5e-8,
    )
    edges = {"a0": 3e-3, "s_in": 1e-3, "s_out": 0.0, "o0": 0.0, "o1": 0.0, "o_gap": 0.0}
    words = {"kv_blocks": 80, "block_size": 32, "max_num_seqs": 16, "max_num_batched_tokens": 2048}
    truth = resolve(
        **words, max_model_len=2048, engine="vllm-0.24-sync", own_blocks=True, step_time=StepTime(table=table, **edges)
    )
    pretended(server, monkeypatch, truth)
    monkeypatch.setattr(live.time, "monotonic", lambda: 0.0)  # no ladder is cut short
    limits = {"max_num_seqs": 16, "max_num_batched_tokens": 2048}
    found = squall.calibrate(url="http://127.0.0.1:9", out=tmp_path / "c.json", budget=120, **limits)
    assert found.engine == "vllm-0.24-sync"
    assert found.prefix_caching
    for n in (1, 4, 16):
        at = [np.interp(n, *np.array(it.points).T) + n * it.per_sequence for it in (found.step_time.table, table)]
        assert at[0] == pytest.approx(at[1], rel=0.03)
    assert found.step_time.a0 + found.step_time.s_in == pytest.approx(4e-3, abs=1e-3)
    assert found.slower == pytest.approx([1.0, 1.0], abs=0.02)
    for load in live.LOADS:
        errors, spread = found.errors[f"load {load:g}"], found.spread[f"load {load:g}"]
        assert abs(errors.steps) < 0.02
        assert abs(found.errors[f"load {load:g} at its speed"].mean["e2e"]) < 0.02
        assert abs(errors.mean["ttft"]) < 0.05
        assert abs(errors.mean["e2e"]) < 0.03
        assert spread.runs == 2
        assert spread.mean["e2e"] == pytest.approx(0.0, abs=1e-9)  # this server does the same every time


def test_a_drifting_machine_is_predicted_at_the_speed_of_each_round():
    """Steps known, and in four rounds 10 % faster to 20 % slower: whoever does not know that misses the queues."""
    table = StepTable(points=[(1.0, 12e-3), (512.0, 60e-3)], per_sequence=1e-3, per_kv_token=1e-6)
    words = {"kv_blocks": 80, "block_size": 32, "max_num_seqs": 16, "engine": "vllm-0.24-sync", "own_blocks": True}
    cluster = resolve(**words, step_time=StepTime(table=table, o0=0.0, o1=0.0, o_gap=0.0, a0=3e-3))
    drift = [0.9, 1.2, 1.0, 1.1]

    def sent(arrival, prompt, response, factor):
        columns = {"arrival": arrival, "request_tokens": prompt, "response_tokens": response}
        trace = Trace.of(columns, TraceMeta(source="calibration", format="generated"))
        run = run_trace(trace, slowed(cluster, factor))
        return live._Sending(run, live.requests_of(run, "here")[0], int(run.table["preemptions"].sum()))

    tests = live._tests(cluster, 15.0, 7)
    sendings = [[sent(*test, factor) for factor in drift] for test in tests]
    batch = (np.zeros(8), np.full(8, 16), np.full(8, 290))
    slower = [live._slower([sent(*batch, factor).run], cluster) for factor in drift]
    assert slower == pytest.approx(drift, rel=0.01)
    errors, spread = live._judged(sendings, cluster, slower)
    blind, _ = live._judged(sendings, cluster, [1.0] * 4)
    for load in live.LOADS:
        them = errors[f"load {load:g}"]
        assert them.preemptions[0] == pytest.approx(them.preemptions[1], rel=0.1, abs=2)
        assert abs(them.steps) < 0.01
        for part in (them.mean, them.p50, them.p99):
            assert all(abs(part[kind]) < 0.05 for kind in ("ttft", "e2e"))
        assert blind[f"load {load:g}"].steps == pytest.approx(1 / np.mean(drift) - 1, abs=0.03)
    assert blind["load 1.1"].mean["ttft"] < -0.1
    assert spread["load 1.1"].runs == 4
