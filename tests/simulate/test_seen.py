"""The steps that clients see are the steps that the engine made."""

import msgspec
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squall.run.table import Run
from squall.simulate.calibrate import Recording, fit_coefficients, requests_of, slowed, table_names
from squall.simulate.cluster import resolve
from squall.simulate.engine import run_requests, run_trace
from squall.simulate.records import TICKS
from squall.simulate.seen import MOST_ABSENT, Steps, steps_seen
from squall.simulate.step_time import StepTable, StepTime
from squall.trace.table import Trace, TraceMeta

BUDGET = 512
TRUTH = StepTable(
    points=[(1.0, 12e-3), (16.0, 16e-3), (256.0, 36e-3)], per_sequence=1e-3, per_kv_token=4e-7, per_attention_pair=5e-8
)


def server(engine="vllm-0.24-sync", blocks=400, table=TRUTH):
    step = StepTime(table=table, o0=0.0, o1=0.0, o_gap=0.0)
    words = {"kv_blocks": blocks, "block_size": 16, "max_num_seqs": 12, "max_num_batched_tokens": BUDGET}
    return resolve(**words, engine=engine, step_time=step)


def load(seed, n=60, rate=2.0):
    rng = np.random.default_rng(seed)
    columns = {
        "arrival": np.cumsum(rng.exponential(1 / rate, n)),
        "request_tokens": rng.integers(4, 300, n),
        "response_tokens": rng.integers(1, 80, n),
    }
    return Trace.of(columns, TraceMeta(source="made for a test", format="generated"))


def made(trace, cluster):
    """The steps of the engine: (n, 3) seconds, tokens and sequences."""
    table = trace.table
    columns = (table["arrival"].to_numpy(), table["request_tokens"].to_numpy(), table["response_tokens"].to_numpy())
    steps = run_requests(columns[0] - columns[0][0], *columns[1:], cluster, steps=True).steps
    return np.column_stack([steps["ticks"] / TICKS, steps["tokens"], steps["sequences"]])


def unknown(steps, real):
    """How many of the steps that were seen the engine never made."""
    mine = np.column_stack([steps.took, steps.tokens, steps.sequences])
    nearest = [np.abs((real - row) / np.array([1e-4, 0.1, 0.1])).max(axis=1).min() for row in mine]
    return int((np.array(nearest) > 1).sum())


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), rate=st.sampled_from([0.5, 2.0, 6.0]), blocks=st.sampled_from([60, 400]))
def test_what_is_seen_was_made(seed, rate, blocks):
    trace, cluster = load(seed, rate=rate), server(blocks=blocks)
    steps, real = steps_seen([run_trace(trace, cluster)], BUDGET), made(trace, cluster)
    assert len(steps.took) > 0.4 * len(real)
    # A chunk of a prompt, which nobody sees, can hide in a step once in a while.
    assert unknown(steps, real) <= 0.02 * len(real)
    assert (np.abs(steps.seconds(cluster) / steps.took - 1) > 0.01).mean() <= 0.02


def test_tokens_without_text_and_jitter_do_not_mislead():
    trace, cluster = load(1, n=120), server()
    run, real, rng = run_trace(trace, cluster), made(trace, cluster), np.random.default_rng(2)
    chunks = []
    for offsets in run.table["chunks"].to_list():
        kept = [0.0, *(at for at in offsets[1:] if rng.random() > 0.03)]
        chunks.append(np.sort(np.array(kept) + rng.uniform(0, 3e-4, len(kept)) * (np.arange(len(kept)) > 0)).tolist())
    broken = Run(run.table.with_columns(chunks=pl.Series(chunks, dtype=pl.List(pl.Float64))), run.meta)
    steps = steps_seen([broken], BUDGET)
    assert len(steps.took) > 0.5 * len(real)
    off = np.abs(steps.seconds(cluster) / steps.took - 1) > 0.1
    assert off.mean() < 0.03


def test_nothing_is_seen_where_the_times_of_tokens_are_missing():
    run = run_trace(load(1), server())
    without = Run(run.table.with_columns(chunks=pl.lit(None, pl.List(pl.Float64))), run.meta)
    assert len(steps_seen([without], BUDGET).took) == 0
    early = steps_seen([run], BUDGET, before=float(run.table["first_token"][20]))
    assert 0 < len(early.took) < len(steps_seen([run], BUDGET).took)
    assert len(steps_seen([run, run], BUDGET).took) == 2 * len(steps_seen([run], BUDGET).took)
    assert MOST_ABSENT < 10


def test_a_table_is_found_from_steps_that_vary():
    """Steps with 5 % of noise each, and a first guess that is 20 % off: the table is met within 2 %."""
    trace, cluster = load(5, n=300), server()
    run = run_trace(trace, cluster)
    steps = steps_seen([run], BUDGET)
    rng = np.random.default_rng(0)
    noisy = steps._replace(took=steps.took * rng.lognormal(0, 0.05, len(steps.took)))
    guess = StepTable(
        points=[(at, 1.2 * seconds) for at, seconds in TRUTH.points],
        per_sequence=0.7e-3,
        per_kv_token=1e-6,
        per_attention_pair=5e-8,
    )
    rough = server(table=guess)
    # Latencies of a few requests alone on the server hold the rest.
    alone = run_trace(load(6, n=20, rate=0.1), cluster)
    recording = Recording(requests_of(alone, "alone")[0], 20)
    fit = fit_coefficients(rough, [recording], table_names(rough.step_time), 1, noisy)
    assert np.median(np.abs(steps.seconds(fit.cluster) / steps.took - 1)) < 0.01
    for n in (1, 4, 12):
        some = steps._replace(**{name: getattr(steps, name)[:1] for name in steps._fields})
        some = some._replace(tokens=np.array([n]), sequences=np.array([n]), kv_tokens=np.array([150 * n]))
        some = some._replace(attention_pairs=np.zeros(1))
        assert some.seconds(fit.cluster) == pytest.approx(some.seconds(cluster), rel=0.02)
    assert msgspec.structs.replace(fit.cluster, step_time=cluster.step_time) == cluster


@pytest.mark.parametrize("table", [None, TRUTH])
def test_a_slower_machine_takes_so_much_longer_for_every_step(table):
    step = StepTime(table=table, o0=1e-3, o1=1e-5, o_gap=1e-4)
    cluster = resolve(kv_blocks=400, model="llama-3.1-8b", gpu="h100", tp=2, engine="vllm-0.24", step_time=step)
    counts = (np.array([1.0, 40, 300, 900]), np.array([1.0, 40, 3, 9]), np.full(4, 2e3), np.array([0.0, 0, 4e4, 4e5]))
    steps = Steps(np.ones(4), *counts, np.full(4, np.nan))
    assert steps.seconds(slowed(cluster, 1.25)) == pytest.approx(1.25 * steps.seconds(cluster), rel=1e-12)
