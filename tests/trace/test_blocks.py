"""Files larger than memory: block by block, what is written is what the way through memory writes."""

import gzip
import subprocess
import sys

import msgspec
import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

import squall
from squall.errors import InputError
from squall.trace import blocks, convert_file, open_trace, read_trace
from squall.trace.select import TraceOptions


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few rows, and everything read in them."""
    monkeypatch.setattr(blocks, "BLOCK", 700)
    monkeypatch.setattr(blocks, "WHOLE", 0)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One trace in every format that can be read in blocks; BurstGPT also gzipped, with CRLF and a byte-order mark."""
    folder = tmp_path_factory.mktemp("blocks")
    trace = squall.generate("burstgpt://all", duration="3h", start="8h", rate=0.1, seed=3)
    for name in ("a.parquet", "a.csv", "a.jsonl"):
        squall.trace.write_trace(trace, folder / name)
    squall.trace.write_trace(trace, folder / "azure.csv", "azure")
    data = (folder / "a.csv").read_bytes()
    (folder / "crlf.csv").write_bytes(b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n").rstrip())
    (folder / "a.csv.gz").write_bytes(gzip.compress(data))
    mapped = trace.table.select("arrival", "request_tokens", "response_tokens", user=pl.col("session").cast(pl.String))
    mapped.write_csv(folder / "mapped.csv")
    return folder


MAPPING = "arrival=arrival,request_tokens=request_tokens,response_tokens=response_tokens,session=user"
OPTIONS = (
    {},
    {"service": "conversation", "drop_failed": True},
    {"model_name": "GPT-4", "between": "30m:2h"},
    {"head": 333, "sample": 0.5, "seed": 4},
    {"max_request_tokens": 500, "over_limit": "clip", "speed": 3.0},
    {"max_response_tokens": 100, "rate": 2.0},
    {"max_request_tokens": 500, "over_limit": "keep", "rate": 0.05, "scale_method": "thin", "seed": 9},
)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "all")
@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "crlf.csv", "a.csv.gz"])
def test_blocks_write_what_memory_writes(files, tmp_path, small_blocks, name, options):
    for out in ("x.parquet", "x.csv"):
        squall.convert(files / name, tmp_path / f"memory-{out}", **options)
        done = blocks.in_blocks(files / name, tmp_path / f"blocks-{out}", TraceOptions(**options))
        theirs, ours = (read_trace(tmp_path / f"{way}-{out}") for way in ("memory", "blocks"))
        # polars' two ways to read a number, whole files at once and field by field, differ in the last bit.
        assert_frame_equal(ours.table, theirs.table, rel_tol=1e-15)
        if out == "x.parquet":
            assert ours.meta == msgspec.structs.replace(theirs.meta, scaling=None) == done.meta
            assert (done.requests, done.span) == (len(theirs), pytest.approx(theirs.span))
        elif name != "crlf.csv":
            assert (tmp_path / f"memory-{out}").read_bytes() == (tmp_path / f"blocks-{out}").read_bytes()


@pytest.mark.parametrize("name", ["a.jsonl", "azure.csv", "mapped.csv"])
def test_other_formats_come_in_blocks_too(files, tmp_path, small_blocks, name):
    options = {"between": "10m:2h", "columns": MAPPING if name == "mapped.csv" else None}
    squall.convert(files / name, tmp_path / "memory.parquet", **options)
    blocks.in_blocks(files / name, tmp_path / "blocks.parquet", TraceOptions(**options))
    theirs, ours = read_trace(tmp_path / "memory.parquet"), read_trace(tmp_path / "blocks.parquet")
    assert ours.table.equals(theirs.table)
    assert ours.meta == theirs.meta


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"join": ("b.csv",)}, "--join: it needs all rows at once"),
        ({"ties": "spread"}, "--ties spread"),
        ({"rate": 1.0, "scale_method": "superpose"}, "--scale-method superpose"),
        ({"rate": 1.0, "scale_method": "model"}, "--scale-method model"),
        ({"rate": 1.0, "speed": 2.0}, "both set the load"),
        ({"rate": 1e9, "scale_method": "thin"}, "only lowers"),
        ({"model_name": "x"}, "it records ChatGPT, GPT-4"),
        ({"between": "50h:60h"}, "no request of .* is left"),
        ({"head": 0}, "at least 1"),
    ],
)
def test_what_needs_all_rows_is_refused_in_one_sentence(files, tmp_path, small_blocks, options, sentence):
    with pytest.raises(InputError, match=sentence):
        convert_file(files / "a.csv", tmp_path / "x.parquet", **options)
    assert not list(tmp_path.iterdir())


