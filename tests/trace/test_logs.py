"""Logs of servers and proxies, and spans: what each version prints, what is read of it, and that no text is."""

import json
import re
from datetime import UTC, datetime, timedelta

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import squall
from squall.errors import InputError
from squall.trace import blocks, open_trace, read_trace
from squall.trace.formats.opentelemetry import parse_spans
from squall.trace.formats.vllm import parse_vllm

CANARY = "xyzzy-canary"
PARAMS = (
    "SamplingParams(n=1, stop=['max_tokens=9'], ignore_eos={eos}, max_tokens={most}, min_tokens=0, extra_args=None)"
)


def _file(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def _ids(count):
    return "[" + ", ".join(map(str, range(count))) + "]"


# ---------------------------------------------------------------------------------------------------------------- vLLM


def old(name, prompt, most=16, eos="False", text=CANARY, at="11-26 15:50:38", source="logger.py:43"):
    """As vLLM 0.5 to 0.10.1 logs a request."""
    return (
        f"INFO {at} [{source}] Received request {name}: prompt: {text!r}, params: {PARAMS.format(eos=eos, most=most)}, "
        f"prompt_token_ids: {_ids(prompt)}, prompt_embeds shape: None, lora_request: None."
    )


def new(name, prompt, at="11-26 15:50:38"):
    """As it does since 0.10.2, at the level DEBUG."""
    front = "(APIServer pid=66) "
    return (
        f"{front}DEBUG {at} [entrypoints/logger.py:53] Request {name} details: prompt: {CANARY!r}, prompt_token_ids: "
        f"{_ids(prompt)}, prompt_embeds shape: None.\n"
        f"{front}INFO {at} [entrypoints/logger.py:63] Received request {name}: params: "
        f"{PARAMS.format(eos='False', most=99)}, lora_request: None."
    )


def answer(name, tokens, at="11-26 15:50:41", how="", text=CANARY):
    ids = tokens if isinstance(tokens, str) else _ids(tokens)
    return (
        f"INFO {at} [logger.py:92] Generated response {name}{how}: output: {text!r}, output_token_ids: {ids}, "
        "finish_reason: stop"
    )


ACCESS = 'INFO:     127.0.0.1:60198 - "POST /v1/chat/completions HTTP/1.1" 200 OK'


def test_a_log_of_vllm(tmp_path):
    lines = [
        "INFO 11-26 15:50:30 [api_server.py:1] Starting vLLM API server",
        new("chatcmpl-a", 21),
        ACCESS,
        new("chatcmpl-b", 7, at="11-26 15:50:39"),
        "(EngineCore pid=437) INFO 11-26 15:50:39 [v1/engine/core.py:407] Iteration(746): 0 context requests",
        answer("chatcmpl-b", "[5]", at="11-26 15:50:40", how=" (streaming delta)"),
        answer("chatcmpl-b", "[6, 7]", at="11-26 15:50:42", how=" (streaming delta)"),
        answer("chatcmpl-a", 3),
        answer("chatcmpl-b", "None", at="11-26 15:50:43", how=" (streaming complete)"),
        new("chatcmpl-c", 5, at="11-26 15:50:50"),
        answer("chatcmpl-0", 5),
    ]
    trace = read_trace(_file(tmp_path, "vllm.log", "\n".join(lines) + "\n"))
    table = trace.table
    assert trace.meta.format == "vllm"
    assert table["arrival"].to_list() == [0, 1, 12]
    assert table["request_tokens"].to_list() == [21, 7, 5]
    assert table["response_tokens"].to_list() == [3, 3, 0]
    assert table["failed"].to_list() == [False, False, True]
    assert table["elapsed"].to_list() == [3, 4, None]
    assert (trace.meta.tick, trace.meta.epoch, trace.meta.weekday) == (1.0, None, None)
    assert trace.meta.midnight == (15 * 60 + 50) * 60 + 38
    found = {finding.code: finding.rows for finding in squall.validate(tmp_path / "vllm.log").findings}
    assert found["unanswered"] == [3]


V32 = """\
(APIServer pid=7) DEBUG 11-26 20:01:30 [entrypoints/.../utils/request_logger.py:74] Request aa JSON body: {}
(APIServer pid=7) DEBUG 11-26 20:01:30 [entrypoints/.../utils/request_logger.py:55] Request chatcmpl-aa details: \
prompt: "x output_token_ids: [1, 2], finish_reason: stop", prompt_token_ids: [1, 9690, 198], prompt_embeds shape: None.
(APIServer pid=7) INFO 11-26 20:01:30 [entrypoints/.../utils/request_logger.py:65] Received request chatcmpl-aa: \
params: SamplingParams(n=1, ignore_eos=EOS, max_tokens=4), lora_request: None.
(APIServer pid=7) INFO 11-26 20:01:30 [v1/engine/async_llm.py:578] Added request chatcmpl-aa-8829c8a7.
"""
DELTA = """\
(APIServer pid=7) DEBUG 11-26 20:01:31 [entrypoints/.../utils/request_logger.py:101] Generated response chatcmpl-aa \
(streaming delta) details: output_token_ids: [38174]
(APIServer pid=7) INFO 11-26 20:01:31 [entrypoints/.../utils/request_logger.py:108] Generated response chatcmpl-aa \
(streaming delta): output: ', output_token_ids: [3, 4]', finish_reason: None
"""
COMPLETE = """\
(APIServer pid=7) DEBUG 11-26 20:01:33 [entrypoints/.../utils/request_logger.py:101] Generated response chatcmpl-aa \
(streaming complete) details: output_token_ids: None
(APIServer pid=7) INFO 11-26 20:01:33 [entrypoints/.../utils/request_logger.py:108] Generated response chatcmpl-aa \
(streaming complete): output: 'said', finish_reason: streaming_complete
"""
WHOLE = """\
(APIServer pid=7) DEBUG 11-26 20:01:32 [entrypoints/.../utils/request_logger.py:101] Generated response chatcmpl-aa \
details: output_token_ids: [34108, 27880, 10465]
(APIServer pid=7) INFO 11-26 20:01:32 [entrypoints/.../utils/request_logger.py:108] Generated response chatcmpl-aa: \
output: 'said, output_token_ids: [3]', finish_reason: stop
"""
ABORTED = """\
(APIServer pid=7) INFO 11-26 20:01:34 [v1/engine/async_llm.py:922] Aborted request(s) chatcmpl-aa-8829c8a7.
(APIServer pid=7) INFO 11-26 20:01:34 [v1/engine/async_llm.py:783] Request chatcmpl-aa aborted.
"""


@pytest.mark.parametrize(
    ("said", "eos", "response", "elapsed"),
    [
        (WHOLE, "False", 3, 2),
        (3 * DELTA + COMPLETE, "False", 3, 3),
        (3 * DELTA + COMPLETE, "True", 4, 3),  # a delta without text is not logged
        (2 * DELTA + ABORTED, "True", 2, 4),
        ("\n".join(line for line in (2 * DELTA).split("\n") if "DEBUG" not in line) + COMPLETE, "False", 2, 3),
    ],
)
def test_a_log_of_vllm_0_32(tmp_path, said, eos, response, elapsed):
    """As a running server wrote it, but for names and texts."""
    table = read_trace(_file(tmp_path, "a.log", V32.replace("EOS", eos) + said)).table
    assert table["request_tokens"].to_list() == [3]
    assert table["response_tokens"].to_list() == [response]
    assert table["failed"].to_list() == [False]
    assert table["elapsed"].to_list() == [elapsed]


def test_completions_that_vllm_logs_no_answer_of_have_not_failed(tmp_path):
    forced, free = (V32.replace("chatcmpl-aa", f"cmpl-{k}-0") for k in "bc")
    lines = V32.replace("EOS", "False") + WHOLE + forced.replace("EOS", "True") + free.replace("EOS", "False")
    table = read_trace(_file(tmp_path, "a.log", lines)).table
    assert table["response_tokens"].to_list() == [3, 4]  # how long the third answer was, nobody knows
    assert table["elapsed"].to_list() == [2, None]
    assert table["failed"].to_list() == [False, False]


def test_streams_whose_tokens_only_the_end_tells(tmp_path):
    complete = answer("chatcmpl-a", "None", how=" (streaming complete)", text="<streaming_complete: 17 tokens>")
    trace = read_trace(_file(tmp_path, "a.log", f"{new('chatcmpl-a', 4)}\n{complete}"))
    assert trace.table["response_tokens"].to_list() == [17]


@pytest.mark.parametrize("source", ["async_llm_engine.py:561", "logger.py:37", "logger.py:43"])
def test_logs_without_answers_count_if_the_length_was_forced(tmp_path, source):
    lines = [old(f"cmpl-{k}-0", 10 + k, most=20 + k, eos="True", source=source) for k in range(3)]
    lines.append("INFO 11-26 15:50:45 async_llm_engine.py:171] Finished request cmpl-1-0.")
    lines.append("INFO 11-26 15:50:46 async_llm_engine.py:171] Aborted request cmpl-2-0.")
    text = "\n".join(lines).replace(" [", " ").replace("ids: ", "ids: [") if "async" in source else "\n".join(lines)
    trace = read_trace(_file(tmp_path, "a.log", text))
    assert trace.table["request_tokens"].to_list() == [10, 11, 12]
    assert trace.table["response_tokens"].to_list() == [20, 21, 0]
    assert trace.table["elapsed"].to_list() == [None, 7, 8]
    assert trace.table["failed"].to_list() == [False, False, True]


def test_what_stands_before_a_line_may_give_its_time(tmp_path):
    lines = [
        f"2024-12-31T23:59:59.250000123Z \x1b[32m{old('cmpl-a-0', 5)}\x1b[0m",
        f"2025-01-01T00:00:01.500000000Z {answer('cmpl-a', 3)}",  # the completions API logs its answers without -0
    ]
    trace = read_trace(_file(tmp_path, "pod.log", "\n".join(lines)))
    assert trace.table["elapsed"].to_list() == [2.25]
    assert trace.meta.epoch == 1735689599250000000
    assert (trace.meta.weekday, trace.meta.tick, trace.meta.midnight) == (1, None, 86399.25)


def test_a_log_over_new_year(tmp_path):
    lines = [old("a", 5, at="12-31 23:59:59"), answer("a", 1, at="01-01 00:00:02"), old("b", 6, at="01-01 00:00:09")]
    trace = read_trace(_file(tmp_path, "a.log", "\n".join([*lines, answer("b", 2, at="01-01 00:00:10")])))
    assert trace.table["arrival"].to_list() == [0, 10]
    assert trace.table["elapsed"].to_list() == [3, 1]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (ACCESS, "no request is logged in it: start vLLM with --enable-log-requests"),
        (old("a", 5), "is not logged: vLLM does so with --enable-log-outputs"),
        (new("a", 5).split("\n")[1] + "\n" + answer("a", 3), "only with VLLM_LOGGING_LEVEL=DEBUG"),
        ("\n".join([old("a", 9, text="t" * 9), old("b", 9, text="u" * 9), answer("a", 3)]), "cut by --max-log-len"),
    ],
)
def test_logs_that_do_not_tell_enough(tmp_path, text, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        read_trace(_file(tmp_path, "a.log", text))


@given(
    st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 30), st.text(max_size=80), st.text(max_size=80)),
        min_size=1,
        max_size=6,
    ),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_texts_in_a_log_change_nothing(requests, modern):
    """Prompts and answers may hold anything, such as what looks like a list of ids or another line."""
    trap = "', prompt_token_ids: [1, 2], output_token_ids: [3], params: SamplingParams(ignore_eos=True, max_tokens=7)\n"
    lines = []
    for k, (prompt, response, asked, said) in enumerate(requests):
        lines.append(new(f"r{k}", prompt) if modern else old(f"r{k}", prompt, text=asked + trap))
        lines.append(answer(f"r{k}", response, text=said + trap))
    columns = parse_vllm("\n".join(lines).encode("utf-8", "replace")).columns
    assert columns["request_tokens"].to_list() == [prompt for prompt, *_ in requests]
    assert columns["response_tokens"].to_list() == [response for _, response, *_ in requests]


