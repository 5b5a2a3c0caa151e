"""The user's own text as prompts: exact lengths by /tokenize or by a tokenizer.json, else a word that they are not."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import mock  # noqa: UP026 - the file beside this one
import numpy as np
import pytest
from mock import Behaviour, Mock  # noqa: UP026

from squall.errors import InputError
from squall.replay import replay
from squall.replay.text import load_tokenizer, read_texts, text_of_words
from squall.trace.table import Trace, TraceMeta

WORDS = "a little text of words that are of very different lengths, incomprehensibilities and extraordinarily included"


def trace(n: int = 12) -> Trace:
    columns = {
        "arrival": np.arange(n) * 0.01,
        "request_tokens": 60 + 7 * np.arange(n),
        "response_tokens": np.full(n, 3),
    }
    return Trace.of(columns, TraceMeta(source="test", format="generated"))


def ids(text: str) -> list[int]:
    """A tokenizer that cuts at spaces first and makes a token of five letters at most."""
    return [
        sum(map(ord, piece)) for word in re.findall(r" ?\S+", text) for piece in re.findall(r".{1,5}", word.strip())
    ]


def counted(body: dict) -> int:
    """What the server of these tests counts: 11 for the chat template."""
    if "messages" in body:
        return 11 + sum(len(ids(message["content"])) for message in body["messages"])
    return len(body["prompt"]) if isinstance(body["prompt"], list) else len(ids(body["prompt"]))


SAYS = {
    "vllm": lambda found: {"count": len(found), "max_model_len": 4096, "tokens": found},
    "llama.cpp": lambda found: {"tokens": found},
    "tgi": lambda found: [{"id": one, "text": "x", "start": 0, "stop": 1} for one in found],
}


def tokenizing(says):
    def behave(number, seen):
        if seen.path != "/tokenize":
            return Behaviour()
        text = seen.body["inputs"]
        assert text == seen.body["prompt"] == seen.body["content"]
        return Behaviour(body=json.dumps(says(ids(text))).encode())

    return behave


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "texts.json"
    talk = [{"from": "human", "value": WORDS}, {"from": "gpt", "value": " ".join(reversed(WORDS.split()))}]
    file.write_text(json.dumps([{"id": 1, "conversations": talk * 20}]))
    return file


@pytest.mark.parametrize("server", SAYS)
def test_the_servers_tokenizer_makes_exact_lengths(server, prompts, monkeypatch):
    monkeypatch.setattr(mock, "prompt_tokens", counted)
    with Mock(tokenizing(SAYS[server])) as served:
        run = replay(trace(), url=served.url, prompts=prompts)
    assert run.table["request_tokens"].to_list() == run.table["asked_request_tokens"].to_list()
    assert run.meta.target["prompts"]["text"] == "own"
    assert run.meta.target["prompts"]["counted"]
    bodies = [seen.body["messages"][0]["content"] for seen in served.run if seen.path != "/tokenize"]
    assert all(" incomprehensibilities " in body for body in bodies)


def test_the_servers_tokenizer_makes_token_ids(prompts, monkeypatch):
    monkeypatch.setattr(mock, "prompt_tokens", counted)
    with Mock(tokenizing(SAYS["vllm"])) as served:
        run = replay(trace(), url=served.url, api="completions", prompts=prompts)
    assert run.table["request_tokens"].to_list() == run.table["asked_request_tokens"].to_list()
    known = set(ids(read_texts(prompts)))
    for seen in served.run:
        if seen.path != "/tokenize":
            assert known.issuperset(seen.body["prompt"][8:])  # after the eight that tell the requests apart


@pytest.mark.parametrize("answer", [b'{"tokens": "many"}', b"<html>", b'{"count": 3}'])
def test_a_tokenize_that_says_something_else_is_none(answer, prompts):
    def behave(number, seen):
        return Behaviour(body=answer) if seen.path == "/tokenize" else Behaviour()

    with Mock(behave) as served:
        run = replay(trace(), url=served.url, prompts=prompts)
    assert not run.meta.target["prompts"]["counted"]
    assert any("--tokenizer" in text for text in run.meta.notes)
    assert (run.table["status"] == "ok").all()


class Library:
    """What is used of the library `tokenizers`, with the tokenizer above in it."""

    @classmethod
    def from_file(cls, path):
        if "{" not in Path(path).read_text():
            raise Exception("expected value at line 1 column 1")  # the library raises no narrower one
        return cls()

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return SimpleNamespace(ids=ids(text))

    def encode_batch(self, texts, add_special_tokens):
        return [self.encode(text, add_special_tokens) for text in texts]


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_local_tokenizer_makes_exact_lengths(api, prompts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", SimpleNamespace(Tokenizer=Library))
    monkeypatch.setattr(mock, "prompt_tokens", counted)
    (tmp_path / "tokenizer.json").write_text("{}")
    with Mock() as served:
        run = replay(trace(), url=served.url, api=api, prompts=prompts, tokenizer=tmp_path)
    assert run.table["request_tokens"].to_list() == run.table["asked_request_tokens"].to_list()
    assert run.meta.target["prompts"]["counted"]
    assert not any(seen.path == "/tokenize" for seen in served.seen)


def test_the_true_library(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: number for number, word in enumerate(["<unk>", *sorted(set(WORDS.split()))])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))  # noqa: S106
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.ids("a little text") == [words["a"], words["little"], words["text"]]
    assert loaded.counts([" a", " little text"]) == {" a": 1, " little text": 2}


def test_what_is_wrong_with_a_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # importing it fails
    with pytest.raises(InputError, match="pip install tokenizers"):
        load_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", SimpleNamespace(Tokenizer=Library))
    with pytest.raises(InputError, match=r"no such file; give a tokenizer\.json"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "tokenizer.json").write_text("hello")
    with pytest.raises(InputError, match=r"not a tokenizer\.json \(expected value"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", "{half", "not JSON"),
        ("a.jsonl", '{"text": "a"}\n{half\n', "line 2: not JSON"),
        ("a.txt", "few words", "fewer than 100 words"),
        ("a.json", '[{"number": 3}]', "fewer than 100 words"),
    ],
)
def test_what_is_wrong_with_a_text(name, content, words, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=words):
        read_texts(tmp_path / name)
    with pytest.raises(InputError, match="cannot be read"):
        read_texts(tmp_path / "missing.txt")


def test_a_cut_never_has_more_tokens_than_asked_and_goes_around_the_end():
    counts = {" " + word: len(ids(word)) for word in WORDS.split()}
    text = text_of_words(WORDS, counts)
    for start in range(len(text.ends)):
        for tokens in (1, 2, 7, 60, 200):
            piece, left = text.cut(start, tokens)
            assert len(ids(piece.decode())) + left == tokens
            assert left < max(counts.values())
