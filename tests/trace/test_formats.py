"""The readers: known facts about the real files, round trips, and one clear sentence for everything that is wrong."""

import gzip
import io
import math

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import squall
from squall.errors import InputError
from squall.trace import Trace, TraceMeta

HEADER6 = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
HEADER8 = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type"
ROWS6 = ["5,ChatGPT,472,18,490,Conversation log", "45,GPT-4,1087,230,1317,API log", "45,GPT-4,0,0,0,API log"]
ROWS8 = [
    "100.0,aaaa-1,43,GPT-4,906,446,1352,Conversation log",
    "160.0,,0,ChatGPT,36,29,65,API log",
    "170.0,aaaa-1,2,GPT-4,1400,12,1412,Conversation log",
]


def _write(path, *lines, end="\n", last=True, bom=False):
    text = end.join(lines) + (end if last else "")
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("bom", [True, False])
def test_burstgpt_six_columns_with_every_line_ending(tmp_path, end, last, bom):
    trace = squall.read_trace(_write(tmp_path / "t.csv", HEADER6, *ROWS6, end=end, last=last, bom=bom))
    assert trace.table["arrival"].to_list() == [0, 40, 40]
    assert trace.table["service"].to_list() == ["conversation", "api", "api"]
    assert trace.table["model"].to_list() == ["ChatGPT", "GPT-4", "GPT-4"]
    assert trace.table["failed"].to_list() == [False, False, True]
    assert trace.table["session"].null_count() == 3
    assert (trace.meta.clock, trace.meta.midnight, trace.meta.weekday, trace.meta.tick) == (5, 5, 2, 1)


def test_burstgpt_eight_columns_are_found_by_name(tmp_path):
    trace = squall.read_trace(_write(tmp_path / "t.csv", HEADER8, *ROWS8))
    assert trace.table["request_tokens"].to_list() == [906, 36, 1400]
    assert trace.table["elapsed"].to_list() == [43, 0, 2]
    assert trace.table["session"].to_list() == [0, None, 0]
    assert trace.table["turn"].to_list() == [1, None, 2]