# ------------------------------------------------------------------------------------------------------------- LiteLLM

AT = 1717243200.25


def payload(start=AT, took=2.0, first=0.5, **more):
    """A standard logging payload, cut to the fields that matter and those that must not be read."""
    return {
        "id": "x",
        "trace_id": "t",
        "call_type": "acompletion",
        "stream": True,
        "status": "success",
        "total_tokens": 30,
        "prompt_tokens": 20,
        "completion_tokens": 10,
        "startTime": start,
        "endTime": start + took,
        "completionStartTime": start + first,
        "model": "gpt-4o",
        "model_group": "public-name",
        "cache_hit": None,
        "messages": [{"role": "user", "content": CANARY}],
        "response": {"choices": [{"message": {"content": CANARY}}]},
    } | more


def spend(start="2024-06-01T12:00:00.250000Z", end="2024-06-01T12:00:02.250000Z", **more):
    """A row of the spend logs, as /spend/logs answers it."""
    return {
        "request_id": "chatcmpl-1",
        "call_type": "acompletion",
        "api_key": "hash",
        "total_tokens": 30,
        "prompt_tokens": 20,
        "completion_tokens": 10,
        "startTime": start,
        "endTime": end,
        "completionStartTime": end,
        "model": "gpt-4o",
        "model_group": "public-name",
        "session_id": "s",
        "status": "success",
        "metadata": {"usage_object": {"prompt_tokens_details": {"cached_tokens": 16}}},
        "messages": CANARY,
    } | more


