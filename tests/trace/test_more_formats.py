"""RAGPulse, conversations and mapped CSV: what is read, what is noted, and one sentence for what is wrong."""

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import squall
from squall.errors import InputError
from squall.trace import open_trace, read_trace

RAG = [
    '{"timestamp": "27", "input_length": 3861, "output_length": 127, "hash_ids": {"sys_prompt": [8, 9]}, '
    '"session_id": "1758-xa"}',
    '{"timestamp": "27", "input_length": 10, "output_length": 0, "hash_ids": {}, "session_id": "1759-xb"}',
    '{"timestamp": "90", "input_length": 4000, "output_length": 5, "hash_ids": {}, "session_id": "1758-xa"}',
]


def _file(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    return path


# ------------------------------------------------------------------------------------------------------------ RAGPulse


def test_ragpulse_has_sessions_and_counts_from_noon(tmp_path):
    trace = read_trace(_file(tmp_path, "0_trace.jsonl", "\n".join(RAG)))
    assert trace.meta.format == "ragpulse"
    assert trace.table["arrival"].to_list() == [0, 0, 63]
    assert trace.table["session"].to_list() == [0, 1, 0]
    assert trace.table["turn"].to_list() == [1, 1, 2]
    assert trace.table["failed"].to_list() == [False, True, False]
    assert trace.table["prefix"].null_count() == 3
    assert (trace.meta.clock, trace.meta.midnight, trace.meta.tick) == (27, 12 * 3600 + 27, 1)
    assert "not used as prefixes" in trace.meta.notes[0]


def test_ragpulse_round_trip(tmp_path):
    trace = read_trace(_file(tmp_path, "a.jsonl", "\n".join(RAG)))
    squall.convert(trace, tmp_path / "b.jsonl", to="ragpulse")
    again = read_trace(tmp_path / "b.jsonl")
    assert again.meta.format == "ragpulse"
    assert again.table.equals(trace.table)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"timestamp": "noon", "input_length": 1, "output_length": 1}', "timestamp is 'noon', which is not a number"),
        ('{"timestamp": "-1", "input_length": 1, "output_length": 1}', "timestamp is -1, which is negative"),
        ('{"timestamp": "inf", "input_length": 1, "output_length": 1}', "not finite"),
        ('{"timestamp": "1", "input_length": -1, "output_length": 1}', "input_length is -1, which is negative"),
        ('{"timestamp": "1", "input_length": 1}', "missing required field `output_length`"),
        ('{"timestamp": "1", "input_length": 1.5, "output_length": 1}', "Expected `int`"),
        ('{"timestamp": "1", "input_length": 4000000000, "output_length": 1}', "not a token count"),
        ('{"timestamp": "1", "input', "half-written"),
    ],
)
def test_a_bad_ragpulse_line_is_named(tmp_path, line, sentence):
    path = _file(tmp_path, "t.jsonl", RAG[0] + "\n" + line)
    with pytest.raises(InputError, match="row 2") as caught:
        read_trace(path)
    assert sentence in str(caught.value)
    assert squall.validate(path).findings[0].rows == [2]


def test_mooncake_lines_may_have_sessions(tmp_path):
    text = '{"timestamp": 5, "input_length": 1, "output_length": 1, "session_id": 7}\n' * 2
    trace = read_trace(_file(tmp_path, "t.jsonl", text))
    assert trace.meta.format == "mooncake"
    assert trace.table["turn"].to_list() == [1, 2]


# ------------------------------------------------------------------------------------------------------- conversations

CHAT = {
    "id": "a",
    "conversations": [
        {"from": "system", "value": "x" * 8},
        {"from": "human", "value": "x" * 9},
        {"from": "gpt", "value": "x" * 4},
        {"from": "human", "value": "xxxx"},
        {"from": "gpt", "value": ""},
        {"from": "human", "value": "x"},
    ],
}
LMSYS = {
    "conversation_id": "b",
    "model": "vicuna-13b",
    "conversation": [
        {"role": "assistant", "tokens": 3},
        {"role": "user", "tokens": 100},
        {"role": "assistant", "content": "never read", "tokens": 50},
    ],
}


