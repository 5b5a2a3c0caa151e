"""Prompts of an exact number of tokens, made by slicing, and the request bodies around them.

A prompt is a sequence of symbols of five bytes each, every symbol one token: token ids of four digits (`"1234,"`) where
the server takes ids, else common English words of four letters (`" time"`), which are one token each in the
vocabularies in use. So a prompt of any length is one slice of a long random text. It opens with a mark made from the
row and from a salt that no earlier run had: no prefix cache answers it from another run or another row.

The chat template around a prompt costs tokens too: tokens = overhead + slope × words, measured on the server's usage.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import msgspec
import numpy as np

from squall.seeds import stream

Api = Literal["chat", "completions", "responses"]
Salt = Literal["run", "request", "none"]
Tokens = Literal["ids", "words"]

WORDS = """
able acid also area away baby back ball base been best bill blue body bond book born both burn call came camp card
care case cell city code cold come cool copy core cost dark data date dead deal deep does done down draw drug each
easy else even face fact fail fair fall farm fast feed feel feet felt file film find fire fish five flow food foot
form four free from fuel full fund gain game give goal gold good grow hair half hand hard have head heat held help
here high hold home host idea into iron just keep kind king know land last late lead left less life like line link
list live load long look loss lost love made main make male many mark mass mean milk mill mind miss more most move
much must name near need news next note once only open over pack page pain part pass past path pick plan play poll
poor port post race rare rate read real rest rich rise risk road rock role room root rule safe said same save seek
seen self sent show side sign site size skin slow soft soil sold some soon sort spot star stay step stop such take
talk task team tell term test text than that them then they this thus time tool town tree true turn type unit upon
used user vary very view walk want warm ways weak week well went were what when wide wild will wind with wood word
work year your
"""
"""Every one a single token in the GPT-2 family's vocabularies, with and without a space before it."""

WIDTH = 5  # bytes of a symbol
_POOL = 1 << 19  # symbols in the random text
_MARK = 8  # symbols of the opening, a byte each: 64 bits


def symbols(tokens: Tokens) -> list[bytes]:
    """The alphabet: 256 symbols of WIDTH bytes, each one token, so that a symbol says a byte."""
    if tokens == "ids":
        # Below 1000 lie the special tokens and single bytes of many vocabularies; above 9999 a small one may end.
        return [b"%d," % (1000 + 35 * value) for value in range(256)]
    return [b" " + word.encode() for word in WORDS.split()]


@dataclass(frozen=True)
class Text:
    """A text of the user's, cut into units (words, or token ids) whose tokens are counted; escaped for JSON."""

    content: bytes
    ends: np.ndarray
    """int64: where each unit ends in `content`."""
    tokens: np.ndarray
    """int64: tokens up to the end of each unit."""
    exact: bool
    """The counts are the tokenizer's; else every unit counts as one and the fit to the server's usage does the rest."""

    def cut(self, start: int, tokens: int) -> tuple[bytes, int]:
        """Units from unit `start` on, around the end if need be, of at most `tokens` tokens; and how many are left."""
        pieces, start = [], start % len(self.ends)
        while tokens > 0:
            before = int(self.tokens[start - 1]) if start else 0
            stop = int(np.searchsorted(self.tokens, before + tokens, side="right"))
            if stop <= start:
                break
            pieces.append(self.content[int(self.ends[start - 1]) if start else 0 : int(self.ends[stop - 1])])
            tokens -= int(self.tokens[stop - 1]) - before
            if stop < len(self.ends):
                break
            start = 0
        return b"".join(pieces), tokens


@lru_cache(2)
def random_text(tokens: Tokens, seed: int) -> bytes:
    """The symbols that prompts are sliced from; made once in a process."""
    alphabet = np.array(symbols(tokens), dtype=f"S{WIDTH}")
    return alphabet[stream(seed, "prompts").integers(0, 256, _POOL)].tobytes()


