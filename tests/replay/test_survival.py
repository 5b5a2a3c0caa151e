"""What a replay leaves behind when it is killed, when the disk is full, when the machine cannot send it."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import polars as pl
import pytest
from mock import Behaviour, Mock  # noqa: UP026 - the file beside this one
from test_conversations import talk
from test_engine import META, _start, check, in_run, statuses, trace

from squall.errors import InputError, SquallError
from squall.replay import connection, loopback, replay, sender
from squall.replay.loopback import Cost, check_machine, measure_cost
from squall.replay.resume import resumption
from squall.replay.schedule import rows_of, schedule_of
from squall.run.attempt import Attempt, Writer, lines_path
from squall.run.files import read_run
from squall.run.journal import read_journal, write_header
from squall.run.table import Run, RunMeta
from squall.run.verdict import judge, sent_against_asked
from squall.trace.table import Trace


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_replay_is_resumed(tmp_path, workers):
    """Every row has one outcome; what came before the kill is kept; the rest goes out at its distance."""
    out = tmp_path / "run.parquet"
    with Mock() as mock:
        process = _start(mock, out, workers)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        time.sleep(0.3)
        killed = read_journal(tmp_path / "run.parquet.journal")
        before = len(mock.run)
        asked = trace(150, gap=0.02, response=8)
        with pytest.raises(InputError, match="of another trace"):
            replay(trace(149, gap=0.02, response=8), url=mock.url, out=out, resume=True)
        run = replay(asked, url=mock.url, out=out, workers=workers, resume=True)
        sent_again = len(mock.run) - before
    check(run, 150)
    kinds = statuses(run)
    # A worker that sees its parent gone hangs up on what is in flight, and still writes that down.
    assert kinds["ok"] + kinds.get("cancelled/lost", 0) + kinds.get("cancelled/in_flight_at_end", 0) == 150
    assert kinds["ok"] >= 150 - 60
    done = killed.table.filter(pl.col("status") == "ok")
    kept = run.table.join(done, on=["request", "sent"], how="semi")
    assert len(kept) == len(done)
    assert sent_again == kinds["ok"] - len(done)
    later = run.table.filter((pl.col("status") == "ok") & ~pl.col("request").is_in(done["request"].to_list()))
    assert np.median((later["sent"] - later["scheduled"]).to_numpy()) < 0.02
    assert run.meta.state == "complete"
    assert run.meta.target["resumed"] == 1
    assert any("was killed" in text for text in run.meta.notes)
    assert sorted(os.listdir(tmp_path)) == ["program.py", "run.parquet"]
    assert read_run(out).table.equals(run.table)


def test_resumption_gives_up_conversations_that_lost_a_turn(tmp_path):
    asked = talk(sessions=3, turns=3, gap=1.0, stagger=0.1)
    rows = rows_of(asked)
    schedule = schedule_of(rows, asked)
    rows.write_parquet(tmp_path / "schedule.parquet")
    write_header(tmp_path, RunMeta(kind="replay", state="running"))
    writer = Writer(lines_path(tmp_path, 0))
    for row in (0, 1):  # session 2 was in flight when the writer died at 0.5 s
        writer.write(Attempt(request=row, attempt=1, status="ok", sent=0.1 * row, ended=0.5))
    writer.close()
    found = resumption(tmp_path, rows, schedule)
    assert [asked.table["session"][int(row)] for row in found.lost] == [2, 2, 2]
    assert [asked.table["session"][int(row)] for row in found.left] == [0, 1, 0, 1]
    assert found.since == 1_000_000_000


def test_resume_needs_a_journal(tmp_path):
    with Mock() as mock, pytest.raises(InputError, match="there is no"):
        replay(trace(2), url=mock.url, out=tmp_path / "run.parquet", resume=True)


def test_a_full_disk_ends_the_run_with_a_sentence(tmp_path, monkeypatch):
    out = tmp_path / "run.parquet"

    def full(self):
        if len(self._lines) > 5:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sender.Writer, "flush", full)
    with Mock() as mock, pytest.raises(SquallError, match="No space left on device"):
        replay(trace(300, gap=0.01), url=mock.url, out=out)
    assert (tmp_path / "run.parquet.journal").is_dir()


def test_the_wall_clock_may_jump(monkeypatch):
    """Nothing but the start's date looks at it."""
    jumps = iter(range(0, 10**9, 3600))
    monkeypatch.setattr(time, "time", lambda: 1.7e9 - next(jumps))
    with Mock() as mock:
        run = replay(trace(20), url=mock.url)
    check(run, 20)
    assert statuses(run) == {"ok": 20}
    assert np.all((run.table["ended"] - run.table["scheduled"]).to_numpy() < 5)


