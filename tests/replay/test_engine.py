"""The whole engine against a server that does its worst: every row gets one outcome, and the right one."""

import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from urllib.request import urlopen

import msgspec
import numpy as np
import polars as pl
import pytest
from mock import Behaviour, Mock  # noqa: UP026 - the file beside this one

from squall.errors import InputError
from squall.replay import replay
from squall.run.files import read_run
from squall.run.journal import read_journal
from squall.run.table import Run
from squall.trace.table import Trace, TraceMeta

META = TraceMeta(source="test", format="generated")
MOMENTS = ("scheduled", "sent", "first_byte", "first_token", "last_token", "done")


def trace(n: int = 12, gap: float = 0.01, request: int | list[int] = 40, response: int | list[int] = 4) -> Trace:
    columns = {
        "arrival": np.arange(n) * gap,
        "request_tokens": np.broadcast_to(request, n),
        "response_tokens": np.broadcast_to(response, n),
    }
    return Trace.of(columns, META)


def check(run: Run, offered: int) -> None:
    """What holds for every run, whatever the server did."""
    table = run.table
    assert table["request"].unique().sort().to_list() == list(range(offered))
    last = table.sort("request", "attempt").group_by("request").last()
    assert len(last) == run.meta.offered == offered
    assert table.select("request", "attempt").is_duplicated().sum() == 0
    for earlier, later in pairwise(MOMENTS):
        both = table.select(earlier, later).drop_nulls()
        assert (both[earlier] <= both[later]).all(), (earlier, later)
    assert ((table["response_tokens"].fill_null(0) > 0) == table["first_token"].is_not_null()).all()
    assert table["token_source"].is_null().equals(table["response_tokens"].is_null())
    assert table.filter(pl.col("status") != "ok")["done"].is_null().all()
    chunks = table["chunks"].drop_nulls()
    assert (chunks.list.first() == 0).all()
    assert table["ended"].is_null().equals(table["status"].is_in(["cancelled"]) & table["sent"].is_null())


def statuses(run: Run) -> dict[str, int]:
    """Counts of `status` or `status/reason`, over all attempts."""
    names = run.table.select(pl.concat_str("status", "reason", separator="/", ignore_nulls=True))["status"]
    return dict(names.value_counts().sort("status").iter_rows())


def in_run(behaviour: Behaviour):
    """Answer the questions before the run, which ask for one token, well; and all others so."""
    return lambda number, seen: behaviour if seen.body["max_tokens"] > 1 else Behaviour()


@pytest.mark.parametrize(("api", "tokens"), [("chat", "words"), ("completions", "ids")])
def test_a_good_server(api, tokens, tmp_path):
    with Mock() as mock:
        run = replay(
            trace(30, response=[2 + i % 5 for i in range(30)]), url=mock.url, api=api, out=tmp_path / "run.parquet"
        )
    check(run, 30)
    assert statuses(run) == {"ok": 30}
    assert run.meta.target["prompts"]["tokens"] == tokens
    assert run.table["request_tokens"].equals(run.table["asked_request_tokens"], check_names=False)
    assert run.table["response_tokens"].equals(run.table["asked_response_tokens"], check_names=False)
    assert run.table["token_source"].unique().to_list() == ["server"]
    assert run.meta.target["lengths"]["request_tokens"] == {"n": 30, "asked": 40, "measured": 40, "worst": 0}
    assert run.meta.kind == "replay"
    assert run.meta.state == "complete"
    assert run.meta.open_loop
    assert read_run(tmp_path / "run.parquet").table.equals(run.table)
    assert os.listdir(tmp_path) == ["run.parquet"]  # the journal is gone once the run is safe


def test_connections_are_reused():
    with Mock() as mock:
        run = replay(trace(60, gap=0.02), url=mock.url)
        check(run, 60)
        sent, ended = (run.table[name].to_numpy() for name in ("sent", "ended"))
        at_once = max(int(((sent <= moment) & (ended > moment)).sum()) for moment in sent)
        # One for each request in flight and one whose end is not seen yet, 5 ahead of the rows of the next 100 ms, 3
        # for the questions before the run.
        assert mock.connections <= at_once + 9


