"""The served cluster as its clients meet it: the official OpenAI client, raw sockets, and squall's own replay."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from urllib.request import urlopen

import numpy as np
import openai
import pytest
from serving import serving

from squall import progress
from squall.errors import InputError
from squall.replay import replay
from squall.replay.scrape import read_page
from squall.run import metrics
from squall.serve import _recorded, http, serve
from squall.simulate import simulate
from squall.trace.table import Trace, TraceMeta

META = TraceMeta(source="test", format="generated")


@pytest.fixture(scope="module")
def served():
    with serving() as (host, port, service):
        yield f"http://{host}:{port}", service


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)


def wire(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    found = socket.create_connection((host, int(port)), timeout=10)
    found.settimeout(10)
    return found


def everything(found: socket.socket) -> bytes:
    data = b""
    try:
        while more := found.recv(1 << 16):
            data += more
    except ConnectionResetError:
        pass
    return data


def post(path: str, body: bytes, *more: str) -> bytes:
    head = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *more]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def settled(service, within: float = 5.0) -> bool:
    """Whether the cluster comes to rest."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        if all((load.running, load.waiting, load.kv_used) == (0, 0, 0.0) for load in service.live.loads()):
            return True
        time.sleep(0.02)
    return False


# --- the official client ----------------------------------------------------------------------------------------------


