"""Calibration: it finds what made a run, says what it cannot know, and predicts a real server's later requests."""

import json

import msgspec
import numpy as np
import polars as pl
import pytest

import squall
from squall.calibrate import calibrate
from squall.errors import InputError
from squall.run.table import Run, RunMeta
from squall.simulate import simulate
from squall.simulate.calibrate import BUILT_IN, read_calibration
from squall.simulate.cluster import resolve
from squall.simulate.engine import run_requests, run_trace
from squall.simulate.records import TICKS
from squall.simulate.replica import gpu_seconds
from squall.simulate.seen import steps_seen
from squall.simulate.step_time import StepTime, step_cost
from squall.trace.table import Trace, TraceMeta

SERVER = {"model": "llama-3.1-8b", "gpu": "rtx4090", "kv_blocks": 2588, "engine": "vllm-0.11"}
ALONE = SERVER | {"prefix_caching": False}
REAL = SERVER | {"engine": "vllm-0.19", "max_num_seqs": 256, "max_num_batched_tokens": 2048, "max_model_len": 32768}
TRUTH = StepTime(e_bw=0.86, e_fl=0.7, e_kv=0.85, e_at=0.55, p=2.0, o0=1.2e-3, bw_ar=32e9)


@pytest.fixture(scope="module")
def trace():
    rng = np.random.default_rng(3)
    n = 200
    columns = {
        "arrival": np.cumsum(rng.exponential(0.2, n)),
        "request_tokens": rng.integers(50, 3000, n),
        "response_tokens": rng.integers(30, 150, n),
    }
    return Trace.of(columns, TraceMeta(source="made for a test", format="generated"))


@pytest.fixture(scope="module")
def run(trace):
    """What a server with the coefficients TRUTH would have done; of a request's tokens the first and last are known."""
    full = run_trace(trace, resolve(**SERVER, step_time=TRUTH))
    return Run(full.table.with_columns(chunks=pl.lit(None, pl.List(pl.Float64))), full.meta)


