"""Failures as workload and as result: deadlines, hanging up, retries, bad servers; each named, none without end."""

import json
import resource
import shutil
import socket
import ssl
import subprocess
import threading
import time

import numpy as np
import polars as pl
import pytest
from mock import Behaviour, Mock  # noqa: UP026 - the file beside this one
from test_engine import check, in_run, statuses, trace

from squall.errors import InputError
from squall.replay import exchange, replay, sockets, target
from squall.replay.schedule import NOT_SENT, rows_of, schedule_of

BUSY = Behaviour(status=503, body=b'{"error": {"message": "busy"}}')


def test_the_first_token_has_a_deadline():
    with Mock(in_run(Behaviour(first=0.6))) as mock:
        run = replay(trace(4), url=mock.url, first_token_timeout=0.2)
    check(run, 4)
    assert statuses(run) == {"timeout/first": 4}
    took = (run.table["ended"] - run.table["sent"]).to_numpy()
    assert np.all((took > 0.19) & (took < 2))


def test_a_role_is_no_first_token():
    """Headers and an event without text come at once; the token does not."""
    role = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    with Mock(in_run(Behaviour(raw=head + b"%x\r\n%b\r\n" % (len(role), role), hold=True))) as mock:
        run = replay(trace(2), url=mock.url, first_token_timeout=0.2)
    assert statuses(run) == {"timeout/first": 2}


def test_a_token_in_time_is_left_alone():
    with Mock(in_run(Behaviour(first=0.02, gap=0.15))) as mock:
        run = replay(trace(3), url=mock.url, first_token_timeout=0.3, idle_timeout=0.4)
    assert statuses(run) == {"ok": 3}
    assert run.table["response_tokens"].to_list() == [4] * 3


def test_silence_has_a_deadline():
    with Mock(in_run(Behaviour(stall_after=2, gap=0.1))) as mock:
        run = replay(trace(4), url=mock.url, idle_timeout=0.25)
    check(run, 4)
    assert statuses(run) == {"timeout/idle": 4}
    assert run.table["response_tokens"].to_list() == [2] * 4
    quiet = (run.table["ended"] - run.table["last_token"]).to_numpy()
    assert np.all((quiet > 0.2) & (quiet < 2))


def test_a_share_of_the_requests_is_hung_up_on():
    with Mock(in_run(Behaviour(gap=0.05))) as mock:
        run = replay(trace(60, gap=0.01, response=12), url=mock.url, cancel_rate=0.3, cancel_after=0.2, seed=3)
    check(run, 60)
    kinds = statuses(run)
    assert set(kinds) == {"ok", "cancelled/plan"}
    assert 8 <= kinds["cancelled/plan"] <= 28  # 18 expected, 3.5 standard deviations
    cut = run.table.filter(pl.col("status") == "cancelled")
    took = (cut["ended"] - cut["sent"]).to_numpy()
    assert np.all((took > 0.19) & (took < 2))
    assert (cut["response_tokens"] > 0).all()  # in mid-stream
    assert not any("fault" in reason for reason in run.meta.verdict_reasons)
    with Mock() as mock:
        again = replay(trace(60, gap=0.001, response=2), url=mock.url, cancel_rate=0.3, cancel_after=0, seed=3)
    same = again.table.filter(pl.col("status") == "cancelled")["request"].to_list()
    assert set(same) - set(cut["request"].to_list()) <= {58, 59}  # the seed chooses; the last may end before


@pytest.mark.parametrize(("how", "expected"), [("cancel", "cancelled/plan"), ("mark", "cancelled/recorded_failure")])
def test_recorded_failures_as_workload(how, expected):
    with Mock(in_run(Behaviour(gap=0.02))) as mock:
        run = replay(
            trace(6, response=[8, 0, 8, 0, 8, 8]),
            url=mock.url,
            recorded_failures=how,
            cancel_after=0.08 if how == "cancel" else None,
        )
        assert len(mock.run) == (6 if how == "cancel" else 4)
    check(run, 6)
    assert statuses(run) == {"ok": 4, expected: 2}
    failed = run.table.filter("failed")
    assert set(failed["status"]) == {"cancelled"}
    if how == "cancel":
        assert {seen.body["max_tokens"] for seen in mock.run} == {8}  # as long as the others


