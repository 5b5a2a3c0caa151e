"""LiteLLM's records of single calls: its standard logging payload, and the rows of its spend logs.

Both are written when a call ends: JSON lines (callbacks to files and buckets), a JSON list, or what `/spend/logs`
answers. The payload gives times as Unix seconds, the spend logs as ISO text. Every attempt has a record of its own.
"""

from typing import Any

import msgspec

from squall.trace.formats.logged import Found, Logged, as_count, as_name, checked, parsed, unix_time
from squall.trace.formats.rows import Parsed

_OTHERS = ("embedding", "rerank", "image", "transcription", "speech", "moderation", "ocr", "search", "vector", "file")
"""Parts of the `call_type` of calls that generate no text."""


class _Usage(msgspec.Struct):
    prompt_tokens_details: dict[str, Any] | None = None


class _Metadata(msgspec.Struct):
    usage_object: _Usage | None = None


class _Call(msgspec.Struct):
    """Of the many fields of both records, those that are read; what is said (messages, response) is not."""

    startTime: Any = None
    endTime: Any = None
    completionStartTime: Any = None
    call_type: Any = None
    status: Any = None
    stream: Any = None
    model_group: Any = None
    model: Any = None
    prompt_tokens: Any = None
    completion_tokens: Any = None
    session_id: Any = None
    cache_hit: Any = None
    metadata: Any = None
    standard_logging_object: msgspec.Raw = msgspec.Raw(b"")
    error_information: Any = None


_decode = msgspec.json.Decoder(_Call).decode
_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_page = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def parse_litellm(data: bytes) -> Parsed:
    """One record a line, a list of them, or an answer of /spend/logs/v2 (an object with `data`)."""
    found, calls, notes = Found(), [], list[str]()
    for row, raw in _records(data, found):
        try:
            call = _decode(raw)
            if call.standard_logging_object:
                call = _decode(bytes(call.standard_logging_object))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            half = ": the last line is half-written; cut it off" if "truncated" in str(error) else ""
            found.add("error", "bad-line", f"{error}{half}", row)
            continue
        logged = _logged(call, row, found)
        if logged is not None and (kept := checked(logged, row, found)) is not None:
            calls.append(kept)
    if found.count("cache-hit"):
        notes.append(f"{found.count('cache-hit'):,} calls were answered from LiteLLM's cache: no server saw them")
    return parsed(calls, found, notes)


def _records(data: bytes, found: Found) -> list[tuple[int, bytes]]:
    data = data.removeprefix(b"\xef\xbb\xbf").strip()
    try:
        if data.startswith(b"{"):
            page = _decode_page(data)
            data = bytes(page["data"]) if "data" in page else data
        if data.startswith(b"["):
            return [(row, bytes(raw)) for row, raw in enumerate(_decode_list(data), start=1)]
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if data.startswith(b"["):
            found.add("error", "bad-line", f"the list cannot be read: {error}", 1)
            return []
    return [(row, line) for row, line in enumerate(data.split(b"\n"), start=1) if line.strip()]


def _logged(call: _Call, row: int, found: Found) -> Logged | None:
    kind = str(call.call_type or "")
    if any(part in kind for part in _OTHERS):
        found.add("info", "not-generation", "a call that generates no text (embeddings and the like), left out", row)
        return None
    try:
        start = unix_time(call.startTime)
        end = None if call.endTime in (None, "") else unix_time(call.endTime)
        first = None if call.completionStartTime in (None, "") else unix_time(call.completionStartTime)
    except ValueError as error:
        found.add("error", "bad-line", f"startTime, endTime or completionStartTime: {error}", row)
        return None
    failed = call.status == "failure"
    if call.cache_hit in (True, "True", "true"):
        found.add("info", "cache-hit", "answered from LiteLLM's own cache; the server never saw it", row)
    # Of an answer that was not streamed, LiteLLM gives the end as the time of the first token.
    streamed = first is not None and end is not None and call.stream is not False and start < first < end
    code = call.error_information.get("error_code") if isinstance(call.error_information, dict) else None
    return Logged(
        start=start,
        elapsed=None if end is None else (end - start) / 1e9,
        request_tokens=as_count(call.prompt_tokens),
        response_tokens=as_count(call.completion_tokens),
        failed=failed,
        model=as_name(call.model_group) or as_name(call.model),
        session=as_name(call.session_id),
        first_token=(first - start) / 1e9 if streamed and first is not None else None,
        http_status=_status(code) if failed else 200,
        cached_tokens=_cached(call.metadata),
    )


def _status(code: Any) -> int | None:
    number = as_count(code)
    return number if number is not None and 100 <= number <= 599 else None


def _cached(metadata: Any) -> int | None:
    """`usage_object.prompt_tokens_details.cached_tokens` of the metadata (spend logs have it as text)."""
    try:
        known = (
            msgspec.json.decode(metadata, type=_Metadata)
            if isinstance(metadata, str)
            else msgspec.convert(metadata, _Metadata)
        )
    except (msgspec.DecodeError, msgspec.ValidationError):
        return None
    details = known.usage_object.prompt_tokens_details if known.usage_object else None
    return as_count(details.get("cached_tokens")) if details else None