@pytest.fixture(scope="module")
def fitted(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "c.json"
    return calibrate(run=run, out=path, first=100, **ALONE), path


def test_it_finds_the_step_time_that_made_the_run(fitted):
    result, _ = fitted
    assert result.step_time.e_fl == pytest.approx(TRUTH.e_fl, rel=0.03)
    # Most steps of this run hold a prefill beside a few decodes: of these the sum is well known, not its parts.
    for n in (4, 8):
        took = []
        for step in (result.step_time, TRUTH):
            cost = step_cost(step, result.model, result.gpu)
            took.append(
                gpu_seconds(cost, n + 1500.0, n + 1.0, 1600.0 * n, 1500.0**2 / 2)
                + cost.host
                + cost.host_prompts
                + n * cost.host_per_sequence
            )
        assert took[0] == pytest.approx(took[1], rel=0.01)
    assert result.step_time.e_bw == pytest.approx(TRUTH.e_bw, rel=0.15)
    assert result.correlations["e_bw~o0"] > 0.3
    assert result.informed["e_fl"] > 0.9
    assert result.informed["e_kv"] < 0.5
    assert any("say little about" in line and "e_kv" in line for line in result.notes)
    for name, (low, high) in result.fitted.items():
        assert low <= getattr(result.step_time, name) <= high
    assert abs(result.errors["held_out"].mean["e2e"]) < 0.01
    assert result.errors["held_out"].mean_absolute["e2e"] < 0.02
    assert result.errors["fit"].requests == result.errors["held_out"].requests == 100


def test_the_times_of_all_tokens_tell_more(trace):
    full = run_trace(trace, resolve(**SERVER, step_time=TRUTH))
    result = calibrate(run=full, first=100, **ALONE)
    steps = steps_seen([full], 2048)
    off = [steps.seconds(resolve(**SERVER, step_time=step)) for step in (result.step_time, TRUTH)]
    assert np.median(np.abs(off[0] / off[1] - 1)) < 0.005
    assert np.quantile(np.abs(off[0] / off[1] - 1), 0.9) < 0.03
    assert abs(result.errors["held_out"].mean["e2e"]) < 0.01
    # Of the requests that are to test the fit, not even the token times are looked at.
    late = float(full.table.sort("sent")["first_token"][100:].min())
    chunks = pl.when(pl.col("first_token") < late).then("chunks")
    held = Run(full.table.with_columns(chunks=chunks.otherwise(pl.lit([0.0], pl.List(pl.Float64)))), full.meta)
    assert calibrate(run=held, first=100, **ALONE).step_time == result.step_time


@pytest.mark.parametrize("seen", [False, True])
def test_a_host_bound_server_is_recognised(trace, seen):
    """0.25 ms a sequence, five times what is usual at most: with many running, the host is all of a step."""
    words = {"model": "llama-3.2-1b", "gpu": "rtx4090", "engine": "vllm-0.11", "kv_blocks": 30000}
    slow = StepTime(o0=2e-3, o1=2.5e-4)
    crowd = trace.replace(trace.table.with_columns(arrival=pl.col("arrival") / 20))
    full = run_trace(crowd, resolve(**words, step_time=slow))
    run = full if seen else Run(full.table.with_columns(chunks=pl.lit(None, pl.List(pl.Float64))), full.meta)
    result = calibrate(run=run, first=100, prefix_caching=False, **words)
    assert result.step_time.o1 == pytest.approx(2.5e-4, rel=0.1)
    assert any("host-bound" in line for line in result.notes)
    assert abs(result.errors["held_out"].mean["e2e"]) < 0.03


def recorded_of(trace, cluster, *, of_engine, warm_up):
    """What is written down of `trace` on `cluster`: by a client, or by the engine whenever it takes requests over,
    which it does between two steps; the first request waits for `warm_up` seconds more, and all behind it."""
    table = trace.table
    came = table["arrival"].to_numpy().copy()
    came[0] += warm_up
    came[1:] = np.maximum(came[1:], came[0] + 1e-6)
    prompt, response = (table[name].to_numpy() for name in ("request_tokens", "response_tokens"))
    outcome = run_requests(came, prompt, response, cluster, steps=True)
    it = outcome.attempts[np.argsort(outcome.attempts["request"])]
    sent = table["arrival"].to_numpy().copy()
    if of_engine:
        for k, at in enumerate(np.rint(came * TICKS).astype(int)):
            inside = (outcome.steps["start"] < at) & (at < outcome.steps["start"] + outcome.steps["ticks"])
            ends = (outcome.steps["start"] + outcome.steps["ticks"])[inside]
            sent[k] = ends[0] / TICKS if ends.size else came[k]
        sent[0] = table["arrival"][0]
    columns = {"request": range(len(sent)), "attempt": [1] * len(sent), "status": ["ok"] * len(sent), "sent": sent}
    columns |= {"first_token": it["first"] / TICKS, "last_token": it["last"] / TICKS}
    columns |= {"request_tokens": prompt, "response_tokens": response, "preemptions": it["preemptions"]}
    return Run.of(pl.DataFrame(columns), RunMeta(kind="recorded"))


@pytest.mark.parametrize(("engine", "of_engine"), [("vllm-0.24", True), ("vllm-0.24-sync", False)])
def test_whose_clock_it_was_and_which_engine_is_found_out(trace, engine, of_engine):
    """Half loaded, where a TTFT is a few steps; with a first request that takes half a second too long."""
    words = {"model": "llama-3.1-8b", "gpu": "h100", "kv_blocks": 20000}
    step = msgspec.structs.replace(
        resolve(**words).step_time, e_bw=0.68, e_fl=0.7, t_row=9e-9, p=2.6, o0=3e-3, o1=1e-5, o_gap=5e-4, a0=0.0
    )
    busy = trace.replace(
        trace.table[:120].with_columns(arrival=pl.col("arrival") / 2, response_tokens=pl.col("response_tokens") * 4)
    )
    run = recorded_of(busy, resolve(**words, engine=engine, step_time=step), of_engine=of_engine, warm_up=0.5)
    result = calibrate(run=run, first=60, **words)
    assert result.engine == engine
    assert any("took a request over" in line for line in result.notes) == of_engine
    assert any(f"{engine} explains the run better" in line for line in result.notes)
    held_out = result.errors["held_out"]
    for part in (held_out.mean, held_out.p50):
        assert abs(part["ttft"]) < 0.05
        assert abs(part["e2e"]) < 0.02
    assert held_out.mean_absolute["e2e"] < 0.02


def test_resumed_requests_are_not_computed_in_full(trace):
    """A quarter of the cache: fitted without own blocks, the same run gives another step time."""
    words = REAL | {"kv_blocks": 700}
    crowd = trace.replace(
        trace.table[:120].with_columns(arrival=pl.col("arrival") / 4, response_tokens=pl.col("response_tokens") * 4)
    )
    cluster = resolve(**words, own_blocks=True, step_time=msgspec.structs.replace(TRUTH, o_gap=4e-4))
    run = recorded_of(crowd, cluster, of_engine=False, warm_up=0.0)
    assert run.table["preemptions"].sum() > 20
    result = calibrate(run=run, first=60, **words)
    held_out = result.errors["held_out"]
    assert result.prefix_caching
    assert held_out.mean_absolute["e2e"] < 0.02
    assert held_out.preemptions[0] == pytest.approx(held_out.preemptions[1], rel=0.15)


def test_it_is_used_and_named_by_a_simulation(fitted, trace, run):
    result, path = fitted
    again = squall.simulate(trace, calibration=path)
    assert again.meta.step_time == result.name
    assert "held-out error" in result.name
    assert again.meta.target["kv_blocks"] == 2588
    assert again.meta.target["kv_blocks_from"] == "the calibration"
    assert again.meta.target["engine"] == "vllm-0.11"
    assert not again.meta.target["choices"]
    resuming = msgspec.structs.replace(result, prefix_caching=True)
    assert simulate(trace, calibration=resuming).meta.target["choices"] == {"own_blocks": True}
    assert not simulate(trace, calibration=resuming, own_blocks=False).meta.target["choices"]
    assert again.meta.target["step_time_coefficients"] == msgspec.to_builtins(result.step_time)
    e2e = [(r.table["last_token"] - r.table["sent"]).mean() for r in (again, run)]
    assert e2e[0] == pytest.approx(e2e[1], rel=0.02)
    longer = trace.replace(trace.table.with_columns(request_tokens=pl.col("request_tokens") + 2000))
    assert any("outside the calibrated range" in line for line in simulate(longer, calibration=path).meta.notes)
    assert any("vllm-0.19" in line for line in simulate(trace, calibration=result, engine="vllm-0.19").meta.notes)
    with pytest.raises(InputError, match="--gpu h100: the calibration is for"):
        simulate(trace, calibration=result, gpu="h100")


def test_the_times_of_later_requests_are_not_used_and_the_same_data_give_the_same_fit(fitted, run):
    later = (
        pl.when(pl.col("request") >= 100).then(pl.col("last_token") + 50).otherwise("last_token").alias("last_token")
    )
    again = calibrate(run=Run(run.table.with_columns(later), run.meta), first=100, **ALONE)
    assert again.step_time == fitted[0].step_time
    assert again.fitted == fitted[0].fitted
    assert again.errors["held_out"] != fitted[0].errors["held_out"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"first": 5}, "--first 5"),
        ({"first": 500}, "--first 500"),
        ({"kv_blocks": 100}, "do not fit"),
        ({"gpu": "none"}, "--gpu none"),
        ({"budget": "3m"}, "--budget has no effect with --run"),
        ({"out": "/proc/c.json"}, "nothing can be written in /proc"),
    ],
)
def test_impossible_calls(run, words, says):
    with pytest.raises(InputError, match=says):
        calibrate(run=run, **(ALONE | words))