def test_recorded_failures_hang_up_when_they_did():
    made = trace(3, response=[8, 0, 8])
    made = made.replace(made.table.with_columns(elapsed=pl.Series([1.0, 2.5, 1.0])))
    rows = rows_of(made)
    assert schedule_of(rows, made, failures="cancel").hang_up.tolist() == [-1, 2.5, -1]
    assert schedule_of(rows, made, failures="mark").hang_up.tolist() == [-1, NOT_SENT, -1]
    assert schedule_of(rows, made).hang_up is None


def test_a_retry_storm_comes_back_at_once():
    with Mock(in_run(BUSY)) as mock:
        run = replay(trace(5), url=mock.url, retries=3, retry_backoff=0, retry_jitter=False)
        assert len(mock.run) == 20
    check(run, 5)
    assert statuses(run) == {"http_error": 20}
    table = run.table.sort("request", "attempt")
    waits = (table["scheduled"] - table["ended"].shift()).filter(table["attempt"] > 1)
    assert waits.max() < 0.5


def test_backoff_grows_and_jitter_spreads_it():
    with Mock(in_run(BUSY)) as mock:
        run = replay(trace(8), url=mock.url, retries=2, retry_backoff=0.1)
    table = run.table.sort("request", "attempt")
    waits = (table["scheduled"] - table["ended"].shift()).filter(table["attempt"] > 1).to_numpy().reshape(8, 2)
    assert np.all((waits[:, 0] > 0.049) & (waits[:, 0] < 0.2))
    assert np.all((waits[:, 1] > 0.099) & (waits[:, 1] < 0.4))
    assert np.all(np.ptp(waits, axis=0) > (0.015, 0.03))  # of 0.1 and 0.2: eight draws lie closer once in 80,000


def test_retries_keep_to_their_budget():
    with Mock(in_run(BUSY)) as mock:
        run = replay(trace(40, gap=0.005), url=mock.url, retries=5, retry_backoff=0.001, retry_budget=0.2)
    check(run, 40)
    assert 4 <= len(run.table) - 40 <= 8
    assert run.meta.target["retry_policy"]["budget"] == 0.2


def test_what_is_retried_can_be_said():
    with Mock(in_run(Behaviour(stall_after=0))) as mock:
        run = replay(
            trace(2), url=mock.url, timeout=0.15, retries=1, retry_backoff=0.01, retry_on="timeout", drain_timeout=5
        )
    assert statuses(run) == {"timeout/total": 4}
    with Mock(in_run(Behaviour(status=500, body=b"{}"))) as mock:
        assert statuses(replay(trace(2), url=mock.url, retries=1, retry_backoff=0.01)) == {"http_error": 2}
    with Mock(in_run(Behaviour(status=500, body=b"{}"))) as mock:
        run = replay(trace(2), url=mock.url, retries=1, retry_backoff=0.01, retry_on="5xx")
        assert statuses(run) == {"http_error": 4}


