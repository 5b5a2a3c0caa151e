"""The server's metrics page: what is read of it, whatever it says, and for as long as it lasts."""

import math
import socket
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mock import Behaviour, Mock  # noqa: UP026 - the file beside this one

from squall.errors import InputError
from squall.replay.scrape import PAGE_LIMIT, Endpoint, PageError, Tally, fetch, find_metrics, read_page
from squall.replay.target import find_target
from squall.run.server import ServerMetrics

VLLM = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a}\\"b"} 3.0
vllm:num_requests_running{engine="1",model_name="a}\\"b"} 4.0
vllm:num_requests_waiting{engine="0",model_name="m"} 7.0
vllm:num_requests_waiting{engine="1",model_name="m"} 0.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.5
vllm:num_preemptions_total{engine="0",model_name="m"} 2.0
vllm:num_preemptions_created{engine="0",model_name="m"} 1.7e+09
vllm:prompt_tokens_total{engine="0",model_name="m"} 100.0
vllm:generation_tokens_total{engine="0",model_name="m"} 50.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.1",model_name="m"} 1.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.5",model_name="m"} 3.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="m"} 4.0
vllm:time_to_first_token_seconds_count{engine="0",model_name="m"} 4.0
vllm:time_to_first_token_seconds_sum{engine="0",model_name="m"} 1.5
process_start_time_seconds 1.7e+09
"""
SGLANG = b"""sglang:num_running_reqs{model_name="m"} 5.0
sglang:num_queue_reqs{model_name="m"} 6.0
sglang:token_usage{model_name="m"} 0.75
sglang:num_retracted_requests_total{model_name="m"} 1.0
"""
LLAMA = b"llamacpp:requests_processing 2\nllamacpp:requests_deferred 9\nllamacpp:tokens_predicted_total 12\n"
TGI = b'tgi_batch_current_size 4\ntgi_queue_size 8\ntgi_request_duration_bucket{le="+Inf"} 3\n'
DYNAMO = b"""dynamo_frontend_inflight_requests{model="m"} 12
dynamo_frontend_queued_requests{model="m"} 5
dynamo_component_gpu_cache_usage_percent{dp_rank="0"} 0.4
"""


@pytest.mark.parametrize(
    ("page", "server", "expected"),
    [
        (
            VLLM,
            "vLLM",
            {
                ("running", 0): 3,
                ("running", 1): 4,
                ("waiting", 0): 7,
                ("waiting", 1): 0,
                ("kv_used", 0): 0.25,
                ("kv_used", 1): 0.5,
                ("preemptions", 0): 2,
                ("tokens", 0): 150,
            },
        ),
        (
            SGLANG,
            "SGLang",
            {("running", 0): 5, ("waiting", 0): 6, ("kv_used", 0): 0.75, ("preemptions", 0): 1},
        ),
        (LLAMA, "llama.cpp", {("running", 0): 2, ("waiting", 0): 9, ("tokens", 0): 12}),
        (TGI, "TGI", {("running", 0): 4, ("waiting", 0): 8}),
        (DYNAMO, "Dynamo", {("running", 0): 7, ("waiting", 0): 5, ("kv_used", 0): 0.4}),
    ],
)
def test_every_servers_names(page, server, expected):
    reading = read_page(page)
    assert reading is not None
    assert reading.server == server
    assert reading.values == expected


def test_the_histogram_of_a_page():
    reading = read_page(VLLM)
    assert reading.buckets == {"ttft": {0.1: 1, 0.5: 3, math.inf: 4}}
    assert reading.sums["ttft"] == 1.5
    assert reading.started == 1.7e9


def test_lies_are_no_numbers():
    for lie in (b"nan", b"-3", b"+Inf", b"1e300", b"many", b"0x10"):
        page = VLLM.replace(b'model_name="m"} 0.5', b'model_name="m"} ' + lie)
        assert ("kv_used", 1) not in read_page(page).values
    assert ("kv_used", 1) not in read_page(VLLM.replace(b"} 0.5\n", b"} 97\n")).values  # no share
    assert read_page(b"") is None
    assert read_page(b"<html>vllm</html>") is None
    assert read_page(VLLM.replace(b"vllm:", b"other:")) is None


@given(st.binary(max_size=400), st.integers(0, len(VLLM)))
def test_no_page_is_an_error(noise, place):
    reading = read_page(VLLM[:place] + noise + VLLM[place:])
    if reading is not None:
        assert all(math.isfinite(value) and value >= 0 for value in reading.values.values())


def test_a_page_without_line_ends_takes_no_time():
    began = time.perf_counter()
    read_page(b"vllm:num_requests_running{" + b"}" * (PAGE_LIMIT // 8) + b" x")
    read_page(b'vllm:num_requests_running{a="' + b'\\"' * (PAGE_LIMIT // 16) + b"} 1")
    assert time.perf_counter() - began < 2


def page(preemptions: float, tokens: float, below: float, total: float, started: float = 1.0) -> bytes:
    return f"""vllm:num_requests_running 1