def test_columns_may_stand_in_any_order(tmp_path):
    path = _write(tmp_path / "t.csv", "Log Type,Response tokens,Timestamp,Request tokens", "API log,7,3,9")
    trace = squall.read_trace(path)
    assert trace.table.select("request_tokens", "response_tokens", "service").row(0) == (9, 7, "api")
    assert trace.table["model"][0] is None


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("abc,ChatGPT,1,2,3,API log", r"row 2: 'Timestamp' is 'abc', which is not a number"),
        ("-7,ChatGPT,1,2,3,API log", r"row 2: 'Timestamp' is '-7', which is negative"),
        ("7,ChatGPT,many,2,3,API log", r"row 2: 'Request tokens' is 'many', which is not a number"),
        ("7,ChatGPT,1.5,2,3,API log", r"row 2: 'Request tokens' is '1.5', which is not a token count"),
        ("7,ChatGPT,3000000000,2,3,API log", r"row 2: .* not a token count"),
        ("nan,ChatGPT,1,2,3,API log", r"row 2: 'Timestamp' is 'nan', which is not a number"),
        ("7,ChatGPT,,2,3,API log", r"row 2: a field is missing or empty"),
        ("7,ChatGPT,1,2,3,API log,extra", r"row 2: more fields than the header's 6"),
        ("7,ChatGPT,1,2,3,Other log", r"row 2: 'Log Type' is 'Other log'"),
    ],
)
def test_a_bad_row_is_named(tmp_path, line, sentence):
    path = _write(tmp_path / "t.csv", HEADER6, ROWS6[0], line, ROWS6[1])
    with pytest.raises(InputError, match=sentence) as caught:
        squall.read_trace(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    finding = squall.validate(path).findings[0]
    assert finding.severity == "error"
    assert finding.rows == [2]


def test_a_half_written_last_line_is_an_error_that_says_so(tmp_path):
    path = _write(tmp_path / "t.csv", HEADER6, *ROWS6, "99,ChatGPT,12", last=False)
    with pytest.raises(InputError, match=r"row 4: .*half-written"):
        squall.read_trace(path)
    lines = _write(
        tmp_path / "t.jsonl", '{"timestamp":0,"input_length":5,"output_length":1}', '{"timestamp":3000,"inp', last=False
    )
    with pytest.raises(InputError, match=r"row 2: .*half-written"):
        squall.read_trace(lines)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "the file is empty"),
        (b"  \n\n", "the file is empty"),
        (HEADER6.encode() + b"\n", "only a header"),
        (b"Timestamp,Model,Request tokens\n1,a,2\n", "column 'Response tokens' is missing"),
        (b"TIMESTAMP,ContextTokens\n", "column 'GeneratedTokens' is missing"),
        (b"<html><body>504</body></html>", "not a trace format"),
        (b"\x00\x01\x02\x03garbage", "not a trace format"),
        (b"PAR1 but no more", "cannot be read as a squall Parquet"),
        (b"\x1f\x8bnot gzip", "gzip data are damaged"),
        (b"TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "row 1: 'TIMESTAMP' is 'yesterday'"),
        (b'{"timestamp": -1, "input_length": 1, "output_length": 1}\n', "row 1: timestamp is -1.0, which is negative"),
        (b'{"timestamp": 1, "input_length": "x", "output_length": 1}\n', "row 1: Expected `int`"),
        (b'{"timestamp": 1, "output_length": 1}\n', "row 1: Object missing required field `input_length`"),
        (b"{broken\n", "row 1: JSON is malformed"),
    ],
)
def test_a_file_that_is_no_trace_gets_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "bad"
    path.write_bytes(content)
    with pytest.raises(InputError, match=sentence) as caught:
        squall.read_trace(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_directories_and_missing_files_are_named(tmp_path):
    with pytest.raises(InputError, match="is a directory"):
        squall.read_trace(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        squall.read_trace(tmp_path / "absent.csv")


def test_rows_out_of_order_are_sorted_and_noted(tmp_path):
    path = _write(tmp_path / "t.csv", HEADER6, ROWS6[1], ROWS6[0])
    trace = squall.read_trace(path)
    assert trace.table["request_tokens"].to_list() == [472, 1087]
    assert "row 2 is earlier" in trace.meta.notes[0]
    assert [f.code for f in squall.validate(path).findings if f.severity == "warning"] == ["out-of-order"]


def test_validate_lists_everything_with_rows(tmp_path):
    rows = [
        *ROWS6,
        ROWS6[0],
        "50,GPT-4,10000000,5,10000005,API log",
        "60,GPT-4,0,5,5,API log",
        "70,GPT-4,1,2,9,API log",
        "9000,GPT-4,1,2,3,API log",
    ]
    found = {f.code: f.rows for f in squall.validate(_write(tmp_path / "t.csv", HEADER6, *rows)).findings}
    assert found == {
        "out-of-order": [4],
        "no-prompt": [6],
        "very-long-request": [5],
        "wrong-total": [7],
        "failed": [3],
        "failed-without-length": [3],
        "duplicate": [4],
        "silence": [8],
        "tie": [3],
        "raw": [],
        "head-only": [],
        "no-prefixes": [],
    }


def test_validate_names_the_quirks_of_burstgpt(tmp_path):
    uuid = "1722ac82-0a46-4bf0-aa08-89794e7a2b3f"
    rows = [
        f"20000000.0,{uuid},43,GPT-4,906,446,1352,Conversation log",
        "20000001.0,,0,ChatGPT,36000,29,36029,API log",
        "20000002.0,,,ChatGPT,36,29,65,API log",
        f"20000003.0,{uuid},2,GPT-4,90,12,102,Conversation log",
    ]
    path = _write(tmp_path / "BurstGPT_3.csv", HEADER8, *rows, end="\r\n", last=False, bom=True)
    result = squall.validate(path)
    assert result.ok
    assert {f.code: f.rows for f in result.findings} == {
        "not-the-published-file": [],
        "without-failures": [],
        "byte-order-mark": [],
        "crlf": [],
        "no-last-newline": [],
        "uuid-sessions": [],
        "long-context": [2],
        "elapsed-zero": [2],
        "elapsed-missing": [3],
        "shrinking-session": [4],
        "cut-session": [],
        "no-prefixes": [],
    }
    numbered = _write(tmp_path / "t.csv", HEADER8, rows[0].replace(uuid, "7"))
    assert "number-sessions" in {f.code for f in squall.validate(numbered).findings}


def test_validate_knows_a_published_file(tmp_path, monkeypatch):
    import hashlib

    from squall.trace import catalogue

    path = _write(tmp_path / "renamed.csv", HEADER6, *ROWS6)
    file = catalogue.PublicFile("x.csv", 1, hashlib.sha256(path.read_bytes()).hexdigest())
    entry = catalogue.DataSet("known", "a title", "none", "https://nowhere.invalid", (file,))
    monkeypatch.setattr(catalogue, "_DATA_SETS", (entry,))
    finding = next(f for f in squall.validate(path).findings if f.code == "published-file")
    assert finding.message == "byte for byte the published known: a title"


def test_gzip_is_read(tmp_path):
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress("\n".join([HEADER6, *ROWS6]).encode()))
    assert len(squall.read_trace(path)) == 3


def test_azure_times_keep_their_seven_digits(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(
        b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        b"2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:46.6805907,1,2"
    )
    trace = squall.read_trace(path)
    assert trace.table["arrival"].to_list() == pytest.approx([0, 7e-7], rel=1e-12)
    assert trace.meta.weekday == 3
    squall.convert(trace, tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text().splitlines()[1:] == path.read_text().splitlines()[1:]


def test_azure_2024_stamps_carry_an_offset(tmp_path):
    path = _write(
        tmp_path / "t.csv",
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2024-05-10 00:00:00.009930+00:00,1452,3",
        "2024-05-10 00:00:01+00:00,10,3",
    )
    trace = squall.read_trace(path)
    assert trace.table["arrival"].to_list() == pytest.approx([0, 0.99007], rel=1e-12)
    assert trace.meta.midnight == pytest.approx(0.00993)


_tokens = st.integers(0, 200_000)


@st.composite
def _tables(draw):
    size = draw(st.integers(1, 30))
    column = lambda strategy: draw(st.lists(strategy, min_size=size, max_size=size))  # noqa: E731
    gaps = column(st.integers(0, 10**7))
    return pl.DataFrame(
        {
            "arrival": [sum(gaps[1 : i + 1]) / 1e6 for i in range(size)],
            "request_tokens": column(_tokens),
            "response_tokens": column(_tokens),
            "service": column(st.sampled_from(["conversation", "api", None])),
            "model": column(st.sampled_from(["ChatGPT", "GPT-4", None])),
            "session": column(st.one_of(st.none(), st.integers(0, 5))),
            "elapsed": column(st.one_of(st.none(), st.integers(0, 100).map(float))),
        },
        schema_overrides={"service": pl.String, "model": pl.String, "session": pl.Int64, "elapsed": pl.Float64},
    )


@settings(max_examples=40, deadline=None)
@given(table=_tables(), suffix=st.sampled_from([".csv", ".parquet", ".jsonl"]))
def test_what_is_written_is_read_back(tmp_path_factory, table, suffix):
    trace = Trace.of(table, TraceMeta(source="x", format="generated", clock=1000.0))
    path = tmp_path_factory.mktemp("t") / f"t{suffix}"
    squall.convert(trace, path)
    back = squall.read_trace(path).table
    assert back["arrival"].to_list() == pytest.approx(
        trace.table["arrival"].to_list(), abs=1e-9 if suffix == ".parquet" else 1e-6
    )
    kept = ["request_tokens", "response_tokens", "failed"]
    if suffix != ".jsonl":
        kept += ["service", "model", "elapsed"]
    if suffix == ".parquet":
        kept += ["session", "turn"]
    assert back.select(kept).equals(trace.table.select(kept))
    if suffix == ".csv":
        same = lambda t: [[a == b and a is not None for a in t["session"]] for b in t["session"]]  # noqa: E731
        assert same(back) == same(trace.table)


def test_parquet_keeps_the_metadata(tmp_path):
    trace = squall.read_trace(_write(tmp_path / "t.csv", HEADER6, *ROWS6))
    squall.convert(trace, tmp_path / "t.parquet", head=2)
    back = squall.read_trace(tmp_path / "t.parquet")
    assert back.meta.sha256 == trace.meta.sha256
    assert back.meta.steps == ["--head 2 (2 of 3 rows)"]


def test_mooncake_round_trip_is_byte_exact(tmp_path):
    text = '{"timestamp":0,"input_length":513,"output_length":5,"hash_ids":[0,1]}\n'
    text += '{"timestamp":3000,"input_length":512,"output_length":1,"hash_ids":[0]}\n'
    (tmp_path / "a.jsonl").write_text(text)
    squall.convert(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert (tmp_path / "b.jsonl").read_text() == text


def test_unknown_suffixes_and_missing_directories_are_named(tmp_path):
    path = _write(tmp_path / "t.csv", HEADER6, *ROWS6)
    with pytest.raises(InputError, match=r"suffix '\.xlsx'"):
        squall.convert(path, tmp_path / "t.xlsx")
    with pytest.raises(InputError, match="does not exist"):
        squall.convert(path, tmp_path / "no" / "t.csv")


# ------------------------------------------------------------------------------------------------------- real files


def test_azure_conversation_is_as_published(traces):
    trace = squall.read_trace(traces / "azure-2023" / "AzureLLMInferenceTrace_conv.csv")
    assert len(trace) == 19_366
    assert trace.span == pytest.approx(3501.7, abs=0.05)
    assert round(trace.table["request_tokens"].mean()) == 1155
    assert round(trace.table["response_tokens"].mean()) == 211
    assert trace.table["request_tokens"].max() == 14_050
    assert trace.meta.sha256 == "2f1e5b666d4e3055fdbba98598ce2ec307767b9064e03e2fa46676dbcc7d0bf8"


def test_azure_conversation_survives_a_round_trip(traces, tmp_path):
    source = traces / "azure-2023" / "AzureLLMInferenceTrace_conv.csv"
    squall.convert(source, tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_bytes().split() == source.read_bytes().split()


def test_mooncake_conversation_is_as_published(traces):
    trace = squall.read_trace(traces / "mooncake" / "conversation_trace.jsonl")
    assert len(trace) == 12_031
    assert round(trace.table["request_tokens"].mean()) == 12_035
    assert round(trace.table["response_tokens"].mean()) == 343
    assert trace.table["prefix"].explode().n_unique() == 182_790
    assert trace.meta.tick == pytest.approx(3, abs=0.01)
    assert squall.validate(traces / "mooncake" / "conversation_trace.jsonl").ok


def test_first_rows_of_burstgpt_part_1(traces):
    trace = squall.read_trace(traces / "burstgpt" / "BurstGPT_1_first30_rows.csv")
    assert len(trace) == 30
    assert trace.table["service"].unique().to_list() == ["conversation"]
    failed = trace.table.filter("failed")
    assert (failed["arrival"] + trace.meta.clock).to_list() == [1106]
    gaps = trace.table["arrival"].diff().drop_nulls()
    assert gaps.mean() == pytest.approx(78.9, abs=0.05)
    assert gaps.std(ddof=0) / gaps.mean() == pytest.approx(0.83, abs=0.005)


def test_head_of_burstgpt_part_3(traces):
    trace = squall.read_trace(traces / "burstgpt" / "burstgpt_3_conversation_head418.csv")
    assert len(trace) == 418
    assert trace.meta.clock == 19_440_110
    assert trace.meta.weekday == 3  # day 225: Thursday, 13 June 2024
    assert trace.table["session"].n_unique() == 141
    assert trace.table["turn"].max() == 24
    assert not math.isnan(trace.rate)


# ---------------------------------------------------------------------------------------- the fast way and the careful


@settings(max_examples=40, deadline=None)
@given(table=_tables(), name=st.sampled_from(["burstgpt", "azure"]), end=st.sampled_from(["\n", "\r\n"]))
def test_the_fast_reader_and_the_careful_one_agree(table, name, end):
    import squall.trace.formats.azure as azure
    import squall.trace.formats.burstgpt as burstgpt
    from squall.trace.formats import FORMATS

    trace = Trace.of(table, TraceMeta(source="x", format=name, clock=1000.0))
    file = io.BytesIO()
    FORMATS[name].write(iter([trace.table]), lambda: trace.meta, file, bool(table["session"].drop_nulls().len()))
    data = file.getvalue().replace(b"\n", end.encode())
    with pytest.MonkeyPatch.context() as patch:
        fast = FORMATS[name].parse(data)
        for module in (azure, burstgpt):
            patch.setattr(module, "read_typed", lambda *args: None)
        careful = FORMATS[name].parse(data)
    assert not fast.findings
    assert not careful.findings
    assert fast.columns.equals(careful.columns)
    assert fast.meta == careful.meta
    assert fast.session_kind == careful.session_kind


@pytest.mark.parametrize(
    "field",
    ["12.0", " 12", "-3", "3000000000", "", "nan", "abc", '"12"'],
)
def test_whatever_is_unusual_goes_the_careful_way(field):
    from squall.trace.formats.rows import read_typed

    types = {"a": pl.Int32, "b": pl.String}
    assert read_typed(b"a,b\n1,x\n", types, ("a",)) is not None
    frame = read_typed(f"a,b\n1,x\n{field},y\n".encode(), types, ("a",))
    assert frame is None or frame["a"].to_list() == [1, 12]
    assert read_typed(b"a,b\n1, x\n", types, ("a",)) is None
    assert read_typed(b"a,c\n1,x\n", types, ("a",)) is None
    assert read_typed(b"b\nx\n", types, ("a",)) is None
    assert read_typed(b"a,b\n1,\xff\n", types, ("a",)) is None
