"""Prompts: exact lengths, no two alike, and bodies that are the JSON they should be."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from squall.replay.prompt import WIDTH, Dialect, Fit, Prompts, symbols

RUN = Prompts("words", salt="run", seed=0, fresh=b"monday!!")


@pytest.mark.parametrize("tokens", ["ids", "words"])
def test_the_alphabet_has_256_symbols_of_one_width(tokens):
    alphabet = symbols(tokens)
    assert len(set(alphabet)) == 256
    assert {len(symbol) for symbol in alphabet} == {WIDTH}


@given(st.integers(0, 2**40), st.integers(1, 2000))
def test_lengths_are_exact(row, length):
    assert len(RUN.text(row, length)) == WIDTH * length
    assert len(RUN.text(row, length).split()) == length


def test_a_prompt_longer_than_the_pool():
    length = 2**20 + 12345
    text = RUN.text(3, length)
    assert len(text) == WIDTH * length
    assert text.startswith(RUN.text(3, 100))


def test_no_two_rows_begin_alike():
    openings = {RUN.text(row, 8) for row in range(20_000)}
    assert len(openings) == 20_000


def test_salts():
    def text(salt, fresh):
        return Prompts("ids", salt=salt, seed=0, fresh=fresh).text(7, 50)

    assert text("run", b"monday") != text("run", b"friday")
    assert text("request", b"monday") != text("request", b"friday")
    assert text("none", b"monday") == text("none", b"friday")
    monday, friday = text("run", b"monday"), text("run", b"friday")
    assert monday[: 4 * WIDTH] != friday[: 4 * WIDTH]  # from the start, where prefix caches look


@given(st.integers(0, 60), st.integers(1, 3), st.integers(1, 5000))
def test_a_fit_meets_the_length(overhead, slope, tokens):
    fit = Fit.through([16, 144], [overhead + slope * 16, overhead + slope * 144])
    words = fit.words(tokens)
    assert words >= 1
    if words > 1:
        assert abs(fit.tokens(words) - tokens) <= slope / 2


def test_a_fit_through_one_point_is_an_overhead():
    assert Fit.through([16, 16], [27, 27]) == Fit(11.0, 1.0)


def test_chat_body():
    dialect = Dialect("chat", "m", "words", extra={"temperature": 0})
    body = json.loads(dialect.body(RUN.text(1, 12), 34))
    content = body.pop("messages")[0]["content"]
    assert len(content.split()) == 12
    assert body == {
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "temperature": 0,
        "max_tokens": 34,
        "min_tokens": 34,
    }


def test_ids_body():
    dialect = Dialect("completions", None, "ids", fields=())
    ids = Prompts("ids", salt="none", seed=1, fresh=b"").text(1, 12)
    body = json.loads(dialect.body(ids, 5))
    assert len(body["prompt"]) == 12
    assert all(1000 <= token <= 9999 for token in body["prompt"])
    assert body.keys() == {"stream", "prompt", "max_tokens"}


def test_words_completion_body():
    body = json.loads(Dialect("completions", "m", "words").body(RUN.text(1, 3), 5))
    assert len(body["prompt"].split()) == 3