vllm:num_requests_waiting 2
vllm:num_preemptions_total {preemptions}
vllm:prompt_tokens_total {tokens}
vllm:e2e_request_latency_seconds_bucket{{le="1.0"}} {below}
vllm:e2e_request_latency_seconds_bucket{{le="+Inf"}} {total}
vllm:e2e_request_latency_seconds_sum {2 * total}
process_start_time_seconds {started}
""".encode()


def tally(*pages: bytes) -> tuple[Tally, list]:
    it = Tally(ServerMetrics(name="vLLM", url="", interval=1.0))
    samples = [it.add(2.0 * k, read_page(text))[0] for k, text in enumerate(pages)]
    return it, samples


def test_counters_become_gains_and_rates():
    it, samples = tally(page(5, 1000, 3, 4), page(7, 1600, 3, 6), page(7, 1600, 4, 7))
    assert [sample.preemptions for sample in samples] == [None, 2, 0]
    assert [sample.batch_tokens for sample in samples] == [None, 300.0, 0.0]
    assert [sample.waiting for sample in samples] == [2, 2, 2]
    histogram = it.summary.histograms["e2e"]
    assert histogram.edges == [1.0]
    assert histogram.counts == [1, 2]
    assert histogram.sum == 6.0
    assert it.summary.restarts == 0
    assert it.summary.scrapes == 3


@pytest.mark.parametrize("started", [1.0, 900.0])
def test_a_restart_loses_only_what_nobody_saw(started):
    """After a restart counters begin at 0; whether the process says so or a counter fell."""
    it, samples = tally(page(5, 1000, 3, 4), page(7, 1200, 4, 5), page(1, 100, 1, 1, started))
    assert [sample.preemptions for sample in samples] == [None, 2, 1]
    assert [sample.batch_tokens for sample in samples] == [None, 100.0, 50.0]
    assert it.summary.histograms["e2e"].counts == [2, 0]
    assert it.summary.restarts == 1


def serve(behave, seconds: float = 8.0):
    """A raw server for one connection; `behave` gets the socket. Returns its endpoint."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with listener:
            peer, _ = listener.accept()
            with peer:
                peer.settimeout(seconds)
                try:
                    behave(peer)
                except OSError:
                    return

    threading.Thread(target=run, daemon=True).start()
    port = listener.getsockname()[1]
    return Endpoint(
        f"http://127.0.0.1:{port}/metrics", "127.0.0.1", ("127.0.0.1", port), False, b"GET / HTTP/1.1\r\n\r\n"
    )


def drip(peer):
    peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    for _ in range(100):
        peer.sendall(b"x")
        time.sleep(0.05)


def endless(peer):
    peer.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        peer.sendall(b"vllm:num_requests_running 1\n" * 4000)


@pytest.mark.parametrize(
    ("behave", "says"),
    [
        (lambda peer: time.sleep(3), "no whole page"),
        (drip, "no whole page"),
        (endless, "longer than"),
        (lambda peer: peer.sendall(b"SSH-2.0-x\r\n\r\n"), "not HTTP"),
        (lambda peer: peer.sendall(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n"), "HTTP 503"),
        (lambda peer: None, "no answer|reset"),
    ],
)
def test_a_bad_page_fails_in_time(behave, says):
    began = time.monotonic()
    with pytest.raises(PageError, match=says):
        fetch(serve(behave), 0.5)
    assert time.monotonic() - began < 1.5


def target(url: str, **headers: str):
    return find_target(url, api_key="sesame-key", headers=headers, connect_timeout=2)


def test_the_page_beside_the_api_is_found():
    with Mock(metrics=lambda: Behaviour(body=VLLM)) as mock:
        endpoint, name = find_metrics(target(f"{mock.url}/v1"), None)
        assert name == "vLLM"
        assert endpoint.url == f"{mock.url}/metrics"
        assert read_page(fetch(endpoint)).values["running", 0] == 3
    with Mock() as mock:
        assert find_metrics(target(mock.url), None) == (None, None)


def test_the_key_goes_to_its_own_server_only():
    with Mock(metrics=lambda: Behaviour(body=VLLM)) as mock, Mock(metrics=lambda: Behaviour(body=VLLM)) as other:
        own, _ = find_metrics(target(mock.url), f"{mock.url}/metrics")
        foreign, _ = find_metrics(target(mock.url), f"{other.url}/metrics")
    assert b"sesame" in own.request
    assert b"sesame" not in foreign.request


@pytest.mark.parametrize(
    "url", ["{}/v1/models", "http://127.0.0.1:1/metrics", "nonsense", "http://127.0.0.1:x/", "ftp://a/"]
)
def test_a_page_that_was_asked_for_must_be_one(url):
    with Mock() as mock, pytest.raises(InputError, match="--metrics-url"):
        find_metrics(target(mock.url), url.format(mock.url))
