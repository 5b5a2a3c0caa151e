"""Bytes of an answer to what they say: tokens with their times, usage, errors, and how the answer ended.

Nothing here reads a clock or a socket: every read comes with the time at which the socket was read. A body is
server-sent events (WHATWG HTML, section 9.2: lines end with LF, CR or CRLF; an empty line ends an event; several
`data:` lines make one event; a line that starts with a colon is a comment), or else one JSON document.

Nearly all streams have one plain form: every piece of the body is one event of one `data:` line. `Reply.take` decodes
such a body in one call; whatever deviates by a byte goes through `Reply.feed`, which takes everything. Both give the
same answer; a test holds them to it.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec

MESSAGE_LIMIT = 200
"""Characters of a server's message that are kept."""
LINE_LIMIT = 1 << 22
"""Bytes of a line after which it is no event of this API: what is joined and searched again and again stays bounded."""


_NULL = msgspec.Raw(b"null")


# Usage is read by itself: whatever it is, it makes no answer wrong.
# gc=False: decoded documents live for a moment and hold no circles, so the collector need not know them.
class _Delta(msgspec.Struct, gc=False):
    content: Any = None
    refusal: Any = None
    reasoning: Any = None
    reasoning_content: Any = None
    tool_calls: Any = None


class _Choice(msgspec.Struct, gc=False):
    delta: _Delta | None = None
    message: _Delta | None = None
    text: Any = None
    finish_reason: Any = None


class _Details(msgspec.Struct, gc=False):
    cached_tokens: Any = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: Any = None
    completion_tokens: Any = None
    prompt_tokens_details: msgspec.Raw = _NULL
    input_tokens: Any = None  # the Responses API's names
    output_tokens: Any = None
    input_tokens_details: msgspec.Raw = _NULL


class _Response(msgspec.Struct, gc=False):
    """What the events of the Responses API that begin and end an answer carry."""

    usage: msgspec.Raw = _NULL
    error: Any = None


class _Part(msgspec.Struct, gc=False):
    text: str | None = None
    refusal: str | None = None


class _Item(msgspec.Struct, gc=False):
    content: list[_Part] | None = None


