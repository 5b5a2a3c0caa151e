"""Whether a server kept up: false alarms and misses over many queues, and the plain cases."""

from heapq import heappushpop

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from squall.run.backlog import backlog


def queue(seed: int, load: float, count: int, shape: float, servers: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Arrivals and ends of a first-come-first-served queue: gamma gaps, lognormal work, `load` of its capacity."""
    random = np.random.default_rng(seed)
    arrival = np.cumsum(random.gamma(shape, 1 / (shape * load * servers), count))
    work = random.lognormal(-0.5, 1.0, count)  # mean 1
    free = [0.0] * servers
    ends = []
    for at, needed in zip(arrival.tolist(), work.tolist(), strict=True):
        begin = max(at, free[0])
        heappushpop(free, begin + needed)
        ends.append(begin + needed)
    return arrival, np.array(ends)


@pytest.mark.parametrize(("shape", "load"), [(1.0, 0.5), (1.0, 0.8), (0.3, 0.5), (0.3, 0.7)])
def test_a_server_that_keeps_up_is_seldom_blamed(shape, load):
    alarms = sum(backlog(*queue(seed, load, 600, shape)).grows for seed in range(200))
    assert alarms <= 2  # of 200: below 1 %


@pytest.mark.parametrize("shape", [1.0, 0.3])
def test_a_server_that_falls_behind_is_found(shape):
    found = sum(backlog(*queue(seed, 1.4, 1500, shape)).grows for seed in range(40))
    assert found >= 38


def test_a_rising_rate_alone_is_no_overload():
    random = np.random.default_rng(1)
    arrival = np.sort(np.sqrt(random.random(2000)) * 100)  # the rate grows in proportion to time
    found = backlog(arrival, arrival + random.lognormal(0, 0.3, 2000))
    assert found.last > 3 * found.first
    assert not found.grows


def test_requests_that_never_end_are_a_backlog():
    arrival = np.arange(100.0)
    found = backlog(arrival, np.where(arrival < 50, arrival + 0.5, np.nan))
    assert found.grows
    assert found.peak == 50


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 50)), min_size=40, max_size=80))
def test_the_levels_are_those_of_a_count(requests):
    arrival, took = np.array(requests).T
    found = backlog(arrival, arrival + took)
    if found is None:
        assert np.ptp(arrival) == 0
        return
    moments = np.unique(arrival)
    counts = [((arrival <= at) & (arrival + took >= at)).sum() for at in moments]
    assert found.peak == max(counts)
    assert 0 <= found.first <= found.peak
    assert 0 <= found.last <= found.peak


def test_too_few_say_nothing():
    assert backlog(np.arange(39.0), np.arange(39.0)) is None
    assert backlog(np.zeros(50), np.ones(50)) is None
