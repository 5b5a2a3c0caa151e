"""A replay that is watched: the server's numbers land in the Run, whatever their page does, and the view shows them."""

import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from mock import Behaviour, Mock  # noqa: UP026 - the file beside this one

from squall.errors import InputError
from squall.replay import replay
from squall.replay.watch import Recent
from squall.report import report
from squall.run import metrics, read_run
from squall.trace.files import write_trace
from squall.trace.table import Trace, TraceMeta

META = TraceMeta(source="test", format="generated")
EDGES = (0.001, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 1.0)


def trace(n: int = 20, gap: float = 0.05, response: int = 4) -> Trace:
    columns = {
        "arrival": np.arange(n) * gap,
        "request_tokens": np.full(n, 40),
        "response_tokens": np.full(n, response),
    }
    return Trace.of(columns, META)


class Page:
    """A page of metrics as vLLM writes it, with what the mock will have done by then."""

    def __init__(self, first: float = 0.03, gap: float = 0.005, response: int = 4) -> None:
        self.first, self.gap, self.response = first, gap, response
        self.answered = self.pages = self.forgotten = 0
        self.trouble: Behaviour | None = None

    def answer(self, number: int, seen: object) -> Behaviour:
        self.answered += 1
        return Behaviour(first=self.first, gap=self.gap)

    def __call__(self) -> Behaviour:
        self.pages += 1
        if self.trouble is not None and self.pages > 2:
            return self.trouble
        done = self.answered - self.forgotten
        lines = [
            f"vllm:num_requests_running {self.pages % 3}",
            f"vllm:num_requests_waiting {self.pages}",
            f"vllm:kv_cache_usage_perc {min(1.0, 0.1 * self.pages)}",
            f"vllm:num_preemptions_total {done}",
            f"vllm:prompt_tokens_total {40 * done}",
        ]
        for name, value in (
            ("time_to_first_token", self.first + 0.001),
            ("e2e_request_latency", self.first + self.gap * (self.response - 1) + 0.001),
        ):
            for edge in (*EDGES, float("inf")):
                count = done if value <= edge else 0
                label = "+Inf" if edge == float("inf") else edge
                lines.append(f'vllm:{name}_seconds_bucket{{le="{label}"}} {count}')
            lines.append(f"vllm:{name}_seconds_sum {value * done}")
        return Behaviour(body="\n".join(lines).encode() + b"\n", content_type="text/plain")


@pytest.mark.parametrize("workers", [1, 2])
def test_the_servers_numbers_land_in_the_run_and_the_report(workers, tmp_path):
    page = Page()
    with Mock(page.answer, metrics=page) as mock:
        run = replay(
            trace(60), url=mock.url, out=tmp_path / "run.parquet", metrics_interval=0.2, workers=workers, title="served"
        )
    series = run.series
    assert 3 <= len(series) <= 40
    assert series["time"].is_sorted()
    assert series["time"][0] < 3  # a busy machine takes a while to start the process that reads
    assert (series["time"].diff().drop_nulls()[:-1] > 0.15).all()  # the last reading is when the run is over
    assert series["kv_used"].max() == 1.0
    assert series["preemptions"].sum() == 60  # the base was read before the first request
    assert read_run(tmp_path / "run.parquet").series.equals(series)
    assert os.listdir(tmp_path).count("run.series.parquet") == 1
    server = run.meta.server
    assert (server.name, server.failed, server.restarts) == ("vLLM", 0, 0)
    found = {one.metric: one for one in metrics(run).agreement}
    assert {one.server_n for one in found.values()} == {60}  # none of the questions before the run
    assert found["ttft"].agree
    assert found["ttft"].client_mean == pytest.approx(found["ttft"].server_mean, abs=0.02)
    text = report(run, out=tmp_path / "page.html").read_text()
    for figure in ("ttft-time", "waiting", "running", "kv-used", "preemptions", "ttft-waiting"):
        assert f'id="{figure}"' in text or f'"{figure}"' in text
    assert "mean 31" in text.replace("31 ms", "mean 31")