def test_connections_are_open_before_they_are_needed():
    """A server that closes every connection after one answer costs no lateness: the next one stands ready."""
    with Mock(in_run(Behaviour(close="after"))) as mock:
        run = replay(trace(20, gap=0.2), url=mock.url)
        check(run, 20)
    assert statuses(run) == {"ok": 20}
    assert len({seen.connection for seen in mock.run}) == 20
    assert np.median([seen.at - seen.opened for seen in mock.run]) > 0.02  # they are opened up to 0.1 s ahead


def test_prompts_are_fresh_in_every_run_and_row():
    with Mock() as mock:
        for _ in range(2):
            replay(trace(10), url=mock.url)
        prompts = [seen.body["messages"][0]["content"] for seen in mock.run]
    assert len({tuple(prompt.split()[:4]) for prompt in prompts}) == 20


FAULTS = {
    "an error in the stream": (Behaviour(error_after=2), {"http_error/in_band": 12}),
    "an error at once in a 200": (Behaviour(error_after=0), {"http_error/in_band": 12}),
    "closed in mid-stream": (Behaviour(truncate_after=2), {"truncated/eof": 12}),
    "reset in mid-stream": (Behaviour(reset_after=2), {"reset/reset": 12}),
    "500": (Behaviour(status=500, body=b'{"error": {"message": "broken"}}'), {"http_error": 12}),
    "HTML in a 200": (Behaviour(body=b"<html>hello</html>", content_type="text/html"), {"truncated/bad_stream": 12}),
    "not HTTP": (Behaviour(raw=b"SSH-2.0-OpenSSH_9.6\r\n"), {"truncated/bad_http": 12}),
    "closed without a word": (Behaviour(close="before"), {"reset/eof_headers": 12}),
    "half a header": (Behaviour(raw=b"HTTP/1.1 200 OK\r\nContent-Ty"), {"reset/eof_headers": 12}),
    "a short body": (
        Behaviour(raw=b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{}"),
        {"truncated/bad_stream": 12},
    ),
    "broken chunked encoding": (
        Behaviour(raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
        {"truncated/bad_http": 12},
    ),
    "nothing to say": (Behaviour(tokens=0), {"ok/empty": 12}),
    "one document": (Behaviour(stream=False), {"ok": 12}),
    "no usage": (Behaviour(usage=False, gap=0.002), {"ok": 12}),
    "kept alive, then closed": (Behaviour(close="after"), {"ok": 12}),
    "reasoning only": (Behaviour(channel="reasoning_content"), {"ok": 12}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_become_outcomes(fault):
    behaviour, expected = FAULTS[fault]
    with Mock(in_run(behaviour)) as mock:
        run = replay(trace(), url=mock.url)
    check(run, 12)
    # A connection that the server closed may be met while it dies: that is a stale reuse, and sent again.
    assert {kind: n for kind, n in statuses(run).items() if kind != "reset/stale_reuse"} == expected
    if fault in ("closed in mid-stream", "an error in the stream"):
        assert run.table["response_tokens"].to_list() == [2] * 12
    if fault == "500":
        assert set(run.table["http_status"]) == {500}
        assert set(run.table["message"]) == {"broken"}


def test_chunks_are_counted_where_usage_is_missing():
    with Mock(in_run(Behaviour(usage=False, gap=0.005))) as mock:
        run = replay(trace(5), url=mock.url)
    check(run, 5)
    assert set(run.table["token_source"]) == {"chunks"}
    assert set(run.table["response_tokens"]) == {4}


@pytest.mark.alone
def test_a_stall_ends_at_the_timeout():
    with Mock(in_run(Behaviour(stall_after=2))) as mock:
        run = replay(trace(), url=mock.url, timeout="300ms")
    check(run, 12)
    assert statuses(run) == {"timeout/total": 12}
    took = run.table["ended"] - run.table["sent"]
    assert took.min() >= 0.29
    assert took.max() < 1


def test_a_stall_without_a_timeout_ends_with_the_drain():
    with Mock(in_run(Behaviour(stall_after=1))) as mock:
        run = replay(trace(), url=mock.url, drain_timeout=0.3)
    check(run, 12)
    assert statuses(run) == {"cancelled/in_flight_at_end": 12}


def test_a_kept_connection_that_died_is_replaced():
    """The server closes idle connections just when they are used again."""
    with Mock(idle_close=0.05) as mock:
        run = replay(trace(40, gap=0.05), url=mock.url)
    check(run, 40)
    final = run.table.group_by("request").last()
    assert set(final["status"]) == {"ok"}
    stale = run.table.filter(pl.col("reason") == "stale_reuse")
    assert set(run.table.filter(pl.col("attempt") > 1)["request"]) == set(stale["request"])


def test_stale_reuse_is_sent_again_as_attempt_2():
    """The server answers a connection's first request and closes on its second without a word."""
    served: dict[int, int] = {}

    def behave(number, seen):
        served[seen.connection] = served.get(seen.connection, 0) + 1
        return Behaviour(close="before" if served[seen.connection] == 2 else "keep")

    with Mock(behave) as mock:
        run = replay(trace(30, gap=0.05), url=mock.url)
    check(run, 30)
    assert statuses(run)["ok"] == 30
    stale = run.table.filter(pl.col("status") == "reset")
    assert len(stale) >= 1
    assert set(stale["reason"]) == {"stale_reuse"}
    assert set(stale["attempt"]) == {1}


@pytest.mark.parametrize("status", [429, 503])
def test_retries_are_attempts(status):
    """Each prompt is refused once, then served."""
    known = set()

    def behave(number, seen):
        if seen.body["max_tokens"] == 1:
            return Behaviour()
        prompt = seen.body["messages"][0]["content"]
        again = prompt in known
        known.add(prompt)
        return Behaviour() if again else Behaviour(status=status, body=b'{"error": {"message": "busy"}}')

    with Mock(behave) as mock:
        run = replay(trace(6), url=mock.url, retries=2)
    check(run, 6)
    assert statuses(run) == {"http_error": 6, "ok": 6}
    second = run.table.filter(pl.col("attempt") == 2)
    assert set(second["status"]) == {"ok"}
    first = run.table.filter(pl.col("attempt") == 1)
    assert ((second["scheduled"] - first["ended"]) > 0.2).all()
    assert second["scheduled"].n_unique() == 6


def test_retries_are_bounded():
    busy = Behaviour(status=503, body=b"{}")
    with Mock(in_run(busy)) as mock:
        run = replay(trace(3), url=mock.url, retries=1)
    check(run, 3)
    assert statuses(run) == {"http_error": 6}


def test_a_server_that_dies_during_the_run():
    started = []

    def behave(number, seen):
        if seen.body["max_tokens"] > 1 and not started:
            started.append(threading.Timer(0.9, mock.stop))
            started[0].start()
        return Behaviour(gap=0.02)

    with Mock(behave) as mock:
        run = replay(trace(60, gap=0.03, response=20), url=mock.url)
    check(run, 60)
    kinds = statuses(run)
    assert kinds.get("refused/refused", 0) > 5
    assert kinds.get("ok", 0) > 0


def test_a_prompt_of_megabytes_is_sent_whole():
    with Mock() as mock:
        run = replay(trace(3, request=600_000, gap=0.2), url=mock.url, api="completions")
        assert {len(seen.body["prompt"]) for seen in mock.run} == {600_000}
    check(run, 3)
    assert statuses(run) == {"ok": 3}
    assert run.table["sent"].null_count() == 0
    assert run.table["request_tokens"].to_list() == [600_000] * 3


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes a certificate with openssl")
def test_https(tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    )
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, key)
    with Mock(tls=tls) as mock:
        with pytest.raises(InputError, match="certificate"):
            replay(trace(5), url=mock.url)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        run = replay(trace(40, gap=0.05), url=mock.url)
        assert len({seen.connection for seen in mock.run}) < 40  # some were used again
    check(run, 40)
    assert statuses(run) == {"ok": 40}


def test_rows_without_a_prompt_are_never_sent():
    with Mock() as mock:
        run = replay(trace(4, request=[40, 0, 40, 5_000_000]), url=mock.url)
        assert len(mock.run) == 2
    check(run, 4)
    assert statuses(run) == {"cancelled/no_prompt": 1, "cancelled/prompt_too_long": 1, "ok": 2}
    assert run.meta.verdict != "CLIENT-LIMITED" or "fault" not in str(run.meta.verdict_reasons)


def test_recorded_failures_are_sent_and_carried():
    with Mock() as mock:
        run = replay(trace(4, response=[0, 4, 0, 4]), url=mock.url)
    check(run, 4)
    assert run.table["failed"].to_list() == [True, False, True, False]
    assert run.table["response_tokens"].to_list() == [1, 4, 1, 4]


def test_fields_that_the_server_refuses_are_left_out():
    with Mock(refuse=("min_tokens", "ignore_eos")) as mock:
        run = replay(trace(4), url=mock.url)
        assert all(seen.body.keys() >= {"max_tokens", "stream_options"} for seen in mock.run)
        assert not any({"min_tokens", "ignore_eos"} & seen.body.keys() for seen in mock.run)
    assert statuses(run) == {"ok": 4}
    assert sum("is left out" in text for text in run.meta.notes) == 2


def test_words_where_ids_are_refused():
    with Mock(refuse=("ids",)) as mock:
        run = replay(trace(4), url=mock.url, api="completions")
    assert run.meta.target["prompts"] == {
        "tokens": "words",
        "calibrated": True,
        "overhead": 1.0,
        "slope": 1.0,
        "check": {"asked": 40, "measured": 40},
    }
    assert run.table["request_tokens"].to_list() == [40] * 4


def test_no_ignore_eos_extra_body_and_headers():
    with Mock() as mock:
        replay(trace(2), url=mock.url, ignore_eos=False, extra_body='{"temperature": 0}', header=["X-Tenant=a=b"])
        for seen in mock.run:
            assert seen.body["temperature"] == 0
            assert "ignore_eos" not in seen.body
            assert seen.headers["x-tenant"] == "a=b"


def test_a_concurrency_limit_is_another_experiment():
    with Mock(in_run(Behaviour(first=0.1))) as mock:
        run = replay(trace(10, gap=0.001), url=mock.url, max_concurrency=2)
    check(run, 10)
    assert statuses(run) == {"ok": 10}
    assert not run.meta.open_loop
    times = run.table.sort("sent")
    for start in times["sent"]:
        assert ((times["sent"] <= start) & (times["ended"] > start)).sum() <= 2


def test_duration_leaves_later_rows_out():
    with Mock() as mock:
        run = replay(trace(10, gap=0.1), url=mock.url, duration=0.45)
    check(run, 5)
    assert "5 requests lie after --duration and are left out." in run.meta.notes


def test_warm_up_is_not_in_the_run():
    with Mock() as mock:
        run = replay(trace(5), url=mock.url, warmup=3)
        assert len(mock.run) == 8
    check(run, 5)
    assert run.meta.target["prompts"]["warmup"] == {"requests": 3, "failed": 0}


@pytest.mark.alone
def test_workers_share_the_schedule():
    with Mock() as mock:
        run = replay(trace(40, gap=0.02), url=mock.url, workers=2)
        arrived = np.array([seen.at for seen in mock.run])
    check(run, 40)
    assert statuses(run) == {"ok": 40}
    assert np.median(np.abs(np.diff(arrived) - 0.02)) < 0.005
    assert run.meta.target["workers"] == 2


def test_inside_a_running_loop():
    import asyncio

    async def notebook() -> Run:
        return replay(trace(3), url=mock.url)

    with Mock() as mock:
        check(asyncio.run(notebook()), 3)


def test_progress_is_called():
    seen = []
    with Mock() as mock:
        replay(trace(20, gap=0.1), url=mock.url, progress_callback=lambda counts: seen.append(counts.released))
    assert len(seen) >= 3
    assert seen == sorted(seen)


# --- before the run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1:9", "cannot be reached"),
        ("http://no-such-host.invalid", "cannot be resolved"),
        ("127.0.0.1:8000", "give the server's base"),
        ("ftp://127.0.0.1", "give the server's base"),
        ("http://127.0.0.1:99999", "port is not a number"),
    ],
)
def test_an_unreachable_url_is_refused(url, words, tmp_path):
    with pytest.raises(InputError, match=words):
        replay(trace(2), url=url, out=tmp_path / "run.parquet")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (Behaviour(body=b"<html></html>", content_type="text/html"), "lists no model"),
        (Behaviour(status=500, body=b"{}"), "answered 500 and lists no model"),
        (Behaviour(status=401, body=b"{}"), "API key"),
        (Behaviour(body=b'{"data": []}'), "lists no model"),
    ],
)
def test_a_server_without_models_is_refused(models, words):
    with Mock(models=models) as mock, pytest.raises(InputError, match=words):
        replay(trace(2), url=mock.url)