def as_lines(records):
    return "\n".join(map(json.dumps, records)) + "\n"


def test_litellm_payloads(tmp_path):
    records = [
        payload(AT + 1),
        payload(AT, first=2.0, model_group=None),
        payload(
            AT + 2, status="failure", prompt_tokens=0, completion_tokens=0, error_information={"error_code": "429"}
        ),
        payload(AT + 3, call_type="aembedding"),
        {"standard_logging_object": payload(AT + 4, cache_hit=True)},
        payload(AT + 5, prompt_tokens=None),
    ]
    path = _file(tmp_path, "litellm.jsonl", as_lines(records))
    trace = read_trace(path)
    table = trace.table
    assert trace.meta.format == "litellm"
    assert table["arrival"].to_list() == [0, 1, 2, 4]
    assert table["model"].to_list() == ["gpt-4o", *["public-name"] * 3]
    assert table["failed"].to_list() == [False, False, True, False]
    assert table["elapsed"].to_list() == [2] * 4
    assert trace.meta.epoch == round(AT * 1e9)
    assert any("cache" in note for note in trace.meta.notes)
    assert any("left out" in note for note in trace.meta.notes)
    found = {finding.code: (finding.severity, finding.rows) for finding in squall.validate(path).findings}
    assert found["not-generation"] == ("info", [4])
    assert found["no-usage"] == ("warning", [6])
    assert found["cache-hit"] == ("info", [5])