class _Document(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: msgspec.Raw = _NULL
    error: Any = None
    object: Any = None
    message: Any = None
    code: Any = None
    type: Any = None
    delta: Any = None
    response: _Response | None = None
    output: list[_Item] | None = None


_decode = msgspec.json.Decoder(_Document).decode
_decode_usage = msgspec.json.Decoder(_Usage).decode
_decode_details = msgspec.json.Decoder(_Details).decode
_decode_all = msgspec.json.Decoder(list[_Document]).decode
_TERMINAL = ("response.completed", "response.incomplete")
_ANSWERS = ("response.output_text.delta", "response.refusal.delta")


def _plain(pieces: Sequence[bytes]) -> list[bytes] | None:
    """What the one event in each of `pieces` says; None if a piece is anything else than a whole event of one line."""
    said = [piece[5:-2] for piece in pieces]
    together = b"".join(said)
    if b"\n" in together or b"\r" in together:
        return None
    # Equal as a whole and equally long piece by piece, so equal piece by piece.
    return said if b"data:%b\n\n" % b"\n\ndata:".join(said) == b"".join(pieces) else None


def _documents(said: Sequence[bytes]) -> list[_Document] | None:
    """What the events say, decoded in one call; None if one of them is no document."""
    try:
        documents = _decode_all(b"[%b]" % b",".join(said))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return documents if len(documents) == len(said) else None


class Reply:
    """One answer, read piece by piece: `feed` each read with its time, then `close`; then look at the attributes."""

    __slots__ = (
        "_at",
        "_body",
        "_cr",
        "_data",
        "_finished",
        "_tail",
        "answer",
        "bad",
        "cached_tokens",
        "chunks",
        "done",
        "error",
        "error_code",
        "pieces",
        "prompt_tokens",
        "response_tokens",
        "streamed",
        "text",
    )

    def __init__(self, streamed: bool, keep_text: bool = False) -> None:
        self.streamed = streamed
        """Server-sent events; else one document."""
        self.chunks: list[int] = []
        """Times (ns) of the reads that held at least one generated token, of any channel."""
        self.answer: int | None = None
        """Time of the first token of the answer itself: neither reasoning nor a tool call."""
        self.text: list[str] | None = [] if keep_text else None
        """The answer's text, where it is wanted."""
        self.pieces = 0
        """Events with generated text: the number of tokens, if each event holds one."""
        self.done: int | None = None
        """Time of the terminal event: `[DONE]`, else the finish reason, else the end of the document."""
        self.error: str | None = None
        """What the server said in an error object, wherever it stood."""
        self.error_code: int | None = None
        self.bad: str | None = None
        """The first thing in the body that is neither an event nor a document of this API."""
        self.prompt_tokens: int | None = None
        self.response_tokens: int | None = None
        self.cached_tokens: int | None = None
        self._finished: int | None = None  # time of the finish reason
        self._tail = b""  # the unfinished last line
        self._cr = False  # the last read ended with CR: an LF that follows belongs to it
        self._data: list[bytes] = []  # data lines of the event being read
        self._body: list[bytes] = []
        self._at = 0

    def take(self, times: Sequence[int], pieces: Sequence[bytes]) -> None:
        """As `feed` for each piece and its time; in a few calls where each piece is a whole event, as nearly always."""
        said = _plain(pieces) if self.streamed and pieces and not (self._tail or self._data or self._cr) else None
        if said is not None:
            finished = said[-1].strip() == b"[DONE]"
            documents = _documents(said[:-1] if finished else said)
            if documents is not None:
                for document, at in zip(documents, times, strict=False):
                    self._take(document, at)
                if finished and self.done is None:
                    self.done = times[-1]
                return
        for at, piece in zip(times, pieces, strict=True):
            self.feed(at, piece)

    def take_part(self, body: bytes, marks: Sequence[int], plain: bool) -> None:
        """As `feed` for each piece of `body`; `marks` says of each its time and its end.

        Where they are `plain`, each is one event, and those that end at negative places mean what the last one before
        that does not means, but for the text of the token in it: they need not be decoded.
        """
        times, ends = marks[::2], marks[1::2]
        begins = [0, *map(abs, ends)]
        if not (plain and self.streamed and self.text is None) or self._tail or self._data or self._cr:
            self.take(times, [body[begin : abs(end)] for begin, end in zip(begins, ends, strict=False)])
            return
        said = [body[begin + 5 : end - 2] for begin, end in zip(begins, ends, strict=False) if end > 0]
        finished = ends[-1] > 0 and said[-1].strip() == b"[DONE]"
        decoded = _documents(said[:-1] if finished else said)
        if decoded is None:
            for at, begin, end in zip(times, begins, ends, strict=False):
                self.feed(at, body[begin : abs(end)])
            return
        if finished:
            if self.done is None:
                self.done = times[-1]
            times, ends = times[:-1], ends[:-1]
        documents, document, token = iter(decoded), _Document(), False
        for at, end in zip(times, ends, strict=True):
            if end > 0:
                document = next(documents)
                self._take(document, at)
                token = _is_token(document)
            elif token:
                self.pieces += 1
                if self.chunks[-1] != at:
                    self.chunks.append(at)
            else:
                self._take(document, at)

    def feed(self, at: int, data: bytes) -> None:
        """Take the bytes that one socket read at time `at` brought; they may be cut anywhere."""
        if not self.streamed:
            self._body.append(data)
            self._at = at
            return
        if self._cr and data[:1] == b"\n":
            data = data[1:]
        self._cr = False
        if not data:
            return
        whole = data[-1:] in b"\r\n"
        self._cr = data[-1:] == b"\r"
        lines = (self._tail + data).splitlines()
        self._tail = b"" if whole else lines.pop()
        if len(self._tail) > LINE_LIMIT:
            self.bad = self.bad or f"a line of more than {LINE_LIMIT >> 20} MB"
            self._tail = b""
        for line in lines:
            if line[:5] == b"data:":
                self._data.append(line[5:])
                self._at = at
            elif not line:
                if self._data:
                    self._event()
            elif line[:6] == b"error:":  # an event of this name instead of an error object: older llama.cpp
                self._fail(_loose(line[6:]))

    def close(self, at: int | None = None) -> None:
        """The body is over. An event without its empty line still counts: a server may end with the terminal event."""
        if not self.streamed:
            self._document(b"".join(self._body))
            self._body.clear()
        else:
            if self._tail[:5] == b"data:" and _complete(self._tail[5:]):
                self._data.append(self._tail[5:])
                self._at = at or self._at
            self._tail = b""
            if self._data:
                self._event()
        if self.done is None:
            self.done = self._finished
        if not self.chunks and self.response_tokens and self._finished is not None:
            # Generated tokens without text (half a character, a special token): they were there when generation ended.
            self.chunks.append(self._finished)

    def _event(self) -> None:
        payload = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
        self._data.clear()
        if payload.strip() == b"[DONE]":
            if self.done is None:
                self.done = self._at
            return
        try:
            document = _decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError):
            if self.bad is None:
                self.bad = _short(payload)
            return
        self._take(document, self._at)

    def _document(self, body: bytes) -> None:
        try:
            document = _decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            self.bad = _short(body)
            return
        self._take(document, self._at)
        for item in document.output or ():
            self._token(self._at, "".join(part.text or part.refusal or "" for part in item.content or ()) or None)
        if self.error is None and document.choices is None and document.output is None:
            self.bad = _short(body)
        elif self.error is None:
            self.done = self._finished = self._at

    def _take(self, document: _Document, at: int) -> None:
        if document.error is not None or document.object == "error":
            self._fail(document.error if document.error is not None else document)
        for choice in document.choices or ():
            part = choice.delta or choice.message
            text = choice.text or (part and (part.content or part.refusal))
            if text:
                self._token(at, text)
            elif part is not None and (part.reasoning or part.reasoning_content or part.tool_calls):
                self._token(at, None)
            if choice.finish_reason is not None and self._finished is None:
                self._finished = at
        if document.usage != _NULL:
            self._count(document.usage)
        if document.type is not None:
            self._take_typed(document, at)

    def _take_typed(self, document: _Document, at: int) -> None:
        """An event of the Responses API, which names its kind."""
        kind, response = document.type, document.response
        if not isinstance(kind, str):
            return
        if kind.endswith(".delta") and document.delta:
            self._token(at, document.delta if kind in _ANSWERS else None)
        elif kind == "error" and document.error is None:
            self._fail(document)
        elif kind == "response.failed":
            self._fail((response and response.error) or "the response failed")
        elif kind in _TERMINAL:
            self._finished = self._finished or at
            if self.done is None:
                self.done = at
        if response is not None and response.usage != _NULL:
            self._count(response.usage)

    def _token(self, at: int, text: Any) -> None:
        """A piece of generated text; `text` is None for reasoning and tool calls."""
        self.pieces += 1
        if not self.chunks or self.chunks[-1] != at:
            self.chunks.append(at)
        if text is not None:
            if self.answer is None:
                self.answer = at
            if self.text is not None:
                self.text.append(str(text))

    def _count(self, said: msgspec.Raw) -> None:
        """A usage that is no object, or counts that are no counts, are as good as none."""
        try:
            usage = _decode_usage(said)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return
        prompt, response, details = usage.prompt_tokens, usage.completion_tokens, usage.prompt_tokens_details
        if prompt is None:
            prompt = usage.input_tokens
            details = usage.input_tokens_details if details == _NULL else details
        self.prompt_tokens = _number(prompt, self.prompt_tokens)
        self.response_tokens = _number(usage.output_tokens if response is None else response, self.response_tokens)
        if details != _NULL:
            with suppress(msgspec.DecodeError, UnicodeDecodeError):
                self.cached_tokens = _number(_decode_details(details).cached_tokens, self.cached_tokens)

    def _fail(self, error: Any) -> None:
        if self.error is not None:
            return
        if isinstance(error, _Document):
            error = {"message": error.message, "code": error.code}
        text: Any = error
        if isinstance(error, dict):
            text = error.get("message") or error.get("error") or error
            code = error.get("code", error.get("http_status_code"))
            if isinstance(code, int):
                self.error_code = code
                text = f"{code}: {text}"
        self.error = _short(str(text).encode())


