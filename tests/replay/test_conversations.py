"""Conversations: turns in order, never two at once, after the answer and the think time, with a history that grows."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mock import Behaviour, Mock  # noqa: UP026 - the file beside this one
from test_engine import META, check, statuses

from squall.replay import replay
from squall.replay.prompt import WIDTH
from squall.replay.schedule import rows_of, schedule_of
from squall.trace.table import Trace


def talk(sessions=3, turns=3, gap=0.1, stagger=0.02, elapsed=None, grow=40, **columns) -> Trace:
    """Conversations whose prompts grow by more than the answers, all started within a moment."""
    rows = [(s * stagger + t * gap, s, 60 + t * grow) for s in range(sessions) for t in range(turns)]
    arrival, session, request = zip(*sorted(rows), strict=True)
    made = {"arrival": arrival, "session": session, "request_tokens": request, "response_tokens": [4] * len(rows)}
    if elapsed is not None:
        made["elapsed"] = [elapsed] * len(rows)
    return Trace.of(made | columns, META)


def by_conversation(mock: Mock, length: int = 3) -> dict[str, list]:
    """What the server saw, by the opening words of the prompt."""
    found: dict[str, list] = {}
    for seen in mock.run:
        first = seen.body["messages"][0]["content"]
        found.setdefault(" ".join(first.split()[:length]), []).append(seen)
    return found


def turns_of(run, trace):
    """The final attempts with their session, in the order of the trace."""
    table = run.table.sort("request", "attempt").group_by("request", maintain_order=True).last()
    return table.with_columns(session=trace.table["session"])


def test_turns_wait_for_the_answer_and_the_think_time():
    """The server takes 0.2 s, the trace had 0.02 s and 0.1 s between turns: 0.08 s of thinking."""
    trace = talk(elapsed=0.02)
    with Mock(lambda number, seen: Behaviour(first=0.2 if seen.body["max_tokens"] > 1 else 0)) as mock:
        run = replay(trace, url=mock.url)
    check(run, 9)
    assert statuses(run) == {"ok": 9}
    for _, turns in turns_of(run, trace).group_by("session"):
        ended, scheduled, sent = (turns[name].to_numpy() for name in ("ended", "scheduled", "sent"))
        assert np.all(sent[1:] > ended[:-1])  # no overlap
        assert np.allclose(scheduled[1:] - ended[:-1], 0.08, atol=1e-4)
        assert np.all(sent[1:] - scheduled[1:] < 0.05)  # later turns are as punctual as others
    assert run.meta.target["history"] == "recorded"


def test_without_recorded_durations_turns_keep_their_distance_but_follow_the_answer():
    trace = talk(sessions=2, turns=3, gap=0.15, stagger=0.05)
    with Mock() as mock:
        run = replay(trace, url=mock.url)
    for _, turns in turns_of(run, trace).group_by("session"):
        assert np.allclose(np.diff(turns["scheduled"].to_numpy()), 0.15, atol=1e-6)
    slow = talk(sessions=1, turns=3, gap=0.05)
    with Mock(lambda number, seen: Behaviour(first=0.2 if seen.body["max_tokens"] > 1 else 0)) as mock:
        run = replay(slow, url=mock.url)
    turns = turns_of(run, slow)
    assert np.allclose(turns["scheduled"].to_numpy()[1:], turns["ended"].to_numpy()[:-1], atol=1e-4)
    assert any("no recorded think time" in text for text in run.meta.notes)


def test_a_slow_conversation_delays_no_other():
    trace = talk(sessions=20, turns=2, gap=0.05, stagger=0.02)
    with Mock(lambda number, seen: Behaviour(first=0.5 if seen.body["max_tokens"] > 1 else 0)) as mock:
        run = replay(trace, url=mock.url)
    first = turns_of(run, trace).group_by("session", maintain_order=True).first()
    assert np.median(first["sent"].to_numpy() - first["scheduled"].to_numpy()) < 0.01


@pytest.mark.parametrize("workers", [1, 2])
def test_recorded_history_grows_and_is_the_same_text(workers):
    trace = talk(sessions=4)
    with Mock() as mock:
        run = replay(trace, url=mock.url, workers=workers)
        talks = by_conversation(mock)
    check(run, 12)
    assert len(talks) == 4
    for turns in talks.values():
        texts = [seen.body["messages"][0]["content"] for seen in turns]
        assert [len(text.split()) for text in texts] == [49, 89, 129]  # less the 11 tokens of the template
        assert texts[1].startswith(texts[0])
        assert texts[2].startswith(texts[1])
        if workers == 1:
            assert len({seen.connection for seen in turns}) <= 3
    assert run.table["request_tokens"].equals(run.table["asked_request_tokens"], check_names=False)


def test_live_history_holds_the_replies_as_they_came():
    trace = talk(sessions=2, turns=3)
    with Mock() as mock:
        run = replay(trace, url=mock.url, history="live")
        talks = by_conversation(mock)
    assert statuses(run) == {"ok": 6}
    assert run.meta.target["history"] == "live"
    for turns in talks.values():
        shapes = [[message["role"] for message in seen.body["messages"]] for seen in turns]
        assert shapes == [["user"] + ["assistant", "user"] * t for t in range(3)]
        for earlier, later in pairwise(turns):
            asked = earlier.body["messages"]
            assert later.body["messages"][: len(asked)] == asked
            assert later.body["messages"][len(asked)] == {"role": "assistant", "content": "tok " * 4}


def test_live_history_of_completions_and_responses():
    for api in ("completions", "responses"):
        trace = talk(sessions=1, turns=2)
        with Mock() as mock:
            run = replay(trace, url=mock.url, history="live", api=api)
            asked = [seen.body for seen in mock.seen][-2:]
        assert statuses(run) == {"ok": 2}, api
        if api == "completions":
            assert asked[1]["prompt"].startswith(asked[0]["prompt"] + "tok tok tok tok ")
        else:
            roles = [message["role"] for message in asked[1]["input"]]
            assert roles == ["user", "assistant", "user"]


def test_a_failed_turn_ends_its_conversation():
    trace = talk(sessions=3, turns=4)
    seen_turns: dict[str, int] = {}

    def behave(number, seen):
        if seen.body["max_tokens"] == 1:
            return Behaviour()
        name = " ".join(seen.body["messages"][0]["content"].split()[:3])
        seen_turns[name] = seen_turns.get(name, 0) + 1
        broken = len(seen_turns) == 2 and list(seen_turns).index(name) == 1 and seen_turns[name] == 1
        return Behaviour(status=500, body=b"{}") if broken else Behaviour()

    with Mock(behave) as mock:
        run = replay(trace, url=mock.url)
    check(run, 12)
    assert statuses(run) == {"ok": 8, "http_error": 1, "cancelled/parent_failed": 3}
    failed = turns_of(run, trace).group_by("session", maintain_order=True).agg("status")
    broken = next(row["status"] for row in failed.to_dicts() if "http_error" in row["status"])
    assert broken == ["http_error", "cancelled", "cancelled", "cancelled"]


def test_a_retried_turn_keeps_its_conversation():
    known = set()

    def behave(number, seen):
        text = seen.body["messages"][0]["content"]
        again, _ = text in known, known.add(text)
        return Behaviour() if again or seen.body["max_tokens"] == 1 else Behaviour(status=503, body=b"{}")

    with Mock(behave) as mock:
        run = replay(talk(sessions=2, turns=2), url=mock.url, retries=1, retry_backoff=0.05)
    check(run, 4)
    assert statuses(run) == {"ok": 4, "http_error": 4}


def test_turns_beyond_the_duration_are_counted():
    trace = talk(sessions=1, turns=4, gap=0.1)
    with Mock(lambda number, seen: Behaviour(first=0.5 if seen.body["max_tokens"] > 1 else 0)) as mock:
        run = replay(trace, url=mock.url, duration=0.7)
    check(run, 4)
    assert statuses(run) == {"ok": 2, "cancelled/plan": 2}


def test_history_none_sends_every_turn_at_its_time():
    trace = talk(sessions=2, turns=3, gap=0.05)
    with Mock(lambda number, seen: Behaviour(first=0.4 if seen.body["max_tokens"] > 1 else 0)) as mock:
        run = replay(trace, url=mock.url, history="none")
    assert np.allclose(run.table.sort("request")["scheduled"], trace.table["arrival"])
    assert run.meta.target["history"] is None


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 60), st.integers(0, 30)), min_size=1, max_size=40),
    st.integers(1, 4),
)
def test_schedules_keep_conversations_whole(rows, workers):
    """Whatever the trace: each worker has whole conversations, their turns in order; roots lead to texts that fit."""
    session, request, response = zip(*rows, strict=True)
    names = [None if s == 5 else s for s in session]
    trace = Trace.of(
        {
            "arrival": np.arange(len(rows)) * 0.5,
            "session": names,
            "request_tokens": request,
            "response_tokens": response,
        },
        META,
    )
    whole = schedule_of(rows_of(trace), trace)
    seen = []
    for worker in range(workers):
        part = whole.part(worker, workers)
        opens, follows = part.turns()
        if opens is None:
            opens, follows = np.arange(len(part)), np.full(len(part), -1)
        walked = []
        for row in opens:
            mine = []
            while row >= 0:
                mine.append(int(part.request[row]))
                row = follows[row]
            assert mine == sorted(mine)
            assert len({names[r] for r in mine}) == 1
            if names[mine[0]] is not None:
                assert mine == [r for r in range(len(rows)) if names[r] == names[mine[0]]]
            walked += mine
        assert sorted(walked) == sorted(part.request.tolist())
        seen += walked
        if part.root is not None:
            for row in range(len(part)):
                root = part.root[row]
                if root != part.request[row]:
                    assert names[root] == names[part.request[row]]
                    assert request[root] <= request[part.request[row]]
    assert sorted(seen) == list(range(len(rows)))


def test_block_hashes_become_shared_prefixes():
    """Equal hashes are equal text, at the right place, and nothing else is equal."""
    blocks = [[7, 8, 9], [7, 8, 10], [7, 11], [12]]
    trace = Trace.of(
        {
            "arrival": np.arange(4) * 0.02,
            "request_tokens": [36, 33, 32, 5],
            "response_tokens": [3] * 4,
            "prefix": blocks,
        },
        META.__class__(source="test", format="generated", block_size=16),
    )
    with Mock() as mock:
        run = replay(trace, url=mock.url, api="completions")
        prompts = [seen.body["prompt"] for seen in mock.run]
        replay(trace, url=mock.url, api="completions", salt="request")
        alone = [seen.body["prompt"] for seen in mock.run][4:]
    assert statuses(run) == {"ok": 4}
    assert [len(prompt) for prompt in prompts] == [36, 33, 32, 5]
    assert prompts[0][:32] == prompts[1][:32]
    assert prompts[0][32:33] != prompts[1][32:33] or prompts[0][32:] != prompts[1][32:]
    assert prompts[0][:16] == prompts[2][:16]
    assert prompts[0][16:32] != prompts[2][16:32]
    assert prompts[3] != prompts[0][:5]
    assert len({tuple(prompt[:4]) for prompt in alone}) == 4  # --salt request shares nothing
    assert run.meta.target["prefix_cache"] == {"shared": (32 + 16) / (36 + 33 + 32 + 5), "cached": None, "n": 0}
    assert WIDTH == 5
