"""The recording proxy as a program, driven by raw sockets and the official client, before a scripted upstream."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import polars as pl
import pytest

import squall
import squall.seeds
from squall.errors import InputError

CANARY = "xyzzy-canary"
STREAM = [
    b'data: {"id":"a","choices":[{"delta":{"role":"assistant","content":""}}],"usage":null}\n\n',
    b'data: {"id":"a","choices":[{"delta":{"content":"xyzzy-canary"}}],"usage":null}\n\n',
    b'data: {"id":"a","choices":[{"delta":{"content":" two"}}]}\n\n',
    b'data: {"id":"a","choices":[{"delta":{},"finish_reason":"stop"}]}\n\n',
    b'data: {"id":"a","choices":[],"usage":{"prompt_tokens":21,"completion_tokens":2}}\n\n',
    b"data: [DONE]\n\n",
]
DOCUMENT = (
    b'{"id":"b","choices":[{"message":{"content":"xyzzy-canary three"}}],'
    b'"usage":{"prompt_tokens":9,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":4}}}'
)


def document(body: bytes, status: str = "200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\nX-Odd:  kept \r\nContent-Length: %d\r\n\r\n" % (status.encode(), len(body)) + body


def streamed(events: list[bytes]) -> list[bytes]:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
    return [head, *(b"%x\r\n%s\r\n" % (len(event), event) for event in events), b"0\r\n\r\n"]


class Upstream:
    """Answers each request with what `behave` says: pieces of bytes to write, a pause (float), or None to close."""

    def __init__(self, behave: Callable[[bytes], list], tls: ssl.SSLContext | None = None) -> None:
        self.behave, self.seen, self.closed, self.tls = behave, [], threading.Event(), tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        try:
            if self.tls:
                connection = self.tls.wrap_socket(connection, server_side=True)
            while request := read_message(connection):
                self.seen.append(request)
                for piece in self.behave(request):
                    if piece is None:
                        connection.close()
                        return
                    if isinstance(piece, float):
                        time.sleep(piece)
                    else:
                        connection.sendall(piece)
        except OSError:
            self.closed.set()

    def close(self) -> None:
        self._listener.close()


def read_message(connection: socket.socket) -> bytes:
    """A request with its body of known length; b"" at the end."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(65536)
        if not more:
            return b""
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    while lengths and len(body) < int(lengths[0]):
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def serve(request: bytes) -> list:
    if b'"stream":true' in request:
        events = STREAM if b'"include_usage":true' in request else [*STREAM[:4], STREAM[5]]
        return [piece for part in streamed(events) for piece in (part, 0.005)]
    return [document(DOCUMENT)]


class Proxy:
    """A `squall capture` of its own; with `room`, on a disk that takes no file of more bytes."""

    def __init__(self, upstream: str, out: Path, *flags: str, room: int | None = None) -> None:
        self.out = out
        command = [sys.executable, "-m", "squall", "capture", "--upstream", upstream, "-o", str(out), "--port", "0"]
        self.process = subprocess.Popen(
            [*command, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
            preexec_fn=None if room is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
        )
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        self.url = json.loads(line)["url"]
        self.port = int(self.url.rpartition(":")[2])

    def say(self, data: bytes, wait: float = 10.0) -> bytes:
        """Everything that is answered to `data` on one connection until it closes or is silent for half a second."""
        with socket.create_connection(("127.0.0.1", self.port), wait) as connection:
            connection.sendall(data)
            answer = b""
            while True:
                connection.settimeout(wait if not answer else 0.5)
                try:
                    more = connection.recv(65536)
                except TimeoutError:
                    return answer
                if not more:
                    return answer
                answer += more

    def wait_for(self, text: str) -> None:
        """Until /squall/metrics has `text`."""
        end = time.monotonic() + 20
        while text.encode() not in self.say(b"GET /squall/metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"):
            assert time.monotonic() < end, text
            time.sleep(0.05)

    def stop(self) -> "squall.run.Run":
        self.process.send_signal(signal.SIGTERM)
        _, said = self.process.communicate(timeout=20)
        assert self.process.returncode == 0, said
        return squall.read_run(self.out / "run.parquet")


@contextmanager
def proxy(behave: Callable[[bytes], list], out: Path, *flags: str) -> Iterator[tuple[Proxy, Upstream]]:
    upstream = Upstream(behave)
    it = Proxy(upstream.url, out, *flags)
    try:
        yield it, upstream
    finally:
        it.process.kill()
        it.process.wait()
        upstream.close()


def post(body: bytes | dict, path: str = "/v1/chat/completions", extra: bytes = b"") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body, separators=(",", ":")).encode()
    head = b"POST %s HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer sk-%s\r\n%sContent-Length: %d\r\n\r\n"
    return head % (path.encode(), CANARY.encode(), extra, len(data)) + data