@pytest.mark.parametrize("form", ["lines", "list", "page"])
def test_litellm_spend_logs(tmp_path, form):
    rows = [spend(), spend("2024-06-01 12:00:01", "2024-06-01 12:00:02", metadata="{}")]
    text = {"lines": as_lines(rows), "list": json.dumps(rows), "page": json.dumps({"data": rows, "total": 2})}[form]
    trace = read_trace(_file(tmp_path, "spend.json", text))
    assert trace.meta.format == "litellm"
    assert trace.table["arrival"].to_list() == [0, 0.75]
    assert trace.table["elapsed"].to_list() == [2, 1]
    assert trace.table["turn"].to_list() == [1, 2]


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"startTime": "noon"}, "Invalid isoformat string: 'noon'"),
        ({"startTime": None}, "None is no time"),
        ({"endTime": 1e12}, "no Unix time in seconds"),
        ({"endTime": AT - 1}, "it ends 1 s before it begins"),
        ({"prompt_tokens": -5}, "request_tokens is -5, which is not a token count"),
        ({"completion_tokens": 2**31}, "not a token count"),
    ],
)
def test_a_bad_call_of_litellm_is_named(tmp_path, record, sentence):
    path = _file(tmp_path, "a.jsonl", as_lines([payload(), payload() | record]))
    with pytest.raises(InputError, match="row 2") as caught:
        read_trace(path)
    assert sentence in str(caught.value)