TROUBLES = {
    "hangs": Behaviour(body=b"late", first=60),
    "dies": Behaviour(close="before"),
    "is no HTTP": Behaviour(raw=b"\x00" * 100),
    "refuses": Behaviour(status=503, body=b"no \x1b[2J"),
    "is another": Behaviour(body=b"tgi_batch_current_size 1\ntgi_queue_size 1\n"),
    "is endless": Behaviour(raw=b"HTTP/1.1 200 OK\r\n\r\n" + b"vllm:num_requests_running 1\n" * 400_000),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_page_in_trouble_neither_disturbs_nor_holds_the_run(trouble):
    page = Page()
    page.trouble = TROUBLES[trouble]
    with Mock(page.answer, metrics=page) as mock:
        began = time.monotonic()
        run = replay(trace(20), url=mock.url, metrics_interval=0.1)
        took = time.monotonic() - began
    assert run.table["status"].to_list() == ["ok"] * 20
    assert took < 1 + 3 + 2  # the run, the last reading at its slowest, start-up
    if trouble == "hangs":
        return  # at most one reading has failed, and its process may have been too busy waiting to say so
    assert run.meta.server.scrapes <= 1
    assert run.meta.server.failed >= 1
    assert "\x1b" not in run.meta.server.error
    assert any("readings of the server's metrics failed" in text for text in run.meta.notes)


def test_a_restart_of_the_server_is_seen():
    page = Page()
    with Mock(page.answer, metrics=page) as mock:
        threading.Timer(1.5, lambda: setattr(page, "forgotten", page.answered)).start()
        run = replay(trace(50), url=mock.url, metrics_interval=0.2)
    assert run.meta.server.restarts == 1
    assert (run.series["preemptions"].drop_nulls() >= 0).all()
    assert 35 <= run.series["preemptions"].sum() <= 50  # what was counted between a reading and the restart is lost
    assert any("restarted" in text for text in run.meta.notes)


def test_switched_off_or_without_a_page():
    page = Page()
    with Mock(page.answer, metrics=page) as mock:
        run = replay(trace(5), url=mock.url, metrics=False)
        assert page.pages == 0
        assert run.series.is_empty()
        assert run.meta.server is None
        for options in ({"metrics_url": mock.url}, {"metrics_interval": 1}):
            with pytest.raises(InputError, match="changes nothing"):
                replay(trace(5), url=mock.url, metrics=False, **options)
        with pytest.raises(InputError, match="--metrics-interval"):
            replay(trace(5), url=mock.url, metrics_interval=0.001)
    with Mock() as mock:
        assert replay(trace(5), url=mock.url).meta.server is None
        with pytest.raises(InputError, match="no metrics page"):
            replay(trace(5), url=mock.url, metrics_interval=2)


def start(mock: Mock, folder: Path, *options: object, terminal: int | None = None) -> subprocess.Popen:
    write_trace(trace(60), folder / "trace.parquet")
    call = [sys.executable, "-m", "squall", "replay", folder / "trace.parquet", "-o", folder / "run.parquet"]
    call += ["--url", mock.url, *options]
    return subprocess.Popen(
        [str(part) for part in call],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if terminal is None else terminal,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"},
    )


def test_kill_9_keeps_what_was_read(tmp_path):
    page = Page()
    with Mock(page.answer, metrics=page) as mock:
        process = start(mock, tmp_path, "--metrics-interval", "0.2")
        lines = tmp_path / "run.parquet.journal" / "series.jsonl"
        until = time.monotonic() + 20
        while not (lines.exists() and lines.stat().st_size > 500) and time.monotonic() < until:
            time.sleep(0.05)
        process.kill()
        process.communicate()
        run = read_run(tmp_path / "run.parquet.journal")
        assert len(run.series) >= 2
        assert run.meta.server.name == "vLLM"
        last = page.pages
        time.sleep(1.5)
        assert page.pages <= last + 2  # the watching process went with its parent


def on_a_terminal(
    mock: Mock, folder: Path, *options: object, interrupt: threading.Event | None = None
) -> tuple[str, int]:
    """What the call writes on a terminal that is its standard error, and its exit code."""
    parent, child = pty.openpty()
    process = start(mock, folder, *options, terminal=child)
    os.close(child)
    if interrupt is not None:
        assert interrupt.wait(30)
        process.send_signal(signal.SIGINT)
    shown = b""
    while True:
        try:
            shown += os.read(parent, 1 << 16)
        except OSError:  # all that had the terminal open are gone
            break
    os.close(parent)
    process.communicate()
    return shown.decode(errors="replace"), process.returncode


def test_the_view_shows_the_run(tmp_path):
    page = Page()

    def behave(number, seen):
        if number % 10 == 9:
            return Behaviour(status=429, body=b'{"error": {"message": "\x1b[31m[bold]evil"}}')
        return page.answer(number, seen)

    with Mock(behave, metrics=page) as mock:
        shown, code = on_a_terminal(mock, tmp_path, "--title", "a [red]title\x1b[7m", "--speed", 0.5)
    assert code in (0, 3)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    for text in ("a [red]title\\x1b[7m", "of 60 sent", "http_error 429", "TTFT", "KV cache", "waiting", "in flight"):
        assert text in plain, text
    assert "\x1b[7m" not in shown
    assert "\x1b[31m[bold]" not in shown
    frames = re.findall(r"vLLM +running \d+ +waiting (\d+)", plain)
    assert len(frames) >= 3
    assert int(frames[-1]) > int(frames[0])


@pytest.mark.parametrize("option", ["--json", "--quiet", "--no-view"])
def test_no_view_where_it_is_not_wanted(option, tmp_path):
    with Mock() as mock:
        shown, _ = on_a_terminal(mock, tmp_path, option, "--speed", 4)
    assert "ended lately" not in shown


def test_an_interrupt_is_told_in_the_view(tmp_path):
    page, enough = Page(first=0.5), threading.Event()

    def behave(number, seen):
        if page.answered > 12:
            enough.set()
        return page.answer(number, seen)

    with Mock(behave, metrics=page) as mock:
        shown, code = on_a_terminal(mock, tmp_path, interrupt=enough)
    assert code == 130
    assert "stopping" in shown


def lines_of(n: int, at: float) -> bytes:
    rows = [
        {
            "request": k,
            "attempt": 1,
            "status": "ok" if k % 4 else "timeout",
            "reason": None if k % 4 else "total",
            "scheduled": at,
            "sent": at + 0.001,
            "first_token": at + 0.1,
            "last_token": at + 0.3,
            "ended": at + 0.3,
            "chunks": [0.0, 0.1, 0.2],
        }
        for k in range(n)
    ]
    return b"".join(msgspec.json.encode(row) + b"\n" for row in rows)


def test_what_ended_lately_is_read_as_it_is_written(tmp_path):
    recent = Recent(tmp_path)
    path = tmp_path / "worker-0.jsonl"
    path.write_bytes(lines_of(8, 1.0)[:-20])  # the last line is half-written
    recent.look(2.0)
    assert recent.sample("ttft") == pytest.approx([0.1] * 7)
    assert recent.failures == {"timeout total": 2}
    path.write_bytes(lines_of(8, 1.0) + lines_of(4, 9.0))
    recent.look(10.0)
    assert len(recent.sample("ttft")) == 12
    assert recent.sample("itl") == pytest.approx([0.1] * 24)
    assert recent.sample("late") == pytest.approx([0.001] * 12)
    recent.look(18.0)
    assert len(recent.sample("e2e")) == 3  # the first ones are too old, and failures have none
    assert recent.failures == {"timeout total": 3}


def test_a_flood_of_lines_is_sampled(tmp_path):
    recent = Recent(tmp_path)
    (tmp_path / "worker-0.jsonl").write_bytes(lines_of(40_000, 1.0))
    recent.look(2.0)
    assert recent.left_out > 1e6
    assert 1000 < len(recent.sample("ttft")) < 10_000