def chat(*texts: str, **more: object) -> dict:
    roles = ("user", "assistant")
    return {
        "model": "m",
        "messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)],
        **more,
    }


def body_of(answer: bytes) -> bytes:
    """The decoded body of a chunked answer."""
    rest, body = answer.partition(b"\r\n\r\n")[2], b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return body


def test_capture_relays_bytes_and_records_no_content(tmp_path: Path) -> None:
    with proxy(serve, tmp_path / "c") as (it, upstream):
        asks = chat(CANARY, stream=True, stream_options={"include_usage": True}, user=CANARY)
        assert it.say(post(asks)) == b"".join(streamed(STREAM))
        assert it.say(post(chat(CANARY))) == document(DOCUMENT)
        assert it.say(post({"input": CANARY}, "/v1/embeddings")) == document(DOCUMENT)
        two = post({"model": "m", "prompt": [5] * 130}, "/v1/completions") + post(chat(CANARY))
        assert it.say(two) == document(DOCUMENT) * 2  # pipelined: in order
        hidden = it.say(post(chat(CANARY, stream=True)))
        without = b"".join(event.replace(b',"usage":null', b"") for event in [*STREAM[:4], STREAM[5]])
        assert body_of(hidden) == without
        assert b"accept-encoding: identity" in upstream.seen[0].lower()
        assert upstream.seen[0].split(b"\r\n\r\n", 1)[1] == json.dumps(asks, separators=(",", ":")).encode()
        run = it.stop()
    assert run.table["status"].to_list() == ["ok"] * 5
    assert run.table["request_tokens"].to_list() == [21, 9, 9, 9, 21]
    assert run.table["response_tokens"].to_list() == [2, 3, 3, 3, 2]
    assert run.table["cached_tokens"].to_list() == [None, 4, 4, 4, None]
    trace = squall.read_trace(it.out / "trace.parquet")
    blocks = trace.table["prefix"].to_list()
    assert len(blocks[2]) == 3  # 130 token ids in blocks of 64
    assert blocks[1] == blocks[3] != blocks[2]
    assert trace.meta.block_size == 64
    for file in it.out.iterdir():
        assert CANARY.encode() not in file.read_bytes()


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes a certificate with openssl")
def test_capture_speaks_tls_to_its_upstream(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    )
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, key)
    upstream = Upstream(serve, tls)
    answers = []
    for flags in ((), ("--insecure",)):  # nobody vouches for the certificate
        it = Proxy(upstream.url, tmp_path / f"c{len(answers)}", *flags)
        answers.append((it.say(post(chat("u"))), it.stop().table["reason"].to_list()))
    upstream.close()
    assert answers[0][0].startswith(b"HTTP/1.1 502")
    assert answers[0][1] == ["tls"]
    assert answers[1] == (document(DOCUMENT), [None])


