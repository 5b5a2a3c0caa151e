"""Parts on one clock, and ties inside a tick."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import squall
from squall.errors import InputError
from squall.trace import Trace, TraceMeta, open_trace, read_trace
from squall.trace.ties import despread, even

HEADER = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type"


def _part(tmp_path, name, times, session="s", responses=None):
    rows = [
        f"{time},{session},1,GPT-4,{10 + n},{(responses or [5] * len(times))[n]},0,Conversation log"
        for n, time in enumerate(times)
    ]
    path = tmp_path / name
    path.write_text("\n".join([HEADER, *rows]) + "\n")
    return str(path)


def test_parts_keep_the_times_of_their_common_clock(tmp_path):
    one, two = _part(tmp_path, "1.csv", [5, 90]), _part(tmp_path, "2.csv", [1000, 1000, 1001])
    three = _part(tmp_path, "3.csv", [500_000])
    trace = open_trace(one, join=(three, two))
    assert trace.table["arrival"].to_list() == [0, 85, 995, 995, 996, 499_995]
    assert trace.table["session"].to_list() == [0, 0, 1, 1, 1, 2]
    assert trace.table["turn"].to_list() == [1, 2, 1, 2, 3, 1]
    assert (trace.meta.clock, trace.meta.tick, trace.meta.rows) == (5, 1, 6)
    assert trace.meta.source == f"{one} + {two} + {three}"
    assert [step.split(" (")[0] for step in trace.meta.steps] == [f"--join {two}", f"--join {three}"]
    assert any("5.78 d without a request" in note or "without a request" in note for note in trace.meta.notes)
    written = squall.convert(one, tmp_path / "o.csv", join=(two,), head=3)
    assert len(written) == 3
    assert (tmp_path / "o.csv").read_text().splitlines()[3].startswith("1000,")


def test_joining_and_then_cutting_is_cutting_and_then_joining(tmp_path):
    one, two = _part(tmp_path, "1.csv", list(range(0, 50, 5))), _part(tmp_path, "2.csv", list(range(50, 90, 7)))
    whole = _part(tmp_path, "w.csv", [*range(0, 50, 5), *range(50, 90, 7)])
    a, b = open_trace(one, join=(two,), between="20:70"), open_trace(whole, between="20:70")
    assert a.table["arrival"].equals(b.table["arrival"])


def test_raw_and_cleaned_of_one_part_are_refused(tmp_path):
    raw = _part(tmp_path, "raw.csv", [5, 6, 7], responses=[5, 0, 5])
    clean = _part(tmp_path, "clean.csv", [5, 7])
    for first, second in ((raw, clean), (clean, raw)):
        with pytest.raises(InputError, match="with and without its failures"):
            open_trace(first, join=(second,))


def test_overlaps_and_copies_are_refused(tmp_path):
    one, two = _part(tmp_path, "1.csv", [5, 90]), _part(tmp_path, "2.csv", [60, 100])
    with pytest.raises(InputError, match=r"1\.csv and .*2\.csv overlap by 30 s"):
        open_trace(one, join=(two,))
    with pytest.raises(InputError, match="the same file"):
        open_trace(one, join=(one,))


def test_parts_without_a_common_clock_are_refused(tmp_path):
    one = _part(tmp_path, "1.csv", [5, 90])
    azure = tmp_path / "a.csv"
    azure.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n")
    with pytest.raises(InputError, match=r"\(azure, burstgpt\) have no common clock"):
        open_trace(one, join=(str(azure),))
    later = tmp_path / "b.csv"
    later.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:48,1,2\n")
    trace = open_trace(later, join=(str(azure),))
    assert trace.table["arrival"].to_list() == pytest.approx([0, 1.31941], abs=1e-9)
    scaled = open_trace(one, speed=2)
    with pytest.raises(InputError, match="join first, then scale"):
        open_trace(scaled, join=(one,))
    with pytest.raises(InputError, match="a tuple of files"):
        open_trace(one, join=one)


def test_a_part_without_failures_among_others_is_told(tmp_path):
    one, two = _part(tmp_path, "1.csv", [5, 90], responses=[0, 1]), _part(tmp_path, "2.csv", [100, 101])
    assert "do not read failures" in open_trace(one, join=(two,)).meta.notes[-1]


# ---------------------------------------------------------------------------------------------------------------- ties


def _trace(times, tick):
    columns = {"arrival": times, "request_tokens": range(1, len(times) + 1), "response_tokens": [1] * len(times)}
    return Trace.of(columns, TraceMeta(source="x", format="burstgpt", tick=tick, clock=100.0))


def test_even_puts_requests_at_the_middles_of_equal_parts():
    assert even(np.array([0.0, 0, 1, 5, 5, 5, 5]), 1.0).tolist() == [0.25, 0.75, 1.5, 5.125, 5.375, 5.625, 5.875]
    assert even(np.array([0.0, 0, 2]), 3.0).tolist() == [0.5, 1.5, 3.5]  # up to the next recorded time


@settings(max_examples=60, deadline=None)
@given(ticks=st.lists(st.integers(0, 30), min_size=1, max_size=60), tick=st.sampled_from([1.0, 3.0]))
def test_both_rules_keep_the_order_and_the_tick(ticks, tick):
    times = np.sort(np.array(ticks)) * tick
    for result in (even(times, tick), despread(times, tick, 1)):
        assert (np.diff(result) >= 0).all()
        assert (np.floor(result / tick) == np.floor(times / tick)).all()


def test_ties_are_a_recorded_and_seeded_option():
    trace = _trace([0, 0, 0, 1, 4, 4], 1.0)
    same = open_trace(trace)
    assert same.table.equals(trace.table)
    spread = open_trace(trace, ties="spread", seed=3)
    assert spread.meta.tick is None
    assert spread.meta.steps == ["--ties spread --seed 3 (ticks of 1 s)"]
    assert spread.table["request_tokens"].to_list() == [1, 2, 3, 4, 5, 6]
    assert spread.table["arrival"].n_unique() == 6
    assert spread.table.equals(open_trace(trace, ties="spread", seed=3).table)
    assert not spread.table.equals(open_trace(trace, ties="spread", seed=4).table)
    # The clock still says when the first request came, and a filter changes no request's time.
    cut = open_trace(trace, ties="spread", seed=3, between="1:5")
    clock = lambda t: (t.table["arrival"] + t.meta.clock).to_list()  # noqa: E731
    assert clock(cut) == pytest.approx(clock(spread)[3:])


def test_a_fine_clock_has_nothing_to_spread():
    trace = _trace([0.0, 0.5, 0.5], None)
    kept = open_trace(trace, ties="even")
    assert kept.table.equals(trace.table)
    assert kept.meta.steps == ["--ties even (no ticks)"]
    with pytest.raises(InputError, match="the rules are keep, spread and even"):
        open_trace(trace, ties="random")


def test_mooncake_ticks_are_broken(traces):
    path = traces / "mooncake" / "conversation_trace.jsonl"
    recorded, spread = read_trace(path), open_trace(path, ties="spread")
    cv = lambda t: t.table["arrival"].diff().std() / t.table["arrival"].diff().mean()  # noqa: E731
    assert cv(recorded) == pytest.approx(3.03, abs=0.01)
    assert cv(spread) < 1.2
