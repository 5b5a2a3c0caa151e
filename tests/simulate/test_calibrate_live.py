"""What is read from a live server, and what is made of closed loops, against a server whose step times are known."""

from importlib import import_module

import numpy as np
import polars as pl
import pytest

import squall
from squall.errors import InputError
from squall.run.table import Run, RunMeta
from squall.simulate.cluster import resolve
from squall.simulate.hardware import MODELS

live = import_module("squall.calibrate")

METRICS = (
    'vllm:cache_config_info{block_size="32",enable_prefix_caching="True",num_gpu_blocks="80"} 1.0\n'
    'vllm:num_preemptions_total{engine="0",model_name="tiny"} 3.0\n'
    'vllm:num_preemptions_total{engine="1",model_name="tiny"} 4.0\n'
)
PAGES = {
    "/metrics": METRICS,
    "/v1/models": '{"data": [{"id": "llama-3.2-1b", "root": "nowhere", "max_model_len": 2048}]}',
    "/version": '{"version": "0.32.0"}',
}
NOTHING = dict.fromkeys(("kv_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len"))


@pytest.fixture
def server(monkeypatch):
    pages = dict(PAGES)
    found = live._Server("http://127.0.0.1:9", None, "NO_KEY")
    monkeypatch.setattr(found, "get", lambda path: pages.get(path, ""))
    found.pages = pages
    return found


def test_limits_are_read_and_what_is_given_wins(server):
    words, said, engines = live._limits_of(server, None, None, NOTHING)
    assert (words["kv_blocks"], words["block_size"], words["max_model_len"]) == (80, 32, 2048)
    assert words["model"] == MODELS["llama-3.2-1b"]
    assert engines == ["vllm-0.24", "vllm-0.24-sync"]
    assert not said
    assert live._limits_of(server, None, "vllm-0.11", NOTHING | {"kv_blocks": 99})[0]["kv_blocks"] == 99
    server.pages["/version"] = '{"version": "0.12.1"}'
    assert live._limits_of(server, None, None, NOTHING)[2] == ["vllm-0.11"]
    assert server.counter("vllm:num_preemptions_total") == 7
    assert server.counter("vllm:nothing") is None


def test_without_a_block_count_nothing_is_calibrated(server):
    server.pages["/metrics"] = "python_info 1.0\n"
    with pytest.raises(InputError, match="--kv-blocks"):
        live._limits_of(server, None, None, NOTHING)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({}, "either --run"),
        ({"run": "x.csv", "url": "http://127.0.0.1:9"}, "either --run"),
        ({"run": "x.csv", "gpu": "h100"}, "--model is missing"),
        ({"url": "http://127.0.0.1:9", "first": 5}, "--first has no effect"),
        ({"url": "http://127.0.0.1:9", "budget": 5}, "--budget 5"),
        ({"url": "http://127.0.0.1:9"}, "is the server up"),
    ],
)
def test_impossible_calls(words, says):
    with pytest.raises(InputError, match=says):
        squall.calibrate(**words)


def test_a_first_guess_finds_the_table_behind_exact_measurements():
    """A step takes 5 ms + 20 us a token + 0.2 ms a sequence + 1 us a KV token; a request 2 ms to arrive."""
    cluster = resolve(kv_blocks=200, block_size=32, max_num_seqs=16, max_num_batched_tokens=2048)

    def step(tokens, sequences, kv):
        return 5e-3 + 2e-5 * tokens + 2e-4 * sequences + 1e-6 * kv

    def measured(kind, prompt, response, n):
        first = 2e-3 + step(prompt, 1, 0)
        gap = step(n, n, n * (prompt + response / 2))
        columns = {
            "request": range(n),
            "attempt": [1] * n,
            "sent": [0.0] * n,
            "first_token": [first] * n,
            "last_token": [first + gap * (response - 1)] * n,
            "request_tokens": [prompt] * n,
            "response_tokens": [response] * n,
            "chunks": [(gap * np.arange(response)).tolist()] * n,
        }
        run = Run.of(pl.DataFrame(columns), RunMeta(kind="recorded"))
        return live._Measured(kind, run.table, n, run)

    them = [measured("prefill", prompt, 1, 1) for prompt in (16, 64, 256, 1024)]
    them += [measured("batch", 16, 32, n) for n in (1, 2, 4, 8, 16)]
    them += [measured("context", 700, 32, n) for n in (1, 4, 8)]
    found = live._first_guess(them, cluster)
    assert found.table.per_kv_token == pytest.approx(1e-6, rel=0.02)
    for tokens, seconds in found.table.points:
        both = seconds + min(tokens, 16) * found.table.per_sequence
        assert both == pytest.approx(step(tokens, min(tokens, 16), 0), rel=0.1)