def test_a_server_that_restarts():
    """It dies, and another takes its port: the rows between are refused, the later ones are answered."""
    first = Mock(in_run(Behaviour(gap=0.01)))
    with first as mock:
        second = Mock(in_run(Behaviour(gap=0.01)))

        def restart():
            mock.stop()
            time.sleep(0.4)
            second.port = mock.port
            second.__enter__()

        threading.Timer(0.8, restart).start()
        run = replay(trace(80, gap=0.03), url=mock.url)
        if second.port:
            second.__exit__()
    check(run, 80)
    kinds = statuses(run)
    assert kinds["refused/refused"] >= 5
    last = run.table.sort("request").tail(10)
    assert set(last["status"]) == {"ok"}


# --- before the run --------------------------------------------------------------------------------------------------


def _schedule(rate: float, seconds: float, response: int):
    n = round(rate * seconds)
    columns = {"arrival": np.arange(n) / rate, "request_tokens": [10] * n, "response_tokens": [response] * n}
    return schedule_of(rows_of(Trace.of(columns, META)))


def test_a_schedule_beyond_the_machine_is_refused(monkeypatch):
    monkeypatch.setattr(loopback, "known_cost", lambda: Cost(request=1e-4, chunk=1e-5))
    fine = check_machine(_schedule(100, 30, 32), 1, True)
    assert fine.facts["need"] == pytest.approx(100 * (1e-4 + 32e-5), rel=0.01)
    assert fine.notes == []
    assert "safer" in check_machine(_schedule(2000, 12, 32), 1, True).notes[-1]
    with pytest.raises(InputError, match="--no-self-check"):
        check_machine(_schedule(3000, 12, 32), 1, True)
    assert check_machine(_schedule(3000, 5, 32), 1, False).notes == []
    if (os.cpu_count() or 1) > 1:
        assert check_machine(_schedule(3000, 12, 32), 2, True).facts["need"] < 0.7


def test_too_few_files_or_ports_are_told(monkeypatch):
    monkeypatch.setattr(loopback, "raise_file_limit", lambda: 256)
    notes = check_machine(_schedule(10, 60, 4), 1, False).notes
    assert "ulimit" in notes[0]
    assert "600 requests" in notes[0]


def test_the_measurement_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cost = loopback.known_cost()
    assert 1e-6 < cost.chunk < 1e-3
    assert 1e-5 < cost.request < 1e-2
    monkeypatch.setattr(loopback, "measure_cost", lambda: pytest.fail("measured again"))
    assert loopback.known_cost() == cost
    (tmp_path / "squall" / "loopback.json").write_text("nonsense")
    monkeypatch.setattr(loopback, "measure_cost", lambda: Cost(request=1.0, chunk=1.0))
    assert loopback.known_cost() == Cost(request=1.0, chunk=1.0)


# --- after the run ---------------------------------------------------------------------------------------------------


def _run(**columns) -> Run:
    n = len(columns["scheduled"])
    return Run.of({"request": range(n), "attempt": [1] * n, "status": ["ok"] * n} | columns, RunMeta(kind="replay"))


@pytest.mark.parametrize(
    ("name", "value", "wrong"),
    [("first_token", 0.01, True), ("first_token", 0.3, False), ("first_byte", 0.4, True), ("last_token", None, False)],
)
def test_rows_that_contradict_themselves_are_the_clients_fault(name, value, wrong):
    columns = {"scheduled": 0.1, "sent": 0.1, "first_byte": 0.2, "first_token": 0.3, "last_token": 0.5, "ended": 0.6}
    columns[name] = value
    run = _run(response_tokens=[3], **{key: [entry] for key, entry in columns.items()})
    assert bool(judge(run, [])) == wrong