class Prompts:
    """The prompts of a run: `text(row, length)` is `length` symbols, unlike all others from the first symbol on."""

    def __init__(
        self, tokens: Tokens, *, salt: Salt, seed: int, fresh: bytes, own: Text | None = None, block_size: int = 0
    ) -> None:
        """`fresh` are random bytes, new in every run. Salt `run` mixes them into all openings, `none` does not.

        Salt `request` mixes the request in as well, so that nothing is shared. `own` is text to cut prompts from
        instead of random words; `block_size` the tokens of a block hash.
        """
        self._symbols = symbols(tokens)
        self._pool = random_text(tokens, seed)
        self._salt, self._seed = b"" if salt == "none" else fresh, seed
        self._shares = salt != "request"
        self._own, self._block_size = own, block_size

    def text(self, row: int, length: int, root: int | None = None, blocks: Sequence[int] = ()) -> bytes:
        """The prompt of `row`: `length` tokens.

        Where `root` is another row, the prompt begins like that row's, as far as both go. The text of a block is the
        same wherever its hash stands, `block_size` tokens; the last one is cut to the length.
        """
        if not self._shares:
            return self._cut(b"%d" % row, length)
        pieces = []
        for block in blocks:
            size = min(self._block_size, length)
            if size <= 0:
                break
            pieces.append(self._cut(b"block %d" % block, size))
            length -= size
        if length > 0:
            pieces.append(self._cut(b"%d" % (row if root is None else root), length))
        return b"".join(pieces)

    def _cut(self, key: bytes, length: int) -> bytes:
        """`length` tokens that belong to `key`: the same beginning for every length."""
        digest = hashlib.blake2b(b"%b %d %b" % (key, self._seed, self._salt), digest_size=2 * _MARK).digest()
        opening = b"".join([self._symbols[value] for value in digest[: min(length, _MARK)]])
        rest = max(0, length - _MARK)
        start = int.from_bytes(digest[_MARK:], "little") % _POOL
        if self._own is not None and rest:
            text, rest = self._own.cut(start, rest)
            opening += text
        around, end = divmod(start + rest, _POOL)
        if around == 0:
            return opening + self._pool[start * WIDTH : end * WIDTH]
        return b"".join((opening, self._pool[start * WIDTH :], self._pool * (around - 1), self._pool[: end * WIDTH]))


@dataclass(frozen=True)
class Fit:
    """tokens = overhead + slope × words."""

    overhead: float = 0.0
    slope: float = 1.0

    @classmethod
    def through(cls, words: list[int], tokens: list[int]) -> "Fit":
        """The line through measured points (least squares; two points are met exactly)."""
        if len(set(words)) < 2:
            return cls(float(tokens[0] - words[0]) if words else 0.0)
        # Not by np.polyfit: that wakes the threads of BLAS, which then spin for 0.1 s of CPU.
        x, y = np.array(words, dtype=float), np.array(tokens, dtype=float)
        slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
        return cls(float(y.mean()) - slope * float(x.mean()), slope)

    def words(self, tokens: int) -> int:
        """How many words make a prompt of `tokens` tokens: at least 1, since no server takes an empty prompt."""
        return max(1, round((tokens - self.overhead) / self.slope))

    def tokens(self, words: int) -> int:
        """How many tokens `words` words make."""
        return round(self.overhead + self.slope * words)


@dataclass(frozen=True)
class Dialect:
    """How this server wants to be asked."""

    api: Api
    model: str | None
    tokens: Tokens
    fit: Fit = Fit()
    fields: tuple[str, ...] = ("ignore_eos", "min_tokens", "stream_options")
    """Optional fields that the server takes."""
    limit: str = "max_tokens"
    """Name of the field that limits the response."""
    extra: dict[str, Any] | None = None

    @property
    def path(self) -> str:
        """Where requests go, after the base."""
        return {"chat": "/chat/completions", "completions": "/completions", "responses": "/responses"}[self.api]

    def body(self, text: bytes, response_tokens: int, history: bytes = b"") -> bytes:
        """The request body: `text` as the prompt, answered with exactly `response_tokens` tokens if the server can.

        `history` is what `remember` made of the turns before.
        """
        head, tail = self._frame
        prompt = text[:-1] if self.tokens == "ids" else text  # without the last comma
        if self.api == "completions":
            prompt = history + prompt
        elif self.api == "responses" and not history:
            prompt = b'"' + prompt + b'"'
        elif self.api == "responses":
            prompt = b"[" + history + b'{"role":"user","content":"' + prompt + b'"}]'
        else:
            prompt = history + b'{"role":"user","content":"' + prompt + b'"}'
        least = b'"min_tokens":%d,' % response_tokens if "min_tokens" in self.fields else b""
        return b"".join((head, prompt, tail, least, b'"%b":%d}' % (self.limit.encode(), response_tokens)))

    def remember(self, history: bytes, text: bytes, reply: str) -> bytes:
        """The history after a turn: what was asked and what came back, as the next request carries them."""
        said = msgspec.json.encode(reply)[1:-1]
        if self.api == "completions":
            return history + text + said
        return b"".join(
            (history, b'{"role":"user","content":"', text, b'"},{"role":"assistant","content":"', said, b'"},')
        )

    @cached_property
    def _frame(self) -> tuple[bytes, bytes]:
        """What stands before the prompt and after it, the same for every request."""
        fields: dict[str, Any] = {} if self.model is None else {"model": self.model}
        fields["stream"] = True
        if "stream_options" in self.fields:
            fields["stream_options"] = {"include_usage": True}
        if "ignore_eos" in self.fields:
            fields["ignore_eos"] = True
        head = msgspec.json.encode(fields | (self.extra or {}))[:-1]
        if self.api == "chat":
            return head + b',"messages":[', b"],"
        if self.api == "responses":
            return head + b',"input":', b","
        if self.tokens == "ids":
            return head + b',"prompt":[', b"],"
        return head + b',"prompt":"', b'",'
