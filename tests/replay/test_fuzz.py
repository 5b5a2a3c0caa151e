"""The fuzzer's question, asked of bytes that hypothesis draws: `fuzz.py` says what must hold."""

from fuzz import HEAD, SEEDS, check, framed
from hypothesis import given
from hypothesis import strategies as st

CUTS = st.lists(st.integers(1, 1500), max_size=8)
BODY = st.lists(st.sampled_from(SEEDS) | st.binary(max_size=12), max_size=8).map(b"".join)


@given(BODY, CUTS, CUTS)
def test_any_body_in_any_chunks_and_reads(body, chunks, reads):
    check(framed(body, chunks), reads)


@given(BODY, CUTS, CUTS, st.integers(0, 1500), st.binary(max_size=6))
def test_any_bytes_in_the_framing(body, chunks, reads, place, odd):
    stream = framed(body, chunks)
    check(stream[:place] + odd + stream[place + len(odd) :], reads)


@given(st.binary(max_size=200), CUTS, st.sampled_from([b"", HEAD, b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 200 OK\r\n\r\n"]))
def test_garbage(garbage, reads, head):
    check(head + garbage, reads)


def test_every_cut_of_a_stream():
    stream = framed(b"".join(SEEDS[:5] + SEEDS[-1:]), [80, 81, 200])
    for place in range(1, len(stream)):
        check(stream, [place])
    check(stream, list(range(len(stream))))
