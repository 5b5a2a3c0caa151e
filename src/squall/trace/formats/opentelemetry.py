"""OpenTelemetry spans of requests to language models, as OTLP JSON: the GenAI semantic conventions.

A document (ExportTraceServiceRequest) or one a line, as the collector's file exporter writes. The names are those of
the conventions 1.37 (`gen_ai.usage.input_tokens`), their predecessors (`gen_ai.usage.prompt_tokens`, which vLLM and
SGLang still write on their spans `llm_request`), and OpenInference's (`llm.token_count.prompt`).

A client's span and the server's within it tell of one request: the innermost counts, since that is what a server saw.
"""

from collections.abc import Iterator
from typing import Any

import msgspec

from squall.trace.formats.logged import Found, Logged, as_count, as_name, checked, parsed
from squall.trace.formats.rows import Parsed

_REQUEST = ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens", "llm.token_count.prompt")
_RESPONSE = ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens", "llm.token_count.completion")
_CACHED = (
    "gen_ai.usage.cache_read.input_tokens",
    "gen_ai.usage.cached_tokens",
    "llm.token_count.prompt_details.cache_read",
)
_FIRST = ("gen_ai.response.time_to_first_chunk", "gen_ai.latency.time_to_first_token")
"""Seconds."""
_MODEL = ("gen_ai.request.model", "gen_ai.response.model", "llm.model_name")
_SESSION = ("gen_ai.conversation.id", "session.id")
_STATUS = ("http.response.status_code", "http.status_code")
_OPERATIONS = ("chat", "text_completion", "generate_content", "completion")
_READ = frozenset(
    (*_REQUEST, *_RESPONSE, *_CACHED, *_FIRST, *_MODEL, *_SESSION, *_STATUS, "gen_ai.operation.name", "error.type")
)


class _Attribute(msgspec.Struct):
    key: str = ""
    value: msgspec.Raw = msgspec.Raw(b"{}")


class _Value(msgspec.Struct):
    stringValue: str | None = None
    intValue: int | str | None = None
    doubleValue: float | str | None = None


class _Status(msgspec.Struct):
    code: int | str = 0


class _Span(msgspec.Struct):
    name: str = ""
    traceId: str = ""
    spanId: str = ""
    parentSpanId: str = ""
    startTimeUnixNano: int | str = 0
    endTimeUnixNano: int | str = 0
    attributes: list[_Attribute] = []
    status: _Status | None = None


class _Scope(msgspec.Struct):
    spans: list[_Span] = []


class _Resource(msgspec.Struct):
    scopeSpans: list[_Scope] = []
    instrumentationLibrarySpans: list[_Scope] = []
    """Until OTLP 0.19."""


class _Export(msgspec.Struct):
    resourceSpans: list[_Resource] = []


_decode = msgspec.json.Decoder(_Export).decode
_decode_value = msgspec.json.Decoder(_Value).decode


def parse_spans(data: bytes) -> Parsed:
    """Every innermost span of a request for generated text; row n is the n-th span of the file."""
    found, notes = Found(), list[str]()
    spans, asked = list(_spans(data, found)), {}
    parents: dict[tuple[str, str], str] = {}
    for row, span in enumerate(spans, start=1):
        parents[span.traceId, span.spanId] = span.parentSpanId
        said = _said(span)
        if _generates(span, said):
            asked[row] = span, said
    outer = {
        ancestor for span, _ in asked.values() for ancestor in _ancestors(span, parents)
    }  # of a request: spans that only pass it on
    requests = []
    for row, (span, said) in asked.items():
        if (span.traceId, span.spanId) in outer:
            found.add("info", "outer-span", "holds the span of the same request nearer to the server; left out", row)
            continue
        logged = _logged(span, said, row, found)
        if logged is not None and (kept := checked(logged, row, found)) is not None:
            requests.append(kept)
    others = len(spans) - len(asked)
    if others:
        notes.append(f"{others:,} of {len(spans):,} spans are of something else than generating text")
    if found.count("outer-span"):
        notes.append(f"{found.count('outer-span'):,} spans hold another span of the same request and were left out")
    return parsed(requests, found, notes)


def _spans(data: bytes, found: Found) -> Iterator[_Span]:
    data = data.removeprefix(b"\xef\xbb\xbf").strip()
    try:
        exports = [_decode(data)]
    except (msgspec.DecodeError, UnicodeDecodeError) as whole:
        exports = []
        lines = data.split(b"\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                exports.append(_decode(line))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                if number == 1:
                    found.add("error", "bad-line", f"it cannot be read as OTLP JSON: {whole}", 1)
                    return
                half = ": the last line is half-written; cut it off" if number == len(lines) else ""
                found.add("error", "bad-line", f"line {number} cannot be read as OTLP JSON: {error}{half}", number)
    for export in exports:
        for resource in export.resourceSpans:
            for scope in (*resource.scopeSpans, *resource.instrumentationLibrarySpans):
                yield from scope.spans


def _said(span: _Span) -> dict[str, Any]:
    """Those of the span's attributes that are read. The others, which may hold texts, are not even decoded."""
    said: dict[str, Any] = {}
    for attribute in span.attributes:
        if attribute.key in _READ:
            try:
                value = _decode_value(attribute.value)
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue
            known = (value.intValue, value.doubleValue, value.stringValue)
            said[attribute.key] = next((part for part in known if part is not None), None)
    return said


def _generates(span: _Span, said: dict[str, Any]) -> bool:
    operation = said.get("gen_ai.operation.name")
    if operation is not None:
        return operation in _OPERATIONS
    return span.name == "llm_request" or any(name in said for name in _RESPONSE)


def _ancestors(span: _Span, parents: dict[tuple[str, str], str]) -> Iterator[tuple[str, str]]:
    at, seen = (span.traceId, span.parentSpanId), set[tuple[str, str]]()
    while at[1] and at not in seen:
        seen.add(at)
        yield at
        at = (at[0], parents.get(at, ""))


def _logged(span: _Span, said: dict[str, Any], row: int, found: Found) -> Logged | None:
    start, end = as_count(span.startTimeUnixNano), as_count(span.endTimeUnixNano)
    if not start or start < 0:
        found.add("error", "bad-line", f"startTimeUnixNano is {str(span.startTimeUnixNano)[:40]!r}, no time", row)
        return None
    first = _first(said, _FIRST)
    status = as_count(_first(said, _STATUS))
    return Logged(
        start=start,
        elapsed=(end - start) / 1e9 if end else None,
        request_tokens=as_count(_first(said, _REQUEST)),
        response_tokens=as_count(_first(said, _RESPONSE)),
        failed=(span.status is not None and span.status.code in (2, "2", "STATUS_CODE_ERROR")) or "error.type" in said,
        model=as_name(_first(said, _MODEL)),
        session=as_name(_first(said, _SESSION)),
        first_token=float(first) if isinstance(first, int | float) and 0 <= first < 1e7 else None,
        http_status=status if status is not None and 100 <= status <= 599 else None,
        cached_tokens=as_count(_first(said, _CACHED)),
    )


def _first(said: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((said[name] for name in names if said.get(name) is not None), None)
