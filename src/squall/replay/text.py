"""The user's own text as prompts: ShareGPT-like JSON, JSON lines, or any text, cut into units of known token counts.

A byte-pair tokenizer cuts a text at its spaces before it merges anything, so the tokens of a sentence are the tokens of
its words, each taken with the space before it: counted once per word, they make prompts of an exact length by slicing.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from squall.errors import InputError
from squall.replay.prompt import WORDS, Text
from squall.seeds import stream

MOST_TEXT = 1 << 22
"""Characters of the user's text that are used."""
MOST_WORDS = 1 << 19
MOST_COUNTED = 2000
"""Different words whose tokens are counted; rarer ones are left out of the prompts."""


def read_texts(path: str | Path) -> str:
    """All texts in a file, joined. InputError if there are none.

    JSON: a list of conversations or records; JSON lines: one per line; a text is the value of `value`, `content`,
    `text`, `prompt`, `instruction`, `input` or `question`, at any depth. Any other file is a text itself.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"--prompts {path}: cannot be read ({error.strerror}).") from error
    if path.suffix in (".json", ".jsonl"):
        documents = [content] if path.suffix == ".json" else content.splitlines()
        found: list[str] = []
        for number, document in enumerate(documents, 1):
            if document.strip():
                try:
                    _collect(msgspec.json.decode(document), found)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    where = f"line {number}: " if path.suffix == ".jsonl" else ""
                    raise InputError(f"--prompts {path}: {where}not JSON ({error}).") from error
            if sum(map(len, found[-1:])) and sum(map(len, found)) > MOST_TEXT:
                break
        text = "\n".join(found)
    else:
        text = content.decode("utf-8", "replace")
    if len(text.split()) < 100:
        raise InputError(f"--prompts {path}: fewer than 100 words of text are in it; prompts need more.")
    return text[:MOST_TEXT]


_NAMES = ("value", "content", "text", "prompt", "instruction", "input", "question")


def _collect(value: Any, found: list[str], named: bool = False) -> None:
    stack = [(value, named)]
    while stack:
        value, named = stack.pop()
        if isinstance(value, str) and named:
            found.append(value)
        elif isinstance(value, list):
            stack += [(item, named) for item in reversed(value)]
        elif isinstance(value, dict):
            stack += [(item, name in _NAMES) for name, item in reversed(value.items())]


class Tokenizer:
    """A `tokenizer.json` of this machine."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def ids(self, text: str) -> list[int]:
        """The token ids of `text`, without special ones."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def counts(self, words: list[str]) -> dict[str, int]:
        """Tokens of each word, with the space before it."""
        encoded = self._tokenizer.encode_batch(words, add_special_tokens=False)
        return {word: len(one.ids) for word, one in zip(words, encoded, strict=True)}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a file; nothing is downloaded. InputError if it or the library `tokenizers` is missing."""
    try:
        from tokenizers import Tokenizer as Library  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise InputError("--tokenizer needs the library tokenizers: pip install tokenizers.") from error
    path = Path(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"--tokenizer {path}: there is no such file; give a tokenizer.json.")
    try:
        return Tokenizer(Library.from_file(str(path)))
    except Exception as error:
        raise InputError(f"--tokenizer {path}: not a tokenizer.json ({error}).") from error


def sample_words() -> str:
    """The built-in words in a random order that is always the same."""
    words = WORDS.split()
    return " ".join(words[index] for index in stream(0, "words").integers(0, len(words), 1 << 15))


def most_common_words(text: str) -> list[str]:
    """The words of `text` with the space before them, most common first."""
    return [word for word, _ in Counter(_words(text)).most_common(MOST_COUNTED)]


def _words(text: str) -> list[str]:
    return [" " + word for word in re.findall(r"\S+", text)][:MOST_WORDS]


def text_of_words(text: str, counts: dict[str, int] | None) -> Text:
    """The words of `text` as units; with `counts`, those that are counted, else every one counts as one token."""
    words = [word for word in _words(text) if counts is None or counts.get(word)]
    units = [msgspec.json.encode(word)[1:-1] for word in words]
    tokens = np.ones(len(units), dtype=np.int64) if counts is None else np.array([counts[word] for word in words])
    return Text(b"".join(units), np.cumsum([len(unit) for unit in units]), np.cumsum(tokens), counts is not None)


def text_of_ids(ids: list[int]) -> Text:
    """Token ids as units."""
    units = [b"%d," % one for one in ids]
    return Text(b"".join(units), np.cumsum([len(unit) for unit in units]), np.arange(1, len(ids) + 1), True)