def test_with_a_model_named_a_broken_server_is_recorded():
    broken = Behaviour(status=500, body=b"<h1>broken</h1>")
    with Mock(lambda number, seen: broken, models=broken) as mock:
        run = replay(trace(5), url=mock.url, model="m")
    check(run, 5)
    assert statuses(run) == {"http_error": 5}
    assert any("nothing is calibrated" in text for text in run.meta.notes)


def test_a_server_that_refuses_everything_is_refused():
    refusing = Behaviour(status=400, body=b'{"error": {"message": "no such thing"}}')
    with Mock(lambda number, seen: refusing) as mock, pytest.raises(InputError, match="no such thing"):
        replay(trace(2), url=mock.url)


def test_a_port_that_is_not_http():
    with Mock(models=Behaviour()) as mock:
        mock.models = None
        with pytest.raises(InputError, match="--url"):
            replay(trace(2), url=mock.url.replace("http:", "https:"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"retries": -1}, "--retries -1"),
        ({"workers": 0}, "--workers 0"),
        ({"max_concurrency": 0}, "--max-concurrency 0"),
        ({"timeout": "soon"}, "--timeout"),
        ({"timeout": 0}, "--timeout 0"),
        ({"extra_body": "{"}, "--extra-body"),
        ({"extra_body": '{"max_tokens": 3}'}, "max_tokens comes from"),
        ({"header": ["colon: value"]}, "--header"),
        ({"header": ["A=b\r\nEvil: yes"]}, "--header"),
        ({"out": "run.txt"}, "run.txt"),
        ({"duration": 0}, "--duration"),
    ],
)
def test_wrong_settings_are_refused(options, words):
    with Mock() as mock, pytest.raises(InputError, match=words):
        replay(trace(2), url=mock.url, **options)