@pytest.mark.parametrize("rule", [{"max_errors": 10}, {"max_error_rate": 0.5}])
def test_too_many_errors_end_the_run(rule):
    with Mock(in_run(Behaviour(status=500, body=b"{}"))) as mock:
        run = replay(trace(300, gap=0.02), url=mock.url, **rule)
    check(run, 300)
    kinds = statuses(run)
    assert 10 < kinds["http_error"] < 150
    assert kinds["cancelled/stop"] == 300 - kinds["http_error"]
    assert "failed, more than" in run.meta.target["ended_by"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cancel_rate": 1.5}, "--cancel-rate"),
        ({"cancel_after": "1s"}, "--cancel-after does nothing"),
        ({"retry_backoff": 1}, "do nothing without --retries"),
        ({"retry_budget": 0.1}, "do nothing without --retries"),
        ({"retry_jitter": False}, "do nothing without --retries"),
        ({"retries": 1, "retry_on": "418,always"}, "--retry-on always"),
        ({"retries": 1, "retry_budget": 0}, "--retry-budget"),
        ({"max_errors": -1}, "--max-errors"),
        ({"max_error_rate": 1}, "--max-error-rate"),
        ({"idle_timeout": 0}, "--idle-timeout 0"),
        ({"first_token_timeout": "soon"}, "--first-token-timeout"),
        ({"insecure": True}, "do nothing for an http"),
        ({"key": "k.pem"}, "--key"),
        ({"cacert": "missing.pem"}, "no such file"),
        ({"prompts": "missing.txt"}, "--prompts"),
        ({"resume": True}, "--resume"),
        ({"history": "live"}, "the trace has no sessions"),
        ({"recorded_failures": "mark"}, "no request failed when the trace was recorded"),
        ({"workers": 3}, "only 2 requests"),
        ({"connect_timeout": 0}, "--connect-timeout 0"),
        ({"model": " "}, "--model"),
        ({"api_key_env": "NO_SUCH_KEY"}, "no such environment variable"),
        ({"header": ["content-length=5"]}, "squall sets it itself"),
        ({"header": ["X-A=1", "x-a=2"]}, "given twice"),
    ],
)
def test_settings_that_are_wrong_or_do_nothing(options, words):
    with Mock() as mock, pytest.raises(InputError, match=words):
        replay(trace(2), url=mock.url, **options)


# --- bad input -------------------------------------------------------------------------------------------------------

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
TOKEN = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
DONE = b"data: [DONE]\n\n"


def framed(*payloads: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(payload), payload) for payload in payloads)


