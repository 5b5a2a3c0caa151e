"""The schedule and the pacer: absolute times, split without loss, released in order and never early."""

import asyncio
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from squall.errors import InputError
from squall.replay.pacer import Alarm, Pacer
from squall.replay.schedule import Schedule, rows_of, schedule_of
from squall.trace.table import Trace, TraceMeta

META = TraceMeta(source="test", format="generated")


def _trace(arrival, request=10, response=5) -> Trace:
    n = len(arrival)
    return Trace.of(
        {"arrival": arrival, "request_tokens": np.full(n, request), "response_tokens": np.full(n, response)}, META
    )


def test_rows_start_at_the_first_arrival_and_stop_before_the_duration():
    rows = rows_of(_trace([30.0, 31.5, 40.0]), duration=10.0)
    assert rows["scheduled"].to_list() == [0.0, 1.5]
    assert rows["request"].to_list() == [0, 1]


def test_a_recorded_failure_asks_for_one_token():
    rows = rows_of(_trace([0.0], response=0))
    assert rows["asked_response_tokens"].to_list() == [0]
    assert rows["failed"].to_list() == [True]
    assert schedule_of(rows).response_tokens.tolist() == [1]


@pytest.mark.parametrize("arrival", [[0.0, float("nan")], [0.0, float("inf")]])
def test_times_that_are_none(arrival):
    with pytest.raises(InputError, match="arrival"):
        rows_of(_trace(arrival))


def test_negative_lengths():
    with pytest.raises(InputError, match="request_tokens"):
        rows_of(_trace([0.0], request=-5))


@given(st.integers(1, 200), st.integers(1, 9))
def test_parts_are_a_partition(n, workers):
    schedule = schedule_of(rows_of(_trace(np.arange(n) / 7.0)))
    parts = [schedule.part(worker, workers) for worker in range(workers)]
    assert sorted(np.concatenate([part.request for part in parts])) == list(range(n))
    assert all(np.all(np.diff(part.at) >= 0) for part in parts)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=60), st.lists(st.integers(0, 2 * 10**6), max_size=30))
def test_the_pacer_gives_out_every_row_once_in_order_and_never_early(at, moments):
    times = np.sort(np.array(at, dtype=np.int64))
    pacer = Pacer(times, 500)
    given_out = []
    for now in [*sorted(moments), 3 * 10**6]:
        rows = pacer.due(now)
        assert all(pacer.when(row) <= now for row in rows)
        given_out += rows
        deadline = pacer.deadline()
        assert deadline is None or deadline > now  # whoever is due is released, however late
    assert given_out == list(range(len(at)))


def test_half_an_hour_does_not_drift():
    """Wake-ups that are always late, and stalls, in 30 min at 200/s: what is late is late by its own wake-up alone."""
    random = np.random.default_rng(3)
    at = np.cumsum(random.exponential(5e6, 360_000)).astype(np.int64)
    pacer, now, late, overslept = Pacer(at, 0), 0, [], []
    while (deadline := pacer.deadline()) is not None:
        asleep = int(random.exponential(1e6) if random.random() < 0.999 else 5e7)
        now = max(now, deadline) + asleep
        for row in pacer.due(now):
            late.append(now - pacer.when(row))
            overslept.append(asleep)
    assert len(late) == len(at)
    assert np.all(np.array(late) <= np.array(overslept))
    tenths = [np.mean(part) for part in np.array_split(late, 10)]
    assert max(tenths) < 1.5 * min(tenths)  # the last three minutes are no later than the first
    assert abs((at[-1] + late[-1]) / at[-1] - 1) < 1e-3  # of the rate


@pytest.mark.parametrize("timer", ["timerfd", "loop"])
def test_the_alarm_is_never_early_and_a_miss_is_not_carried_on(timer):
    late = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        over = loop.create_future()
        start = time.monotonic_ns() + 10_000_000
        pacer = Pacer(np.arange(60, dtype=np.int64) * 3_000_000, start)

        def ring() -> None:
            for row in pacer.due(time.monotonic_ns()):
                late.append(time.monotonic_ns() - pacer.when(row))
                if row == 20:
                    time.sleep(0.03)  # a stall of the client: ten rows become due meanwhile
            deadline = pacer.deadline()
            if deadline is None:
                over.set_result(None)
            else:
                alarm.set(deadline)

        alarm = Alarm(loop, ring)
        if timer == "loop":
            alarm.close()
        ring()
        await asyncio.wait_for(over, 10)
        alarm.close()

    asyncio.run(main())
    assert len(late) == 60
    assert min(late) >= 0
    assert late[21] > 20_000_000  # the stall shows …
    assert np.median(late[35:]) < 3_000_000  # … and is not carried on


@given(st.lists(st.tuples(st.lists(st.integers(0, 12), max_size=5), st.integers(1, 90)), min_size=1, max_size=12))
def test_what_prompts_share_is_what_a_cache_without_limit_would_know(rows):
    tokens = np.array([length for _, length in rows], dtype=np.int32)
    numbers = np.arange(len(rows), dtype=np.int32)
    blocks = np.array([block for hashes, _ in rows for block in hashes], dtype=np.int64)
    ends = np.cumsum([len(hashes) for hashes, _ in rows])
    schedule = Schedule(numbers, numbers.astype(np.int64), tokens, tokens, blocks=blocks, block_ends=ends)
    known: set[int] = set()
    hit = 0
    for hashes, length in rows:
        hit += sum(min(16, max(0, length - 16 * place)) for place, block in enumerate(hashes) if block in known)
        known.update(hashes)
    assert schedule.shared_share(16) == pytest.approx(hit / tokens.sum())
