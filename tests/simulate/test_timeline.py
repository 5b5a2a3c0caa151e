"""What is told about the inside of a simulation must add up to what came out of it."""

import json

import numpy as np
import polars as pl
import pytest

import squall
from squall.errors import InputError
from squall.trace.table import Trace, TraceMeta


@pytest.fixture(scope="module")
def crowded():
    """Sixty requests for a cache that holds about eight."""
    rng = np.random.default_rng(5)
    columns = {
        "arrival": np.sort(rng.uniform(0, 10, 60)),
        "request_tokens": rng.integers(100, 900, 60),
        "response_tokens": rng.integers(50, 400, 60),
    }
    return Trace.of(columns, TraceMeta(source="made for a test", format="generated"))


@pytest.fixture(scope="module")
def told(crowded, tmp_path_factory):
    path = tmp_path_factory.mktemp("timeline") / "t.json"
    run = squall.simulate(crowded, gpu="a100", kv_blocks=400, timeline=path, explain=60)
    return run, json.loads(path.read_text())["traceEvents"]


def test_observing_changes_nothing(told, crowded):
    assert told[0].table.equals(squall.simulate(crowded, gpu="a100", kv_blocks=400).table)


def test_the_parts_of_a_request_add_up(told):
    run, _ = told
    slowest = run.meta.target["slowest"]
    assert len(slowest) == 60
    took = [it["e2e"] for it in slowest]
    assert took == sorted(took, reverse=True)
    a2 = run.meta.target["step_time_coefficients"]["a2"]
    rows = {row["request"]: row for row in run.table.iter_rows(named=True)}
    for it in slowest:
        row = rows[it["request"]]
        assert it["queued"] + it["prefill"] + it["decode"] == pytest.approx(it["e2e"], abs=1e-9)
        assert sum(it["queued_for"].values()) == pytest.approx(it["queued"], abs=1e-9)
        assert it["ttft"] == pytest.approx(row["first_token"] - row["sent"] - a2, abs=1e-9)
        assert it["e2e"] == pytest.approx(row["last_token"] - row["sent"] - a2, abs=1e-9)
        assert len(it["preempted_at"]) == row["preemptions"]
        assert (it["requeued"] > 0) == (row["preemptions"] > 0)
        assert 0 <= it["slow_steps"] <= 1
    assert any("free KV blocks" in it["reason"] for it in slowest)
    assert sum(len(it["preempted_at"]) for it in slowest) > 0


def test_reasons_follow_the_limits(crowded):
    run = squall.simulate(crowded, gpu="a100", max_num_seqs=2, kv_blocks=4000, explain=3)
    assert all("place in the batch" in it["reason"] for it in run.meta.target["slowest"])
    alone = squall.simulate(crowded, gpu="h100", head=1, explain=1)
    assert alone.meta.target["slowest"][0]["reason"].startswith("long: ")


def test_the_timeline_is_what_happened(told):
    run, events = told
    steps = [event for event in events if event.get("cat") == "step"]
    assert len(steps) == run.meta.target["steps"]
    assert sum(event["args"]["tokens"] for event in steps) == run.meta.target["computed_tokens"]
    ends = np.array([event["ts"] + event["dur"] for event in steps])
    starts = np.array([event["ts"] for event in steps])
    assert (starts[1:] >= ends[:-1] - 1e-3).all()  # one step at a time
    requests = [event for event in events if event.get("name", "").startswith("request ")]
    assert len(requests) == 60
    assert sum(event["name"] == "preempted" for event in events) == run.table["preemptions"].sum()
    lanes = pl.DataFrame({"lane": [e["tid"] for e in requests], "ts": [e["ts"] for e in requests]}).with_columns(
        end=pl.Series([e["ts"] + e["dur"] for e in requests])
    )
    for _, lane in lanes.sort("ts").group_by("lane"):
        assert (lane["ts"].to_numpy()[1:] >= lane["end"].to_numpy()[:-1] - 1e-3).all()  # lanes do not overlap
    phases = [
        event
        for event in events
        if event.get("cat") == "request" and not event["name"].startswith("request ") and event["ph"] == "X"
    ]
    assert sum(event["dur"] for event in phases) == pytest.approx(sum(event["dur"] for event in requests), rel=1e-9)
    used = [event["args"]["used"] for event in events if event.get("name") == "KV blocks"]
    assert 0 <= min(used) <= max(used) <= 399


def test_a_viewer_can_read_it(told):
    """In the order of time, every thread with a name, and what lies within something lies within it wholly."""
    _, events = told
    times = [event["ts"] for event in events if "ts" in event]
    assert times == sorted(times)
    named = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    assert {(event["pid"], event["tid"]) for event in events if event["ph"] in "Xi"} <= named
    open_until: dict[tuple[int, int], list[float]] = {}
    for event in (event for event in events if event["ph"] == "X"):
        stack = open_until.setdefault((event["pid"], event["tid"]), [])
        while stack and stack[-1] <= event["ts"] + 1e-3:
            stack.pop()
        end = event["ts"] + event["dur"]
        assert not stack or end <= stack[-1] + 1e-3
        stack.append(end)


def test_a_timeline_that_is_cut_says_so(crowded, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("squall.simulate.timeline.MOST_STEPS", 10)
    monkeypatch.setattr("squall.progress.notes.shown", True)
    path = tmp_path / "t.json"
    squall.simulate(crowded, gpu="a100", timeline=path)
    assert f"{path}: it has the first 10 of" in capsys.readouterr().err
    assert sum(event.get("cat") == "step" for event in json.loads(path.read_text())["traceEvents"]) == 10


def test_a_queue_waits_for_what_its_first_lacks():
    """Short prompts behind long ones that no block is free for: blocks are what they wait for, not the steps."""
    columns = {"arrival": np.zeros(12), "request_tokens": [3000] * 11 + [10], "response_tokens": [300] * 12}
    trace = Trace.of(columns, TraceMeta(source="made for a test", format="generated"))
    run = squall.simulate(trace, gpu="a100", kv_blocks=260, explain=12)
    last = next(it for it in run.meta.target["slowest"] if it["request"] == 11)
    assert max(last["queued_for"], key=last["queued_for"].get) == "kv cache full"
    assert last["reason"].startswith("queued for free KV blocks, behind 1")


@pytest.mark.parametrize(("words", "says"), [({"timeline": "x.txt"}, "x.txt"), ({"explain": -1}, "--explain -1")])
def test_impossible_wishes(crowded, words, says):
    with pytest.raises(InputError, match=says):
        squall.simulate(crowded, **words)