# --- survival --------------------------------------------------------------------------------------------------------

PROGRAM = """
import sys
sys.path.insert(0, {here!r})
from test_engine import trace
from squall.replay import replay
if __name__ == "__main__":
    run = replay(trace(150, gap=0.02, response=8), url={url!r}, out={out!r}, workers={workers})
    print(run.meta.state, len(run.table))
"""


def _start(mock: Mock, out: Path, workers: int = 1) -> subprocess.Popen:
    """A replay of 3 s in a process of its own, 1.5 s after its first request arrived."""
    program = out.with_name("program.py")
    program.write_text(PROGRAM.format(here=str(Path(__file__).parent), url=mock.url, out=str(out), workers=workers))
    process = subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not mock.run and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(1.5)
    return process


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9_leaves_a_readable_journal(tmp_path, workers):
    out = tmp_path / "run.parquet"
    with Mock() as mock:
        process = _start(mock, out, workers)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        time.sleep(0.3)  # workers see that their parent is gone, and stop
        arrived = len(mock.run)
    journal = tmp_path / "run.parquet.journal"
    run = read_run(journal)
    check(run, 150)
    assert run.meta.state == "interrupted"
    kinds = statuses(run)
    assert kinds["ok"] + kinds["cancelled/lost"] == 150
    assert arrived - 1.3 / 0.02 < kinds["ok"] <= arrived  # at most the last second is lost
    assert read_run(out).table.equals(run.table)  # the run's own name leads to its journal too
    with pytest.raises(InputError, match="left its journal"):
        replay(trace(2), url="http://127.0.0.1:9", out=out)
    lines = journal / "worker-0.jsonl"
    lines.write_bytes(lines.read_bytes() + b'{"request": 149, "att')
    assert read_journal(journal).table.equals(run.table)
    lines.write_bytes(b"nonsense\n" + lines.read_bytes())
    with pytest.raises(InputError, match="line 1 cannot be read"):
        read_journal(journal)


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_an_interrupt_ends_with_a_whole_run(number, workers, tmp_path):
    out = tmp_path / "run.parquet"
    with Mock(in_run(Behaviour(first=0.3))) as mock:
        process = _start(mock, out, workers)
        process.send_signal(number)
        said, _ = process.communicate(timeout=20)
        arrived = len(mock.run)
    assert said.split()[:2] == ["interrupted", "150"]
    run = read_run(out)
    check(run, 150)
    kinds = statuses(run)
    assert kinds["ok"] == arrived  # what was in flight was waited for
    assert kinds["cancelled/stop"] == 150 - arrived
    assert sorted(os.listdir(tmp_path)) == ["program.py", "run.parquet"]