def test_a_half_written_call_is_named(tmp_path):
    path = _file(tmp_path, "a.jsonl", as_lines([payload()]) + json.dumps(payload())[:90])
    with pytest.raises(InputError, match=r"row 2.*half-written"):
        read_trace(path)


def test_litellm_in_blocks_is_what_it_is_in_memory(tmp_path, monkeypatch):
    path = _file(tmp_path, "a.jsonl", as_lines(payload(AT + k / 7, session_id=f"s{k % 5}") for k in range(400)))
    whole = squall.convert(path, tmp_path / "whole.parquet")
    monkeypatch.setattr(blocks, "WHOLE", 0)
    monkeypatch.setattr(blocks, "BLOCK", 30_000)
    blocks.convert_file(path, tmp_path / "parts.parquet")
    parts = read_trace(tmp_path / "parts.parquet")
    assert parts.table.drop("arrival").equals(whole.table.drop("arrival"))
    assert (parts.table["arrival"] - whole.table["arrival"]).abs().max() < 2e-9
    with pytest.raises(InputError, match="read whole"):
        blocks.convert_file(_file(tmp_path, "b.json", json.dumps([spend()])), tmp_path / "b.parquet")


# ------------------------------------------------------------------------------------------------------- OpenTelemetry

NS = 1_700_000_000_000_000_000


def attributes(**values):
    kinds = {str: "stringValue", int: "intValue", float: "doubleValue", list: "arrayValue"}
    shown = {key.replace("__", "."): value for key, value in values.items()}
    return [
        {"key": key, "value": {kinds[type(value)]: str(value) if type(value) is int else value}}
        for key, value in shown.items()
    ]


def span(name="chat gpt-4o", identity="a", parent="", start=0.0, took=2.0, status=None, **values):
    said = {"gen_ai__operation__name": "chat", "gen_ai__request__model": "gpt-4o"} | values
    return {
        "traceId": "t",
        "spanId": identity,
        "parentSpanId": parent,
        "name": name,
        "startTimeUnixNano": str(NS + round(start * 1e9)),
        "endTimeUnixNano": str(NS + round((start + took) * 1e9)),
        "attributes": attributes(**{k: v for k, v in said.items() if v is not None}, gen_ai__input__messages=CANARY),
        **({"status": status} if status else {}),
    }


def export(*spans):
    resource = {"attributes": attributes(service__name="shop")}
    return {"resourceSpans": [{"resource": resource, "scopeSpans": [{"scope": {}, "spans": list(spans)}]}]}


USED = {"gen_ai__usage__input_tokens": 20, "gen_ai__usage__output_tokens": 10}
VLLM = {
    "gen_ai__operation__name": None,
    "gen_ai__request__model": None,
    "gen_ai__usage__prompt_tokens": 21,
    "gen_ai__usage__completion_tokens": 11,
    "gen_ai__latency__time_to_first_token": 0.25,
}


