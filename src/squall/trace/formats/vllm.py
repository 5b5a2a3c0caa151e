"""vLLM's own log: what `--enable-log-requests` and `--enable-log-outputs` print of each request.

    0.2 to 0.10.1   INFO … Received request ID: prompt: '…', params: SamplingParams(…), prompt_token_ids: […], …
    since 0.10.2    INFO … Received request ID: params: SamplingParams(…), lora_request: None.
                    DEBUG … Request ID details: prompt: '…', prompt_token_ids: […], …    (VLLM_LOGGING_LEVEL=DEBUG)
    since 0.10.0    INFO … Generated response ID[ (streaming delta|complete)]: output: '…', output_token_ids: […], …
    0.32            the ids in a line before it: DEBUG … Generated response ID[ (…)] details: output_token_ids: […]
    to 0.9          INFO … Finished request ID.  and at all times  Aborted request(s) ID, of late with 8 more hex digits

Lines begin `INFO 11-26 15:50:38 [logger.py:43] `, in some versions after `(APIServer pid=1) ` or colours: whole seconds
without a year, unless something in front gives the time (`docker logs -t`, `kubectl logs --timestamps`). A stream's
tokens are those of its deltas (`--enable-log-deltas`; one each where their ids are not logged), or the number in
`<streaming_complete: N tokens>`; where nothing tells them, and for streams that came to their end (a delta without text
is not logged), `ignore_eos=True` makes `max_tokens` the length. Some versions log no answer of the completions API.
uvicorn's access lines in between (`INFO:     1.2.3.4:5 - "POST /v1/…" 200 OK`) have neither time nor lengths nor the
request's ID, so nothing is read from them.
"""

import ast
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from squall.errors import InputError
from squall.trace.formats.logged import Found, Logged, checked, parsed, unix_time
from squall.trace.formats.rows import Parsed

LINE = re.compile(
    rb"(?:INFO|DEBUG|WARNING)\s+(?:(\d{4})-)?(\d\d)-(\d\d) (\d\d):(\d\d):(\d\d)(?:[.,](\d{1,6}))? \[?[\w./-]+:\d+\] "
    rb"(Received request|Request|Generated response|Finished request|Aborted request\(s\)|Aborted request) "
    rb"([^\s:,]+?)(?=[:,.]? |[:,.]?$)"
)
_COLOUR = re.compile(rb"\x1b\[[0-9;]*m")
_STAMP = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d:\d\d))\s")
_MAX_TOKENS = re.compile(rb"[( ]max_tokens=(\d+)")
_COMPLETE = re.compile(rb"output: '<streaming_complete: (\d+) tokens>'")
_PROMPT = re.compile(rb": prompt: (.*?), (?:prefix_pos|params|sampling_params|prompt_token_ids): ", re.DOTALL)
_LIST = re.compile(rb"(?:array\('\w', )?\[")
_INTERNAL = re.compile(r"-[0-9a-f]{8}$")
_PART = re.compile(r"-\d+$")
_AFTER_IDS = re.compile(rb"\]\)?(?:, finish_reason: |$)")
_DAYS = (0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334)
_YEAR = 365 * 86400


class _Request(msgspec.Struct):
    row: int
    start: int
    prompt: int | None = None
    exact: int | None = None
    """What `max_tokens` says, if the response was made to be so long."""
    response: int | None = None
    deltas: int = 0
    pieces: int = 0
    """Deltas without their ids."""
    first: int | None = None
    end: int | None = None
    streamed: bool = False
    """To the end."""
    aborted: bool = False


def parse_vllm(data: bytes) -> Parsed:
    """The requests of a vLLM log; row n is the n-th request in it."""
    requests: dict[str, _Request] = {}
    found, clock, answered, cut = Found(), _Clock(), set[bool](), 0
    for moment, kind, name, rest in _messages(data, clock):
        if kind == b"Request" and not rest.startswith(b" details:"):
            continue
        asked = kind in (b"Received request", b"Request")
        if asked and name not in requests:
            requests[name] = _Request(len(requests) + 1, moment)
        names = (name, f"{name}-0", _PART.sub("", name), _INTERNAL.sub("", name))
        it = next((requests[known] for known in names if known in requests), None)
        if it is None:  # it came before the log begins
            continue
        if asked:
            it.exact = it.exact or _exact(rest)
            prompt = _ids(rest, b"prompt_token_ids: ")
            cut += prompt is not None and prompt == _characters(rest)
            it.prompt = it.prompt if prompt is None else prompt
        elif kind == b"Generated response":
            answered.add(_completions(name))
            _answer(it, rest, moment)
        else:
            it.aborted = kind.startswith(b"Aborted")
            it.end = moment
    if not requests:
        raise InputError(
            "no request is logged in it: start vLLM with --enable-log-requests and --enable-log-outputs, or put "
            "`squall capture` in front of it"
        )
    if cut > 1:
        raise InputError(
            f"{cut:,} of its prompts are cut by --max-log-len, so their lengths are unknown; leave that flag out"
        )
    _refuse_what_tells_no_lengths(requests, bool(answered))
    kept = [
        one
        for name, each in requests.items()
        if (one := _logged(each, _completions(name) in answered, found)) is not None
    ]
    notes = [] if clock.dated else ["the log has no year: the day of the week is unknown"]
    meta: dict[str, Any] = {} if clock.stamped else {"tick": 1.0}
    result = parsed(kept, found, notes, **meta)
    if not clock.dated:
        result.meta |= {"epoch": None, "weekday": None}
    return result