def test_a_worker_that_dies_is_a_client_fault(tmp_path):
    out = tmp_path / "run.parquet"
    with Mock() as mock:
        process = _start(mock, out, workers=2)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not children.exists():
            process.kill()
            process.communicate()
            pytest.skip("this kernel does not list child processes")
        names = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children.read_text().split()}
        os.kill(next(pid for pid, name in names.items() if b"spawn_main" in name), signal.SIGKILL)
        said, _ = process.communicate(timeout=30)
    assert said.split()[:2] == ["failed", "150"]
    run = read_run(out)
    kinds = statuses(run)
    assert kinds["ok"] + kinds["client_fault/internal"] == 150
    assert run.meta.verdict == "CLIENT-LIMITED"


def test_no_secret_in_any_output(tmp_path, monkeypatch, capfd):
    secret, password = "sk-very-secret-key-123", "hunter2hunter2"
    monkeypatch.setenv("MY_KEY", secret)
    echo = Behaviour(status=418, body=json.dumps({"error": {"message": f"bad key {secret} {password}"}}).encode())
    with Mock(in_run(echo)) as mock:
        url = mock.url.replace("http://", f"http://user:{password}@") + "/v1?token=hidden-too"
        run = replay(trace(3), url=url, api_key_env="MY_KEY", out=tmp_path / "run.jsonl", header=[f"X-Key={secret}-2"])
        assert all(seen.headers["authorization"] == f"Bearer {secret}" for seen in mock.run)
    everything = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    everything += repr(run.meta).encode() + msgspec.json.encode(run.meta) + "".join(capfd.readouterr()).encode()
    assert b"bad key ***" in everything
    for hidden in (secret, password, "hidden-too"):
        assert hidden.encode() not in everything