def test_spans_as_the_sdk_writes_them(tmp_path):
    """One export a line, from a run of opentelemetry-sdk 1.45 with its OTLP JSON file exporter."""
    common = '"flags":256,"kind":3,"startTimeUnixNano":"1795724464805859743",'
    lines = (
        '{"traceId":"b4","spanId":"2f","parentSpanId":"5e",%s"name":"chat tiny","endTimeUnixNano":'
        '"1795724464920261842","attributes":[{"key":"gen_ai.operation.name","value":{"stringValue":"chat"}},{"key":"server.port","value":'
        '{"intValue":"8457"}},{"key":"gen_ai.response.finish_reasons","value":{"arrayValue":{"values":[{"stringValue":'
        '"length"}]}}},{"key":"gen_ai.usage.input_tokens","value":{"intValue":"31"}},{"key":"gen_ai.usage.output_tokens",'
        '"value":{"intValue":"5"}}],"status":{}}',
        '{"traceId":"b4","spanId":"5e",%s"name":"handle","endTimeUnixNano":"1795724464930000000","status":{}}',
        '{"traceId":"8e","spanId":"5a",%s"name":"chat none","endTimeUnixNano":"1795724465664758124","attributes":[{'
        '"key":"gen_ai.operation.name","value":{"stringValue":"chat"}},{"key":"error.type","value":{"stringValue":'
        '"NotFoundError"}}],"status":{"message":"Error code: 404","code":2}}',
    )
    whole = '{"resourceSpans":[{"resource":{"attributes":[]},"scopeSpans":[{"scope":{"name":"x"},"spans":[%s]}]}]}\n'
    text = "".join(whole % (line % common) for line in lines)
    table = read_trace(_file(tmp_path, "spans.jsonl", text)).table
    assert table.select("request_tokens", "response_tokens", "failed").rows() == [(31, 5, False), (0, 0, True)]
    assert table["elapsed"][0] == pytest.approx(0.114402099)


@pytest.mark.parametrize("indent", [None, 2])
def test_spans(tmp_path, indent):
    spans = [
        span(start=1, gen_ai__conversation__id="c", **USED),
        span("llm_request", "b", start=0.5, **VLLM),  # as vLLM's own tracing writes it
        span("chat x", "c", start=2, status={"code": 2}, error__type="429"),
        span("invoke_agent", "d", start=0, **USED | {"gen_ai__operation__name": "invoke_agent"}),
        span("embeddings e", "e", **USED | {"gen_ai__operation__name": "embeddings"}),
        span("GET /", "f", gen_ai__operation__name=None, gen_ai__request__model=None),
    ]
    path = _file(tmp_path, "spans.json", json.dumps(export(*spans), indent=indent))
    trace = read_trace(path)
    table = trace.table
    assert trace.meta.format == "opentelemetry"
    assert table["arrival"].to_list() == [0, 0.5, 1.5]
    assert table["request_tokens"].to_list() == [21, 20, 0]
    assert table["response_tokens"].to_list() == [11, 10, 0]
    assert table["failed"].to_list() == [False, False, True]
    assert table["elapsed"].to_list() == [2] * 3
    assert table["session"].to_list() == [None, 0, None]
    assert trace.meta.epoch == NS + 500_000_000
    assert "3 of 6 spans are of something else" in trace.meta.notes[0]


def test_a_request_seen_at_both_ends_counts_once(tmp_path):
    client = export(span(identity="client", **USED))
    between = export(span("POST", "http", "client", gen_ai__operation__name=None, gen_ai__request__model=None))
    server = export(span("llm_request", "server", "http", start=0.1, took=1.5, **VLLM))
    path = _file(tmp_path, "spans.jsonl", as_lines([server, between, client]))  # one export a line
    trace = read_trace(path)
    assert trace.table["request_tokens"].to_list() == [21]
    assert {finding.code for finding in squall.validate(path).findings} >= {"outer-span"}


def test_spans_without_token_counts(tmp_path):
    path = _file(tmp_path, "a.json", json.dumps(export(span())))
    with pytest.raises(InputError, match="none of the 1 requests in it has token counts; have them logged"):
        read_trace(path)
    path = _file(tmp_path, "b.json", json.dumps(export(span("GET /", gen_ai__operation__name=None))))
    with pytest.raises(InputError, match="no request for generated text in it"):
        read_trace(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"startTimeUnixNano": "soon"}, "startTimeUnixNano is 'soon', no time"),
        ({"endTimeUnixNano": str(NS)}, "before it begins"),
    ],
)
def test_a_bad_span_is_named(tmp_path, change, sentence):
    path = _file(tmp_path, "a.json", json.dumps(export(span(start=1, **USED), span(start=1, **USED) | change)))
    with pytest.raises(InputError, match=r"row 2.*" + re.escape(sentence)):
        read_trace(path)
    with pytest.raises(InputError, match="line 2 cannot be read as OTLP JSON"):
        read_trace(_file(tmp_path, "b.jsonl", as_lines([export(span(**USED))]) + "{x"))