def test_impossible_runs(run):
    meta = RunMeta(kind="recorded")
    with pytest.raises(InputError, match="answered"):
        calibrate(run=Run(run.table.with_columns(status=pl.lit("timeout")), meta), **ALONE)
    with pytest.raises(InputError, match="one clock"):
        calibrate(run=Run(run.table.with_columns(first_token=pl.col("sent") - 1), meta), **ALONE)


@pytest.mark.parametrize("text", ["", "{}", '{"source": 1}'])
def test_bad_calibration_files(tmp_path, text):
    path = tmp_path / "c.json"
    with pytest.raises(InputError, match="no such file"):
        read_calibration(path)
    path.write_text(text)
    with pytest.raises(InputError, match="squall calibrate"):
        read_calibration(path)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("step_time", "e_bw"), 0.0, "step_time.e_bw is 0"),
        (("step_time", "e_fl"), -1.0, "step_time.e_fl is -1"),
        (("step_time", "o0"), 1e9, "step_time.o0"),
        (("valid",), {}, "valid has no request_tokens"),
        (("errors",), {}, "neither held_out nor fit"),
        (("errors", "held_out", "mean"), {}, "errors.held_out.mean has no ttft"),
        (("model", "layers"), 0, "layers is 0"),
    ],
)
def test_calibrations_that_no_fit_has_written(tmp_path, path, value, says):
    record = json.loads((BUILT_IN / "rtx4090-llama-3.1-8b-vllm-0.19.json").read_bytes())
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (tmp_path / "c.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=f"not a file that `squall calibrate` made: .*{says}"):
        read_calibration(tmp_path / "c.json")


@pytest.fixture(scope="module")
def recorded(runs, tmp_path_factory):
    """The real run as a minimal table, as a user would bring it."""
    lines = (runs / "vllm-0.19-rtx4090-llama-3.1-8b" / "requests.jsonl").read_text().splitlines()
    rows = pl.DataFrame([json.loads(line) for line in lines])
    path = tmp_path_factory.mktemp("recorded") / "run.csv"
    names = ("sent", "first_token", "last_token", "request_tokens", "response_tokens")
    theirs = ("queued_ts", "first_token_ts", "last_token_ts", "input_toks", "output_toks")
    rows.select(pl.col(old).alias(new) for old, new in zip(theirs, names, strict=True)).write_csv(path)
    return path


def test_a_real_server_is_met(recorded):
    """vLLM 0.19.0, Llama-3.1-8B, RTX 4090, 300 ShareGPT requests (casys-kaist/LLMServingSim@5daddb2): fit on 100."""
    result = squall.calibrate(run=recorded, first=100, **REAL)
    for part in ("held_out", "all"):
        errors = result.errors[part]
        assert abs(errors.mean["ttft"]) < 0.03
        assert abs(errors.p50["ttft"]) < 0.03
        assert abs(errors.mean["e2e"]) < 0.03
        assert errors.mean_absolute["e2e"] < 0.025
    assert abs(result.errors["held_out"].p50["e2e"]) < 0.03


def test_the_block_count_matters_most(recorded):
    """3,400 blocks instead of the server's 2,588: TTFT a fifth too short, with the step time unchanged."""
    run = squall.read_run(recorded)
    table = run.table.sort("sent")
    trace = Trace.of(
        {
            "arrival": table["sent"] - table["sent"][0],
            "request_tokens": table["request_tokens"],
            "response_tokens": table["response_tokens"],
        },
        TraceMeta(source="recorded", format="test"),
    )
    ttft = {}
    for blocks in (2588, 3400):
        cluster = resolve(**(REAL | {"kv_blocks": blocks}), step_time=StepTime(e_bw=0.87, e_fl=0.94, o_gap=1.2e-3))
        sim = run_trace(trace, cluster).table
        ttft[blocks] = (sim["first_token"] - sim["sent"]).mean()
    assert ttft[3400] / ttft[2588] == pytest.approx(0.79, abs=0.04)