class Outcome(NamedTuple):
    """What became of an attempt, in the words of the Run table."""

    status: str
    reason: str | None = None
    message: str | None = None


def judge(ending: str, http_status: int | None, reply: Reply | None) -> Outcome:
    """The outcome of an attempt that reached the server: how it ended, its HTTP status, and its closed reply.

    `ending` is `complete` (the whole HTTP message came), `eof` (the server closed before), `reset`, `bad_http`, or, if
    there was no response, `eof_headers` or `stale_reuse`.
    HTTP 200 is not success: an error object inside is a failure, and so is a stream without its terminal event.
    """
    if ending == "bad_http":
        return Outcome("truncated", "bad_http")
    if http_status is None:
        return Outcome("reset", "eof_headers" if ending == "eof" else ending)
    if reply is None or not 200 <= http_status < 300:
        said = None if reply is None else reply.error or reply.bad
        return Outcome("http_error", None, said)
    if reply.error is not None:
        return Outcome("http_error", "in_band", reply.error)
    if reply.bad is not None:
        return Outcome("truncated", "bad_stream", reply.bad)
    if reply.done is not None:
        return Outcome("ok", None if reply.chunks else "empty")
    if ending == "reset":
        return Outcome("reset", "reset")
    return Outcome("truncated", "eof", "the stream ended without a terminal event")


def _is_token(document: _Document) -> bool:
    """Whether the event is one token of the answer's text, and nothing else."""
    if document.choices is None or len(document.choices) != 1:
        return False
    choice = document.choices[0]
    part = choice.delta or choice.message
    return bool(
        (choice.text or (part and part.content))
        and choice.finish_reason is None
        and document.usage == _NULL
        and document.error is None
        and document.type is None
        and document.object != "error"
    )


def _number(value: Any, known: int | None) -> int | None:
    return value if type(value) is int and 0 <= value < 2**31 else known


def _complete(payload: bytes) -> bool:
    if payload.strip() == b"[DONE]":
        return True
    try:
        _decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return True


def _loose(payload: bytes) -> Any:
    try:
        return msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return payload.decode("utf-8", "replace")


def _short(payload: bytes) -> str:
    return " ".join(payload[: 4 * MESSAGE_LIMIT].decode("utf-8", "replace").split())[:MESSAGE_LIMIT]