@given(st.lists(st.integers(-1, 7), min_size=1, max_size=8))
@settings(deadline=None)
def test_every_leaf_of_nested_spans_is_one_request(parents):
    """Whatever hangs below what, and in loops too: a span counts if no request is below it."""
    spans = [span(identity=str(k), parent="" if p < 0 else str(p), **USED) for k, p in enumerate(parents)]
    known, outer = len(parents), set()
    for k in range(known):
        seen, at = {k}, parents[k]
        while 0 <= at < known:
            outer.add(at)
            if at in seen:
                break
            seen.add(at)
            at = parents[at]
    data = json.dumps(export(*spans)).encode()
    left = known - len(outer)
    if left:
        assert len(parse_spans(data).columns) == left
    else:
        assert parse_spans(data).columns.is_empty()


# ----------------------------------------------------------------------------------------- access logs and JSON, mapped

NGINX = (
    '$remote_addr - $remote_user [$time_local] "$request" $status $body_bytes_sent "$http_user_agent" '
    "$request_time $upstream_header_time $sent_http_x_prompt_tokens $sent_http_x_completion_tokens"
)
MAPPING = (
    "ended=time_local,elapsed=request_time,first_token=upstream_header_time,status=status,path=request,"
    "request_tokens=sent_http_x_prompt_tokens,response_tokens=sent_http_x_completion_tokens"
)


def access(end=38, took="2.000", status=200, request="POST /v1/chat/completions?a=1 HTTP/1.1", tokens="20 10"):
    stamp = f"26/Nov/2026:15:50:{end:02} +0100"
    return f'10.0.0.1 - - [{stamp}] "{request}" {status} 512 "curl/8 [\\x22x\\x22]" {took} 0.500 {tokens}'


def test_an_access_log_by_a_mapping(tmp_path):
    lines = [
        access(),
        access(39, "4.000"),
        access(39, request="GET /health HTTP/1.1", tokens="- -"),
        access(40, "0.100", 503, tokens="- -"),
    ]
    path = _file(tmp_path, "access.log", "\n".join(lines) + "\n")
    trace = open_trace(path, format=NGINX, columns=MAPPING)
    table = trace.table
    assert table["arrival"].to_list() == pytest.approx([0, 1, 4.9])
    assert table["request_tokens"].to_list() == [20, 20, 0]
    assert table["failed"].to_list() == [False, False, True]
    assert trace.meta.midnight == (15 * 60 + 50) * 60 + 35
    assert trace.meta.weekday == 3
    assert "1 lines to other paths were left out" in trace.meta.notes
    assert squall.validate(path, format=NGINX, columns=MAPPING).ok


def test_an_access_log_in_blocks(tmp_path, monkeypatch):
    lines = [access(k % 60, "0.000", tokens=f"{k + 1} 7") for k in range(55)]
    path = _file(tmp_path, "access.log", "\n".join(lines) + "\n")
    whole = open_trace(path, format=NGINX, columns=MAPPING)
    monkeypatch.setattr(blocks, "WHOLE", 0)
    monkeypatch.setattr(blocks, "BLOCK", 1000)
    blocks.convert_file(path, tmp_path / "out.parquet", format=NGINX, columns=MAPPING)
    assert read_trace(tmp_path / "out.parquet").table.equals(whole.table)