def test_chat_with_the_official_client(served):
    url, _ = served
    messages = [{"role": "user", "content": "one two three"}]
    whole = client(url).chat.completions.create(model="modelled", messages=messages, max_tokens=7)
    assert whole.choices[0].message.content.split() == ["tok"] * 7
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (11, 7)
    assert whole.choices[0].finish_reason == "length"
    stream = client(url).chat.completions.create(
        model="modelled", messages=messages, max_tokens=7, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text.split() == ["tok"] * 7
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.total_tokens == 18
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_completions_with_the_official_client(served, tokens):
    url, _ = served
    whole = client(url).completions.create(model="modelled", prompt=[5, 6, 7, 8], max_tokens=tokens)
    assert whole.usage.prompt_tokens == 4
    assert len(whole.choices[0].text.split()) == tokens
    chunks = list(client(url).completions.create(model="modelled", prompt="a b", max_tokens=tokens, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks).split() == ["tok"] * tokens
    assert all(chunk.usage is None for chunk in chunks)  # not asked for


def test_models_health_and_tokens(served):
    url, _ = served
    (model,) = client(url).models.list().data
    assert (model.id, model.max_model_len) == ("modelled", 8192)
    assert urlopen(f"{url}/health").status == 200
    body = json.dumps({"prompt": "a b c"}).encode()
    assert json.loads(urlopen(f"{url}/tokenize", body).read())["count"] == 3
    whole = client(url).completions.create(model="modelled", prompt="a")
    assert whole.usage.completion_tokens == 16  # without max_tokens


def test_errors_as_the_official_client_sees_them(served):
    url, _ = served
    chat = client(url).chat.completions
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        chat.create(model="another", messages=messages)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        chat.create(model="modelled", messages=messages, max_tokens=9000)
    with pytest.raises(openai.BadRequestError, match="at least 1"):
        chat.create(model="modelled", messages=messages, max_tokens=0)
    with pytest.raises(openai.BadRequestError, match="one answer"):
        chat.create(model="modelled", messages=messages, n=2)
    with pytest.raises(openai.BadRequestError, match="messages are missing"):
        chat.create(model="modelled", messages=[])


def test_limits_and_injected_failures():
    with serving(queue_limit=1, max_num_seqs=1, speed=5.0) as (host, port, service):
        url = f"http://{host}:{port}"
        outcomes: list[str] = []

        def ask() -> None:
            try:
                client(url).completions.create(model="modelled", prompt="a", max_tokens=200)
                outcomes.append("ok")
            except openai.RateLimitError:
                outcomes.append("429")

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outcomes.count("ok") >= 2
        assert outcomes.count("429") >= 3
        page = urlopen(f"{url}/metrics").read().decode()
        assert f'squall:refused_total{{model_name="modelled",code="429"}} {float(outcomes.count("429"))}' in page
        assert settled(service)
    with (
        serving(failing=lambda at: 1.0) as (host, port, _),
        pytest.raises(openai.InternalServerError, match="injected"),
    ):
        client(f"http://{host}:{port}").completions.create(model="modelled", prompt="a")


def test_a_timeout_of_the_modelled_clock():
    with serving(timeout=2.0, speed=1.0) as (host, port, service):
        began = time.monotonic()
        stream = client(f"http://{host}:{port}").completions.create(
            model="modelled", prompt="a", max_tokens=5000, stream=True
        )
        with pytest.raises(openai.APIError, match="no complete answer"):
            list(stream)
        assert 1.5 < time.monotonic() - began < 6
        assert settled(service)


# --- policies ---------------------------------------------------------------------------------------------------------


def test_prompts_that_begin_alike_are_found_in_the_cache():
    with serving(prefix_caching=True) as (host, port, service):
        url = f"http://{host}:{port}"
        ask = client(url).chat.completions.create
        system = {"role": "system", "content": " ".join(f"w{k}" for k in range(200))}

        def cached(*texts: str, **more) -> int:
            messages = [system, *({"role": "user", "content": text} for text in texts)]
            return ask(
                model="modelled", messages=messages, max_tokens=2, **more
            ).usage.prompt_tokens_details.cached_tokens

        assert cached("one") == 0
        assert cached("two") == 208 // 16 * 16  # the template, the system's words
        assert cached("two") == 208 // 16 * 16  # the last block is never full
        assert cached("two", extra_body={"cache_salt": "mine"}) == 0
        assert cached("two", extra_body={"cache_salt": "mine"}) == 208 // 16 * 16
        chunks = ask(
            model="modelled",
            messages=[system],
            max_tokens=2,
            stream=True,
            stream_options={"include_usage": True},
        )
        assert list(chunks)[-1].usage.prompt_tokens_details.cached_tokens == 192  # of 208: one token is always computed
        ids = client(url).completions.create(model="modelled", prompt=list(range(100)), max_tokens=2)
        again = client(url).completions.create(model="modelled", prompt=[*range(64), *range(900, 950)], max_tokens=2)
        assert ids.usage.prompt_tokens_details.cached_tokens == 0
        assert again.usage.prompt_tokens_details.cached_tokens == 64
        page = urlopen(f"{url}/metrics").read().decode()
        assert 'enable_prefix_caching="True"' in page
        hits = 208 * 3 + 192 + 64
        assert f'vllm:prefix_cache_hits_total{{model_name="modelled",engine="0"}} {float(hits)}' in page
        assert "w7" not in repr(vars(service)) + repr(service.live._hashes.ids)
        assert not service.live._hashes._sizes  # nothing is kept of requests that are over
        assert settled(service)


def test_priorities_are_the_requests_own():
    with serving(scheduler="priority", max_num_seqs=1, speed=5.0) as (host, port, service):
        ended: list[int] = []

        def ask(priority: int) -> None:
            body = {"priority": priority}
            client(f"http://{host}:{port}").completions.create(
                model="modelled", prompt="a", max_tokens=400, extra_body=body
            )
            ended.append(priority)

        threads = [threading.Thread(target=ask, args=(priority,)) for priority in (0, 5, 3, 4, -1)]
        threads[0].start()
        deadline = time.monotonic() + 30
        while service.live.loads()[0].running == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        for thread in threads[1:]:
            thread.start()
        for thread in threads:
            thread.join()
        assert ended == [0, -1, 3, 4, 5]  # the first one was already running
        assert settled(service)


def test_an_order_of_ones_own_that_fails_or_takes_long_is_told(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(progress.notes, "shown", True)
    path = tmp_path / "own.py"
    path.write_text(
        "from math import sin\n\n"
        "def slow(request_tokens):\n"
        "    if request_tokens == 3:\n        raise ValueError('no threes')\n"
        "    value = request_tokens\n"
        "    for _ in range(400_000 if request_tokens == 2 else 1):\n        value = sin(value)\n"
        "    return value\n"
    )
    with serving(scheduler=f"{path}:slow") as (host, port, service):
        ask = client(f"http://{host}:{port}").completions.create
        for prompt in ("a", "a"):
            ask(model="modelled", prompt=prompt, max_tokens=2)
        assert "took" not in capfd.readouterr().err
        for _ in range(2):
            ask(model="modelled", prompt="a b", max_tokens=2)
        assert capfd.readouterr().err.count("every stream waited for it") == 1
        with pytest.raises(openai.InternalServerError, match="no threes"):
            ask(model="modelled", prompt="a b c", max_tokens=2)
        assert ask(model="modelled", prompt="a", max_tokens=2).usage.completion_tokens == 2
        assert settled(service)


def test_an_order_of_ones_own_that_never_returns_ends_the_server(tmp_path):
    """Named, with exit code 2, for a length that nothing at the start could find; other requests were served."""
    path = tmp_path / "own.py"
    path.write_text(
        "def order(request_tokens):\n    while request_tokens == 3:\n        pass\n    return request_tokens\n"
    )
    options = ["--port", "0", "--scheduler", f"{path}:order", "--default-tokens", "2"]
    call = [sys.executable, "-m", "squall", "serve", *options]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = json.loads(process.stdout.readline())["url"]
        ask = client(url).completions.create
        assert ask(model="llama-3.1-8b", prompt="a").usage.completion_tokens == 2
        with pytest.raises(openai.APIError):
            ask(model="llama-3.1-8b", prompt="a b c")
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 2
    assert f"squall: --scheduler {path}:order: it did not return within 2 s; it must end, and soon." in errors
    assert "Traceback" not in errors


def test_a_priority_needs_the_scheduler(served):
    url, _ = served
    with pytest.raises(openai.BadRequestError, match="Priority scheduling is not enabled"):
        client(url).completions.create(model="modelled", prompt="a", extra_body={"priority": 2})


def test_users_share_fairly():
    """One user's flood does not keep the other from its turn."""
    with serving(scheduler="vtc", max_num_seqs=1, speed=5.0) as (host, port, service):
        ended: list[str] = []

        def ask(user: str) -> None:
            client(f"http://{host}:{port}").completions.create(model="modelled", prompt="a", max_tokens=80, user=user)
            ended.append(user)

        threads = [threading.Thread(target=ask, args=(user,)) for user in "aaaaaab"]
        for thread in threads:
            thread.start()
            time.sleep(0.02)
        for thread in threads:
            thread.join()
        assert ended.index("b") <= 2
        assert settled(service)


# --- bad clients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"\x00\x01\x02 nonsense\r\n\r\n", b"400"),
        (post("/v1/completions", b"{not json"), b"400"),
        (post("/v1/completions", b'{"prompt": {"a": 1}}'), b"400"),
        (post("/v1/completions", b'{"prompt": ["a", "b"]}'), b"400"),
        (post("/v1/completions", b'{"prompt": [1, "x"]}'), b"400"),
        (post("/v1/completions", b'{"prompt": "\xff"}'), b"400"),
        (post("/v1/chat/completions", b'{"messages": 7}'), b"400"),
        (post("/v1/chat/completions", b""), b"400"),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n", b"413"),
        (b"GET /health HTTP/1.1\r\nX: " + b"y" * 70_000, b"431"),
        (b"GET /" + b"y" * 70_000 + b" HTTP/1.1\r\n\r\n", b"431"),
        (b"GET /../../etc/passwd HTTP/1.1\r\n\r\n", b"404"),
        (b"DELETE /v1/models HTTP/1.1\r\n\r\n", b"404"),
        (b"GET /v1/completions HTTP/1.1\r\n\r\n", b"405"),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"400"),
    ],
)
def test_bad_requests_are_answered(served, request_bytes, status):
    url, service = served
    with wire(url) as found:
        found.sendall(request_bytes)
        line = found.recv(1 << 16).split(b"\r\n")[0]
    assert line.split()[1] == status
    assert urlopen(f"{url}/health").status == 200
    assert settled(service)


