"""A scriptable OpenAI-compatible server: what it answers, when, and how it misbehaves is said per request.

In tests it runs in a thread of its own (`with Mock(behave) as mock`). As a program (`mock.py --first 20 --gap 5`) it is
a process of its own, for measurements: it prints its port, and tells at GET /arrivals what it saw.
"""

import argparse
import asyncio
import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httptools
import uvloop


@dataclass
class Behaviour:
    """How one request is answered."""

    first: float = 0.0
    """Seconds to the first token."""
    gap: float = 0.0
    """Seconds between tokens."""
    tokens: int | None = None
    """Tokens of the answer; None: as many as asked for."""
    status: int = 200
    body: bytes | None = None
    """Send this instead of an answer, with `content_type`."""
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)
    stream: bool = True
    """False: one JSON document even when a stream was asked for."""
    usage: bool = True
    channel: str = "content"
    error_after: int | None = None
    """After so many tokens send an error object in the stream, under HTTP 200."""
    truncate_after: int | None = None
    """After so many tokens close the connection in mid-stream."""
    reset_after: int | None = None
    """After so many tokens reset the connection (RST)."""
    stall_after: int | None = None
    """After so many tokens say nothing any more."""
    close: str = "keep"
    """`keep`; `after`: close after the answer although keep-alive was announced; `before`: close without an answer."""
    raw: bytes | None = None
    """Write these bytes instead of an HTTP response, then close."""
    hold: bool = False
    """Do not close after `raw`."""
    keep: bool = False
    """After `raw`, wait for the next request."""
    cut: int | None = None
    """Write `raw` in two pieces, the first of so many bytes."""
    endless: bytes | None = None
    """Write these bytes as chunks of a stream, for ever."""


@dataclass
class Seen:
    """One request as the server saw it."""

    at: float
    """time.monotonic() when its last byte was read."""
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    connection: int
    opened: float
    """When that connection was made."""


def asked(body: dict[str, Any]) -> int:
    """The response tokens that a request asks for, by whatever name."""
    names = ("max_tokens", "max_completion_tokens", "max_output_tokens")
    return next((body[name] for name in names if name in body), 0)


def prompt_tokens(body: dict[str, Any]) -> int:
    """What this server counts: one per id or word, 11 for the chat template, 1 for the completions' first token."""
    messages = body.get("messages", body.get("input"))
    if isinstance(messages, str):
        messages = [{"content": messages}]
    if messages is not None:
        return 11 + sum(len(message["content"].split()) for message in messages)
    prompt = body["prompt"]
    return len(prompt) if isinstance(prompt, list) else 1 + len(prompt.split())


class Mock:
    """The server. `behave(number, seen)` says how a request is answered; numbers count from 0, probes included."""

    def __init__(
        self,
        behave: Callable[[int, Seen], Behaviour] | None = None,
        *,
        models: Behaviour | None = None,
        refuse: tuple[str, ...] = (),
        idle_close: float | None = None,
        context: int | None = None,
        tls: ssl.SSLContext | None = None,
        metrics: Callable[[], Behaviour] | None = None,
    ) -> None:
        self.behave = behave or (lambda number, seen: Behaviour())
        self.models, self.refuse, self.idle_close, self.context = models, refuse, idle_close, context
        self.tls = tls
        self.metrics = metrics or (lambda: Behaviour(status=404))
        """How GET /metrics is answered."""
        self.seen: list[Seen] = []
        self.connections = 0
        self.open: set[_Serve] = set()
        self.port = 0

    async def start(self, port: int = 0) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Serve(self), "127.0.0.1", port, backlog=4096, ssl=self.tls)
        self.port = server.sockets[0].getsockname()[1]
        return server

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}"

    @property
    def run(self) -> list[Seen]:
        """The requests of the run: the questions before it ask for one token, its rows (in these tests) for more."""
        return [seen for seen in self.seen if asked(seen.body) != 1]

    def __enter__(self) -> "Mock":
        ready = threading.Event()

        def serve() -> None:
            self._loop = uvloop.new_event_loop()
            self._server = self._loop.run_until_complete(self.start(self.port))
            ready.set()
            self._loop.run_forever()
            self._loop.close()

        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()
        ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def stop(self) -> None:
        """Stop listening and cut every connection, as a dying server does."""
        done = threading.Event()

        def die() -> None:
            self._server.close()
            for connection in list(self.open):
                connection.reset()
            done.set()

        self._loop.call_soon_threadsafe(die)
        done.wait()