def test_capture_warns_where_everyone_can_reach_it(tmp_path: Path) -> None:
    upstream = Upstream(serve)
    it = Proxy(upstream.url, tmp_path / "c", "--host", "0.0.0.0")
    it.process.send_signal(signal.SIGTERM)
    assert "everyone who reaches it can use the server" in it.process.communicate(timeout=20)[1]
    upstream.close()


def test_capture_follows_conversations_of_the_official_client(tmp_path: Path) -> None:
    with proxy(serve, tmp_path / "c") as (it, _):
        client = openai.OpenAI(base_url=f"{it.url}/v1", api_key="k", max_retries=0)
        messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
        for _ in range(3):
            with client.chat.completions.create(model="m", messages=messages, stream=True) as stream:
                chunks = list(stream)
            assert all(chunk.usage is None and chunk.choices for chunk in chunks)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "more"}]
        client.chat.completions.create(model="m", messages=messages[:2])
        other = openai.OpenAI(base_url=f"{it.url}/v1", api_key="another", max_retries=0)
        other.chat.completions.create(model="m", messages=messages[:4])
        for _ in range(2):
            other.completions.create(model="m", prompt="p", extra_headers={"X-Session-Id": "7"})
        it.stop()
    table = squall.read_trace(it.out / "trace.parquet").table
    assert table["turn"].to_list() == [1, 2, 3, 1, 1, 1, 2]
    first = table["session"][0]
    assert (table["session"] == first).to_list() == [True] * 3 + [False] * 4


def test_capture_follows_the_responses_api(tmp_path: Path) -> None:
    made = [b'data: {"type":"response.created","response":{"id":"resp_1"}}\n\n']
    usage = b'"usage":{"input_tokens":6,"output_tokens":1}'
    done = b'data: {"type":"response.completed","response":{"id":"resp_1",%s}}\n\n' % usage
    text = b'data: {"type":"response.output_text.delta","delta":"xyzzy-canary"}\n\n'

    def behave(request: bytes) -> list:
        if b'"stream":true' in request:
            return streamed([*made, text, done])
        return [
            document(b'{"id":"resp_2","object":"response","output":[],"usage":{"input_tokens":7,"output_tokens":2}}')
        ]

    with proxy(behave, tmp_path / "c") as (it, _):
        it.say(post({"model": "m", "input": "a", "stream": True}, "/v1/responses"))
        it.say(post({"model": "m", "input": "b", "previous_response_id": "resp_1"}, "/v1/responses"))
        it.say(post({"model": "m", "input": "c", "previous_response_id": "resp_2"}, "/v1/responses"))
        run = it.stop()
    table = squall.read_trace(it.out / "trace.parquet").table
    assert table["turn"].to_list() == [1, 2, 3]
    assert table["session"].n_unique() == 1
    assert run.table["request_tokens"].to_list() == [6, 7, 7]
    assert run.table["status"].to_list() == ["ok"] * 3


@pytest.mark.alone
def test_what_replay_sends_is_what_capture_records(tmp_path: Path) -> None:
    from squall.trace import Trace, TraceMeta

    count = 300
    random = squall.seeds.stream(1, "test")
    arrival = random.gamma(0.3, 0.03 / 0.3, count).cumsum()
    lengths = {"request_tokens": random.integers(20, 400, count), "response_tokens": random.integers(1, 40, count)}
    sent = Trace.of({"arrival": arrival - arrival[0], **lengths}, TraceMeta(source="test", format="generated"))
    mock = Path(__file__).parents[1] / "replay" / "mock.py"
    with subprocess.Popen([sys.executable, str(mock)], stdout=subprocess.PIPE, text=True) as server:
        port = server.stdout.readline().strip()
        it = Proxy(f"http://127.0.0.1:{port}", tmp_path / "c")
        run = squall.replay(sent, url=it.url, out=tmp_path / "run.parquet", api="completions", model="mock")
        it.stop()
        server.kill()
    got = squall.read_trace(it.out / "trace.parquet").table.tail(count)  # before them: the questions of the pre-flight
    shift = run.table["sent"] - (got["arrival"] - got["arrival"][0])
    assert (shift - shift[0]).abs().max() < 0.005
    assert got["request_tokens"].to_list() == run.table["request_tokens"].to_list()
    assert got["response_tokens"].to_list() == sent.table["response_tokens"].to_list()


