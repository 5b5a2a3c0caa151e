"""The recording proxy before a real server: SQUALL_REAL_SERVER names one that is running (llama.cpp, vLLM, …)."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import polars as pl
import pytest

import squall
import squall.seeds
from squall.run import Run
from squall.trace import Trace, TraceMeta

COUNT = 60


class Proxy:
    """A `squall capture` before the real server."""

    def __init__(self, out: Path) -> None:
        upstream = os.environ.get("SQUALL_REAL_SERVER")
        if not upstream:
            pytest.skip("SQUALL_REAL_SERVER does not name a running server")
        self.out = out
        command = [sys.executable, "-m", "squall", "capture", "--upstream", upstream, "-o", str(out), "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.url = json.loads(self.process.stdout.readline())["url"]

    def stop(self) -> tuple[pl.DataFrame, Run]:
        """The captured trace and run."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(60)
        return squall.read_trace(self.out / "trace.parquet").table, squall.read_run(self.out / "run.parquet")


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxy]:
    it = Proxy(tmp_path / "capture")
    yield it
    it.process.kill()
    it.process.wait()


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_the_captured_trace_is_the_one_that_was_sent(proxy: Proxy, tmp_path: Path, api: str) -> None:
    random = squall.seeds.stream(5, "test")
    columns = {
        "arrival": random.gamma(0.3, 0.5 / 0.3, COUNT).cumsum(),
        "request_tokens": random.integers(60, 120, COUNT),
        "response_tokens": random.integers(1, 16, COUNT),
    }
    sent = Trace.of(columns, TraceMeta(source="test", format="generated"))
    run = squall.replay(sent, url=proxy.url, out=tmp_path / "run.parquet", api=api)
    trace, captured = proxy.stop()
    got, its = trace.tail(COUNT), captured.table.tail(COUNT)  # before them: the questions of the pre-flight
    answered = run.table.filter(pl.col("reason").fill_null("") != "stale_reuse").sort("sent")
    shift = (answered["sent"] - answered["sent"][0]) - (got["arrival"] - got["arrival"][0])
    first = (answered["first_token"] - answered["sent"]) - (its["first_token"] - its["sent"])
    print(f"\n{api}: arrivals off by at most {1e3 * (shift - shift.median()).abs().max():.1f} ms,", end=" ")
    print(f"first token later by {1e3 * first.median():.2f} ms (median), {1e3 * first.max():.1f} ms (max)")
    assert got["request_tokens"].to_list() == answered["request_tokens"].to_list()
    assert got["response_tokens"].to_list() == sent.table["response_tokens"].to_list()
    assert its["status"].to_list() == ["ok"] * COUNT
    assert (shift - shift.median()).abs().median() < 0.005


def lengths_of(answer: object) -> tuple[int, int]:
    """Prompt and completion tokens by the usage of an answer or a chunk."""
    return answer.usage.prompt_tokens, answer.usage.completion_tokens


def test_the_official_client_sees_what_the_server_says(proxy: Proxy) -> None:
    client = openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="k", max_retries=0)
    model = client.models.list().data[0].id
    direct = openai.OpenAI(base_url=f"{os.environ['SQUALL_REAL_SERVER']}/v1", api_key="k", max_retries=0)
    asked = {"model": model, "max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}
    prompts = []
    for api in ("completions", "chat"):
        what = (
            {"prompt": "Once upon a time"}
            if api == "completions"
            else {"messages": [{"role": "user", "content": "Say something."}]}
        )
        through, past = ((it.completions if api == "completions" else it.chat.completions) for it in (client, direct))
        # Not the whole usage: a prompt that comes again is a cached one.
        whole, again = (lengths_of(it.create(**asked, **what)) for it in (through, past))
        assert whole == again == (whole[0], 12)
        prompts.append(whole[0])
        for options in ({}, {"stream_options": {"include_usage": True}}):
            chunks, same = (list(it.create(**asked, **what, **options, stream=True)) for it in (through, past))
            # Some servers tell the usage of completions unasked (llama.cpp): then the client sees it here too.
            told, direct_told = ([lengths_of(chunk) for chunk in each if chunk.usage] for each in (chunks, same))
            assert told == direct_told
            assert told == [whole] or (told == [] and not options)
            texts = [
                (choice.text if api == "completions" else choice.delta.content) or ""
                for chunk in chunks
                for choice in chunk.choices
            ]
            assert "".join(texts).strip()
    trace, run = proxy.stop()
    assert trace["request_tokens"].to_list() == [tokens for tokens in prompts for _ in range(3)]
    assert trace["response_tokens"].to_list() == [12] * 6
    assert run.table["token_source"].to_list() == ["server"] * 6
    assert run.table["status"].to_list() == ["ok"] * 6