class _Serve(asyncio.Protocol):
    def __init__(self, mock: Mock) -> None:
        self.mock, self.loop = mock, asyncio.get_running_loop()
        mock.connections += 1
        self.number, self.opened = mock.connections, time.monotonic()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.parser = httptools.HttpRequestParser(self)
        self.path, self.headers, self.body = b"", {}, b""
        self.mock.open.add(self)
        self.idle: asyncio.TimerHandle | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        self.mock.open.discard(self)
        if self.idle:
            self.idle.cancel()

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self.path += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode()

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        at = time.monotonic()
        path, headers, body = self.path.decode().partition("?")[0], self.headers, self.body
        self.path, self.headers, self.body = b"", {}, b""
        if self.idle:
            self.idle.cancel()
        if path.endswith("/models"):
            entry: dict[str, Any] = {"id": "mock"} | ({"max_model_len": self.mock.context} if self.mock.context else {})
            listed = Behaviour(body=json.dumps({"object": "list", "data": [entry]}).encode())
            self.document(self.mock.models or listed)
        elif path.endswith("/metrics"):
            self.answer(self.mock.metrics(), Seen(at, path, headers, {}, self.number, self.opened))
        elif path == "/arrivals":
            run = [seen.at for seen in self.mock.run]
            self.document(Behaviour(body=json.dumps(run).encode()))
        else:
            seen = Seen(at, path, headers, json.loads(body), self.number, self.opened)
            number = len(self.mock.seen)
            self.mock.seen.append(seen)
            refused = next((name for name in self.mock.refuse if name in seen.body), None)
            if refused or (isinstance(seen.body.get("prompt"), list) and "ids" in self.mock.refuse):
                message = json.dumps({"error": {"message": f"unknown field {refused}", "code": 400}}).encode()
                self.document(Behaviour(status=400, body=message))
            else:
                self.answer(self.mock.behave(number, seen), seen)

    def answer(self, how: Behaviour, seen: Seen) -> None:
        if how.close == "before":
            self.transport.close()
        elif how.raw is not None:
            self.transport.write(how.raw[: how.cut])
            if how.cut is not None:
                self.loop.call_later(0.005, self.transport.write, how.raw[how.cut :])
            if not (how.hold or how.keep):
                self.transport.close()
        elif how.endless is not None:
            self.transport.write(_Stream.HEAD)
            self.flood(_chunk(how.endless))
        elif how.body is not None or how.status != 200:
            self.loop.call_later(how.first, self.document, how)
        elif not how.stream:
            tokens = asked(seen.body) if how.tokens is None else how.tokens
            choice = {"message": {"content": "x " * tokens}, "text": "x " * tokens, "finish_reason": "length"}
            usage = {"prompt_tokens": prompt_tokens(seen.body), "completion_tokens": tokens}
            how.body = json.dumps({"choices": [choice], "usage": usage}).encode()
            self.loop.call_later(how.first, self.document, how)
        else:
            _Stream(self, how, seen)

    def flood(self, chunk: bytes) -> None:
        if not self.transport.is_closing():
            if self.transport.get_write_buffer_size() < 1 << 20:
                self.transport.write(chunk * 16)
            self.loop.call_later(0.0005, self.flood, chunk)

    def document(self, how: Behaviour) -> None:
        body = how.body or b""
        extra = "".join(f"{name}: {value}\r\n" for name, value in how.headers.items())
        head = (
            f"HTTP/1.1 {how.status} X\r\nContent-Type: {how.content_type}\r\n{extra}Content-Length: {len(body)}\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.finish(how.close)

    def finish(self, close: str) -> None:
        if close == "after":
            self.transport.close()
        elif self.mock.idle_close is not None:
            self.idle = self.loop.call_later(self.mock.idle_close, self.transport.close)

    def reset(self) -> None:
        if self.transport.is_closing():
            return
        # Linger of zero seconds: close sends RST.
        handle = self.transport.get_extra_info("socket")
        handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class _Stream:
    """One streamed answer, paced by absolute deadlines so that its own lateness does not add up."""

    HEAD = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n"
        b"Connection: keep-alive\r\n\r\n"
    )

    def __init__(self, serve: _Serve, how: Behaviour, seen: Seen) -> None:
        self.serve, self.how, self.seen = serve, how, seen
        self.tokens = asked(seen.body) if how.tokens is None else how.tokens
        self.sent = 0
        self.chat = "messages" in seen.body
        self.responses = seen.path.endswith("/responses")
        if self.responses:
            channel = {"content": "output_text", "reasoning": "reasoning_text"}[how.channel]
            kind = f"response.{channel}.delta"
            delta = json.dumps({"type": kind, "delta": "tok ", "output_index": 0}).encode()
        elif self.chat:
            delta = json.dumps({"choices": [{"delta": {how.channel: "tok "}, "finish_reason": None}]}).encode()
        else:
            delta = json.dumps({"choices": [{"text": "tok ", "finish_reason": None}]}).encode()
        named = b"event: " + kind.encode() + b"\n" if self.responses else b""
        self.event = _chunk(named + b"data: " + delta + b"\n\n")
        self.next = serve.loop.time() + how.first
        serve.loop.call_at(self.next, self.begin)

    def begin(self) -> None:
        role = b'data: {"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
        self.serve.transport.write(self.HEAD + (_chunk(role) if self.chat else b""))
        self.step()

    def step(self) -> None:
        how, serve = self.how, self.serve
        if serve.transport.is_closing():
            return
        while True:
            if how.error_after == self.sent:
                error = {"error": {"message": "no room left", "code": 503}}
                serve.transport.write(_chunk(b"data: " + json.dumps(error).encode() + b"\n\n") + b"0\r\n\r\n")
                serve.finish(how.close)
                return
            if how.truncate_after == self.sent:
                serve.transport.close()
                return
            if how.reset_after == self.sent:
                serve.loop.call_later(0.02, serve.reset)  # after what was written has gone
                return
            if how.stall_after == self.sent:
                return
            if self.sent >= self.tokens:
                break
            serve.transport.write(self.event)
            self.sent += 1
            if how.gap:
                self.next += how.gap
                serve.loop.call_at(self.next, self.step)
                return
        last = b'data: {"choices":[{"delta":{},"text":"","finish_reason":"length"}]}\n\n'
        usage = {"prompt_tokens": prompt_tokens(self.seen.body), "completion_tokens": self.sent}
        if how.usage and "stream_options" in self.seen.body:
            last += b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"
        last += b"data: [DONE]\n\n"
        if self.responses:
            counts = {"input_tokens": usage["prompt_tokens"], "output_tokens": self.sent}
            ended = {"type": "response.completed", "response": {"status": "completed", "usage": counts}}
            last = b"event: response.completed\ndata: " + json.dumps(ended).encode() + b"\n\n"
        serve.transport.write(_chunk(last) + b"0\r\n\r\n")
        serve.finish(how.close)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--first", type=float, default=20, help="ms to the first token")
    parser.add_argument("--gap", type=float, default=5, help="ms between tokens")
    arguments = parser.parse_args()

    async def serve() -> None:
        mock = Mock(lambda number, seen: Behaviour(first=arguments.first / 1e3, gap=arguments.gap / 1e3))
        await mock.start(arguments.port)
        print(mock.port, flush=True)
        await asyncio.Event().wait()

    uvloop.run(serve())


if __name__ == "__main__":
    main()