class _Clock:
    """The time of a line in ns: what stands in front of it, or its own, whose year is unknown."""

    def __init__(self) -> None:
        self.dated = self.stamped = True
        self._years = 0
        self._last = 0

    def read(self, before: bytes, line: re.Match[bytes]) -> int:
        stamp = _STAMP.search(before)
        if stamp:
            return unix_time(_micro(stamp[1].decode()))
        self.stamped = False
        year, month, day, hour, minute, second = (int(part or 0) for part in line.groups()[:6])
        fraction = int((line[7] or b"0").ljust(6, b"0")) * 1000
        if year:
            text = f"{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}"
            return unix_time(text) + fraction
        self.dated = False
        at = ((_DAYS[(month - 1) % 12] + day - 1) * 24 + hour) * 3600 + minute * 60 + second + self._years
        if at < self._last - _YEAR // 2:  # over New Year
            self._years += _YEAR
            at += _YEAR
        self._last = at
        return at * 10**9 + fraction


def _micro(stamp: str) -> str:
    """An ISO time with at most six digits of fraction, which is what Python reads."""
    return re.sub(r"(\.\d{6})\d+", r"\1", stamp)


def _messages(data: bytes, clock: _Clock) -> Iterator[tuple[int, bytes, str, bytes]]:
    for text in data.split(b"\n"):
        if b"request" not in text and b"Request" not in text and b"response" not in text:
            continue
        line = _COLOUR.sub(b"", text).rstrip()
        match = LINE.search(line)
        if match is not None:
            moment = clock.read(line[: match.start()], match)
            yield moment, match[8], match[9].decode("utf-8", "replace").rstrip("."), line[match.end() :]


def _exact(rest: bytes) -> int | None:
    """max_tokens, if the response had to have so many. The prompt, before the parameters, may say anything."""
    params = rest[max(0, rest.rfind(b"params: SamplingParams(")) :]
    most = _MAX_TOKENS.search(params)
    return int(most[1]) if most and b"ignore_eos=True" in params else None


def _ids(rest: bytes, label: bytes, after: re.Pattern[bytes] | None = None) -> int | None:
    """How many ids stand in the list after the last `label`; the texts in front of it may say anything.

    None if no list is there, or what follows it is not `after`: then it is part of a text.
    """
    begin = rest.rfind(label) + len(label)
    if begin < len(label) or not (opened := _LIST.match(rest, begin)):
        return None
    end = rest.find(b"]", begin)
    if after is not None and not after.match(rest, end):
        return None
    ids = rest[opened.end() : end]
    return ids.count(b",") + 1 if ids.strip() else 0


def _characters(rest: bytes) -> int | None:
    """The length of the text that is logged as the prompt. As many ids as characters are a sign that both were cut."""
    match = _PROMPT.search(rest)
    if match is None or not match[1].startswith((b"'", b'"')):
        return None
    try:
        return len(ast.literal_eval(match[1].decode("utf-8", "replace")))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _completions(name: str) -> bool:
    """Whether it is a request of the completions API, by its ID."""
    return name.startswith("cmpl-")


def _answer(it: _Request, rest: bytes, moment: int) -> None:
    tokens = _ids(rest, b"output_token_ids: ", _AFTER_IDS)
    if rest.startswith(b" (streaming delta)"):
        it.deltas += tokens or 0
        it.pieces += tokens is None
        it.first = moment if it.first is None else it.first
        it.end = moment
        return
    complete = _COMPLETE.search(rest)
    it.streamed = it.streamed or rest.startswith(b" (streaming complete)")
    if complete is not None or tokens is not None:
        it.response = int(complete[1]) if complete else tokens
    it.end = moment


def _refuse_what_tells_no_lengths(requests: dict[str, _Request], answers: bool) -> None:
    if all(it.prompt is None for it in requests.values()):
        raise InputError(
            f"its {len(requests):,} requests are logged without the prompts' token ids: since 0.10.2 vLLM logs them "
            "only with VLLM_LOGGING_LEVEL=DEBUG"
        )
    if not answers and all(it.exact is None for it in requests.values()):
        raise InputError(
            f"how long the responses to its {len(requests):,} requests were is not logged: vLLM does so with "
            "--enable-log-outputs"
        )


def _logged(it: _Request, answers: bool, found: Found) -> Logged | None:
    response = it.response if it.response is not None else it.deltas or it.pieces or None
    if it.streamed and it.response is None and not it.aborted:
        response = it.exact or response
    if response is None and not it.aborted and (it.end is not None or not answers):
        response = it.exact
    unanswered = it.end is None and answers
    if unanswered:
        message = "no response is logged: it failed, its client left, or the log ends before it"
        found.add("info", "unanswered", message, it.row)
    streamed = it.first is not None and it.end is not None
    logged = Logged(
        start=it.start,
        elapsed=None if it.end is None else max(0, it.end - it.start) / 1e9,
        request_tokens=it.prompt,
        response_tokens=response,
        failed=unanswered or (it.aborted and not response),
        first_token=(it.first - it.start) / 1e9 if streamed and it.first is not None else None,
    )
    return checked(logged, it.row, found)