def test_sent_against_asked_sees_order_where_the_cv_does_not():
    """The same gaps sorted: the same CV, another dispersion."""
    gaps = np.random.default_rng(0).exponential(0.01, 2000)
    asked = np.cumsum(gaps)
    found = sent_against_asked(_run(scheduled=asked, sent=np.cumsum(np.sort(gaps))))
    assert found["gap_cv"]["sent"] == pytest.approx(found["gap_cv"]["asked"], rel=0.01)
    wide = found["dispersion"][-1]
    assert wide["sent"] > 5 * wide["asked"]
    assert found["requests"] == {"asked": 0, "sent": 2000}
    same = sent_against_asked(_run(scheduled=asked, sent=asked))
    assert all(of["asked"] == of["sent"] for of in same["dispersion"])
    assert same["rate"]["asked"] == pytest.approx(100, rel=0.1)


def test_connections_notice_a_dead_peer():
    """Half-open connections end by keep-alive probes, also with every timeout off."""
    seen = []
    made = connection.Connection.connection_made

    def spy(self, transport):
        made(self, transport)
        handle = transport.get_extra_info("socket")
        seen.append(handle.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))

    with pytest.MonkeyPatch.context() as patch, Mock() as mock:
        patch.setattr(connection.Connection, "connection_made", spy)
        replay(trace(2), url=mock.url)
    assert seen
    assert all(seen)


@pytest.mark.alone
def test_the_measured_cost_is_about_that_of_a_replay():
    cost = measure_cost()
    assert cost.request + 32 * cost.chunk < 0.003


@pytest.mark.alone
def test_stalls_of_the_client_are_told_from_stalls_of_the_server():
    def stall(*_: object) -> None:
        time.sleep(0.05)

    def stalling_server(number: int, seen: object) -> Behaviour:
        if number % 10 == 0:
            stall()
        return Behaviour()

    requests = trace(200, gap=0.01)
    with Mock() as mock:
        run = replay(requests, url=mock.url, progress_callback=stall)  # called on the sending loop, twice a second
    assert run.meta.verdict == "CLIENT-LIMITED"
    assert any("stall" in reason for reason in run.meta.verdict_reasons), run.meta.verdict_reasons
    with Mock(stalling_server) as mock:
        run = replay(requests, url=mock.url)
    assert not any("stall" in reason for reason in run.meta.verdict_reasons), run.meta.verdict_reasons
    assert (run.table["first_token"] - run.table["sent"]).max() > 0.04


def test_a_worker_imports_no_tables():
    code = "import sys, squall.replay.workers; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"polars", "numba", "scipy", "rich", "squall.trace"} & set(found.stdout.split())


MILLION = """
import asyncio, os, time
from pathlib import Path
import numpy as np
import squall.replay.workers
from squall.replay.prompt import Dialect
from squall.replay.schedule import Schedule
from squall.replay.sender import Plan, Sender, prepare
from squall.replay.target import Target

n = 1_000_000
target = Target(url="", host="h", address=("127.0.0.1", 1), tls=False, base="/v1", query="", headers=b"", secrets=())
dialect = Dialect("chat", "m", "words")
plan = Plan(target=target, dialect=dialect, salt="run", seed=0, fresh=b"", journal=Path.cwd())
lengths = np.full(n, 200, np.int32)
rows = Schedule(np.arange(n, dtype=np.int32), np.arange(n) * 1_000_000, lengths, lengths)

async def main():
    prepare(plan)
    sender = Sender(plan, rows, time.monotonic_ns() + 10**10, watch=lambda counts: 2)
    for times in vars(sender._stages).values():
        times.frombytes(bytes(4 * n))  # as after a million requests
    await sender.run()

asyncio.run(main())
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_with_a_million_requests_stays_small(tmp_path):
    found = subprocess.run([sys.executable, "-c", MILLION], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert int(found.stdout) < 150_000  # KB


@pytest.mark.alone
def test_a_request_costs_little():
    """Of 32 chunks, start and end of the run included, on a machine that may be half as fast as the slowest seen."""
    count = 600
    serve = [sys.executable, "-c", loopback.SERVE]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = f"http://127.0.0.1:{int(server.stdout.readline())}"
            arrival = np.random.default_rng(1).exponential(1 / 200, count).cumsum()
            lengths = {"request_tokens": np.full(count, 200), "response_tokens": np.full(count, 32)}
            requests = Trace.of({"arrival": arrival, **lengths}, META)
            replay(requests, url=url, head=1, self_check=False)  # what is imported and made once
            began = time.process_time()
            run = replay(requests, url=url, self_check=False)
            used = time.process_time() - began
        finally:
            server.terminate()
    assert statuses(run) == {"ok": count}
    assert used / count < 0.0015
