"""The real server from wheels: it answers on loopback and goes when it should. Skips without squall[local]."""

import json
import urllib.request

import pytest

from squall import local
from squall.errors import InputError, SquallError


@pytest.fixture(scope="module")
def server():
    if missing := local.available():
        pytest.skip(missing)
    with local.serving(slots=2, threads=1) as running:
        yield running


def test_it_answers_on_loopback_with_real_tokens(server):
    assert server.url.startswith("http://127.0.0.1:")
    body = {"model": server.model, "prompt": "Once upon a time", "max_tokens": 8, "ignore_eos": True}
    request = urllib.request.Request(
        server.url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    answer = json.load(urllib.request.urlopen(request, timeout=30))
    assert answer["usage"]["completion_tokens"] == 8


def test_its_process_is_gone_after_the_block():
    if missing := local.available():
        pytest.skip(missing)
    with local.serving(slots=1, threads=1) as running:
        url = running.url
    with pytest.raises(OSError):
        urllib.request.urlopen(url + "/health", timeout=2)


def test_a_taken_port_is_one_sentence(server):
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(SquallError, match="port"):
        local.local(port=port)


@pytest.mark.parametrize("flags", [{"port": 70_000}, {"slots": 0}, {"threads": 0}, {"weights": "absent.gguf"}])
def test_bad_flags_are_named(flags):
    if local.available():
        pytest.skip("needs squall[local]")
    with pytest.raises(InputError, match=next(iter(flags))):
        local.local(**flags)