@pytest.mark.parametrize("lines", [True, False])
def test_each_answer_is_a_request_with_all_before_it_as_its_prompt(tmp_path, lines):
    text = "\n".join(map(json.dumps, (CHAT, LMSYS))) if lines else json.dumps([CHAT, LMSYS], indent=1)
    path = _file(tmp_path, "t.json", text)
    trace = read_trace(path)
    assert trace.meta.format == "conversations"
    assert trace.table["request_tokens"].to_list() == [2 + 3, 2 + 3 + 1 + 1, 103]
    assert trace.table["response_tokens"].to_list() == [1, 0, 50]
    assert trace.table["session"].to_list() == [0, 0, 1]
    assert trace.table["turn"].to_list() == [1, 2, 1]
    assert trace.table["model"].to_list() == [None, None, "vicuna-13b"]
    assert trace.table["arrival"].to_list() == [0, 1, 2]
    assert "no times are recorded" in trace.meta.notes[0]
    assert trace.meta.notes[1].startswith("6 of 9 turns give no token count")
    found = {f.code: f.rows for f in squall.validate(path).findings}
    assert found["unasked"] == [2]
    assert found["unanswered"] == [1]


def test_a_list_of_length_pairs(tmp_path):
    trace = read_trace(_file(tmp_path, "t.json", "[[5, 7], [100, 0]]"))
    assert trace.table.select("request_tokens", "response_tokens").rows() == [(5, 7), (100, 0)]
    assert len(trace.meta.notes) == 1
    lines = read_trace(_file(tmp_path, "t.jsonl", "[5, 7]\n[100, 0]\n"))
    assert lines.table.equals(trace.table.with_columns())


@pytest.mark.parametrize(
    ("item", "sentence"),
    [
        ([1, 2, 3], "row 2: not a pair"),
        ([-1, 2], "row 2: not a pair"),
        ([True, 2], "row 2: not a pair"),
        ("text", "row 2: neither a conversation"),
        ({"id": 1}, "row 2: neither a conversation"),
        ({"conversations": [{"from": "alien", "value": ""}]}, "row 2: a turn is of 'alien'"),
        ({"conversations": [{"from": ["gpt"], "value": ""}]}, "row 2: a turn is of"),
        ({"conversations": ["hello"]}, "row 2: a turn is of 'None'"),
        ({"conversations": [{"from": "human"}]}, "row 2: a turn has neither a text nor a token count"),
        ({"conversations": [{"from": "human", "tokens": -5}]}, "row 2: a turn has neither"),
        ({"conversations": [{"from": "human", "tokens": 2**31}]}, "row 2: a turn has neither"),
    ],
)
def test_a_bad_conversation_is_named(tmp_path, item, sentence):
    path = _file(tmp_path, "t.json", json.dumps([[1, 2], item]))
    with pytest.raises(InputError, match=sentence):
        read_trace(path)


def test_a_cut_list_and_an_empty_one(tmp_path):
    with pytest.raises(InputError, match="row 1"):
        read_trace(_file(tmp_path, "t.json", '[{"conversations": [\n'))
    with pytest.raises(InputError, match="no request in it"):
        read_trace(_file(tmp_path, "t.json", "[]"))


def test_what_is_only_read_is_not_written(tmp_path):
    path = _file(tmp_path, "t.json", "[[5, 7]]")
    with pytest.raises(InputError, match="does not write"):
        squall.convert(path, tmp_path / "o.json", to="conversations")


# ---------------------------------------------------------------------------------------------------------- mapped CSV

MAPPING = "arrival=ts,request_tokens=prompt,response_tokens=completion"


def test_any_csv_by_its_columns(tmp_path):
    text = "id;ts;prompt;completion;conv;who;kind;took;bad\n"
    text += "1;10.5;5;7;u1;m1;api;1500;no\n2;11;6;8;;m2;;;yes\n3;12;6;0;u1;;conversation;2;\n"
    path = _file(tmp_path, "t.csv", text)
    mapping = f"{MAPPING},session=conv,model=who,service=kind,elapsed=took:ms,failed=bad"
    trace = read_trace(path, columns=mapping)
    assert trace.table["arrival"].to_list() == [0, 0.5, 1.5]
    assert trace.table["session"].to_list() == [0, None, 0]
    assert trace.table["model"].to_list() == ["m1", "m2", None]
    assert trace.table["service"].to_list() == ["api", None, "conversation"]
    assert trace.table["elapsed"].to_list() == [1.5, None, 0.002]
    assert trace.table["failed"].to_list() == [False, True, True]
    assert trace.meta.clock == 10.5
    assert trace.meta.format == "columns"
    assert trace.meta.notes == [f"columns were mapped: {mapping}"]
    assert squall.validate(path, columns=mapping).ok
    assert len(open_trace(path, columns=mapping, service="api")) == 1