@pytest.mark.parametrize(
    ("line", "format", "columns", "sentence"),
    [
        ("nonsense", NGINX, MAPPING, "row 2: it is not as --format says"),
        (access(tokens="x 10"), NGINX, MAPPING, "row 2: 'sent_http_x_prompt_tokens' is 'x'"),
        (access(tokens="20 -"), NGINX, MAPPING, "row 2: 'sent_http_x_completion_tokens' is missing or empty"),
        (access(), NGINX, None, "needs --columns"),
        (access(), "$a $a", MAPPING, "names no variable, or one twice"),
        (access(), "$request $status", MAPPING, "the format has no variable 'time_local'"),
        (access(), NGINX, MAPPING.replace("elapsed=", "model="), "ended goes with elapsed"),
    ],
)
def test_what_is_wrong_with_an_access_log(tmp_path, line, format, columns, sentence):
    path = _file(tmp_path, "access.log", f"{access()}\n{line}\n")
    with pytest.raises(InputError, match=re.escape(sentence)):
        open_trace(path, format=format, columns=columns)


def test_an_access_log_without_a_mapping_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match="--columns maps the columns of any CSV file, with --format"):
        read_trace(_file(tmp_path, "access.log", access() + "\n"))


def test_json_lines_by_a_mapping(tmp_path):
    rows = [
        {"at": 5000, "usage": {"in": 20, "out": 10}, "ok": True, "text": CANARY},
        {"at": 6500, "usage": {"in": 21}, "ok": False},
        {"at": 7000, "usage": {}, "ok": True},
    ]
    columns = "arrival=at:ms,request_tokens=usage.in,response_tokens=usage.out,failed=bad"
    lines = as_lines(row | {"bad": not row["ok"]} for row in rows)
    trace = open_trace(_file(tmp_path, "a.jsonl", lines), columns=columns)
    assert trace.table["arrival"].to_list() == [0, 1.5]
    assert trace.table["failed"].to_list() == [False, True]
    with pytest.raises(InputError, match=r"row 3: 'usage\.in' is missing or empty"):
        open_trace(tmp_path / "a.jsonl", columns=columns.removesuffix(",failed=bad"))
    with pytest.raises(InputError, match="row 4"):
        open_trace(_file(tmp_path, "b.jsonl", lines + "{x\n"), columns=columns)


@given(
    st.lists(
        st.tuples(st.integers(0, 10**6), st.integers(0, 5000), st.integers(0, 2000), st.sampled_from([200, 404, 499])),
        min_size=1,
        max_size=20,
    )
)
@settings(deadline=None, max_examples=40)
def test_an_access_log_is_read_as_it_was_written(tmp_path_factory, rows):
    """Times, lengths and outcomes survive the way through nginx's default time format and a mapping."""
    start = datetime(2026, 2, 27, 23, 59, 58, tzinfo=UTC)
    form = "[$time_iso8601] $request_time $status $p $r"
    lines = [
        f"[{(start + timedelta(seconds=at)).isoformat()}] {took / 1e3:.3f} {status} {took} {took + 1}"
        for at, took, _, status in rows
    ]
    path = tmp_path_factory.mktemp("log") / "a.log"
    path.write_text("\n".join(lines))
    trace = open_trace(
        path,
        format=form,
        columns="ended=time_iso8601,elapsed=request_time,status=status,request_tokens=p,response_tokens=r",
    )
    began = sorted(at - took / 1e3 for at, took, _, _ in rows)
    assert trace.table["arrival"].to_list() == pytest.approx([at - began[0] for at in began], abs=1e-6)
    assert sorted(trace.table["failed"]) == sorted(status >= 400 for *_, status in rows)
    assert sorted(trace.table["request_tokens"]) == sorted(took for _, took, _, _ in rows)


# ---------------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", ["vllm", "litellm", "spans"])
def test_no_text_of_a_log_reaches_what_is_written(tmp_path, name):
    text = {
        "vllm": "\n".join([new("a", 5), answer("a", 3)]),
        "litellm": as_lines([payload()]),
        "spans": json.dumps(export(span(**USED))),
    }[name]
    assert CANARY in text
    squall.convert(_file(tmp_path, name, text), tmp_path / "out.parquet")
    squall.convert(tmp_path / name, tmp_path / "out.csv")
    for file in (tmp_path / "out.parquet", tmp_path / "out.csv"):
        assert CANARY.encode() not in file.read_bytes()
    assert CANARY not in str(pl.read_parquet(tmp_path / "out.parquet").to_dicts())
