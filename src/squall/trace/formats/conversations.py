"""Lists of conversations (ShareGPT, LMSYS-Chat) and of lengths: JSON without times, whose turns become requests.

Every answer of a conversation is one request: its prompt is all that was said before it, its response the answer. A
turn that gives its token count is taken at its word; the text of others is counted as one token for 4 characters,
rounded up, which is a rule of thumb for English and is said in the metadata. Only lengths leave this module, no text.
"""

from dataclasses import dataclass, field
from typing import Any

import msgspec
import polars as pl

from squall.trace.formats.rows import LARGEST_COUNT, Finding, Parsed

CHARACTERS_PER_TOKEN = 4

_USER = {"human", "user", "prompter"}
_ASSISTANT = {"gpt", "assistant", "chatgpt", "bing", "bard", "model", "ai"}
_OTHER = {"system", "tool", "function"}
_COUNTS = ("tokens", "token_count", "num_tokens", "length")
_TEXTS = ("value", "content", "text")


@dataclass
class _Requests:
    """The requests so far, column by column, and what was noticed on the way: message -> rows."""

    request_tokens: list[int] = field(default_factory=list)
    response_tokens: list[int] = field(default_factory=list)
    session: list[int] = field(default_factory=list)
    model: list[str | None] = field(default_factory=list)
    errors: dict[str, list[int]] = field(default_factory=dict)
    unasked: list[int] = field(default_factory=list)
    unanswered: list[int] = field(default_factory=list)
    counted: int = 0
    estimated: int = 0


def parse_conversations(data: bytes) -> Parsed:
    """A JSON list, or one object a line, of conversations or of [request_tokens, response_tokens] pairs.

    No times are recorded there: the requests stand one second apart, in the order of the file.
    """
    found = _Requests()
    for number, item in _items(data, found):
        _read(item, number, found)
    findings = [
        Finding(severity="error", code="bad-conversation", message=text, count=len(at), rows=at[:10])
        for text, at in found.errors.items()
    ]
    for code, rows, message in (
        ("unasked", found.unasked, "an answer that follows no question counts as context, not as a request"),
        ("unanswered", found.unanswered, "ends with a question without an answer, which is left out"),
    ):
        if rows:
            findings.append(Finding(severity="info", code=code, message=message, count=len(rows), rows=rows[:10]))
    notes = ["no times are recorded: the requests stand 1 s apart in file order, so only lengths and turns count"]
    if found.estimated:
        notes.append(
            f"{found.estimated:,} of {found.estimated + found.counted:,} turns give no token count and were counted as "
            f"1 token for {CHARACTERS_PER_TOKEN} characters"
        )
    size = len(found.request_tokens)
    columns = {
        "arrival": pl.int_range(size, eager=True).cast(pl.Float64),
        "request_tokens": pl.Series(found.request_tokens, dtype=pl.Int32),
        "response_tokens": pl.Series(found.response_tokens, dtype=pl.Int32),
        "session": pl.Series(found.session, dtype=pl.Int64),
        "model": pl.Series(found.model, dtype=pl.String),
    }
    return Parsed(pl.DataFrame(columns), findings, {"notes": notes, "tick": None})


def _items(data: bytes, found: _Requests) -> list[tuple[int, Any]]:
    """The elements of the JSON list, or the lines, with their numbers from 1."""
    data = data.removeprefix(b"\xef\xbb\xbf").strip()
    if data.startswith(b"["):
        try:
            return list(enumerate(msgspec.json.decode(data), start=1))
        except msgspec.DecodeError:
            pass  # perhaps lines of pairs
    items = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        try:
            items.append((number, msgspec.json.decode(line)))
        except msgspec.DecodeError as error:
            found.errors.setdefault(str(error), []).append(number)
    return items


def _read(item: Any, number: int, found: _Requests) -> None:
    if isinstance(item, list):
        if len(item) == 2 and all(_is_count(length) for length in item):
            found.counted += 2
            _add(found, item[0], item[1], number, None)
        else:
            found.errors.setdefault("not a pair of token counts [request, response]", []).append(number)
        return
    turns = (item.get("conversations") or item.get("conversation")) if isinstance(item, dict) else None
    if isinstance(turns, list):
        _read_turns(item, turns, number, found)
    elif not (isinstance(item, dict) and ("conversations" in item or "conversation" in item)):
        found.errors.setdefault("neither a conversation nor a pair of token counts", []).append(number)


def _read_turns(item: dict[str, Any], turns: list[Any], number: int, found: _Requests) -> None:
    model = item.get("model") if isinstance(item.get("model"), str) else None
    context, asked, requests = 0, False, []
    for turn in turns:
        role = (turn.get("from") or turn.get("role")) if isinstance(turn, dict) else None
        length, counted = _length(turn) if isinstance(turn, dict) else (None, False)
        if not isinstance(role, str) or role not in _USER | _ASSISTANT | _OTHER:
            message = f"a turn is of {str(role)[:40]!r}, not of a user or an assistant"
            found.errors.setdefault(message, []).append(number)
            return
        if length is None or context + length > LARGEST_COUNT:
            found.errors.setdefault("a turn has neither a text nor a token count", []).append(number)
            return
        found.counted += counted
        found.estimated += not counted
        if role in _ASSISTANT:
            if asked:
                requests.append((context, length))
            elif number not in found.unasked[-1:]:
                found.unasked.append(number)
        asked = role in _USER or (asked and role in _OTHER)
        context += length
    if asked:
        found.unanswered.append(number)
    for request, response in requests:
        _add(found, request, response, number, model)


def _add(found: _Requests, request: int, response: int, number: int, model: str | None) -> None:
    found.request_tokens.append(request)
    found.response_tokens.append(response)
    found.session.append(number - 1)
    found.model.append(model)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_COUNT


def _length(turn: dict[str, Any]) -> tuple[int | None, bool]:
    """Tokens of a turn, and whether they were given (True) or estimated from its text."""
    for name in _COUNTS:
        if name in turn:
            return (turn[name], True) if _is_count(turn[name]) else (None, True)
    for name in _TEXTS:
        if isinstance(turn.get(name), str):
            return -(-len(turn[name]) // CHARACTERS_PER_TOKEN), False
    return None, False