def test_iso_times_keep_their_wall_clock_and_offsets(tmp_path):
    text = "ts,prompt,completion\n2024-05-10T23:00:00.5+02:00,1,2\n2024-05-10T21:00:01Z,1,2\n"
    trace = read_trace(_file(tmp_path, "t.csv", text), columns=MAPPING)
    assert trace.table["arrival"].to_list() == pytest.approx([0, 0.5])
    assert trace.meta.midnight == 23 * 3600 + 0.5
    assert trace.meta.weekday == 4


@pytest.mark.parametrize(("unit", "factor"), [("s", 1), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9)])
def test_units_of_times(tmp_path, unit, factor):
    path = _file(tmp_path, "t.csv", "ts,prompt,completion\n0,1,2\n3000,1,2\n")
    trace = read_trace(path, columns=MAPPING.replace("=ts", f"=ts:{unit}"))
    assert trace.table["arrival"][1] == pytest.approx(3000 * factor)


@pytest.mark.parametrize(
    ("mapping", "sentence"),
    [
        ("arrival", "'arrival' is not COLUMN=NAME"),
        ("arrival=", "is not COLUMN=NAME"),
        ("", "is not COLUMN=NAME"),
        ("arrival=ts", "request_tokens is missing"),
        (f"{MAPPING},colour=x", "there is no column 'colour'"),
        (f"{MAPPING},arrival=x", "arrival is given twice"),
        (f"{MAPPING},model=nope", "the file has no column 'nope'; it has ts, prompt, completion"),
        (f"{MAPPING},model=ts:ms", "the file has no column 'ts:ms'"),
    ],
)
def test_a_bad_mapping_is_named(tmp_path, mapping, sentence):
    path = _file(tmp_path, "t.csv", "ts,prompt,completion\n0,1,2\n")
    with pytest.raises(InputError, match="--columns") as caught:
        read_trace(path, columns=mapping)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("x,1,2", "row 2: 'ts' is 'x', which is not a number"),
        ("1,many,2", "row 2: 'prompt' is 'many'"),
        ("1,1,2.5", "row 2: 'completion' is '2.5', which is not a token count"),
        ("1,,2", "row 2: a field is missing"),
        ("-1,1,2", "row 2: 'ts' is '-1', which is negative"),
        ("2024-05-10 00:00:00,1,2", "row 2: 'ts' is '2024-05-10 00:00:00', which is not a number"),
        ("1,1,2,3", "row 2: more fields"),
    ],
)
def test_a_bad_row_of_a_mapped_file_is_named(tmp_path, row, sentence):
    path = _file(tmp_path, "t.csv", f"ts,prompt,completion\n0,1,2\n{row}\n")
    with pytest.raises(InputError) as caught:
        read_trace(path, columns=MAPPING)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("column", "value", "sentence"),
    [("failed", "maybe", "neither true nor false"), ("service", "batch", "known are 'conversation' and 'api'")],
)
def test_bad_values_of_optional_columns(tmp_path, column, value, sentence):
    path = _file(tmp_path, "t.csv", f"ts,prompt,completion,extra\n0,1,2,{value}\n")
    with pytest.raises(InputError, match=f"row 1: 'extra' is '{value}'.*{sentence}"):
        read_trace(path, columns=f"{MAPPING},{column}=extra")


def test_columns_are_for_lines_and_exclude_a_format(tmp_path):
    path = _file(tmp_path, "t.jsonl", RAG[0])
    with pytest.raises(InputError, match="no line has the field 'ts'"):
        read_trace(path, columns=MAPPING)
    with pytest.raises(InputError, match="a CSV file or the fields of JSON lines, and this is neither"):
        read_trace(_file(tmp_path, "t.json", f"[{RAG[0]}]"), columns=MAPPING)
    with pytest.raises(InputError, match="give one of them"):
        read_trace(path, "azure", MAPPING)


def test_an_unknown_csv_is_pointed_to_the_mapping(tmp_path):
    with pytest.raises(InputError, match="--columns maps"):
        read_trace(_file(tmp_path, "t.csv", "ts,prompt,completion\n0,1,2\n"))


BEGINS = [b"", b"{", b"[", b'{"timestamp": "', b"[[1,2],", b"a,b,c\n"]


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=200), begin=st.sampled_from(BEGINS))
def test_no_bytes_give_a_traceback(tmp_path_factory, data, begin):
    path = tmp_path_factory.mktemp("bytes") / "t"
    path.write_bytes(begin + data)
    for columns in (None, "arrival=a,request_tokens=b,response_tokens=c"):
        with contextlib.suppress(InputError):
            read_trace(path, columns=columns)