END = b"0\r\n\r\n"
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":-7,"completion_tokens":-1}}\n\n'
BAD = {
    "a chunk longer than it says": (HEAD + b"5\r\n" + TOKEN + b"\r\n" + END, "truncated/bad_http"),
    "a chunk shorter than it says": (HEAD + b"fff\r\n" + TOKEN + b"\r\n" + END, "truncated/eof"),
    "a size that is no number": (HEAD + framed(TOKEN) + b"zz\r\n" + END, "truncated/bad_http"),
    "a negative size": (HEAD + framed(TOKEN) + b"-5\r\nhello\r\n" + END, "truncated/bad_http"),
    "a size beyond 64 bits": (HEAD + framed(TOKEN) + b"f" * 40 + b"\r\n", "truncated/bad_http"),
    "no last chunk": (HEAD + framed(TOKEN), "truncated/eof"),
    "chunked and a length": (
        HEAD.replace(b"\r\n\r\n", b"\r\nContent-Length: 5\r\n\r\n") + framed(TOKEN, DONE) + END,
        "truncated/bad_http",
    ),
    "two lengths": (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello", "truncated/bad_http"),
    "chunk extensions and trailers": (
        HEAD + framed(TOKEN, DONE).replace(b"\r\ndata", b";a=b\r\ndata") + b"0\r\nX: y\r\n\r\n",
        "ok",
    ),
    "carriage returns": (HEAD + framed((b": hello\n\n" + TOKEN + DONE).replace(b"\n", b"\r")) + END, "ok"),
    "[DONE] twice": (HEAD + framed(TOKEN, DONE, DONE) + END, "ok"),
    "negative usage": (HEAD + framed(TOKEN, USAGE, DONE) + END, "ok"),
    "invalid UTF-8": (HEAD + framed(TOKEN.replace(b'"a"', b'"\xff\xfe"'), DONE) + END, "truncated/bad_stream"),
    "half an event": (HEAD + framed(TOKEN[:20]) + END, "truncated/eof"),
    "not JSON": (HEAD + framed(b"data: hello\n\n", DONE) + END, "truncated/bad_stream"),
    "compressed": (
        HEAD.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n") + framed(b"\x1f\x8b\x08") + END,
        "truncated/compressed",
    ),
    "a redirect": (
        b"HTTP/1.1 307 Temporary Redirect\r\nLocation: http://elsewhere/\r\nContent-Length: 0\r\n\r\n",
        "http_error",
    ),
    "an upgrade": (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n\x00\x01", "truncated/bad_http"),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", "truncated/bad_stream"),
    "not HTTP": (b"220 mail.example ESMTP\r\n", "truncated/bad_http"),
    "TLS": (b"\x15\x03\x01\x00\x02\x02\x46", "truncated/bad_http"),
    "HTTP/2": (b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x80", "truncated/bad_http"),
    "bare line feeds": (b"HTTP/1.1 200 OK\nContent-Length: 2\n\n{}", "truncated/bad_http"),
    "a flood of headers": (
        b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: %b\r\n" % (i, b"y" * 200) for i in range(4000)),
        "truncated/bad_http",
    ),
    "a flood of complete headers": (
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200_000 + b"\r\n",
        "truncated/bad_http",
    ),
    "100 Continue first": (b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + framed(TOKEN, DONE) + END, "ok"),
    "more than it announced": (b"HTTP/1.1 500 X\r\nContent-Length: 2\r\n\r\n{}{}{}", "http_error"),
    "a length without end": (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n{", "truncated/bad_http"),
}


@pytest.fixture(params=["sockets", "transports"])
def connections(request, monkeypatch):
    """Both kinds of connections: plain ones and those of asyncio, which carry TLS."""
    if request.param == "transports":
        monkeypatch.setattr(sockets, "compiled", lambda: False)


@pytest.mark.usefixtures("connections")
@pytest.mark.parametrize("kind", BAD)
def test_bad_answers_are_classified(kind):
    raw, expected = BAD[kind]
    with Mock(in_run(Behaviour(raw=raw))) as mock:
        run = replay(trace(3), url=mock.url, drain_timeout=5)
    check(run, 3)
    assert statuses(run) == {expected: 3}
    if kind == "a redirect":
        assert set(run.table["message"]) == {"redirect to http://elsewhere/"}
    if kind == "negative usage":
        assert set(run.table["token_source"]) == {"chunks"}


@pytest.mark.usefixtures("connections")
def test_a_stream_cut_at_every_byte_gives_one_answer():
    """Whatever reads the network makes of a stream, on the true connection code."""
    stream = HEAD + framed(b": hi\n\n", TOKEN, TOKEN, USAGE.replace(b"-", b""), DONE) + END
    cuts = list(range(1, len(stream), 3))
    seen = []

    def behave(number, request):
        if request.body["max_tokens"] == 1:
            return Behaviour()
        seen.append(number)
        return Behaviour(raw=stream, cut=cuts[(len(seen) - 1) % len(cuts)], keep=True)

    with Mock(behave) as mock:
        run = replay(trace(len(cuts), gap=0.004), url=mock.url, drain_timeout=5)
    check(run, len(cuts))
    assert statuses(run) == {"ok": len(cuts)}
    assert set(run.table["response_tokens"]) == {1}
    assert set(run.table["request_tokens"]) == {7}


def test_an_infinite_body_ends_with_bounded_memory(monkeypatch):
    monkeypatch.setattr(exchange, "BODY_LIMIT", 8 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Mock(in_run(Behaviour(endless=TOKEN * 100))) as mock:
        run = replay(trace(2), url=mock.url, drain_timeout=20)
    assert statuses(run) == {"truncated/bad_http": 2}
    assert "endless" in run.table["message"][0]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB, server included


def test_a_stream_that_never_ends_is_cut_at_the_drain():
    with Mock(in_run(Behaviour(gap=0.02, tokens=100_000))) as mock:
        began = time.monotonic()
        run = replay(trace(3), url=mock.url, drain_timeout=0.5)
    assert statuses(run) == {"cancelled/in_flight_at_end": 3}
    assert time.monotonic() - began < 5
    assert run.table["response_tokens"].min() > 5


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes certificates with openssl")
def test_certificates(tmp_path):
    def made(name, subject):
        key, certificate = tmp_path / f"{name}.key", tmp_path / f"{name}.pem"
        command = (
            f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN={subject} -addext subjectAltName=IP:{subject}"
        )
        subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
        return certificate, key

    certificate, key = made("server", "127.0.0.1")
    other, other_key = made("other", "127.0.0.2")
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, key)
    with Mock(tls=tls) as mock:
        assert statuses(replay(trace(3), url=mock.url, cacert=certificate)) == {"ok": 3}
        assert statuses(replay(trace(3), url=mock.url, insecure=True)) == {"ok": 3}
        with pytest.raises(InputError, match="certificate"):
            replay(trace(3), url=mock.url, cacert=other)
        with pytest.raises(InputError, match="--cacert"):
            replay(trace(3), url=mock.url, cacert=key)
        with pytest.raises(InputError, match="--cert"):
            replay(trace(3), url=mock.url, cert=certificate, key=other_key, insecure=True)
    wrong = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    wrong.load_cert_chain(other, other_key)
    with Mock(tls=wrong) as mock, pytest.raises(InputError, match="certificate"):
        replay(trace(3), url=mock.url, cacert=other)  # believed, but of another address
    strict = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=other)
    strict.load_cert_chain(certificate, key)
    strict.verify_mode = ssl.CERT_REQUIRED
    with Mock(tls=strict) as mock:
        run = replay(trace(3), url=mock.url, cacert=certificate, cert=other, key=other_key)
        assert statuses(run) == {"ok": 3}


def test_a_port_that_takes_and_says_nothing(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        held: list = []
        threading.Thread(target=lambda: held.extend(silent.accept() for _ in range(2)), daemon=True).start()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(target, "PROBE_TIMEOUT", 0.3)
        with pytest.raises(InputError, match="is it stuck"):
            replay(trace(2), url=url)


def test_errors_inside_a_200_are_retried_like_others():
    body = b"data: " + json.dumps({"error": {"message": "full", "code": 503}}).encode() + b"\n\n"
    with Mock(in_run(Behaviour(raw=HEAD + framed(body) + END))) as mock:
        run = replay(trace(2), url=mock.url, retries=1, retry_backoff=0.01)
    assert statuses(run) == {"http_error/in_band": 4}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"220 mail.example ESMTP\r\n", "no HTTP answer.*correct the host, port or scheme"),
        (b"\x15\x03\x01\x00\x02\x02F", "it speaks TLS: write https://"),
        (b"", "the connection was closed without an answer"),
        (b"HTTP/1.1 301 X\r\nLocation: https://there/v1\r\nContent-Length: 0\r\n\r\n", "redirect to https://there/v1"),
    ],
)
def test_a_port_that_is_no_such_server_is_told_before_the_run(raw, words):
    with socket.create_server(("127.0.0.1", 0)) as port:

        def serve():
            while True:
                try:
                    connection = port.accept()[0]
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(raw)

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(InputError, match=words):
            replay(trace(2), url=f"http://127.0.0.1:{port.getsockname()[1]}")


def test_a_header_of_the_users_takes_the_place_of_ours(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-the-environment")
    with Mock() as mock:
        replay(trace(2), url=mock.url, header=["authorization=Bearer sk-mine-instead", "Accept=*/*"])
    assert {seen.headers["authorization"] for seen in mock.seen} == {"Bearer sk-mine-instead"}
    assert {seen.headers["accept"] for seen in mock.seen} == {"*/*"}


def test_a_warm_up_is_sent_to_a_server_without_usage_and_left_out_loudly_before_one_that_fails():
    with Mock(lambda number, seen: Behaviour(usage=False)) as mock:
        run = replay(trace(2), url=mock.url, warmup=2)
        assert len(mock.run) == 4
    assert run.meta.target["prompts"]["warmup"] == {"requests": 2, "failed": 0}
    with Mock(lambda number, seen: Behaviour(body=b"<html>", content_type="text/html")) as mock:
        run = replay(trace(2), url=mock.url, warmup=2)
    assert statuses(run) == {"truncated/bad_stream": 2}
    (note,) = [text for text in run.meta.notes if "before the run failed" in text]
    assert "truncated/bad_stream, HTTP 200: what came is no answer of this API: <html>" in note
    assert "The warm-up is left out." in note
    assert not any("reports no usage" in text for text in run.meta.notes)
