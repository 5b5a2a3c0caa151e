"""Tokens reach their sockets as bytes in the right order, and are planned around their moments."""

import socket
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squall.serve.exposition import ITL
from squall.serve.tokens import CALLERS, EACH, Outlets
from squall.simulate.live import REFUSED, TOKEN

EVENT = b"7\r\ntoken\r\n\r\n"


def rows(*entries: tuple[int, int, int]) -> np.ndarray:
    return np.array(list(entries), TOKEN)


def read(of: socket.socket) -> bytes:
    of.setblocking(False)
    try:
        return of.recv(1 << 20)
    except BlockingIOError:
        return b""


@pytest.fixture
def outlets():
    return Outlets(8, time.monotonic_ns(), 1.0, ITL)


def test_what_is_the_callers_and_what_is_not(outlets):
    here, there = socket.socketpair()
    outlets.take(0, 5, streamed=True)
    outlets.take(1, 5, streamed=False)
    told = rows((0, 0, 1), (0, 1, 1), (1, 0, 2), (2, 0, 3), (2, 1, 2), (3, 0, 4), (4, 0, 5), (5, 2, REFUSED))
    assert outlets.write(told, 0, due=True) == 0  # a first token
    outlets.told(0, 1, 0)
    outlets.open(0, here.fileno(), EVENT)
    assert outlets.write(told, 1, due=True) == 1
    outlets.told(1, 1, None)
    assert outlets.write(told, 2, due=True) == 6  # the last token
    assert read(there) == 3 * EVENT
    outlets.told(0, 5, 4)
    assert outlets.write(told, 7, due=True) == 7  # the refusal
    assert outlets.gaps[:-1].sum() == 5  # tokens 2 to 5 and the other's second
    assert outlets.errors[:-1].sum() == 5  # all that were written
    assert len(outlets.look()) == 5
    assert len(outlets.look()) == 0


def test_a_token_that_was_written_before_is_not_written_again(outlets):
    here, there = socket.socketpair()
    outlets.take(3, 9, streamed=True)
    outlets.told(3, 1, 0)
    outlets.open(3, here.fileno(), EVENT)
    early = rows((0, 3, 2))
    assert outlets.write(early, 0, due=False) == 1
    assert outlets.write(early, 0, due=True) == 1
    assert outlets.write(rows((1, 3, 3)), 0, due=True) == 1
    assert read(there) == 2 * EVENT
    assert outlets.write(rows((2, 3, 9)), 0, due=False) == 0
    outlets.told(3, 9, 2)
    assert outlets.write(rows((2, 3, 9)), 0, due=False) == 1
    assert outlets.write(rows((2, 3, 9)), 0, due=True) == 0  # now its slot can be given back


def test_who_is_gone_gets_nothing(outlets):
    here, there = socket.socketpair()
    outlets.take(2, 9, streamed=True)
    outlets.told(2, 1, 0)
    outlets.open(2, here.fileno(), EVENT)
    outlets.shut(2)
    assert outlets.write(rows((0, 2, 2), (1, 2, 3)), 0, due=False) == 2
    assert read(there) == b""
    assert outlets.plan(rows((0, 2, 2))) == (np.inf, 0)


def test_what_a_full_socket_did_not_take_is_the_callers(outlets):
    here, there = socket.socketpair()
    here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    event = bytes(3000)
    outlets.take(0, 10**6, streamed=True)
    outlets.told(0, 1, 0)
    outlets.open(0, here.fileno(), event)
    sent, index = 0, 2
    while outlets.write(rows((0, 0, index)), 0, due=True) == 1:
        sent, index = sent + len(event), index + 1
        assert index < 10_000
    sent += outlets.taken(0)
    got = 0
    while data := read(there):
        got += len(data)
    assert got == sent
    assert outlets.write(rows((0, 0, index)), 0, due=True) == 0  # and so are all that follow
    assert outlets.taken(0) == 0


@given(
    moments=st.lists(st.integers(0, 400_000), min_size=1, max_size=12),
    kinds=st.lists(st.sampled_from(["stream", "last", "silent", "gone"]), min_size=12, max_size=12),
)
@settings(max_examples=200, deadline=None)
def test_the_plan_is_the_least_squares_one(moments, kinds):
    start = 10**12
    outlets = Outlets(12, start, 1.0, ITL)
    told, needed = [], []
    for slot, (moment, kind) in enumerate(zip(sorted(moments), kinds, strict=False)):
        outlets.take(slot, 3 if kind == "last" else 9, streamed=kind != "silent")
        outlets.told(slot, 1, None)
        outlets.told(slot, 2, None)
        if kind != "silent":
            outlets.open(slot, 0, EVENT)
        if kind == "gone":
            outlets.shut(slot)
        told.append((moment, slot, 3))
        needed.append({"stream": EACH, "last": CALLERS}.get(kind, 0))
    at, count = outlets.plan(rows(*told))
    real = [k for k in range(len(told)) if needed[k]]
    if not real:
        assert (at, count) == (np.inf, 0)
        return
    # An oracle: pool adjacent violators, the first block of it.
    due = start + np.array([moment for moment, _, _ in told], float)[real] - np.cumsum(np.array(needed, float)[real])
    assert at == pytest.approx(min(due[: k + 1].mean() for k in range(len(due)) if last_of_its_moment(told, real, k)))
    assert count >= 1


def last_of_its_moment(told: list[tuple[int, int, int]], real: list[int], k: int) -> bool:
    return k + 1 == len(real) or told[real[k + 1]][0] != told[real[k]][0]
