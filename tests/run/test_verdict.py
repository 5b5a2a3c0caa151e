"""The gates of the verdict, one by one, on runs made for them."""

import numpy as np
import pytest

from squall.run import Run, RunMeta
from squall.run.attempt import Client
from squall.run.verdict import judge

QUIET = {"stall_p999": 0.001, "collection": 0.0, "cpu": 1.0, "wall": 10.0}


def _run(late, ttft=0.05, status="ok", gaps=None):
    scheduled = np.cumsum(np.random.default_rng(0).exponential(0.05, len(late)) if gaps is None else gaps)
    sent = scheduled + late
    columns = {"request": range(len(late)), "attempt": [1] * len(late), "status": [status] * len(late)}
    return Run.of(columns | {"scheduled": scheduled, "sent": sent, "first_token": sent + ttft}, RunMeta(kind="replay"))


def _verdict(run, **client):
    return " ".join(judge(run, [Client(**QUIET | client)]))


def test_a_punctual_sender_is_valid():
    assert _verdict(_run(np.full(500, 1e-4))) == ""


def test_lateness_is_judged_and_its_cause_named():
    late = np.full(500, 1e-4)
    late[:10] = 0.008
    assert "p99 8.0 ms" in _verdict(_run(late), connect_p99=0.007)
    assert "opening connections" in _verdict(_run(late), connect_p99=0.007)
    assert "p99 8.0 ms" in _verdict(_run(late[:50]))
    late[1:] = 1e-4
    assert _verdict(_run(late[:50])) == ""  # one hiccup in a short run is forgiven
    late[:10] = 0.05
    assert "p99.9 50.0 ms" in _verdict(_run(late[:50]))


@pytest.mark.parametrize("ttft", [0.05, 10.0])
def test_a_slow_server_excuses_no_stall_of_the_client(ttft):
    assert "stalled" in _verdict(_run(np.zeros(200), ttft=ttft), stall_p999=0.05)
    assert "stalled" in _verdict(_run(np.zeros(200), ttft=ttft), stall_p999=0.011)


@pytest.mark.parametrize(
    ("client", "words"), [({"collection": 0.006}, "garbage collection"), ({"cpu": 9.0}, "90 % of a core")]
)
def test_the_clients_own_trouble_is_named(client, words):
    assert words in _verdict(_run(np.zeros(200)), **client)


def test_faults_of_the_client_always_count():
    run = _run(np.zeros(200), status="client_fault")
    assert "client's own fault" in _verdict(run)


@pytest.mark.parametrize(("jitter", "limited"), [(1e-4, False), (5e-4, False), (2e-3, True)])
def test_even_gaps_can_be_kept(jitter, limited):
    """The CV of even gaps is 0, or 1e-15: nobody comes within 3 % of that."""
    late = np.random.default_rng(1).uniform(0, jitter, 500)
    said = _verdict(_run(late, gaps=np.full(500, 0.01)))
    assert ("gaps between sends" in said) == limited, said