@pytest.mark.alone
def test_the_loop_closes_replay_capture_serve(tmp_path: Path) -> None:
    """What was sent is what was captured, and characterising either gives the same numbers."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
    from serving import serving

    from squall.trace import Trace, TraceMeta

    count, random = 240, squall.seeds.stream(2, "test")
    arrival = random.gamma(0.3, 0.05 / 0.3, count).cumsum()
    lengths = {"request_tokens": random.integers(20, 400, count), "response_tokens": random.integers(1, 60, count)}
    sent = Trace.of({"arrival": arrival - arrival[0], **lengths}, TraceMeta(source="test", format="generated"))
    with serving(speed=4.0) as (host, port, _):
        it = Proxy(f"http://{host}:{port}", tmp_path / "c")
        run = squall.replay(sent, url=it.url, out=tmp_path / "run.parquet", api="completions", model="modelled")
        it.stop()
    whole = squall.read_trace(it.out / "trace.parquet")
    got = whole.replace(whole.table.tail(count).with_columns(pl.col("arrival") - whole.table["arrival"][-count]))
    assert (run.table["status"] == "ok").all()
    shift = run.table["sent"] - got.table["arrival"]
    assert (shift - shift[0]).abs().max() < 0.005
    assert got.table["request_tokens"].to_list() == sent.table["request_tokens"].to_list()
    assert got.table["response_tokens"].to_list() == sent.table["response_tokens"].to_list()
    assert got.table["failed"].to_list() == sent.table["failed"].to_list()
    asked, seen = squall.characterize(sent), squall.characterize(got)
    assert (asked.requests, asked.failed_share) == (seen.requests, seen.failed_share)
    assert seen.rate == pytest.approx(asked.rate, rel=1e-3)
    for one, other in zip(asked.classes, seen.classes, strict=True):
        assert other.gaps.cv == pytest.approx(one.gaps.cv, rel=0.01)
        for name in ("request_tokens", "response_tokens"):
            ours, theirs = getattr(one, name), getattr(other, name)
            assert (ours.mean, ours.p50, ours.p99, ours.max) == (theirs.mean, theirs.p50, theirs.p99, theirs.max)


def test_capture_tells_what_failed_and_whose_fault_it_was(tmp_path: Path) -> None:
    def behave(request: bytes) -> list:
        if b"cut" in request:
            return [*streamed(STREAM)[:3], None]
        if b"mute" in request:
            return [None]
        if b"slow" in request:
            return [piece for part in streamed(STREAM * 400) for piece in (part, 0.01)]
        if b"garbage" in request:
            return [b"SSH-2.0-OpenSSH\r\n", None]
        if b"hang" in request:
            return [5.0]
        return [document(b'{"error":{"message":"xyzzy-canary","code":429}}', "429 Too Many")]

    with proxy(behave, tmp_path / "c", "--timeout", "1s") as (it, upstream):
        assert it.say(post(chat("cut", stream=True))).startswith(b"HTTP/1.1 200")
        assert it.say(post(chat("mute"))).startswith(b"HTTP/1.1 502")
        assert it.say(post(chat("garbage"))).startswith(b"HTTP/1.1 502")
        assert it.say(post(chat("fine"))).startswith(b"HTTP/1.1 429")
        assert it.say(post(chat("hang"))).startswith(b"HTTP/1.1 504")
        with socket.create_connection(("127.0.0.1", it.port)) as connection:
            connection.sendall(post(chat("slow", stream=True)))
            answer = b""
            while b"two" not in answer:
                answer += connection.recv(100)
        assert upstream.closed.wait(5), "a client that hangs up is to cancel the request upstream"
        upstream.close()
        for _ in range(2):  # on what was pooled, and on a new connection
            assert it.say(post(chat("fine"))).split()[1] in (b"429", b"502")
        run = it.stop()
    outcomes = list(zip(run.table["status"], run.table["reason"], strict=True))[:6]
    assert outcomes == [
        ("truncated", "eof"),
        ("reset", "eof_headers"),
        ("truncated", "bad_http"),
        ("http_error", None),
        ("timeout", "idle"),
        ("cancelled", "client"),
    ]
    assert run.table["message"].null_count() == len(run.table)
    failed = squall.read_trace(it.out / "trace.parquet").table["failed"][:6].to_list()
    assert failed == [True] * 5 + [False]  # who hangs up has been served what it got


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"this is not http\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999\r\n\r\n" + b"x" * 99999, 413),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X-A: " + b"y" * 300_000 + b"\r\n\r\n", 431),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length : 3\r\n\r\nabc", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +3\r\n\r\nabc", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX-A: b\x00c\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n", 501),
        (b"GET /squall/nothing HTTP/1.1\r\nHost: a\r\n\r\n", 404),
    ],
)
def test_capture_refuses_what_must_not_reach_the_upstream(
    data: bytes, code: int, strict: tuple[Proxy, Upstream]
) -> None:
    it, upstream = strict
    before = len(upstream.seen)
    assert it.say(data).startswith(b"HTTP/1.1 %d" % code)
    assert len(upstream.seen) == before


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Proxy, Upstream]]:
    flags = ("--max-body", "10000", "--rate-limit", "5")
    with proxy(serve, tmp_path_factory.mktemp("strict") / "c", *flags) as both:
        yield both


def test_capture_passes_malformed_bodies_on_and_limits_the_rate(strict: tuple[Proxy, Upstream]) -> None:
    it, upstream = strict
    assert it.say(post(b'{"model": 7, "messages": "no')) == document(DOCUMENT)
    assert upstream.seen[-1].endswith(b'{"model": 7, "messages": "no')
    codes = [answer.split()[0] for answer in it.say(post(chat("a")) * 12).split(b"HTTP/1.1 ")[1:]]
    assert codes.count(b"429") >= 5
    assert b"200" in codes
    page = it.say(b"GET /squall/metrics HTTP/1.1\r\nHost: a\r\n\r\n").decode()
    assert f'squall_requests_total{{status="http_error"}} {codes.count(b"429")}' in page
    assert "squall_window_gap_cv" in page
    assert b'"ok"' in it.say(b"GET /squall/health HTTP/1.1\r\nHost: a\r\n\r\n")


def test_a_chunked_request_reaches_the_upstream_with_its_length(strict: tuple[Proxy, Upstream]) -> None:
    it, upstream = strict
    head = b"POST /v1/../../etc/passwd HTTP/1.1\r\nHost: evil\r\nTransfer-Encoding: chunked\r\nTE: trailers\r\n"
    head += b"Connection: keep-alive, X-Hop\r\nX-Hop: mine\r\n\r\n"
    assert it.say(head + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n").split()[1] in (b"200", b"429")
    time.sleep(1.1)  # until the rate limit of this proxy lets one through in any case
    assert it.say(head + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n") == document(DOCUMENT)
    seen = upstream.seen[-1].lower()
    assert seen.endswith(b"content-length: 5\r\n\r\nabcde")
    assert b"transfer-encoding" not in seen
    assert b"evil" not in seen
    assert b"x-hop" not in seen
    assert seen.count(b"host:") == 1


@pytest.mark.parametrize(
    "usage",
    [
        b'{"prompt_tokens":-5,"completion_tokens":99999999999999999999}',
        b'{"prompt_tokens":"many","completion_tokens":1.5}',
        b'{"prompt_tokens":true,"completion_tokens":[1]}',
        b'{"prompt_tokens":null,"prompt_tokens_details":{"cached_tokens":-1}}',
        b'"none"',
    ],
)
def test_a_server_that_lies_about_its_tokens_breaks_no_segment(tmp_path: Path, usage: bytes) -> None:
    told = DOCUMENT.replace(DOCUMENT[DOCUMENT.index(b'{"prompt_tokens"') : -1], usage)
    events = [*STREAM[:4], b'data: {"id":"a","choices":[],"usage":' + usage + b"}\n\n", STREAM[5]]

    def behave(request: bytes) -> list:
        return streamed(events) if b'"stream":true' in request else [document(told)]

    with proxy(behave, tmp_path / "c") as (it, _):
        assert it.say(post(chat("a"))) == document(told)
        assert b"canary" in it.say(post(chat("a", stream=True)))
        run = it.stop()
    assert run.table["request_tokens"].to_list() == [None, None]
    assert run.table["response_tokens"].to_list()[1] == 2  # the pieces are counted
    assert run.table["token_source"].to_list()[1] == "chunks"
    assert run.table["status"].to_list() == ["ok"] * 2  # the answer is none the worse for it
    assert squall.read_trace(it.out / "trace.parquet").table["request_tokens"].min() > 0


def test_a_full_disk_does_not_stop_the_traffic(tmp_path: Path) -> None:
    """No file of more than 6,000 bytes can be written; answers go on, and what is lost is counted."""
    upstream = Upstream(serve)
    it = Proxy(upstream.url, tmp_path / "c", room=6000)
    try:
        for _ in range(3):
            for _ in range(10):
                assert it.say(post(chat("a"), extra=b"Connection: close\r\n")) == document(DOCUMENT)
            time.sleep(1.1)
        page = it.say(b"GET /squall/metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").decode()
        counts = {
            name: int(re.search(rf"^squall_records_{name}_total (\d+)$", page, re.MULTILINE)[1])
            for name in ("written", "dropped")
        }
        assert counts["dropped"] > 0
        assert counts["written"] > 0
        assert sum(counts.values()) == 30
        it.process.send_signal(signal.SIGTERM)
        _, said = it.process.communicate(timeout=20)
        assert it.process.returncode == 0
        assert f"{counts['dropped']} records could not be written" in said
        assert "--finish" in said
    finally:
        it.process.kill()
        it.process.wait()
        upstream.close()
    trace, _ = squall.capture.finish(it.out)  # now there is room
    assert len(trace) == counts["written"]


def test_a_slow_disk_does_not_slow_the_traffic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from squall.capture.record import Captured, Header, Recorder

    stuck = threading.Event()
    monkeypatch.setattr("squall.capture.record.FLUSH", 0.01)
    monkeypatch.setattr("squall.capture.record.MOST_WAITING", 50)
    monkeypatch.setattr("squall.capture.record.os.write", lambda file, data: (stuck.wait(10), len(data))[1])
    header = Header(upstream="http://u", epoch=10**18, midnight=0.0, weekday=0)
    recorder = Recorder(tmp_path, header, rotate_seconds=100, rotate_bytes=10**9)
    recorder.take(Captured(arrival=0.0, ended=1.0, status="ok"))
    time.sleep(0.1)  # the writer hangs in its first write
    began = time.monotonic()
    for _ in range(200):
        recorder.take(Captured(arrival=0.0, ended=1.0, status="ok"))
    assert time.monotonic() - began < 0.1
    assert recorder.dropped == 150
    stuck.set()
    recorder.close()
    assert recorder.written == 51


def test_capture_killed_loses_two_seconds_at_most(tmp_path: Path) -> None:
    out = tmp_path / "c"
    with proxy(serve, out, "--rotate-size", "2000") as (it, _):
        ended = []
        began = time.monotonic()
        while time.monotonic() - began < 4:
            it.say(post(chat(CANARY), extra=b"Connection: close\r\n"))
            ended.append(time.monotonic())
        it.process.kill()
        killed = time.monotonic()
        it.process.wait()
    for file in out.iterdir():
        assert CANARY.encode() not in file.read_bytes()
    closed = {file: file.read_bytes() for file in out.glob("*-?????.parquet")}
    assert closed
    trace, _ = squall.capture.finish(out)
    assert sum(moment < killed - 2 for moment in ended) <= len(trace) <= len(ended)
    assert all(file.read_bytes() == before for file, before in closed.items())


def test_capture_killed_loses_only_what_was_not_yet_written(tmp_path: Path) -> None:
    out = tmp_path / "c"
    with proxy(serve, out, "--rotate-size", "1000") as (it, _):
        for batch in (5, 10, 15):
            it.say(post(chat("a")) * 5)
            it.wait_for(f"squall_records_written_total {batch}\n")
        it.process.kill()
        it.process.wait()
    live = [*out.glob("live-*.jsonl")]
    if live:
        live[0].write_bytes(live[0].read_bytes() + b'{"arrival": 3, "en')
    else:  # killed right after a segment was closed: an unfinished one beside it
        (out / "live-00009.jsonl").write_bytes(b'{"arrival": 3, "en')
    trace, run = squall.capture.finish(out)
    assert len(trace) == len(run) == 15
    assert len([*out.glob("trace-*.parquet")]) >= 2
    assert trace.table["arrival"].is_sorted()
    assert (run.table["scheduled"] - trace.table["arrival"]).abs().max() < 1e-6
    assert squall.read_run(out / "run.parquet").table.equals(run.table)
    with proxy(serve, out) as (it, _):  # the folder is continued
        it.say(post(chat("a")))
        assert len(it.stop().table) == 16


def test_capture_goes_on_when_the_disk_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from squall.capture.record import Captured, Header, Recorder, finish, write_header

    header = Header(upstream="http://u", epoch=10**18, midnight=0.0, weekday=0)
    write_header(tmp_path, header)
    monkeypatch.setattr("squall.capture.record.FLUSH", 0.05)
    recorder = Recorder(tmp_path, header, rotate_seconds=100, rotate_bytes=10**9)
    write, full = os.write, threading.Event()

    def scarce(file: int, data: memoryview) -> int:
        if full.is_set():
            write(file, data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        return write(file, data)

    monkeypatch.setattr("squall.capture.record.os.write", scarce)
    for number in range(30):
        if number in (10, 20):
            deadline = time.monotonic() + 5
            while recorder.written + recorder.dropped < number and time.monotonic() < deadline:
                time.sleep(0.01)
            full.set() if number == 10 else full.clear()
        recorder.take(Captured(arrival=float(number), ended=number + 0.5, status="ok", response_tokens=1))
    recorder.close()
    assert (recorder.written, recorder.dropped) == (20, 10)
    trace, _ = finish(tmp_path)
    assert trace.table["arrival"].to_list() == [float(n) for n in (*range(10), *range(20, 30))]


def test_capture_says_what_is_wrong_with_a_call(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("x")
    for options in (
        {"upstream": "ftp://x", "out": tmp_path / "c"},
        {"upstream": "http://user:secret@x", "out": tmp_path / "c"},
        {"upstream": "http://x", "out": tmp_path},
        {"upstream": "http://x", "out": tmp_path / "other"},
        {"upstream": "http://x", "out": tmp_path / "c", "rate_limit": 0},
        {"upstream": "http://x", "out": tmp_path / "c", "insecure": True},
    ):
        with pytest.raises(InputError) as error:
            squall.capture(**options)
        assert "secret" not in str(error.value)
    with pytest.raises(InputError, match=r"not the folder of a capture"):
        squall.capture.finish(tmp_path)
