"""Conversations of a small table counted by hand."""

import polars as pl
import pytest

from squall.characterize.conversations import Conversations, session_statistics
from squall.trace import Trace, TraceMeta


def trace(**columns: list) -> pl.DataFrame:  # type: ignore[type-arg]
    return Trace.of(columns, TraceMeta(source="test", format="generated")).table


def test_two_conversations_counted_by_hand() -> None:
    table = trace(
        arrival=[0.0, 5.0, 10.0, 30.0, 1000.0, 1010.0],
        request_tokens=[100, 50, 210, 40, 400, 9],
        response_tokens=[100, 20, 50, 10, 30, 9],
        session=[7, 8, 7, 8, 7, None],
        elapsed=[4.0, 30.0, 2.0, 1.0, 1.0, None],
    )
    found = session_statistics(table)
    assert (found.sessions, found.requests, found.single_share) == (2, 5, 0.0)
    assert (found.turns.mean, found.turns.max) == (2.5, 3)
    # Session 7: gaps 10 and 990, growth 110 and 190. Session 8: gap 25, growth -10.
    assert (found.gaps.n, found.gaps.min, found.gaps.p50, found.gaps.max) == (3, 10.0, 25.0, 990.0)
    assert (found.think.min, found.think.p50, found.think.max) == (-5.0, 6.0, 988.0)
    assert (found.growth.min, found.growth.p50, found.growth.max) == (-10, 110, 190)
    assert found.shrinking_share == pytest.approx(1 / 3)
    # 210 >= 100 + 90 and 400 >= 210 + 45, but 40 < 50 + 18.
    assert found.history_share == pytest.approx(2 / 3)
    assert (found.first_request.mean, found.later_request.mean) == (75, pytest.approx(650 / 3))
    # The silence of 990 s cuts session 7 in two: bursts of 2, 1 and 2 requests.
    assert (found.bursts.n, found.bursts.max) == (3, 2)
    assert found.open_max == 2
    assert found.open_mean == pytest.approx((1000 + 25) / 1000)


def test_failed_turns_do_not_count_as_growth() -> None:
    table = trace(arrival=[0.0, 1.0, 2.0], request_tokens=[50, 0, 80], response_tokens=[10, 0, 5], session=[1, 1, 1])
    found = session_statistics(table)
    assert found.gaps.n == 2
    assert found.growth.n == 0
    assert found.history_share is None
    assert found.think.n == 0


def test_without_sessions_there_is_nothing() -> None:
    table = trace(arrival=[0.0, 1.0], request_tokens=[1, 2], response_tokens=[1, 2])
    assert session_statistics(table) == Conversations()