# --- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.alone
def test_arrivals_at_the_server_follow_the_schedule():
    """In a server process of its own, from a bursty schedule (gamma gaps, shape 0.3, 60 requests/s)."""
    random = np.random.default_rng(4)
    n = 300
    arrival = np.cumsum(random.gamma(0.3, 1 / (0.3 * 60), n))
    bursty = Trace.of({"arrival": arrival, "request_tokens": [200] * n, "response_tokens": [16] * n}, META)
    server = subprocess.Popen([sys.executable, Path(__file__).with_name("mock.py")], stdout=subprocess.PIPE, text=True)
    try:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        run = replay(bursty, url=url)
        arrived = np.sort(json.load(urlopen(url + "/arrivals")))
    finally:
        server.terminate()
        server.wait()
    check(run, n)
    assert statuses(run) == {"ok": n}
    offset = np.median(arrived - run.table["scheduled"].sort().to_numpy())
    error = np.abs(arrived - offset - run.table["scheduled"].sort().to_numpy())
    # Wide limits: this machine may be busy with other things. docs/replay.md has what an idle one does.
    assert np.quantile(error, 0.5) < 0.003
    assert np.quantile(error, 0.9) < 0.030
    asked, seen = (np.diff(times).std() / np.diff(times).mean() for times in (arrival, arrived))
    assert abs(seen / asked - 1) < 0.1