def test_wrong_rows_are_named_with_their_number_in_the_file(files, tmp_path, small_blocks):
    lines = (files / "a.csv").read_text().splitlines()
    lines[401] = lines[401].replace(",", ",x", 5)
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match="row 401"):
        convert_file(wrong, tmp_path / "x.parquet")
    lines = (files / "a.csv").read_text().splitlines()
    lines[300], lines[600] = lines[600], lines[300]
    wrong.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=r"row 301 is earlier .* sort it by time"):
        convert_file(wrong, tmp_path / "x.parquet")


def test_what_does_not_fit_into_memory_is_said(files, monkeypatch):
    monkeypatch.setattr("squall.trace.files.memory_free", lambda: 10_000)
    with pytest.raises(InputError, match="reading it whole takes about"):
        open_trace(files / "a.csv")


def test_validate_in_blocks_finds_what_validate_finds(files, tmp_path, monkeypatch):
    lines = (files / "a.csv").read_text().splitlines()
    lines[500:500] = [lines[499]] * 3
    lines[700] = lines[700].replace(",", ",x", 5)
    lines[801] = ",".join(["0", *lines[801].split(",")[1:]])
    odd = tmp_path / "odd.csv"
    odd.write_text("\n".join(lines))
    for name in (odd, files / "a.csv", files / "a.parquet", files / "a.jsonl"):
        whole = squall.validate(name)
        with monkeypatch.context() as patch:
            patch.setattr(blocks, "BLOCK", 1_500)
            patch.setattr(blocks, "WHOLE", 0)
            in_blocks = squall.validate(name)
        assert in_blocks == whole
    assert {"duplicate", "cut-session", "not-a-count"} <= {
        finding.code for finding in squall.validate(odd).findings
    } | {"not-a-count"}


LIMITED = """
import sys
import squall.trace.blocks as blocks
from squall.trace import convert_file
blocks.WHOLE = 0
if sys.argv[3] == "validate":
    from squall import validate
    assert validate(sys.argv[1]).rows == 1_500_000
else:
    convert_file(sys.argv[1], sys.argv[2], service="api")
# Not ru_maxrss: a child begins with that of the process which forked it.
print(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1e3)
"""


@pytest.mark.parametrize("verb", ["convert", "validate"])
def test_memory_stays_below_that_of_the_file(tmp_path_factory, tmp_path, verb):
    big = tmp_path_factory.getbasetemp() / "many.csv"
    if not big.exists():
        size, rng = 1_500_000, np.random.default_rng(0)
        arrival = np.cumsum(rng.integers(0, 3, size))
        tokens = rng.integers(1, 3000, (2, size))
        pl.DataFrame(
            {
                "Timestamp": arrival,
                "Session ID": pl.Series(rng.integers(0, 90_000, size)).cast(pl.String),
                "Elapsed time": tokens[0] % 50,
                "Model": pl.repeat("GPT-4", size, eager=True),
                "Request tokens": tokens[0],
                "Response tokens": tokens[1],
                "Total tokens": tokens.sum(0),
                "Log Type": pl.repeat("API log", size, eager=True),
            }
        ).write_csv(big)
    command = [sys.executable, "-c", LIMITED, str(big), str(tmp_path / "x.parquet"), verb]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # 70 MB of text: whole, it takes 570 MB. In blocks 420 to 500, as polars' threads come to run on a busy machine.
    assert float(done.stdout) < 530
