"""What a request asks for, without its text: model, limits, and salted hashes of its messages and prompt blocks.

Nothing that leaves this file can be turned back into text: hashes are BLAKE2b keyed with a salt that is never written.
"""

import re
from hashlib import blake2b
from typing import Any

import msgspec

BLOCK_BYTES = 256
BLOCK_TOKENS = 64
"""A block of prompt text is 256 bytes, taken for 64 tokens (4 bytes a token); of token ids it is exactly 64 of them."""
MOST_BLOCKS = 4096
GENERATION = {"/chat/completions": "messages", "/completions": "prompt", "/responses": "input"}
"""Paths that are recorded, by their last part, and where in the body the prompt stands."""

_NAME = re.compile(r"[\w./:@+-]{1,128}")
_LAST_BLOCK = 2**63 - 1


class _StreamOptions(msgspec.Struct):
    include_usage: Any = None


class _Body(msgspec.Struct):
    model: Any = None
    stream: Any = None
    stream_options: _StreamOptions | None = None
    messages: list[msgspec.Raw] | None = None
    prompt: msgspec.Raw = msgspec.Raw(b"null")
    input: msgspec.Raw = msgspec.Raw(b"null")
    tools: msgspec.Raw = msgspec.Raw(b"null")
    instructions: msgspec.Raw = msgspec.Raw(b"null")
    user: Any = None
    prompt_cache_key: Any = None
    previous_response_id: Any = None


_decode = msgspec.json.Decoder(_Body).decode


class Asked(msgspec.Struct):
    """One request for generated text."""

    model: str | None = None
    streamed: bool = False
    hide_usage: bool = False
    """The usage was asked for by the proxy and not by the client."""
    body: bytes = b""
    """What goes upstream."""
    prompt_bytes: int = 0
    client: int | None = None
    session_key: int | None = None
    """Names the conversation, where the client does."""
    previous: int | None = None
    """Of the answer that this request goes on from (responses API)."""
    chain: list[int] = []
    """Hashes of the message list up to each message; a conversation's next request begins with the same ones."""
    blocks: list[int] = []


class Hasher:
    """Keyed hashes under one salt."""

    def __init__(self, salt: bytes) -> None:
        self._salt = salt

    def number(self, *parts: bytes) -> int:
        """63 bits that stand for `parts`."""
        digest = blake2b(digest_size=8, key=self._salt)
        for part in parts:
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return int.from_bytes(digest.digest(), "little") & _LAST_BLOCK

    def chain(self, parts: "list[bytes]", start: bytes = b"") -> list[int]:
        """One hash for each prefix of `parts`."""
        digest = blake2b(start, digest_size=8, key=self._salt)
        hashes = []
        for part in parts:
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
            hashes.append(int.from_bytes(digest.digest(), "little") & _LAST_BLOCK)
        return hashes


def recorded_path(path: str) -> str | None:
    """The last part of `path` if requests to it are recorded: `/chat/completions`, `/completions` or `/responses`."""
    path = path.partition("?")[0].rstrip("/")
    for end in GENERATION:
        if path.endswith(end):
            return end if end != "/completions" or not path.endswith("/chat/completions") else "/chat/completions"
    return None


def asked(kind: str, body: bytes, headers: dict[str, bytes], hasher: Hasher, *, ask_usage: bool, prefix: bool) -> Asked:
    """What the body of a request to `kind` (see `recorded_path`) asks. Malformed bodies are passed on and say nothing.

    With `ask_usage` a stream gets `stream_options.include_usage`; `hide_usage` tells if the client did not want it.
    """
    who = [headers.get("authorization", b""), headers.get("x-api-key", b"")]
    try:
        said = _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Asked(body=body, client=hasher.number(b"client", *who) if any(who) else None)
    user = said.user.encode() if isinstance(said.user, str) else b""
    client = hasher.number(b"client", *who, user) if any(who) or user else None
    it = Asked(model=_name(said.model), streamed=said.stream is True, body=body, client=client)
    key = _session_header(headers) or (
        said.prompt_cache_key.encode() if isinstance(said.prompt_cache_key, str) else None
    )
    if key:
        it.session_key = hasher.number(b"session", *who, user, key)
    if isinstance(said.previous_response_id, str):
        it.previous = hasher.number(b"response", said.previous_response_id.encode())
    pieces = _pieces(kind, said)
    it.prompt_bytes = sum(map(len, pieces))
    if kind == "/chat/completions" and said.messages:
        it.chain = hasher.chain([bytes(message) for message in said.messages], b"".join((*who, user)))
    if prefix:
        it.blocks = hasher.chain(_blocks(pieces), (it.model or "").encode())
    if ask_usage and it.streamed and kind != "/responses":
        _ask_for_usage(it, said)
    return it


def answer_number(hasher: Hasher, identity: str) -> int:
    """The hash of a response's id, as `Asked.previous` has it."""
    return hasher.number(b"response", identity.encode())


def _pieces(kind: str, said: _Body) -> list[bytes]:
    fixed = [bytes(raw) for raw in (said.tools, said.instructions) if bytes(raw) != b"null"]
    if kind == "/chat/completions":
        return fixed + [bytes(message) for message in said.messages or ()]
    raw = bytes(said.prompt if kind == "/completions" else said.input)
    return fixed if raw == b"null" else [*fixed, raw]


def _blocks(pieces: list[bytes]) -> list[bytes]:
    """The prompt in blocks: of token ids if it is a list of them, else of bytes. A last part of a block counts."""
    text = b"".join(pieces)
    if len(pieces) == 1 and text[:1] == b"[" and b'"' not in text[:4096] and b"{" not in text[:4096]:
        tokens = text.strip(b"[]").split(b",")
        ids = [b",".join(tokens[at : at + BLOCK_TOKENS]) for at in range(0, len(tokens), BLOCK_TOKENS)]
        return ids[:MOST_BLOCKS]
    return [text[at : at + BLOCK_BYTES] for at in range(0, min(len(text), BLOCK_BYTES * MOST_BLOCKS), BLOCK_BYTES)]


def _ask_for_usage(it: Asked, said: _Body) -> None:
    options = said.stream_options
    if options is not None and options.include_usage is True:
        return
    start = it.body.find(b"{") + 1
    if options is None and b'"stream_options"' not in it.body:
        # One member more in front: every other byte of the body stays.
        it.body = it.body[:start] + b'"stream_options":{"include_usage":true},' + it.body[start:]
    else:
        whole: dict[str, Any] = msgspec.json.decode(it.body)
        known = whole.get("stream_options")
        whole["stream_options"] = {**(known if isinstance(known, dict) else {}), "include_usage": True}
        it.body = msgspec.json.encode(whole)
    it.hide_usage = True


def _name(value: Any) -> str | None:
    """A model's name, if it looks like one: anything else could be content."""
    return value if isinstance(value, str) and _NAME.fullmatch(value) else None


def _session_header(headers: dict[str, bytes]) -> bytes | None:
    for name in ("x-session-id", "session-id", "x-conversation-id", "x-squall-session"):
        if headers.get(name):
            return headers[name]
    return None
