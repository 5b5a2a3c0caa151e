"""Conversations and failures: what goes in comes out."""

import numpy as np
import pytest

from squall.workload.conversations import Conversations, Growth, Seating, fit_conversations
from squall.workload.failures import Failures, Outages, fit_failures
from squall.workload.lengths import Quantiles

GROWTH = Growth([1, 2, 4], [0.5, 0.3, 0.2], [-0.6, 0.4, 0.9], [0.8, 0.7, 0.6], 0.8)
PAUSE = Quantiles.of(np.random.default_rng(0).lognormal(4.5, 1.2, 20_000))


def survival(*chances: float) -> list[float]:
    return np.cumprod([1.0, *chances]).tolist()


def test_sessions_have_the_turns_and_pauses_of_the_model():
    model = Conversations(survival(0.6, 0.6, 0.5), PAUSE, GROWTH)
    arrivals = np.cumsum(np.random.default_rng(1).exponential(10.0, 40_000))
    session, turn, _ = Seating(model, np.random.default_rng(2)).seat(arrivals)
    assert session.size == arrivals.size
    turns = np.bincount(session)
    # 20,000 sessions: the standard error of the mean turns is 0.01.
    assert turns.mean() == pytest.approx(model.mean_turns, rel=0.02)
    assert [(turns >= k).mean() for k in (2, 3, 4)] == pytest.approx(model.survival[1:], abs=0.02)
    order = np.lexsort((turn, session))
    same = np.diff(session[order]) == 0
    assert np.all(np.diff(turn[order])[same] == 1)
    gaps = np.diff(arrivals[order])[same]
    assert np.all(gaps >= 0)
    # An arrival comes every 10 s, so a pause is met to about that; longer ones also vary by the pilots' own sampling.
    levels = np.array([0.25, 0.5, 0.75, 0.9])
    assert np.quantile(gaps, levels) == pytest.approx(PAUSE.at(levels), rel=0.15, abs=10)


def test_growth_orders_the_lengths_and_leaves_their_law():
    arrivals = np.cumsum(np.random.default_rng(3).exponential(5.0, 60_000))
    model = Conversations(survival(0.7, 0.7, 0.7, 0.6), PAUSE, GROWTH)
    _, turn, _ = Seating(model, np.random.default_rng(3)).seat(arrivals)
    group = np.searchsorted(GROWTH.turn, turn, side="right") - 1
    weight = (np.bincount(group) / group.size).tolist()
    growth = Growth(GROWTH.turn, weight, GROWTH.mean, GROWTH.sd, GROWTH.memory)
    again = Seating(Conversations(model.survival, PAUSE, growth), np.random.default_rng(3))
    _, turn, u = again.seat(arrivals)
    assert np.quantile(u, [0.01, 0.1, 0.5, 0.9, 0.99]) == pytest.approx([0.01, 0.1, 0.5, 0.9, 0.99], abs=0.01)
    assert u[turn == 1].mean() < u[turn == 2].mean() < u[turn == 5].mean()


def test_a_fit_finds_turns_growth_and_memory_again():
    rng = np.random.default_rng(4)
    model = Conversations(survival(0.7, 0.7, 0.7, 0.6), PAUSE, GROWTH)
    arrivals = np.cumsum(rng.exponential(5.0, 30_000))
    session, _, u = Seating(model, rng).seat(arrivals)
    request = np.exp(5 + 2 * u)
    found = fit_conversations(arrivals, session, request, np.ones(30_000, dtype=bool), rng)
    assert found is not None
    assert found.survival == pytest.approx(model.survival, abs=0.02)
    assert found.growth.memory == pytest.approx(GROWTH.memory, abs=0.05)
    assert found.growth.mean[0] < found.growth.mean[1] < found.growth.mean[-1]


def test_sessions_that_the_end_cuts_do_not_shorten_the_turns():
    rng = np.random.default_rng(5)
    start = np.sort(rng.uniform(0, 20_000, 3000))
    arrival, owner = [], []
    for number, begin in enumerate(start):
        times = begin + np.cumsum(np.append(0.0, rng.exponential(2000.0, rng.geometric(0.2) - 1)))
        arrival += times.tolist()
        owner += [number] * times.size
    arrival, owner = np.array(arrival), np.array(owner)
    seen = arrival < 20_000
    order = np.argsort(arrival[seen])
    found = fit_conversations(
        arrival[seen][order], owner[seen][order], rng.random(order.size), np.ones(order.size, bool), rng
    )
    naive = order.size / np.unique(owner[seen]).size
    assert found is not None
    # Truly P(at least 3 turns) = 0.64 and 5 turns on average.
    assert naive < 4.2
    assert found.survival[2] == pytest.approx(0.64, abs=0.05)


def test_no_second_turn_is_no_conversation():
    rng = np.random.default_rng(6)
    assert fit_conversations(np.arange(9.0), np.arange(9), np.ones(9), np.ones(9, bool), rng) is None


def test_outages_fill_their_share_of_the_time():
    arrivals = np.linspace(0, 1e6, 400_000)
    inside = Outages(100.0, 0.2, np.random.default_rng(7)).hold(arrivals)
    assert inside.mean() == pytest.approx(0.2, abs=0.02)
    lengths = np.diff(np.flatnonzero(np.diff(inside.astype(int))))
    assert min(lengths[::2].mean(), lengths[1::2].mean()) * 2.5 == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize(("severity", "outage"), [(0.8, 300.0), (0.3, 60.0)])
def test_a_fit_finds_the_outages_again(severity, outage):
    rng = np.random.default_rng(8)
    arrivals = np.cumsum(rng.exponential(2.0, 400_000))
    model = Failures(0.03, severity, outage, Quantiles([0, 1], [0, 0]))
    failed = model.draw(arrivals, rng)
    # The share varies as the time in outages does: about sqrt(2 / number of outages).
    outages = 800_000 * (0.03 / severity) / outage
    assert failed.mean() == pytest.approx(0.03, rel=4 * np.sqrt(2 / outages))
    found = fit_failures(arrivals, failed, np.zeros(int(failed.sum())))
    assert found.share == failed.mean()
    assert found.severity == pytest.approx(severity, rel=0.2)
    assert found.outage == pytest.approx(outage, rel=0.4)


def test_independent_failures_are_not_called_outages():
    rng = np.random.default_rng(9)
    arrivals = np.cumsum(rng.exponential(1.0, 50_000))
    failed = rng.random(50_000) < 0.02
    found = fit_failures(arrivals, failed, np.full(int(failed.sum()), 12.0))
    assert (found.severity, found.outage) == (found.share, 0.0)
    assert found.request is not None
    assert found.request.values == [12.0, 12.0]