def test_a_chunked_body_and_many_requests_on_one_connection(served):
    url, _ = served
    body = b'{"prompt": "a b", "max_tokens": 2}'
    chunked = b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunked += b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    with wire(url) as found:
        for byte in chunked:  # byte by byte
            found.sendall(bytes([byte]))
        found.sendall(post("/v1/completions", body) + post("/v1/completions", body, "Connection: close"))
        answers = everything(found)
    assert answers.count(b"HTTP/1.1 200") == 3
    assert answers.count(b'"completion_tokens":2') == 3


def test_an_endless_body_is_cut(served):
    url, _ = served
    with wire(url) as found:
        found.sendall(b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        piece = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
        sent = 0
        try:
            while sent < 1000:
                found.sendall(piece)
                sent += 1
        except OSError:
            pass
    assert sent < 1000


def test_old_clients_get_a_plain_stream(served):
    url, _ = served
    body = b'{"prompt": "a", "max_tokens": 3, "stream": true}'
    with wire(url) as found:
        found.sendall(b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        answer = everything(found)
    assert b"chunked" not in answer
    assert answer.endswith(b"data: [DONE]\n\n")


def test_slow_and_idle_clients_are_given_up(served):
    url, service = served
    with wire(url) as slow, wire(url) as idle:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Le")
        time.sleep(0.1)
        assert len(service.connections) >= 2
        later = time.monotonic_ns() + round((http.IDLE_LIMIT + 1) * 1e9)
        service._loop.call_soon_threadsafe(lambda: [c.close_if_slow(later) for c in list(service.connections)])
        assert b" 408 " in everything(slow)
        assert everything(idle) == b""


def test_a_client_that_goes_away_leaves_the_engine(served):
    url, service = served
    body = b'{"prompt": "a", "max_tokens": 8000, "stream": true}'
    before = service.tally.aborted
    peers = [wire(url) for _ in range(5)]
    for peer in peers:
        peer.sendall(post("/v1/completions", body))
        assert b"200 OK" in peer.recv(1 << 12)
    assert sum(load.running for load in service.live.loads()) == 5
    for peer in peers:
        peer.close()
    assert settled(service)
    assert service.tally.aborted == before + 5


def test_a_client_that_does_not_read_is_cut_off(served):
    url, service = served
    body = b'{"prompt": "a", "max_tokens": 8000, "stream": true}'
    with wire(url) as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.sendall(b"".join(post("/v1/completions", body) for _ in range(6)))
        until = time.monotonic() + 60
        while not settled(service, 0.5) and time.monotonic() < until:
            pass
        assert settled(service)


# --- measured by others -----------------------------------------------------------------------------------------------


def bursty(n: int, rate: float, seed: int = 5) -> Trace:
    draw = np.random.default_rng(seed)
    columns = {
        "arrival": draw.gamma(0.3, 1 / (0.3 * rate), n).cumsum(),
        "request_tokens": draw.integers(20, 1500, n),
        "response_tokens": draw.integers(10, 120, n),
    }
    return Trace.of(columns, META)


def test_the_metrics_page_is_one_that_replay_reads(served):
    url, _ = served
    client(url).completions.create(model="modelled", prompt="a", max_tokens=3)
    reading = read_page(urlopen(f"{url}/metrics").read())
    assert reading.server == "vLLM"
    assert set(reading.values) == {(name, 0) for name in ("running", "waiting", "kv_used", "preemptions", "tokens")}
    assert set(reading.buckets) == {"ttft", "e2e"}


@pytest.mark.alone
def test_serve_agrees_with_simulate():
    """Not the tolerance that is promised for an idle machine (docs/serve.md), but far from any other scheduler's."""
    trace = bursty(150, 6)
    words = {"gpu": "a100", "model": "llama-3.1-8b", "kv_blocks": 400, "max_num_seqs": 8, "max_model_len": 8192}
    offline = metrics(simulate(trace, **words))
    with serving(speed=4.0, **words) as (host, port, _):
        run = replay(trace, url=f"http://{host}:{port}", api="completions", speed=4)
    online = metrics(run)
    assert offline.ttft.mean > 0.5  # there is a queue
    assert online.succeeded == 150
    assert run.series["preemptions"].sum() == offline.preemptions
    assert 4 * online.from_send.ttft.mean == pytest.approx(offline.ttft.mean, rel=0.1)
    assert 4 * online.from_send.e2e.mean == pytest.approx(offline.e2e.mean, rel=0.05)
    assert {found.metric: found.server_n for found in online.agreement} == {"ttft": 150, "e2e": 150}


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_the_command_serves_until_it_is_stopped():
    call = [sys.executable, "-m", "squall", "serve", "--port", "0", "--gpu", "a100", "--replicas", "2"]
    process = subprocess.Popen(
        [*call, "--ports-per-replica", "--served-model-name", "m", "--host", "0.0.0.0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ.copy(),
    )
    said = json.loads(process.stdout.readline())
    assert len(said["urls"]) == 2
    for url in said["urls"]:
        url = url.replace("0.0.0.0", "127.0.0.1")
        done = client(url).completions.create(model="m", prompt="a b", max_tokens=2)
        assert done.usage.total_tokens == 4
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "WARNING" in errors


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"port": 70000}, "--port"),
        ({"speed": 0}, "--speed"),
        ({"fail_rate": 2}, "--fail-rate"),
        ({"default_tokens": 0}, "--default-tokens"),
        ({"timeout": 0}, "--timeout"),
        ({"fail_rate": 0.1, "failures": "x.csv"}, "give one"),
        ({"ports_per_replica": True, "router": "random"}, "changes nothing"),
        ({"ports_per_replica": True, "prefill_replicas": 1, "decode_replicas": 1}, "not alike"),
        ({"scheduler": "priority", "priorities": "api=1"}, "a request's own `priority` counts"),
        ({"mtbf": "1h"}, "--fail-rate and --failures"),
        ({"flavour": 1}, "there is no such option"),
        ({"default_tokens": 10**8}, "beyond the context of"),
        ({"ports_per_replica": True}, "changes nothing with one replica"),
        ({"ports_per_replica": True, "replicas": 2, "port": 65535}, "no 2 ports from there on"),
        ({"gpu": "abacus"}, "abacus"),
    ],
)
def test_wrong_options_are_refused(options, says):
    with pytest.raises(InputError, match=says):
        serve(**options)


def test_recorded_failures_come_again():
    failed = [True] * 5 + [False] * 15
    trace = Trace.of(
        {
            "arrival": np.arange(20.0),
            "request_tokens": np.full(20, 10),
            "response_tokens": np.where(failed, 0, 10),
            "failed": failed,
        },
        META,
    )
    share = _recorded(trace)
    assert [share(at) for at in (1.0, 12.0, 21.0)] == [0.5, 0.0, 0.5]
    with pytest.raises(InputError, match="no request in this trace failed"):
        _recorded(bursty(20, 1))
